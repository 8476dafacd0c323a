"""Batch: what models and objectives are given of some rows: named values, and the place of the rows in their epoch.

Shapes: B rows of the batch, N elements (tokens, nodes) of all its rows, T of the longest row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nn_models.errors import UserError

RowIds = NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: `values` (N, ...) row after row, `lengths` (B,), of which `longest` is T.

    `cpu_lengths` are the lengths on the CPU as well, for kernels that are told them there (torch's packed sequences),
    so that nobody has to wait for a device; None where they are only on a device.
    """

    values: Tensor
    lengths: Tensor
    longest: int
    cpu_lengths: Tensor | None = None

    def __post_init__(self) -> None:
        if self.cpu_lengths is None and self.lengths.device.type == "cpu":
            object.__setattr__(self, "cpu_lengths", self.lengths)

    def padded(self, fill: float = 0) -> Tensor:
        """(B, T, ...), each row filled up behind its end."""
        rows, num = len(self.lengths), self.longest
        flat = self.values.new_full((rows * num, *self.values.shape[1:]), fill)
        return flat.index_copy(0, self.places(), self.values).unflatten(0, (rows, num))

    def mask(self) -> Tensor:
        """(B, T), true where a row has an element."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    def rows(self) -> Tensor:
        """(N,): which row each element is of."""
        numbers = torch.arange(len(self.lengths), device=self.lengths.device)
        return torch.repeat_interleave(numbers, self.lengths, output_size=len(self.values))

    def places(self) -> Tensor:
        """(N,): where each element stands in (B * T) padded ones."""
        rows, starts = self.rows(), self.lengths.cumsum(0) - self.lengths
        inside = torch.arange(len(self.values), device=self.lengths.device) - starts[rows]
        return rows * self.longest + inside

    def take(self, where: Tensor) -> "Ragged":
        """The rows at these places; for pictures and tables: it waits for the device."""
        ends = self.lengths.cumsum(0).tolist()
        spans = [(ends[row] - int(self.lengths[row]), ends[row]) for row in where.tolist()]
        lengths = self.lengths[where.to(self.lengths.device)]
        values = torch.cat([self.values[:0], *(self.values[first:end] for first, end in spans)])
        return Ragged(values, lengths, max((end - first for first, end in spans), default=0))

    def to(self, device: torch.device) -> "Ragged":
        """The same on a device."""
        values, lengths = _moved(self.values, device), _moved(self.lengths, device)
        return Ragged(values, lengths, self.longest, self.cpu_lengths)


@dataclass(frozen=True)
class Forest:
    """All N nodes of B trees, leaves first, level after level: what a net computes in one product a level.

    `words` (N,) of nodes, -1 for none; `children` (N, arity) places among the N, -1 for none; `levels` the first node
    of each level; `places` (N,) where a node's labels stand in a Ragged of one label a node; `roots` (B,); `lengths`
    (B,) how many nodes each tree has, and `longest` the most of them. `arcs` (A,) are all children, those of a node one
    after the other, level after level, `parents` (A,) their parents, and `arc_levels` the first arc to each level's
    nodes. All are int64.
    """

    words: Tensor
    children: Tensor
    levels: tuple[int, ...]
    places: Tensor
    roots: Tensor
    lengths: Tensor
    arcs: Tensor
    parents: Tensor
    arc_levels: tuple[int, ...]
    longest: int

    @classmethod
    def of(cls, words: Tensor, children: Tensor, level: Tensor, lengths: Tensor) -> "Forest":
        """Trees one after the other on the CPU, `children` as places within their own tree, the root last in each."""
        order = level.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        ends = lengths.cumsum(0)
        first = torch.repeat_interleave(ends - lengths, lengths, output_size=len(words))
        children = children.long()
        shifted = torch.where(children < 0, -1, place[(children + first[:, None]).clamp(min=0)])[order]
        counts = torch.bincount(level.long()) if len(level) else torch.zeros(1, dtype=torch.int64)
        levels = counts.cumsum(0) - counts
        there = shifted >= 0
        arcs_before = torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0))
        return cls(
            words=words.long()[order],
            children=shifted,
            levels=tuple(levels.tolist()),
            places=order,
            roots=place[ends - 1],
            lengths=lengths,
            arcs=shifted[there],
            parents=there.nonzero()[:, 0],
            arc_levels=tuple(arcs_before[levels].tolist()),
            longest=int(lengths.max()) if len(lengths) else 0,
        )

    def spans(self) -> list[tuple[int, int]]:
        """(first, past-the-last) node of each level, the leaves first."""
        return list(pairwise((*self.levels, len(self.words))))

    def arc_spans(self) -> list[tuple[int, int]]:
        """(first, past-the-last) arc to the nodes of each level."""
        return list(pairwise((*self.arc_levels, len(self.arcs))))

    def stored(self) -> dict[str, Tensor]:
        """The nodes of tree after tree, as stored: words (N,), children (N, arity) in their own tree, level (N,)."""
        numbers = torch.arange(len(self.words), device=self.words.device)
        starts = torch.tensor(self.levels, device=self.words.device)
        level = torch.searchsorted(starts, numbers, right=True) - 1
        ends = self.lengths.cumsum(0)
        first = torch.repeat_interleave(ends - self.lengths, self.lengths, output_size=len(self.words))
        # where a node's children stand among all nodes, tree after tree
        children = torch.where(self.children < 0, -1, self.places[self.children.clamp(min=0)])
        found = {
            name: torch.empty_like(values).index_copy_(0, self.places, values).int()
            for name, values in (("words", self.words), ("children", children), ("level", level))
        }
        found["children"] = torch.where(found["children"] < 0, -1, found["children"] - first.int()[:, None])
        return found

    def to(self, device: torch.device) -> "Forest":
        """The same on a device, in one copy."""
        fields = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        packed = _moved(torch.cat([values.flatten() for values in fields.values()]), device)
        parts = packed.split([values.numel() for values in fields.values()])
        moved: dict[str, Any] = {
            name: part.view(values.shape) for (name, values), part in zip(fields.items(), parts, strict=True)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Scenes:
    """Graphs of segments of B pictures, N segments of all of them, one picture after the other, T of the largest.

    `features` (N, W); `neighbours` (N, degree) int64, places in the segment's own scene, -1 for none; `objects` (N,)
    int64, the class of what a segment is of; `lengths` (B,), of which `longest` is T.
    """

    features: Tensor
    neighbours: Tensor
    objects: Tensor
    lengths: Tensor
    longest: int

    @classmethod
    def of(cls, features: Tensor, neighbours: Tensor, objects: Tensor, lengths: Tensor, longest: int) -> "Scenes":
        """Scenes on the CPU. Raises UserError where a segment has a neighbour that is not there."""
        sizes = torch.repeat_interleave(lengths, lengths, output_size=len(features))
        bad = ((neighbours >= sizes[:, None]) | (neighbours < -1)).nonzero()
        if len(bad):
            segment, place = bad[0].tolist()
            what = f"a segment has the neighbour {int(neighbours[segment, place])}, but its scene has {sizes[segment]}"
            raise UserError("data", f"{what} segments, counted from 0", "mend the scene's neighbours")
        return cls(features, neighbours.long(), objects.long(), lengths, longest)

    def to(self, device: torch.device) -> "Scenes":
        """The same on a device."""
        return Scenes(
            features=_moved(self.features, device),
            neighbours=_moved(self.neighbours, device),
            objects=_moved(self.objects, device),
            lengths=_moved(self.lengths, device),
            longest=self.longest,
        )


Value = Tensor | Ragged | Forest | Scenes


def fields_of(value: Value) -> tuple[dict[str, Tensor], Tensor | None]:
    """A column's values by field, row after row, as it is stored; and its lengths (B,) where rows differ in length."""
    if isinstance(value, Ragged):
        return {"values": value.values}, value.lengths
    if isinstance(value, Forest):
        return value.stored(), value.lengths
    if isinstance(value, Scenes):
        fields = {"features": value.features, "neighbours": value.neighbours.int(), "objects": value.objects.int()}
        return fields, value.lengths
    return {"": value}, None


class Place(NamedTuple):  # made at each step: as a frozen dataclass it would take four times as long
    """Which rows a rank has in a step. Where it has none, one row stands in (it must take part) and counts nothing."""

    ids: RowIds
    start: int  # position in the epoch of the first row
    num_rows: int  # 0: a row stands in
    global_rows: int
    weight: float  # what the loss counts of this slice: rows, or elements of them
    global_weight: float

    @classmethod
    def of(cls, rows: int) -> "Place":
        """All of so many rows."""
        return cls(np.arange(rows), 0, rows, rows, rows, rows)


@dataclass(frozen=True)
class Batch:
    """Some rows on the device. `keys` (B,) int64 are what a row's noise is drawn from: functions of (seed, epoch, row).

    `stored` has the columns before they were scaled (bytes of images, numbers in their units; in training augmented),
    for pictures and tables, and `unscale` takes numbers of a column's scale back there.
    """

    columns: Mapping[str, Value]
    place: Place
    draw_keys: Callable[[], Tensor]
    stored: Mapping[str, Value] = field(default_factory=dict)
    unscale: Callable[[str, Tensor], Tensor] = lambda name, values: values

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    @cached_property
    def keys(self) -> Tensor:
        """(B,) int64, computed when a step draws noise."""
        return self.draw_keys()


def _moved(values: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or values.device.type == "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def to_device(value: Value, device: torch.device) -> Value:
    """A value on a device, from pinned memory where that is a GPU: the copy then overlaps with what is computed."""
    return _moved(value, device) if isinstance(value, Tensor) else value.to(device)
