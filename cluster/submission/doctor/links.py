"""Links: how long messages take between the nodes, and how many bytes pass a second, in one process group of them all.

Pairs of neighbours on a ring talk at once, each node with one other at a time: three rounds, whatever their number.
What is slow at one node alone shows at both of its links.
"""

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from cluster.group import join, leave, listen_at

MESSAGE_NUMBERS = 2  # of a small message: what one costs however little it carries
WARMING_UP = 3
MOST_MESSAGES = 100
SMALL_S = 0.5  # for the small messages of a link, and of all
LARGE_S = 0.05  # a block takes so long at least, or is the largest: what it costs to begin then counts little
BLOCK_BYTES = 1 << 18  # at first
MOST_BLOCK_BYTES = 1 << 24
GROWS = 4  # times, from one block to the next
REPEATS = 3
ALL_REDUCE_S = 3.0
JOIN_S = 40.0


@dataclass(frozen=True)
class Link:
    """From one rank to another."""

    first: int
    second: int
    latency_s: float  # one way, of a small message
    bytes_per_s: float  # in the slower direction


@dataclass(frozen=True)
class Linked:
    """What a rank found. `links` are those that it began."""

    joined_s: float
    all_reduce_s: float  # of all the bytes that were asked for
    small_all_reduce_s: float
    links: tuple[Link, ...]


def meeting_point(address: str) -> str:
    """Where the processes of a group can meet, at this node's address."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind((address, 0))
        host = f"[{address}]" if ":" in address else address
        return f"tcp://{host}:{free.getsockname()[1]}"


def measure_links(
    meeting: str, rank: int, *, world_size: int, address: str, backend: str, num_bytes: int, device: str = "cpu"
) -> Linked:
    """Join the others and measure. `address` is this node's, whose interface is used; all end within a minute or two.

    Raises what torch.distributed raises where a peer does not come, or stays away.
    """
    listen_at(address)
    began = time.perf_counter()
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    join(meeting, rank, world_size=world_size, backend=backend, timeout_s=JOIN_S)
    try:
        distributed.all_reduce(torch.ones(1, device=place))  # connects them all
        _arrived(place)
        joined = time.perf_counter() - began
        small, large = _small_all_reduce(place), _large_all_reduce(num_bytes, place)
        links = []
        for pairs in rounds(world_size):
            for first, second in pairs:
                if rank == first:
                    links.append(_led(rank, second, place))
                elif rank == second:
                    _followed(first, place)
            distributed.all_reduce(torch.ones(1, device=place))
            _arrived(place)
        return Linked(joined, large, small, tuple(links))
    finally:
        leave()


def rounds(world_size: int) -> list[list[tuple[int, int]]]:
    """The neighbours on a ring, as rounds of pairs in which no rank is twice."""
    if world_size < 2:
        return []
    ring = [(rank, (rank + 1) % world_size) for rank in range(world_size if world_size > 2 else 1)]
    last = [ring.pop()] if len(ring) % 2 and len(ring) > 1 else []
    return [pairs for pairs in (ring[::2], ring[1::2], last) if pairs]


def _small_all_reduce(place: torch.device) -> float:
    """Median seconds. All ranks agree on how often: rank 0's clock counts."""
    values = torch.zeros(MESSAGE_NUMBERS, device=place)
    times = [_timed(lambda: distributed.all_reduce(values)) for _ in range(WARMING_UP)]
    count = _agreed(_count(times[-1], SMALL_S, MOST_MESSAGES), place)
    return statistics.median(_timed(lambda: distributed.all_reduce(values)) for _ in range(count))


def _large_all_reduce(num_bytes: int, place: torch.device) -> float:
    """Median seconds for so many bytes, or for fewer in proportion where a slow link would take too long for all."""
    size = min(num_bytes, BLOCK_BYTES)
    while True:
        values = torch.zeros(max(1, size // 4), device=place)
        took = _timed(lambda values=values: distributed.all_reduce(values))  # type: ignore[misc]
        if not _agreed(size < num_bytes and took * GROWS < ALL_REDUCE_S / REPEATS, place):
            break
        size = min(num_bytes, size * GROWS)
    times = [_timed(lambda: distributed.all_reduce(values)) for _ in range(REPEATS)]
    return statistics.median(times) * num_bytes / size


def _agreed(value: int, place: torch.device) -> int:
    """What rank 0 says."""
    told = torch.tensor([int(value)], device=place)
    distributed.broadcast(told, src=0)
    return int(told)


def _count(each_s: float, at_most_s: float, most: int) -> int:
    """How often something can be done within that time: at least a few times, for the median to say something."""
    return max(5, min(most, int(at_most_s / max(each_s, 1e-9))))


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _arrived(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


# -- one link --------------------------------------------------------------------------------------------------------


def _led(rank: int, peer: int, place: torch.device) -> Link:
    """Send and ask for blocks of growing size, being told each time that all is there. The peer is in `_followed`.

    A cable or a limit may slow one direction only: the slower one counts.
    """
    small = 4 * MESSAGE_NUMBERS
    times = [_passed(small, peer, place) for _ in range(WARMING_UP)]
    times = [_passed(small, peer, place) for _ in range(_count(times[-1], SMALL_S, MOST_MESSAGES))]
    rates = []
    for sign in (1, -1):  # there, and back
        size = BLOCK_BYTES
        took = _passed(sign * size, peer, place)
        while took < LARGE_S and size < MOST_BLOCK_BYTES:
            size *= GROWS
            took = _passed(sign * size, peer, place)
        again = [_passed(sign * size, peer, place) for _ in range(REPEATS - 1)]
        rates.append(size / statistics.median([took, *again]))
    distributed.send(torch.zeros(1, dtype=torch.int64, device=place), peer)  # no more
    return Link(rank, peer, statistics.median(times) / 2, min(rates))


def _passed(num_bytes: int, peer: int, place: torch.device) -> float:
    """Seconds until so many bytes are there, and that has been told; where it is negative, until so many have come."""
    block = torch.zeros(abs(num_bytes) // 4, device=place)

    def exchange() -> None:
        distributed.send(torch.tensor([num_bytes // 4], device=place), peer)
        if num_bytes > 0:
            distributed.send(block, peer)
            distributed.recv(torch.empty(1, dtype=torch.int64, device=place), peer)
        else:
            distributed.recv(block, peer)

    return _timed(exchange)


def _followed(peer: int, place: torch.device) -> None:
    while True:
        told = torch.empty(1, dtype=torch.int64, device=place)
        distributed.recv(told, peer)
        count = int(told)
        if not count:
            return
        if count > 0:
            distributed.recv(torch.empty(count, device=place), peer)
            distributed.send(told, peer)
        else:
            distributed.send(torch.empty(-count, device=place), peer)


def gathered(found: Sequence[Linked]) -> Linked:
    """What all ranks found: the slowest of each, and all links."""
    return Linked(
        max(one.joined_s for one in found),
        max(one.all_reduce_s for one in found),
        max(one.small_all_reduce_s for one in found),
        tuple(link for one in found for link in one.links),
    )
