"""Roster: the trials of a sweep, which comes next, and how each goes; every change is in its record at once."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.data.prepare import prepared
from cluster.data.shards import DataSet
from cluster.recipe.fit import check
from cluster.recipe.recipe import Recipe
from cluster.training.checkpoints import changed_data
from cluster.training.identity import other_data
from cluster.training.run_directory import RESULT, RunDirectory, read_environment, read_metrics, result_of
from cluster.training.splits import Splits, open_splits
from cluster.tuning.ledger import ENDED, Status, SweepDirectory, SweepListener, SweepState, TrialRecord
from cluster.tuning.messages import EPOCH, TrialConfig, Where
from cluster.tuning.searchers import make_searcher
from cluster.tuning.space import Space
from cluster.tuning.target import Target, figures, history, kept_by
from nn_models.errors import UserError, is_within


class OpenData:
    """The data of a sweep's trials. Those that use the same rows share them."""

    def __init__(self) -> None:
        self.opened: dict[Where, tuple[DataSet, Splits]] = {}

    def of(self, recipe: Recipe) -> tuple[DataSet, Splits]:
        """The data of a trial. Raises UserError where it cannot be had."""
        data = prepared(recipe.data)
        where = where_of(data, recipe)
        if where not in self.opened:
            self.opened[where] = data, open_splits(data, window=recipe.data.shuffle_window)
        return self.opened[where]


def where_of(data: DataSet, recipe: Recipe) -> Where:
    """Which rows of its prepared data a recipe uses."""
    return Where(data.folder.uri, recipe.data.shuffle_window)


class Roster:
    """What Tune asks for trials, and tells how they went."""

    def __init__(self, recipe: Recipe, space: Space, target: Target, directory: SweepDirectory, data: OpenData) -> None:
        assert recipe.sweep is not None
        self._base, self._spec = recipe.model_copy(update={"sweep": None}), recipe.sweep
        self._space, self._target, self._directory, self._data = space, target, directory, data
        self._kept_by = kept_by(self._base, prepared(recipe.data).manifest)
        self._searcher = make_searcher(self._spec, space, target.mode)
        self.state = SweepState(target, space.num_trials, 1)
        self.past: dict[int, list[tuple[int, float]]] = {}  # (epoch, value) of trials that ended before a resumption
        self.num_ended = 0  # since this process took over
        self.listener: SweepListener | None = None
        self._waiting: list[TrialRecord] = []
        self._started: dict[int, float] = {}
        self._earlier: dict[int, int] = {}  # attempts before this process took over

    def take_up(self, retry_failed: bool) -> None:
        """Go on with what is in the directory."""
        again = ("waiting", "running", *(("failed",) if retry_failed else ()))
        found = {record.index: record for record in self._directory.records()}
        for index in range(max(found, default=-1) + 1):
            # one whose folder somebody deleted is asked for again
            record = found.get(index) or TrialRecord(index, dict(self._searcher.ask(index) or {}))
            self.state.records.append(record)
            if record.status in ("waiting", "running"):
                self._look_for_its_end(record)
            if record.status in again:
                if record.status == "failed":  # its result would say that it has ended
                    self._directory.trial(index).delete(RESULT)
                record.status = "waiting"
                self._earlier[index] = record.attempts
                self._remember(record)
                self._waiting.append(record)
            elif record.status != "invalid":
                self._refuse_other_data(record)
                self._searcher.tell(index, record.overrides, None if record.status == "failed" else record.value)
                self.past[index] = self._history(index)

    def _refuse_other_data(self, record: TrialRecord) -> None:
        """Raise UserError where a trial that has ended was trained on other data than its values now name."""
        if not any(is_within(path, "data") for path in self._spec.space):
            return  # all have the sweep's own data
        place = self._directory.trial(record.index)
        manifest = prepared(self._space.trial(self._base, record.overrides).data).manifest
        if differs := other_data(read_environment(place).get("data", {}), manifest):
            raise changed_data(str(place), differs)

    def _look_for_its_end(self, record: TrialRecord) -> None:
        """The driver may have died between a trial's end and its record."""
        result = RunDirectory(self._directory.trial(record.index)).result()
        if result is None or result["status"] != "finished":
            return
        self._remember(record)
        record.status, record.epochs, record.lineage = (
            "finished",
            result["epochs"],
            self._directory.lineage(record.index),
        )
        value = record.value
        self._take(record, result["metrics"])
        if "last" not in result:  # of an earlier version, whose metrics are those of the last epoch
            record.value = value
        self._changed(record)

    def _remember(self, record: TrialRecord) -> None:
        """Its best value so far: an epoch changes no record, and the best may lie behind the newest checkpoint."""
        lineage = self._directory.lineage(record.index)
        own = lineage[-1][EPOCH] if lineage else 0  # what came before was left behind for another's state
        for epoch, metrics in figures(read_metrics(RunDirectory(self._directory.trial(record.index)))):
            if epoch > own:
                self._seen(record, metrics)

    def _history(self, index: int) -> list[tuple[int, float]]:
        """(epochs done, value) of a trial, as its run directory has it."""
        return history(read_metrics(RunDirectory(self._directory.trial(index))), self._target.metric)

    def _seen(self, record: TrialRecord, metrics: Mapping[str, float]) -> None:
        """A trial had these metrics after an epoch: its record has those of the weights that it keeps."""
        if self._kept_by is None or self._rank(metrics) < self._rank(record.metrics):
            self._take(record, metrics)

    def _rank(self, metrics: Mapping[str, float | None]) -> tuple[float, float, float]:
        """Less is better: as Progress.take_best chooses the weights to keep; of others by the sweep's own metric."""
        for place, by in enumerate((self._kept_by, self._target)):
            value = metrics.get(by.metric) if by is not None else None
            if by is not None and value is not None and math.isfinite(value):
                loss = metrics.get(f"{by.metric.partition('/')[0]}/loss") or 0.0
                return place, -value if by.mode == "max" else value, loss
        return math.inf, math.inf, math.inf

    def _take(self, record: TrialRecord, metrics: Mapping[str, Any]) -> None:
        """Make these the figures of a trial."""
        record.metrics = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
        record.value = record.metrics.get(self._target.metric)

    @property
    def left(self) -> int:
        """Trials that have not ended."""
        return self._space.num_trials - len(self.state.records) + len(self._waiting)

    def put_back(self, trials: Sequence[TrialConfig]) -> None:
        """Have trials that were asked for asked for again."""
        self._waiting = [self.state.records[trial.index] for trial in trials]

    # -- what Tune asks and tells ------------------------------------------------------------------------------------

    def next(self) -> TrialConfig | None:
        """The next trial: one that was interrupted, or a new sample, which the recipe may refuse."""
        if self._waiting:
            record = self._waiting.pop(0)
            return self._config(record, self._space.trial(self._base, record.overrides))
        while len(self.state.records) < self._space.num_trials:
            index = len(self.state.records)
            overrides = self._searcher.ask(index)
            if overrides is None:
                return None
            record = TrialRecord(index, dict(overrides))
            self.state.records.append(record)
            try:
                recipe = self._space.trial(self._base, overrides)
                check(recipe, self._data.of(recipe)[0].manifest)
            except UserError as error:
                record.status, record.error = "invalid", str(error)
                self._searcher.tell(index, overrides, None)
                self._changed(record)
                continue
            self._changed(record)
            return self._config(record, recipe)
        return None

    def _config(self, record: TrialRecord, recipe: Recipe) -> TrialConfig:
        data, _ = self._data.of(recipe)
        return TrialConfig(
            index=record.index,
            overrides=record.overrides,
            recipe=recipe,
            run=self._directory.trial(record.index).uri,
            where=where_of(data, recipe),
        )

    def mutated(self, trial: TrialConfig, donor: TrialConfig, draw: int) -> TrialConfig:
        """The recipient with the donor's values, mutated."""
        rng = np.random.default_rng([self._spec.seed, trial.index, draw])
        overrides = self._space.perturb(donor.overrides, rng)
        record, theirs = self.state.records[trial.index], self.state.records[donor.index]
        record.overrides, record.value = dict(overrides), theirs.value  # from now on its past is the donor's
        record.metrics = dict(theirs.metrics)
        self._changed(record)
        return replace(trial, overrides=overrides, recipe=self._space.trial(self._base, overrides))

    def on_start(self, index: int, failures: int) -> None:
        """A trial begins, or begins again after so many failures."""
        record = self.state.records[index]
        if record.status in ENDED:  # it has left a group of fused trials that is started again
            return
        record.status, record.attempts = "running", self._earlier.get(index, 0) + failures + 1
        self._started.setdefault(index, time.time())
        self._changed(record)

    def on_epoch(self, index: int, result: Mapping[str, Any]) -> None:
        """A trial has these metrics after one more epoch."""
        record = self.state.records[index]
        record.epochs = int(result.get(EPOCH, record.epochs))
        self._seen(
            record,
            {name: float(value) for name, value in result.items() if "/" in name and isinstance(value, (int, float))},
        )
        self._changed(record, write=False)

    def on_end(self, index: int, status: Status, error: str | None) -> None:
        """A trial has ended. The first word counts: one that has left a group is not told of again."""
        record = self.state.records[index]
        if record.status in ENDED:
            return
        record.status, record.error = status, error
        began, run = self._started.get(index, time.time()), RunDirectory(self._directory.trial(index))
        record.time_s = round(record.time_s + time.time() - began, 3)
        record.lineage = self._directory.lineage(index)
        self.num_ended += status != "failed"
        result = run.result() if run.exists() else None
        if run.exists() and result is None:  # it was stopped from outside, or failed before it could write one
            how = {"status": "failed", "error": error} if status == "failed" else {"status": "stopped"}
            run.write_result(result_of({**how, "metrics": record.metrics}, run, began))
        if result is not None and status != "failed" and "checkpoint" in result:  # concluded: tested, too
            self._take(record, result["metrics"])
        self._searcher.tell(index, record.overrides, None if status == "failed" else record.value)
        self._changed(record)

    def _changed(self, record: TrialRecord, *, write: bool = True) -> None:
        if write:
            self._directory.write(record)
        if self.listener:
            self.listener(self.state)
