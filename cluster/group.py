"""Group: a process group of torch.distributed: how peers meet and leave, and a lost peer told from a fault."""

import os
from datetime import timedelta

import psutil
from torch import distributed

COLLECTIVE_TIMEOUT_S = 1800
LOOPBACK = "127.0.0.1"


def join(meeting: str, rank: int, *, world_size: int, backend: str = "gloo", timeout_s: float) -> None:
    """Become one of the peers that meet there: at a `tcp://` address, or at a `file://`, then on loopback alone."""
    if meeting.startswith("file:"):
        listen_at(LOOPBACK)
    distributed.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )


def listen_at(address: str) -> None:
    """Have the groups that this process joins later listen at its node's address, on whichever interface has it.

    By itself gloo takes the address that the host's name has, which is loopback wherever /etc/hosts says so (Debian's
    does), and NCCL the first interface that there is. What the user has set in the environment stays, but for loopback:
    what is to be reached from this machine alone listens there alone.
    """
    name = interface_of(address)
    if name is None:  # as seen from behind a translation of addresses; both then do what they do by themselves
        return
    wanted = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}  # without the =, NCCL takes a prefix
    for variable, value in wanted.items():
        if address == LOOPBACK:
            os.environ[variable] = value
        else:
            os.environ.setdefault(variable, value)


def interface_of(address: str) -> str | None:
    """The network interface that has this IP address; None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return str(name)
    return None


def leave() -> None:
    """Leave the group, where this process is in one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def lost_peer(error: BaseException) -> bool:
    """Whether an error is only how another process's death looks from here."""
    text = str(error).lower()
    return isinstance(error, distributed.DistError) or any(word in text for word in ("gloo", "nccl", "connection"))
