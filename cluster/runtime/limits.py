"""Limits: what no machine, or not this one, can hold is refused before memory is taken."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nn_models.errors import UserError

if TYPE_CHECKING:
    from torch import nn

MOST_MODULES = 10_000  # the deepest nets that were ever trained have some thousands
MOST_WEIGHT_BYTES = 1 << 50
CGROUP = Path("/sys/fs/cgroup/memory.max")


class ImpossibleError(UserError):
    """A size that is a slip of the keyboard."""


def machine_bytes() -> int:
    """The memory that this process may take at most."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(found, int(CGROUP.read_text()))
    except (OSError, ValueError):  # there is no limit
        return found


def size(num_bytes: int) -> str:
    """For people: `15 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes} {unit}"
        num_bytes //= 1024
    return f"{num_bytes} GiB" if num_bytes < 10240 else f"{num_bytes // 1024:,} TiB"


@contextmanager
def refusing_impossible_models() -> Iterator[None]:
    """Raise ImpossibleError as soon as a model that is built in the block has too many layers, or too large ones.

    To be of use where tensors without memory are built (the device `meta`), or much too large ones are refused at once.
    """
    from torch.nn.modules.module import (
        register_module_module_registration_hook,
        register_module_parameter_registration_hook,
    )

    modules, tensors, weights = 0, 0, 0

    def refuse_too_many(layers: int) -> None:
        if layers > MOST_MODULES:
            raise ImpossibleError("model", f"has more than {MOST_MODULES:,} layers", "ask for fewer")

    def another(module: "nn.Module", name: str, submodule: "nn.Module | None") -> None:
        nonlocal modules
        modules += 1
        refuse_too_many(modules)

    def more(module: "nn.Module", name: str, parameter: "nn.Parameter | None") -> None:
        nonlocal tensors, weights  # of modules, too, that become part of another only once all are there
        tensors += parameter is not None
        refuse_too_many(tensors // 2)  # most have a bias
        weights += parameter.numel() * parameter.element_size() if parameter is not None else 0
        if weights > MOST_WEIGHT_BYTES:
            raise ImpossibleError("model", f"has weights of more than {size(MOST_WEIGHT_BYTES)}", "ask for fewer")

    hooks = [register_module_module_registration_hook(another), register_module_parameter_registration_hook(more)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
