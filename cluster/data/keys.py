"""Keys: 64 mixed bits of rows: the key each draws its random numbers from, and the digest of an epoch's order."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RowIds = NDArray[np.int64]


def row_keys(seed: int, epoch: int, ids: RowIds | NDArray[np.uint64]) -> NDArray[np.int64]:
    """A key for each of these rows (B,) in this epoch: what `nn_models.noise` draws its numbers from.

    In one epoch, two rows of a split never have the same.
    """
    of_epoch = _mix(_mix(np.array([seed], np.uint64)) ^ np.uint64(epoch))
    return _mix(of_epoch ^ _mix(ids.astype(np.uint64))).view(np.int64)


def digest_part(ids: RowIds, start: int) -> NDArray[np.int64]:
    """What these rows, used from position `start` on, add to the epoch's digest: two 32-bit halves.

    The digest is a sum over (position, row) pairs, so ranks and restarts add up their parts in any order and still
    every exchange of two rows shows.
    """
    positions = np.arange(start, start + len(ids), dtype=np.uint64)
    total = int(_mix(positions ^ _mix(ids.astype(np.uint64) + np.uint64(1))).sum(dtype=np.uint64))
    return np.array([total >> 32, total & 0xFFFFFFFF], np.int64)


def digest_text(halves: Sequence[int]) -> str:
    """The digest as 16 hexadecimal digits, from the sum of its parts."""
    return f"{((int(halves[0]) << 32) + int(halves[1])) % 2**64:016x}"


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): every input bit changes half of the output bits."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
