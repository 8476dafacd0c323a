"""Loader: batches of one rank, from rows held in memory or streamed from storage, normalised on the device."""

import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.data.augment import Augmentation
from cluster.data.keys import RowIds
from cluster.data.manifest import Manifest
from cluster.data.order import LaneOrder, Order
from cluster.data.rows import Rows, table_rows
from cluster.data.scaling import Normalise, symmetric
from cluster.data.shards import DataSet


@dataclass(frozen=True)
class Batch:
    """This rank's slice of a global batch.

    `inputs` (rows, *input_shape) float32, `targets` (rows,) or (rows, outputs), on the device. Where rows are pairs of
    images, `condition` (rows, *condition_shape) float32 in [-1, 1] is the image to start from. Where the slice is
    empty, one row stands in (a rank must take part in every step) and `num_rows` is 0: its loss must count nothing.
    """

    inputs: Tensor
    targets: Tensor
    ids: RowIds
    start: int  # position in the epoch of the first row
    num_rows: int
    global_rows: int
    condition: Tensor | None = None


class TrainingRows(Protocol):
    """The training rows of one rank, in the order of the recipe."""

    @property
    def order(self) -> Order:
        """The order of the rows of all ranks."""

    def batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """The rank's slices of the epoch's global batches from `first_step` on."""


def _augmented(
    augmentation: Augmentation, stored: Tensor, condition: Tensor | None, ids: RowIds, epoch: int
) -> tuple[Tensor, Tensor | None]:
    """Both images of a pair are moved as one, so that they still fit each other."""
    if condition is None:
        return augmentation(stored, ids, epoch), None
    both = augmentation(torch.cat((stored, condition), dim=1), ids, epoch)
    return both[:, : stored.shape[1]], both[:, stored.shape[1] :]


class HeldRows:
    """Rows of one split in memory: views into Arrow's (which may be Ray's shared memory), or tensors on a GPU."""

    def __init__(self, table: pa.Table, manifest: Manifest, device: torch.device) -> None:
        rows = table_rows(table, manifest)
        self.manifest = manifest
        self.device = device
        self.normalise = Normalise(manifest, device)
        self.num_rows = len(rows.ids)
        self._inputs, self._targets = _shared(rows.inputs), _shared(rows.targets)
        self._condition = None if rows.condition is None else _shared(rows.condition)
        self.resident = device.type == "cuda" and self._fits(device)
        if self.resident:  # kept as stored, gathered and normalised there
            self._inputs, self._targets = self._inputs.to(device), self._targets.to(device)
            self._condition = None if self._condition is None else self._condition.to(device)

    def _fits(self, device: torch.device) -> bool:
        free, _ = torch.cuda.mem_get_info(device)
        condition_bytes = 0 if self._condition is None else self._condition.nbytes
        return self._inputs.nbytes + self._targets.nbytes + condition_bytes <= free // 4

    def stored(self, ids: RowIds) -> tuple[Tensor, Tensor]:
        """Inputs as stored, and targets, of these rows, on the device."""
        index = self._index(ids)
        return self._gather(self._inputs, index), self._gather(self._targets, index)

    def stored_condition(self, ids: RowIds) -> Tensor | None:
        """The images to start from of these rows as stored, on the device; None where rows are no pairs."""
        return None if self._condition is None else self._gather(self._condition, self._index(ids))

    def _index(self, ids: RowIds) -> Tensor:
        index = torch.from_numpy(ids)
        return index.to(self.device, non_blocking=True) if self.resident else index

    def _gather(self, values: Tensor, index: Tensor) -> Tensor:
        chosen = values.index_select(0, index)
        return chosen if self.resident else _to_device(chosen, self.device)

    def pass_over(self, batch_size: int, *, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(stored inputs, inputs, targets) of this rank's share of all rows, in their order, for evaluation."""
        first, end = self.num_rows * rank // world_size, self.num_rows * (rank + 1) // world_size
        for start in range(first, end, batch_size):
            inputs, targets = self.stored(np.arange(start, min(start + batch_size, end)))
            yield inputs, self.normalise(inputs), targets


class HeldTraining:
    """Training rows that are held in memory."""

    def __init__(
        self, rows: HeldRows, order: Order, *, rank: int, world_size: int, augmentation: Augmentation | None = None
    ) -> None:
        self.order = order
        self._rows, self._rank, self._world_size = rows, rank, world_size
        self._augmentation = augmentation

    def batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """See TrainingRows."""
        for step in range(first_step, self.order.num_steps):
            ids = self.order.rows(epoch, step, self._rank, self._world_size)
            taken = ids if len(ids) else np.zeros(1, np.int64)
            stored, targets = self._rows.stored(taken)
            condition = self._rows.stored_condition(taken)
            if self._augmentation:
                stored, condition = _augmented(self._augmentation, stored, condition, taken, epoch)
            yield Batch(
                inputs=self._rows.normalise(stored),
                targets=targets,
                ids=ids,
                start=self.order.start(epoch, step, self._rank, self._world_size),
                num_rows=len(ids),
                global_rows=self.order.global_rows(epoch, step),
                condition=None if condition is None else symmetric(condition),
            )


class StreamedTraining:
    """Training rows read from storage, block by block and lane by lane, with the next block of each lane on its way.

    Memory holds two blocks of each of the rank's lanes: twice its share of the shuffle window.
    """

    def __init__(
        self,
        data: DataSet,
        order: LaneOrder,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.order = order
        self._data, self._rank, self._world_size, self._device = data, rank, world_size, device
        self._augmentation = augmentation
        self._normalise = Normalise(data.manifest, device)
        self._lanes = order.owned(rank, world_size)
        self._locations = data.row_group_locations("train")

    def batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """See TrainingRows. Raises UserError naming a shard that turns out to be damaged."""
        with ThreadPoolExecutor(2, thread_name_prefix="shards") as reader:
            lanes = [_LaneReader(self, epoch, lane, reader) for lane in self._lanes]
            try:
                for step in range(first_step, self.order.num_steps):
                    yield self._batch(epoch, step, [lane.take(step) for lane in lanes])
            finally:
                reader.shutdown(wait=True, cancel_futures=True)

    def _batch(self, epoch: int, step: int, parts: list[Rows]) -> Batch:
        rows = Rows.joined(parts)
        num_rows = len(rows.ids)
        if not num_rows:
            rows = self._data.read_row_groups(self._locations[:1]).at(slice(1))
        stored = _to_device(torch.from_numpy(rows.inputs), self._device)
        condition = None
        if rows.condition is not None:
            condition = _to_device(torch.from_numpy(rows.condition), self._device)
        if self._augmentation:
            stored, condition = _augmented(self._augmentation, stored, condition, rows.ids, epoch)
        return Batch(
            inputs=self._normalise(stored),
            targets=_to_device(torch.from_numpy(rows.targets), self._device),
            ids=rows.ids[:num_rows],
            start=self.order.start(epoch, step, self._rank, self._world_size),
            num_rows=num_rows,
            global_rows=self.order.global_rows(epoch, step),
            condition=None if condition is None else symmetric(condition),
        )

    def read(self, epoch: int, lane: int, index: int) -> tuple[Rows, NDArray[np.int64]]:
        """A block's rows as they were read, and the order in which they are used."""
        block = self.order.block(epoch, lane, index)
        return self._data.read_row_groups([self._locations[group] for group in block.groups]), block.permutation


class _LaneReader:
    """One lane's place in the epoch: the block in use and the next one."""

    def __init__(self, rows: StreamedTraining, epoch: int, lane: int, reader: ThreadPoolExecutor) -> None:
        self._rows, self._epoch, self._lane, self._reader = rows, epoch, lane, reader
        self._num_blocks = len(rows.order.lanes(epoch)[lane].groups)
        self._blocks: dict[int, Future[tuple[Rows, NDArray[np.int64]]]] = {}

    def take(self, step: int) -> Rows:
        """The step's rows of this lane."""
        manifest = self._rows._data.manifest
        parts = []
        for index, piece in self._rows.order.pieces(self._epoch, self._lane, step):
            rows, permutation = self._block(index)
            parts.append(rows.at(permutation[piece]))
        return Rows.joined(parts) if parts else _no_rows(manifest)

    def _block(self, index: int) -> tuple[Rows, NDArray[np.int64]]:
        for old in [old for old in self._blocks if old < index]:
            del self._blocks[old]
        for wanted in (index, index + 1):
            if wanted < self._num_blocks and wanted not in self._blocks:
                self._blocks[wanted] = self._reader.submit(self._rows.read, self._epoch, self._lane, wanted)
        return self._blocks[index].result()


def _no_rows(manifest: Manifest) -> Rows:
    targets: Any = np.empty(0, np.int64)
    if manifest.target_kind == "number":
        targets = np.empty((0, manifest.num_outputs), np.float32)
    condition = np.empty((0, *manifest.condition_shape), np.uint8) if manifest.condition_shape else None
    return Rows(np.empty(0, np.int64), np.empty((0, *manifest.input_shape), manifest.input_dtype), targets, condition)


def _shared(array: NDArray[Any]) -> Tensor:
    with warnings.catch_warnings():
        # rows in shared memory are read-only, and nothing here writes to them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return values
    return values.pin_memory().to(device, non_blocking=True)
