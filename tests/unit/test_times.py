"""Times of series: dates and numbers as files have them, and how they go on; against pandas' calendar."""

import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.data.times import as_arrow, following, read_times, told
from nn_models.errors import UserError

FIRST = st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2100, 1, 1)).map(
    lambda time: time.replace(microsecond=0)
)


def where(row=None):
    return "file" if row is None else f"row {row}"


def read(values, kind=None):
    return read_times(pa.chunked_array([pa.array(values, kind)]), where=where)


@given(FIRST, st.sampled_from(["h", "D", "W", "7min", "MS", "ME", "QS", "2MS", "YS", "YE"]), st.integers(3, 30))
def test_regular_times_go_on_as_pandas_has_it(first, frequency, num):
    times = pd.date_range(first, periods=num + 5, freq=frequency).to_numpy().astype("datetime64[us]")
    after, regular = following(times[:num], 5)
    assert regular
    np.testing.assert_array_equal(after, times[num:])


@given(st.integers(-1000, 1000), st.integers(1, 50), st.integers(2, 20))
def test_numbers_go_on(first, step, num):
    times = first + step * np.arange(num)
    np.testing.assert_array_equal(following(times, 3)[0], times[-1] + step * np.array([1, 2, 3]))
    after, regular = following(times / 10, 3)
    assert regular
    np.testing.assert_allclose(after, (times[-1] + step * np.array([1, 2, 3])) / 10, rtol=1e-9)  # tenths in float64


def test_of_uneven_times_the_commonest_step_goes_on_and_that_is_said():
    weekdays = np.array(["2024-01-04", "2024-01-05", "2024-01-08", "2024-01-09", "2024-01-10"], "datetime64[us]")
    after, regular = following(weekdays, 2)
    assert not regular
    assert [told(time) for time in after] == ["2024-01-11", "2024-01-12"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["2024-02-01", "2024-03-01"], pa.string()),
        (["2024-02", "2024-03"], pa.string()),
        ([datetime.date(2024, 2, 1), datetime.date(2024, 3, 1)], pa.date32()),
        ([datetime.datetime(2024, 2, 1), datetime.datetime(2024, 3, 1)], pa.timestamp("ns")),
        ([datetime.datetime(2024, 2, 1), datetime.datetime(2024, 3, 1)], pa.timestamp("s", "UTC")),
        (["2024-02-01", "2024-03-01"], pa.dictionary(pa.int8(), pa.string())),
    ],
)
def test_dates_are_read_from_what_files_have(values, kind):
    times = read(values, kind)
    assert times.dtype == "datetime64[us]"
    assert [told(time) for time in times] == ["2024-02-01", "2024-03-01"]
    assert as_arrow(times).type == pa.date32()
    assert as_arrow(times + np.timedelta64(1, "h")).type == pa.timestamp("s")
    assert as_arrow(times + np.timedelta64(1, "us")).type == pa.timestamp("us")
    assert told(times[0] + np.timedelta64(1, "h")) == "2024-02-01T01:00"


def test_numbers_are_times():
    assert read([3, 4]).tolist() == [3, 4]
    assert read([3.5, 4.5]).tolist() == [3.5, 4.5]
    assert as_arrow(read([3, 4])).type == pa.int64()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["2024-01-01", None], "row 1: no time"),
        (["2024-01-01", "tomorrow"], "row 1: 'tomorrow' is no date"),
        (["2024-01-01", "2024-02-30"], "row 1: '2024-02-30' is no date"),
        (["2024-01-01", "31/01/2024"], "row 1: '31/01/2024' is no date"),
        (["2024-01-01", "2024-01-02T00:00:00+01:00"], "row 1: '2024-01-02T00:00:00+01:00' is no date"),
        (["2024-01-01", "NaT"], "row 1: 'NaT' is no date"),
        (["2024-01-01", "now"], "row 1: 'now' is no date"),
        ([1.0, float("nan")], "row 1: nan is no time"),
        ([1.0, float("inf")], "row 1: inf is no time"),
        ([True, False], "file: values of type bool are no times"),
        ([[1], [2]], "file: values of type list<item: int64> are no times"),
    ],
)
def test_what_is_no_time_is_named(values, message):
    with pytest.raises(UserError, match=r"row 1|file") as error:
        read(values)
    assert str(error.value).startswith(message)
