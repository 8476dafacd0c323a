"""Targets: none, one that is an input too, and one of another kind, with a fix that is not refused in turn."""

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.data.prepare import prepared
from cluster.recipe.fit import check
from cluster.recipe.loading import load_recipe
from nn_models.errors import UserError

pytestmark = pytest.mark.filterwarnings("error")

ROWS = 60
CLASSES = [row % 2 for row in range(ROWS)]
TARGETS = {
    "whole": [float(label) for label in CLASSES],
    "fractions": [label + 0.5 for label in CLASSES],
    "numbers": CLASSES,
    "text": [str(label) for label in CLASSES],
    "dates": [datetime.date(2020, 1, 1 + label) for label in CLASSES],
    "times": [datetime.datetime(2020, 1, 1 + label) for label in CLASSES],
    "lists": [[label, 1] for label in CLASSES],
}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("targets") / "rows.parquet"
    x = np.random.default_rng(0).normal(size=(ROWS, 2))
    pq.write_table(pa.table({"a": x[:, 0], "b": x[:, 1], **TARGETS}), path)
    return path


def data(file: Path, **fields) -> dict:
    return {"kind": "parquet", "path": str(file), "input": ["a", "b"], **fields}


def admitted(section: dict, objective: str = "classification", recipe: str = "digits-mlp") -> None:
    """As before a run: the recipe is read, the data prepared, and both compared."""
    overrides = {"data": section} | ({"objective.kind": objective} if objective else {})
    loaded = load_recipe(recipe, overrides=overrides)
    check(loaded, prepared(loaded.data).manifest)


def refusal(*arguments, **fields) -> str:
    with pytest.raises(UserError) as caught:
        admitted(*arguments, **fields)
    return str(caught.value)


# -- the fix helps ---------------------------------------------------------------------------------------------------

LABEL, NUMBER = {"target_kind": "label"}, {"target_kind": "number"}


@pytest.mark.parametrize(
    ("target", "fields", "objective", "fix", "helped"),
    [
        ("whole", {}, "classification", "set data.target_kind to label", (LABEL, "classification")),
        ("whole", NUMBER, "classification", "set data.target_kind to label", (LABEL, "classification")),
        ("whole", LABEL, "regression", "set data.target_kind to number", (NUMBER, "regression")),
        ("numbers", {}, "regression", "set data.target_kind to number", (NUMBER, "regression")),
        ("numbers", NUMBER, "classification", "set data.target_kind to label", (LABEL, "classification")),
        ("fractions", {}, "classification", "set objective.kind to regression", ({}, "regression")),
        ("text", {}, "regression", "set objective.kind to classification", ({}, "classification")),
        ("lists", NUMBER, "classification", "set objective.kind to regression", (NUMBER, "regression")),
    ],
)
def test_a_target_of_another_kind_is_refused_with_the_one_field_that_helps(
    target, fields, objective, fix, helped, file
):
    said = refusal(data(file, target=target, **fields), objective)
    assert said.startswith(f"objective.kind: {objective} needs a ")
    assert said.endswith(f"; {fix}")
    better, other = helped
    admitted(data(file, target=target, **better), other)


@pytest.mark.parametrize("target", ["dates", "times"])
@pytest.mark.parametrize("fields", [{}, LABEL])
def test_dates_are_neither_labels_nor_numbers(target, fields, file):
    said = refusal(data(file, target=target, **fields))
    assert f"column {target}: values of type " in said
    assert said.endswith(" are no labels; make them text or whole numbers")


def test_a_list_may_be_numbers(file):
    said = refusal(data(file, target="lists"), "regression")
    assert said.endswith("are no labels; make them text or whole numbers, or set data.target_kind to number")
    admitted(data(file, target="lists", **NUMBER), "regression")


# -- no target -------------------------------------------------------------------------------------------------------


def test_rows_without_a_target_are_of_one_class(file):
    loaded = load_recipe("digits-mlp", overrides={"data": data(file)})
    assert prepared(loaded.data).manifest.class_names == ("all",)
    for objective in ("classification", "regression"):
        said = refusal(data(file), objective)
        assert said.startswith(f"objective.kind: {objective} needs ")
        assert said.endswith("; name the column to predict in data.target")
    admitted(data(file, target="text"))


def test_a_kind_of_no_target(file):
    said = refusal(data(file, target_kind="number"))
    assert said == "data.target_kind: there is no target; name the column in target"


def faces(folder: Path) -> dict:
    for number in range(40):
        folder.mkdir(exist_ok=True)
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    return {"kind": "image_folder", "path": str(folder), "channels": 1}


def test_a_gan_needs_no_labels_and_classification_says_how_to_give_some(tmp_path):
    section = faces(tmp_path / "faces")
    admitted(section, "", "digits-dcgan")
    said = refusal(section, recipe="digits-cnn")
    assert said == (
        "objective.kind: classification needs at least 2 classes, but the data has 1; put the images of each class "
        f"into a folder of its own ({tmp_path}/faces/cat/1.png, {tmp_path}/faces/dog/2.png)"
    )


def test_a_gan_reads_images_of_parquet_files_without_a_target(tmp_path):
    path = tmp_path / "images.parquet"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 64), dtype=np.uint8)
    pq.write_table(pa.table({"x": pixels.tolist()}), path)
    section = {"kind": "parquet", "path": str(path), "input": "x", "image_shape": [1, 8, 8]}
    pq.write_table(pa.table({"x": pa.array(pixels.tolist(), pa.list_(pa.uint8()))}), path)
    admitted(section, "", "digits-dcgan")


# -- both input and target -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["whole", ["whole"], ["a", "whole", "b"]])
def test_a_column_is_not_both_input_and_target(inputs, file):
    said = refusal(data(file, input=inputs, target="whole"))
    assert said == ("data.target: whole is an input too, so there would be nothing to predict; name another column")
