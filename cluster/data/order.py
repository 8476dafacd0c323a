"""Order: which rows each global batch holds, as a pure function of (row groups, seed, epoch), never of the world size.

An epoch of N rows takes S = ceil(N / global_batch_size) steps. Step k holds the positions from N*k//S to N*(k+1)//S,
so global batches differ by at most one row and no epoch ends in a batch too small for batch normalisation. Where a
recipe puts rows of like length together (data.bucket), the lengths of the rows decide as well.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cluster.data.keys import RowIds
from cluster.data.manifest import Manifest
from nn_models.batch import Place
from nn_models.errors import UserError

# Lanes of a streamed set: many divisors, so that every usual number of ranks owns equally many whole lanes.
LANE_COUNTS = (24, 12, 8, 6, 4, 3, 2, 1)
# Coprime to all of them, so each permutes the lanes. A rank owns neighbouring lanes: what only some lanes get (one more
# row group, the next row) should not all fall to one rank.
DEAL_STRIDE, PHASE_STRIDE = 7, 5


def bounds(length: int, parts: int, index: int) -> tuple[int, int]:
    """First and past-the-last position of part `index` when `length` things are cut into near-equal parts."""
    return length * index // parts, length * (index + 1) // parts


# What each row counts: a number for all, or (rows,) its elements, which every rank knows of every row.
Weights = int | NDArray[np.int32]


class Order(ABC):
    """The order of rows of one split.

    Where the loss counts elements of rows, `weights` says how many each row has: the weight of a whole global batch is
    then known to each rank before the step. `work` says the same of what a row takes to compute: where all rows are one
    sequence the ranks' slices are cut where they take about the same. Where it is not said, it is what rows weigh.
    """

    num_rows: int
    num_steps: int
    carries: ClassVar[bool] = False  # whether each row goes on from where the same place of the step before ended

    def __init__(self, weights: Weights, work: Weights | None = None) -> None:
        self.weights = weights
        self.work = weights if work is None else work
        self._global_weight = lru_cache(maxsize=1)(self._weigh_all)

    @abstractmethod
    def global_rows(self, epoch: int, step: int) -> int:
        """Rows in the global batch of this step."""

    @abstractmethod
    def cut(self, epoch: int, step: int, rank: int, world_size: int) -> tuple[int, RowIds]:
        """This rank's slice of the step's global batch: the position in the epoch of its first row, and its ids."""

    def start(self, epoch: int, step: int, rank: int, world_size: int) -> int:
        """Position in the epoch of the first row of this rank's slice of the step's global batch."""
        return self.cut(epoch, step, rank, world_size)[0]

    def rows(self, epoch: int, step: int, rank: int, world_size: int) -> RowIds:
        """Ids of the rows of this rank's slice of the step's global batch, in order."""
        return self.cut(epoch, step, rank, world_size)[1]

    def place(self, epoch: int, step: int, rank: int, world_size: int) -> Place:
        """This rank's slice of the step's global batch."""
        start, ids = self.cut(epoch, step, rank, world_size)
        num_rows, global_rows, weights = len(ids), self.global_rows(epoch, step), self.weights
        if isinstance(weights, int):
            return Place(ids, start, num_rows, global_rows, weights * num_rows, weights * global_rows)
        return Place(ids, start, num_rows, global_rows, self.weigh(ids), self._global_weight(epoch, step))

    def weigh(self, ids: RowIds) -> int:
        """What these rows count."""
        return self.weights * len(ids) if isinstance(self.weights, int) else int(self.weights[ids].sum())

    def _weigh_all(self, epoch: int, step: int) -> int:
        return self.weigh(self.rows(epoch, step, 0, 1))


class _Sequence(Order):
    """Base of the orders whose global batches are stretches of one sequence of all rows."""

    @abstractmethod
    def span(self, step: int) -> tuple[int, int]:
        """First and past-the-last position of the step's global batch."""

    @abstractmethod
    def sequence(self, epoch: int) -> RowIds:
        """The ids of all rows in the order of the epoch."""

    def global_rows(self, epoch: int, step: int) -> int:
        """See Order."""
        first, end = self.span(step)
        return end - first

    def cut(self, epoch: int, step: int, rank: int, world_size: int) -> tuple[int, RowIds]:
        """See Order."""
        first, end = self.span(step)
        ids = self.sequence(epoch)[first:end]
        low, high = self._bounds(ids, rank, world_size)
        return first + low, ids[low:high]

    def _bounds(self, ids: RowIds, rank: int, world_size: int) -> tuple[int, int]:
        if isinstance(self.work, int):
            return bounds(len(ids), world_size, rank)
        ends = np.cumsum(self.work[ids], dtype=np.int64)
        middles = 2 * ends - np.diff(ends, prepend=0)  # twice the place of a row's middle
        low, high = np.searchsorted(middles * world_size, 2 * ends[-1] * np.array([rank, rank + 1])).tolist()
        return low, high if rank + 1 < world_size else len(ids)


@dataclass(frozen=True)
class Buckets:
    """Rows of like length together: so many global batches, one after the other, share their rows anew by length.

    Which of them gets the short rows is drawn. With one batch only the order of the rows in it changes.
    """

    num_steps: int
    lengths: NDArray[np.int32]  # (rows,)


class WholeOrder(_Sequence):
    """Every row shuffled among all: for sets that are held in memory."""

    def __init__(
        self,
        num_rows: int,
        *,
        global_batch_size: int,
        seed: int,
        weights: Weights = 1,
        work: Weights | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        super().__init__(weights, work)
        self.num_rows = num_rows
        self.num_steps = -(-num_rows // global_batch_size)
        self._seed, self._buckets = seed, buckets
        self._permutation = lru_cache(maxsize=1)(self._shuffled)

    def _shuffled(self, epoch: int) -> RowIds:
        generator = np.random.default_rng([self._seed, epoch])
        ids = generator.permutation(self.num_rows)
        return ids if self._buckets is None else self._by_length(ids, self._buckets, generator)

    def _by_length(self, ids: RowIds, buckets: Buckets, generator: np.random.Generator) -> RowIds:
        """These ids, those of each few steps dealt to them anew; each step keeps its number of rows."""
        found = np.empty_like(ids)
        for first in range(0, self.num_steps, buckets.num_steps):
            steps = range(first, min(first + buckets.num_steps, self.num_steps))
            rows = ids[self.span(steps[0])[0] : self.span(steps[-1])[1]]
            rows = rows[np.argsort(buckets.lengths[rows], kind="stable")]
            taken = 0
            for step in generator.permutation(steps).tolist():
                low, high = self.span(step)
                found[low:high] = rows[taken : taken + high - low]
                taken += high - low
        return found

    def span(self, step: int) -> tuple[int, int]:
        """See _Sequence."""
        return bounds(self.num_rows, self.num_steps, step)

    def sequence(self, epoch: int) -> RowIds:
        """See _Sequence."""
        return self._permutation(epoch)


class InOrder(_Sequence):
    """Rows as they stand, so many a step: for evaluation. The steps do not depend on the number of ranks either."""

    def __init__(self, num_rows: int, *, batch_size: int, weights: Weights = 1, work: Weights | None = None) -> None:
        super().__init__(weights, work)
        self.num_rows = num_rows
        self.num_steps = -(-num_rows // batch_size)
        self._batch_size = batch_size
        self._all = np.arange(num_rows)

    def span(self, step: int) -> tuple[int, int]:
        """See _Sequence."""
        return step * self._batch_size, min((step + 1) * self._batch_size, self.num_rows)

    def sequence(self, epoch: int) -> RowIds:
        """See _Sequence."""
        return self._all


class StreamOrder(Order):
    """Rows are windows of one long text: step k holds the k-th window of each of B streams, and ranks own streams.

    So what a net remembers at the end of a window is what the next window of the same stream goes on from. The text is
    cut into B stretches of near-equal length, the longer ones first: in the last step only these may have a window, and
    they are then the first of each rank.
    """

    carries = True

    def __init__(self, num_rows: int, *, num_streams: int, weights: Weights = 1) -> None:
        super().__init__(weights)
        self.num_rows = num_rows
        self.num_streams = min(num_streams, num_rows)
        self.num_steps = -(-num_rows // self.num_streams)
        whole, longer = divmod(num_rows, self.num_streams)
        streams = np.arange(self.num_streams)
        self._firsts = streams * whole + np.minimum(streams, longer)
        self._longer = longer or self.num_streams  # streams that have a window in the last step

    def global_rows(self, epoch: int, step: int) -> int:
        """See Order."""
        return self._longer if step + 1 == self.num_steps else self.num_streams

    def cut(self, epoch: int, step: int, rank: int, world_size: int) -> tuple[int, RowIds]:
        """See Order."""
        low, high = bounds(self.num_streams, world_size, rank)
        whole = self.global_rows(epoch, step)
        return step * self.num_streams + min(low, whole), self._firsts[low : min(high, whole)] + step


@dataclass(frozen=True)
class Block:
    """Row groups of a lane that are in memory, and shuffled, together."""

    groups: tuple[int, ...]  # indices of the split's row groups, read one after the other
    first: int  # position in the lane of the block's first row
    permutation: RowIds  # the n-th row used is the permutation[n]-th of the rows read
    ids: RowIds  # row ids in the order of use


@dataclass(frozen=True)
class Lane:
    """A sequence of blocks that one rank reads from storage."""

    num_rows: int
    groups: tuple[tuple[int, ...], ...]  # the row groups of each block
    starts: tuple[int, ...]  # position in the lane of each block's first row


class LaneOrder(Order):
    """Row groups dealt to lanes, each lane shuffled within its window: for sets that are streamed from storage.

    A global batch takes the same share of every lane, and a rank owns whole lanes, so each row group is read by one
    rank only. `window` is the number of rows, over all lanes, that are shuffled together (at least a row group a lane).
    There are no more lanes than rows in a global batch, so that every batch has a row of the longest lane at least.
    """

    def __init__(
        self, row_groups: Sequence[int], *, global_batch_size: int, seed: int, window: int, weights: Weights = 1
    ) -> None:
        super().__init__(weights)
        self.row_groups = tuple(row_groups)
        self.num_rows = sum(row_groups)
        self.num_steps = -(-self.num_rows // global_batch_size)
        self.num_lanes = next(count for count in LANE_COUNTS if count <= min(len(row_groups), global_batch_size))
        self._seed, self._window = seed, window
        self._group_starts = np.concatenate([[0], np.cumsum(row_groups)])
        self.lanes = lru_cache(maxsize=1)(self._deal)
        self.block = lru_cache(maxsize=2 * self.num_lanes)(self._shuffle)

    def _deal(self, epoch: int) -> tuple[Lane, ...]:
        dealt = np.random.default_rng([self._seed, epoch]).permutation(len(self.row_groups))
        firsts = [lane * DEAL_STRIDE % self.num_lanes for lane in range(self.num_lanes)]
        return tuple(self._cut(dealt[first :: self.num_lanes].tolist()) for first in firsts)

    def _cut(self, groups: list[int]) -> Lane:
        """The lane of these row groups, cut into blocks of at least the lane's share of the window."""
        blocks: list[tuple[int, ...]] = []
        starts: list[int] = []
        pending: list[int] = []
        position = pending_rows = 0
        for group in groups:
            pending.append(group)
            pending_rows += self.row_groups[group]
            if pending_rows >= self._window // self.num_lanes or group == groups[-1]:
                blocks.append(tuple(pending))
                starts.append(position)
                position += pending_rows
                pending, pending_rows = [], 0
        return Lane(position, tuple(blocks), tuple(starts))

    def _shuffle(self, epoch: int, lane: int, index: int) -> Block:
        """Block `index` of a lane."""
        groups = self.lanes(epoch)[lane].groups[index]
        ids = np.concatenate([np.arange(self._group_starts[g], self._group_starts[g + 1]) for g in groups])
        permutation = np.random.default_rng([self._seed, epoch, lane, index]).permutation(len(ids))
        return Block(groups, self.lanes(epoch)[lane].starts[index], permutation, ids[permutation])

    def owned(self, rank: int, world_size: int) -> range:
        """The lanes of this rank. Raises UserError where there are fewer lanes than ranks."""
        if world_size > self.num_lanes:
            raise UserError(
                "data.shuffle_window",
                f"{world_size} workers cannot share {self.num_lanes} lanes of row groups",
                f"use at most {self.num_lanes} workers, raise train.global_batch_size, or prepare more or smaller row "
                "groups",
            )
        return range(*bounds(self.num_lanes, world_size, rank))

    def span(self, epoch: int, lane: int, step: int) -> tuple[int, int]:
        """First and past-the-last position in the lane that the step takes.

        Lanes are out of phase by equal parts of a row: of lanes of n rows each, steps 0 to k - 1 have then taken
        sum_l floor(n k / S + l / L) = floor(L n k / S) rows (Hermite's identity), the same bounds as in WholeOrder.
        In phase, all lanes would give their next row at the same step, and the steps between would have none.
        """
        rows, lanes, steps = self.lanes(epoch)[lane].num_rows, self.num_lanes, self.num_steps
        phase = lane * PHASE_STRIDE % lanes * steps
        return (rows * step * lanes + phase) // (lanes * steps), (rows * (step + 1) * lanes + phase) // (lanes * steps)

    def pieces(self, epoch: int, lane: int, step: int) -> list[tuple[int, slice]]:
        """The step's rows of one lane: (block, which of its rows in the order of use), in order."""
        first, end = self.span(epoch, lane, step)
        starts = self.lanes(epoch)[lane].starts
        pieces = []
        for index in range(max(0, bisect_right(starts, first) - 1), bisect_left(starts, end)):
            pieces.append((index, slice(max(0, first - starts[index]), end - starts[index])))
        return pieces if end > first else []

    def global_rows(self, epoch: int, step: int) -> int:
        """See Order."""
        spans = (self.span(epoch, lane, step) for lane in range(self.num_lanes))
        return sum(end - first for first, end in spans)

    def cut(self, epoch: int, step: int, rank: int, world_size: int) -> tuple[int, RowIds]:
        """See Order."""
        spans = [self.span(epoch, lane, step) for lane in range(self.num_lanes)]
        own = self.owned(rank, world_size)
        start = sum(first for first, _ in spans) + sum(end - first for first, end in spans[: own.start])
        parts = [np.empty(0, np.int64)]
        for lane in own:
            parts += [self.block(epoch, lane, index).ids[piece] for index, piece in self.pieces(epoch, lane, step)]
        return start, np.concatenate(parts)


# A set up to this size is held in memory and shuffled as a whole unless the recipe gives a shuffle window. It belongs
# to the order of rows, so it must not depend on the machine.
HELD_BYTES = 4 << 30


def training_order(
    manifest: Manifest,
    *,
    global_batch_size: int,
    seed: int,
    window: int | None,
    weights: Weights = 1,
    work: Weights | None = None,
    buckets: Buckets | None = None,
) -> Order:
    """The order of the training rows. Buckets are for rows that are shuffled as a whole."""
    num_rows = manifest.rows("train")
    if manifest.order == "streams":
        return StreamOrder(num_rows, num_streams=global_batch_size, weights=weights)
    if (rows := shuffle_window(manifest, window)) is None:
        return WholeOrder(
            num_rows, global_batch_size=global_batch_size, seed=seed, weights=weights, work=work, buckets=buckets
        )
    groups = manifest.row_groups("train")
    return LaneOrder(groups, global_batch_size=global_batch_size, seed=seed, window=rows, weights=weights)


def shuffle_window(manifest: Manifest, wanted: int | None) -> int | None:
    """Rows shuffled together; None for all of them. Follows from recipe and manifest alone."""
    if manifest.order == "streams":
        return None  # not shuffled: a stream's windows follow each other
    if wanted is not None:
        return wanted if wanted < manifest.rows("train") else None
    held = manifest.rows("train") * manifest.row_bytes
    return None if held <= HELD_BYTES else max(1, HELD_BYTES // 4 // manifest.row_bytes)


def held(manifest: Manifest, split: str, window: int | None) -> bool:
    """Whether a split is held in memory: the others always are, so they must be small enough."""
    if split == "train":
        return shuffle_window(manifest, window) is None
    if manifest.rows(split) * manifest.row_bytes > HELD_BYTES:
        raise UserError(
            "data",
            f"the {split} split has {manifest.rows(split)} rows of {manifest.row_bytes} bytes, more than the "
            f"{HELD_BYTES >> 30} GiB that are held in memory",
            "hold out less",
        )
    return True
