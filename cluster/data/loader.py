"""Loader: batches of one rank, from rows held in memory or streamed from storage, scaled on the device."""

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.data.augment import Augmentation
from cluster.data.keys import RowIds, row_keys
from cluster.data.layouts import Dense, shared
from cluster.data.manifest import Manifest
from cluster.data.order import LaneOrder, Order
from cluster.data.rows import Rows, no_rows, table_rows
from cluster.data.scaling import Scaling
from cluster.data.shards import DataSet
from nn_models.batch import Batch, Place, Value, to_device
from nn_models.columns import Scale

SPLIT_BITS = 48  # a split has fewer rows than 2 to this
RESIDENT_SHARE = 4  # of a GPU's free memory, one part in so many may be taken by a split that is kept there


class RowsOfRank(Protocol):
    """The rows of one rank, in an order."""

    @property
    def order(self) -> Order:
        """The order of the rows of all ranks."""

    def batches(self, epoch: int, first_step: int = 0, *, pieces: int = 1) -> Iterator[tuple[Batch, ...]]:
        """The rank's slices of the epoch's global batches from `first_step` on, each cut into pieces.

        Each piece is laid together on its own. All ranks get equally many, `pieces` or fewer where there are fewer
        rows; where one is empty a row stands in, and its place says that it has none.
        """


class Held:
    """Columns of all rows of one split: views into Arrow's memory (which may be shared), or tensors on a GPU."""

    def __init__(self, table: pa.Table, manifest: Manifest, device: torch.device, *, names: Collection[str]) -> None:
        """`names` are the columns that are wanted."""
        rows = table_rows(table, manifest, names)
        self.manifest, self.device = manifest, device
        self.num_rows = len(rows.ids)
        self._layouts = dict(rows.columns)
        dense = {name: layout for name, layout in self._layouts.items() if isinstance(layout, Dense)}
        self._dense = {name: shared(layout.values) for name, layout in dense.items()}
        self.resident = device.type == "cuda" and self._fits(device)
        if self.resident:  # kept as stored, gathered and scaled there
            self._dense = {name: values.to(device) for name, values in self._dense.items()}
        self._in_place = self.resident or device.type == "cpu"  # what is gathered is on the device

    def _fits(self, device: torch.device) -> bool:
        free, _ = torch.cuda.mem_get_info(device)
        return sum(values.nbytes for values in self._dense.values()) <= free // RESIDENT_SHARE

    def gather(self, ids: RowIds) -> dict[str, Value]:
        """These rows as they are stored, on the device."""
        index = torch.from_numpy(ids)
        if self.resident:
            index = index.to(self.device, non_blocking=True)
        return {name: self._column(name, ids, index) for name in self._layouts}

    def _column(self, name: str, ids: RowIds, index: Tensor) -> Value:
        if name in self._dense:
            values = self._dense[name].index_select(0, index)
            return values if self._in_place else to_device(values, self.device)
        return self._layouts[name].take(ids).collate(self.manifest.columns[name].column, self.device)


class Reading:
    """How stored rows become a batch: augmented where that is asked for, and scaled; their keys from seed and epoch."""

    def __init__(
        self,
        manifest: Manifest,
        device: torch.device,
        *,
        names: Collection[str],
        scale: Scale,
        seed: int,
        augmentation: Augmentation | None = None,
        split: int = 0,
    ) -> None:
        """`names` are the columns that are read; rows of other splits than that of training, 0, have keys of their own.

        Raises UserError for a scale that one of the columns cannot be had at.
        """
        self.names, self.device, self.seed, self.augmentation = frozenset(names), device, seed, augmentation
        self._first_key = split << SPLIT_BITS
        self.scaling = Scaling({n: c for n, c in manifest.columns.items() if n in self.names}, scale, device)

    def batch(self, stored: Mapping[str, Value], place: Place, taken: RowIds, epoch: int) -> Batch:
        """The batch of stored columns of the rows `taken`, which are those of the place or one that stands in."""

        def keys() -> Tensor:
            return torch.from_numpy(row_keys(self.seed, epoch, taken + self._first_key)).to(
                self.device, non_blocking=True
            )

        if self.augmentation:
            stored = self.augmentation.of_columns(stored, keys())
        return Batch(self.scaling(stored), place, keys, stored, self.scaling.inverse)


class HeldRows:
    """One rank's slices of rows that are held in memory; see RowsOfRank."""

    def __init__(self, held: Held, order: Order, reading: Reading, *, rank: int, world_size: int) -> None:
        self.order = order
        self._held, self._reading, self._rank, self._world_size = held, reading, rank, world_size

    def batches(self, epoch: int, first_step: int = 0, *, pieces: int = 1) -> Iterator[tuple[Batch, ...]]:
        """See RowsOfRank."""
        for step in range(first_step, self.order.num_steps):
            place = self.order.place(epoch, step, self._rank, self._world_size)
            cut = _cut(place, self.order, pieces, self._world_size)
            yield tuple([self._batch(piece, epoch) for piece, _ in cut])  # a list is quicker than a generator

    def _batch(self, place: Place, epoch: int) -> Batch:
        taken = place.ids if place.num_rows else np.zeros(1, np.int64)
        return self._reading.batch(self._held.gather(taken), place, taken, epoch)


class StreamedRows:
    """One rank's slices read from storage, block by block and lane by lane, the next block of each lane on its way.

    Memory holds two blocks of each of the rank's lanes: twice its share of the shuffle window. See RowsOfRank.
    """

    def __init__(self, data: DataSet, order: LaneOrder, reading: Reading, *, rank: int, world_size: int) -> None:
        self.order = order
        self._data, self._reading, self._rank, self._world_size = data, reading, rank, world_size
        self._lanes = order.owned(rank, world_size)
        self._locations = data.row_group_locations("train")

    def batches(self, epoch: int, first_step: int = 0, *, pieces: int = 1) -> Iterator[tuple[Batch, ...]]:
        """See RowsOfRank. Raises UserError naming a shard that turns out to be damaged."""
        with ThreadPoolExecutor(2, thread_name_prefix="shards") as reader:
            lanes = [_LaneReader(self, epoch, lane, reader) for lane in self._lanes]
            try:
                for step in range(first_step, self.order.num_steps):
                    rows = Rows.joined([lane.take(step) for lane in lanes])
                    place = self.order.place(epoch, step, self._rank, self._world_size)
                    cut = _cut(place, self.order, pieces, self._world_size)
                    yield tuple(self._batch(rows.at(inside), piece, epoch) for piece, inside in cut)
            finally:
                reader.shutdown(wait=True, cancel_futures=True)

    def _batch(self, rows: Rows, place: Place, epoch: int) -> Batch:
        if not place.num_rows:
            rows = self._data.read_row_groups(self._locations[:1]).at(slice(1))
        columns, reading = self._data.manifest.columns, self._reading
        stored = {
            name: layout.collate(columns[name].column, reading.device)
            for name, layout in rows.columns.items()
            if name in reading.names
        }
        return reading.batch(stored, place, rows.ids, epoch)

    def read(self, epoch: int, lane: int, index: int) -> tuple[Rows, NDArray[np.int64]]:
        """A block's rows as they were read, and the order in which they are used."""
        block = self.order.block(epoch, lane, index)
        return self._data.read_row_groups([self._locations[group] for group in block.groups]), block.permutation

    def none(self) -> Rows:
        """Rows of which there are none."""
        return no_rows(self._data.manifest)


class _LaneReader:
    """One lane's place in the epoch: the block in use and the next one."""

    def __init__(self, rows: StreamedRows, epoch: int, lane: int, reader: ThreadPoolExecutor) -> None:
        self._rows, self._epoch, self._lane, self._reader = rows, epoch, lane, reader
        self._num_blocks = len(rows.order.lanes(epoch)[lane].groups)
        self._blocks: dict[int, Future[tuple[Rows, NDArray[np.int64]]]] = {}

    def take(self, step: int) -> Rows:
        """The step's rows of this lane."""
        parts = []
        for index, piece in self._rows.order.pieces(self._epoch, self._lane, step):
            rows, permutation = self._block(index)
            parts.append(rows.at(permutation[piece]))
        return Rows.joined(parts) if parts else self._rows.none()

    def _block(self, index: int) -> tuple[Rows, NDArray[np.int64]]:
        for old in [old for old in self._blocks if old < index]:
            del self._blocks[old]
        for wanted in (index, index + 1):
            if wanted < self._num_blocks and wanted not in self._blocks:
                self._blocks[wanted] = self._reader.submit(self._rows.read, self._epoch, self._lane, wanted)
        return self._blocks[index].result()


def _cut(place: Place, order: Order, wanted: int, world_size: int) -> list[tuple[Place, slice]]:
    """The pieces of a rank's slice, as many on all ranks, with which rows of the slice each has."""
    pieces = min(wanted, max(1, place.global_rows // world_size))
    if pieces == 1:
        return [(place, slice(None))]
    fewest, longer = divmod(place.num_rows, pieces)
    found = []
    for piece in range(pieces):
        first = piece * fewest + min(piece, longer)
        inside = slice(first, first + fewest + (piece < longer))
        ids = place.ids[inside]
        part = place._replace(ids=ids, start=place.start + first, num_rows=len(ids), weight=order.weigh(ids))
        found.append((part, inside))
    return found
