"""Texts with labels on the command line: what cannot be used is one clear line."""

import json

import pytest

import cluster

GOOD = [{"text": f"row {number}", "label": "ab"[number % 2]} for number in range(20)]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("a.csv", "", "", "{path}: an empty file; give one with rows"),
        ("a.csv", "text,label\n", "", "{path}: no rows in there; give files with some"),
        (
            "a.csv",
            "Text;Label\nhm;1\n",
            "",
            "{path}: no column 'text'; separate values by ',' and not by ';': Text;Label",
        ),
        ("a.csv", "content,label\nhm,1\n", "", "{path}: no column 'text'; known: content, label"),
        (
            "a.csv",
            "text,label\na,1\nb,2,c\n",
            "",
            "{path}, row 1: 3 values where the header has 2 names: 'b,2,c'; quote",
        ),
        (
            "a.csv",
            b"text,label\n\xe4,1\nb,2\n",
            "",
            "{path}: no UTF-8 text (byte 11); convert it to UTF-8, or mend the",
        ),
        ("a.csv", b"text,label\n\0,1\nb,2\n", "", "{path}: no UTF-8 text (a zero at byte 11); convert it to UTF-8"),
        ("a.csv", "text,label\na,1\n,2\n", "", "{path}, row 1: no text in column text; drop the row, or mend it"),
        (
            "a.csv",
            "text,label\na,1\nb,\nc,2\n",
            "",
            "{path}, row 1: no label in column label; drop the row, or mend it",
        ),
        ("a.csv", "text,label\na,1\nb,1\n", "", "{path}: column label holds 1 class; at least two are needed"),
        ("a.jsonl", lines({"text": "a", "label": 1}, {"label": 2}), "", "{path}, row 1: no text in column text; drop"),
        (
            "a.jsonl",
            lines({"text": " ", "label": 1}, {"text": "a", "label": 2}),
            "",
            "{path}, row 0: no word in column",
        ),
        (
            "a.jsonl",
            lines({"text": [], "label": 1}, {"text": ["a"], "label": 2}),
            "",
            "{path}, row 0: no text in column",
        ),
        (
            "a.jsonl",
            lines({"text": 5, "label": 1}, {"text": 6, "label": 2}),
            "",
            "column text: values of type int64 are",
        ),
        (
            "a.jsonl",
            lines({"text": ["a"], "label": 1}, {"text": ["b"], "label": 2}),
            "unit: bytes",
            "which are no bytes",
        ),
        ("a.jsonl", lines(*GOOD) + "{", "", "{path}, row 20: no JSON lines that can be read ("),
        ("a.txt", "text,label\na,1\n", "", "{path}: the name of a file of rows ends in .parquet .pq .csv"),
        ("a.csv", None, "", "data.path: {path}: no such file or folder"),
        ("a.csv", "text,label\na,1\nb,2\n", "label: text", "data: text is the text too, so there would be nothing to"),
        ("a.csv", "text,label\na,1\nb,2\n", "group: who", "{path}: no column 'who'; known: label, text"),
        (
            "a.csv",
            "text,label\na,1\nb,2\n",
            "max_words: 1",
            "data.max_words: must be greater than or equal to 2, not 1",
        ),
        ("a.csv", "text,label\na,1\nb,2\n", "test_path: b.csv", "data.test_path: "),
    ],
)
def test_rows_that_cannot_be_classified(refused, tmp_path, name, content, fields, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    section = f"{{kind: text_classification, path: {path}, validation_fraction: 0, test_fraction: 0, {fields}}}"
    told = refused("data", "prepare", section, "--out", tmp_path / "out")
    assert message.format(path=path) in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"tokens": ["a", "b"], "labels": ["X"]}],
            "{path}, row 0: 1 labels for 2 tokens in column tokens; drop the",
        ),
        ([{"tokens": "a b", "labels": "X Y X"}], "{path}, row 0: 3 labels for 2 tokens in column tokens; drop the"),
        (
            [{"tokens": ["a", None], "labels": ["X", "Y"]}],
            "{path}, row 0: an empty value in column tokens; drop the row",
        ),
        ([{"tokens": ["a", "b"], "labels": ["X", None]}], "{path}, row 0: no label in column labels; drop the row"),
        ([{"tokens": ["a", "b"]}], "{path}, row 0: no label in column labels; drop the row"),
        ([{"labels": ["X", "Y"]}], "{path}, row 0: no text in column tokens; drop the row"),
    ],
)
def test_rows_whose_tokens_cannot_be_labelled(refused, tmp_path, rows, message):
    path = tmp_path / "a.jsonl"
    as_text = isinstance(rows[0].get("labels"), str)
    good = {"tokens": "a b", "labels": "X Y"} if as_text else {"tokens": ["a", "b"], "labels": ["X", "Y"]}
    path.write_text(lines(*rows, good))
    section = f"{{kind: sequence_labelling, path: {path}, validation_fraction: 0, test_fraction: 0}}"
    told = refused("data", "prepare", section, "--out", tmp_path / "out")
    assert message.format(path=path) in told
    assert "\n" not in told


def test_all_bad_rows_are_told(refused, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*GOOD, {"text": "", "label": "a"}))
    (tmp_path / "b.jsonl").write_text(lines({"text": "a"}, {"text": None, "label": "a"}))
    told = refused("data", "prepare", f"{{kind: text_classification, path: {tmp_path}}}", "--out", tmp_path / "out")
    assert [line.partition(", ")[2] for line in told.splitlines()] == [
        "row 20: no text in column text; drop the row, or mend it",
        "row 1: no text in column text; drop the row, or mend it",
        "row 0: no label in column label; drop the row, or mend it",
    ]


def test_a_label_of_the_validation_rows_alone(refused, manta, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*GOOD))
    (tmp_path / "b.jsonl").write_text(lines({"text": "a", "label": "c"}))
    section = f"{{kind: text_classification, path: {tmp_path}/a.jsonl, validation_path: {tmp_path}/b.jsonl}}"
    told = refused("data", "prepare", section, "--out", tmp_path / "out")
    assert (
        told == f"{tmp_path}/b.jsonl, row 0: no training row has the label 'c'; drop such rows, or add some to train on"
    )
    (tmp_path / "c.jsonl").write_text(lines(*GOOD, {"text": "a", "label": "c"}))
    section = f"{{kind: text_classification, path: {tmp_path}/c.jsonl, split_seed: 1, stratify: false}}"
    code, _, err = manta("data", "prepare", section, "--out", tmp_path / "held-out")
    assert code == 0
    assert "WARNING: data: no training row is of the class c" in err


def test_a_folder_without_files(refused, tmp_path):
    told = refused("data", "prepare", f"{{kind: text_classification, path: {tmp_path}}}", "--out", tmp_path / "out")
    assert told.startswith(f"data.path: {tmp_path}: no .parquet .pq .csv .tsv .tab .jsonl .ndjson .json files in this")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.jsonl").write_text(lines(*GOOD))
    recipe = {
        "model": {"kind": "gru", "hidden": 4, "embedding": 4},
        "data": {"kind": "text_classification", "path": str(folder / "a.jsonl")},
        "objective": {"kind": "classification"},
        "train": {"epochs": 1, "global_batch_size": 8},
    }
    return cluster.train(recipe, run=str(folder / "run")).run


def test_words_that_a_model_does_not_know_are_counted(manta, run, tmp_path):
    (tmp_path / "b.csv").write_text("text,label\nrow 7000,a\nrow of gadgets,b\n")
    data = f"{{kind: text_classification, path: {tmp_path}/b.csv, test_fraction: 0, validation_fraction: 0}}"
    code, out, err = manta("evaluate", run, "--data", data, "--split", "train", "--json")
    assert code == 0
    assert json.loads(out)["rows"] == 2
    assert "data: 3 of 5 tokens (60 %) of input in train are not in the vocabulary of " in err


def test_a_class_that_a_model_does_not_know(refused, run, tmp_path):
    (tmp_path / "b.csv").write_text("text,label\nrow,a\nrow,c\n")
    data = f"{{kind: text_classification, path: {tmp_path}/b.csv, test_fraction: 0, validation_fraction: 0}}"
    told = refused("evaluate", run, "--data", data, "--split", "train")
    assert (
        told == f"{tmp_path}/b.csv, row 1: no training row has the label 'c'; drop such rows, or add some to train on"
    )
