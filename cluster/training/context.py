"""Context: the loop's only way to its world: rank, collectives, rows, the run's directory."""

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.storage import Folder
from cluster.training.leaving import Leaves, never
from cluster.training.splits import Splits

T = TypeVar("T")


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

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on all ranks."""

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's tensor, on all ranks; they may differ in the number of their rows."""

    def share(self, value: T) -> T:
        """Rank 0's plain value (what JSON can hold), on all ranks, once all have come here."""

    def leaves(self, step: int) -> bool:
        """Whether training stops here, where so many steps are done, to go on elsewhere: the same on all ranks."""


class LocalContext:
    """One process, without Ray."""

    rank = 0
    world_size = 1

    def __init__(self, *, run: Folder, splits: Splits, device: torch.device, leaves: Leaves = never) -> None:
        self.run, self.splits, self.device = run, splits, device
        self._leaves = leaves

    def prepare(self, model: nn.Module) -> nn.Module:
        """See Context."""
        return model.to(self.device)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """See Context."""
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """See Context."""
        return values

    def gather(self, values: Tensor) -> list[Tensor]:
        """See Context."""
        return [values]

    def share(self, value: T) -> T:
        """See Context."""
        return value

    def leaves(self, step: int) -> bool:
        """See Context."""
        return self._leaves(step)


class GroupContext:
    """One rank of a process group; see Context."""

    def __init__(self, *, run: Folder, splits: Splits, device: torch.device, leaves: Leaves = never) -> None:
        self.run, self.splits, self.device = run, splits, device
        self._leaves = leaves
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

    def sum(self, values: Tensor) -> Tensor:
        """See Context."""
        if self.world_size == 1:
            return values
        summed = values.clone()
        distributed.all_reduce(summed)
        return summed

    def gather(self, values: Tensor) -> list[Tensor]:
        """See Context."""
        if self.world_size == 1:
            return [values]
        own = torch.tensor([len(values)], device=self.device)
        counts = [torch.empty_like(own) for _ in range(self.world_size)]
        distributed.all_gather(counts, own)
        rows = [int(count) for count in counts]
        padded = values.new_zeros((max(rows), *values.shape[1:]))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in rows]
        distributed.all_gather(parts, padded)
        return [part[:count] for part, count in zip(parts, rows, strict=True)]

    def share(self, value: T) -> T:
        """See Context."""
        if self.world_size == 1:
            return value
        text = json.dumps(value).encode()  # not a pickle: what comes from another process is not run
        size = torch.tensor([len(text)], device=self.device)
        distributed.broadcast(size, src=0)
        content = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        distributed.broadcast(content, src=0)
        shared: T = json.loads(bytes(content.tolist()))
        return shared

    def leaves(self, step: int) -> bool:
        """See Context."""
        return self._leaves(step)
