"""Predictions of rows: a split's figures are those that `evaluate` has; files of the same rows say the same."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import cluster
from cluster.data.prepare import prepared
from cluster.inference import predictions, rows
from cluster.inference.predict import predict_text
from cluster.inference.predictions import Prediction
from cluster.runs import given_files
from nn_models.errors import UserError
from tests.unit import made

TRAIN = {"epochs": 1, "global_batch_size": 32}
LISTOPS = {"kind": "listops", "rows": 300, "depth": 2, "length": 12}
TEXTS = [(f"{number} {'up' if number % 2 else 'down'} end", "odd" if number % 2 else "even") for number in range(60)]


def recipes(folder: Path) -> dict:
    """One of each way in which outputs say something of rows."""
    texts = [{"text": text, "label": label} for text, label in TEXTS]
    tags = [{"tokens": f"a{n % 7} b{n % 3} c", "labels": f"{n % 2} 1 0"} for n in range(60)]
    for name, found in (("texts", texts), ("tags", tags)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "book.txt").write_text("the cat sat on the mat. " * 200)
    lstm = {"kind": "lstm", "hidden": 6, "embedding": 4}
    tree = {"kind": "tree_lstm", "hidden": 5, "embedding": 4}
    text = {"kind": "text_classification", "path": str(folder / "texts.jsonl"), "max_length": 3}
    return {
        "digits": {"model": {"kind": "mlp", "hidden": [16]}, "data": {"kind": "digits"}},
        "numbers": {
            "model": {"kind": "mlp", "hidden": [4]},
            "data": {"kind": "sklearn", "table": "diabetes"},
            "objective": {"kind": "regression"},
        },
        "several": {
            "model": {"kind": "gru", "hidden": 4},
            "data": {"kind": "series", "path": str(folder / "series.csv"), "target": "y", "window": 6, "horizon": 2},
            "objective": {"kind": "forecast"},
        },
        "texts": {"model": lstm, "data": text},
        "tags": {
            "model": lstm,
            "data": {"kind": "sequence_labelling", "path": str(folder / "tags.jsonl")},
            "objective": {"kind": "step_labels"},
        },
        "book": {
            "model": lstm,
            "data": {"kind": "text", "path": str(folder / "book.txt"), "window": 8},
            "objective": {"kind": "next_token"},
        },
        "roots": {"model": tree, "data": LISTOPS},
        "nodes": {"model": tree, "data": {**LISTOPS, "labels": "nodes"}, "objective": {"kind": "node_labels"}},
        "parser": {
            "model": {"kind": "parser", "hidden": 8, "embedding": 4},
            "data": LISTOPS,
            "objective": {"kind": "parsing"},
        },
        "scenes": {
            "model": {"kind": "scene_parser", "hidden": 8},
            "data": {"kind": "scenes", "rows": 100},
            "objective": {"kind": "scene_parsing"},
        },
    }


NAMES = ["digits", "numbers", "several", "texts", "tags", "book", "roots", "nodes", "parser", "scenes"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    steps = np.arange(80)
    pa.csv.write_csv(pa.table({"t": steps, "y": np.sin(steps / 3.0)}), folder / "series.csv")
    found = {}
    for name, recipe in recipes(folder).items():
        found[name] = cluster.train({"name": name, "train": TRAIN, **recipe}, run=str(folder / name)).run
    return found


def predicted(run, data=None, **options) -> tuple[pa.Table, dict]:
    prediction = Prediction(run, data, **options)
    return pa.concat_tables(prediction.tables()), prediction.metrics()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows_at_once", [given_files.PART_ROWS, 500])
def test_a_splits_figures_are_those_of_evaluate(runs, name, rows_at_once, monkeypatch):
    monkeypatch.setattr(given_files, "PART_ROWS", rows_at_once)
    for split in ("test", "train"):
        table, metrics = predicted(runs[name], splits=(split,))
        evaluated = cluster.evaluate(runs[name], split=split)
        assert metrics == evaluated["metrics"]  # to the last bit
        assert table["row"].to_pylist() == list(range(evaluated["rows"]))


def test_what_is_said_of_classes_is_what_the_opened_model_says(runs):
    model = cluster.open_model(runs["digits"])
    held = made.split_rows(prepared(model.recipe.data), "test")
    pixels, labels = (held.columns[name].values for name in ("input", "target"))
    table, _ = predicted(runs["digits"], top=3)
    assert table["prediction"].to_pylist() == model.predict(pixels)
    assert table["label"].to_pylist() == [model.classes[number] for number in labels]
    likely = torch.cat([model(piece) for piece in torch.from_numpy(pixels).split(500)]).softmax(1)
    sure, places = likely.topk(3, 1)
    assert table["top_probability"].to_pylist() == sure.tolist()
    assert table["top"].to_pylist() == [[model.classes[place] for place in row] for row in places.tolist()]
    assert table["probability"].to_pylist() == sure[:, 0].tolist()
    assert "top" not in predicted(runs["digits"], top=1)[0].column_names


def test_numbers_are_in_their_units(runs):
    model = cluster.open_model(runs["numbers"])
    x = made.split_rows(prepared(model.recipe.data), "test").columns["input"].values
    assert predicted(runs["numbers"])[0]["prediction"].to_pylist() == model.predict(x).flatten().tolist()


def test_elements_have_a_list_a_row(runs):
    tags, _ = predicted(runs["tags"])
    assert tags.column_names == ["split", "row", "prediction", "probability"]
    assert {len(row) for row in tags["prediction"].to_pylist()} == {3}
    nodes, _ = predicted(runs["nodes"])
    for row in nodes.to_pylist():
        assert (row["prediction"], row["probability"]) == (row["elements"][-1], row["element_probability"][-1])
    data = made.split_rows(prepared(cluster.open_model(runs["nodes"]).recipe.data), "test")
    assert [len(tree) for tree in nodes["elements"].to_pylist()] == data.columns["input"].lengths.tolist()


def test_images_in_files(runs, tmp_path):
    model = cluster.open_model(runs["digits"])
    held = made.split_rows(prepared(model.recipe.data), "test")
    pixels, labels = (held.columns[name].values[:40] for name in ("input", "target"))
    for row, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        place = tmp_path / "digits" / model.classes[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(place / f"{row:02}.png")
    table, metrics = predicted(runs["digits"], str(tmp_path / "digits"))
    found = {row["file"].rpartition("/")[2]: row for row in table.to_pylist()}
    wanted = model.predict(pixels)
    assert [found[f"{row:02}.png"]["prediction"] for row in range(40)] == wanted
    assert metrics["all/accuracy"] == np.mean([a == model.classes[b] for a, b in zip(wanted, labels, strict=True)])
    first = next((tmp_path / "digits").rglob("00.png"))
    alone, none = predicted(runs["digits"], str(first))
    assert (alone["prediction"].to_pylist(), none) == (wanted[:1], {})
    assert model.predict(first) == model.predict(str(first)) == wanted[:1]
    assert model.predict([first, str(first)]) == wanted[:1] * 2
    assert sorted(model.predict(tmp_path / "digits")) == sorted(wanted)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_tables(runs, tmp_path, ending):
    model = cluster.open_model(runs["numbers"])
    held = made.split_rows(prepared(model.recipe.data), "test")
    x, y = (held.columns[name].values for name in ("input", "target"))
    table = pa.table({name: x[:, place] for place, name in enumerate(model.recipe.data.file_columns.input)})
    file = tmp_path / f"rows.{ending}"

    def write(rows: pa.Table) -> None:
        if ending == "parquet":
            pq.write_table(rows, file, row_group_size=37)
        elif ending == "csv":
            pa.csv.write_csv(rows, file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()))

    write(table)
    wanted, own = predicted(runs["numbers"])
    found, none = predicted(runs["numbers"], str(file))
    assert none == {}
    # other rows are computed together than in the split: the sums of a product may be of another order
    np.testing.assert_allclose(found["prediction"].to_numpy(), wanted["prediction"].to_numpy(), rtol=1e-5)
    assert found["row"].to_pylist() == list(range(len(x)))
    write(table.append_column("target", pa.array(y[:, 0])))
    _, metrics = predicted(runs["numbers"], str(file))
    assert metrics["all/mae"] == pytest.approx(own["test/mae"], rel=1e-5)
    assert predicted(runs["numbers"], str(file), labelled=False)[1] == {}
    assert len(model.predict(file)) == len(x)


def test_parts_of_a_large_row_group_may_be_read_in_any_order(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(given_files, "PIECE_ROWS", 70)
    monkeypatch.setattr(given_files, "part_rows", lambda columns: 100)
    model = cluster.open_model(runs["numbers"])
    names = model.recipe.data.file_columns.input
    x = np.random.default_rng(0).normal(size=(1030, len(names)))
    pq.write_table(pa.table(dict(zip(names, x.T, strict=True))), tmp_path / "rows.parquet", row_group_size=430)
    used = rows.rows_of(model, str(tmp_path / "rows.parquet")).rows
    assert [part.rows for part in used.parts] == [100, 100, 100, 100, 30] * 2 + [100, 70]
    inside = [[*used.read(part)] for part in used.parts]
    for place in (4, 0, 11, 3, 2, 7):
        again = [*used.read(used.parts[place])]
        assert [len(piece) for piece in again] == [len(piece) for piece in inside[place]]
        for one, two in zip(again, inside[place], strict=True):
            np.testing.assert_array_equal(one.input, two.input)
    flat = [piece for part in inside for piece in part]
    np.testing.assert_array_equal(np.concatenate([piece.input for piece in flat]), x.astype(np.float32))
    assert np.concatenate([piece.ids for piece in flat]).tolist() == list(range(1030))


def test_texts_in_files(runs, tmp_path):
    model = cluster.open_model(runs["texts"])
    (tmp_path / "texts.txt").write_text("1 up end of it\n\n2 down end\n")
    table, _ = predicted(runs["texts"], str(tmp_path / "texts.txt"))
    assert table["row"].to_pylist() == [0, 1]
    # of a text as many tokens are read as of those that it was trained on
    wanted = model.predict(["1 up end", "2 down end"])
    assert table["prediction"].to_pylist() == wanted == model.predict(tmp_path / "texts.txt")
    assert predict_text(runs["texts"], "1 up end of it")["prediction"].to_pylist() == wanted[:1]
    with pytest.raises(UserError, match=r"input: .*no such file"):
        model.predict(tmp_path / "gone.txt")
    assert model.predict(["1 up end"]) == wanted[:1]  # a text is a row, and no path


def test_what_follows_a_text(runs):
    model = cluster.open_model(runs["book"])
    row = predict_text(runs["book"], "the c", top=3).to_pylist()[0]
    with torch.no_grad():
        scores = model.net(torch.from_numpy(model.vocabulary.numbers("the c", path="")[None]))
    likely = scores[-1:].softmax(1).topk(3, 1)
    assert row["top"] == [model.vocabulary.names[number] for number in likely.indices[0].tolist()]
    # alone as a row of its length, and as one of rows of any
    assert row["top_probability"] == pytest.approx(likely.values[0].tolist(), rel=1e-5)


def test_trees_and_sentences_in_files(runs, tmp_path):
    (tmp_path / "trees.txt").write_text("((([MAX 2) 9) ])\n(2 3)\n")
    model = cluster.open_model(runs["roots"])
    assert predicted(runs["roots"], str(tmp_path / "trees.txt"))[0]["prediction"].to_pylist() == model.predict(
        ["((([MAX 2) 9) ])", "(2 3)"]
    )
    (tmp_path / "sentences.txt").write_text("[MAX 2 9 ]\n2 3\n")
    parsed = cluster.open_model(runs["parser"]).predict(["[MAX 2 9 ]", "2 3"])
    table, metrics = predicted(runs["parser"], str(tmp_path / "sentences.txt"))
    assert (table["prediction"].to_pylist(), metrics) == (parsed, {})  # nobody knows their true trees


def test_windows_of_another_series(runs, tmp_path):
    model = cluster.open_model(runs["several"])
    y = np.cos(np.arange(20) / 2.0).astype(np.float32)
    pa.csv.write_csv(pa.table({"y": y}), tmp_path / "more.csv")
    table, metrics = predicted(runs["several"], str(tmp_path / "more.csv"))
    windows = np.lib.stride_tricks.sliding_window_view(y, 8)
    np.testing.assert_allclose(
        table["prediction"].to_pylist(), model(windows[:, :6, None]).numpy(), rtol=1e-5, atol=1e-6
    )
    error = np.abs(np.array(table["prediction"].to_pylist()) - windows[:, 6:]).mean()
    assert metrics["all/mae"] == pytest.approx(error, rel=1e-5)  # float32 of the file, and of the errors' sums


def test_rows_that_cannot_be_used_are_refused(runs, tmp_path):
    table = {"input": [np.zeros((1, 8, 8)).tolist()] * 2, "target": ["3", "cat"]}
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(dict(zip(table, row, strict=True))) + "\n" for row in zip(*table.values(), strict=True))
    )
    with pytest.raises(UserError, match=r"labels that the model does not know: 'cat'.*--unlabelled"):
        predicted(runs["digits"], str(tmp_path / "rows.jsonl"))
    assert predicted(runs["digits"], str(tmp_path / "rows.jsonl"), labelled=False)[0].num_rows == 2
    with pytest.raises(UserError, match="the classes of the rows"):
        predicted(runs["digits"], made_digits(tmp_path))
    assert len(predictions.opened_predictor(runs["digits"]).classes) == 10


def made_digits(folder):
    """Rows such as those of digits, with other classes."""
    from cluster.data.sources.image_folder import ImageFolderSpec

    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for row in range(5):
            Image.fromarray(np.full((8, 8), row, np.uint8)).save(folder / "images" / name / f"{row}.png")
    return ImageFolderSpec(path=str(folder / "images"), channels=1)
