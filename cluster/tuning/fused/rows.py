"""The rows of fused trials: one batch for all where their seeds are equal, else a batch of batches.

Shapes: T trials, B rows of the batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from cluster.data.augment import augmentation_of
from cluster.data.keys import RowIds, row_keys
from cluster.data.order import LaneOrder, Order, training_order
from cluster.recipe.recipe import Recipe
from cluster.training.splits import Splits
from nn_models.batch import Batch, Place
from nn_models.errors import UserError


@dataclass(frozen=True)
class FusedBatch:
    """The rows of one step: values (B, …) where all trials' are the same (`shared`), else (B, T, …), each its own."""

    columns: Mapping[str, Tensor]
    shared: bool
    place: Place  # of one of the trials: of the others only the ids are different
    ids: Mapping[int, RowIds]  # by seed
    draw_keys: Callable[[], Tensor]  # (B,) where shared, else (B, T)
    unscale: Callable[[str, Tensor], Tensor]  # see Batch

    def pieces(self, wanted: int) -> list[Batch]:
        """The same rows in so many pieces, or fewer where there are fewer rows."""
        number = min(wanted, self.place.num_rows)
        if number == 1:
            return [Batch(self.columns, self.place, self.draw_keys, unscale=self.unscale)]
        split = {name: values.tensor_split(number) for name, values in self.columns.items()}
        pieces, start = [], self.place.start
        for piece, ids in enumerate(np.array_split(self.place.ids, number)):
            place = self.place._replace(ids=ids, start=start, num_rows=len(ids), weight=len(ids))
            keys = partial(self._keys_of, piece, number)
            columns = {name: parts[piece] for name, parts in split.items()}
            pieces.append(Batch(columns, place, keys, unscale=self.unscale))
            start += len(ids)
        return pieces

    def _keys_of(self, piece: int, number: int) -> Tensor:
        return self.draw_keys().tensor_split(number)[piece]


class FusedRows:
    """The training rows of trials that differ in nothing but their seeds. Their columns are dense: see `why_not`."""

    def __init__(self, recipe: Recipe, seeds: Sequence[int], splits: Splits, device: torch.device) -> None:
        """Raises UserError where rows are streamed in several orders, whose batches differ in length."""
        manifest = splits.manifest
        self._orders: dict[int, Order] = {
            seed: training_order(
                manifest,
                global_batch_size=recipe.train.global_batch_size,
                seed=seed,
                window=recipe.data.shuffle_window,
            )
            for seed in dict.fromkeys(seeds)
        }
        self.order = self._orders[seeds[0]]
        self._streamed = None
        if isinstance(self.order, LaneOrder):
            if len(self._orders) > 1:
                raise UserError(
                    "train.seed",
                    "trials of different seeds cannot be fused where rows are streamed",
                    "set data.shuffle_window to null, or give them one seed",
                )
            self._streamed = splits.training(recipe, rank=0, world_size=1, device=device)
            return
        self._augmentation = augmentation_of(recipe.data.augment, manifest.signature, recipe.columns)
        self._reading = splits.reading(recipe, device, augmentation=self._augmentation)
        self._held = splits.held("train", device, names=self._reading.names)

    def batches(self, epoch: int, first_step: int, seeds: Callable[[], Sequence[int]]) -> Iterator[FusedBatch]:
        """The epoch's batches from `first_step` on; `seeds` are the trials' that are left when a batch is asked for."""
        if self._streamed is not None:
            (seed,) = self._orders
            for (batch,) in self._streamed.batches(epoch, first_step):
                columns = cast(Mapping[str, Tensor], batch.columns)
                yield FusedBatch(columns, True, batch.place, {seed: batch.place.ids}, batch.draw_keys, batch.unscale)
            return
        for step in range(first_step, self.order.num_steps):
            yield self._batch(epoch, step, seeds())

    def _batch(self, epoch: int, step: int, seeds: Sequence[int]) -> FusedBatch:
        first, *others = dict.fromkeys(seeds)
        place = self._orders[first].place(epoch, step, 0, 1)
        ids = {first: place.ids} | {seed: self._orders[seed].rows(epoch, step, 0, 1) for seed in others}
        rows = np.stack(list(ids.values()), 1)  # gathered row by row, seed by seed

        def keys() -> Tensor:
            drawn = np.stack([row_keys(seed, epoch, own) for seed, own in ids.items()], 1)
            return torch.from_numpy(drawn).to(self._reading.device, non_blocking=True)

        stored = self._held.gather(rows.ravel())
        if self._augmentation:
            stored = self._augmentation.of_columns(stored, keys().flatten())
        columns, unscale = cast(dict[str, Tensor], self._reading.scaling(stored)), self._reading.scaling.inverse
        if not others:
            return FusedBatch(columns, True, place, ids, lambda: keys().flatten(), unscale)
        columns = {name: values.unflatten(0, rows.shape) for name, values in columns.items()}
        if len(ids) == len(seeds):
            return FusedBatch(columns, False, place, ids, keys, unscale)
        numbers = {seed: number for number, seed in enumerate(ids)}  # some trials share theirs
        index = torch.tensor([numbers[seed] for seed in seeds], device=self._reading.device)
        columns = {name: values.index_select(1, index) for name, values in columns.items()}
        return FusedBatch(columns, False, place, ids, lambda: keys().index_select(1, index), unscale)
