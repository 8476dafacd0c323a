"""Noise: numbers that pass for uniform and normal ones, and depend on key, stream and place alone."""

import itertools

import pytest
import torch
from scipy import stats

from nn_models import noise

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# Keys as unlike random ones as they come: what is drawn must be random for all of them. Everything below is drawn from
# fixed keys and comes out the same each time, so a probability that is small can only come from what the code says.
KEYS = {
    "successive": torch.arange(2000),
    "upper half": torch.arange(2000) << 32,
    "negative": -torch.arange(2000) - 1,
    "strides": torch.arange(2000) * 0x1234567,
    "few bits": torch.tensor([1 << a | 1 << b for a in range(63) for b in range(63)]).unique(),
}
UNLIKELY = 1e-3  # some 120 figures are compared with it


def chi_square(cells: torch.Tensor, count: int) -> float:
    """How likely uniform cells are to be filled as unequally as these numbers from 0 to count - 1 fill them."""
    return float(stats.chisquare(torch.bincount(cells.flatten(), minlength=count).numpy()).pvalue)


def cells(numbers: torch.Tensor, count: int) -> torch.Tensor:
    return (numbers * count).long()


@pytest.mark.parametrize("name", KEYS)
def test_uniform_numbers_are_uniform(name):
    keys = KEYS[name]
    assert len(keys) > 1900  # 2,016 pairs of bits or one alone
    numbers = noise.uniform(keys, 200, stream=3)
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert torch.equal(numbers * 2**24, (numbers * 2**24).floor())
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > UNLIKELY
    for bits in (0, 8, 16):  # each of the three bytes
        assert chi_square((numbers * 2**24).long() >> bits & 255, 256) > UNLIKELY


@pytest.mark.parametrize("name", KEYS)
def test_neighbours_tell_nothing_of_each_other(name):
    keys = KEYS[name]
    numbers = noise.uniform(keys, 200, stream=0)
    other = noise.uniform(keys, 200, stream=1)
    pairs = {
        "rows": (numbers[1:], numbers[:-1]),
        "numbers of a row": (numbers[:, 1:], numbers[:, :-1]),
        "streams": (numbers, other),
        "the next stream's next number": (numbers[:, 1:], other[:, :-1]),
        "halves of a row": (numbers[:, :100], numbers[:, 100:]),
    }
    for what, (one, another) in pairs.items():
        assert chi_square(cells(one, 32) * 32 + cells(another, 32), 1024) > UNLIKELY, what
        assert stats.pearsonr(one.flatten().numpy(), another.flatten().numpy()).pvalue > UNLIKELY, what
    triples = (cells(numbers[:, i::3][:, :66], 10) for i in range(3))
    first, second, third = triples
    assert chi_square((first * 10 + second) * 10 + third, 1000) > UNLIKELY


def test_each_bit_of_a_key_and_of_a_stream_changes_half_of_the_bits():
    keys = torch.arange(50) * 0x9E3779B9
    drawn = (noise.uniform(keys, 400, stream=5) * 2**24).long()
    others = [noise.uniform(keys ^ (1 << bit if bit < 63 else -(2**63)), 400, stream=5) for bit in range(64)]
    others += [noise.uniform(keys, 400, stream=5 ^ 1 << bit) for bit in range(32)]
    for other in others:
        changed = drawn ^ (other * 2**24).long()
        for bit in range(24):
            share = (changed >> bit & 1).float().mean()
            assert abs(share - 0.5) < 0.5 * 5 / 20_000**0.5  # 20,000 bits: 5 deviations; 2,304 are compared


@pytest.mark.parametrize("name", KEYS)
def test_normal_numbers_are_normal(name):
    numbers = noise.normal(KEYS[name], (10, 20), stream=3)
    assert numbers.dtype == torch.float32
    assert numbers.shape == (len(KEYS[name]), 10, 20)
    assert stats.kstest(numbers.flatten().numpy(), "norm").pvalue > UNLIKELY
    flat = numbers.flatten(1)
    for what, one, another in (
        ("rows", flat[1:], flat[:-1]),
        ("numbers of a row", flat[:, 1:], flat[:, :-1]),
        ("the two of a pair", flat[:, :100], flat[:, 100:]),
    ):
        for how in (lambda values: values, torch.abs):  # a pair has its radius in common
            assert stats.pearsonr(how(one).flatten(), how(another).flatten()).pvalue > UNLIKELY, what


def test_the_tails_are_normal_too():
    numbers = noise.normal(torch.arange(4000), 1000, stream=0)
    for bound in (3.0, 4.0, 4.5, 5.0):
        expected = 2 * stats.norm.sf(bound) * numbers.numel()  # 10,800, 253, 27, 2.3
        assert stats.poisson.cdf(int((numbers.abs() > bound).sum()), expected) > UNLIKELY
        assert stats.poisson.sf(int((numbers.abs() > bound).sum()) - 1, expected) > UNLIKELY
    assert numbers.isfinite().all()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        deviation = (stats.norm.moment(2 * power) - moment**2) ** 0.5 / numbers.numel() ** 0.5
        assert abs(float(numbers.pow(power).mean(dtype=torch.float64)) - moment) < 4 * deviation


def reference(key: int, place: int, stream: int) -> float:
    """One uniform number in Python's integers: what every device must get."""

    def mix(value: int) -> int:  # SplitMix64's finaliser, as published
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    state = mix(key % 2**64 ^ mix(stream))
    word = (state % 2**32 ^ place * 0x9E3779B9 % 2**32) * 0xED5AD4BB % 2**32
    word = ((word ^ word >> 11) + (state >> 32)) * 0xAC4C1B51 % 2**32
    word = (word ^ word >> 15) * 0x31848BAB % 2**32
    return (word >> 8) / 2**24


@pytest.mark.parametrize("device", DEVICES)
def test_the_bits_are_the_same_everywhere(device):
    keys = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]
    for stream in (0, 1, noise.AUGMENTATION, 2**31):
        drawn = noise.uniform(torch.tensor(keys, device=device), 7, stream=stream)
        assert drawn.tolist() == [[reference(key, place, stream) for place in range(7)] for key in keys]


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_gets_the_same_in_any_batch(device):
    keys = (torch.arange(300) * 0x5DEECE66D).to(device)
    chosen = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:77].to(device)
    for draw, count in itertools.product((noise.uniform, noise.normal), (1, 2, 7, 31, 784)):
        whole = draw(keys, count, stream=2)
        assert torch.equal(torch.cat([draw(part, count, stream=2) for part in keys.split(41)]), whole)
        assert torch.equal(draw(keys[chosen], count, stream=2), whole[chosen])
        assert torch.equal(draw(keys, (1, count), stream=2), whole[:, None])
    assert torch.equal(noise.uniform(keys, 5, stream=2), noise.uniform(keys, 9, stream=2)[:, :5])


def test_other_keys_and_streams_give_other_numbers():
    keys = torch.arange(100)
    drawn = torch.cat([noise.uniform(keys, 4, stream=stream) for stream in range(50)])
    assert len(drawn.unique(dim=0)) == 5000


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    noise.normal(torch.arange(3), 4, stream=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_can_be_compiled_and_rehearsed():
    keys = torch.arange(6)
    compiled = torch.compile(noise.normal, fullgraph=True, backend="aot_eager")  # uniform has nothing that it has not
    assert torch.equal(compiled(keys, (3, 5), stream=1), noise.normal(keys, (3, 5), stream=1))
    for draw in (noise.uniform, noise.normal):
        assert draw(keys.to("meta"), (3, 5), stream=1).shape == (6, 3, 5)
