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
from cluster.tuning.trials import Trial, last_of

VERDICTS = "pruning.json"  # in each member's run directory: epoch -> trials that left the group after it, to its end
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
            run.write_start(recipe, self.facts())  # anew where it goes on: its data may have moved
        device = torch.device("cuda" if self.world.workers.use_gpu else "cpu")
        folders = [run.folder for run in self.runs]
        self.loop = FusedLoop(recipes, splits=self.splits(), runs=folders, device=device) if recipes else None
        self.done = self.loop.epochs_done if self.loop else 0
        self.told: set[int] = set()  # who has ended, and has been told of
        self.pruned: set[int] = set()
        self._remember()

    def _remember(self) -> None:
        """What the group's members had reached before an interruption, and who was to leave it.

        Those that are left are then judged once more by their last epoch: it may have come before they were, or before
        all that were to leave had left.
        """
        rule = self.group.pruning
        self.pruning = Pruning(rule)
        self.verdicts: dict[int, set[int]] = {}
        self.interrupted: dict[int, dict[str, float]] = {}
        live = () if self.loop is None or self.loop.ended else self.loop.live
        judged = {self.members[number].index for number in live}
        for member in self.group.members:
            run, result = RunDirectory(Folder(member.run)), self.before.get(member.index)
            past = dict(history(read_metrics(run), rule.metric))
            if result is None:
                last = self.done - 1
                if self.done in past and member.index in judged:
                    self.interrupted[member.index] = {rule.metric: past[self.done]}
            else:  # one that ran out of patience was not judged by its last epoch
                last = result["epochs"] - 1 if result["status"] == "finished" else self.done
            self.pruning.remember(member.index, [(epoch, value) for epoch, value in past.items() if epoch <= last])
            noted = run.folder.read_as(VERDICTS, dict[int, list[int]]) if run.folder.exists(VERDICTS) else {}
            for epoch, leaving in noted.items():
                self.verdicts.setdefault(epoch, set()).update(leaving)

    def advance(self) -> dict[str, Any]:
        """See Trial."""
        before, self.before = self.before, {}
        told = {index: {EPOCH: result.get("epochs", 0), **last_of(result)} for index, result in before.items()}
        ended = {index: (STATUSES[result["status"]], result.get("error")) for index, result in before.items()}
        if self.loop is None:
            return {EPOCH: self.done, MEMBERS: told, LEFT: ended, DONE: True}
        index = [member.index for member in self.members]
        metrics: dict[int, dict[str, float]] = {}
        interrupted, self.interrupted = self.interrupted, {}
        if interrupted:
            self._prune(interrupted)
        else:
            metrics = self.loop.epoch()
            self.done = self.loop.epochs_done or self.done + 1
            if self.loop.ended:
                self.loop.conclude()
            else:
                self._prune({index[number]: metrics[number] for number in self.loop.live})
        left: dict[int, tuple[str, str | None]] = {}
        for number, result in self.loop.results.items():
            if number not in self.told:
                status = "stopped" if number in self.pruned else "finished"
                self._write_result(number, {"status": status, **result, "restarts": 0, "num_workers": 0})
                left[number] = (STATUSES[status], None)
                metrics[number] = {**metrics.get(number, {}), **last_of(result), EPOCH: result["epochs"]}
        for number, error in self.loop.failures.items():
            if number not in self.told:
                self._write_result(number, {"status": "failed", "error": str(error)})
                left[number] = ("failed", str(error))
        self.told |= left.keys()
        over = not self.loop.live
        result = {
            EPOCH: self.done,
            MEMBERS: told | {index[number]: {EPOCH: self.done, **found} for number, found in metrics.items()},
            LEFT: ended | {index[number]: how for number, how in left.items()},
            DONE: over,
        }
        if over:
            self.end()
        return result

    def _prune(self, seen: dict[int, dict[str, float]]) -> None:
        """Have those leave that fall behind, given the metrics of all that are there.

        Who leaves is noted before anybody does: wherever the process dies, it is the same ones in the end.
        """
        assert self.loop is not None
        leaving = set(self.pruning.losers(self.done, seen))
        if self.done in self.verdicts:
            leaving = self.verdicts[self.done]
        elif leaving:
            self.verdicts[self.done] = leaving
            noted = {str(epoch): sorted(which) for epoch, which in self.verdicts.items()}
            for number in self.loop.live:
                self.runs[number].folder.write_json(VERDICTS, noted)
        for number in self.loop.live:
            if self.members[number].index in leaving:
                self.loop.stop(number)
                self.pruned.add(number)

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
