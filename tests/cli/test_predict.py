"""`manta predict` as a user types it: what it prints and writes; what is wrong with runs, files and options."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

PIXELS = np.round(load_digits().images * (255 / 16)).astype(np.uint8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    import cluster

    folder = tmp_path_factory.mktemp("runs")
    text = "\n".join(f"{n} {'up' if n % 2 else 'down'},{'odd' if n % 2 else 'even'}" for n in range(40))
    (folder / "texts.csv").write_text(f"text,label\n{text}\n")
    texts = {"kind": "text_classification", "path": str(folder / "texts.csv")}
    recipes = {
        "digits": ("digits-mlp", {}),
        "autoencoder": ("digits-autoencoder", {}),
        "gan": ("digits-gan", {}),
        "texts": ({"model": {"kind": "gru", "hidden": 4}, "data": texts}, {}),
    }
    for name, (recipe, overrides) in recipes.items():
        cluster.train(recipe, overrides={"train.epochs": 1, **overrides}, run=str(folder / name), num_workers=0)
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for row, label in enumerate(load_digits().target[:20]):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[row]).save(folder / str(label) / f"{row}.png")
    return folder


@pytest.fixture
def stdin(monkeypatch):
    def given(*lines) -> None:
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return given


def test_the_test_split_has_evaluates_figures(manta, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = manta("predict", runs / "digits", "--split", "test", "--out", "predictions.parquet", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    evaluated = json.loads(manta("evaluate", runs / "digits", "--json")[1])
    assert said == {
        "path": f"{tmp_path}/predictions.parquet",
        "rows": evaluated["rows"],
        "metrics": evaluated["metrics"],
    }
    table = pq.read_table("predictions.parquet")
    assert table.column_names == ["split", "row", "label", "prediction", "probability", "top", "top_probability"]
    assert table["row"].to_pylist() == list(range(evaluated["rows"]))
    right = pa.compute.equal(table["label"], table["prediction"])
    assert pa.compute.mean(right).as_py() == pytest.approx(said["metrics"]["test/accuracy"], abs=1e-12)
    code, out, _ = manta("predict", runs / "digits", "--out", "predictions.jsonl")
    assert code == 0
    assert f"test/accuracy           {said['metrics']['test/accuracy']:.4f}\n" in out
    assert [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()] == table.to_pylist()


def test_images_are_told_line_by_line(manta, runs, images):
    code, out, err = manta("predict", runs / "digits", images / "0" / "0.png")
    assert (code, err) == (0, "")
    assert out.startswith(f"{images}/0/0.png  ")
    assert out.count("%") == 3
    code, out, err = manta("predict", runs / "digits", images)
    assert out.count("\n") == 20
    assert "all/accuracy" in err
    said = json.loads(manta("predict", runs / "digits", images, "--unlabelled", "--json")[1])
    assert said["metrics"] == {}
    assert "label" not in said["rows"][0]
    Image.fromarray(PIXELS[0]).resize((20, 20)).save(images / "0" / "large.png")
    assert manta("predict", runs / "digits", images / "0" / "large.png", "--resize")[0] == 0


def test_standard_input(manta, runs, stdin):
    stdin(*({"input": image[None].tolist()} for image in PIXELS[:3]))
    code, out, err = manta("predict", runs / "digits", "-", "--json")
    assert (code, err) == (0, "")
    assert [row["row"] for row in json.loads(out)["rows"]] == [0, 1, 2]
    stdin({"text": "1 up", "label": "odd"}, "", {"text": "2 down", "label": "even"})
    said = json.loads(manta("predict", runs / "texts", "-", "--json")[1])
    assert said["metrics"]["all/accuracy"] in (0, 0.5, 1)
    assert [row["label"] for row in said["rows"]] == ["odd", "even"]


def test_a_text(manta, runs):
    code, out, _ = manta("predict", runs / "texts", "--text", "1 up", "--json")
    assert code == 0
    assert set(json.loads(out)) == {"prediction", "probability", "top", "top_probability"}
    assert manta("predict", runs / "texts", "--text", "1 up")[1].split()[0] in ("odd", "even")


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("autoencoder", [], "autoencoder gives rows again, and predicts nothing of them; use `manta encode"),
        ("gan", [], "gan makes rows, and predicts nothing of any; use `manta generate"),
        ("", [], "not a run's directory (model/recipe.yaml is missing)"),
        ("digits", ["wines"], "data.kind: unknown kind 'wines'"),
        ("digits", ["{kind: sklearn, table: wine}"], "DATA: the rows of sklearn are features 13 float32, but the"),
        ("digits", ["fashion.png"], "DATA: fashion.png: no such file or folder; check the path"),
        ("digits", ["digits", "--split", "test"], "--split: digits is taken as a whole"),
        ("digits", ["bad.png"], "bad.png: 8 bytes in no known image format; replace or remove it"),
        ("digits", ["large.png"], "large.png: 9x9 pixels where the model was trained on 8x8; set --resize to"),
        ("digits", ["strange"], "DATA: labels that the model does not know: 'cat' (it knows 0, 1, 2, 3, 4, …); rename"),
        ("digits", ["empty"], "DATA: empty holds no images; give a folder that has some"),
        ("digits", ["rows.csv"], "rows.csv: no column 'input'; known: label, text"),
        ("digits", ["notes.txt"], "notes.txt: a text, where the model reads an image; give one of .parquet"),
        ("texts", ["bad.png"], "bad.png: no file of rows, where the model reads tokens; give one of .parquet"),
        ("texts", ["rows.csv", "--label", "lable"], "/rows.csv; did you mean label?"),
        ("texts", ["strange.csv"], "DATA: labels that the model does not know: 'cat' (it knows even, odd)"),
        ("texts", ["gaps.csv"], "gaps.csv, column text, row 1: nothing in it that the model reads; drop such rows"),
        ("texts", ["rows.csv", "--split", "test"], "--split: files have no splits; leave it out"),
        ("digits", ["--text", "1 up"], "its model reads no text (input: image 1 x 8 x 8); name a file of rows"),
        ("texts", ["rows.csv", "--text", "1 up"], "DATA: a text is given already, with --text; leave one of them out"),
        ("texts", ["rows.csv", "--parser", "x"], "--parser: it finds the tree of one sentence; give that with --text"),
        ("digits", ["--out", "there.parquet"], "--out: there.parquet is there already; give --overwrite to replace"),
        ("digits", ["--workers", "2"], "--workers: there is no file to write; name one with --out"),
        ("digits", ["--overwrite"], "--overwrite: there is no file to write; name one with --out"),
        ("digits", ["--workers", "two", "--out", "x.parquet"], "--workers: 'two' is not a number of workers; give"),
        ("digits", ["--address", "x:1", "--out", "x.parquet"], "--address: this process predicts alone; say how many"),
        ("texts", ["-", "--workers", "2", "--out", "x.parquet"], "--workers: standard input is read once, and by one"),
        ("digits", ["--out", "rows.xlsx"], "--out: 'rows.xlsx' is not the name of a Parquet or JSON-lines file"),
        ("digits", ["--out", "no/rows.parquet"], "no is not a folder; make it first, or choose another place"),
    ],
)
def test_what_is_refused(refused, runs, tmp_path, monkeypatch, run, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no image")
    for folder in ("strange/cat", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(PIXELS[0]).save("strange/cat/1.png")
    Image.fromarray(PIXELS[0]).resize((9, 9)).save("large.png")
    (tmp_path / "rows.csv").write_text("text,label\n1 up,odd\n")
    (tmp_path / "strange.csv").write_text("text,label\n1 up,cat\n")
    (tmp_path / "gaps.csv").write_text("text,label\n1 up,odd\n,odd\n")
    (tmp_path / "notes.txt").write_text("1 up\n")
    (tmp_path / "there.parquet").write_bytes(b"something")
    assert message in refused("predict", runs / run, *arguments)
    assert (tmp_path / "there.parquet").read_bytes() == b"something"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "1 up"'], "standard input, line 1: no JSON ("),
        (["[1]"], "standard input, line 1: list, and no object"),
        (['{"texts": "1 up"}'], "standard input, row 0: no column 'text'; did you mean texts?"),
        (['{"text": "1 up"}', '{"text": null}'], "standard input: column text has 1 empty values"),
        ([], "standard input: no rows"),
    ],
)
def test_standard_input_that_is_refused(refused, runs, stdin, lines, message):
    stdin(*lines)
    assert message in refused("predict", runs / "texts", "-", "--json")


def test_what_images_classes_go_by_is_drawn(manta, runs, images, tmp_path):
    picture = tmp_path / "seen.png"
    code, out, err = manta("predict", runs / "digits", images, "--explain", picture)
    assert code == 0
    assert len(out.splitlines()) == 20
    assert err.splitlines()[-1] == str(picture)
    with Image.open(picture) as drawn:  # 20 images of 32 pixels with 2 between, each beside its own: 4 a line
        assert drawn.size == (8 * 34 + 2, 5 * 34 + 2)
    code, _, err = manta("predict", runs / "digits", images, "--explain", picture)
    assert (code, err) == (2, f"error: --explain: {picture} exists; replace it with --overwrite\n")
    assert manta("predict", runs / "digits", images, "--explain", picture, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("run", "data", "name", "said"),
    [
        ("digits", None, "seen.txt", "--explain: 'seen.txt' is not the name of a PNG file"),
        ("texts", None, "seen.png", "predicts no classes of images"),
        ("digits", "-", "seen.png", "--explain: standard input is read once"),
    ],
)
def test_what_cannot_be_drawn(manta, runs, stdin, run, data, name, said):
    stdin({"input": [0] * 64})
    code, out, err = manta("predict", runs / run, *([data] if data else []), "--explain", name)
    assert (code, out) == (2, "")
    assert said in err
