"""text_classification, sequence_labelling: texts of the user's with a label each, or with one for each token."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal, Self, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, PrivateAttr, model_validator

from cluster.data.layouts import Dense, Layout, Ragged
from cluster.data.manifest import Manifest, StoredColumn
from cluster.data.sources.base import BadRows, DataSpec, DrawnTestSpec, Part, Source, absolute, labels
from cluster.data.sources.columns import is_any_list, is_text, label_texts
from cluster.data.sources.parquet import Group, group_names
from cluster.data.split import Traits
from cluster.data.tabular import TabularFile, found_files
from cluster.data.vocabulary import Vocabulary
from nn_models.columns import UNKNOWN, Label, Labels, TextUnit, Tokens
from nn_models.errors import Problem, UserError
from nn_models.spec import invalid

NOTHING_YET = (UNKNOWN,)  # the vocabulary of a source that has learned none
WHOLE_NUMBER = re.compile("-?[0-9]+")
DROP = "drop the row, or mend it"


class _TextRowsSpec(DrawnTestSpec):
    """Base of the data sections of texts in rows of the user's files."""

    path: str = Field(min_length=1, description="a Parquet, CSV, TSV or JSON-lines file, or a folder of such; or a URI")
    validation_path: str | None = Field(None, min_length=1, description="the validation split, where it stands apart")
    test_path: str | None = Field(None, min_length=1, description="the test split, where it stands apart")
    unit: TextUnit = Field("words", description="what a token is; words are runs of letters and digits, and marks")
    max_words: Annotated[int, Field(ge=2)] = Field(
        30_000, description=f"tokens of the vocabulary, the most frequent ones; all others are {UNKNOWN}"
    )
    min_count: PositiveInt = Field(1, description="times that a token of the vocabulary comes in the training rows")
    max_length: PositiveInt | None = Field(None, description="tokens of a row, its first ones; all by default")
    group: Group = None
    # what a model was trained on, where this is other data for it
    _known: Manifest | None = PrivateAttr(None)

    def _columns(self) -> tuple[str, str]:
        """The names in the files: of the text, and of what labels it."""
        raise NotImplementedError

    @property
    def _each_token(self) -> bool:
        """Whether each token has a label."""
        return False

    @model_validator(mode="after")
    def _two_columns(self) -> Self:
        text, label = self._columns()
        if text == label:
            raise invalid(f"{label} is the text too, so there would be nothing to predict", "name another column")
        return self

    @property
    def _paths(self) -> dict[str, tuple[str, str]]:
        """Split -> the field, and the path in it."""
        fields = {"train": "path", "validation": "validation_path", "test": "test_path"}
        return {pool: (name, path) for pool, name in fields.items() if (path := getattr(self, name))}

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        return self.model_copy(update={field: absolute(path, base) for field, path in self._paths.values()})

    def fingerprint(self) -> str:
        """See DataSpec."""
        files = [(name, info.size, info.mtime_ns) for found in self._found().values() for name, info in found]
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """See DataSpec."""
        known = {} if self._known is None else {"known": [self._known.signature[name].names for name in _ROW]}  # type: ignore[attr-defined]  # tokens and labels have names
        return {**super().identity(), **known}

    def fitted_to(self, manifest: Manifest) -> DataSpec:
        """See DataSpec: with the vocabulary and the classes of the model."""
        theirs = [manifest.columns.get(name) for name in _ROW]
        if not all(stored and getattr(stored.column, "names", ()) for stored in theirs):
            return self  # a model of other rows: it refuses these
        fitted = self.model_copy()
        fitted._known = manifest
        return fitted

    def _found(self) -> dict[str, list[tuple[str, Any]]]:
        return {pool: found_files(path, field=f"data.{field}") for pool, (field, path) in self._paths.items()}

    def open(self) -> Source:
        """See DataSpec. Reads the column of the labels for the names of the classes."""
        text, label = self._columns()
        pools: dict[str, list[Part]] = {}
        for pool, found in self._found().items():
            pools[pool] = []
            for file in [TabularFile(name) for name, _ in found]:
                for column in (text, label, *([self.group] if self.group else [])):
                    file.check(column)
                groups = enumerate(file.row_groups(label))
                pools[pool] += [Part(rows, (file.name, group), file.where(group)) for group, rows in groups if rows]
            if not pools[pool]:
                raise UserError(self._paths[pool][1], "no rows in there", "give files with some")
        rows = TextRows(
            text, label, self._each_token, pools, (), Vocabulary(NOTHING_YET, self.unit), self.max_length, self.group
        )
        if self._known is not None:
            tokens, target = (self._known.signature[name] for name in _ROW)
            names = cast(Labels | Label, target).names
            return replace(rows, classes=names, vocabulary=Vocabulary.of_column(cast(Tokens, tokens)))
        classes = rows.all_classes()
        if len(classes) < 2:
            raise UserError(self.path, f"column {label} holds {len(classes)} class; at least two are needed")
        return replace(rows, classes=classes)

    def learned(self, source: Source, training: Sequence[tuple[Part, NDArray[np.bool_]]]) -> Source:
        """See DataSpec: the vocabulary."""
        rows = cast(TextRows, source)
        if self._known is not None:
            return rows
        counts: Counter[str] = Counter()
        if self.unit != "bytes":
            for part, chosen in training:
                for text in rows.texts(part, chosen):
                    counts.update(text)
        vocabulary = Vocabulary.of_counts(counts, self.unit, max_words=self.max_words, min_count=self.min_count)
        if len(vocabulary.names) < 2 and counts:
            raise UserError(
                "data.min_count", f"no token of the training rows comes {self.min_count} times", "set a lower one"
            )
        return replace(rows, vocabulary=vocabulary)


class TextClassificationSpec(_TextRowsSpec):
    """Your own texts with a class each, in columns of a Parquet, CSV, TSV or JSON-lines file."""

    kind: Literal["text_classification"] = "text_classification"
    text: str = Field("text", min_length=1, description="the column with the text, or with lists of its words")
    label: str = Field("label", min_length=1, description="the column with the class")

    def _columns(self) -> tuple[str, str]:
        return self.text, self.label


class SequenceLabellingSpec(_TextRowsSpec):
    """Your own texts with a label for each token, in columns of a Parquet, CSV, TSV or JSON-lines file.

    Tokens and labels are lists, or texts with spaces between them; of characters and bytes the tokens are a text.
    """

    kind: Literal["sequence_labelling"] = "sequence_labelling"
    tokens: str = Field("tokens", min_length=1, description="the column with the tokens")
    labels: str = Field("labels", min_length=1, description="the column with a label for each of them")

    def _columns(self) -> tuple[str, str]:
        return self.tokens, self.labels

    @property
    def _each_token(self) -> bool:
        return True


_ROW = ("input", "target")


@dataclass(frozen=True)
class TextRows:
    """Rows of texts; parts are (file, row group)."""

    text: str  # the columns of the files
    label: str
    each_token: bool
    pools: dict[str, list[Part]]
    classes: tuple[str, ...]
    vocabulary: Vocabulary
    max_length: int | None
    group: str | None

    @cached_property
    def columns(self) -> Mapping[str, StoredColumn]:
        """See Source."""
        names, classes = self.vocabulary.names, self.classes
        tokens = Tokens(names=names, size=len(names), unit=self.vocabulary.unit)
        if not self.each_token:
            return {"input": StoredColumn(column=tokens, dtype="int32"), "target": labels(classes)}
        target = StoredColumn(column=Labels(names=classes, size=len(classes)), dtype="int32")
        return {"input": StoredColumn(column=tokens, dtype="int32"), "target": target}

    def traits(self, part: Part) -> Traits:
        """See Source."""
        groups = found = None
        if self.group is not None:
            groups = group_names(self._read(part, self.group), f"{part.name}, column {self.group}")
        if not self.each_token:
            places = {name: number for number, name in enumerate(self.classes)}
            # a row without a class is told once it is loaded
            found = np.array([places.get(name, 0) for name in self._labels(part)], np.int64)
        return Traits(found, groups)

    def all_classes(self) -> tuple[str, ...]:
        """The labels of the rows to train on, whole numbers in their order, others in the alphabet's."""
        names: set[str] = set()
        for part in self.pools["train"]:
            for row in self._labels(part):
                names.update(filter(None, row if isinstance(row, list) else [row]))
        numeric = all(WHOLE_NUMBER.fullmatch(name) for name in names)
        return tuple(sorted(names, key=int if numeric else None))

    def texts(self, part: Part, chosen: NDArray[np.bool_]) -> Iterator[Sequence[str]]:
        """The tokens of these rows, as they are written."""
        if chosen.any():
            for row, text in enumerate(self._texts(part)):
                if chosen[row] and text and None not in [*text]:
                    yield self.vocabulary.split(text)[: self.max_length]

    def load(self, part: Part) -> Mapping[str, Layout]:
        """See Source. Raises BadRows for those without a text, or with no label that training rows have."""
        rows = _Checked(part.name)
        places = {name: number for number, name in enumerate(self.classes)}
        tokens = [rows.tokens(row, text, self.vocabulary, self.text) for row, text in enumerate(self._texts(part))]
        if self.each_token:
            found = [rows.places(row, names, places, self.label) for row, names in enumerate(self._labels(part))]
            for row, (numbers, named) in enumerate(zip(tokens, found, strict=True)):
                if len(numbers) and len(named) and len(numbers) != len(named):
                    rows.bad(row, f"{len(named)} labels in {self.label} for {len(numbers)} tokens in {self.text}")
            target: Layout = _ragged([named[: self.max_length] for named in found])
        else:
            singles = [[name] if name is not None else None for name in self._labels(part)]
            found = [rows.places(row, names, places, self.label) for row, names in enumerate(singles)]
            target = Dense(np.array([named[0] if len(named) else 0 for named in found], np.int64))
        rows.check()
        return {"input": _ragged([numbers[: self.max_length] for numbers in tokens]), "target": target}

    def _read(self, part: Part, column: str) -> pa.ChunkedArray:
        file, group = part.what
        found = TabularFile(file).read([column], group, texts=[column])[column]
        plain = found.type.value_type if pa.types.is_dictionary(found.type) else found.type
        return found.cast(plain)

    def _texts(self, part: Part) -> list[Any]:
        """Of each row its text, or the list of its tokens; None where there is none."""
        column = self._read(part, self.text)
        kind, unit = column.type, self.vocabulary.unit
        where = f"{part.name}, column {self.text}"
        if is_any_list(kind) and (pa.types.is_null(kind.value_type) or is_text(kind.value_type)):
            if unit != "words":
                raise UserError(where, f"lists, which are no {unit}", "make them texts, or set data.unit to words")
            return cast(list[Any], column.to_pylist())
        if not is_text(kind) and not pa.types.is_null(kind):
            wanted = "texts, or lists of words" if unit == "words" else "texts"
            raise UserError(where, f"values of type {kind} are no text", f"name a column of {wanted}")
        rows = column.to_pylist()
        apart = self.each_token and unit == "words"  # each space is between two tokens
        return [_between_spaces(text) if apart and text is not None else text for text in rows]

    def _labels(self, part: Part) -> list[Any]:
        """Of each row its label, or the list of those of its tokens; None where there is none."""
        column, where = self._read(part, self.label), f"{part.name}, column {self.label}"
        if not self.each_token:
            return cast(list[Any], label_texts(column, where, or_numbers=False).to_pylist())
        if is_text(column.type):
            return [text if text is None else _between_spaces(text) for text in column.to_pylist()]
        if not is_any_list(column.type):
            raise UserError(where, f"values of type {column.type} are no labels of tokens", "make them lists, or texts")
        names = iter(label_texts(_flat(column), where, or_numbers=False).to_pylist())
        return [row if row is None else [next(names) for _ in row] for row in column.to_pylist()]


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

    def tokens(self, row: int, text: Any, vocabulary: Vocabulary, column: str) -> NDArray[np.int32]:
        """The numbers of a text's tokens."""
        if not text:
            return self.bad(row, f"no text in column {column}")
        if isinstance(text, list) and None in text:
            return self.bad(row, f"an empty value among its {column}")
        numbers = vocabulary.numbers(text, path=f"{self.where}, row {row}")
        return numbers if len(numbers) else self.bad(row, f"no word in column {column}: {text[:40]!r}")

    def places(
        self, row: int, names: list[str | None] | None, places: Mapping[str, int], column: str
    ) -> NDArray[np.int32]:
        """The numbers of labels."""
        if not names or not all(names):
            return self.bad(row, f"no label in column {column}")
        for name in names:
            if name not in places:
                return self.bad(
                    row, f"no training row has the label {name!r}", "drop such rows, or add some to train on"
                )
        return np.array([places[cast(str, name)] for name in names], np.int32)


def _between_spaces(text: str) -> list[str]:
    """What stands between spaces, of which other kinds, such as U+00A0, belong to a token."""
    return [token for token in text.split(" ") if token]


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)


def _ragged(rows: Sequence[NDArray[np.int32]]) -> Ragged:
    return Ragged.of({"values": np.concatenate([np.empty(0, np.int32), *rows])}, [len(row) for row in rows])
