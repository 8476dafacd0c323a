"""Texts: the tokens of rows as people read them, by the names that their column has."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from cluster.data.vocabulary import Vocabulary
from jobs.report.files import Tensors, mapping
from nn_models.columns import TextUnit

Array = NDArray[Any]

MARKS = {"\n": "\u23ce", " ": "\u2423", "\t": "\u21e5"}  # of tokens that would not be seen


@dataclass(frozen=True)
class Words:
    """The tokens of a column. Without names they are told by their numbers, without a unit with spaces between."""

    names: Sequence[str]
    unit: TextUnit | None

    @classmethod
    def of(cls, tensors: Tensors, column: str = "input") -> "Words":
        """Those of a column of the rows that were tested."""
        signature = mapping(json.loads(tensors.metadata.get("signature", "{}")))
        described = mapping(mapping(signature.get("columns")).get(column))
        unit = described.get("unit")
        names = described.get("names")
        told = [str(name) for name in names] if isinstance(names, list) else []
        return cls(told, unit if unit in get_args(TextUnit) and told else None)

    @property
    def tokens(self) -> str:
        """What one of them is called."""
        return self.unit.removesuffix("s") if self.unit else "token"

    def name(self, number: int) -> str:
        """Of one token."""
        return str(self.names[number]) if 0 <= number < len(self.names) else str(number)

    def cell(self, number: int) -> str:
        """A token as it stands alone: of one that is white the mark."""
        return MARKS.get(self.name(number), self.name(number))

    def pieces(self, numbers: Sequence[int]) -> list[str]:
        """What each token adds to a text."""
        if self.unit is None or not all(0 <= number < len(self.names) for number in numbers):
            return [" " * bool(place) + self.name(number) for place, number in enumerate(numbers)]
        return list(Vocabulary(tuple(self.names), self.unit).spelled(numbers))

    def text(self, numbers: Sequence[int]) -> str:
        """All of them."""
        return "".join(self.pieces(numbers))


def example_rows(tensors: Tensors, name: str) -> list[list[int]]:
    """A column of whole numbers of the examples, row by row: of texts, of trees over words; none of anything else."""
    key = f"example_{name}"
    if (shape := tensors.shapes.get(key)) is not None:
        whole = "I" in tensors.header[key]["dtype"]
        return [list(row) for row in tensors[key].tolist()] if whole and len(shape) == 2 else []
    field = next((f"{key}.{f}" for f in ("values", "words") if len(tensors.shapes.get(f"{key}.{f}", ())) == 1), None)
    if field is None or "I" not in tensors.header[field]["dtype"]:
        return []
    ends = np.cumsum(tensors[f"{key}.lengths"])
    return [part.tolist() for part in np.split(tensors[field], ends[:-1])] if len(ends) else []
