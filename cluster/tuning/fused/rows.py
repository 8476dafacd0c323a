"""The rows of fused trials: one batch for all where their seeds are equal, else a batch of batches.

Shapes: T trials, B rows of the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.data.augment import Augmentation
from cluster.data.keys import RowIds
from cluster.data.loader import HeldRows
from cluster.data.order import LaneOrder, Order, training_order
from cluster.recipe.recipe import Recipe
from cluster.training.splits import Splits
from nn_models.errors import UserError


@dataclass(frozen=True)
class FusedBatch:
    """`inputs` (B, …) and `targets` (B, …) where all trials' rows are the same (`shared`); else (B, T, …) of both."""

    inputs: Tensor
    targets: Tensor
    shared: bool
    num_rows: int  # B
    start: int  # position in the epoch of the first row
    ids: dict[int, RowIds]  # by seed


class FusedRows:
    """The training rows of trials that differ in nothing but their seeds."""

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
        self._rows = HeldRows(splits.tables["train"], manifest, device)
        specs = recipe.data.augment
        self._augmentations = {
            seed: Augmentation(specs, shape=manifest.input_shape, seed=seed) if specs else None for seed in self._orders
        }

    def batches(self, epoch: int, first_step: int, seeds: Callable[[], Sequence[int]]) -> Iterator[FusedBatch]:
        """The epoch's batches from `first_step` on; `seeds` are the trials' that are left when a batch is asked for."""
        if self._streamed is not None:
            (seed,) = self._orders
            for rows in self._streamed.batches(epoch, first_step):
                yield FusedBatch(rows.inputs, rows.targets, True, rows.num_rows, rows.start, {seed: rows.ids})
            return
        for step in range(first_step, self.order.num_steps):
            yield self._batch(epoch, step, seeds())

    def _batch(self, epoch: int, step: int, seeds: Sequence[int]) -> FusedBatch:
        ids = {seed: self._orders[seed].rows(epoch, step, 0, 1) for seed in dict.fromkeys(seeds)}
        if any(self._augmentations.values()):
            parts = [self._rows.stored(rows) for rows in ids.values()]
            changed = [
                self._augmented(part, seed, ids[seed], epoch) for seed, (part, _) in zip(ids, parts, strict=True)
            ]
            stored = torch.stack(changed, 1).flatten(0, 1)
            targets = torch.stack([part for _, part in parts], 1).flatten(0, 1)
        else:
            stored, targets = self._rows.stored(np.stack(list(ids.values()), 1).ravel())  # row by row, seed by seed
        inputs = self._rows.normalise(stored)
        num_rows = self.order.global_rows(epoch, step)
        if len(ids) > 1:
            inputs, targets = (values.view(num_rows, len(ids), *values.shape[1:]) for values in (inputs, targets))
            if len(ids) < len(seeds):  # some trials share theirs
                places = {seed: place for place, seed in enumerate(ids)}
                index = torch.tensor([places[seed] for seed in seeds], device=inputs.device)
                inputs, targets = inputs.index_select(1, index), targets.index_select(1, index)
        return FusedBatch(inputs, targets, len(ids) == 1, num_rows, self.order.start(epoch, step, 0, 1), ids)

    def _augmented(self, stored: Tensor, seed: int, ids: RowIds, epoch: int) -> Tensor:
        augmentation = self._augmentations[seed]
        assert augmentation is not None
        return augmentation(stored, ids, epoch)
