"""Budget: how many epochs a sweep can cost, and at which of them its scheduler stops trials. Runs nothing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.recipe.recipe import Recipe
from cluster.runtime import Workers
from cluster.tuning.space import Space, columns


@dataclass(frozen=True)
class Budget:
    """What a sweep can cost. Epochs that are trained again after a failure come on top."""

    scheduler: str
    num_trials: int
    epochs: int  # of the longest trial
    rungs: tuple[int, ...]  # asha: the epochs at which a trial may be stopped
    perturb_every: int | None  # pbt: epochs between two exchanges
    longest: int  # epochs of all trials together; no sweep takes more
    promoted: int | None  # asha: the same where of all trials at a rung only the share goes on that should
    reduction_factor: int

    def lines(self) -> list[str]:
        """The same for people."""
        trials = f"{self.num_trials} trial{'s' * (self.num_trials != 1)}"
        lines = [f"{trials} of at most {_epochs(self.epochs)}: {_epochs(self.longest)} at most"]
        if self.scheduler == "asha" and not self.rungs:
            lines.append("asha stops none: no trial is longer than sweep.grace_epochs")
        elif self.scheduler == "asha":
            rungs = ", ".join(map(str, self.rungs))
            lines.append(
                f"asha: rungs at epoch {rungs}; about {_epochs(self.promoted or 0)} where one trial in "
                f"{self.reduction_factor} goes on at each"
            )
        elif self.scheduler == "median":
            lines.append("median: a trial stops where its mean so far is worse than the median of the others'")
        elif self.scheduler == "pbt":
            lines.append(
                f"pbt: the worst quarter goes on from the best, mutated, every {_epochs(self.perturb_every or 0)}"
            )
        return lines


def budget(recipe: Recipe) -> Budget:
    """The budget of a recipe's sweep."""
    sweep = recipe.sweep
    assert sweep is not None
    space = Space(sweep)
    epochs = longest_trial(recipe, space)
    steps = rungs(epochs, sweep.grace_epochs, sweep.reduction_factor) if sweep.scheduler == "asha" else []
    return Budget(
        scheduler=sweep.scheduler,
        num_trials=space.num_trials,
        epochs=epochs,
        rungs=tuple(steps),
        perturb_every=sweep.perturb_every(epochs) if sweep.scheduler == "pbt" else None,
        longest=space.num_trials * epochs,
        promoted=promoted_epochs(space.num_trials, epochs, steps, sweep.reduction_factor) if steps else None,
        reduction_factor=sweep.reduction_factor,
    )


def rungs(epochs: int, grace: int, factor: int) -> list[int]:
    """The epochs after which ASHA may stop a trial: grace, grace times factor, … below `epochs` (Li et al. 2020)."""
    found = []
    rung = grace
    while rung < epochs:
        found.append(rung)
        rung *= factor
    return found


def promoted_epochs(num_trials: int, epochs: int, rungs: list[int], factor: int) -> int:
    """Epochs of all trials where one in `factor`, rounded up, goes on at each rung.

    Not an upper bound: ASHA lets a trial go on that is among the best *so far*, and trials that become better and
    better all are.
    """
    total, before, left = 0, 0, num_trials
    for rung in [*rungs, epochs]:
        total += left * (rung - before)
        before, left = rung, math.ceil(left / factor)
    return total


def longest_trial(recipe: Recipe, space: Space) -> int:
    """Epochs of the longest trial: the recipe's, or the most that the space has."""
    found = [columns(overrides).get("train.epochs", recipe.train.epochs) for overrides in space.extremes()]
    return max(int(epochs) for epochs in found)


def _epochs(count: int) -> str:
    return f"{count:,} epoch{'s' * (count != 1)}"


@dataclass(frozen=True)
class Needs:
    """What a trial holds while it runs."""

    bundles: list[dict[str, float]]  # of its placement group, its own process first
    beside: list[dict[str, float]]  # what Ray Train takes beside it

    @property
    def all(self) -> list[dict[str, float]]:
        """Every bundle."""
        return [*self.bundles, *self.beside]

    @property
    def text(self) -> str:
        """In words."""
        total = {name: sum(b.get(name, 0) for b in self.all) for name in ("CPU", "GPU")}
        return " and ".join(f"{amount:g} {name}" for name, amount in total.items() if amount)


def needs_of(workers: Workers) -> Needs:
    """What a trial of such workers holds: its driver counts."""
    if workers.coordinated:
        return Needs([{"CPU": 1}, *[workers.bundle] * workers.most], [])
    if workers.most <= 1:
        return Needs([workers.bundle], [])
    return Needs([{"CPU": 1}], [workers.bundle] * workers.most)


def room_for(needs: Needs, nodes: list[Mapping[str, float]]) -> int:
    """How many trials fit on these nodes at once, each bundle on the first node with room for it."""
    free = [dict(node) for node in nodes]
    count = 0
    while count < 10_000 and all(_place(bundle, free) for bundle in needs.all):
        count += 1
    return count


def _place(bundle: Mapping[str, float], free: list[dict[str, float]]) -> bool:
    for node in free:
        if all(node.get(name, 0) >= amount for name, amount in bundle.items()):
            for name, amount in bundle.items():
                node[name] -= amount
            return True
    return False
