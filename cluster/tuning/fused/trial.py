"""A group of fused trials as one trial of Ray Tune's: it decides itself which of them fall behind, and leave."""

import time
from typing import Any

import torch

from cluster.storage import Folder
from cluster.training.run_directory import RunDirectory, read_metrics, result_of
from cluster.tuning.fused.loop import FusedLoop
from cluster.tuning.fused.pruning import Pruning
from cluster.tuning.messages import CONFIG, DONE, EPOCH, LEFT, MEMBERS, FusedConfig
from cluster.tuning.target import history
from cluster.tuning.trials import Trial

# what a member's result.json says, in the sweep's words
STATUSES = {"finished": "finished", "stopped": "pruned", "failed": "failed"}


class FusedTrial(Trial):
    """Several trials in one batch. A step is an epoch of all that are left."""

    loop: FusedLoop | None = None

    @property
    def group(self) -> FusedConfig:
        """What the sweep says of the trials."""
        found: FusedConfig = self.config[CONFIG]
        return found

    def begin(self) -> None:
        """See Trial. Members that ended before an interruption have left their result, which is told again."""
        results = {member.index: RunDirectory(Folder(member.run)).result() for member in self.group.members}
        self.before = {index: result for index, result in results.items() if result is not None}
        self.members = [member for member in self.group.members if member.index not in self.before]
        self.started = time.time()
        recipes = [member.recipe for member in self.members]
        self.runs = [RunDirectory(Folder(member.run)) for member in self.members]
        for run, recipe in zip(self.runs, recipes, strict=True):
            if not run.exists():
                run.write_start(recipe, self.facts())
        device = torch.device("cuda" if self.world.workers.use_gpu else "cpu")
        folders = [run.folder for run in self.runs]
        self.loop = FusedLoop(recipes, splits=self.splits(), runs=folders, device=device) if recipes else None
        rule = self.group.pruning
        self.pruning = Pruning(rule)
        for number, run in enumerate(self.runs):  # as the loop has cut it to the step that it goes on from
            self.pruning.remember(number, history(read_metrics(run), rule.metric))
        self.told: set[int] = set()

    def advance(self) -> dict[str, Any]:
        """See Trial."""
        before, self.before = self.before, {}
        told = {index: {EPOCH: result.get("epochs", 0), **result["metrics"]} for index, result in before.items()}
        ended = {index: (STATUSES[result["status"]], result.get("error")) for index, result in before.items()}
        if self.loop is None:
            return {EPOCH: self.done, MEMBERS: told, LEFT: ended, DONE: True}
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
        index = [member.index for member in self.members]
        result = {
            EPOCH: epoch,
            MEMBERS: told | {index[number]: {EPOCH: epoch, **found} for number, found in metrics.items()},
            LEFT: ended | {index[number]: how for number, how in left.items()},
            DONE: over,
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

    def end(self) -> None:
        """See Trial."""
        loop, self.loop = self.loop, None
        if loop:
            loop.close()
