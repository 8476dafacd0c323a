"""Splits: the data of a run as it reaches a worker, and the batches of one rank from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from cluster.data.augment import Augmentation, augmentation_of
from cluster.data.layouts import LENGTH
from cluster.data.loader import Held, HeldRows, Reading, RowsOfRank, StreamedRows
from cluster.data.manifest import SPLITS, Manifest
from cluster.data.order import Buckets, InOrder, LaneOrder, Order, StreamOrder, Weights, held, training_order
from cluster.data.shards import DataSet
from cluster.data.shipment import Shipment
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from nn_models.batch import Batch

EVALUATION_ROWS = 500  # of a step in evaluation, where nothing is kept for a backward pass


@dataclass(frozen=True)
class Splits:
    """The data of a run as it reaches a worker: the splits that are held travel as tables, the others stay stored."""

    manifest: Manifest
    where: str  # the prepared data set, read by workers only where training rows are streamed
    tables: Mapping[str, pa.Table] = field(default_factory=dict)
    shipment: Shipment | None = None  # how the prepared data set reaches nodes that do not see it there

    def stored(self) -> DataSet:
        """The prepared data set, as this process reads it."""
        return self.shipment.arrived() if self.shipment else DataSet(Folder(self.where))

    def training(self, recipe: Recipe, *, rank: int, world_size: int, device: torch.device) -> RowsOfRank:
        """The training rows of one rank."""
        train, manifest = recipe.train, self.manifest
        augmentation = augmentation_of(recipe.data.augment, manifest.signature, recipe.columns)
        reading = self.reading(recipe, device, augmentation=augmentation)
        order = training_order(
            manifest,
            global_batch_size=train.global_batch_size,
            seed=train.seed,
            window=recipe.data.shuffle_window,
            weights=self._weights(recipe, "train"),
            work=self._work("train"),
            buckets=self._buckets(recipe),
        )
        if isinstance(order, LaneOrder):
            return StreamedRows(self.stored(), order, reading, rank=rank, world_size=world_size)
        rows = self.held("train", device, names=reading.names)
        return HeldRows(rows, order, reading, rank=rank, world_size=world_size)

    def evaluation(
        self,
        split: str,
        recipe: Recipe,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        batch_size: int = EVALUATION_ROWS,
    ) -> RowsOfRank | None:
        """One rank's share of a split to evaluate on, so many rows a step; None where there is no such split."""
        if split not in self.tables:
            return None
        reading = self.reading(recipe, device, split=split)
        rows, weights = self.held(split, device, names=reading.names), self._weights(recipe, split)
        order: Order
        if self.manifest.order == "streams":  # as many as in training: each begins without what came before it
            order = StreamOrder(rows.num_rows, num_streams=recipe.train.global_batch_size, weights=weights)
        else:
            order = InOrder(rows.num_rows, batch_size=batch_size, weights=weights, work=self._work(split))
        return HeldRows(rows, order, reading, rank=rank, world_size=world_size)

    def first(self, split: str, recipe: Recipe, num: int, *, device: torch.device) -> Batch:
        """So many of the first rows of a split that is there to evaluate on, whatever the order they are used in."""
        reading = self.reading(recipe, device, split=split)
        held = Held(self.tables[split].slice(0, num), self.manifest, device, names=reading.names)
        order = InOrder(held.num_rows, batch_size=num)
        (batch,) = next(HeldRows(held, order, reading, rank=0, world_size=1).batches(0))
        return batch

    def held(self, split: str, device: torch.device, *, names: frozenset[str]) -> Held:
        """These columns of a split that is held."""
        return Held(self.tables[split], self.manifest, device, names=names)

    def reading(
        self, recipe: Recipe, device: torch.device, *, augmentation: Augmentation | None = None, split: str = "train"
    ) -> Reading:
        """How a recipe's model and objective are given the rows."""
        return Reading(
            self.manifest,
            device,
            names=recipe.columns,
            scale=recipe.scale,
            seed=recipe.train.seed,
            augmentation=augmentation,
            split=SPLITS.index(split),
        )

    def _weights(self, recipe: Recipe, split: str) -> Weights:
        """What each row of a split counts in the loss."""
        name = recipe.objective.counts
        if name is None:
            return 1
        column = self.manifest.signature[name]
        if column.layout == "dense":
            return column.row_shape[0]
        return self._lengths(split, name)

    def _buckets(self, recipe: Recipe) -> Buckets | None:
        """Which training batches share their rows by length: that of all that is read of a row."""
        signature = self.manifest.signature
        read = [name for name in sorted(recipe.columns) if signature[name].layout != "dense"]
        if recipe.data.bucket is None or not read:
            return None
        return Buckets(recipe.data.bucket, np.sum([self._lengths("train", name) for name in read], 0))

    def _lengths(self, split: str, name: str) -> NDArray[np.int32]:
        """(rows,): elements of each row of a ragged column."""
        if split in self.tables:
            lengths: NDArray[np.int32] = self.tables[split][f"{name}.{LENGTH}"].to_numpy()
            return lengths
        return self.stored().lengths(split, name)

    def _work(self, split: str) -> Weights | None:
        """What each row of a split that is held takes to compute: its input's elements, where rows differ in length."""
        column = self.manifest.signature.columns.get("input")
        ragged = column is not None and column.layout == "ragged"
        return self._lengths(split, "input") if ragged and split in self.tables else None


def open_splits(data: DataSet, *, window: int | None) -> Splits:
    """Read the splits that are held in memory, their checksums verified. Raises UserError for damaged shards."""
    manifest = data.manifest
    splits = [split for split in manifest.splits if manifest.rows(split) and held(manifest, split, window)]
    tables = {split: data.table(split) for split in splits}
    return Splits(manifest, data.folder.uri, tables)
