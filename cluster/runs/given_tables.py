"""Given tables: rows of a user's table as the stored columns that a model reads, with their labels if it has some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.data.layouts import Array, Dense, Layout, Ragged
from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import FileColumns
from cluster.data.sources.columns import ArrayColumns, is_encoded, label_texts
from cluster.runs.given import laid
from cluster.runs.given_trees import read_sentence
from nn_models.columns import Label, Tokens
from nn_models.errors import UserError

INPUT = "input"
TARGET = "target"


@dataclass(frozen=True)
class Piece:
    """Some rows, as many as a source gives at once: their columns as stored, `labels` (rows,) their names.

    `ids` are the rows' numbers in their split, in the source, or in the file; `split` is None where there is only one,
    and `files` has the name of each row's file where a row is a whole file.
    """

    ids: NDArray[np.int64]
    columns: Mapping[str, Layout]
    labels: NDArray[np.object_] | None = None
    split: str | None = None
    files: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def input(self) -> Array:
        """(rows, *shape): what a model reads, where its rows are of one shape."""
        layout = self.columns[INPUT]
        assert isinstance(layout, Dense)  # no model makes codes of rows that differ in length
        return layout.values

    def at(self, where: NDArray[np.int64]) -> "Piece":
        """The rows at these places."""
        columns = {name: layout.take(where) for name, layout in self.columns.items()}
        labels = None if self.labels is None else self.labels[where]
        files = None if self.files is None else [self.files[place] for place in where.tolist()]
        return replace(self, ids=self.ids[where], columns=columns, labels=labels, files=files)

    def between(self, first: int, end: int) -> "Piece":
        """The rows from one place to before another."""
        return self if first == 0 and end >= len(self) else self.at(np.arange(first, min(end, len(self))))


@dataclass(frozen=True)
class Some:
    """Rows of a table; in `where`, as errors call it, their numbers count from `row` on, or each is a file."""

    table: pa.Table
    where: str
    row: int = 0
    files: Sequence[str] | None = None

    def column(self, name: str) -> str:
        """As errors call a column."""
        return f"{self.where}, column {name}"

    def named(self, column: str, place: int) -> str:
        """As errors call a value."""
        return self.files[place] if self.files else f"{self.column(column)}, row {self.row + place}"


@dataclass(frozen=True)
class TableReader:
    """How tables of a user's rows are read: `columns` are those that the model stores, `wanted` where a table has them.

    Columns beside the input are read from those of a table that have their names. `label` is the table's column with
    the labels, or with what else is to be predicted; None where there is none. `sentences`: texts have no trees yet.
    """

    columns: Mapping[str, StoredColumn]
    wanted: FileColumns
    label: str | None = None
    sentences: bool = False

    @property
    def names(self) -> list[str]:
        """The table's columns that are read."""
        beside = [name for name in self.columns if name not in (INPUT, TARGET)]
        return [*self.wanted.input, *beside, *([self.label] if self.label else [])]

    @property
    def texts(self) -> list[str]:
        """Those whose values are texts even where they look like something else."""
        column = self.columns[INPUT].column
        label = [self.label] if self.label and self._names_classes else []
        return [*(self.wanted.input if column.vocabulary or isinstance(column, Tokens) else ()), *label]

    def piece(self, some: Some, first: int) -> Piece:
        """These rows, whose ids count from `first` on. Raises UserError naming those that cannot be used."""
        for name in self.names:
            if count := some.table[name].null_count:
                raise UserError(some.where, f"column {name} has {count} empty values", "fill or drop them")
        found: dict[str, Layout] = {}
        for name in self.columns:
            if name != TARGET:
                found[name] = self._column(name, some, self.wanted.input if name == INPUT else (name,))
        labels = None
        if self.label and self._names_classes:
            texts = label_texts(some.table[self.label], some.column(self.label), or_numbers=False)
            labels = np.array(texts.to_pylist(), np.object_)
        elif self.label:
            found[TARGET] = self._target(some, self.label)
            _check_lengths(found, some)
        return Piece(np.arange(first, first + some.table.num_rows), found, labels, files=some.files)

    @property
    def _names_classes(self) -> bool:
        """Whether a label is the name of a row's class."""
        return isinstance(self.columns[TARGET].column, Label) if TARGET in self.columns else True

    def _target(self, some: Some, name: str) -> Layout:
        stored = self.columns[TARGET]
        if stored.column.labels_of is None:
            return self._column(TARGET, some, (name,))
        rows = [_between_spaces(row) if isinstance(row, str) else row for row in some.table[name].to_pylist()]
        return self._cut(laid(some.column(name), stored, [[*map(str, row)] for row in rows]))

    def _column(self, name: str, some: Some, names: tuple[str, ...]) -> Layout:
        stored, first = self.columns[name], names[0]
        if not stored.column.scaled or stored.column.layout != "dense":
            return self._elements(name, some, first)
        shape, encoded = stored.column.row_shape, is_encoded(some.table[first].type)
        reader = ArrayColumns(
            names, shape, stored.dtype, self.wanted.resize, whose="the model was trained on", resized_by="--resize"
        )
        if encoded and len(shape) != 3:
            what = f"{stored.column.describe()}, and column {first} has bytes"
            raise UserError(some.where, f"the model reads {what}", "name another column, or give other data")
        named = [some.named(first, place) for place in range(some.table.num_rows)] if encoded else None
        return Dense(reader.read(some.table, some.where, named=named))

    def _elements(self, name: str, some: Some, source: str) -> Layout:
        """Rows that are not made of numbers of one shape: texts, trees, lists."""
        stored, where, rows = self.columns[name], some.column(source), some.table[source].to_pylist()
        column = stored.column
        if isinstance(column, Tokens):
            if not column.unit and any(isinstance(row, str) for row in rows):
                raise UserError(where, "texts, where the model reads numbers", "give lists of them")
            if self.wanted.spaced and column.unit == "words":
                rows = [_between_spaces(row) if isinstance(row, str) else row for row in rows]
            # a text may be of any length, whatever the windows are that the model has learned from
            stored = stored.model_copy(update={"column": column.model_copy(update={"length": None})})
        if self.sentences:
            rows = [
                read_sentence(row, path=some.named(source, place)) if isinstance(row, str) else row
                for place, row in enumerate(rows)
            ]
        if stored.column.layout == "dense":
            raise UserError(where, f"the model reads {column.describe()}, which no file is read as")
        found = self._cut(laid(where, stored, rows))
        if len(empty := np.flatnonzero(found.lengths == 0)):
            raise UserError(some.named(source, int(empty[0])), "nothing in it that the model reads", "drop such rows")
        return found

    def _cut(self, rows: Ragged) -> Ragged:
        """The first elements of each row, as many as are read."""
        longest, lengths = self.wanted.longest, rows.lengths
        if longest is None or not len(lengths) or lengths.max() <= longest:
            return rows
        inside = np.arange(rows.offsets[-1]) - np.repeat(rows.offsets[:-1], lengths)
        kept = {name: values[inside < longest] for name, values in rows.fields.items()}
        return Ragged.of(kept, np.minimum(lengths, longest))


def _between_spaces(text: str) -> list[str]:
    return [token for token in text.split(" ") if token]


def _check_lengths(found: Mapping[str, Layout], some: Some) -> None:
    """Raise UserError where what labels the elements of a row are not as many."""
    inputs, labels = found[INPUT].lengths, found[TARGET].lengths
    if inputs is None or labels is None:
        return
    if len(uneven := np.flatnonzero(inputs != labels)):
        row = int(uneven[0])
        where = f"{some.where}, row {some.row + row}"
        raise UserError(where, f"{labels[row]} labels for {inputs[row]} tokens", "drop the row, or mend it")


def numbered(labels: NDArray[np.object_], stored: StoredColumn, where: str) -> Dense:
    """Names of classes as the model's numbers of them. Raises UserError for one that it does not know."""
    names = cast(Label, stored.column).names
    places = {name: number for number, name in enumerate(names)}
    if unknown := sorted({str(label) for label in labels if label not in places}):
        few = ", ".join(names[:5]) + ", …" * (len(names) > 5)
        more = f" and {len(unknown) - 1:,} others" * (len(unknown) > 1)
        raise UserError(
            where,
            f"labels that the model does not know: {unknown[0]!r}{more} (it knows {few})",
            "rename them, or predict without labels: --unlabelled",
        )
    return Dense(np.array([places[label] for label in labels], np.int64))
