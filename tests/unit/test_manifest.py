"""Manifest: what is written is what is read, version 1 still is, and damage is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.data.layouts import Dense
from cluster.data.manifest import Manifest, StoredColumn, read_manifest
from cluster.data.prepare import prepare
from cluster.data.shards import DataSet
from cluster.data.sources.base import SplitSpec
from cluster.data.sources.images import DigitsSpec
from cluster.data.sources.pairs import PairsSpec
from cluster.storage import Folder
from nn_models.columns import Features, Image, Label, Sequence, Tokens, Tree
from nn_models.errors import UserError
from nn_models.spec import validate
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")


def specs(folder: Path) -> dict[str, SplitSpec]:
    images = made.images(folder / "images", 40)
    return {
        "images": images,
        "features": made.features(folder / "features", 40),
        "numbers": made.features(folder / "numbers", 40, target="number"),
        "pairs": PairsSpec(edges_of=images),
    }


def version_1(data: DataSet) -> dict:
    """The manifest as it was written before columns had names."""
    content = json.loads((Path(data.folder.path) / "manifest.json").read_text())
    columns = content["columns"]
    given, wanted = columns["input"]["column"], columns["target"]["column"]
    known = {
        "version": 1,
        "source": content["source"],
        "input_shape": given["shape"] if given["kind"] == "image" else [given["size"]],
        "input_dtype": columns["input"]["dtype"],
        "target_kind": "label" if wanted["kind"] == "label" else "number",
        "num_outputs": wanted["size"],
        "class_names": wanted.get("names", []),
        "mean": columns["input"]["mean"],
        "std": columns["input"]["std"],
        "splits": content["splits"],
    }
    return known | ({"condition_shape": columns["condition"]["column"]["shape"]} if "condition" in columns else {})


@pytest.mark.parametrize("kind", ["images", "features", "numbers", "pairs"])
def test_version_1_says_the_same(kind, tmp_path):
    data = made.written(specs(tmp_path)[kind], tmp_path / "out")
    file = tmp_path / "out" / "manifest.json"
    old, now = version_1(data), data.manifest
    target = now.columns["target"]
    if "counts" in type(target.column).model_fields:  # which version 1 did not say
        target = target.model_copy(update={"column": target.column.model_copy(update={"counts": {}})})
    else:
        target = target.model_copy(update={"mean": (), "std": ()})
    now = now.model_copy(update={"columns": now.columns | {"target": target}})
    file.write_text(json.dumps(old))
    assert DataSet(str(tmp_path / "out")).manifest == now
    assert validate(Manifest, old | {"condition_shape": old.get("condition_shape")}) == now
    DataSet(str(tmp_path / "out")).verify()


def test_a_manifest_of_before():
    """Written by the commit that made version 1's last."""
    shard = {"file": "train-00000.parquet", "rows": 5, "row_groups": [3, 2], "bytes": 9, "sha256": "ab"}
    old = {
        "version": 1, "source": "pairs", "input_shape": [3, 6, 5], "input_dtype": "uint8", "condition_shape": [1, 6, 5],
        "target_kind": "label", "num_outputs": 2, "class_names": ["a", "b"], "mean": [0.1, 0.2, 0.3],
        "std": [1, 2, 3], "splits": {"train": [shard]},
    }  # fmt: skip
    manifest = validate(Manifest, old)
    assert list(manifest.columns) == ["input", "target", "condition"]
    assert manifest.columns["input"] == StoredColumn(
        column=Image(shape=(3, 6, 5)), dtype="uint8", mean=(0.1, 0.2, 0.3), std=(1, 2, 3)
    )
    assert manifest.columns["target"] == StoredColumn(column=Label(names=("a", "b"), size=2), dtype="int64")
    assert manifest.columns["condition"] == StoredColumn(column=Image(shape=(1, 6, 5)), dtype="uint8", moments=False)
    assert (manifest.rows("train"), manifest.row_groups("train"), manifest.row_bytes) == (5, [3, 2], 90 + 30 + 8)
    assert manifest.class_names == ("a", "b")
    assert validate(Manifest, manifest.content()) == manifest


def test_a_manifest_is_as_short_as_it_can_be(tmp_path):
    made.written(made.features(tmp_path / "in", 40), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(content) == ["version", "source", "columns", "splits"]
    assert content["version"] == 2
    counts = content["columns"]["target"]["column"].pop("counts")
    assert {split: sum(found) for split, found in counts.items()} == {"train": 32, "validation": 4, "test": 4}
    assert content["columns"]["target"] == {
        "column": {"kind": "label", "names": ["0", "1", "2"], "size": 3},
        "dtype": "int64",
    }
    assert set(content["columns"]["input"]) == {"column", "dtype", "mean", "std"}
    assert content["columns"]["input"]["column"] == {"kind": "features", "size": 4}


def test_columns_whose_rows_differ_in_length(tmp_path):
    spec = made.ragged(400)
    data = made.written(spec, tmp_path / "out")
    train = made.split_rows(data, "train").columns
    assert data.manifest == read_manifest(Folder(tmp_path / "out"))
    assert list(data.manifest.signature.columns) == list(made.RAGGED)
    for name in ("input", "steps", "marks", "tree"):
        assert data.manifest.columns[name].elements == pytest.approx(train[name].lengths.mean(), rel=1e-12)  # one sum
    values, stored = train["steps"].fields["values"].astype(float), data.manifest.columns["steps"]
    assert stored.mean == pytest.approx(values.mean(0), rel=1e-12)  # float64, added up in parts
    assert stored.std == pytest.approx(values.std(0), rel=1e-12)  # the same
    assert all(column.mean == () for name, column in data.manifest.columns.items() if name != "steps")
    elements = {name: column.elements for name, column in data.manifest.columns.items()}
    sizes = {"input": 4, "steps": 8, "marks": 4, "tree": 4 * (1 + 2 + 1)}
    rounded = sum(-(-elements[name] * size // 1) for name, size in sizes.items())
    assert data.manifest.row_bytes == rounded + 8  # and a label


def test_sequences_of_one_length_are_measured_by_number(tmp_path):
    values = np.random.default_rng(0).normal(2, 3, (90, 7, 2)).astype("float32")
    columns = {"input": StoredColumn(column=Sequence(width=2, length=7))}
    data = made.written(made.columns(columns, {"input": Dense(values)}, part_rows=20), tmp_path / "out")
    train = made.split_rows(data, "train").columns["input"].values.astype(float)
    assert train.shape == (72, 7, 2)
    stored = data.manifest.columns["input"]
    assert stored.mean == pytest.approx(train.mean((0, 1)), rel=1e-12)  # float64, added up in parts
    assert stored.std == pytest.approx(train.std((0, 1)), rel=1e-12)  # the same
    assert (stored.elements, stored.num_moments, data.manifest.row_bytes) == (0, 2, 7 * 2 * 4)


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def digits(tmp_path) -> Path:
    """The folder of a prepared data set."""
    prepare(DigitsSpec(), Folder(tmp_path / "data"))
    return tmp_path / "data"


def edited(folder: Path, path: str, value: object) -> str:
    """The refusal of the manifest with the value at a dotted path replaced."""
    file = folder / "manifest.json"
    content = place = json.loads(file.read_text())
    *sections, last = path.split(".")
    for section in sections:
        place = place[int(section) if isinstance(place, list) else section]
    place[last] = value
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        DataSet(str(folder))
    return str(caught.value).removeprefix(f"{file}").lstrip(":. ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"version": 1,', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "must be a section"),
        (b"null", "must be a section"),
        (b"{}", "source: missing"),
    ],
)
def test_a_damaged_manifest_is_named(content, message, digits):
    (digits / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"{digits}/manifest.json.*{message}"):
        DataSet(str(digits))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("version", 3, "version: must be 1 or 2, not 3; prepare the data again"),
        ("surprise", 1, "surprise: unknown field"),
        ("columns.input.std", [0.0], "columns.input.std.0: must be greater than 0"),
        ("columns.input.std", [1.0, 1.0], "the shape, mean and std of input do not fit each other; prepare the data"),
        ("columns.input.mean", [], "the shape, mean and std of input do not fit each other; prepare the data again"),
        ("columns.target.mean", [0.0], "the shape, mean and std of target do not fit each other; prepare the data"),
        ("columns.input.column.kind", "picture", "columns.input.column.kind: unknown kind 'picture'"),
        ("columns.input.dtype", "float16", "columns.input.dtype: must be"),
        ("columns.target.column.size", 9, "columns.target.column.size: 9 where there are 10 names"),
        ("splits.tset", [], "unknown splits tset; prepare the data again"),
        ("splits.test.0.file", "../x", "splits.test.0: file is no name of a file beside the manifest: '../x'; prepare"),
        ("splits.test.0.file", "/etc/x", "splits.test.0: file is no name of a file beside the manifest: '/etc/x'"),
        ("splits.test.0.file", "..", "splits.test.0: file is no name of a file beside the manifest: '..'; prepare"),
        ("splits.test.0.rows", 360, "splits.test.0: row_groups hold 359 rows, not 360; prepare the data again"),
    ],
)  # fmt: skip
def test_damage_inside_is_named(path, value, message, digits):
    assert edited(digits, path, value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_shape": 5}, "input_shape: must be (channels, height, width) or (features,), not 5; prepare the data"),
        ({"input_shape": [8, 8]}, "input_shape: must be (channels, height, width) or (features,), not [8, 8]"),
        ({"input_shape": None}, "input_shape: must be (channels, height, width) or (features,), not None"),
        ({"target_kind": "picture"}, "target_kind: must be label or number, not 'picture'"),
        ({"num_outputs": 9}, "num_outputs is not the number of class_names; prepare the data again"),
        ({"class_names": 10}, "num_outputs is not the number of class_names; prepare the data again"),
        ({"condition_shape": [1, 9, 9]}, "condition_shape and the input do not fit each other; prepare the data again"),
        ({"condition_shape": 3}, "condition_shape and the input do not fit each other; prepare the data again"),
        ({"mean": [0.0, 1.0]}, "the shape, mean and std of input do not fit each other; prepare the data again"),
        ({"std": [0.0]}, "columns.input.std.0: must be greater than 0"),
        ({"input_dtype": "int8"}, "columns.input.dtype: must be"),
        ({"surprise": 1}, "surprise: unknown field"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_manifest_of_version_1_is_named(change, message, digits):
    file = digits / "manifest.json"
    file.write_text(json.dumps(version_1(DataSet(str(digits))) | change))
    with pytest.raises(UserError) as caught:
        DataSet(str(digits))
    assert str(caught.value).removeprefix(f"{file}").lstrip(":. ").startswith(message)


@pytest.mark.parametrize(
    ("name", "column", "holds"),
    [
        ("target", {"kind": "tokens", "size": 10}, "the columns row, input, target where manifest.json says row, inp"),
        (
            "input",
            {"kind": "image", "shape": [1, 8, 9]},
            r"fixed_size_binary\[64\] in column input where manifest.json ",
        ),
        ("other", {"kind": "numbers", "size": 1}, "the columns row, input, target where manifest.json says row, input"),
    ],
)
def test_shards_that_hold_other_columns_than_the_manifest_says_are_named(name, column, holds, digits):
    file = digits / "manifest.json"
    content = json.loads(file.read_text())
    content["columns"][name] = content["columns"].get(name, {}) | {"column": column}
    file.write_text(json.dumps(content))
    data = DataSet(str(digits))
    message = rf"{digits}/t.*parquet: the shard holds {holds}.*; delete"
    with pytest.raises(UserError, match=message):
        data.table("train")
    with pytest.raises(UserError, match=message):
        data.read_row_groups(data.row_group_locations("test"))


def test_a_row_of_a_column():
    assert StoredColumn(column=Features(size=3), dtype="uint8").row_bytes == 3
    assert StoredColumn(column=Tokens(size=9, length=5), dtype="int32").row_bytes == 20
    assert StoredColumn(column=Tokens(size=9), elements=2.1).row_bytes == 9  # 8.4
    assert StoredColumn(column=Tree(size=9, arity=3), elements=2).row_bytes == 2 * 4 * (1 + 3 + 1)
    assert StoredColumn(column=Label(size=9), dtype="int64").row_bytes == 0  # see Manifest.row_bytes
