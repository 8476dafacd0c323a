"""Rows: some rows of a data set: their ids, and a layout for each column."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa

from cluster.data.keys import RowIds
from cluster.data.layouts import Dense, Layout, Ragged, Where
from cluster.data.manifest import Manifest, StoredColumn

ROW = "row"  # the column of row ids in a shard


@dataclass(frozen=True)
class Rows:
    """`ids` is (rows,) int64, in the order of the columns' rows."""

    ids: RowIds
    columns: Mapping[str, Layout]

    def at(self, where: Where) -> Self:
        """The rows at these places, or where a mask holds."""
        return type(self)(self.ids[where], {name: layout.take(where) for name, layout in self.columns.items()})

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, of which there is at least one, one after the other."""
        first, *others = parts
        if not others:
            return first
        columns = {
            name: layout.joined([other.columns[name] for other in others]) for name, layout in first.columns.items()
        }
        return cls(np.concatenate([part.ids for part in parts]), columns)

    def to_arrow(self) -> pa.Table:
        """The rows as a table."""
        columns: dict[str, pa.Array] = {}
        for name, layout in self.columns.items():
            columns |= layout.to_arrow(name)
        return pa.table({ROW: self.ids, **columns})


def table_rows(table: pa.Table, manifest: Manifest, names: Collection[str] | None = None) -> Rows:
    """The table's columns as layouts, all or those of these names, without a copy where a column is one chunk."""
    ids = table[ROW].to_numpy().astype(np.int64, copy=False)
    wanted = {name: stored for name, stored in manifest.columns.items() if names is None or name in names}
    return Rows(ids, {name: _layout(table, name, stored) for name, stored in wanted.items()})


def no_rows(manifest: Manifest) -> Rows:
    """None of a data set's rows."""
    columns: dict[str, Layout] = {}
    for name, stored in manifest.columns.items():
        if stored.column.layout == "dense":
            columns[name] = Dense(np.empty((0, *stored.column.row_shape), stored.dtype))
        else:
            fields = stored.column.ragged_fields().items()
            columns[name] = Ragged.of({key: np.empty((0, *field.shape), field.dtype) for key, field in fields}, [])
    return Rows(np.empty(0, np.int64), columns)


def _layout(table: pa.Table, name: str, stored: StoredColumn) -> Layout:
    if stored.column.layout == "dense":
        return Dense.from_arrow(table[name], stored.dtype, stored.column.row_shape)
    return Ragged.from_arrow(table, name, stored.column.ragged_fields())
