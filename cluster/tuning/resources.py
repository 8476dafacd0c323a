"""What a trial holds while it runs, and how many trials fit at once."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.runtime import Workers
from cluster.training.recipe import Recipe


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


def needs_of(recipe: Recipe, workers: Workers) -> Needs:
    """What a trial of such workers holds: its driver counts."""
    if workers.halves:
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
