"""Long-memory problems, generated: adding (Hochreiter & Schmidhuber 1997), copy (Arjovsky et al. 2016)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from cluster.data.layouts import Dense, Layout
from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import DrawnTestSpec, Part, Source, even_parts
from cluster.data.split import Traits
from nn_models.columns import Labels, Numbers, Sequence, Tokens

PART_ROWS = 8192
BLANK, GO = 0, 1  # the first two tokens of a copy problem


class _GeneratedSpec(DrawnTestSpec):
    """Base of the problems whose rows are drawn from a seed."""

    rows: PositiveInt = Field(50_000, description="rows that are drawn, for all splits together")
    seed: NonNegativeInt = Field(0, description="what they are drawn from")


@dataclass(frozen=True)
class _Generated:
    """Base of their sources."""

    spec: Any

    @property
    def pools(self) -> Mapping[str, list[Part]]:
        """See Source."""
        return {"train": even_parts(self.spec.rows, PART_ROWS)}

    def traits(self, part: Part) -> Traits:
        """See Source."""
        return Traits()


class AddingSpec(_GeneratedSpec):
    """The sum of the two numbers that are marked in a sequence of uniform ones.

    A step is a number in [0, 1] and a mark, 1 at one step of each half and 0 elsewhere. Who always says 1 has a mean
    squared error of 1/6.
    """

    kind: Literal["adding"] = "adding"
    length: Annotated[int, Field(ge=2)] = Field(100, description="steps of a row")

    def open(self) -> Source:
        """See DataSpec."""
        return _Adding(self)


@dataclass(frozen=True)
class _Adding(_Generated):
    spec: AddingSpec

    @property
    def columns(self) -> Mapping[str, StoredColumn]:
        """See Source."""
        return {
            "input": StoredColumn(column=Sequence(width=2, length=self.spec.length), dtype="float32"),
            "target": StoredColumn(column=Numbers(size=1), dtype="float32"),
        }

    def load(self, part: Part) -> Mapping[str, Layout]:
        """See Source."""
        generator, half = np.random.default_rng([self.spec.seed, part.what[0]]), self.spec.length // 2
        steps = np.zeros((part.rows, self.spec.length, 2), np.float32)
        steps[..., 0] = generator.random((part.rows, self.spec.length))
        rows = np.arange(part.rows)
        marked = generator.integers(half, size=part.rows), generator.integers(half, self.spec.length, part.rows)
        sums = np.zeros((part.rows, 1), np.float32)
        for place in marked:
            steps[rows, place, 1] = 1
            sums[:, 0] += steps[rows, place, 0]
        return {"input": Dense(steps), "target": Dense(sums)}


class CopySpec(_GeneratedSpec):
    """Symbols, a long pause, a sign to go, and then the symbols are to be said again.

    Who remembers nothing says blanks until the sign, and then guesses: count ln(symbols) nats of a row.
    """

    kind: Literal["copy"] = "copy"
    symbols: Annotated[int, Field(ge=2)] = Field(8, description="how many there are")
    count: PositiveInt = Field(10, description="how many are to be remembered")
    delay: PositiveInt = Field(100, description="steps from the last of them to the first answer")

    def open(self) -> Source:
        """See DataSpec."""
        return _Copy(self)


@dataclass(frozen=True)
class _Copy(_Generated):
    spec: CopySpec

    @property
    def columns(self) -> Mapping[str, StoredColumn]:
        """See Source."""
        names = ("blank", "go", *map(str, range(self.spec.symbols)))
        size, length = len(names), self.spec.delay + 2 * self.spec.count
        return {
            "input": StoredColumn(column=Tokens(names=names, size=size, length=length), dtype="int32"),
            "target": StoredColumn(column=Labels(names=names, size=size, length=length), dtype="int32"),
        }

    def load(self, part: Part) -> Mapping[str, Layout]:
        """See Source."""
        count, delay = self.spec.count, self.spec.delay
        generator = np.random.default_rng([self.spec.seed, part.what[0]])
        symbols = generator.integers(GO + 1, GO + 1 + self.spec.symbols, (part.rows, count))
        said, wanted = (np.full((part.rows, delay + 2 * count), BLANK, np.int32) for _ in range(2))
        said[:, :count] = wanted[:, -count:] = symbols
        said[:, count + delay - 1] = GO
        return {"input": Dense(said), "target": Dense(wanted)}
