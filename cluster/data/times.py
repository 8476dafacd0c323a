"""Times: a column of dates or numbers that says when the steps of a series were, and how they go on."""

import warnings
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nn_models.errors import UserError

Times = NDArray[Any]  # int64, float64, or datetime64[us]
DATE, MONTH, DAY, SECOND = "datetime64[us]", "datetime64[M]", "datetime64[D]", "datetime64[s]"
FIX = "write dates as 2024-01-31 or 2024-01-31T12:00:00, or give numbers"


class Where(Protocol):
    """What errors call the column, or the value of a row in it."""

    def __call__(self, row: int | None = None) -> str:
        """The column without a row."""


def read_times(column: pa.ChunkedArray, *, where: Where) -> Times:
    """The times of all rows: numbers as they are, dates and ISO 8601 texts as datetime64[us]; of a zone in UTC.

    Raises UserError, naming the row, for one that is missing or no time.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise UserError(where(row), "no time", "say when each row was, or drop it")
    if pa.types.is_integer(kind):
        return column.to_numpy().astype(np.int64)
    if pa.types.is_floating(kind):
        numbers = column.to_numpy().astype(np.float64)
        if not np.isfinite(numbers).all():
            row = int(np.flatnonzero(~np.isfinite(numbers))[0])
            raise UserError(where(row), f"{numbers[row]} is no time", FIX)
        return numbers
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        zone = kind.tz if pa.types.is_timestamp(kind) else None
        return column.cast(pa.timestamp("us", zone), safe=False).to_numpy().astype(DATE)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _parsed(column.to_pylist(), where=where)
    raise UserError(where(), f"values of type {kind} are no times", FIX)


def _parsed(texts: list[str], *, where: Where) -> Times:
    for row, text in enumerate(texts):
        if not text[:4].isdigit():  # NumPy takes `now`, too
            raise UserError(where(row), f"{text!r} is no date", FIX)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy would drop a zone
        try:
            return np.array(texts, DATE)
        except (ValueError, UserWarning, DeprecationWarning):
            pass
        for row, text in enumerate(texts):
            try:
                np.datetime64(text, "us")
            except (ValueError, UserWarning, DeprecationWarning):
                raise UserError(where(row), f"{text!r} is no date", FIX) from None
    raise AssertionError("one of them is no date")


def told(time: Any) -> str:
    """A time as people write it: a date without its hours where it has none."""
    if isinstance(time, np.datetime64):
        return str(time.astype(DAY) if time == time.astype(DAY) else np.datetime_as_string(time, unit="auto"))
    return str(time)


def as_arrow(times: Times) -> pa.Array:
    """As a column of a file: dates without hours, or without parts of a second, where none has any."""
    if times.dtype.kind == "M":
        for unit in (DAY, SECOND):
            if (times == times.astype(unit)).all():
                return pa.array(times.astype(unit))
    return pa.array(times)


def following(times: Times, num: int) -> tuple[Times, bool]:
    """The next times of a series that has these (at least two, increasing), and whether its steps were all the same.

    A step of so many months keeps the day and the hour, or the end of the month; else the commonest step of the series
    is taken on.
    """
    if times.dtype.kind == "M" and (found := _months_after(times, num)) is not None:
        return found, True
    steps = np.diff(times)
    sizes, counts = np.unique(steps, return_counts=True)
    step = sizes[counts.argmax()]
    close = steps == step if times.dtype.kind != "f" else np.isclose(steps, step, rtol=1e-6, atol=0)
    return times[-1] + step * np.arange(1, num + 1), bool(close.all())


def _months_after(times: Times, num: int) -> Times | None:
    """Where the steps are all of as many months; None where they are not."""
    for shift in (np.timedelta64(0, "D"), np.timedelta64(1, "D")):  # ends of months: a day later they are firsts
        shifted = times + shift
        months = shifted.astype(MONTH)
        steps, inside = np.diff(months), shifted - months.astype(DATE)
        if steps[0].astype(int) > 0 and (steps == steps[0]).all() and (inside == inside[0]).all():
            return (months[-1] + steps[0] * np.arange(1, num + 1)).astype(DATE) + inside[0] - shift
    return None
