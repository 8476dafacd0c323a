"""Noise: uniform and normal numbers of each row's own key, the same on any rank, vectorised.

A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): number j of a row is a
hash of (the row's key, the stream, j) and of nothing else. No state is kept or changed, so a row gets the same numbers
whatever batch, rank or piece of a step it comes in, and torch's global generators are left alone.

`stream` tells the uses of one key apart: numbers of two streams are independent. Shapes: B rows.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The uses of a row's key. What needs several streams adds small numbers to its own.
AUGMENTATION = 1 << 16
CORRUPTION = 2 << 16  # of what a denoising autoencoder is given
CODE = 3 << 16  # of codes that are drawn


def uniform(keys: Tensor, shape: int | Sequence[int], *, stream: int) -> Tensor:
    """(B, *shape) float32 in [0, 1), multiples of 2**-24, from `keys` (B,) int64: the same bits on every device.

    The first n numbers of a row are the same for any larger shape.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    words = _words(keys, math.prod(shape), stream)
    # float32 has 24 bits: the upper ones, which are the best mixed; an integer below 2**24 becomes a float unrounded
    whole = words.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    return whole.to(torch.float32).mul_(2.0**-24).view(len(keys), *shape)


def normal(keys: Tensor, shape: int | Sequence[int], *, stream: int) -> Tensor:
    """(B, *shape) float32 of mean 0 and variance 1, from `keys` (B,) int64.

    By Box & Muller 1958: a pair of uniform numbers (u, v) gives the two normal ones sqrt(-2 ln u) (cos 2 pi v,
    sin 2 pi v). The largest that can occur is 6.7. Devices differ in the last bits of logarithm and cosine.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(shape)
    words = _words(keys, count + count % 2, stream)
    first, second = words.chunk(2, 1)
    # 31 bits, which float32 keeps near 0, where the tails of the normal distribution are made; never 0 itself
    radius = (first >> 1).bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_()
    angle = second.to(torch.float32).mul_(math.pi * 2.0**-31)
    both = torch.cat((angle.cos().mul_(radius), angle.sin().mul_(radius)), 1)
    return both[:, :count].reshape(len(keys), *shape)


def _words(keys: Tensor, count: int, stream: int) -> Tensor:
    """(B, count) int32 of random bits, the upper the better: a hash of 64 mixed bits of each row and of the number.

    Three multiplications with the upper half folded down between them, the middle of Wellons' triple32 (2018,
    "Prospecting for hash functions"), on multiples of the golden section. int32 because processors multiply eight or
    sixteen of them at once and hardly any int64. Products wrap around; there is no unsigned shift, so a mask takes away
    the copies of the sign.
    """
    state = _mix(keys ^ _signed(_mix_integer(stream)))
    low, high = state.to(torch.int32), (state >> 32).to(torch.int32)
    counters = torch.arange(count, device=keys.device, dtype=torch.int32) * -0x61C88647  # 0x9E3779B9
    words = (low[:, None] ^ counters).mul_(-0x12A52B45)  # 0xED5AD4BB as int32
    words.bitwise_xor_((words >> 11).bitwise_and_(0x1FFFFF))
    words.add_(high[:, None]).mul_(-0x53B3E4AF)  # 0xAC4C1B51
    words.bitwise_xor_((words >> 15).bitwise_and_(0x1FFFF))
    return words.mul_(0x31848BAB)


_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014) of int64: every input bit changes half of the output bits."""
    values = values + _signed(_GOLDEN)
    values = (values ^ ((values >> 30) & 0x3FFFFFFFF)) * _signed(_FIRST)
    values = (values ^ ((values >> 27) & 0x1FFFFFFFFF)) * _signed(_SECOND)
    return values ^ ((values >> 31) & 0x1FFFFFFFF)


def _mix_integer(value: int) -> int:
    """The same of one integer."""
    value = (value + _GOLDEN) % 2**64
    value = (value ^ (value >> 30)) * _FIRST % 2**64
    value = (value ^ (value >> 27)) * _SECOND % 2**64
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """64 bits read as int64."""
    return value - 2**64 if value >= 2**63 else value
