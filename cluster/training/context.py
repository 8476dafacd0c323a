"""Context: the loop's only way to its world: rank, collectives, rows, the run's directory."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.storage import Folder
from cluster.training.splits import Splits


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


class GroupContext:
    """One rank of a process group; see Context."""

    def __init__(self, *, run: Folder, splits: Splits, device: torch.device) -> None:
        self.run, self.splits, self.device = run, splits, device
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()

    def prepare(self, model: nn.Module) -> nn.Module:
        """See Context."""
        model = model.to(self.device)
        if self.world_size == 1 or not any(p.requires_grad for p in model.parameters()):
            return model
        # Running statistics are averaged when they are used (evaluation, checkpoints), not broadcast at every step.
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """See Context."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def reduce_sums(self, values: Tensor) -> Tensor:
        """See Context."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> list[Tensor]:
        """See Context."""
        if self.world_size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        distributed.all_gather(parts, values)
        return parts

    def agree(self, number: int) -> int:
        """See Context."""
        value = torch.tensor([number], device=self.device)
        if self.world_size > 1:
            distributed.broadcast(value, src=0)
        return int(value)
