"""A group of fused trials as one trial of Ray Tune's: it decides itself which of them fall behind, and leave."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from cluster.storage import Folder
from cluster.training.recipe import Recipe
from cluster.training.run_directory import RESULT, RunDirectory, read_metrics
from cluster.training.trainer import result_of
from cluster.tuning.fused import FusedLoop
from cluster.tuning.state import EPOCH
from cluster.tuning.target import history
from cluster.tuning.trials import Trial

MEMBERS, LEFT = "members", "left"  # in a result: metrics of each trial, and how trials ended, by their indices
# what a member's result.json says, in the sweep's words
STATUSES = {"finished": "finished", "stopped": "pruned", "failed": "failed"}


class FusedTrial(Trial):
    """Several trials in one batch. A step is an epoch of all that are left."""

    loop: FusedLoop | None = None

    def begin(self) -> None:
        """See Trial. Members that ended before an interruption have left their result, which is told again."""
        members = self.config["members"]
        self.members = [m for m in members if not Folder(m["run"]).exists(RESULT)]
        self.before = {
            m["index"]: RunDirectory(Folder(m["run"])).result() or {} for m in members if m not in self.members
        }
        self.started = time.time()
        recipes = [Recipe.model_validate(member["recipe"]) for member in self.members]
        self.runs = [RunDirectory(Folder(member["run"])) for member in self.members]
        for run, recipe in zip(self.runs, recipes, strict=True):
            if not run.exists():
                run.write_start(recipe, self.facts())
        device = torch.device("cuda" if self.config["use_gpu"] else "cpu")
        folders = [run.folder for run in self.runs]
        self.loop = FusedLoop(recipes, splits=self.splits(), runs=folders, device=device) if recipes else None
        self.pruning = Pruning(**self.config["pruning"])
        for number, run in enumerate(self.runs):  # as the loop has cut it to the step that it goes on from
            self.pruning.remember(number, history(read_metrics(run), self.config["pruning"]["metric"]))
        self.done = 0
        self.told: set[int] = set()

    def advance(self) -> dict[str, Any]:
        """See Trial."""
        before, self.before = self.before, {}
        told = {index: {EPOCH: result.get("epochs", 0), **result["metrics"]} for index, result in before.items()}
        ended = {index: (STATUSES[result["status"]], result.get("error")) for index, result in before.items()}
        if self.loop is None:
            return {EPOCH: self.done, MEMBERS: told, LEFT: ended, "done": True}
        metrics = self.loop.epoch()
        self.done = epoch = self.loop.epochs_done or self.done + 1
        pruned = []
        if self.loop.ended:
            self.loop.conclude()
        else:
            seen = {number: metrics[number] for number in self.loop.live}
            pruned = self.pruning.losers(epoch, seen)
            for number in pruned:
                self.loop.stop(number)
        left: dict[int, tuple[str, str | None]] = {}
        for number, result in self.loop.results.items():
            if number not in self.told:
                status = "stopped" if number in pruned else "finished"
                self._write_result(number, {"status": status, **result, "restarts": 0, "num_workers": 0})
                left[number] = ("pruned" if number in pruned else "finished", None)
                metrics[number] = {**metrics.get(number, {}), **result["metrics"]}
        for number, error in self.loop.failures.items():
            if number not in self.told:
                self._write_result(number, {"status": "failed", "error": str(error)})
                left[number] = ("failed", str(error))
        self.told |= left.keys()
        over = not self.loop.live
        index = [member["index"] for member in self.members]
        result = {
            EPOCH: epoch,
            MEMBERS: told | {index[number]: {EPOCH: epoch, **found} for number, found in metrics.items()},
            LEFT: ended | {index[number]: how for number, how in left.items()},
            "done": over,
        }
        if over:
            self.end()
        return result

    def _write_result(self, number: int, status: dict[str, Any]) -> None:
        self.runs[number].write_result(result_of(status, self.runs[number], self.started))

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """See Trainable: the members' run directories have it all."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See Trainable."""

    def epochs_done(self) -> int:
        """See Trial."""
        return self.done if self.began else 0

    def end(self) -> None:
        """See Trial."""
        loop, self.loop = self.loop, None
        if loop:
            loop.close()


class Pruning:
    """Which members of a group leave it, by the sweep's scheduler.

    asha: successive halving within the group (Jamieson & Talwalkar 2016): at each rung the best in `reduction_factor`
    stay. median: who is worse, at its best, than the median of the others' means so far, leaves (Golovin et al. 2017).
    """

    def __init__(
        self,
        *,
        scheduler: Literal["none", "asha", "median"],
        metric: str,
        mode: Literal["min", "max"],
        rungs: Sequence[int],
        reduction_factor: int,
        grace_epochs: int,
    ) -> None:
        self._scheduler, self._metric, self._sign = scheduler, metric, 1 if mode == "max" else -1
        self._rungs, self._factor, self._grace = tuple(rungs), reduction_factor, grace_epochs
        self._history: dict[int, list[float]] = {}

    def remember(self, number: int, past: Iterable[tuple[int, float]]) -> None:
        """What a member had reached before an interruption: (epochs done, value)."""
        self._history[number] = [self._sign * value for _, value in past]

    def losers(self, epoch: int, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The members that leave after so many epochs, given the metrics of all that are there."""
        scores = {number: self._sign * found[self._metric] for number, found in metrics.items()}
        for number, score in scores.items():
            self._history.setdefault(number, []).append(score)
        if self._scheduler == "asha" and epoch in self._rungs:
            stay = math.ceil(len(scores) / self._factor)
            return sorted(sorted(scores, key=lambda number: (-scores[number], number))[stay:])
        if self._scheduler == "median" and epoch >= self._grace and len(scores) > 2:
            means = {number: sum(past) / len(past) for number, past in self._history.items()}
            behind = []
            for number in scores:
                others = sorted(mean for other, mean in means.items() if other != number)
                if max(self._history[number]) < others[len(others) // 2]:
                    behind.append(number)
            return behind
        return []
