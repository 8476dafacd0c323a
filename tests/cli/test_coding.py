"""Autoencoders on the command line: encode, detect, generate; and what is wrong with runs, data and options."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_breast_cancer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    import cluster

    folder = tmp_path_factory.mktemp("runs")
    vae = {"objective": {"kind": "variational", "samples": 0}, "data": {"kind": "digits"}, "train": {"epochs": 1}}
    recipes = {
        "digits": "digits-anomaly",
        "table": "cancer-anomaly",
        "vae": {**vae, "model": {"kind": "vae", "code": 2}},
        "conditional": {**vae, "model": {"kind": "conditional_vae", "code": 2}},
        "mlp": "digits-mlp",
    }
    for name, recipe in recipes.items():
        cluster.train(recipe, overrides={"train.epochs": 1}, run=str(folder / name), num_workers=0)
    return folder


@pytest.fixture
def table(tmp_path):
    """Writes the rows of the breast cancer table, some columns changed or left out."""

    def write(name="rows.csv", **changes):
        bunch = load_breast_cancer()
        columns = dict(zip(map(str, bunch.feature_names), bunch.data.T, strict=True))
        columns |= {"target": bunch.target_names[bunch.target].astype(str)} | changes
        found = pa.table({key: values for key, values in columns.items() if values is not None})
        (pa.csv.write_csv if name.endswith("csv") else pq.write_table)(found, tmp_path / name)
        return tmp_path / name

    return write


def test_encode(manta, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert manta("encode", runs / "digits") == (0, f"{tmp_path}/codes.parquet\n", "")
    whole = pq.read_table("codes.parquet")
    assert whole.column_names == ["split", "row", "label", "code"]
    assert whole.num_rows == 1797
    code, out, _ = manta("encode", runs / "digits", "digits", "--out", "other.parquet", "--json")
    assert (code, json.loads(out)) == (0, {"path": f"{tmp_path}/other.parquet", "rows": 1797})
    assert manta("encode", runs / "digits", "--split", "test")[0] == 0  # the file is replaced
    assert set(pq.read_table("codes.parquet")["split"].to_pylist()) == {"test"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.parquet", "other.parquet"]


def test_what_was_there_stays_where_encoding_fails(refused, runs, table, tmp_path):
    out = tmp_path / "codes.parquet"
    out.write_text("precious")
    file = table("rows.parquet", **{"mean radius": np.where(np.arange(569) == 500, np.nan, 1.0)})
    rows = pq.read_table(file)
    pq.write_table(rows, file, row_group_size=200)  # the last group is the bad one
    assert "row group 2: mean radius" in refused("encode", runs / "table", file, "--out", out)
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.parquet", "rows.parquet"]


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("digits", ["fashion_mnist"], "DATA: the rows of fashion_mnist are image 1 x 28 x 28 uint8, but the model was "
         "trained on image 1 x 8 x 8 uint8; choose others"),
        ("digits", ["{kind: sklearn, table: wine}"], "DATA: the rows of sklearn are features 13 float32, but the"),
        ("digits", ["digitz"], "data.kind: unknown kind 'digitz'; did you mean digits?"),
        ("digits", ["rows.csv"], "DATA: rows.csv: no such file or folder; check the path"),
        ("digits", ["digits", "--split", "test"], "--split: digits is taken as a whole; leave it out, or prepare"),
        ("digits", ["--split", "tests"], "--split: 'tests' is no split; did you mean test?"),
        ("digits", ["--label", "x"], "--label: only a file of rows has columns to choose from; leave it out"),
        ("digits", ["--out", "codes.csv"], "--out: 'codes.csv' is not the name of a Parquet file; end it in .parquet"),
        ("digits", ["--out", "no/codes.parquet"], "no is not a folder; make it first, or choose another place"),
        ("mlp", [], "a mlp, which makes no codes; give the run of an autoencoder"),
        ("table", ["gone.csv"], "DATA: gone.csv: no such file or folder"),
    ],
)  # fmt: skip
def test_what_encode_refuses(refused, runs, tmp_path, monkeypatch, run, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("encode", runs / run, *arguments)
    assert not list(tmp_path.iterdir())


def test_out_that_is_a_folder_is_refused(refused, runs, tmp_path):
    (tmp_path / "codes.parquet").mkdir()
    told = refused("encode", runs / "digits", "--out", tmp_path / "codes.parquet")
    assert "codes.parquet is a folder; give the name of a file in it" in told


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"mean area": None}, [], "rows.csv: no column 'mean area'; did you mean"),
        ({"mean area": ["x"] * 569}, [], "column mean area: values of type string are not numbers"),
        ({"mean area": [None] * 5 + [1.0] * 564}, [], "column mean area has 5 empty values; fill or drop them"),
        ({}, ["--label", "kind"], "--label: no column 'kind' in"),
        ({}, ["--label", "mean area"], "column mean area: "),
    ],
)
def test_files_that_do_not_fit_are_refused(refused, runs, table, tmp_path, changes, options, message):
    told = refused("encode", runs / "table", table(**changes), "--out", tmp_path / "codes.parquet", *options)
    assert message in told


def test_lists_of_another_length_are_refused(refused, runs, tmp_path):
    import cluster

    rows = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    for width in (4, 3):
        pq.write_table(pa.table({"x": list(rows[:, :width])}), tmp_path / f"{width}.parquet")
    recipe = {"model": {"kind": "autoencoder", "code": 2}, "objective": {"kind": "reconstruction"}}
    recipe |= {"data": {"kind": "parquet", "path": str(tmp_path / "4.parquet"), "input": "x"}, "train": {"epochs": 1}}
    cluster.train(recipe, run=str(tmp_path / "run"), num_workers=0)
    told = refused("encode", tmp_path / "run", tmp_path / "3.parquet", "--out", tmp_path / "codes.parquet")
    assert "rows of 3 numbers in x where the model was trained on (4,)" in told


# -- detect ----------------------------------------------------------------------------------------------------------


def test_detect(manta, runs, tmp_path):
    code, out, _ = manta("detect", runs / "digits")
    assert code == 0
    told = {line[:22].strip(): line[22:] for line in out.splitlines()}
    assert list(told) == [
        "threshold", "rows", "above it", "anomalies", "precision", "recall", "false positives", "AUROC",
        "average precision",
    ]  # fmt: skip
    assert "(for 0.05 of normal rows, by 162 of validation)" in told["threshold"]
    assert told["anomalies"] == "174"
    assert "(predicted from validation: 0.0154 to 0.0954, 95 %)" in told["false positives"]
    place = tmp_path / "scores.parquet"
    code, out, _ = manta("detect", runs / "digits", "--out", place, "--rate", 0.1, "--json")
    found, scores = json.loads(out), pq.read_table(place)
    assert (code, found["path"], found["rows"], found["rate"]) == (0, str(place), 499, 0.1)
    assert scores.column_names == ["split", "row", "label", "error", "anomaly"]
    assert sum(scores["anomaly"].to_pylist()) == found["flagged"]


def test_detect_in_a_users_file(manta, runs, table):
    code, out, _ = manta("detect", runs / "table", table(), "--json")
    assert (code, json.loads(out)["anomalies"]) == (0, 212)
    code, out, _ = manta("detect", runs / "table", table(target=None))
    assert code == 0
    assert "none: no row is labelled as an anomaly" in out


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("digits", ["--rate", "0.001"], "--rate: 0.001 of 162 validation rows is less than one; give 0.0061 or more"),
        ("digits", ["--rate", "1.5"], "Invalid value for '--rate'"),
        ("digits", ["--rate", "0.1", "--threshold", "1"], "--rate: a threshold is given, which needs none; leave one"),
        ("digits", ["--threshold", "inf"], "--threshold: inf is no error of rows; give a number from 0 on"),
        ("digits", ["--anomaly", "eight"], "--anomaly: no row has the label 'eight'; known: 0, 1, 2, 3, 4, 5, 6, 7,"),
        ("mlp", [], "a mlp, which makes no codes; give the run of an autoencoder"),
        ("digits", ["--out", "scores.txt"], "--out: 'scores.txt' is not the name of a Parquet file"),
    ],
)
def test_what_detect_refuses(refused, runs, tmp_path, monkeypatch, run, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("detect", runs / run, *arguments)
    assert not list(tmp_path.iterdir())


def test_figures_of_rows_without_labels_are_refused(refused, runs, table):
    told = refused("detect", runs / "table", table(target=None), "--anomaly", "malignant")
    assert "--anomaly: the rows have no labels to compare with; name their column in --label, or leave it out" in told


# -- generate --------------------------------------------------------------------------------------------------------


def test_generate(manta, runs, tmp_path):
    out = tmp_path / "made.png"
    for run, options, size in (
        ("vae", [], (8, 8)),
        ("conditional", ["--num", 30], (10, 3)),
        ("conditional", ["--num", 4, "--label", 3], (2, 2)),
        ("digits", ["--between", 0, 5], (16, 1)),
        ("conditional", ["--between", 3, 3, "--num", 4], (4, 1)),
    ):
        assert manta("generate", runs / run, "--out", out, *options)[0] == 0
        width, height = Image.open(out).size
        assert (width // 34, height // 34) == size  # a pixel of 8x8 is four wide, and two between
    first = out.read_bytes()
    assert manta("generate", runs / "vae", "--seed", 1, "--out", out)[0] == 0
    made = out.read_bytes()
    assert manta("generate", runs / "vae", "--seed", 1, "--out", out)[0] == 0
    assert out.read_bytes() == made != first


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("digits", [], "a autoencoder, whose codes have no distribution to draw from; say --between which two rows to"),
        ("vae", ["--between", "0", "359"], "--between: no row 359 in the test split; choose two of 0 to 358"),
        ("vae", ["--between", "0", "1", "--num", "1"], "--num: 1 rows, but a path has two ends; ask for 2 or more"),
        ("vae", ["--label", "3"], "--label: vae makes rows without labels; leave it out, or train a conditional_vae"),
        ("conditional", ["--label", "ten"], "--label: 'ten' is no class of this run's data; known: 0, 1, 2"),
        ("mlp", ["--between", "0", "1"], "--between: mlp has no codes of rows; give an autoencoder's run"),
        ("mlp", [], "a mlp, which generates nothing; give the run of a GAN or of a variational autoencoder"),
        ("table", ["--between", "0", "1"], "its rows are 30 numbers each, no images; load the"),
        ("vae", ["--prompt", "a"], "--prompt: this run's model writes no text"),
    ],
)
def test_what_generate_refuses(refused, runs, tmp_path, monkeypatch, run, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("generate", runs / run, *arguments)
    assert not list(tmp_path.iterdir())
