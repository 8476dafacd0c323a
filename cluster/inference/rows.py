"""Rows that a trained model is used on: of its own data, of another data set, or of a user's file; piece by piece."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.data.layouts import Array, Dense, Layout
from cluster.data.manifest import StoredColumn
from cluster.data.prepare import prepared
from cluster.data.shards import DataSet
from cluster.data.sources.base import DataSpec
from cluster.data.sources.columns import ArrayColumns, label_texts
from cluster.data.tabular import TabularFile
from cluster.runs.predictor import OpenedModel
from nn_models.columns import Label
from nn_models.errors import UserError, did_you_mean

WHERE = "DATA"  # as the command line calls it


@dataclass(frozen=True)
class Piece:
    """Some rows, as many as a source gives at once: `input` (rows, *shape) as stored, `labels` (rows,) their names.

    `ids` are the rows' numbers in their split, in the source, or in the file; `split` is None where there is only one.
    """

    ids: NDArray[np.int64]
    input: Array
    labels: NDArray[np.object_] | None = None
    split: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, where: NDArray[np.int64]) -> "Piece":
        """The rows at these places."""
        labels = None if self.labels is None else self.labels[where]
        return replace(self, ids=self.ids[where], input=self.input[where], labels=labels)


@dataclass(frozen=True)
class RowsUsed:
    """`pieces` of the rows, and the `classes` that a row may be of, () where nothing is known of any."""

    pieces: Iterator[Piece]
    classes: tuple[str, ...] = ()
    labelled: bool = field(default=False)


def rows_of(
    model: OpenedModel, data: DataSpec | str | None, *, splits: Sequence[str] = (), label: str | None = None
) -> RowsUsed:
    """The rows to use a model on, never more than a piece of them in memory.

    `data` is None for the data of the run, a data section, or the name of a file of rows: with the columns of the
    run's own data, and the labels in its column, or in that called `label`. Of data that is prepared with its splits
    these `splits` are taken, or all; of a source all rows, in its order. Raises UserError for rows that do not fit.
    """
    if isinstance(data, str):
        return _of_file(model, data, label)
    if label is not None:
        raise UserError("--label", "only a file of rows has columns to choose from", "leave it out")
    source = model.recipe.data if data is None else data.fitted_to(model.manifest)
    if data is None or source.prepared_at:
        return _of_splits(model, prepared(source), source.kind, splits)
    if splits:
        raise UserError("--split", f"{source.kind} is taken as a whole", "leave it out, or prepare the data first")
    opened = source.open()
    _check_fits(model, opened.columns["input"], source.kind)
    names = _names(opened.columns)

    def pieces() -> Iterator[Piece]:
        several = len(opened.pools) > 1
        for pool, parts in opened.pools.items():
            first = 0
            for part in parts:
                ids = np.arange(first, first + part.rows)
                yield _piece(ids, opened.load(part), names, pool if several else None)
                first += part.rows

    return RowsUsed(pieces(), names, bool(names))


def _of_splits(model: OpenedModel, data: DataSet, source: str, splits: Sequence[str]) -> RowsUsed:
    manifest = data.manifest
    _check_fits(model, manifest.columns["input"], source)
    for split in splits:
        if not manifest.rows(split):
            raise UserError("--split", f"{source} has no rows in {split}; it has {', '.join(manifest.splits)}")
    names = _names(manifest.columns)

    def pieces() -> Iterator[Piece]:
        for split in splits or manifest.splits:
            for location in data.row_group_locations(split):
                rows = data.read_row_groups([location])
                yield _piece(rows.ids, rows.columns, names, split)

    return RowsUsed(pieces(), names, bool(names))


def _of_file(model: OpenedModel, name: str, label: str | None) -> RowsUsed:
    wanted, stored = model.recipe.data.file_columns, model.manifest.columns["input"]
    if wanted is None:
        raise UserError(
            WHERE,
            f"{name} cannot be told to hold rows of {model.recipe.data.kind}",
            "give a data section, such as '{kind: parquet, path: …, input: …}'",
        )
    file = TabularFile(name)
    known = file.columns
    if label is not None and label not in known:
        raise UserError("--label", f"no column {label!r} in {name}", did_you_mean(label, known))
    # a column of numbers to predict has no classes
    target = wanted.target if isinstance(model.manifest.signature.columns.get("target"), Label) else None
    column = label or (target if target in known else None)
    for wanted_column in wanted.input:
        file.check(wanted_column)
    reader = ArrayColumns(
        wanted.input, stored.column.row_shape, stored.dtype, wanted.resize, whose="the model was trained on"
    )

    def pieces() -> Iterator[Piece]:
        first = 0
        for group, rows in enumerate(file.row_groups(wanted.input[0])):
            columns = [*wanted.input, *([column] if column else [])]
            table, where = file.read(columns, group, texts=[column] if column else []), file.where(group)
            _check_filled(table, where)
            texts = None
            if column:
                labels = label_texts(table[column], f"{where}, column {column}", or_numbers=False)
                texts = np.array(labels.to_pylist(), np.object_)
            yield Piece(np.arange(first, first + rows), reader.read(table, where), texts)
            first += rows

    return RowsUsed(pieces(), labelled=column is not None)


def _check_filled(table: pa.Table, where: str) -> None:
    for name in table.column_names:
        if count := table[name].null_count:
            raise UserError(where, f"column {name} has {count} empty values", "fill or drop them")


def _check_fits(model: OpenedModel, theirs: StoredColumn, source: str) -> None:
    ours = model.manifest.columns["input"]
    have, want = (f"{stored.column.describe()} {stored.dtype}" for stored in (theirs, ours))
    if have != want:
        raise UserError(WHERE, f"the rows of {source} are {have}, but the model was trained on {want}", "choose others")


def _names(columns: Mapping[str, StoredColumn]) -> tuple[str, ...]:
    names: tuple[str, ...] = getattr(columns["target"].column, "names", ()) if "target" in columns else ()
    return names


def _piece(ids: NDArray[np.int64], rows: Mapping[str, Layout], names: tuple[str, ...], split: str | None) -> Piece:
    inputs, targets = rows["input"], rows.get("target")
    assert isinstance(inputs, Dense)  # no model makes codes of rows that differ in length
    labels = None
    if names and isinstance(targets, Dense):
        labels = np.array(names, np.object_)[targets.values.astype(np.int64)]
    return Piece(ids, inputs.values, labels, split)


def told(model: OpenedModel, names: Sequence[str], piece: Piece) -> dict[str, Any]:
    """The columns of these names, which a net is told of beside the rows: their labels."""
    if not names:
        return {}
    if piece.labels is None:
        raise UserError(WHERE, f"rows without labels, which {model.recipe.model.kind} is told", "give labelled rows")
    return dict.fromkeys(names, piece.labels.astype(str))
