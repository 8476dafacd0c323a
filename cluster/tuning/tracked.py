"""Tracked: the trials of a sweep that has ended, each told to trackers as a run of its own."""

from collections.abc import Sequence

from cluster.runs.tracking.tracker import Status as RunStatus
from cluster.runs.tracking.tracking import Names, Tracking
from cluster.training.run_directory import RunDirectory, read_metrics
from cluster.tuning.ledger import SweepDirectory, TrialRecord
from cluster.tuning.outcome import trial_recipe

STATUS: dict[str, RunStatus] = {"finished": "finished", "pruned": "stopped", "failed": "failed"}


def track_trials(names: Sequence[str], sweep: SweepDirectory) -> dict[str, str]:
    """Tell these trackers of each trial that has ended: its values, all its lines of metrics, its figures and weights.

    A tracker is not told again of a trial that it knows, so a sweep that goes on adds its new ones. One that fails says
    so once and is told no more. Returns where people find the last of them, by tracker.
    """
    recipe, left, found = sweep.recipe(), list(names), dict[str, str]()
    for record in sweep.records():
        folder = sweep.trial(record.index)
        lines = [] if record.status not in STATUS else read_metrics(RunDirectory(folder))
        told = [tracker for tracker in left if Names(folder).known(tracker) is None]
        if not told or not lines:
            continue
        record.lineage = sweep.lineage(record.index)
        name = f"{sweep.folder.uri.rstrip('/').rpartition('/')[2]}-{record.name}"
        described = trial_recipe(recipe, record, name=recipe.name)
        with Tracking(told, described, folder.uri, name=name, ended=_ended(record)) as tracking:
            for line in lines:
                tracking(line)
        found |= tracking.where
        left = [tracker for tracker in left if tracker not in told or tracker in tracking.where]
    return found


def _ended(record: TrialRecord) -> tuple[RunStatus, dict[str, float]]:
    metrics = {name: value for name, value in record.metrics.items() if value is not None}
    return STATUS[record.status], metrics
