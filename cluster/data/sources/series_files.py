"""Series from files: the user's columns of numbers, of times and of groups, checked row by row."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.data.series import Series
from cluster.data.sources.parquet import group_names
from cluster.data.sources.precision import check_range
from cluster.data.tabular import TabularFile, found_files
from cluster.data.times import Times, read_times, told
from nn_models.errors import UserError


def read_series(
    path: str, columns: Sequence[str], *, time: str | None = None, group: str | None = None, field: str = "data.path"
) -> Series:
    """The series of a file, or of all files of a folder one after the other; rows of a group in the files' order.

    `path` is a path or a URI, `field` where errors have it. Raises UserError, naming row and column, for what is
    missing or no finite number, and where times do not increase.
    """
    wanted = [*columns, *([time] if time else []), *([group] if group else [])]
    tables = {}
    for name, _ in found_files(path, field=field):
        file = TabularFile(name)
        for column in wanted:
            file.check(column)
        tables[name] = file.read(wanted, texts=[group] if group else [])
    rows = _Rows(tables)
    if not rows.table.num_rows:
        raise UserError(field, f"{path}: no rows", "give a file that has some")
    values = np.stack([_numbers(rows, name) for name in columns], axis=1)
    order, offsets = np.arange(len(values)), np.array([0, len(values)])
    names: tuple[str | None, ...] = (None,)
    if group is not None:
        order, offsets, names = _grouped(rows, group)
    times = None
    if time is not None:
        times = read_times(rows.table[time], where=partial(rows.where, time))[order]
        _check_times(times, order, offsets, names, where=partial(rows.where, time))
    return Series(values[order], offsets, names, times)


class _Rows:
    """The rows of several files, one after the other, and where each of them stands."""

    def __init__(self, tables: Mapping[str, pa.Table]) -> None:
        self._names = list(tables)
        self._ends = np.cumsum([table.num_rows for table in tables.values()])
        try:
            self.table: pa.Table = pa.concat_tables(tables.values(), promote_options="permissive")
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise UserError(self._names[0], f"its columns are not those of the other files ({reason})") from None

    def where(self, column: str, row: int | None = None) -> str:
        """As errors call a value, or a column."""
        if row is None:
            return f"{self._names[0]}, column {column}"
        file = int(np.searchsorted(self._ends, row, side="right"))
        before = int(self._ends[file - 1]) if file else 0
        return f"{self._names[file]}, row {row - before}, column {column}"


def _numbers(rows: _Rows, name: str) -> NDArray[np.float32]:
    """(rows,), all finite, and worth their digits in float32."""
    column = rows.table[name]
    kind = column.type
    exact = pa.types.is_integer(kind)
    if not (exact or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)):
        raise _no_numbers(rows, name)
    values = column.cast(pa.float64(), safe=False).to_numpy()  # what is missing becomes NaN
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        row = int(bad[0])
        what = "no value" if column[row].as_py() is None else str(values[row])
        more = f" ({len(bad):,} rows have none)" if len(bad) > 1 else ""
        raise UserError(rows.where(name, row), f"{what}{more}", "fill or drop such rows")
    low, high = float(values.min()), float(values.max())
    check_range(rows.where(name), int(low) if exact else low, int(high) if exact else high)
    return values.astype(np.float32)


def _no_numbers(rows: _Rows, name: str) -> UserError:
    """What to raise for a column that holds something else: of text the first that is no number."""
    column, fix = rows.table[name], "choose a column of numbers, or mend the row"
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        for row, text in enumerate(column.to_pylist()):
            try:
                float(text or "nan")
            except ValueError:
                return UserError(rows.where(name, row), f"{text!r} is no number", fix)
    return UserError(rows.where(name), f"values of type {column.type} are no numbers", "choose a column of numbers")


def _grouped(rows: _Rows, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[str | None, ...]]:
    """Rows group after group, where each group begins and ends, and the groups' names in the order of the files."""
    found = group_names(rows.table[name], rows.where(name))
    if len(empty := np.flatnonzero(found == "")):
        raise UserError(rows.where(name, int(empty[0])), "no name of a group", "fill or drop such rows")
    encoded = pa.array(found, pa.string()).dictionary_encode()
    codes = encoded.indices.to_numpy()
    counts = np.bincount(codes, minlength=len(encoded.dictionary))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return np.argsort(codes, kind="stable"), offsets, tuple(encoded.dictionary.to_pylist())


def _check_times(
    times: Times,
    rows: NDArray[np.int64],
    offsets: NDArray[np.int64],
    names: Sequence[str | None],
    *,
    where: Callable[[int], str],
) -> None:
    later = times[1:] > times[:-1]
    later[offsets[1:-1] - 1] = True  # a group may begin before another ends
    if later.all():
        return
    place = 1 + int(np.flatnonzero(~later)[0])
    name = names[int(np.searchsorted(offsets, place, side="right")) - 1]
    of = "" if name is None else f" in {name!r}"
    several = ", or name the column that tells several series apart in data.group" if name is None else ""
    raise UserError(
        where(int(rows[place])),
        f"{told(times[place])} does not come after {told(times[place - 1])}, the time of the row before it{of}",
        f"sort the rows by time, with one row a time{several}",
    )
