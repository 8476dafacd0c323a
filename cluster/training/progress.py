"""Progress: where training stands, and what it has added up: all that a checkpoint holds beside the tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Self, cast

from pydantic import BaseModel, Field, NonNegativeInt

from cluster.errors import Diverged
from nn_models.metrics import Better
from nn_models.spec import validate

# What fields were called in checkpoints of earlier versions.
EARLIER_NAMES = {"rows": "weight", "epoch_sums": "sums"}
OF_THE_GAME = ("watch", "untrained", "rollbacks")  # stood beside the others


class Best(BaseModel):
    """What others read of what is said of the weights that are kept; there is more."""

    metric: str
    value: float
    epoch: NonNegativeInt
    step: NonNegativeInt


class _Game(BaseModel):
    """What others read of a GAN's progress."""

    watch: dict[str, float] = {}
    rollbacks: list[dict[str, Any]] = []
    untrained: dict[str, float | None] = {}


@dataclass
class Progress:
    """The same for the loop, for each of fused trials, and for a GAN's coordinator."""

    epoch: int = 0
    epoch_step: int = 0  # steps done in this epoch
    step: int = 0  # steps done in all
    weight: float = 0  # what the loss counts of this epoch so far: rows, or elements of them
    sums: list[float] = field(default_factory=list)  # of each metric over this epoch
    counts: list[float] = field(default_factory=list)  # what each metric is divided by; empty: all by the weight
    digest: Annotated[list[int], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0, 0])
    train: dict[str, float] = field(default_factory=dict)  # metrics of the last whole epoch
    validation: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None  # what is known of the weights that are kept: see `lifted`
    ended: str | None = None  # why training ended before its last epoch
    time_s: float = 0.0
    first_step_at: float | None = None  # of the workers that made a checkpoint, or of those before them in this run
    saved_at: float = 0.0  # when a checkpoint was made of it, as time.time() has it
    lost_s: float = 0.0  # between such a time and the next step, where the run's workers were started again
    train_s: float = 0.0  # time spent in steps, and the rows trained in it
    train_rows: int = 0
    game: dict[str, Any] = field(default_factory=dict)  # a GAN's alone: its watch, rollbacks, untrained figures

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Self:
        """From a checkpoint, of an earlier version too. Raises UserError where a value is of another type."""
        named = {EARLIER_NAMES.get(name, name): value for name, value in state.items()}
        game = {name: named.pop(name) for name in OF_THE_GAME if name in named}
        if named.get("best"):
            named["best"] = lifted(named["best"])
        known = {field.name for field in fields(cls)}
        content = {name: value for name, value in named.items() if name in known} | ({"game": game} if game else {})
        found = cast(Self, validate(cls, content))
        validate(Best | None, found.best)
        validate(_Game, found.game)
        return found

    def refuse_other_metrics(self, num_metrics: int) -> None:
        """Raise ValueError where not so many metrics have been added up."""
        for name, values in (("sums", self.sums), ("counts", self.counts)):
            if values and len(values) != num_metrics:
                raise ValueError(f"progress.{name} are of {len(values)} metrics, not of {num_metrics}")

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return asdict(self)

    def add(self, sums: list[float], *, weight: float, counts: list[float] | None = None) -> None:
        """Take in some steps: each metric's sum, what they weigh, and what each metric counts where that differs."""
        self.weight += weight
        self.sums = [old + new for old, new in zip(self.sums or [0.0] * len(sums), sums, strict=True)]
        if counts is not None:
            self.counts = [old + new for old, new in zip(self.counts or [0.0] * len(sums), counts, strict=True)]

    def means(self) -> list[float]:
        """Each metric of the epoch so far."""
        return means(self.sums, self.weight, self.counts)

    def next_epoch(self) -> None:
        """An epoch is done and evaluated."""
        self.epoch += 1
        self.epoch_step = self.weight = 0
        self.sums, self.counts, self.digest = [0.0] * len(self.sums), [], [0, 0]

    def take_best(self, found: dict[str, Any], better: Better) -> bool:
        """Make `found` the best where it is better than what there was; whether it is. Its loss decides equal ones."""
        sign, best = -1 if better == "more" else 1, self.best

        def rank(entry: dict[str, Any]) -> tuple[float, float]:
            return sign * entry["value"], entry.get("loss", 0.0)

        if best and rank(found) >= rank(best):
            return False
        self.best = found
        return True

    def without_better(self, patience: int | None, *, first: int = 1) -> str | None:
        """Why to end where so many epochs have gone by without a better one; `first` is the first that can count."""
        if not (patience and self.best):
            return None
        without = self.epoch - max(self.best["epoch"], first)
        return f"no better for {without} epochs" if without >= patience else None

    def diverged(self, what: str, *, step: int, rate: float) -> Diverged:
        """The error for a loss or weights that became NaN or infinite at `step`, trained with this learning rate."""
        return Diverged(
            f"the {what} became NaN or infinite at step {step} (epoch {self.epoch + 1}); lower "
            f"optimizer.lr (now {rate:g}), set train.clip_norm, or check the data"
        )


def lifted(best: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the weights that are kept, from a file of an earlier version too.

    `metric`, `value`, `loss`, `step`; `epoch`, counted from 1 (0: untrained); and all `metrics` of that epoch, named as
    in result.json. Earlier versions counted epochs from 0, and kept no more metrics than the value and its loss.
    """
    if "metrics" in best:
        return dict(best)
    known = {best["metric"]: best["value"]} if "/" in best["metric"] else {}
    if "loss" in best and known:
        known[f"{best['metric'].partition('/')[0]}/loss"] = best["loss"]
    return {**best, "epoch": best["epoch"] + 1 if best["step"] else 0, "metrics": known}


def means(sums: list[float], weight: float, counts: list[float] | None = None) -> list[float]:
    """Each sum by its own count, or by the weight; of what was never counted there is nothing to divide."""
    return [total / (count or 1) for total, count in zip(sums, counts or [weight] * len(sums), strict=True)]
