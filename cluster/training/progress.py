"""Progress: where training stands, and what it has added up."""

from dataclasses import dataclass, field
from typing import Any

from cluster.errors import Diverged
from nn_models.objectives import Objective


@dataclass
class Progress:
    """Where training stands, and what it has added up: all that a checkpoint holds beside the tensors."""

    epoch: int = 0
    epoch_step: int = 0  # steps done in this epoch
    step: int = 0  # steps done in all
    rows: int = 0  # rows of this epoch that are in `sums`
    sums: list[float] = field(default_factory=list)  # of loss and metrics over this epoch's rows
    digest: list[int] = field(default_factory=lambda: [0, 0])
    train: dict[str, float] = field(default_factory=dict)  # metrics of the last whole epoch
    validation: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    time_s: float = 0.0
    train_s: float = 0.0  # time spent in steps, and the rows trained in it
    train_rows: int = 0

    def note_best(self, objective: Objective) -> bool:
        """Whether the epoch that has just been evaluated is the best so far; equal metrics are decided by the loss."""
        split, metrics = ("validation", self.validation) if self.validation else ("train", self.train)
        name = objective.best_metric.removeprefix("validation/")
        found = {
            "metric": f"{split}/{name}",
            "value": metrics[name],
            "loss": metrics["loss"],
            "epoch": self.epoch,
            "step": self.step,
        }
        return self.take_best(found, objective)

    def take_best(self, found: dict[str, Any], objective: Objective) -> bool:
        """Make `found` the best where it is better than what there was; whether it is."""
        sign, best = -1 if objective.mode == "max" else 1, self.best
        if best and (sign * found["value"], found["loss"]) >= (sign * best["value"], best["loss"]):
            return False
        self.best = found
        return True

    def next_epoch(self) -> None:
        """An epoch is done and evaluated."""
        self.epoch += 1
        self.epoch_step = self.rows = 0
        self.sums, self.digest = [0.0] * len(self.sums), [0, 0]

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether so many epochs have gone by without a better one."""
        return bool(self.best and patience and self.epoch - 1 - self.best["epoch"] >= patience)

    def diverged(self, what: str, *, step: int, rate: float) -> Diverged:
        """The error for a loss or weights that became NaN or infinite at `step`, trained with this learning rate."""
        return Diverged(
            f"the {what} became NaN or infinite at step {step} (epoch {self.epoch + 1}); lower "
            f"optimizer.lr (now {rate:g}), set train.clip_norm, or check the data"
        )
