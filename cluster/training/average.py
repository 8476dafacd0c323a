"""MovingAverage: an exponential moving average of a module's weights, and of its running statistics with them.

    average_0 = the module as it is at first
    average_(t + 1) = d_t average_t + (1 - d_t) now        d_t = min(decay, (1 + t) / (10 + t))

The decay warms up (as in TensorFlow's ExponentialMovingAverage with `num_updates`): what it remembers is at most about
a ninth of the updates so far, so the untrained weights are soon forgotten, and a short training can be averaged too.
Batch normalisation's statistics are those of the weights they were taken with: averaged weights are of use only with
statistics that are averaged alike.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NUM_AVERAGED = "n_averaged"  # as torch's AveragedModel names what its state holds, so that its states can be loaded
PREFIX = "module."


def decay_at(decay: float, updates: int) -> float:
    """What is kept of the average after so many updates, warmed up."""
    return min(decay, (1 + updates) / (10 + updates))


def average_into(averages: Sequence[Tensor], now: Sequence[Tensor], *, decay: float) -> None:
    """Take `now` into the averages, in place and as one operation for all."""
    torch._foreach_lerp_(list(averages), list(now), 1 - decay)  # as torch.optim.swa_utils does it


class MovingAverage:
    """`module` is the average of the one given, of the same kind; it is a copy of it at first."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.num_updates = 0  # counted here: to read it from the device would wait for it in every step
        self._source = module
        self._decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module as it now is."""
        pairs = list(zip(_tensors(self.module), _tensors(self._source), strict=True))
        floats = [(average, now) for average, now in pairs if average.is_floating_point()]
        others = [(average, now) for average, now in pairs if not average.is_floating_point()]  # numbers of batches
        if floats:
            averages, now = zip(*floats, strict=True)
            average_into(averages, now, decay=decay_at(self._decay, self.num_updates))
        if others:
            torch._foreach_copy_([average for average, _ in others], [now for _, now in others])
        self.num_updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """As torch's AveragedModel has it."""
        weights = {f"{PREFIX}{name}": tensor for name, tensor in self.module.state_dict().items()}
        return {NUM_AVERAGED: torch.tensor(self.num_updates), **weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of torch's AveragedModel too."""
        self.num_updates = int(state[NUM_AVERAGED])
        self.module.load_state_dict(
            {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name != NUM_AVERAGED}
        )


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in one order for all modules of a kind."""
    return [*module.parameters(), *module.buffers()]
