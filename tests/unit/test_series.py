"""Series: windows against a plain loop, nothing of the future in training, groups, files and what is wrong in them."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data.manifest import SPLITS
from cluster.data.prepare import prepare
from cluster.data.rows import table_rows
from cluster.data.series import Series, Windows
from cluster.data.shards import DataSet
from cluster.data.sources.catalogue import AnyDataSpec
from cluster.data.sources.series import _Windows
from cluster.data.sources.series_files import read_series
from cluster.storage import Folder
from nn_models.columns import Ahead
from nn_models.errors import UserError
from nn_models.spec import validate

pytestmark = pytest.mark.filterwarnings("error")


def series(lengths, *, columns=2, seed=0) -> Series:
    """Every value tells its group, step and column apart."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(sum(lengths), columns)).astype(np.float32)
    names = tuple(f"g{number}" for number in range(len(lengths)))
    return Series(values, np.concatenate([[0], np.cumsum(lengths)]), names)


def source(of: Series, windows: Windows, *, targets=1, season=1, relative=False) -> _Windows:
    changes = windows.changes(of, targets, season)
    columns = tuple(f"c{number}" for number in range(of.values.shape[1]))
    ahead = Ahead(steps=windows.horizon, columns=columns, targets=targets, changes=changes, relative=relative)
    return _Windows(of.values, windows.starts(of), windows.window, ahead)


def rows(of: _Windows, split: str) -> tuple[np.ndarray, np.ndarray]:
    parts = [of.load(part) for part in of.pools[split]]
    return tuple(np.concatenate([part[name].values for part in parts]) for name in ("input", "target"))


def by_hand(of: Series, windows: Windows, targets: int, relative: bool):
    """Split -> its rows, by a loop over groups and windows."""
    found = {split: ([], []) for split in SPLITS}
    for first, end in zip(of.offsets[:-1], of.offsets[1:], strict=True):
        steps = of.values[first:end]
        num_test, num_validation = round(len(steps) * windows.test), round(len(steps) * windows.validation)
        part = ["train"] * (len(steps) - num_test - num_validation) + ["validation"] * num_validation
        part += ["test"] * num_test
        for start in range(0, len(steps), windows.stride):
            ahead = range(start + windows.window, start + windows.window + windows.horizon)
            if ahead[-1] < len(steps) and len({part[step] for step in ahead}) == 1:
                inputs, outputs = found[part[ahead[0]]]
                last = steps[ahead[0] - 1] * relative
                inputs.append(steps[start : start + windows.window] - last)
                outputs.append([steps[step, column] - last[column] for step in ahead for column in range(targets)])
    return found


@st.composite
def problems(draw):
    windows = Windows(
        window=draw(st.integers(1, 6)),
        horizon=draw(st.integers(1, 4)),
        stride=draw(st.integers(1, 4)),
        validation=draw(st.sampled_from([0.0, 0.1, 0.25])),
        test=draw(st.sampled_from([0.0, 0.1, 0.3])),
    )
    lengths = draw(st.lists(st.integers(windows.window + windows.horizon, 40), max_size=4))
    return series([*lengths, 80], seed=draw(st.integers(0, 9))), windows


@given(problems(), st.integers(1, 2), st.booleans())
def test_windows_are_those_of_a_plain_loop(problem, targets, relative):
    of, windows = problem
    made, wanted = source(of, windows, targets=targets, relative=relative), by_hand(of, windows, targets, relative)
    for split in SPLITS:
        if not wanted[split][0]:
            assert not made.pools[split]
            continue
        inputs, outputs = rows(made, split)
        np.testing.assert_array_equal(inputs, wanted[split][0])
        np.testing.assert_array_equal(outputs, wanted[split][1])


@given(problems(), st.integers(1, 3))
def test_training_knows_nothing_from_behind_its_border(problem, season):
    of, windows = problem
    changed = of.values.copy()
    for first, end in zip(of.offsets[:-1], of.offsets[1:], strict=True):
        changed[first + windows.borders(end - first)[0] : end] = np.inf
    future = Series(changed, of.offsets, of.names)
    before, after = (source(one, windows, season=season) for one in (of, future))
    for ours, theirs in zip(rows(before, "train"), rows(after, "train"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert before.ahead.changes == after.ahead.changes


@given(problems())
def test_what_is_forecast_in_one_split_is_forecast_in_no_other_and_later_than_all_that_is_read_in_training(problem):
    of, windows = problem
    starts = windows.starts(of)
    ahead = {
        split: {step + windows.window + k for step in starts[split].tolist() for k in range(windows.horizon)}
        for split in SPLITS
    }
    for one, other in (SPLITS[:2], SPLITS[1:], SPLITS[::2]):
        assert not ahead[one] & ahead[other]
    for first, end in zip(of.offsets[:-1], of.offsets[1:], strict=True):
        group = set(range(first, end))
        known = [max(ahead[split] & group, default=first - 1) for split in SPLITS]
        begins = [min(ahead[split] & group, default=end) for split in SPLITS]
        assert known[0] < min(begins[1:])
        assert known[1] < begins[2]


def test_scaling_is_by_the_training_part_alone(tmp_path):
    generator = np.random.default_rng(0)
    values = generator.normal(5, 2, 200)
    manifests = []
    for name, tail in (("a", values[160:]), ("b", generator.normal(1000, 500, 40))):
        table = pa.table({"y": np.concatenate([values[:160], tail]), "x": np.arange(200) % 7 + 0.5})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        data = {"kind": "series", "path": str(tmp_path / f"{name}.parquet"), "target": "y", "covariates": ["x"]}
        data |= {"window": 10, "horizon": 3, "validation_fraction": 0.1, "test_fraction": 0.1}
        manifests.append(prepare(validate(AnyDataSpec, data), Folder(tmp_path / name)))
    first, second = (manifest.columns for manifest in manifests)
    assert first == second
    stored = table_rows(DataSet(Folder(tmp_path / "a")).table("train"), manifests[0]).columns
    np.testing.assert_allclose(first["input"].mean, stored["input"].values.mean((0, 1)), rtol=1e-6)  # float32 sums
    np.testing.assert_allclose(first["target"].std, stored["target"].values.std(0), rtol=1e-6)
    assert first["target"].column.ahead.changes == pytest.approx((np.abs(np.diff(values[:160])).mean(),), rel=1e-6)
    assert [manifests[0].rows(split) for split in SPLITS] == [160 - 12, 20 - 2, 20 - 2]


def test_changes_are_those_over_a_season_in_the_training_parts_of_all_groups():
    of, windows = series([30, 50]), Windows(4, 2, 1, 0.1, 0.1)
    parts = [of.values[:24, 0], of.values[30:70, 0]]
    wanted = np.concatenate([np.abs(part[3:] - part[:-3]) for part in parts]).mean(dtype=np.float64)
    assert windows.changes(of, 1, 3) == pytest.approx((wanted,), rel=1e-6)  # differences of float32


# -- files ---------------------------------------------------------------------------------------------------------


def written(path, text):
    path.write_text(text)
    return str(path)


def test_rows_of_groups_may_be_mixed_and_stand_in_several_files(tmp_path):
    lines = [f"{day},{shop},{10 * day + number}" for day in range(6) for number, shop in enumerate(["x", "07"])]
    mixed = read_series(written(tmp_path / "a.csv", "\n".join(["t,g,y", *lines])), ["y"], time="t", group="g")
    assert mixed.names == ("x", "07")  # as texts, in the file's order
    assert mixed.values[:, 0].tolist() == [*range(0, 60, 10), *range(1, 61, 10)]
    assert mixed.times.tolist() == [*range(6), *range(6)]
    (tmp_path / "both").mkdir()
    written(tmp_path / "both" / "1.csv", "\n".join(["t,g,y", *lines[:5]]))
    written(tmp_path / "both" / "2.jsonl", "\n".join(
        f'{{"t": {t}, "g": "{g}", "y": {y}}}' for t, g, y in (line.split(",") for line in lines[5:])
    ))  # fmt: skip
    both = read_series(str(tmp_path / "both"), ["y"], time="t", group="g")
    np.testing.assert_array_equal(both.values, mixed.values)
    assert both.names == mixed.names


def test_the_row_is_named_in_its_own_file(tmp_path):
    written(tmp_path / "1.csv", "t,y\n1,2\n2,3\n")
    written(tmp_path / "2.csv", "t,y\n3,2\n2,3\n")
    with pytest.raises(UserError, match=r"2\.csv, row 1, column t: 2 does not come after 3"):
        read_series(str(tmp_path), ["y"], time="t")
    written(tmp_path / "2.csv", "t,y\n3,2\n4,nan\n")
    with pytest.raises(UserError, match=r"2\.csv, row 1, column y: no value; fill or drop such rows"):
        read_series(str(tmp_path), ["y"], time="t")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1.0, float("nan"), 2.0, None]), r"row 1, column y: nan \(2 rows have none\); fill or drop"),
        (pa.array([1.0, None, 2.0, 3.0]), "row 1, column y: no value; fill or drop"),
        (pa.array([1.0, 2.0, float("-inf"), 3.0]), "row 2, column y: -inf; fill or drop"),
        (pa.array(["1", "2", "three", "4"]), "row 2, column y: 'three' is no number"),
        (pa.array([True, False, True, False]), "column y: values of type bool are no numbers"),
        (pa.array([1e9, 1e9 + 1, 1e9 + 2, 1e9]), "column y: numbers from 1000000000.0 .* hardly told apart in float32"),
        (pa.array([1e300, 1, 1, 1]), "column y: numbers up to 1e.300 are past float32's range"),
        (pa.array([None] * 4), r"row 0, column y: no value \(4 rows have none\)"),
    ],
)
def test_what_is_no_number_is_named(tmp_path, column, message):
    pq.write_table(pa.table({"y": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        read_series(str(tmp_path / "a.parquet"), ["y"])


@settings(deadline=None)
@given(st.data())
def test_numbers_of_all_types_are_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("types")
    kind = data.draw(st.sampled_from([pa.int8(), pa.uint32(), pa.int64(), pa.float32(), pa.decimal128(30, 2)]))
    pq.write_table(pa.table({"y": pa.array([1, 2, 3]).cast(kind)}), folder / "a.parquet")
    assert read_series(str(folder / "a.parquet"), ["y"]).values.tolist() == [[1], [2], [3]]


def test_a_constant_column_is_warned_of(tmp_path, caplog):
    lines = ["y,z", *(f"{min(step, 40)},{5 if step < 80 else 6}" for step in range(100))]
    data = {"kind": "series", "path": written(tmp_path / "a.csv", "\n".join(lines)), "target": ["z", "y"]}
    with caplog.at_level(logging.WARNING):
        manifest = prepare(validate(AnyDataSpec, data | {"window": 5}), Folder(tmp_path / "out"))
    assert [record.message for record in caplog.records] == [
        "data: column z is constant in the training part: there is nothing to learn of it"
    ]
    assert manifest.columns["target"].column.ahead.changes[0] == 0


@pytest.mark.parametrize(
    ("lengths", "windows", "message"),
    [
        (
            [8],
            Windows(6, 3, 1, 0, 0),
            "data.window: 6 steps and 3 ahead are 9, but 1 of 1 groups have fewer: 'g0' of",
        ),
        ([30, 8, 7], Windows(6, 3, 1, 0, 0), "but 2 of 3 groups have fewer: 'g1' of 8, 'g2' of 7"),
        (
            [20],
            Windows(6, 3, 1, 0.3, 0.3),
            "data: the train part of a series of 20 steps has 8, where a window needs",
        ),
        ([40], Windows(6, 3, 1, 0.05, 0.2), "data.validation_fraction: the validation part of a series of 40 steps"),
        ([40], Windows(6, 3, 1, 0.2, 0.05), "data.test_fraction: the test part of a series of 40 steps has 2, where"),
        ([40], Windows(6, 3, 1, 0.7, 0.6), "data: the train part of a series of 40 steps has 0"),
    ],
)
def test_a_split_without_windows_is_refused(lengths, windows, message):
    with pytest.raises(UserError) as error:
        windows.starts(series(lengths))
    assert message in str(error.value)


def test_a_series_without_groups_is_not_told_of_groups():
    of = Series(np.zeros((5, 1), np.float32), np.array([0, 5]), (None,))
    with pytest.raises(UserError, match="6 steps and 3 ahead are 9, but the series has 5; set a smaller window or hor"):
        Windows(6, 3, 1, 0, 0).starts(of)


def test_the_sea_has_one_temperature_a_month():
    spec = validate(AnyDataSpec, {"kind": "el_nino", "covariates": ["nino34"]})
    of = spec.read()
    assert of.values.shape == (732, 2)
    assert str(of.times[0]), str(of.times[-1]) == ("1950-01-01", "2010-12-01")
    assert (np.diff(of.times.astype("datetime64[M]")).astype(int) == 1).all()
    assert ((of.values > 15) & (of.values < 32)).all()
