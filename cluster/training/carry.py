"""Carry: the state that streams carry from window to window: a tensor, or a tuple of such, a row for each stream."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cluster.training.context import Context


def mapped(function: Callable[..., Tensor], *carries: Any) -> Any:
    """The function of the tensors that stand at the same place in all of them; None where there is no state."""
    if carries[0] is None:
        return None
    if isinstance(carries[0], Tensor):
        return function(*carries)
    return tuple(mapped(function, *parts) for parts in zip(*carries, strict=True))


def of_rows(carry: Any, first: int, rows: int) -> Any:
    """The state of so many streams from `first` on; none of no stream, whose stand-in begins anew."""
    return mapped(lambda values: values[first : first + rows], carry) if rows else None


def kept(carry: Any, rows: int) -> Any:
    """The state after a step: that of the streams that count, without a stand-in's."""
    return mapped(lambda values: values[:rows], carry)


def joined(parts: list[Any]) -> Any:
    """Several pieces' streams, one after the other."""
    return parts[0] if len(parts) == 1 else mapped(lambda *values: torch.cat(values), *parts)


def gathered(carry: Any, context: Context) -> Any:
    """All ranks' streams, rank after rank; called by all."""
    return mapped(lambda values: torch.cat(context.gather(values)), carry)


def on_device(carry: Any, device: torch.device) -> Any:
    """The same on a device."""
    return mapped(lambda values: values.to(device), carry)
