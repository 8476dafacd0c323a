"""The roster of a sweep: what it takes up again after an interruption, and what it keeps of how trials go."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.data.prepare import prepared
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints, name_at
from cluster.training.run_directory import RunDirectory
from cluster.tuning.ledger import LINEAGE, SweepDirectory, TrialRecord
from cluster.tuning.roster import OpenData, Roster
from cluster.tuning.space import Space
from cluster.tuning.sweep import _side_by_side
from cluster.tuning.target import target
from nn_models.errors import UserError
from tests.unit import made


@pytest.fixture
def directory(tmp_path):
    spec = made.features(tmp_path / "source", 60, validation_fraction=0.2)
    recipe = load_recipe(
        {
            "name": "small",
            "model": {"kind": "mlp", "hidden": []},
            "data": spec.model_dump(mode="json"),
            "sweep": {"space": {"optimizer.lr": {"grid": [0.1, 0.2, 0.3]}}, "searcher": "grid", "metric": "train/loss"},
        }
    )
    sweep = SweepDirectory(str(tmp_path / "sweep"))
    sweep.begin(recipe, {})
    return sweep


class Heard:
    """A searcher that remembers what it is told."""

    def __init__(self) -> None:
        self.told: dict[int, float | None] = {}

    def ask(self, index: int) -> dict[str, Any]:
        return {"optimizer.lr": 0.1 * (index + 1)}

    def tell(self, index: int, overrides: dict[str, Any], value: float | None) -> None:
        self.told[index] = value


def roster_of(directory: SweepDirectory) -> tuple[Roster, Heard]:
    recipe = directory.recipe()
    manifest = prepared(recipe.data).manifest
    assert recipe.sweep is not None
    roster = Roster(recipe, Space(recipe.sweep), target(recipe, manifest), directory, OpenData())
    heard = Heard()
    roster._searcher = heard  # type: ignore[assignment]
    return roster, heard


def begun(directory: SweepDirectory, index: int, losses: list[float], **record: Any) -> Path:
    """A trial that has trained an epoch for each loss."""
    run = RunDirectory(directory.trial(index))
    run.write_start(directory.recipe(), {})
    line = {"split": "train", "end_of_epoch": True, "time_s": 1.0}
    lines = [{**line, "step": 5 * (epoch + 1), "epoch": epoch, "loss": loss} for epoch, loss in enumerate(losses)]
    untrained = {"step": 0, "epoch": 0, "split": "train", "end_of_epoch": True, "time_s": 0.0, "loss": 99.0}
    text = "".join(json.dumps(entry) + "\n" for entry in [untrained, *lines])
    run.folder.write_text("metrics.jsonl", text)
    directory.write(TrialRecord(index, {"optimizer.lr": 0.1 * (index + 1)}, **record))
    return Path(run.folder.path)


def test_an_interrupted_trial_keeps_its_best_value(directory):
    begun(directory, 0, [0.5, 0.2, 0.9], status="running", attempts=1)
    roster, _ = roster_of(directory)
    roster.take_up(retry_failed=False)
    (record,) = roster.state.records
    assert (record.status, record.value) == ("waiting", 0.2)
    assert roster.left == 3
    trial = roster.next()
    assert trial is not None
    roster.on_start(trial.index, 0)
    roster.on_epoch(0, {"epoch": 4, "train/loss": 0.4})
    assert (record.value, record.epochs, record.attempts) == (0.2, 4, 2)


def test_a_trial_that_ended_with_the_driver_is_not_run_again(directory):
    place = begun(directory, 0, [0.5, 0.2, 0.9], status="running", attempts=1)
    ended = {"status": "finished", "epochs": 3, "metrics": {"train/loss": 0.9, "test/loss": None}}
    (place / "result.json").write_text(json.dumps(ended))
    roster, heard = roster_of(directory)
    roster.take_up(retry_failed=False)
    (record,) = directory.records()
    assert (record.status, record.value, record.epochs, record.metrics) == ("finished", 0.2, 3, {"train/loss": 0.9})
    assert roster.left == 2
    assert heard.told == {0: 0.2}


def test_what_a_member_of_a_population_left_behind_is_not_its_value(directory):
    begun(directory, 0, [0.1, 0.6, 0.5], status="running", value=0.7)
    taken = [{"epoch": 0, "trial": 1, "set": {}}, {"epoch": 1, "trial": 0, "set": {}}]
    directory.trial(0).write_json(LINEAGE, taken)
    roster, _ = roster_of(directory)
    roster.take_up(retry_failed=False)
    assert roster.state.records[0].value == 0.5


def test_schedulers_judge_by_trained_nets_and_searchers_are_told_of_failures(directory):
    begun(directory, 0, [0.5, 0.2], status="pruned", value=0.2)
    begun(directory, 1, [0.4], status="failed", value=0.4)
    roster, heard = roster_of(directory)
    roster.take_up(retry_failed=False)
    assert roster.past == {0: [(1, 0.5), (2, 0.2)], 1: [(1, 0.4)]}
    assert heard.told == {0: 0.2, 1: None}


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [("pruned", None, {"status": "stopped"}), ("failed", "no memory", {"status": "failed", "error": "no memory"})],
)
def test_a_trial_that_was_ended_from_outside_has_a_result(directory, status, error, expected):
    place = begun(directory, 0, [0.5, 0.2], status="running")
    roster, _ = roster_of(directory)
    roster.take_up(retry_failed=False)
    roster.on_start(0, 0)
    roster.on_end(0, status, error)
    result = json.loads((place / "result.json").read_text())
    assert result.items() >= expected.items()
    assert result["metrics"] == {"train/loss": 0.2}
    assert result["steps"] == 10
    assert {"wall_s", "time_to_first_step_s"} <= result.keys()
    assert roster.num_ended == (status == "pruned")


def test_only_trials_at_the_same_step_train_together(tmp_path):
    runs = []
    for number, steps in enumerate([(), (10, 20), (10,), (20,), ()]):
        checkpoints = Checkpoints(Folder(tmp_path / str(number) / "checkpoints"), keep=2)
        for step in steps:
            checkpoints.folder.write_bytes(name_at(step), b"")
        runs.append(str(tmp_path / str(number)))
    assert _side_by_side(runs) == [[0, 4], [1, 3], [2]]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_record_is_named(content, directory):
    place = begun(directory, 0, [0.5], status="running")
    (place / "trial.json").write_text(content)
    with pytest.raises(UserError, match=r"trials/0000/trial.json: damaged .*; delete .*trials/0000 to run it again"):
        directory.records()
