"""Series on the command line: forecasts as files, and what is wrong with files and options told in one line."""

import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

HEADER = "day,shop,sales,price,note"
ROWS = [
    f"2024-{1 + day // 28:02d}-{1 + day % 28:02d},{shop},{10 + day % 7 + 5 * (shop == 'b')},{day % 3}.5,x{day}"
    for day in range(56)
    for shop in "ab"
]
OF_A = [row for row in ROWS if ",a," in row]
DATA = {"kind": "series", "target": "sales", "time": "day", "group": "shop", "window": 4, "horizon": 2}
ALONE = {"group": None}


def data(path, **changes):
    return json.dumps({name: value for name, value in {**DATA, "path": str(path), **changes}.items() if value})


@pytest.fixture
def rows(tmp_path):
    """Writes the rows of a file."""

    def write(lines=ROWS, name="rows.csv", header=HEADER):
        (tmp_path / name).write_text("\n".join([header, *lines]) + "\n")
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import cluster

    folder = tmp_path_factory.mktemp("run")
    (folder / "rows.csv").write_text("\n".join([HEADER, *ROWS]))
    recipe = {"model": {"kind": "gru", "hidden": 4}, "data": json.loads(data(folder / "rows.csv"))}
    recipe |= {"objective": {"kind": "forecast"}, "train": {"epochs": 1}}
    return cluster.train(recipe, run=str(folder / "run")).run


def changed(row, old, new):
    return [line.replace(old, new) if number == row else line for number, line in enumerate(OF_A)]


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        (changed(7, ",10,", ",,"), {}, "rows.csv, row 7, column sales: no value; fill or drop such rows"),
        (changed(7, ",10,", ",nan,"), {}, "rows.csv, row 7, column sales: no value; fill or drop such rows"),
        (changed(7, ",10,", ",inf,"), {}, "rows.csv, row 7, column sales: inf; fill or drop such rows"),
        (changed(7, ",10,", ",ten,"), {}, "rows.csv, row 7, column sales: 'ten' is no number; choose a column of"),
        (OF_A, {"target": "note"}, "rows.csv, row 0, column note: 'x0' is no number; choose a column of numbers"),
        (changed(7, "2024-01-08", "2024-01-07"), {},
         "rows.csv, row 7, column day: 2024-01-07 does not come after 2024-01-07, the time of the row before it in 'a"),
        (changed(7, "2024-01-08", "2024-01-05"), ALONE,
         "rows.csv, row 7, column day: 2024-01-05 does not come after 2024-01-07, the time of the row before it; sort"),
        (ROWS, ALONE, "the row before it; sort the rows by time, with one row a time, or name the column that tells"),
        (changed(7, "2024-01-08", "soon"), {}, "rows.csv, row 7, column day: 'soon' is no date; write dates as 2024-"),
        (changed(7, "2024-01-08", "2024-02-30"), {}, "rows.csv, row 7, column day: '2024-02-30' is no date; write"),
        (changed(7, "2024-01-08", ""), {}, "rows.csv, row 7, column day: no time; say when each row was, or drop it"),
        (changed(7, "x7", "x7,1"), {}, "rows.csv, row 7: 6 values where the header has 5 names"),
        (OF_A, {"target": "sale"}, "rows.csv: no column 'sale'; did you mean sales?"),
        (OF_A, {"time": "when"}, "rows.csv: no column 'when'; known: day, note, price, sales, shop"),
        (OF_A, {"covariates": ["cost"]}, "rows.csv: no column 'cost'; "),
        (OF_A, {"window": 60, **ALONE},
         "data.window: 60 steps and 2 ahead are 62, but the series has 56; set a smaller window or horizon"),
        ([*OF_A, ROWS[1], ROWS[3]], {},
         "data.window: 4 steps and 2 ahead are 6, but 1 of 2 groups have fewer: 'b' of 2; set a smaller window or"),
        (OF_A, {"window": 43}, "data: the train part of a series of 56 steps has 44, where a window needs 45 (window"),
        (OF_A, {"horizon": 9, "window": 3}, "data.validation_fraction: the validation part of a series of 56 steps "),
        ([], {}, "rows.csv: no rows; give a file that has some"),
        (OF_A, {"group": "sales"}, "data.group: sales is named in target already; name another column"),
        (OF_A, {"time": "sales"}, "data.time: sales is named in target already; name another column"),
        (OF_A, {"covariates": ["sales"]}, "data.covariates: sales is named in target already; name another column"),
        (OF_A, {"target": ["sales", "sales"]}, "data.target: sales is named in target already; name another column"),
        (OF_A, {"season": 7}, "data.season: 7 steps, which a window of 4 does not hold; set a larger window, or leave"),
        (OF_A, {"windw": 7}, "data.windw: unknown field; did you mean window?"),
        (OF_A, {"window": -1}, "data.window: must be greater than 0, not -1"),
        (changed(7, ",a,", ",,"), {}, "rows.csv, row 7, column shop: no name of a group; fill or drop such rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told_in_one_line(refused, rows, tmp_path, lines, changes, message):
    told = refused("data", "prepare", data(rows(lines), **changes), "--out", tmp_path / "out")
    assert message in told
    assert "\n" not in told


def test_a_horizon_of_nothing_is_refused(refused, rows, tmp_path):
    section = json.dumps({**json.loads(data(rows())), "horizon": 0})
    assert refused("data", "prepare", section, "--out", tmp_path / "out") == (
        "data.horizon: must be greater than 0, not 0"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: an empty file; give one with rows"),
        ("a.csv", b"day;shop;sales\n2024-01-01;a;3\n", "a.csv: no column 'sales'; separate values by ','"),
        ("a.parquet", b"PAR1 no more", "a.parquet: not a readable Parquet file"),
        ("a.xlsx", b"PK", "a.xlsx: the name of a file of rows ends in"),
    ],
)
def test_files_that_are_none_are_refused(refused, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refused("data", "prepare", data(tmp_path / name), "--out", tmp_path / "out")


def test_a_constant_series_is_warned_of(manta, rows, tmp_path):
    lines = [f"2024-01-{day:02d},a,5,{day},x" for day in range(1, 31)]
    code, _, err = manta("data", "prepare", data(rows(lines)), "--out", tmp_path / "out")
    assert code == 0
    assert "data: column sales is constant in the training part: there is nothing to learn of it" in err


# -- manta forecast ------------------------------------------------------------------------------------------------


def test_a_forecast_is_printed_or_written(manta, run, tmp_path):
    code, out, _ = manta("forecast", run)
    assert code == 0
    printed = pa.csv.read_csv(pa.BufferReader(out.encode()))
    assert printed.column_names == ["time", "group", "step", "column", "value"]
    assert list(map(str, printed["time"].to_pylist())) == ["2024-02-29", "2024-03-01"] * 2
    for name in ("forecast.csv", "forecast.parquet", "FORECAST.CSV"):
        code, out, _ = manta("forecast", run, "--out", tmp_path / name)
        assert (code, out) == (0, f"{tmp_path / name}\n")
    assert pa.csv.read_csv(tmp_path / "forecast.csv").equals(printed)
    kept = pq.read_table(tmp_path / "forecast.parquet")
    assert kept.drop("value").cast(printed.drop("value").schema).equals(printed.drop("value"))
    found = json.loads(manta("forecast", run, "--json")[1])
    assert found["path"] is None
    assert [row["value"] for row in found["rows"]] == pytest.approx(kept["value"].to_pylist())
    assert found["rows"][0]["time"] == "2024-02-29"


def test_another_file_goes_on(manta, run, rows):
    lines = [f"2025-0{month}-01,c,{month}" for month in range(1, 7)]
    code, out, _ = manta("forecast", run, rows(lines, header="day,shop,sales"))
    assert code == 0
    assert [line.split(",")[:3] for line in out.splitlines()[1:]] == [
        ["2025-07-01", '"c"', "1"],
        ["2025-08-01", '"c"', "2"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--out", "forecast.txt"],
            "--out: 'forecast.txt' is not the name of a CSV or Parquet file; end it in",
        ),
        (["--out", "nowhere/forecast.csv"], "nowhere is not a folder; make it first, or choose another place"),
        (["nothing.csv"], "DATA: nothing.csv: no such file or folder"),
    ],
)
def test_what_cannot_be_forecast_is_refused(refused, run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("forecast", run, *arguments)


def test_a_file_that_does_not_fit_is_refused(refused, run, rows):
    assert "no column 'sales'; did you mean sale?" in refused("forecast", run, rows([], header="day,shop,sale"))
    short = rows(OF_A[:3])
    assert refused("forecast", run, short) == (
        f"{short}: 3 steps of 'a', but a forecast is made from 4; give a longer series"
    )
    assert "row 1, column sales: no value" in refused("forecast", run, rows(changed(1, ",11,", ",,")))


def test_a_run_that_forecasts_nothing_is_refused(refused, tmp_path):
    import cluster

    few = {"model": {"kind": "mlp"}, "data": {"kind": "digits"}, "train": {"epochs": 1, "global_batch_size": 500}}
    run = cluster.train(few, run=str(tmp_path / "run")).run
    assert refused("forecast", run) == (
        f"{run}: a model trained for classification, which forecasts no series; give the run of a forecast"
    )
    assert "not a run's directory" in refused("forecast", tmp_path)
