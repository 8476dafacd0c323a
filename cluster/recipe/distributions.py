"""Distributions: what a sweep draws values from. In YAML each is a mapping with one key.

    {choice: [a, b]}             one of these, all equally likely
    {grid: [a, b]}               the same, but only where all of them are to be tried: with the searcher `grid`
    {uniform: [low, high]}       a number
    {loguniform: [low, high]}    a number whose logarithm is uniform; low > 0
    {quniform: [low, high, q]}   a multiple of q, both bounds included; integers where q is one
    {randint: [low, high]}       an integer; `high` is not included, as in NumPy and Ray
    {normal: [mean, std]}        a number without bounds

What a choice lists may be plain values, distributions, or lists and whole sections that hold distributions at any
depth. In there, a mapping with nothing but one of these keys is a distribution.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from nn_models.errors import did_you_mean
from nn_models.spec import short

Number = int | float
Tree = Any  # a plain value, a Distribution, or a list or mapping of Trees

INWARD = 1e-9  # share of a range between a bound and where it is probed: bounds themselves are all but never drawn


class BadDistribution(Exception):
    """A distribution that cannot be; `where` is the place within it, such as `choice.0.lr.uniform`, or empty."""

    def __init__(self, where: str, message: str, fix: str | None = None) -> None:
        super().__init__(where, message, fix)
        self.where = where
        self.message = message
        self.fix = fix


@dataclass(frozen=True)
class Choice:
    """One of some Trees. What is drawn is the index of the option."""

    options: tuple[Tree, ...]
    word: Literal["choice", "grid"] = "choice"

    def sample(self, rng: np.random.Generator) -> int:
        """An index."""
        return int(rng.integers(len(self.options)))

    def probes(self) -> list[int]:
        """Each index."""
        return list(range(len(self.options)))

    def __str__(self) -> str:
        return f"{self.word} of {' | '.join(map(text, self.options))}"


@dataclass(frozen=True)
class Uniform:
    """A number between two bounds; with `log`, its logarithm is uniform."""

    low: float
    high: float
    log: bool = False
    word = "uniform"

    def sample(self, rng: np.random.Generator) -> float:
        """A value."""
        if not self.log:
            return float(rng.uniform(self.low, self.high))
        value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return min(max(value, self.low), self.high)  # exp(log(low)) may be a little less than low

    def probes(self) -> list[float]:
        """The middle, and a little within both bounds."""
        return [self._at(share) for share in (0.5, INWARD, 1 - INWARD)]

    def holds(self, value: Any) -> bool:
        """Whether this may have drawn the value."""
        return _is_number(value) and self.low <= value <= self.high

    def _at(self, share: float) -> float:
        if self.log:
            return math.exp((1 - share) * math.log(self.low) + share * math.log(self.high))
        return (1 - share) * self.low + share * self.high

    def __str__(self) -> str:
        return f"{'loguniform' if self.log else 'uniform'} from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Multiples:
    """q times an integer from `first` to `last`, both included (`quniform`)."""

    q: Number
    first: int
    last: int
    word = "quniform"

    def value(self, multiple: int) -> Number:
        """`multiple` times q, without the digits that binary fractions add: 3 times 0.1 is 0.3."""
        return multiple * self.q if isinstance(self.q, int) else float(_exact(self.q) * multiple)

    def multiple(self, value: Any) -> int | None:
        """Which multiple of q a value is; None where this cannot have drawn it."""
        if not _is_number(value):
            return None
        nearest = round(value / self.q)
        is_one = math.isclose(self.value(nearest), value, rel_tol=1e-12, abs_tol=self.q * INWARD)
        return nearest if is_one and self.first <= nearest <= self.last else None

    def holds(self, value: Any) -> bool:
        """Whether this may have drawn the value."""
        return self.multiple(value) is not None

    def sample(self, rng: np.random.Generator) -> Number:
        """A value."""
        return self.value(int(rng.integers(self.first, self.last, endpoint=True)))

    def probes(self) -> list[Number]:
        """The middle, the least and the largest value."""
        return [self.value(multiple) for multiple in ((self.first + self.last) // 2, self.first, self.last)]

    def __str__(self) -> str:
        return f"quniform from {self.value(self.first):g} to {self.value(self.last):g} in steps of {self.q:g}"


@dataclass(frozen=True)
class Integers:
    """An integer from `low` to `high` - 1 (`randint`)."""

    low: int
    high: int
    word = "randint"

    def sample(self, rng: np.random.Generator) -> int:
        """A value."""
        return int(rng.integers(self.low, self.high))

    def probes(self) -> list[int]:
        """The middle, the least and the largest value."""
        return [(self.low + self.high - 1) // 2, self.low, self.high - 1]

    def holds(self, value: Any) -> bool:
        """Whether this may have drawn the value."""
        return _is_number(value) and value == int(value) and self.low <= value < self.high

    def __str__(self) -> str:
        return f"randint from {self.low} to {self.high - 1}"


@dataclass(frozen=True)
class Normal:
    """A number of mean `mean` and standard deviation `std`."""

    mean: float
    std: float
    word = "normal"

    def sample(self, rng: np.random.Generator) -> float:
        """A value."""
        return float(rng.normal(self.mean, self.std))

    def probes(self) -> list[float]:
        """The mean alone: there are no bounds, so some values may well be ones that no recipe takes."""
        return [self.mean]

    def holds(self, value: Any) -> bool:
        """Whether this may have drawn the value."""
        return _is_number(value)

    def __str__(self) -> str:
        return f"normal of mean {self.mean:g} and deviation {self.std:g}"


OfNumbers = Uniform | Multiples | Integers | Normal
Distribution = Choice | OfNumbers


def parse(raw: Any) -> Distribution:
    """The distribution that a path of the space is given. Raises BadDistribution."""
    if not isinstance(raw, Mapping) or len(raw) != 1:
        raise BadDistribution(
            "",
            f"must be one distribution, such as {{choice: [1, 2]}} or {{loguniform: [1e-4, 1e-1]}}, not {short(raw)}",
            "what is the same in all trials belongs in the recipe, outside sweep",
        )
    (word,) = raw
    if word not in PARSERS:
        hint = did_you_mean(str(word), PARSERS)
        if isinstance(raw[word], Mapping):
            hint = "paths are written with dots, such as optimizer.lr"
        raise BadDistribution("", f"unknown distribution {short(word)}", hint)
    return PARSERS[word](raw[word], word)


def walk(tree: Tree, name: str, above: Mapping[str, int]) -> Iterator[tuple[str, Distribution, dict[str, int]]]:
    """Each distribution in a Tree: its name, itself, and which indices the choices around it must have.

    A name is the way to it in YAML: `optimizer` for the choice there, `optimizer.choice.0.lr` within its first option.
    """
    if isinstance(tree, Distribution):
        yield name, tree, dict(above)
    if isinstance(tree, Choice):
        for index, option in enumerate(tree.options):
            yield from walk(option, option_name(name, tree, index), {**above, name: index})
    else:
        for key, inner in children(tree):
            yield from walk(inner, f"{name}.{key}", above)


def children(tree: Tree) -> Iterator[tuple[Any, Tree]]:
    """Keys or indices of a section or list, and what stands there."""
    if isinstance(tree, Mapping):
        yield from tree.items()
    elif isinstance(tree, list):
        yield from enumerate(tree)


def option_name(name: str, choice: Choice, index: int) -> str:
    """The name of an option of the choice `name`."""
    return f"{name}.{choice.word}.{index}"


def text(tree: Tree) -> str:
    """A Tree as people read it."""
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key}: {text(inner)}" for key, inner in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(text, tree)) + "]"
    if tree is None or isinstance(tree, bool):
        return {None: "null", True: "true", False: "false"}[tree]
    return f"{tree:g}" if isinstance(tree, float) else str(tree)


def _tree(raw: Any, where: str) -> Tree:
    if isinstance(raw, Mapping):
        if len(raw) == 1 and (word := next(iter(raw))) in PARSERS:
            return PARSERS[word](raw[word], f"{where}.{word}")
        return {key: _tree(inner, f"{where}.{key}") for key, inner in raw.items()}
    if isinstance(raw, (list, tuple)):
        return [_tree(inner, f"{where}.{index}") for index, inner in enumerate(raw)]
    return raw


def _choice(raw: Any, where: str) -> Choice:
    if not isinstance(raw, (list, tuple)):
        raise BadDistribution(where, f"must be a list of what to choose from, not {short(raw)}")
    if not raw:
        raise BadDistribution(where, "there is nothing to choose from", "list the values to try")
    options = tuple(_tree(option, f"{where}.{index}") for index, option in enumerate(raw))
    return Choice(options, "grid" if where.endswith("grid") else "choice")


def _uniform(raw: Any, where: str) -> Uniform:
    low, high = _numbers(raw, where, "two bounds, as in [0.1, 0.9]", 2)
    _refuse_no_range(where, low, high)
    if not math.isfinite(high - low):
        raise BadDistribution(where, f"the range from {low:g} to {high:g} is too large", "narrow it")
    return Uniform(float(low), float(high))


def _loguniform(raw: Any, where: str) -> Uniform:
    low, high = _numbers(raw, where, "two bounds, as in [1e-4, 1e-1]", 2)
    if low <= 0:
        raise BadDistribution(where, f"the lower bound {low:g} has no logarithm", "set it above 0, or use uniform")
    _refuse_no_range(where, low, high)
    return Uniform(float(low), float(high), log=True)


def _quniform(raw: Any, where: str) -> Multiples:
    low, high, q = _numbers(raw, where, "two bounds and a step, as in [16, 128, 16]", 3)
    if q <= 0:
        raise BadDistribution(where, f"the step {q:g} must be above 0")
    _refuse_no_range(where, low, high)
    first = math.ceil(_exact(low) / _exact(q))
    last = math.floor(_exact(high) / _exact(q))
    if first > last:
        raise BadDistribution(
            where, f"no multiple of {q:g} lies between {low:g} and {high:g}", "widen the bounds or lower the step"
        )
    if last - first >= 2**53:  # more values than there are floats in the range
        raise BadDistribution(where, f"the step {q:g} is nothing beside the range", "use uniform")
    return Multiples(q, first, last)


def _randint(raw: Any, where: str) -> Integers:
    low, high = _numbers(raw, where, "two integers, as in [1, 5]", 2)
    if low != int(low) or high != int(high):
        raise BadDistribution(
            where, f"the bounds must be integers, not {short(list(raw))}", "use uniform for other numbers"
        )
    if max(abs(low), abs(high)) > 2**53:
        raise BadDistribution(where, f"the bounds must not be beyond {2**53}, not {short(list(raw))}")
    if low >= high:
        raise BadDistribution(
            where,
            f"no integer is from {low:g} to below {high:g}: the upper bound is not included",
            f"set it to {int(max(low, high)) + 1} at least",
        )
    return Integers(int(low), int(high))


def _normal(raw: Any, where: str) -> Normal:
    mean, std = _numbers(raw, where, "a mean and a standard deviation, as in [0.5, 0.1]", 2)
    if std <= 0:
        raise BadDistribution(where, f"the standard deviation {std:g} must be above 0")
    return Normal(float(mean), float(std))


PARSERS: dict[str, Callable[[Any, str], Distribution]] = {
    "choice": _choice,
    "grid": _choice,
    "uniform": _uniform,
    "loguniform": _loguniform,
    "quniform": _quniform,
    "randint": _randint,
    "normal": _normal,
}


def _numbers(raw: Any, where: str, what: str, count: int) -> list[Number]:
    if not isinstance(raw, (list, tuple)) or len(raw) != count:
        raise BadDistribution(where, f"must be {what}, not {short(raw)}")
    numbers = [_number(item) for item in raw]
    for item, number in zip(raw, numbers, strict=True):
        if not _is_number(number):
            raise BadDistribution(where, f"must be {what}, of finite numbers; {short(item)} is not one")
    return numbers


def _number(item: Any) -> Any:
    """A number may come as text: YAML 1.1 reads 1e-3 so."""
    try:
        return float(item) if isinstance(item, str) else item
    except ValueError:
        return None


def _refuse_no_range(where: str, low: Number, high: Number) -> None:
    if low > high:
        raise BadDistribution(where, f"the lower bound {low:g} is above the upper one {high:g}", "swap them")
    if low == high:
        raise BadDistribution(where, f"both bounds are {low:g}", "widen them, or set the value in the recipe itself")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1e300


def _exact(value: Number) -> Decimal:
    """The number as it is written: Decimal(0.1) is not 0.1."""
    return Decimal(repr(value))
