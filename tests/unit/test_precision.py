"""Numbers keep their meaning in float32, or are refused by name."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.data.prepare import prepared
from cluster.data.sources.catalogue import AnyDataSpec
from nn_models.errors import UserError
from nn_models.spec import validate

pytestmark = pytest.mark.filterwarnings("error")

ROWS = 120
HOUR = np.linspace(0, 3600, ROWS)


def data(folder, x, y=None, *, statistics=True):
    columns = {"x": x, "y": np.arange(ROWS) % 2 if y is None else y}
    pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=50, write_statistics=statistics)
    section = {"kind": "parquet", "path": str(folder / "t.parquet"), "input": "x", "target": "y"}
    return prepared(validate(AnyDataSpec, section, prefix="data"))


def lists(values):
    return pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(values, 2)), 2)


REFUSED = {
    "times of an hour": 1.7e9 + HOUR,
    "times of an hour, whole": (1.7e9 + HOUR).astype(np.int64),
    "lists": lists(1.7e9 + HOUR),
    "large ids": 10**15 + np.arange(ROWS),
    "negative": -1.7e9 - HOUR,
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("statistics", [True, False])
def test_numbers_that_float32_does_not_tell_apart(tmp_path, kind, statistics):
    x = REFUSED[kind]
    with pytest.raises(UserError, match=r"t\.parquet, column x: numbers .* hardly told apart in float32.*subtract"):
        data(tmp_path, x, statistics=statistics)


def test_targets_that_float32_does_not_tell_apart(tmp_path):
    with pytest.raises(UserError, match=r"column y: .*subtract 1700000000.0 from them in the file"):
        data(tmp_path, HOUR, 1.7e9 + HOUR)


def test_numbers_past_its_range(tmp_path):
    with pytest.raises(UserError, match="column x: numbers up to 1e\\+60 are past float32's range"):
        data(tmp_path, np.linspace(0, 1e60, ROWS))
    with pytest.raises(UserError, match="column x: numbers up to 1e-60 are below float32's range"):
        data(tmp_path, np.linspace(0, 1e-60, ROWS))


KEPT = {
    "times of a year": 1.7e9 + HOUR * 24 * 365,
    "years": 1900 + np.arange(ROWS),
    "constant": np.full(ROWS, 1.7e9),
    "small whole numbers": 16_000_000 + np.arange(ROWS) % 2,
    "float32 as it is": (1e6 + np.arange(ROWS) / 16).astype(np.float32),
    "random ids": np.random.default_rng(0).integers(0, 2**62, ROWS),
    "around 0": np.random.default_rng(0).normal(size=ROWS),
}


@pytest.mark.parametrize("kind", KEPT)
def test_numbers_that_keep_their_meaning(tmp_path, kind):
    x = KEPT[kind]
    moments = data(tmp_path, x).manifest.columns["input"]
    assert moments.mean[0] == pytest.approx(float(x.mean()), rel=0.2, abs=0.2)
