"""Split: which rows are held out: a pure function of the seed and of what the rows are."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.data.layouts import Array
from cluster.data.manifest import SPLITS

TRAIN, VALIDATION, TEST = (np.uint8(SPLITS.index(name)) for name in ("train", "validation", "test"))


class Traits(NamedTuple):
    """What decides on the split of some rows, each (rows,): their classes, and whom they belong to."""

    labels: Array | None = None  # int64
    groups: Array | None = None  # texts

    @classmethod
    def joined(cls, parts: "list[Traits]") -> "Traits":
        """Of all parts of a source, of which there is at least one."""
        labels = [part.labels for part in parts if part.labels is not None]
        groups = [part.groups for part in parts if part.groups is not None]
        return cls(np.concatenate(labels) if labels else None, np.concatenate(groups) if groups else None)


def drawn(num_rows: int, traits: Traits, *, seed: int, num_test: int, num_validation: int) -> NDArray[np.uint8]:
    """The split (index into SPLITS) of each row: so many held out, those of one group in the same split.

    Where rows have labels, the held-out ones are taken evenly from each class: of n rows of a class in random order,
    the i-th stands at (i + 1/2) / n, and the rows that stand first of all are held out. Groups of several rows take
    their middle's place, in the class that is the rarest one of their rows'; there are then about as many rows.
    """
    units = np.arange(num_rows) if traits.groups is None else np.unique(traits.groups, return_inverse=True)[1]
    sizes = np.bincount(units)
    order = np.random.default_rng([seed]).permutation(len(sizes))
    if traits.labels is not None:
        order = order[_evenly(_rarest(units, traits.labels)[order], sizes[order])]
    ends = np.cumsum(sizes[order])
    middles = ends - sizes[order] / 2
    splits = np.full(len(sizes), TRAIN)
    splits[order[middles < num_test + num_validation]] = VALIDATION
    splits[order[middles < num_test]] = TEST
    return splits[units]


def _rarest(units: Array, labels: Array) -> NDArray[np.int64]:
    """(units,): of the classes of a unit's rows the one that has the fewest rows in all."""
    rarest_last = np.lexsort((labels, np.bincount(labels)[labels]))[::-1]
    found = np.empty(units.max() + 1, np.int64)
    found[units[rarest_last]] = labels[rarest_last]  # of several values for one place the last one stays
    return found


def _evenly(labels: Array, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of units in an order in which each class comes at an even pace; at the same place as they were."""
    by_class = np.argsort(labels, kind="stable")
    ends = np.cumsum(sizes[by_class])
    totals = np.bincount(labels, weights=sizes)
    before = np.cumsum(totals) - totals  # rows of the classes before
    labels = labels[by_class]
    places = (ends - sizes[by_class] / 2 - before[labels]) / totals[labels]
    order: NDArray[np.int64] = by_class[np.lexsort((by_class, places))]
    return order
