"""Randomness: torch's global generators, a stream for each rank."""

import numpy as np
import torch
from torch import Tensor


def seed_rank(seed: int, rank: int, step: int) -> None:
    """A stream of its own for each rank, for dropout."""
    sequence = np.random.SeedSequence([seed, rank, step])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def generator_state(device: torch.device) -> Tensor:
    """The state of torch's global generators, those of the CPU and of the device."""
    if device.type == "cuda":
        both = [torch.get_rng_state(), torch.cuda.get_rng_state(device)]
        return torch.cat(both).to(device)
    return torch.get_rng_state()


def set_generator_state(state: Tensor, device: torch.device) -> None:
    """Go on with a state that `generator_state` gave, as it comes from a checkpoint."""
    cpu = len(torch.get_rng_state())
    torch.set_rng_state(state[:cpu])
    if device.type == "cuda" and len(state) > cpu:
        torch.cuda.set_rng_state(state[cpu:], device)
