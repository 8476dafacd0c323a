"""Context: the loop's only way to its world: rank, collectives, rows, the run's directory."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import Tensor, nn

from cluster.data.augment import Augmentation
from cluster.data.loader import HeldRows, HeldTraining, StreamedTraining, TrainingRows, held, training_order
from cluster.data.manifest import Manifest
from cluster.data.order import LaneOrder
from cluster.data.shards import DataSet
from cluster.storage import Folder
from cluster.training.recipe import Recipe


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


class Context(Protocol):
    """What the loop asks of its world. Collectives are called by all ranks in the same order."""

    rank: int
    world_size: int
    device: torch.device
    splits: Splits
    run: Folder

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as the loop calls it: on the device, averaging gradients over ranks."""

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """While inside, gradients are accumulated and not averaged over ranks."""

    def reduce_sums(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on all ranks."""

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's tensor (all of one shape), on all ranks."""

    def agree(self, number: int) -> int:
        """Rank 0's number, on all ranks, once all have come here."""

    def report(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics, the same on all ranks; called by all."""


class LocalContext:
    """One process, without Ray."""

    rank = 0
    world_size = 1

    def __init__(self, *, run: Folder, splits: Splits, device: torch.device) -> None:
        self.run, self.splits, self.device = run, splits, device

    def prepare(self, model: nn.Module) -> nn.Module:
        """See Context."""
        return model.to(self.device)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """See Context."""
        return nullcontext()

    def reduce_sums(self, values: Tensor) -> Tensor:
        """See Context."""
        return values

    def gather(self, values: Tensor) -> list[Tensor]:
        """See Context."""
        return [values]

    def agree(self, number: int) -> int:
        """See Context."""
        return number

    def report(self, metrics: Mapping[str, Any]) -> None:
        """See Context. Nobody listens: the run's directory has it all."""
