"""Pairs: what an image is made from travels with it, from the files to what is said about them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.data.manifest import SPLITS
from cluster.data.prepare import cache_key, prepared
from cluster.data.sources.catalogue import AnyDataSpec
from cluster.data.sources.image_folder import ImageFolderSpec
from cluster.data.sources.images import DigitsSpec, FashionMNISTSpec
from cluster.data.sources.pairs import PairsSpec
from cluster.data.sources.parquet import ParquetSpec
from cluster.data.sources.pixels import edges
from cluster.recipe.fit import check
from cluster.recipe.loading import dump_recipe, load_recipe, parse_yaml
from cluster.recipe.recipe import Recipe
from cluster.runs.summary import summarise
from jobs.commands.printing import print_manifest, print_summary
from nn_models.errors import UserError
from nn_models.spec import validate
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")

ROWS = 30
GAN = {"model": {"kind": "pix2pix", "width": 4}, "objective": {"kind": "adversarial"}}


def refusal(section: dict) -> str:
    """The one line with which the data section, or what is behind it, is refused."""
    with pytest.raises(UserError) as caught:
        prepared(validate(AnyDataSpec, {"kind": "pairs"} | section, prefix="data"))
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- edges of any set of images --------------------------------------------------------------------------------------


def test_digits_and_their_edges():
    data = prepared(PairsSpec(edges_of=DigitsSpec(), test_fraction=0.2))
    plain = prepared(DigitsSpec())
    assert data.manifest.source == "pairs"
    assert data.manifest.signature.condition_shape == data.manifest.signature.input_shape == (1, 8, 8)
    assert data.manifest.signature.condition_shape == (1, 8, 8)
    assert data.manifest.class_names == plain.manifest.class_names
    for split in SPLITS:
        ours, theirs = made.split_rows(data, split), made.split_rows(plain, split)
        np.testing.assert_array_equal(ours.columns["input"].values, theirs.columns["input"].values)
        np.testing.assert_array_equal(ours.columns["target"].values, theirs.columns["target"].values)
        np.testing.assert_array_equal(ours.columns["condition"].values, edges(theirs.columns["input"].values))
        assert list(theirs.columns) == ["input", "target"]


def test_edges_of_the_users_own_images(tmp_path):
    for number in range(5):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (6, 5), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    manifest = prepared(PairsSpec(edges_of=ImageFolderSpec(path=str(tmp_path), image_size=(8, 7)))).manifest
    assert (manifest.signature.input_shape, manifest.signature.condition_shape) == ((3, 8, 7), (1, 8, 7))
    inner = made.images(tmp_path / "parquet", 40, shape=(3, 6, 5))
    assert prepared(PairsSpec(edges_of=inner)).manifest.signature.condition_shape == (1, 6, 5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "shards", "path": "x"}, "data.edges_of.kind: unknown kind 'shards'"),
        ({"kind": "digit"}, "data.edges_of.kind: unknown kind 'digit'; did you mean digits?"),
        ({"kind": "digits", "image_sise": [9, 9]}, "data.edges_of.image_sise: unknown field; did you mean image_size?"),
        ({"kind": "digits", "shuffle_window": 9}, "data.edges_of.shuffle_window: belongs to the pairs; set data.shuf"),
        ({"kind": "digits", "test_fraction": 0.2}, "data.edges_of.test_fraction: belongs to the pairs; set data.test_"),
        ({"kind": "digits", "augment": []}, "data.edges_of.augment: belongs to the pairs; set data.augment"),
        ({"kind": "fashion_mnist", "root": "/none"}, "data.edges_of.root: /none: no such folder; give the one"),
        ({"kind": "image_folder", "path": "/data.path/x"}, "data.edges_of.path: /data.path/x: no such folder"),
    ],
)
def test_an_inner_section_that_is_wrong_is_named_by_its_full_path(section, message):
    assert refusal({"edges_of": section}).startswith(message)


def test_pictures_inside_of_different_sizes(tmp_path):
    for name, size in (("a/1.png", (4, 4)), ("b/1.png", (5, 4))):
        (tmp_path / name).parent.mkdir()
        Image.new("L", size).save(tmp_path / name)
    message = refusal({"edges_of": {"kind": "image_folder", "path": str(tmp_path)}, "test_fraction": 0})
    assert message.endswith(
        "b/1.png: 4x5 pixels where the first image has 4x4; set data.edges_of.image_size to resize them all"
    )


def test_what_has_no_edges(tmp_path):
    inner = made.features(tmp_path, 10)
    section = {"kind": "parquet", "path": inner.path, "input": "x", "target": "y"}
    assert refusal({"edges_of": section}) == (
        "data.edges_of: parquet has rows of shape (4,) float32, which have no edges; give images of 1 or 3 channels of "
        "whole numbers"
    )
    assert "shape (1, 2, 2) float32, which have no edges" in refusal({"edges_of": section | {"image_shape": [1, 2, 2]}})


def test_the_inner_sections_paths_and_content_count(tmp_path):
    spec = PairsSpec(edges_of=ParquetSpec(path="in/rows.parquet", input="x", target="y", image_shape=(3, 6, 5)))
    spec = spec.resolved(str(tmp_path))
    assert spec.edges_of.path == f"{tmp_path}/in/rows.parquet"
    made.images(tmp_path / "in", 30)
    keys = {cache_key(spec)}
    made.images(tmp_path / "in", 30, seed=1)
    keys.add(cache_key(spec))
    keys.add(
        cache_key(spec.model_copy(update={"edges_of": spec.edges_of.model_copy(update={"target_kind": "number"})}))
    )
    keys.add(cache_key(spec.model_copy(update={"split_seed": 1})))
    assert len(keys) == 4
    for change in ({"shuffle_window": 5}, {"augment": ()}):
        assert cache_key(spec.model_copy(update=change)) in keys


def test_a_resolved_recipe_can_be_read_again(tmp_path):
    recipe = load_recipe(GAN | {"data": {"kind": "pairs", "edges_of": {"kind": "fashion_mnist", "root": "there"}}})
    text = dump_recipe(recipe)
    assert "test_fraction" not in text.split("edges_of")[1].split("\n")[0]  # the outer one counts
    again = validate(Recipe, parse_yaml(text, name="recipe"))
    assert again.data.identity() == recipe.data.identity()
    other = load_recipe(again, {"data.edges_of.image_size": [14, 14], "data.validation_fraction": 0.2})
    assert isinstance(other.data.edges_of, FashionMNISTSpec)
    assert (other.data.edges_of.root, other.data.edges_of.image_size) == (str(Path.cwd() / "there"), (14, 14))


# -- the user's own columns ------------------------------------------------------------------------------------------


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


GENERATOR = np.random.default_rng(0)
PHOTOS = GENERATOR.integers(0, 256, (ROWS, 6, 7, 3), dtype=np.uint8)
SKETCHES = GENERATOR.integers(0, 256, (ROWS, 6, 7), dtype=np.uint8)
LABELS = ["cat", "dog", "cow"] * (ROWS // 3)
ALL = {"validation_fraction": 0, "test_fraction": 0}


@pytest.fixture
def table(tmp_path):
    """Writes one file of the columns; returns the data section of it."""

    def write(photos=None, sketches=None, *, row_group_size: int = 8, **fields) -> dict:
        columns = {
            "photo": [png(image) for image in PHOTOS] if photos is None else photos,
            "sketch": [png(image) for image in SKETCHES] if sketches is None else sketches,
            "animal": LABELS,
        }
        pq.write_table(pa.table(columns), tmp_path / "rows.parquet", row_group_size=row_group_size)
        path = str(tmp_path / "rows.parquet")
        section = {"kind": "pairs", "path": path, "condition": "sketch", "input": "photo"} | fields
        return {name: value for name, value in section.items() if value is not None}

    return write


def train_rows(section: dict):
    data = prepared(validate(AnyDataSpec, section | ALL, prefix="data"))
    return data.manifest, made.split_rows(data, "train")


def test_two_columns_of_encoded_images(table):
    manifest, rows = train_rows(table(condition_channels=1, target="animal"))
    assert (manifest.signature.input_shape, manifest.signature.condition_shape) == ((3, 6, 7), (1, 6, 7))
    assert manifest.columns["input"].dtype == manifest.columns["condition"].dtype == "uint8"
    assert manifest.class_names == ("cat", "cow", "dog")
    np.testing.assert_array_equal(rows.columns["input"].values, PHOTOS.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(rows.columns["condition"].values, SKETCHES[:, None])
    assert [manifest.class_names[label] for label in rows.columns["target"].values] == LABELS
    manifest, rows = train_rows(table())  # read in colour, both of them
    assert manifest.signature.condition_shape == (3, 6, 7)
    np.testing.assert_array_equal(rows.columns["condition"].values, np.repeat(SKETCHES[:, None], 3, axis=1))


def test_images_are_resized_together(table):
    _, rows = train_rows(table(image_shape=[3, 4, 5], condition_channels=1))
    assert rows.columns["input"].values.shape == (ROWS, 3, 4, 5)
    assert rows.columns["condition"].values.shape == (ROWS, 1, 4, 5)
    small = [png(image[:3, :3]) for image in SKETCHES]
    _, rows = train_rows(table(sketches=small, image_shape=[3, 6, 7]))
    assert rows.columns["condition"].values.shape == (ROWS, 3, 6, 7)


def test_two_columns_of_lists(table):
    photos = PHOTOS.transpose(0, 3, 1, 2).reshape(ROWS, -1)
    section = table(photos.tolist(), SKETCHES.tolist(), image_shape=[3, 6, 7], condition_channels=1)
    _, rows = train_rows(section)
    np.testing.assert_array_equal(rows.columns["input"].values.reshape(ROWS, -1), photos)
    np.testing.assert_array_equal(rows.columns["condition"].values[:, 0], SKETCHES)


def test_one_column_may_be_both(table):
    _, rows = train_rows(table(condition="photo", condition_channels=1))  # to learn to colour pictures
    grey = [np.asarray(Image.fromarray(photo).convert("L")) for photo in PHOTOS]
    np.testing.assert_array_equal(rows.columns["condition"].values[:, 0], grey)


def test_rows_without_labels_are_of_one_class(table):
    manifest, rows = train_rows(table())
    target = manifest.signature["target"]
    assert (target.names, target.counts) == (("all",), {"train": (ROWS,)})
    assert rows.columns["target"].values.tolist() == [0] * ROWS


def test_a_test_split_that_stands_apart(table, tmp_path):
    section = table(target="animal")
    Path(section["path"]).rename(tmp_path / "test.parquet")
    section = table(target="animal") | {"test_path": str(tmp_path / "test.parquet"), "validation_fraction": 0}
    data = prepared(validate(AnyDataSpec, section, prefix="data"))
    assert {split: data.manifest.rows(split) for split in data.manifest.splits} == {"train": ROWS, "test": ROWS}


WAYS = "pairs need either edges_of (a data section of images, to be made from their edges) or path, condition and input"
NEED = "missing; pairs from Parquet files need path, condition and input"
BOTH = "edges_of makes the pairs, and needs no columns; leave out one or the other"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, f"data: {WAYS}"),
        ({"test_fraction": 0.5}, f"data: {WAYS}"),
        ({"path": "rows.parquet"}, f"data.condition: {NEED}"),
        ({"path": "rows.parquet", "condition": "a"}, f"data.input: {NEED}"),
        ({"condition": "a", "input": "b"}, f"data.path: {NEED}"),
        ({"edges_of": {"kind": "digits"}, "path": "rows.parquet"}, f"data.path: {BOTH}"),
        ({"edges_of": {"kind": "digits"}, "target": "y"}, f"data.target: {BOTH}"),
        ({"edges_of": "digits"}, "data.edges_of: must be a section of fields"),
        ({"path": "rows.parquet", "condition": "a", "input": ["b"]}, "data.input: must be a valid string"),
        ({"path": "/none", "condition": "a", "input": "b"}, "data.path: /none: no such file or folder"),
    ],
)
def test_neither_way_or_both(section, message):
    assert refusal(section).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"condition": "sketsh"}, "rows.parquet: no column 'sketsh'; did you mean sketch?"),
        ({"input": "foto"}, "rows.parquet: no column 'foto'; did you mean photo?"),
        ({"target": "y"}, "rows.parquet: no column 'y'"),
        ({"condition": "animal"}, "column animal: values of type string are not numbers"),
        (
            {"condition_channels": 2},
            "column sketch holds encoded images, which cannot be read as 2 channels; set 1 for",
        ),
        (
            {"image_shape": [2, 6, 7]},
            "column photo holds encoded images, which cannot be read as 2 channels; set 1 for",
        ),
        ({"target": "photo"}, "data.target: photo is an input too, so there would be nothing to predict; name another"),
        ({"target": "sketch"}, "data.target: sketch is an input too, so there would be nothing to predict"),
        ({"sketches": [*[png(PHOTOS[0])] * (ROWS - 1), b"<html>"]}, "column sketch, row 5: 6 bytes in no known image"),
        ({"sketches": [b"<html>"] * ROWS}, "rows.parquet, row 0: 6 bytes in no known image format; replace or remove"),
        (
            {"sketches": [*[png(SKETCHES[0])] * 9, png(SKETCHES[0])[:60], *[png(SKETCHES[0])] * 20]},
            "row group 1, column sketch, row 1: not a readable image",
        ),
        ({"sketches": [png(SKETCHES[0])] * (ROWS - 1) + [None]}, "column sketch has 1 empty values; fill or drop them"),
        (
            {"sketches": [png(SKETCHES[0][:5])] * ROWS},
            "row 0: 5x7 pixels in column sketch where photo has 6x7; set data.image_shape to resize both",
        ),
        (
            {"sketches": [*[png(SKETCHES[0])] * 9, *[png(SKETCHES[0][:5])] * 21]},
            "row group 1, column sketch, row 1: 5x7 pixels where the first image has 6x7; set data.image_shape to res",
        ),
        ({"sketches": [[1, 2]] * ROWS}, "column sketch holds lists of 2 numbers; set data.image_shape to the images'"),
        (
            {"sketches": [[1, 2]] * ROWS, "image_shape": [3, 6, 7]},
            "data.image_shape: (3, 6, 7) is 126 numbers, but rows of sketch in ",
        ),
        (
            {"sketches": [[0.5] * 42] * ROWS, "image_shape": [3, 6, 7], "condition_channels": 1},
            "column sketch holds fractions; the images of a pair are whole numbers of 0 to 255",
        ),
        (
            {"sketches": [[256] * 42] * ROWS, "image_shape": [3, 6, 7], "condition_channels": 1},
            "column sketch: 256 is no pixel",
        ),
    ],
)
def test_bad_files_are_named(fields, message, table):
    said = refusal(table(**fields))
    assert message in said
    assert "target_kind" not in said  # pairs have no such field


# -- what is said about them -----------------------------------------------------------------------------------------


def test_pix2pix_takes_pairs_and_nothing_else(capsys):
    recipe = load_recipe(GAN | {"data": {"kind": "pairs", "edges_of": {"kind": "digits"}}})
    data = prepared(recipe.data)
    check(recipe, data.manifest)
    print_summary(recipe, data.manifest, summarise(recipe, data.manifest), as_json=False)
    assert "1 x 8 x 8 -> 1 x 8 x 8 uint8 of 10 classes" in capsys.readouterr().out
    with pytest.raises(UserError, match="the data has only one image a row; choose a data set of image pairs"):
        check(recipe, prepared(DigitsSpec()).manifest)


def test_prepared_pairs_are_described(table, tmp_path, capsys):
    manifest = prepared(PairsSpec(edges_of=made.images(tmp_path / "in", 80, shape=(3, 6, 7)))).manifest
    print_manifest("there", manifest, as_json=False)
    assert "source           pairs; 1 x 6 x 7 -> 3 x 6 x 7 uint8 of 3 classes" in capsys.readouterr().out
    print_manifest("there", manifest, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told == {"path": "there", **manifest.content()}
    assert told["columns"]["condition"]["column"]["shape"] == [1, 6, 7]
    print_manifest("there", train_rows(table())[0], as_json=False)
    assert "3 x 6 x 7 -> 3 x 6 x 7 uint8 of 1 class\n" in capsys.readouterr().out
