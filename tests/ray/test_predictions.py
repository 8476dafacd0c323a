"""Predictions by Ray workers: the same numbers as in one process; each part once, whatever is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cluster
from cluster.inference import unfinished
from cluster.inference.parted import PartedPrediction
from cluster.inference.predictions import Prediction
from cluster.runs import given_files
from cluster.storage import Folder
from nn_models.errors import UserError
from tests.ray.faults import wait_for
from tests.unit import made

ROWS, GROUP = 400, 40  # of the user's file: a part for each of its row groups


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Models of rows of one shape, of trees, of windows of one text; and one that can be watched."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text("the cat sat on the mat. " * 100)
    (folder / "watched").mkdir()
    table = made.features(folder / "table", ROWS)
    target = {"kind": "custom", "target": "tests.ray.nets:Watched", "arguments": {"folder": str(folder / "watched")}}
    tree = {"kind": "tree_lstm", "hidden": 5, "embedding": 4}
    recipes = {
        "digits": {"model": {"kind": "mlp", "hidden": [16]}, "data": {"kind": "digits", "test_fraction": 0.7}},
        "nodes": {
            "model": tree,
            "data": {"kind": "listops", "rows": 2000, "depth": 2, "length": 8, "labels": "nodes"},
            "objective": {"kind": "node_labels"},
        },
        "book": {
            "model": {"kind": "lstm", "hidden": 6, "embedding": 4},
            "data": {"kind": "text", "path": str(folder / "book.txt"), "window": 8},
            "objective": {"kind": "next_token"},
        },
        "watched": {"model": target, "data": table},
    }
    for name, recipe in recipes.items():
        train = {"epochs": 1, "global_batch_size": 32}
        cluster.train({"name": name, "train": train, **recipe}, run=str(folder / name))
    return folder


@pytest.fixture
def rows(tmp_path):
    """A file in ten row groups."""
    data = made.features(tmp_path / "rows", ROWS, seed=1)
    (file,) = Path(data.path).parent.rglob("*.parquet") if data.path.endswith(".parquet") else Path(data.path).iterdir()
    pq.write_table(pq.read_table(file), tmp_path / "rows.parquet", row_group_size=GROUP)
    return str(tmp_path / "rows.parquet")


def here(run, data=None, **options) -> tuple[pa.Table, dict]:
    prediction = Prediction(str(run), data, **options)
    return pa.concat_tables(prediction.tables()), prediction.metrics()


def by_workers(run, folder, data=None, *, workers=2, **options) -> tuple[pa.Table, dict]:
    prediction = Prediction(str(run), data, **options)
    parted = PartedPrediction(prediction, Folder(folder))
    parted.compute(workers)
    return pa.concat_tables(parted.tables()), prediction.metrics()


@pytest.mark.parametrize("name", ["digits", "nodes", "book"])
def test_two_workers_say_what_one_process_says(ray, runs, name, tmp_path, monkeypatch):
    monkeypatch.setattr(given_files, "PART_ROWS", 500)  # several parts
    table, metrics = by_workers(runs / name, tmp_path / "parts")
    alone, wanted = here(runs / name)
    assert table.equals(alone)
    assert metrics == wanted == cluster.evaluate(str(runs / name))["metrics"]


def test_a_worker_that_dies_is_replaced(ray, runs, rows, tmp_path):
    wanted, metrics = here(runs / "watched", rows)
    (runs / "watched" / "kill").touch()
    assert by_workers(runs / "watched", tmp_path / "parts", rows) == (wanted, metrics)
    assert not (runs / "watched" / "kill").exists()


def test_a_prediction_goes_on_where_it_was_killed(ray, runs, rows, tmp_path):
    """The command by itself, killed with its Ray; then another process goes on."""
    wanted, metrics = here(runs / "watched", rows)
    (runs / "watched" / "slow").touch()
    command = [
        sys.executable,
        "-m",
        "jobs",
        "predict",
        runs / "watched",
        rows,
        "--workers",
        "2",
        "--out",
        "out.parquet",
    ]
    here_too = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    here_too.pop("RAY_ADDRESS", None)
    parts = tmp_path / "out.parquet.parts"
    with open(tmp_path / "log", "w") as log:
        driver = subprocess.Popen(command, cwd=tmp_path, env=here_too, stdout=log, stderr=log)
        wait_for(lambda: len([*parts.glob("*.parquet")]) >= 2 or driver.poll() is not None)
        assert driver.poll() is None, (tmp_path / "log").read_text()
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    (runs / "watched" / "slow").unlink()
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert 2 <= len(done) < ROWS // GROUP
    assert not (tmp_path / "out.parquet").exists()

    prediction = Prediction(str(runs / "watched"), rows)
    parted = PartedPrediction(prediction, Folder(parts))
    assert len(parted.done) == len(done)
    parted.compute(1)
    table = pa.concat_tables(parted.tables())
    assert table.equals(wanted)
    assert table["row"].to_pylist() == list(range(ROWS))  # none twice, none missing
    assert prediction.metrics() == metrics
    assert {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet") if path.name in done} == done
    parted.delete()
    assert not parts.exists()


def test_parts_of_another_prediction_are_refused(ray, runs, rows, tmp_path):
    parts = tmp_path / "parts"
    by_workers(runs / "watched", parts, rows)
    again = PartedPrediction(Prediction(str(runs / "watched"), rows), Folder(parts))
    assert len(again.done) == ROWS // GROUP
    for options in ({"top": 2}, {"labelled": False}):
        other = Prediction(str(runs / "watched"), rows, **options)
        with pytest.raises(UserError, match=f"--out: {parts} holds an unfinished prediction .* give --overwrite"):
            PartedPrediction(other, Folder(parts))
    os.utime(rows, (1, 1))  # the rows have changed
    changed = Prediction(str(runs / "watched"), rows)
    with pytest.raises(UserError, match="holds an unfinished prediction"):
        PartedPrediction(changed, Folder(parts))
    assert PartedPrediction(changed, Folder(parts), overwrite=True).done == set()


def test_rows_that_cannot_be_used_are_told_as_in_one_process(ray, runs, rows, tmp_path):
    table = pq.read_table(rows)
    broken = table.set_column(0, "x", pa.array([None, *table["x"].to_pylist()[1:]], table["x"].type))
    pq.write_table(broken, rows, row_group_size=GROUP)
    with pytest.raises(UserError) as alone:
        here(runs / "watched", rows)
    with pytest.raises(UserError) as told:
        by_workers(runs / "watched", tmp_path / "parts", rows)
    assert str(told.value) == str(alone.value)
    assert "row group 0: column x has 1 empty values" in str(told.value)


def test_a_damaged_part_is_named(runs, rows, tmp_path):
    folder = unfinished.UnfinishedPrediction(Folder(tmp_path / "parts"))
    assert folder.begin({"of": "this"}, overwrite=False) == set()
    folder.keep(0, unfinished.written(pa.table({"row": [0]})), b"")
    assert folder.begin({"of": "this"}, overwrite=False) == {0}
    assert folder.found(0).table.to_pydict() == {"row": [0]}
    (tmp_path / "parts" / "000000.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"000000.parquet: damaged .* delete it, and it is predicted again"):
        folder.found(0)
    assert json.loads((tmp_path / "parts" / "prediction.json").read_text())["of"] == "this"
