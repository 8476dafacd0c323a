"""Pruning: which members of a fused group leave it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal


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
