"""Parquet files of the user: what may be trained on, and what is said about everything that may not."""

import datetime
import decimal
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.data.manifest import StoredColumn
from cluster.data.prepare import prepared
from cluster.data.sources.base import DataSpec
from cluster.data.sources.parquet import ParquetSpec
from nn_models.columns import Numbers
from nn_models.errors import UserError
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")

ROWS = 30
LABELS = [row % 3 for row in range(ROWS)]
X = np.linspace(0, 1, ROWS, dtype=np.float32)


def refusal(spec: DataSpec) -> str:
    """The one line with which the data is refused."""
    with pytest.raises(UserError) as caught:
        prepared(spec)
    message = str(caught.value)
    assert "\n" not in message
    assert "object at 0x" not in message
    return message


@pytest.fixture
def table(tmp_path):
    """Writes one file of the columns; returns the spec of it."""

    def write(x=X, y=LABELS, *, name: str = "rows.parquet", row_group_size: int | None = None, **fields) -> ParquetSpec:
        columns = {"x": x, "y": y} if not isinstance(x, dict) else x
        pq.write_table(pa.table(columns), tmp_path / name, row_group_size=row_group_size)
        return ParquetSpec(**{"path": str(tmp_path / name), "input": "x", "target": "y"} | fields)

    return write


def png(colour: int, size: tuple[int, int] = (4, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size[::-1], (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def train_rows(spec: ParquetSpec):
    """All rows: nothing is held out."""
    data = prepared(spec.model_copy(update={"validation_fraction": 0.0, "test_fraction": 0.0}))
    return data.manifest, made.split_rows(data, "train")


@pytest.mark.parametrize("wrapped", [False, True], ids=["bytes", "Hugging Face"])
def test_encoded_images(wrapped, table):
    encoded = [png(number) for number in range(ROWS)]
    column = [{"bytes": content, "path": "1.png"} for content in encoded] if wrapped else encoded
    manifest, rows = train_rows(table(column))
    assert (manifest.signature.input_shape, manifest.columns["input"].dtype) == ((3, 4, 3), "uint8")
    assert rows.columns["input"].values[:, 0, 0, 0].tolist() == list(range(ROWS))
    manifest, rows = train_rows(table(column, image_shape=(1, 2, 2)))
    assert rows.columns["input"].values.shape == (ROWS, 1, 2, 2)


def test_encoded_images_of_different_sizes_need_an_image_shape(table):
    column = [png(0), *[png(0, (8, 8))] * (ROWS - 1)]
    message = refusal(table(column))
    assert message.endswith(
        "rows.parquet, row group 0, column x, row 1: 8x8 pixels where the first image has 4x3; set data.image_shape "
        "to resize them all"
    )
    assert train_rows(table(column, image_shape=(3, 4, 3)))[0].signature.input_shape == (3, 4, 3)


@pytest.mark.parametrize(
    "bad",
    [b"<html>", b"", {"bytes": None, "path": "only/a/path.png"}, {"other": 1}],
    ids=["text", "empty", "path only", "other struct"],
)
def test_encoded_images_that_are_none(bad, table):
    message = refusal(table([bad] * ROWS))
    assert "rows.parquet, row 0: " in message
    assert message.endswith("in no known image format; replace or remove it")


PIXELS = (np.arange(ROWS * 12) % 256).reshape(ROWS, 12)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.uint8(), 12),
        pa.list_(pa.uint8()),
        pa.large_list(pa.uint8()),
        pa.list_(pa.int64()),
        pa.list_(pa.int16(), 12),
    ],
    ids=str,
)
def test_images_as_lists(kind, table):
    manifest, rows = train_rows(table(pa.array(PIXELS.tolist(), kind), image_shape=(3, 2, 2)))
    assert manifest.columns["input"].dtype == "uint8"
    np.testing.assert_array_equal(rows.columns["input"].values.reshape(ROWS, 12), PIXELS)


def test_images_as_lists_of_lists(table):
    manifest, rows = train_rows(table(PIXELS.reshape(ROWS, 3, 4).tolist(), image_shape=(1, 3, 4)))
    assert manifest.columns["input"].dtype == "uint8"
    np.testing.assert_array_equal(rows.columns["input"].values, PIXELS.reshape(ROWS, 1, 3, 4))


def test_images_of_floats_keep_their_values(table):
    manifest, rows = train_rows(table((PIXELS / 255).tolist(), image_shape=(3, 2, 2)))
    assert (manifest.columns["input"].dtype, manifest.signature.input_shape) == ("float32", (3, 2, 2))
    found = rows.columns["input"].values.reshape(ROWS, 12)
    np.testing.assert_allclose(found, PIXELS / 255, rtol=1e-7)  # float64 in the file


def test_images_as_one_column_a_pixel(table):
    columns = {f"pixel{number}": PIXELS[:, number] for number in range(12)} | {"y": LABELS}
    names = tuple(f"pixel{number}" for number in range(12))
    manifest, rows = train_rows(table(columns, input=names, image_shape=(3, 2, 2)))
    assert manifest.columns["input"].dtype == "uint8"
    np.testing.assert_array_equal(rows.columns["input"].values.reshape(ROWS, 12), PIXELS)


@pytest.mark.parametrize("value", [256, -1, 70_000])
def test_pixels_outside_a_byte_are_refused_and_not_wrapped(value, table):
    column = [[*row[:-1], value] for row in PIXELS.tolist()]
    message = refusal(table(column, image_shape=(3, 2, 2)))
    assert f"rows.parquet, row group 0, column x: {value} is no pixel; images of whole numbers hold 0 to 255" in message


def test_pixels_of_a_later_file_may_not_be_fractions(table, tmp_path):
    table(PIXELS.tolist(), name="1.parquet")
    table((PIXELS / 2).tolist(), name="2.parquet")
    message = refusal(ParquetSpec(path=str(tmp_path), input="x", target="y", image_shape=(3, 2, 2)))
    assert "2.parquet, row group 0, column x: 0.5 is no pixel" in message


@pytest.mark.parametrize("shape", [(3, 2, 3), (1, 2, 2)])
def test_a_wrong_image_shape(shape, table):
    message = refusal(table(PIXELS.tolist(), image_shape=shape))
    assert message.startswith(f"data.image_shape: {shape} is {int(np.prod(shape))} numbers, but rows of x in ")
    assert message.endswith("have 12")


def test_several_columns_and_lists_are_put_side_by_side(table):
    columns = {"a": X, "b": np.arange(ROWS), "c": PIXELS[:, :2].tolist(), "d": [row % 2 == 0 for row in range(ROWS)]}
    manifest, rows = train_rows(table(columns | {"y": LABELS}, input=("a", "b", "c", "d")))
    assert manifest.signature.input_shape == (5,)
    want = np.column_stack([X, np.arange(ROWS), PIXELS[:, :2], np.arange(ROWS) % 2 == 0]).astype(np.float32)
    np.testing.assert_array_equal(rows.columns["input"].values, want)


@pytest.mark.parametrize(
    "kind", [pa.uint8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64()], ids=str
)
def test_numbers_of_any_type(kind, table):
    values = np.arange(ROWS).astype(kind.to_pandas_dtype())
    manifest, rows = train_rows(table(pa.array(values, kind)))
    assert manifest.columns["input"].dtype == "float32"
    assert rows.columns["input"].values[:, 0].tolist() == list(range(ROWS))


def test_whole_numbers_that_float32_must_round(table):
    _, rows = train_rows(table(np.full(ROWS, 20_000_001)))
    assert rows.columns["input"].values[0, 0] == 20_000_000


LABEL_COLUMNS = {
    "int": (pa.array([number * 5 for number in LABELS]), ("0", "5", "10")),
    "negative": (pa.array([number - 1 for number in LABELS]), ("-1", "0", "1")),
    "text": (pa.array([["tree", "ant", "bee"][number] for number in LABELS]), ("ant", "bee", "tree")),
    "unicode": (pa.array([["日本", "ä", "b"][number] for number in LABELS]), ("b", "ä", "日本")),
    "large": (pa.array([str(number) for number in LABELS], pa.large_string()), ("0", "1", "2")),
    "view": (pa.array([str(number) for number in LABELS], pa.string_view()), ("0", "1", "2")),
    "dictionary": (pa.array([str(number) for number in LABELS]).dictionary_encode(), ("0", "1", "2")),
    "bool": (pa.array([number == 1 for number in LABELS]), ("false", "true")),
}


@pytest.mark.parametrize("kind", LABEL_COLUMNS)
def test_labels_of_any_type(kind, table):
    column, names = LABEL_COLUMNS[kind]
    manifest, rows = train_rows(table(y=column, row_group_size=7))
    target = manifest.signature["target"]
    assert (target.kind, target.names, target.size) == ("label", names, len(names))
    assert manifest.columns["target"].dtype == "int64"
    told = [names[label] for label in rows.columns["target"].values]
    assert told == [str(value).lower() if kind == "bool" else str(value) for value in column.to_pylist()]


def test_labels_that_were_saved_as_floats(table):
    y = [float(number) for number in LABELS]
    assert train_rows(table(y=y))[0].signature["target"] == Numbers(size=1)
    manifest, rows = train_rows(table(y=y, target_kind="label"))
    assert manifest.class_names == ("0", "1", "2")
    assert rows.columns["target"].values.tolist() == LABELS


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([0.5] * ROWS, "column y: fractions are no labels; set data.target_kind to number"),
        ([float("nan")] * ROWS, "column y: fractions are no labels"),
        ([[number] for number in LABELS], "column y: values of type list<element: int64> are no labels"),
        (
            [datetime.datetime(2020, 1, 1)] * ROWS,
            r"column y: values of type timestamp[us] are no labels; make them text",
        ),
        ([datetime.date(2020, 1, 1)] * ROWS, "column y: values of type date32[day] are no labels"),
        ([decimal.Decimal("1.5")] * ROWS, "column y: values of type decimal128(2, 1) are no labels"),
        ([b"cat"] * ROWS, "column y: values of type binary are no labels"),
        (["cat"] * ROWS, "column y holds 1 class; at least two are needed"),
        (["cat", None, *["dog"] * (ROWS - 2)], "column y has 1 empty values; fill or drop them"),
        ([None, *["dog"] * (ROWS - 1)], "row 0: column y has an empty value; fill or drop such rows"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_what_are_no_labels(column, message, table):
    said = refusal(table(y=column, target_kind="label"))
    assert message in said
    assert "rows.parquet" in said


def test_numbers_to_predict(table):
    manifest, rows = train_rows(table(y=X.astype(np.float64)))
    target, trained = manifest.columns["target"], rows.columns["target"].values
    moments = {"mean": target.mean, "std": target.std}
    assert target == StoredColumn(column=Numbers(size=1), dtype="float32", **moments)
    assert (target.mean[0], target.std[0]) == pytest.approx((trained.mean(), trained.std()), rel=1e-5)
    assert manifest.class_names == ()
    np.testing.assert_array_equal(rows.columns["target"].values[:, 0], X)
    manifest, rows = train_rows(table(y=np.column_stack([X, 2 * X]).tolist()))
    assert manifest.signature["target"] == Numbers(size=2)
    np.testing.assert_array_equal(rows.columns["target"].values[:, 1], 2 * X)
    assert train_rows(table(y=LABELS, target_kind="number"))[0].signature["target"] == Numbers(size=1)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([float("nan"), *[1.0] * (ROWS - 1)], "row group 0, column y: NaN or infinity; fill or drop those rows"),
        ([*[1.0] * (ROWS - 1), float("inf")], "row group 0, column y: NaN or infinity"),
        ([1.0, None, *[1.0] * (ROWS - 2)], "row group 0: column y has 1 empty values"),
        (["a"] * ROWS, "column y: values of type string are not numbers; choose numeric columns"),
        ([[1.0] * (1 + row % 2) for row in range(ROWS)], "column y: lists of different lengths (1, 2)"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_what_are_no_numbers_to_predict(column, message, table):
    said = refusal(table(y=column, target_kind="number"))
    assert message in said
    assert "rows.parquet" in said


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([float("nan"), *[1.0] * (ROWS - 1)], "row group 0: x hold NaN or infinity; fill or drop those rows"),
        ([1e300] * ROWS, "column x: numbers up to 1e+300 are past float32's range"),
        ([1.0, None, *[1.0] * (ROWS - 2)], "row group 0: column x has 1 empty values; fill or drop them"),
        ([None, *[1.0] * (ROWS - 1)], "row 0: column x has an empty value; fill or drop such rows"),
        ([[1.0, 2.0], [None, 1.0], *[[1.0, 1.0]] * (ROWS - 2)], "row group 0: x hold NaN or infinity"),
        (
            [[1.0] * (1 + row % 2) for row in range(ROWS)],
            "column x: lists of different lengths (1, 2); make them equally",
        ),
        (pa.array([[]] * ROWS, pa.list_(pa.float32())), "empty lists in x; drop those rows"),
        (["a"] * ROWS, "column x: values of type string are not numbers; choose numeric columns"),
        ([datetime.datetime(2020, 1, 1)] * ROWS, "column x: values of type timestamp[us] are not numbers"),
        ([decimal.Decimal("1.5")] * ROWS, "column x: values of type decimal128(2, 1) are not numbers"),
        (pa.array([str(number) for number in LABELS]).dictionary_encode(), "are not numbers; choose numeric columns"),
        (pa.nulls(ROWS), "row 0: column x has an empty value"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_what_is_no_input(column, message, table):
    said = refusal(table(column))
    assert message in said
    assert "rows.parquet" in said


def test_a_missing_column_is_suggested(table):
    columns = {"image": X, "label": LABELS}
    assert refusal(table(columns, input="images", target="label")).endswith("no column 'images'; did you mean image?")
    assert refusal(table(columns, input="image", target="zzz")).endswith("no column 'zzz'; known: image, label")
    assert refusal(table(columns, input=(), target="label")) == "data.input: names no column; give at least one"


def test_two_columns_of_one_name(tmp_path):
    table = pa.Table.from_arrays([pa.array(X), pa.array(X), pa.array(LABELS)], names=["x", "x", "y"])
    pq.write_table(table, tmp_path / "rows.parquet")
    message = refusal(ParquetSpec(path=str(tmp_path), input="x", target="y"))
    assert message == f"{tmp_path}/rows.parquet: 2 columns are named 'x'; rename them"


def test_columns_with_dots(table):
    columns = {"petal": X, "petal.length": 2 * X, "petal.notes": [None] * ROWS, "class.name": LABELS}
    _, rows = train_rows(table(columns, input="petal", target="class.name"))
    np.testing.assert_array_equal(rows.columns["input"].values[:, 0], X)
    _, rows = train_rows(table(columns, input=("petal.length", "petal", "petal"), target="class.name"))
    np.testing.assert_array_equal(rows.columns["input"].values, np.column_stack([2 * X, X, X]))


def test_a_column_that_a_later_file_lacks(table, tmp_path):
    table(name="1.parquet")
    table({"x": X, "z": LABELS}, name="2.parquet")
    message = refusal(ParquetSpec(path=str(tmp_path), input="x", target="y"))
    assert message == f"{tmp_path}/2.parquet: no column 'y'; known: x, z"


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (["a"] * ROWS, LABELS, "2.parquet, row group 0, column x: values of type string are not numbers"),
        ([[1.0, 2.0]] * ROWS, LABELS, "2.parquet, row group 0: rows of 2 numbers in x where the first file has (1,)"),
    ],
)
def test_a_later_file_of_another_kind(x, y, message, table, tmp_path):
    table(name="1.parquet")
    table(x, y, name="2.parquet")
    assert message in refusal(ParquetSpec(path=str(tmp_path), input="x", target="y"))


def test_a_later_file_with_more_numbers_to_predict(table, tmp_path):
    table(y=[[1.0]] * ROWS, name="1.parquet")
    table(y=[[1.0, 2.0]] * ROWS, name="2.parquet")
    message = refusal(ParquetSpec(path=str(tmp_path), input="x", target="y"))
    assert "2.parquet, row group 0, column y: 2 numbers a row where the first file has 1; mend the file" in message


def test_labels_as_numbers_in_one_file_and_as_text_in_another(table, tmp_path):
    table(name="1.parquet")
    table(y=[str(number) for number in LABELS], name="2.parquet")
    manifest, rows = train_rows(ParquetSpec(path=str(tmp_path), input="x", target="y"))
    assert manifest.class_names == ("0", "1", "2")
    assert rows.columns["target"].values.tolist() == LABELS * 2


def test_a_folder_of_files_of_several_row_groups(table, tmp_path):
    for number in range(3):
        table(X + number, name=f"{number}.parquet", row_group_size=7)
    (tmp_path / "sub folder").mkdir()
    table(X + 3, name="sub folder/3.pq", row_group_size=7)
    (tmp_path / "written by spark.parquet").mkdir()
    table(X + 4, name="written by spark.parquet/part-0.parquet", row_group_size=7)
    table([], [], name="empty.parquet")
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "._0.parquet").write_text("macOS's notes")
    for path in (str(tmp_path), f"file://{tmp_path}"):
        _, rows = train_rows(ParquetSpec(path=path, input="x", target="y"))
        np.testing.assert_array_equal(
            rows.columns["input"].values[:, 0], np.concatenate([X + number for number in range(5)])
        )
    _, rows = train_rows(ParquetSpec(path=f"file://{tmp_path}/sub%20folder/3.pq", input="x", target="y"))
    assert len(rows.ids) == ROWS


def test_dictionaries_that_differ_between_row_groups(table, tmp_path):
    table(y=pa.array(["a", "b"] * (ROWS // 2)).dictionary_encode(), name="1.parquet", row_group_size=5)
    table(y=pa.array(["c", "b"] * (ROWS // 2)).dictionary_encode(), name="2.parquet", row_group_size=5)
    manifest, rows = train_rows(ParquetSpec(path=str(tmp_path), input="x", target="y"))
    assert manifest.class_names == ("a", "b", "c")
    assert rows.columns["target"].values.tolist() == [0, 1] * (ROWS // 2) + [2, 1] * (ROWS // 2)


@pytest.mark.parametrize(
    ("content", "message"), [(b"a,b\n1,2\n", "not a readable Parquet file"), (b"", "not a readable Parquet file")]
)
def test_what_is_no_parquet_file(content, message, tmp_path):
    (tmp_path / "a.parquet").write_bytes(content)
    said = refusal(ParquetSpec(path=str(tmp_path / "a.parquet"), input="x", target="y"))
    assert said.startswith(f"{tmp_path}/a.parquet: {message}")
    assert said.endswith("; replace or remove it")


def test_a_parquet_file_with_a_damaged_page(table, tmp_path):
    spec = table(np.random.default_rng(0).normal(size=ROWS))
    file = Path(spec.path)
    content = bytearray(file.read_bytes())
    content[10:60] = bytes(50)
    file.write_bytes(content)
    assert refusal(spec).startswith(f"{file}: damaged Parquet file (")


def test_no_files(tmp_path):
    spec = ParquetSpec(path=str(tmp_path), input="x", target="y")
    assert refusal(spec) == f"data.path: {tmp_path}: no .parquet files in this folder; give one that has some"
    spec = spec.model_copy(update={"path": str(tmp_path / "nowhere")})
    assert refusal(spec) == f"data.path: {tmp_path}/nowhere: no such file or folder; give Parquet files"
    spec = spec.model_copy(update={"path": "nfs://server/x"})
    assert refusal(spec).startswith("nfs://server/x: not a place that can be read or written")


def test_files_without_rows(table):
    assert refusal(table([], [])).endswith("no rows in these Parquet files; give files with data")


def test_a_test_split_that_stands_apart(table, tmp_path):
    table(name="train.parquet")
    table(X + 10, name="test.parquet")
    paths = {"path": str(tmp_path / "train.parquet"), "test_path": str(tmp_path / "test.parquet")}
    data = prepared(ParquetSpec(**paths, input="x", target="y"))
    assert {split: data.manifest.rows(split) for split in data.manifest.splits} == {
        "train": 27,
        "validation": 3,
        "test": 30,
    }
    np.testing.assert_array_equal(made.split_rows(data, "test").columns["input"].values[:, 0], X + 10)
    assert data.manifest.columns["input"].mean[0] < 1  # the test rows are no part of it


def test_a_class_that_only_the_test_split_has(table, tmp_path):
    table(y=["cat", "dog", "cow"] * (ROWS // 3), name="train.parquet")
    table(y=["cat", "dog", "elk"] * (ROWS // 3), name="test.parquet")
    paths = {"path": str(tmp_path / "train.parquet"), "test_path": str(tmp_path / "test.parquet")}
    assert refusal(ParquetSpec(**paths, input="x", target="y")) == (
        f"{tmp_path}/test.parquet, row group 0, column y: no training row has the class 'elk'; drop such rows, or add "
        "some to train on"
    )


def test_a_missing_test_path(table, tmp_path):
    message = refusal(table(test_path=str(tmp_path / "nowhere")))
    assert message == f"data.test_path: {tmp_path}/nowhere: no such file or folder; give Parquet files"


def test_one_row(table):
    manifest, rows = train_rows(table(X[:1], [1.0]))
    assert manifest.rows("train") == len(rows.ids) == 1
    assert manifest.columns["input"].std == (1.0,)
    assert "column y holds 1 class" in refusal(table(X[:1], [1]))


def test_fractions_that_leave_nothing_to_train_on(table):
    message = refusal(table(validation_fraction=0.6, test_fraction=0.6))
    assert "of 30 rows none is left to train on" in message
    assert "lower validation_fraction or test_fraction" in message
