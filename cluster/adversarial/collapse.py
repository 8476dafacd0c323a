"""Collapse: whether a game still goes on, or one half has won, or the generator makes the same row again and again."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cluster.recipe.adversarial import CollapseSpec
from nn_models.spec import validate

Action = Literal["fine", "rollback", "stop"]


@dataclass(frozen=True)
class Verdict:
    """What to do after a look, and why; the reason of "fine" is empty."""

    action: Action
    reason: str = ""


@dataclass
class _Seen:
    """All that a look's verdict depends on beside the look itself."""

    alike: int = 0  # looks in a row at which the rows made were too much alike
    apart: int = 0  # looks in a row at which the discriminator told real from made too well
    diversity: float = 0.0  # the most there has been since the start or the last rollback
    rollbacks: int = 0


class CollapseWatch:
    """Judges the metrics of each look.

    A generator starts with rows that are all alike (a DCGAN on the 8 x 8 digits: a diversity of 0.005, and 0.2 only
    after ten epochs). So a low diversity is not held against it while it grows to more than it has ever been. Nor is
    anything held against one that has just become better than ever: there is nothing better to return to.

    What it has seen is no part of what both halves return to: a rollback must not make it forget the rollback. So its
    state is checkpointed to go on after an interruption, and left alone where a checkpoint is loaded to roll back.
    """

    def __init__(self, spec: CollapseSpec) -> None:
        self._spec = spec
        self._seen = _Seen()

    def look(self, metrics: Mapping[str, float], *, accuracy: float | None, improved: bool = False) -> Verdict:
        """Whether to go on, with `metrics` of a look, of which one is `diversity`, and the discriminator's accuracy.

        `improved`: whether the metric that decides on the best generator was never as good. `accuracy` is the mean over
        the segment of the shares of real and of made rows that the discriminator took for what they are; None for
        losses without a threshold between the two (wasserstein). A metric that is NaN or infinite is bad at once, the
        others are when they have been so for `patience` looks in a row.
        """
        spec, seen = self._spec, self._seen
        values = {**metrics, "discriminator accuracy": 0.0 if accuracy is None else accuracy}
        if broken := sorted(name for name, value in values.items() if not math.isfinite(value)):
            return self._bad(f"{', '.join(broken)} became NaN or infinite")
        diversity = metrics["diversity"]
        alike = diversity < spec.min_diversity and diversity <= seen.diversity
        apart = accuracy is not None and accuracy > spec.max_accuracy
        seen.alike = seen.alike + 1 if alike and not improved else 0
        seen.apart = seen.apart + 1 if apart and not improved else 0
        seen.diversity = max(seen.diversity, diversity)
        if seen.alike >= spec.patience:
            return self._bad(
                f"made rows are {diversity:.2g} times as diverse as real ones, and were less than "
                f"{spec.min_diversity:g} times as diverse, no longer growing, {_looks(spec.patience)}"
            )
        if seen.apart >= spec.patience and accuracy is not None:
            return self._bad(
                f"the discriminator told {100 * accuracy:.1f} % of the rows apart, and more than "
                f"{100 * spec.max_accuracy:g} %, {_looks(spec.patience)}"
            )
        return Verdict("fine")

    def _bad(self, reason: str) -> Verdict:
        seen = self._seen
        seen.alike = seen.apart = 0
        seen.diversity = 0.0  # that of the checkpoint returned to may be low, and must be let grow again
        if seen.rollbacks >= self._spec.max_rollbacks:
            return Verdict("stop", f"{reason}, after {seen.rollbacks} of {self._spec.max_rollbacks} rollbacks")
        seen.rollbacks += 1
        return Verdict("rollback", reason)

    @property
    def learning_rate_factor(self) -> float:
        """What the recipe's learning rates are now multiplied by."""
        return self._spec.learning_rate_factor**self._seen.rollbacks

    def state(self) -> dict[str, Any]:
        """What it has seen, as plain numbers."""
        return asdict(self._seen)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._seen = validate(_Seen, dict(state))


def _looks(number: int) -> str:
    return f"for {number} looks in a row" if number > 1 else "at this look"
