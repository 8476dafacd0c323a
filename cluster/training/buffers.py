"""Buffers: running statistics (batch normalisation's) of several modules as one vector."""

from collections.abc import Sequence

import torch
from torch import Tensor


def flat(buffers: Sequence[Tensor]) -> Tensor:
    """(numbers,): all of them, float64. There must be one at least."""
    return torch.cat([buffer.flatten().double() for buffer in buffers])


def fill(buffers: Sequence[Tensor], numbers: Tensor) -> None:
    """Write back what `flat` has made of such buffers."""
    for buffer, values in zip(buffers, numbers.split([one.numel() for one in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))
