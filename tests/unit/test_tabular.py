"""Rows of a user's files by the names of their columns: what cannot be read is named, where it can with the row."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.data.tabular import TabularFile, found_files
from nn_models.errors import UserError


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return TabularFile(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n"one, two",1\nüß,2\n'),
        ("a.CSV", '\ufefftext,label\r\n"one, two",1\r\nüß,2\r\n'),
        ("a.tsv", "label\ttext\n1\tone, two\n2\tüß\n"),
        ("a.jsonl", '{"text": "one, two", "label": 1}\n\n{"label": 2, "text": "üß", "other": [1]}\n'),
    ],
)
def test_a_file_is_what_its_name_says(name, content, tmp_path):
    file = written(tmp_path, name, content)
    assert file.read(["label", "text"]).to_pydict() == {"label": [1, 2], "text": ["one, two", "üß"]}
    assert file.row_groups("text") == [2]
    assert {"text", "label"} <= set(file.columns)
    assert file.where(0) == file.name


def test_parquet_is_read_by_row_groups(tmp_path):
    table = pa.table({"text": ["a", "b", "c"], "label": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    file = TabularFile(str(tmp_path / "a.parquet"))
    assert (file.columns, file.row_groups("text")) == (["text", "label"], [2, 1])
    assert file.read(["label"], 1).to_pydict() == {"label": [3]}
    assert file.read(["label", "text"]).equals(table.select(["label", "text"]))
    assert file.where(1) == f"{file.name}, row group 1"


@pytest.mark.parametrize(
    ("name", "content", "plain", "as_text"),
    [
        ("a.csv", "a\n01\nNA\n", [1, None], ["01", "NA"]),
        ("a.csv", "a\n01\n2\n", [1, 2], ["01", "2"]),
        ("a.csv", "a,b\n,1\nNA,1\n", [None, None], ["", "NA"]),
        ("a.jsonl", '{"a": "2001-02-03"}', None, ["2001-02-03"]),
        ("a.jsonl", '{"a": ["2001-02-03", "x"]}\n{"a": []}', [["2001-02-03", "x"], []], [["2001-02-03", "x"], []]),
        ("a.jsonl", '{"a": ["2001-02-03"]}', None, [["2001-02-03"]]),
    ],
)
def test_text_stays_text_where_it_is_asked_for(name, content, plain, as_text, tmp_path):
    file = written(tmp_path, name, content)
    assert file.read(["a"], texts=["a"])["a"].to_pylist() == as_text
    if plain is not None:
        assert file.read(["a"])["a"].to_pylist() == plain


def test_one_row_past_the_first_megabytes_has_a_say_in_the_type(tmp_path):
    rows = "a\n" + "12345\n" * 400_000
    assert written(tmp_path, "a.csv", rows + "0.5\n").read(["a"])["a"].type == pa.float64()
    assert written(tmp_path, "b.csv", rows + "x\n").read(["a"])["a"].type == pa.string()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a\n1\n", "{path}: the name of a file of rows ends in .parquet"),
        ("a.csv", "", "{path}: an empty file; give one with rows"),
        ("a.csv", "\n\n", "{path}: an empty file"),
        ("a.csv", "labels,text\n1,2\n", "{path}: no column 'label'; did you mean labels?"),
        ("a.csv", "x,y\n1,2\n", "{path}: no column 'label'; known: x, y"),
        ("a.csv", "label;y\n1;2\n", "{path}: no column 'label'; separate values by ',' and not by ';': label;y"),
        ("a.tsv", "label,y\n1,2\n", "{path}: no column 'label'; separate values by '\\t' and not by ',': label,y"),
        ("a.csv", "label,label\n1,2\n", "{path}: 2 columns are named 'label'; rename them"),
        (
            "a.csv",
            "label,b\n1,2\n1,2,3\n",
            "{path}, row 1: 3 values where the header has 2 names: '1,2,3'; quote values",
        ),
        ("a.csv", b"label\nA\xe4\n", "{path}: no UTF-8 text (byte 7); convert it to UTF-8, or mend the file"),
        ("a.csv", b"label\n" + b"a" * 70000 + "ä".encode()[:1], "{path}: no UTF-8 text (byte 70006)"),
        ("a.csv", "label\n".encode("utf-16"), "{path}: no UTF-8 text (a zero at byte 3)"),
        ("a.jsonl", b'{"label": "a\0"}', "{path}: no UTF-8 text (a zero at byte 12)"),
        ("a.jsonl", " \n", "{path}: an empty file"),
        (
            "a.jsonl",
            '{"label": 1}\nrow two\n',
            "{path}, row 1: no JSON lines that can be read (Invalid value); mend the",
        ),
        ("a.jsonl", '{"label": 1}\n{"label": "a"}\n', "{path}, row 1: no JSON lines that can be read (Column(/label)"),
        ("a.json", '[{"label": 1}]', "{path}: one list, where each line should be an object; write a line for each"),
        ("a.jsonl", '{"lable": 1}\n', "{path}: no column 'label'; did you mean lable?"),
        ("a.parquet", "label", "{path}: not a readable Parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(name, content, message, tmp_path):
    with pytest.raises(UserError) as caught:
        written(tmp_path, name, content).read(["label"])
    assert message.format(path=tmp_path / name) in str(caught.value)


def test_bad_rows_are_told_together(tmp_path):
    with pytest.raises(UserError) as caught:
        written(tmp_path, "a.csv", "a,b\n1,2\n" + "1\n" * 30).read(["a"])
    assert len(caught.value.problems) == 21
    assert "row 1: 1 values" in str(caught.value)
    assert "10 more such rows" in str(caught.value)


def test_files_are_found_by_their_names(tmp_path):
    for name in ("b.csv", "a/c.jsonl", "notes.txt", ".hidden.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a\n1\n")
    assert [name for name, _ in found_files(str(tmp_path), field="data.path")] == [
        str(tmp_path / "a" / "c.jsonl"),
        str(tmp_path / "b.csv"),
    ]
    uri = (tmp_path / "b.csv").as_uri()
    assert [name for name, _ in found_files(uri, field="data.path")] == [uri]
    assert TabularFile(uri).read(["a"]).num_rows == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.csv", "data.path: {path}: no such file or folder"),
        ("empty", "data.path: {path}: no .parquet .pq .csv .tsv .tab .jsonl .ndjson .json files in this folder; give"),
    ],
)
def test_a_path_without_files_is_named(path, message, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        found_files(str(tmp_path / path), field="data.path")
    assert message.format(path=tmp_path / path) in str(caught.value)


def test_a_device_is_no_file():
    with pytest.raises(UserError, match=r"data\.path: /dev/zero: neither a file nor a folder"):
        found_files("/dev/zero", field="data.path")
