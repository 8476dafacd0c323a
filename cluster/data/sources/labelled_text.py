"""Labelled text: rows of texts with a label each, or with one for each token, as numbers of a vocabulary."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from cluster.data.layouts import Array, Dense, Layout, Ragged
from cluster.data.manifest import Manifest, StoredColumn
from cluster.data.sources.base import BadRows, DataSpec, DrawnTestSpec, FileColumns, FittedSpec, Part, Source, labels
from cluster.data.split import Traits
from cluster.data.vocabulary import Vocabulary
from nn_models.columns import UNKNOWN, Labels, TextUnit, Tokens
from nn_models.errors import Problem, UserError

NOTHING_YET = (UNKNOWN,)  # the vocabulary of a source that has learned none
WHOLE_NUMBER = re.compile("-?[0-9]+")
DROP = "drop the row, or mend it"


class Texts(Protocol):
    """Where the rows come from: texts and labels as they are written. It is pickled with the source."""

    @property
    def pools(self) -> Mapping[str, list[Part]]:
        """See Source."""

    @property
    def each_token(self) -> bool:
        """Whether each token has a label."""

    @property
    def names(self) -> tuple[str, str]:
        """As errors call a text, and what labels it."""

    def texts(self, part: Part) -> list[Any]:
        """Of each row its text, or the list of its tokens; None where there is none."""

    def labels(self, part: Part) -> list[Any]:
        """Of each row its label, or the list of those of its tokens; None where there is none."""

    def groups(self, part: Part) -> Array | None:
        """(rows,): whom the rows belong to; None where that is asked of none."""


class LabelledTextSpec(FittedSpec, DrawnTestSpec):
    """Base of the data sections of labelled texts."""

    unit: TextUnit = Field("words", description="what a token is; words are runs of letters and digits, and marks")
    max_words: Annotated[int, Field(ge=2)] = Field(
        30_000, description=f"tokens of the vocabulary, the most frequent ones; all others are {UNKNOWN}"
    )
    min_count: PositiveInt = Field(1, description="times that a token of the vocabulary comes in the training rows")
    max_length: PositiveInt | None = Field(None, description="tokens of a row, its first ones; all by default")

    def texts(self) -> Texts:
        """The rows. Raises UserError where there are none, or what is there does not fit."""
        raise NotImplementedError

    @property
    def file_columns(self) -> FileColumns:
        """See DataSpec."""
        return FileColumns(("text",), "label", longest=self.max_length)

    def fits(self, manifest: Manifest) -> bool:
        """See FittedSpec."""
        tokens = manifest.signature.columns.get("input")
        return isinstance(tokens, Tokens) and bool(tokens.names) and tokens.unit is not None

    def fitted_to(self, manifest: Manifest) -> DataSpec:
        """See DataSpec: in the model's tokens, too."""
        fitted = super().fitted_to(manifest)
        if fitted is self:
            return self
        return fitted.model_copy(update={"unit": cast(Tokens, manifest.signature["input"]).unit})

    def open(self) -> Source:
        """See DataSpec. Reads the labels for the names of the classes."""
        texts = self.texts()
        vocabulary = Vocabulary(NOTHING_YET, self.unit)
        if self._known is not None:
            vocabulary = Vocabulary.of_column(cast(Tokens, self._known.signature["input"]))
        classes = self.known("target") or all_classes(texts)
        if len(classes) < 2:
            where = next(iter(texts.pools["train"])).name
            raise UserError(where, f"{texts.names[1]} holds {len(classes)} class; at least two are needed")
        return LabelledTexts(texts, classes, vocabulary, self.max_length)

    def learned(self, source: Source, training: Sequence[tuple[Part, NDArray[np.bool_]]]) -> Source:
        """See DataSpec: the vocabulary."""
        rows = cast(LabelledTexts, source)
        if self._known is not None:
            return rows
        counts: Counter[str] = Counter()
        if self.unit != "bytes":
            for part, chosen in training:
                for text in rows.tokens(part, chosen):
                    counts.update(text)
        vocabulary = Vocabulary.of_counts(counts, self.unit, max_words=self.max_words, min_count=self.min_count)
        if len(vocabulary.names) < 2 and counts:
            raise UserError(
                "data.min_count", f"no token of the training rows comes {self.min_count} times", "set a lower one"
            )
        return replace(rows, vocabulary=vocabulary)


def all_classes(texts: Texts) -> tuple[str, ...]:
    """The labels of the rows to train on, whole numbers in their order, others in the alphabet's."""
    names: set[str] = set()
    for part in texts.pools["train"]:
        for row in texts.labels(part):
            names.update(filter(None, row if isinstance(row, list) else [row]))
    numeric = all(WHOLE_NUMBER.fullmatch(name) for name in names)
    return tuple(sorted(names, key=int if numeric else None))


@dataclass(frozen=True)
class LabelledTexts:
    """The rows as numbers of tokens and of classes."""

    rows: Texts
    classes: tuple[str, ...]
    vocabulary: Vocabulary
    max_length: int | None

    @property
    def pools(self) -> Mapping[str, list[Part]]:
        """See Source."""
        return self.rows.pools

    @cached_property
    def columns(self) -> Mapping[str, StoredColumn]:
        """See Source."""
        names, classes = self.vocabulary.names, self.classes
        tokens = Tokens(names=names, size=len(names), unit=self.vocabulary.unit)
        each = Labels(names=classes, size=len(classes))
        target = StoredColumn(column=each, dtype="int32") if self.rows.each_token else labels(classes)
        return {"input": StoredColumn(column=tokens, dtype="int32"), "target": target}

    def traits(self, part: Part) -> Traits:
        """See Source."""
        found = None
        if not self.rows.each_token:
            places = self._places
            # a row without a class is told once it is loaded
            found = np.array([places.get(name, 0) for name in self.rows.labels(part)], np.int64)
        return Traits(found, self.rows.groups(part))

    def tokens(self, part: Part, chosen: NDArray[np.bool_]) -> Iterator[Sequence[str]]:
        """The tokens of these rows, as they are written."""
        if chosen.any():
            for row, text in enumerate(self.rows.texts(part)):
                if chosen[row] and text and not (isinstance(text, list) and None in text):
                    yield self.vocabulary.split(text)[: self.max_length]

    def load(self, part: Part) -> Mapping[str, Layout]:
        """See Source. Raises BadRows for those without a text, or with no label that training rows have."""
        checked, (text_name, label_name) = _Checked(part.name), self.rows.names
        given, named = self.rows.texts(part), self.rows.labels(part)
        tokens = [checked.tokens(row, text, self.vocabulary, text_name) for row, text in enumerate(given)]
        each = named if self.rows.each_token else [None if name is None else [name] for name in named]
        found = [checked.places(row, names, self._places, label_name) for row, names in enumerate(each)]
        if self.rows.each_token:
            for row, (numbers, places) in enumerate(zip(tokens, found, strict=True)):
                if len(numbers) and len(places) and len(numbers) != len(places):
                    checked.bad(row, f"{len(places)} labels for {len(numbers)} tokens in {text_name}")
        checked.check()
        target = self._ragged(found) if self.rows.each_token else Dense(np.concatenate(found).astype(np.int64))
        return {"input": self._ragged(tokens), "target": target}

    @property
    def _places(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def _ragged(self, rows: Sequence[NDArray[np.int32]]) -> Ragged:
        cut = [row[: self.max_length] for row in rows]
        return Ragged.of({"values": np.concatenate([np.empty(0, np.int32), *cut])}, [len(row) for row in cut])


class _Checked:
    """Gathers what is wrong with rows of a part."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[Problem] = []

    def bad(self, row: int, message: str, fix: str = DROP) -> NDArray[np.int32]:
        """Note a problem; nothing in the place of the row."""
        self.problems.append(Problem(f"{self.where}, row {row}", message, fix))
        return np.empty(0, np.int32)

    def check(self) -> None:
        """Raise BadRows where there was a problem."""
        if self.problems:
            raise BadRows.of(self.problems)

    def tokens(self, row: int, text: Any, vocabulary: Vocabulary, name: str) -> NDArray[np.int32]:
        """The numbers of a text's tokens."""
        if not text:
            return self.bad(row, f"no text in {name}")
        if isinstance(text, list) and None in text:
            return self.bad(row, f"an empty value in {name}")
        numbers = vocabulary.numbers(text, path=f"{self.where}, row {row}")
        return numbers if len(numbers) else self.bad(row, f"no word in {name}: {text[:40]!r}")

    def places(
        self, row: int, names: list[str | None] | None, places: Mapping[str, int], name: str
    ) -> NDArray[np.int32]:
        """The numbers of labels."""
        if not names or not all(names):
            return self.bad(row, f"no label in {name}")
        for label in names:
            if label not in places:
                return self.bad(
                    row, f"no training row has the label {label!r}", "drop such rows, or add some to train on"
                )
        return np.array([places[cast(str, label)] for label in names], np.int32)
