"""Trials as Ray Tune runs them: one step is one epoch, and all state is in the trial's own run directory.

Tune's checkpoints carry a trial to another one's actor (population-based training); a trial whose process died goes on
from the checkpoints in its run directory, as any run does.
"""

import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from cluster.data.shards import DataSet
from cluster.errors import Diverged
from cluster.recipe.recipe import Recipe
from cluster.runs.train import run_here
from cluster.runtime import RaySession, device_name
from cluster.storage import Folder
from cluster.training.context import LocalContext
from cluster.training.loop import Loop
from cluster.training.run_directory import RunDirectory, result_of
from cluster.training.splits import Splits, open_splits
from cluster.tuning.ledger import EPOCH, LINEAGE
from cluster.tuning.space import followed
from nn_models.errors import UserError

WEIGHTS = "model/model.safetensors"
OUTCOME = "outcome"  # finished | failed: in the last result of a trial that ended by itself
ERROR = "error"
ABORT_TIMEOUT_S = 30
Where = tuple[str, int | None]  # a prepared data set's folder, and the shuffle window, which decides what is held
BESIDE_METRICS = ("time_s", "rows_per_s", "learning_rate", "grad_norm")  # in a line of metrics


class World:
    """What all trials of a sweep have in common; sent once through the object store."""

    def __init__(self, *, data: Mapping[Where, tuple[Splits, dict[str, Any]]], threads: int, path: list[str]) -> None:
        """`data` has the splits (their tables as references) of the data that is known beforehand."""
        self.data, self.threads, self.path = data, threads, path

    def enter(self) -> None:
        """Make this process a place for trials."""
        sys.path.extend(part for part in self.path if part not in sys.path)
        torch.set_num_threads(self.threads)


class Trial(tune.Trainable):
    """Starts when its first step is asked for: by then Tune has said whether it goes on from another's checkpoint."""

    def setup(self, config: dict[str, Any], world: World | None = None) -> None:
        """See Trainable."""
        assert world is not None
        self.world = world
        world.enter()
        self._tables: dict[Where, Splits] = {}
        self.began = False

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """See Trainable: this process takes the next trial."""
        self.end()
        self.began = False
        return True

    def step(self) -> dict[str, Any]:
        """See Trainable: the next epoch."""
        try:
            if not self.began:
                self.begin()
                self.began = True
            return self.advance()
        except (Diverged, UserError) as error:  # would only happen again
            done = self.epochs_done()
            self.end()
            return {EPOCH: done, OUTCOME: "failed", ERROR: str(error), "done": True}

    def cleanup(self) -> None:
        """See Trainable."""
        self.end()

    def splits(self) -> Splits:
        """The trial's data; its tables are views into shared memory, but where the space is of the data itself."""
        where = self.where
        if where not in self._tables and where in self.world.data:
            splits, references = self.world.data[where]
            held = dict(zip(references, ray.get(list(references.values())), strict=True))
            self._tables[where] = Splits(splits.manifest, splits.where, held)
        elif where not in self._tables:
            folder, window = where
            self._tables[where] = open_splits(DataSet(folder), window=window)
        return self._tables[where]

    @property
    def where(self) -> Where:
        """The folder of the trial's data, and its shuffle window."""
        folder, window = self.config["data"]
        return folder, window

    def begin(self) -> None:
        """Open the run, or go on with it."""
        raise NotImplementedError

    def advance(self) -> dict[str, Any]:
        """The result of one more epoch."""
        raise NotImplementedError

    def end(self) -> None:
        """Close the run, whether or not it has come to its end."""
        raise NotImplementedError

    def epochs_done(self) -> int:
        """Epochs that are behind."""
        return 0

    def open_run(self) -> None:
        """Begin the trial's run directory, where that has not been done."""
        self.recipe = Recipe.model_validate(self.config["recipe"])
        self.directory = RunDirectory(Folder(self.config["run"]))
        self.started = time.time()
        if not self.directory.exists():
            self.directory.write_start(self.recipe, self.facts())

    def facts(self) -> dict[str, Any]:
        """environment.json of a trial in this process."""
        return {**self.config["environment"], "device": device_name(self.config["use_gpu"])}

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
        lineage = run.read_json(LINEAGE) if run.exists(LINEAGE) else []
        Folder(checkpoint_dir).write_json(LINEAGE, lineage or [self._own(0)])

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See Trainable: the run goes on from another's state, or from an earlier one of its own."""
        self.end()
        self.began = False
        given, run = Folder(str(checkpoint)), Folder(self.config["run"])
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
        recipe = followed(Recipe.model_validate(self.config["recipe"]), lineage)
        RunDirectory(run).write_start(recipe, self.facts())  # what trains this run again

    def _own(self, epoch: int) -> dict[str, Any]:
        return {EPOCH: epoch, "trial": self.config["index"], "set": self.config["overrides"]}

    @staticmethod
    def _epochs_in(given: Folder) -> int:
        from cluster.training.checkpoints import Checkpoints

        state = Checkpoints(given, keep=1).newest()
        return int(state["progress"]["epoch"]) if state else 0

    def settle(self) -> None:
        """Return once all that is to be written is."""


class OneWorkerTrial(Trial):
    """The ordinary loop in this process, one epoch a step."""

    loop: Loop | None = None

    def begin(self) -> None:
        """See Trial."""
        self.open_run()
        device = torch.device("cuda" if self.config["use_gpu"] else "cpu")
        context = LocalContext(run=self.directory.folder, splits=self.splits(), device=device)
        self.loop = Loop(self.recipe, context)
        self.epochs: Iterator[dict[str, float]] = self.loop.epochs()

    def advance(self) -> dict[str, Any]:
        """See Trial. The last epoch's step also measures the test split."""
        assert self.loop is not None
        metrics = next(self.epochs, None)
        last = metrics is None or self.loop.ended
        if not last:
            return {EPOCH: self.epochs_done(), **metrics}  # type: ignore[dict-item]  # there are some
        result = self.loop.conclude()
        ended = {"status": "finished", **result, "restarts": 0, "num_workers": 0}
        self.directory.write_result(result_of(ended, self.directory, self.started))
        self.end()
        return {EPOCH: result["epochs"], **result["metrics"], OUTCOME: "finished", "done": True}

    def epochs_done(self) -> int:
        """See Trial."""
        return self.loop.progress.epoch if self.loop else 0

    def settle(self) -> None:
        """See Trial."""
        if self.loop:
            self.loop.background.wait()

    def end(self) -> None:
        """See Trial."""
        loop, self.loop = self.loop, None
        if loop:
            loop.close()


class GroupTrial(Trial):
    """A run that has processes of its own (Ray Train's workers, or a GAN's halves), followed from a thread."""

    thread: threading.Thread | None = None

    def begin(self) -> None:
        """See Trial."""
        self.open_run()
        self.lines: queue.Queue[Any] = queue.Queue()
        self.last: dict[str, Any] = {}
        self.done = 0
        self.over = False  # whether it has said how it ended
        self.thread = threading.Thread(target=self._work, name="run", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            config, workers = self.config, self.config["workers"]
            stored = self.world.data[self.where][1] if self.where in self.world.data else None
            session = RaySession(ray, embedded=config["embedded"], placed=workers.halves, stored=stored)
            result = run_here(
                self.recipe,
                DataSet(self.where[0]),
                self.splits(),
                self.directory,
                workers,
                session if workers.most else None,
                num_workers=config["num_workers"],
                listener=self.lines.put,
                began=time.time(),
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
                return {EPOCH: item["epochs"], **item["metrics"], OUTCOME: "finished", "done": True}
            split = item["split"]
            named = {
                f"{split}/{name}": value
                for name, value in item.items()
                if isinstance(value, float) and name not in BESIDE_METRICS
            }
            ended = item["epoch"] + 1 if item.get("end_of_epoch") else self.done
            if split == "validation" and item["step"] and named:
                self.done = max(self.done, item["epoch"] + 1)
                self.last = {**self.last, **named}
                return {EPOCH: self.done, **self.last}
            if ended > self.done:
                self.last = named
                if not self.config["validates"]:
                    self.done = ended
                    return {EPOCH: self.done, **self.last}

    def epochs_done(self) -> int:
        """See Trial."""
        return self.done if self.thread else 0

    def end(self) -> None:
        """See Trial. What a run that still goes on holds is given back before this returns."""
        thread, self.thread = self.thread, None
        placed = self.config["workers"].halves  # these are in the trial's own placement group
        if thread and thread.is_alive() and not self.over and not placed:
            from cluster.training.ray_train import abort_runs

            abort_runs()
            thread.join(ABORT_TIMEOUT_S)
            if (self.directory.result() or {}).get("status") == "failed":  # as it looks from inside
                self.directory.write_result(result_of({"status": "stopped"}, self.directory, self.started))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """See Trainable: a process whose run still goes on takes no other."""
        return False
