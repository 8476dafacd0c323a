"""Trials as Ray Tune runs them: one step is one epoch, and all state is in the trial's own run directory.

Tune's checkpoints carry a trial to another one's actor (population-based training); a trial whose process died goes on
from the checkpoints in its run directory, as any run does.
"""

import math
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from cluster.data.shards import DataSet
from cluster.errors import Diverged, Lost
from cluster.runs.train import Training, open_training, run_here, write_end
from cluster.runtime import RaySession, Workers, device_name
from cluster.storage import Folder
from cluster.training.identity import data_facts
from cluster.training.run_directory import NO_METRICS, RESULT, RunDirectory
from cluster.training.splits import Splits, open_splits
from cluster.tuning.ledger import LINEAGE, read_lineage
from cluster.tuning.messages import CONFIG, DONE, EPOCH, ERROR, OUTCOME, TrialConfig, Where
from cluster.tuning.space import followed
from nn_models.errors import UserError

WEIGHTS = "model/model.safetensors"
ABORT_TIMEOUT_S = 30


@dataclass(frozen=True)
class World:
    """What all trials of a sweep have in common; sent once through the object store."""

    data: Mapping[Where, tuple[Splits, dict[str, Any]]]  # what is known beforehand, with its tables as references
    workers: Workers  # of each trial
    num_workers: int  # of each trial, as its result.json says: 0 where it trains in its own process
    environment: Mapping[str, Any]  # environment.json, but for the device
    embedded: bool  # whether Ray is one of our own, on this machine alone
    path: list[str]  # sys.path of the driver
    folder: Path | None = None  # see RaySession

    def enter(self) -> None:
        """Make this process a place for trials."""
        sys.path.extend(part for part in self.path if part not in sys.path)
        torch.set_num_threads(self.workers.cpus)


class Trial(tune.Trainable):
    """Starts when its first step is asked for: by then Tune has said whether it goes on from another's checkpoint."""

    def setup(self, config: dict[str, Any], world: World | None = None) -> None:
        """See Trainable."""
        assert world is not None
        self.world = world
        world.enter()
        self._tables: dict[Where, Splits] = {}
        self.began, self.done = False, 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """See Trainable: this process takes the next trial."""
        self.end()
        self.began = False
        return True

    def step(self) -> dict[str, Any]:
        """See Trainable: the next epoch."""
        try:
            if not self.began:
                self.done = 0
                self.begin()
                self.began = True
            return self.advance()
        except (Diverged, UserError) as error:  # would only happen again
            self.end()
            return {EPOCH: self.done, OUTCOME: "failed", ERROR: str(error), DONE: True}

    def cleanup(self) -> None:
        """See Trainable."""
        self.end()

    def splits(self) -> Splits:
        """The trial's data; its tables are views into shared memory, but where the space is of the data itself."""
        where = self.config[CONFIG].where
        if where not in self._tables and where in self.world.data:
            splits, references = self.world.data[where]
            held = dict(zip(references, ray.get(list(references.values())), strict=True))
            self._tables[where] = replace(splits, tables=held)
        elif where not in self._tables:
            self._tables[where] = open_splits(DataSet(where.folder), window=where.window)
        return self._tables[where]

    @property
    def trial(self) -> TrialConfig:
        """What the sweep says of the trial."""
        found: TrialConfig = self.config[CONFIG]
        return found

    def begin(self) -> None:
        """Open the run, or go on with it."""
        raise NotImplementedError

    def advance(self) -> dict[str, Any]:
        """The result of one more epoch."""
        raise NotImplementedError

    def end(self) -> None:
        """Close the run, whether or not it has come to its end."""
        raise NotImplementedError

    def open_run(self) -> None:
        """Begin the trial's run directory, where that has not been done."""
        self.directory = RunDirectory(Folder(self.trial.run))
        self.started = time.time()
        self.directory.folder.delete(RESULT)  # of an attempt that failed
        # anew where it goes on: its data may have moved
        self.directory.write_start(followed(self.trial.recipe, read_lineage(self.directory.folder)), self.facts())

    def write_end(self, status: dict[str, Any]) -> None:
        """Leave result.json of a run that has ended so."""
        write_end(status, self.directory, num_workers=self.world.num_workers, began=self.started)

    def facts(self) -> dict[str, Any]:
        """environment.json of a trial in this process."""
        data = data_facts(self.splits().manifest)
        return {**self.world.environment, "device": device_name(self.world.workers.use_gpu), "data": data}

    def session(self) -> RaySession:
        """Ray, for a run that has processes of its own."""
        _, stored = self.world.data.get(self.trial.where, (None, None))
        world, placed = self.world, self.world.workers.coordinated
        return RaySession(ray, embedded=world.embedded, folder=world.folder, placed=placed, stored=stored)

    # -- what population-based training exchanges --------------------------------------------------------------------

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """See Trainable: the newest checkpoint of the run."""
        self.settle()
        run = self.directory.folder
        names = (run / "checkpoints").names() if run.exists("checkpoints") else []
        newest = [name for name in names if name.startswith("step-")][-1:]
        for name in newest:
            Path(checkpoint_dir, name).write_bytes((run / "checkpoints").read_bytes(name))
        if run.exists(WEIGHTS):  # the best so far belong to the state
            Path(checkpoint_dir, "model.safetensors").write_bytes(run.read_bytes(WEIGHTS))
        lineage = read_lineage(run)
        Folder(checkpoint_dir).write_json(LINEAGE, lineage or [self._own(0)])

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See Trainable: the run goes on from another's state, or from an earlier one of its own."""
        self.end()
        self.began = False
        given, run = Folder(str(checkpoint)), Folder(self.trial.run)
        for old in (run / "checkpoints").names() if run.exists("checkpoints") else []:
            (run / "checkpoints").delete(old)
        run.delete(WEIGHTS)  # the best of a past that is left behind
        for name in given.names():
            if name.startswith("step-"):
                (run / "checkpoints").write_bytes(name, given.read_bytes(name))
            elif name == "model.safetensors":
                run.write_bytes(WEIGHTS, given.read_bytes(name))
        lineage = given.read_json(LINEAGE)
        own = self._own(self._epochs_in(given))
        if {**lineage[-1], EPOCH: 0} != {**own, EPOCH: 0}:
            lineage.append(own)
        run.write_json(LINEAGE, lineage)
        recipe = followed(self.trial.recipe, lineage)
        RunDirectory(run).write_start(recipe, self.facts())  # what trains this run again

    def _own(self, epoch: int) -> dict[str, Any]:
        return {EPOCH: epoch, "trial": self.trial.index, "set": dict(self.trial.overrides)}

    @staticmethod
    def _epochs_in(given: Folder) -> int:
        from cluster.training.checkpoints import Checkpoints

        state = Checkpoints(given, keep=1).newest()
        return int(state["progress"]["epoch"]) if state else 0

    def settle(self) -> None:
        """Return once all that is to be written is."""


class EpochTrial(Trial):
    """One epoch a step, driven from this process: the ordinary loop, or the coordinator of a GAN's halves."""

    training: Training | None = None

    def begin(self) -> None:
        """See Trial."""
        self.open_run()
        trial, workers = self.trial, self.world.workers
        session = self.session() if workers.coordinated and workers.most else None
        run = self.directory.folder
        with self._failing():
            self.training = open_training(trial.recipe, self.splits(), run, workers, session)
            self.epochs = self.training.epochs()

    def advance(self) -> dict[str, Any]:
        """See Trial. The last epoch's step also measures the test split."""
        assert self.training is not None
        with self._failing():
            while (metrics := next(self.epochs, None)) is not None and not self.training.ended:
                epoch = self.training.progress.epoch
                if self._compared(metrics) and epoch > self.done:  # those trained again after a restart are known
                    self.done = epoch
                    return {EPOCH: epoch, **finite(metrics)}
            result = self.training.conclude()
            self.end()
            self.write_end({"status": "finished", **result})
        return {EPOCH: result["epochs"], **last_of(result), OUTCOME: "finished", DONE: True}

    def _compared(self, metrics: Mapping[str, float]) -> bool:
        """Whether trials are compared after an epoch with such metrics: not where a GAN's was not looked at."""
        validated = any(name.startswith("validation/") for name in metrics)
        return validated or not self.splits().manifest.rows("validation")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Close a run that fails in the block, and leave its result.json."""
        try:
            yield
        except Exception as error:
            if self.training:
                self.done = self.training.progress.epoch
            try:
                self.end()
            finally:
                with suppress(Lost):  # told already
                    self.write_end({"status": "failed", "error": str(error)})
            raise

    def settle(self) -> None:
        """See Trial."""
        if self.training:
            self.training.background.wait()

    def end(self) -> None:
        """See Trial."""
        training, self.training = self.training, None
        if training:
            training.close()


class RayTrainTrial(Trial):
    """A run in Ray Train's workers, followed from a thread by the lines of metrics that they write."""

    thread: threading.Thread | None = None

    def begin(self) -> None:
        """See Trial."""
        self.open_run()
        self.lines: queue.Queue[Any] = queue.Queue()
        self.last: dict[str, Any] = {}
        self.over = False  # whether it has said how it ended
        self.validates = bool(self.splits().manifest.rows("validation"))
        self.thread = threading.Thread(target=self._work, name="run", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            result = run_here(
                self.trial.recipe,
                self.splits(),
                self.directory,
                self.world.workers,
                self.session(),
                num_workers=self.world.num_workers,
                listener=self.lines.put,
                began=self.started,
            )
            self.lines.put(result)
        except BaseException as error:
            self.lines.put(error)

    def advance(self) -> dict[str, Any]:
        """See Trial. An epoch is over when its last line of metrics has been written."""
        while True:
            item = self.lines.get()
            self.over = isinstance(item, BaseException) or "metrics" in item
            if isinstance(item, BaseException):
                raise item
            if "metrics" in item:  # what the run returned
                self.end()
                return {EPOCH: item["epochs"], **last_of(item), OUTCOME: "finished", DONE: True}
            split, trained = item["split"], bool(item.get("end_of_epoch"))
            named = {
                f"{split}/{name}": value
                for name, value in item.items()
                if isinstance(value, float) and name not in NO_METRICS
            }
            if trained:
                self.last = named
            elif split == "validation":
                self.last = {**self.last, **named}
            is_last = split == "validation" if self.validates else trained
            if is_last and item["epoch"] >= self.done:  # epochs trained again after a restart are known
                self.done = item["epoch"] + 1
                return {EPOCH: self.done, **self.last}

    def end(self) -> None:
        """See Trial. What a run that still goes on holds is given back before this returns."""
        thread, self.thread = self.thread, None
        if thread and thread.is_alive() and not self.over:
            from cluster.training.ray_train import abort_runs

            abort_runs()
            thread.join(ABORT_TIMEOUT_S)
            if (self.directory.result() or {}).get("status") == "failed":  # as it looks from inside
                self.write_end({"status": "stopped"})

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """See Trainable: a process whose run still goes on takes no other."""
        return False


def last_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The last epoch's metrics, of a run's result: schedulers compare epochs, and not the weights that are kept.

    And those of the test split, which the last epoch's step measures.
    """
    tested = {name: value for name, value in result["metrics"].items() if name.startswith("test/")}
    return finite({**result["last"]["metrics"], **tested} if "last" in result else result["metrics"])


def finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are numbers: schedulers compare no others."""
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
