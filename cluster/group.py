"""Group: a process group of torch.distributed: how peers meet and leave, and a lost peer told from a fault."""

import os
from datetime import timedelta

from torch import distributed

COLLECTIVE_TIMEOUT_S = 1800


def join(meeting: str, rank: int, *, world_size: int, backend: str = "gloo", timeout_s: float) -> None:
    """Become one of the peers that meet there: at a `tcp://` address, or at a `file://`, then on loopback alone."""
    if meeting.startswith("file:"):
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )


def leave() -> None:
    """Leave the group, where this process is in one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def lost_peer(error: BaseException) -> bool:
    """Whether an error is only how another process's death looks from here."""
    text = str(error).lower()
    return isinstance(error, distributed.DistError) or any(word in text for word in ("gloo", "nccl", "connection"))
