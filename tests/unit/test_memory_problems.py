"""The generated long-memory problems are what their papers say."""

import numpy as np
import pytest

from cluster.data.prepare import prepared
from cluster.data.rows import table_rows
from cluster.data.sources.memory import AddingSpec, CopySpec


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path))


def columns(spec):
    data = prepared(spec)
    parts = [table_rows(data.table(split), data.manifest).columns for split in data.manifest.splits]
    return [np.concatenate([part[name].values for part in parts]) for name in ("input", "target")]


@pytest.mark.parametrize("length", [2, 5, 100])
def test_adding(length):
    steps, sums = columns(AddingSpec(length=length, rows=9000))  # two parts
    values, marks = steps[..., 0], steps[..., 1]
    assert set(np.unique(marks)) <= {0, 1}
    assert (marks[:, : length // 2].sum(1) == 1).all()
    assert (marks[:, length // 2 :].sum(1) == 1).all()
    np.testing.assert_allclose((values * marks).sum(1), sums[:, 0], rtol=1e-6)
    assert np.square(sums - 1).mean() == pytest.approx(1 / 6, abs=0.01)  # 9,000 rows: a standard error of 0.002
    assert len(np.unique(values[:, 0])) > 8900  # rows differ


def test_copy():
    spec = CopySpec(symbols=3, count=4, delay=7, rows=50)
    said, wanted = columns(spec)
    assert said.shape == wanted.shape == (50, 4 + 7 + 4)
    assert np.array_equal(said[:, :4], wanted[:, -4:])
    assert set(np.unique(said[:, :4])) == {2, 3, 4}
    assert (said[:, 4:10] == 0).all()
    assert (said[:, 10] == 1).all()
    assert (said[:, 11:] == 0).all()
    assert (wanted[:, :-4] == 0).all()


def test_another_seed_draws_other_rows():
    first, second, again = (columns(AddingSpec(rows=20, seed=seed))[0] for seed in (0, 1, 0))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, again)
