"""Precision: numbers that mean nothing any more in float32 are refused by name, before a row is converted."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.data.tabular import open_parquet, read_parquet
from nn_models.errors import UserError

LEAST_STEPS = 1024  # that float32 must leave between the least and the largest number of a column
STEP = 2.0**-24  # of float32, relative to a number
EXACT = 1 << 24  # whole numbers up to here stay what they are
WIDE = ("INT32", "INT64", "DOUBLE")  # stored as these; what is stored in float32 is as good as it was


def check_precision(files: Mapping[str, Iterable[int]], columns: Iterable[str]) -> None:
    """Look at each column's range in the row groups of the files, as their statistics have it where there are some.

    Raises UserError for numbers that differ by less than float32 tells apart at their size, such as times of one hour
    in seconds since 1970, and for those past its range.
    """
    ranges: dict[str, list[tuple[float, float]]] = {name: [] for name in columns}
    for file, groups in files.items():
        metadata = open_parquet(file).metadata
        for group in groups:
            for name, found in ranges.items():
                span = _span(metadata.row_group(group), name, partial(read_parquet, file, [name], group))
                found += [span] if span is not None else []
    for name, found in ranges.items():
        if found:
            low, high = min(low for low, _ in found), max(high for _, high in found)
            check_range(f"{next(iter(files))}, column {name}", low, high)


def _span(group: pq.RowGroupMetaData, name: str, read: Callable[[], pa.Table]) -> tuple[float, float] | None:
    """The least and the largest number of a column in a row group; None for what is not stored in more than float32."""
    leaves = [group.column(place) for place in range(group.num_columns)]
    leaf = next((leaf for leaf in leaves if leaf.path_in_schema in (name, *_inside(name, leaf))), None)
    if leaf is None or leaf.physical_type not in WIDE:
        return None
    if leaf.is_stats_set and leaf.statistics.has_min_max:
        low, high = leaf.statistics.min, leaf.statistics.max
    else:
        values = read()[name]
        while pa.types.is_nested(values.type):
            values = pc.list_flatten(values)
        low, high = pc.min_max(values).as_py().values()
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    return (low, high) if numbers and np.isfinite([float(low), float(high)]).all() else None


def _inside(name: str, leaf: pq.ColumnChunkMetaData) -> tuple[str, ...]:
    """The leaf's path where it belongs to lists in the column."""
    return (leaf.path_in_schema,) if leaf.path_in_schema.startswith(f"{name}.list.") else ()


def check_range(where: str, low: float, high: float) -> None:
    """Raise UserError where float32 hardly tells numbers between these apart, or does not reach them."""
    largest = max(abs(low), abs(high))
    if isinstance(low, int) and isinstance(high, int) and largest <= EXACT:
        return
    if largest > float(np.finfo(np.float32).max):
        raise UserError(where, f"numbers up to {largest:g} are past float32's range", "divide them in the file")
    if 0 < largest < float(np.finfo(np.float32).tiny):
        raise UserError(where, f"numbers up to {largest:g} are below float32's range", "multiply them in the file")
    if 0 < high - low < LEAST_STEPS * STEP * largest:
        raise UserError(
            where,
            f"numbers from {low!r} to {high!r} are hardly told apart in float32, which rounds them to multiples of "
            f"{np.spacing(np.float32(largest)):g}",
            f"subtract {low!r} from them in the file",
        )
