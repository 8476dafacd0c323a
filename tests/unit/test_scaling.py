"""Scaling: stored numbers at the scale that a model asks for, and back."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.data.layouts import shared
from cluster.data.manifest import StoredColumn
from cluster.data.scaling import Scaling
from nn_models.batch import Ragged
from nn_models.columns import Features, Image, Label, Sequence, Tokens
from nn_models.errors import UserError
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")

CPU = torch.device("cpu")
GENERATOR = np.random.default_rng(0)
COLOUR = StoredColumn(column=Image(shape=(3, 4, 5)), dtype="uint8", mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
GREY = StoredColumn(column=Image(shape=(1, 4, 5)), dtype="uint8", mean=(0.3,), std=(0.2,))
FLOATS = StoredColumn(column=Image(shape=(1, 4, 5)), dtype="float32", mean=(0.3,), std=(0.2,))
CONDITION = StoredColumn(column=Image(shape=(1, 4, 5)), dtype="uint8", moments=False)
FEATURES = StoredColumn(column=Features(size=3), dtype="float32", mean=(1.0, 2.0, 3.0), std=(1.0, 0.5, 10.0))
WINDOWS = StoredColumn(column=Sequence(width=2, length=7), dtype="float32", mean=(1.0, -1.0), std=(2.0, 4.0))
IMAGES = {"colour": COLOUR, "grey": GREY, "floats": FLOATS}


def scaled(stored: StoredColumn, values: np.ndarray, scale) -> np.ndarray:
    ready = Scaling({"input": stored}, scale, CPU)({"input": shared(values)})["input"]
    assert isinstance(ready, Tensor)
    assert ready.dtype == torch.float32
    return ready.numpy()


def some(stored: StoredColumn, rows: int = 6) -> np.ndarray:
    shape = (rows, *stored.column.row_shape)
    if stored.dtype == "uint8":
        return GENERATOR.integers(0, 256, shape, dtype=np.uint8)
    return GENERATOR.normal(size=shape).astype(np.float32)


def moments(stored: StoredColumn) -> tuple[np.ndarray, np.ndarray]:
    shape = (-1, 1, 1) if len(stored.column.row_shape) == 3 else (-1,)
    return np.reshape(stored.mean, shape), np.reshape(stored.std, shape)


@pytest.mark.parametrize("kind", ["images", "features"])
def test_standard_training_rows_have_mean_0_and_deviation_1(kind, tmp_path):
    spec = made.images(tmp_path / "in", 500) if kind == "images" else made.features(tmp_path / "in", 500)
    data = made.written(spec, tmp_path / "out")
    ready = scaled(data.manifest.columns["input"], made.split_rows(data, "train").columns["input"].values, "standard")
    ready = np.moveaxis(ready, 1, -1).reshape(-1, 3) if kind == "images" else ready
    np.testing.assert_allclose(ready.mean(0, np.float64), 0, atol=1e-5)  # float32, rounded at numbers of up to 20
    np.testing.assert_allclose(ready.std(0, dtype=np.float64), 1, atol=1e-5)  # the same


@pytest.mark.parametrize("stored", [*IMAGES.values(), FEATURES, WINDOWS], ids=[*IMAGES, "features", "windows"])
def test_standard(stored):
    values = some(stored)
    mean, std = moments(stored)
    # float32 of float64: a scale, a shift and their use are rounded, at numbers up to 10
    np.testing.assert_allclose(scaled(stored, values, "standard"), (values / stored.unit - mean) / std, atol=1e-5)


@pytest.mark.parametrize("stored", [*IMAGES.values(), FEATURES, WINDOWS], ids=[*IMAGES, "features", "windows"])
def test_unit(stored):
    values = some(stored)
    # float32 of float64, at numbers up to 1; numbers that are no bytes stay as they are
    np.testing.assert_allclose(scaled(stored, values, "unit"), values / stored.unit, atol=1e-7)


@pytest.mark.parametrize("stored", [*IMAGES.values(), CONDITION], ids=[*IMAGES, "condition"])
def test_images_are_symmetric_about_0(stored):
    values = some(stored)
    ready = scaled(stored, values, "symmetric")
    np.testing.assert_allclose(ready, values / stored.unit * 2 - 1, atol=1e-6)  # float32, at numbers up to 8


def test_symmetric_bytes_without_moments_are_exact():
    ready = scaled(CONDITION, np.arange(256, dtype=np.uint8).repeat(20).reshape(256, 1, 4, 5), "symmetric")
    expected = torch.arange(256).float() / 127.5 - 1
    np.testing.assert_array_equal(ready[:, 0, 0, 0], expected.numpy())
    assert (ready.min(), ready.max()) == (-1, 1)


@pytest.mark.parametrize("stored", [FEATURES, WINDOWS], ids=["features", "windows"])
def test_other_numbers_are_standard_where_images_are_symmetric(stored):
    values = some(stored)
    np.testing.assert_array_equal(scaled(stored, values, "symmetric"), scaled(stored, values, "standard"))


@pytest.mark.parametrize("scale", ["standard", "unit", "symmetric"])
def test_there_and_back(scale):
    columns = {**IMAGES, "features": FEATURES, "windows": WINDOWS}
    columns |= {} if scale == "standard" else {"condition": CONDITION}
    scaling = Scaling(columns, scale, CPU)
    values = {name: torch.from_numpy(some(stored)) for name, stored in columns.items()}
    for name, ready in scaling(values).items():
        back = scaling.inverse(name, ready)
        assert back.dtype == torch.float32
        # float32 there and back, at numbers up to 255
        torch.testing.assert_close(back, values[name].float(), atol=1e-4, rtol=0)


def test_only_numbers_are_scaled():
    columns = {
        "input": StoredColumn(column=Sequence(width=2), mean=(1.0, 2.0), std=(2.0, 4.0)),
        "target": StoredColumn(column=Label(size=3), dtype="int64"),
        "words": StoredColumn(column=Tokens(size=9)),
    }
    words = Ragged(torch.tensor([1, 2, 3]), torch.tensor([2, 1]), 2)
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 2.0]])
    stored = {"input": Ragged(values, torch.tensor([2, 1]), 2), "target": torch.tensor([0, 2]), "words": words}
    scaling = Scaling(columns, "standard", CPU)
    ready = scaling(stored)
    assert ready["target"] is stored["target"]
    assert ready["words"] is words
    assert isinstance(ready["input"], Ragged)
    assert ready["input"].values.tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]
    assert ready["input"].lengths.tolist() == [2, 1]
    assert torch.equal(scaling.inverse("target", stored["target"]), stored["target"])
    assert torch.equal(values, torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 2.0]]))  # what is stored is not changed


def test_a_scale_that_cannot_be_had_is_refused():
    with pytest.raises(
        UserError, match=r"data: no mean and deviation of its condition are kept, which standard inputs"
    ):
        Scaling({"input": GREY, "condition": CONDITION}, "standard", CPU)
    features = StoredColumn(column=Features(size=2), dtype="float32", moments=False)
    with pytest.raises(UserError, match=r"data: no mean and deviation of its input are kept, which symmetric inputs"):
        Scaling({"input": features}, "symmetric", CPU)
    assert Scaling({"input": features}, "unit", CPU)({"input": torch.ones(1, 2)})["input"].tolist() == [[1.0, 1.0]]
