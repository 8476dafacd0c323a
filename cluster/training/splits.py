"""Splits: the data of a run as it reaches a worker."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import torch

from cluster.data.augment import Augmentation
from cluster.data.loader import HeldRows, HeldTraining, StreamedTraining, TrainingRows
from cluster.data.manifest import Manifest
from cluster.data.order import LaneOrder, held, training_order
from cluster.data.shards import DataSet
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder


@dataclass(frozen=True)
class Splits:
    """The data of a run as it reaches a worker: the splits that are held travel as tables, the others stay stored."""

    manifest: Manifest
    where: str  # the prepared data set, read by workers only where training rows are streamed
    tables: Mapping[str, pa.Table] = field(default_factory=dict)

    def training(self, recipe: Recipe, *, rank: int, world_size: int, device: torch.device) -> TrainingRows:
        """The training rows of one rank."""
        train, manifest = recipe.train, self.manifest
        augmentation = None
        if recipe.data.augment:
            augmentation = Augmentation(recipe.data.augment, shape=manifest.input_shape, seed=train.seed)
        order = training_order(
            manifest,
            global_batch_size=train.global_batch_size,
            seed=train.seed,
            window=recipe.data.shuffle_window,
        )
        if isinstance(order, LaneOrder):
            data = DataSet(Folder(self.where))
            return StreamedTraining(
                data, order, rank=rank, world_size=world_size, device=device, augmentation=augmentation
            )
        rows = HeldRows(self.tables["train"], manifest, device)
        return HeldTraining(rows, order, rank=rank, world_size=world_size, augmentation=augmentation)

    def held(self, split: str, device: torch.device) -> HeldRows | None:
        """A split for evaluation; None where there is no such split."""
        return HeldRows(self.tables[split], self.manifest, device) if split in self.tables else None


def open_splits(data: DataSet, *, window: int | None) -> Splits:
    """Read the splits that are held in memory, their checksums verified. Raises UserError for damaged shards."""
    manifest = data.manifest
    splits = [split for split in manifest.splits if manifest.rows(split) and held(manifest, split, window)]
    tables = {split: data.table(split) for split in splits}
    return Splits(manifest, data.folder.uri, tables)
