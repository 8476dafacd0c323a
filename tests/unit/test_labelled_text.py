"""Rows of texts with a label each, or one for each token: the vocabulary is the training part's."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cluster
from cluster.data.prepare import prepared
from cluster.data.sources.text_files import SequenceLabellingSpec, TextClassificationSpec
from cluster.data.vocabulary import UNKNOWN, Vocabulary
from cluster.inference.evaluate import evaluate_run
from nn_models.errors import UserError

MARKS = st.characters(codec="utf-8", exclude_characters="\0")
TINY = {
    "model": {"kind": "gru", "hidden": 8, "embedding": 4},
    "train": {"epochs": 6, "global_batch_size": 8},
    "optimizer": {"kind": "adam", "lr": 0.02},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(data, split, column="input"):
    """The rows' tokens or labels by their names, as lists."""
    names, table = data.manifest.signature[column].names, data.table(split)
    if f"{column}.values" not in table.column_names:
        return [names[number] for number in table[column].to_pylist()]
    return [[names[number] for number in row] for row in table[f"{column}.values"].to_pylist()]


ROWS = [{"text": f"row {number} is {'bad' if number % 2 else 'good'}.", "label": number % 2} for number in range(40)]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_any_file_of_rows_holds_texts(ending, tmp_path):
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=16)
    elif ending == ".jsonl":
        json_lines(path, ROWS)
    else:
        mark = "," if ending == ".csv" else "\t"
        path.write_text("\n".join(mark.join(map(str, row)) for row in [("text", "label"), *(r.values() for r in ROWS)]))
    spec = TextClassificationSpec(path=str(path), validation_fraction=0.2, test_fraction=0.1)
    data = prepared(spec)
    assert [data.manifest.rows(split) for split in ("train", "validation", "test")] == [28, 8, 4]
    assert data.manifest.class_names == ("0", "1")
    assert data.manifest.signature["target"].counts == {"train": (14, 14), "validation": (4, 4), "test": (2, 2)}
    trained = read(data, "train")
    assert {word for row in trained for word in row} | {UNKNOWN} == set(data.manifest.signature["input"].names)
    assert all(len(row) == 5 and row[4] == "." for row in trained)
    for row, label in zip(trained, read(data, "train", "target"), strict=True):
        assert row[3] == ("bad" if label == "1" else "good")
    (first, *_), vocabulary = (
        data.table("train")["input.values"].to_pylist(),
        Vocabulary.of_column(data.manifest.signature["input"]),
    )
    assert "".join(vocabulary.spelled(first)) in {row["text"] for row in ROWS}
    # a number of a row that is not trained on is a word that no training row has
    assert all(row[1] == UNKNOWN for row in read(data, "validation"))
    assert data.manifest.signature["input"].unknown == {"train": (0, 140), "validation": (8, 40), "test": (4, 20)}


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(MARKS, min_size=1, max_size=30), min_size=4, max_size=12))
@pytest.mark.parametrize("unit", ["characters", "bytes"])
def test_texts_of_characters_and_bytes_are_spelled_again(texts, unit, tmp_path_factory):
    path = json_lines(
        tmp_path_factory.mktemp("rows") / "a.jsonl",
        [{"text": text, "label": number % 2} for number, text in enumerate(texts)],
    )
    data = prepared(TextClassificationSpec(path=path, unit=unit, validation_fraction=0, test_fraction=0))
    vocabulary = Vocabulary.of_column(data.manifest.signature["input"])
    rows = data.table("train")["input.values"].to_pylist()
    assert ["".join(vocabulary.spelled(row)) for row in rows] == texts


def test_rare_words_are_unknown_and_counted(tmp_path, caplog):
    words = ["a"] * 4 + ["b"] * 3 + ["c"] * 2 + ["d"]
    path = json_lines(tmp_path / "a.jsonl", [{"text": word, "label": number % 2} for number, word in enumerate(words)])
    whole = {"path": path, "validation_fraction": 0, "test_fraction": 0}
    assert prepared(TextClassificationSpec(**whole)).manifest.signature["input"].names == (UNKNOWN, *"abcd")
    assert prepared(TextClassificationSpec(**whole, min_count=3)).manifest.signature["input"].names == (UNKNOWN, *"ab")
    with caplog.at_level(logging.INFO):
        few = prepared(TextClassificationSpec(**whole, max_words=3)).manifest
    assert few.signature["input"].names == (UNKNOWN, *"ab")
    assert "data: 3 of 10 tokens (30 %) of input in train are not in the vocabulary of 3" in caplog.text
    with pytest.raises(
        UserError, match=r"data.min_count: no token of the training rows comes 9 times; set a lower one"
    ):
        prepared(TextClassificationSpec(**whole, min_count=9))


def test_words_that_are_given_apart_stay_apart(tmp_path):
    rows = [{"text": ["New York", "is\u00a0n't", UNKNOWN], "label": "x"}, {"text": ["a"], "label": "y"}]
    spec = TextClassificationSpec(path=json_lines(tmp_path / "a.jsonl", rows), validation_fraction=0, test_fraction=0)
    assert read(prepared(spec), "train") == [["New York", "is\u00a0n't", UNKNOWN], ["a"]]


@pytest.mark.parametrize(
    ("unit", "rows"),
    [
        ("words", [{"tokens": ["a b", "c"], "labels": ["X", "Y"]}, {"tokens": ["c"], "labels": ["X"]}]),
        ("words", [{"tokens": "a\u00a0b  c", "labels": "X Y "}, {"tokens": "c", "labels": "X"}]),
        ("characters", [{"tokens": "äc", "labels": ["X", "Y"]}, {"tokens": "c", "labels": ["X"]}]),
        ("bytes", [{"tokens": "ä", "labels": [1, 2]}, {"tokens": "c", "labels": [1]}]),
    ],
)
def test_each_token_has_its_label(unit, rows, tmp_path):
    path = json_lines(tmp_path / "a.jsonl", rows)
    data = prepared(SequenceLabellingSpec(path=path, unit=unit, validation_fraction=0, test_fraction=0))
    first, second = data.manifest.signature["target"].names
    assert read(data, "train", "target") == [[first, second], [first]]
    assert [len(row) for row in read(data, "train")] == [2, 1]


def test_long_texts_are_cut_with_their_labels(tmp_path):
    path = json_lines(tmp_path / "a.jsonl", [{"tokens": "a b c", "labels": "X Y X"}, {"tokens": "a", "labels": "X"}])
    spec = SequenceLabellingSpec(path=path, max_length=2, validation_fraction=0, test_fraction=0)
    assert read(prepared(spec), "train") == [["a", "b"], ["a"]]
    assert read(prepared(spec), "train", "target") == [["X", "Y"], ["X"]]


def test_splits_may_stand_apart_and_groups_stay_together(tmp_path):
    train = json_lines(tmp_path / "a.jsonl", [{"text": f"w{n}", "label": n % 2, "who": n // 8} for n in range(80)])
    other = json_lines(tmp_path / "b.jsonl", [{"text": "w1 w99", "label": 1, "who": "other"}])
    data = prepared(TextClassificationSpec(path=train, validation_path=other, test_fraction=0.2, group="who"))
    assert read(data, "validation")[0][1] == UNKNOWN
    tested = {int(name[0][1:]) // 8 for name in read(data, "train")}
    assert data.manifest.rows("test") == 16
    assert len(tested) == 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained classifier of ROWS."""
    folder = tmp_path_factory.mktemp("run")
    data = {"kind": "text_classification", "path": json_lines(folder / "a.jsonl", ROWS)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANTA_CACHE", str(folder / "cache"))
        return cluster.train({**TINY, "data": data, "objective": {"kind": "classification"}}, run=str(folder / "b")).run


def test_other_data_is_read_with_the_models_vocabulary(run, tmp_path, caplog):
    rows = [{"words": f"gadget {row['text']}", "label": row["label"]} for row in ROWS]
    other = TextClassificationSpec(
        path=json_lines(tmp_path / "b.jsonl", rows), text="words", validation_fraction=0, test_fraction=0
    )
    with caplog.at_level(logging.INFO):
        found = evaluate_run(run, data=other, split="train")
    assert found["rows"] == 40
    assert "data: 48 of 240 tokens (20 %) of input in train are not in the vocabulary of 38" in caplog.text
    in_characters = other.model_copy(update={"unit": "characters"})  # which the model has not learned
    assert evaluate_run(run, data=in_characters, split="train")["metrics"] == found["metrics"]
    strange = json_lines(tmp_path / "c.jsonl", [{"text": "a", "label": 7}, {"text": "a", "label": 1}])
    with pytest.raises(UserError, match="row 0: no training row has the label '7'"):
        evaluate_run(run, data=TextClassificationSpec(path=strange, validation_fraction=0, test_fraction=0))


def test_a_model_is_given_texts(run, caplog):
    model = cluster.open_model(run)
    texts = ["row 1 is bad.", "what is good ?"]
    as_words = [["row", "1", "is", "bad", "."], np.array(["what", "is", "good", "?"])]
    assert model.predict(texts) == model.predict(as_words) == ["1", "0"]
    assert "input: 2 tokens are not in the vocabulary: 'what', '?'" in caplog.text


def test_labels_of_tokens_are_predicted_by_name(tmp_path):
    rows = [{"tokens": "a b b a", "labels": "X Y Y X"}, {"tokens": "b a", "labels": "Y X"}] * 20
    data = {"kind": "sequence_labelling", "path": json_lines(tmp_path / "a.jsonl", rows)}
    recipe = {**TINY, "data": data, "objective": {"kind": "step_labels"}}
    model = cluster.train(recipe, run=str(tmp_path / "run")).load_model()
    assert model.predict(["b b a", ["a"]]) == ["Y", "Y", "X", "X"]
