"""Pruning: which members of a fused group leave it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PruningRule:
    """How a sweep's scheduler says that members leave their group."""

    scheduler: Literal["none", "asha", "median"]
    metric: str  # what members are compared by, as in result.json
    mode: Literal["min", "max"]
    rungs: tuple[int, ...]  # asha: the epochs after which members may leave
    reduction_factor: int  # asha: one in so many stays
    grace_epochs: int  # median: epochs before which nobody leaves


class Pruning:
    """Which members of a group leave it, by the sweep's scheduler.

    asha: successive halving within the group (Jamieson & Talwalkar 2016): at each rung the best in `reduction_factor`
    stay. median: who is worse, at its best, than the median of the others' means so far, leaves (Golovin et al. 2017).
    """

    def __init__(self, rule: PruningRule) -> None:
        self._rule, self._sign = rule, 1 if rule.mode == "max" else -1
        self._history: dict[int, list[float]] = {}

    def remember(self, number: int, past: Iterable[tuple[int, float]]) -> None:
        """What a member had reached before an interruption: (epochs done, value)."""
        self._history[number] = [self._sign * value for _, value in past]

    def losers(self, epoch: int, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The members that leave after so many epochs, given the metrics of all that are there."""
        scores = {number: self._sign * found[self._rule.metric] for number, found in metrics.items()}
        for number, score in scores.items():
            self._history.setdefault(number, []).append(score)
        if self._rule.scheduler == "asha" and epoch in self._rule.rungs:
            stay = math.ceil(len(scores) / self._rule.reduction_factor)
            return sorted(sorted(scores, key=lambda number: (-scores[number], number))[stay:])
        if self._rule.scheduler == "median" and epoch >= self._rule.grace_epochs and len(scores) > 2:
            means = {number: sum(past) / len(past) for number, past in self._history.items()}
            behind = []
            for number in scores:
                others = sorted(mean for other, mean in means.items() if other != number)
                if max(self._history[number]) < others[len(others) // 2]:
                    behind.append(number)
            return behind
        return []
