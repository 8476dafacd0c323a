"""Columns and signatures: what a row holds, in both forms; what is imagined of it; what is refused."""

from typing import Literal, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from nn_models.batch import Forest, Ragged, Scenes
from nn_models.columns import (
    AnyColumn,
    Column,
    Features,
    Image,
    Label,
    Labels,
    Numbers,
    Scene,
    Sequence,
    Tokens,
    Tree,
)
from nn_models.errors import UserError
from nn_models.model import ModelSpec, reading
from nn_models.signature import Signature
from nn_models.spec import validate

pytestmark = pytest.mark.filterwarnings("error")

COLUMNS = {
    "features 5": Features(size=5),
    "image 3 x 4 x 6": Image(shape=(3, 4, 6)),
    "numbers 2": Numbers(size=2),
    "label of 10 classes": Label(size=10),
    "label of 1 class": Label(names=("all",), size=1),
    "sequence of 28 x 4": Sequence(width=4, length=28),
    "sequence of any number of x 4": Sequence(width=4),
    "tokens over 18,280 words": Tokens(size=18_280),
    "tokens 64 over 96 words": Tokens(size=96, length=64),
    "labels of 3 classes, one an element of input": Labels(size=3),
    "tree over 18,280 words": Tree(size=18_280),
    "scene of segments of 5 numbers, 2 classes": Scene(width=5, degree=3, names=("a", "b")),
}
NUM_OUTPUTS = {Numbers: 2, Label: None, Tokens: None, Labels: None}  # None: the size


def refusal(kind, data) -> list[str]:
    with pytest.raises(UserError) as caught:
        validate(kind, data)
    return str(caught.value).splitlines()


def test_every_kind_is_tried_here():
    kinds = set(get_args(get_args(AnyColumn)[0]))
    assert {type(column) for column in COLUMNS.values()} == kinds


@pytest.mark.parametrize("words", COLUMNS)
def test_a_column_is_described_for_people(words):
    column = COLUMNS[words]
    assert column.describe() == words
    assert validate(AnyColumn, column.model_dump(mode="json")) == column
    assert validate(AnyColumn, column.model_dump(mode="json", exclude_unset=True)) == column


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_imagined_rows_are_laid_as_stored_ones(column):
    value = column.imagine(4)
    if column.layout == "dense":
        assert isinstance(value, Tensor)
        assert value.shape == (4, *column.row_shape)
    elif isinstance(value, Ragged):
        ((_, field),) = column.ragged_fields().items()
        assert value.values.shape == (int(value.lengths.sum()), *field.shape)
        assert value.values.dtype == getattr(torch, field.dtype)
        assert len(value.lengths) == 4
    elif isinstance(value, Scenes):
        assert value.features.shape == (12, column.width)
        assert value.lengths.tolist() == [3] * 4
    else:
        assert isinstance(value, Forest)
        assert value.roots.tolist() == [8, 9, 10, 11]
        assert value.words.tolist() == [0] * 8 + [-1] * 4
        assert value.children.tolist() == [[-1, -1]] * 8 + [[2 * tree, 2 * tree + 1] for tree in range(4)]


@pytest.mark.parametrize("arity", [1, 2, 3])
def test_an_imagined_tree_has_as_many_nodes_as_imagined_labels(arity):
    forest, labels = Tree(size=9, arity=arity).imagine(2), Labels(size=3).imagine(2)
    assert sorted(forest.places.tolist()) == list(range(len(labels.values)))
    assert forest.children.shape == (6, arity)
    wanted = {1: [[-1]] * 2 + [[0], [1], [2], [3]], 2: [[-1, -1]] * 4 + [[0, 1], [2, 3]]}
    assert forest.children[:, :2].tolist() == wanted[min(2, arity)]
    assert (forest.children[:, 2:] == -1).all()


def test_imagined_rows_may_be_on_the_meta_device():
    signature = Signature(columns={str(index): column for index, column in enumerate(COLUMNS.values())})
    with torch.device("meta"):
        batch = signature.imagine(3)
    assert batch.place.num_rows == batch.place.global_weight == 3
    for name in signature.columns:
        value = batch[name]
        tensors = {"": value} if isinstance(value, Tensor) else vars(value)
        devices = {name: tensor.device.type for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        assert devices.pop("cpu_lengths", "cpu") == "cpu"  # known there as well
        assert set(devices.values()) == {"meta"}
    assert signature.imagine(3).keys.tolist() == [0, 1, 2]
    assert "0" in batch
    assert "input" not in batch


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_what_there_is_to_predict(column):
    if type(column) not in NUM_OUTPUTS:
        with pytest.raises(UserError, match=rf"data: {column.noun} is nothing to predict; choose a label or numbers"):
            _ = column.num_outputs
        assert not column.predicted
    else:
        assert column.num_outputs == column.size


def test_names_count_themselves():
    assert validate(AnyColumn, {"kind": "label", "names": ["a", "b"]}) == Label(names=("a", "b"), size=2)
    assert refusal(Label, {"names": ["a", "b"], "size": 3}) == ["size: 3 where there are 2 names"]
    assert refusal(Label, {}) == ["size: missing; it has no default, so set it"]
    assert refusal(Label, {"size": 0}) == ["size: must be greater than 0, not 0"]


# -- signatures ------------------------------------------------------------------------------------------------------


def test_the_short_form():
    signature = Signature(input_shape=(3, 224, 224), num_outputs=1000)
    assert signature == Signature(columns={"input": Image(shape=(3, 224, 224)), "target": Label(size=1000)})
    assert (signature.input_shape, signature.input_size, signature.num_outputs) == ((3, 224, 224), 150_528, 1000)
    assert signature.condition_shape is None
    signature = Signature(input_shape=(np.int64(5),), num_outputs=np.int64(2))  # as arrays' shapes may give
    assert signature == Signature(columns={"input": Features(size=5), "target": Label(size=2)})
    pairs = Signature(input_shape=(3, 6, 7), condition_shape=(1, 6, 7), num_outputs=1)
    assert pairs["condition"] == Image(shape=(1, 6, 7))
    assert pairs.condition_shape == (1, 6, 7)
    assert Signature(input_shape=(5,), condition_shape=None).columns == {"input": Features(size=5)}


def test_a_signature_is_described_for_people():
    columns = {"input": Tokens(size=18_280), "target": Label(size=2)}
    assert Signature(columns=columns).describe() == "input: tokens over 18,280 words, target: label of 2 classes"


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        (
            {"input_shape": [0]},
            ["input_shape: must be (channels, height, width) or (features,), numbers above 0, not [0]"],
        ),
        (
            {"input_shape": [4, 6]},
            ["input_shape: must be (channels, height, width) or (features,), numbers above 0, not [4, 6]"],
        ),
        ({"input_shape": 5}, ["input_shape: must be (channels, height, width) or (features,), numbers above 0, not 5"]),
        (
            {"input_shape": [True]},
            ["input_shape: must be (channels, height, width) or (features,), numbers above 0, not [True]"],
        ),
        (
            {"input_shape": [1, 2, 2], "condition_shape": [4]},
            ["condition_shape: must be (channels, height, width), numbers above 0, not [4]"],
        ),
        ({"input_shape": [5], "num_outputs": 0}, ["num_outputs: must be a number above 0, not 0"]),
        ({"input_shape": [5], "num_output": 3}, ["num_output: unknown field; did you mean num_outputs?"]),
        (
            {"input_shape": [5], "columns": {}},
            ["columns: unknown field; known: condition_shape, input_shape, num_outputs"],
        ),
        ({"columns": {"input": {"kind": "imge"}}}, ["columns.input.kind: unknown kind 'imge'; did you mean image?"]),
        (
            {"columns": {"input": {"kind": "image", "shape": [1, 2, 0]}}},
            ["columns.input.shape.2: must be greater than 0, not 0"],
        ),
        ({}, ["columns: missing; it has no default, so set it"]),
    ],
)
def test_what_is_no_signature(data, messages):
    assert refusal(Signature, data) == messages


def test_a_column_that_is_not_there():
    signature = Signature(input_shape=(5,), num_outputs=2)
    assert "condition" not in signature
    with pytest.raises(UserError, match="data: its rows have no condition, but input, target; choose another data set"):
        _ = signature["condition"]


def test_a_model_refuses_what_it_does_not_read():
    class Picture(ModelSpec):
        reads = reading(input=Image)
        kind: Literal["picture"] = "picture"

        def build(self, signature: Signature) -> torch.nn.Module:
            return torch.nn.Identity()

    Picture().check(Signature(input_shape=(1, 2, 2), num_outputs=2))
    for column, said in (
        (Features(size=3), r"features input of shape \(3,\)"),
        (Tree(size=9), "tree input over 9 words"),
        (Tokens(size=9), "tokens input over 9 words"),
    ):
        with pytest.raises(UserError, match=rf"model.kind: picture reads image input, but the data has {said}; choose"):
            Picture().check(Signature(columns={"input": column}))
    with pytest.raises(UserError, match=r"picture reads image input, but the data has no input"):
        Picture().check(Signature(columns={"target": Label(size=2)}))


def test_kinds_say_what_storage_asks():
    class Base(Column):
        kind: Literal["base"] = "base"

    assert Base().layout == "dense"
    with pytest.raises(NotImplementedError):
        _ = Base().row_shape
