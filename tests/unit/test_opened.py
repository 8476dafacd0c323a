"""open_model: a trained model takes what the files hold, and gives classes by name or numbers in their units."""

import numpy as np
import pandas
import pytest
import torch

import cluster
from cluster.data.prepare import prepared
from cluster.recipe.loading import load_recipe
from cluster.runs.given import as_stored
from cluster.runs.opened import Generator
from cluster.runs.predictor import Predictor
from nn_models.batch import Forest
from nn_models.errors import UserError
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> cluster.Outcome:
    run = tmp_path_factory.mktemp("runs") / "digits"
    return cluster.train("digits-mlp", overrides={"train.epochs": 4}, run=str(run))


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the test split as bytes, and their classes."""
    held = made.split_rows(prepared(load_recipe("digits-mlp").data), "test")
    return held.columns["input"].values, held.columns["target"].values


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.int16, torch.float32, torch.float64])
def test_pixels_of_any_numeric_type_give_what_evaluate_gives(digits, rows, dtype):
    model = digits.load_model()
    pixels, classes = rows
    assert pixels.dtype == np.uint8
    outputs = model(torch.tensor(pixels).to(dtype))
    right = (outputs.argmax(1).numpy() == classes).mean()
    evaluated = cluster.evaluate(digits.run)["metrics"]["test/accuracy"]
    assert right == pytest.approx(evaluated, abs=1e-12)  # the same rows, counted
    named = [model.classes[number] for number in classes]
    assert np.mean([a == b for a, b in zip(model.predict(pixels), named, strict=True)]) == right


def test_the_bare_net_reads_what_is_scaled(digits, rows):
    model = digits.load_model()
    pixels, _ = rows
    assert isinstance(model, Predictor)
    assert isinstance(model.net, torch.nn.Module)
    assert not model.training
    assert not model.net.training
    with torch.no_grad():
        bare = model.net(model.scaled(pixels)["input"])
    assert torch.equal(bare, model(pixels))


def test_what_it_takes_and_gives_is_told(digits):
    text = repr(digits.load_model())
    assert "bytes 0 to 255" in text
    assert "(rows, 1, 8, 8)" in text
    assert "0, 1, 2, 3, 4" in text


def test_it_is_the_same_object_as_that_of_open_model(digits, rows):
    assert torch.equal(cluster.open_model(digits.run)(rows[0]), digits.load_model()(rows[0]))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x / 255, "divided already"),
        (lambda x: x / 127.5 - 1, "no bytes"),
        (lambda x: x.astype(int) + 1000, "no bytes"),
        (lambda x: x[0], "rows\\[None\\]"),
        (lambda x: x.reshape(len(x), 64), "of shape"),
        (lambda x: x.astype(complex), "no numbers"),
        (lambda x: [["a"]], "no numbers"),
        (lambda x: 3, "a batch of rows"),
    ],
)
def test_what_is_no_row_of_the_file_is_refused(digits, rows, spoil, words):
    with pytest.raises(UserError, match=words):
        digits.load_model()(spoil(rows[0]))


def test_no_rows_give_no_outputs(digits):
    model = digits.load_model()
    assert model(np.empty((0, 1, 8, 8), np.uint8)).shape == (0, 10)
    assert model.predict(np.empty((0, 1, 8, 8), np.uint8)) == []


@pytest.mark.parametrize("target", ["label", "numbers"])
def test_features_in_the_units_of_the_file(tmp_path, target):
    spec = made.features(tmp_path / "in", 240, target=target)
    kind = "classification" if target == "label" else "regression"
    described = {"model": {"kind": "mlp"}, "data": spec, "objective": {"kind": kind}}
    overrides = {"train.epochs": 3, "train.global_batch_size": 32}
    outcome = cluster.train(described, run=str(tmp_path / "run"), overrides=overrides)
    model = outcome.load_model()
    held = made.split_rows(prepared(spec), "test")
    x, y = held.columns["input"].values, held.columns["target"].values
    for given in (x, x.astype(np.float64), x.tolist(), pandas.DataFrame(x), torch.tensor(x)):
        assert torch.equal(model(given), model(x))
    metrics = cluster.evaluate(outcome.run)["metrics"]
    if target == "label":
        assert (model(x).argmax(1).numpy() == y).mean() == pytest.approx(metrics["test/accuracy"], abs=1e-12)
        assert [int(name) for name in model.predict(x)] == model(x).argmax(1).tolist()
        assert "in the units of the file" in repr(model)
    else:
        predicted = model.predict(x)
        # float32 sums of a few dozen rows
        assert float((predicted - torch.tensor(y)).abs().mean()) == pytest.approx(metrics["test/mae"], rel=1e-5)


def test_rows_of_different_lengths(tmp_path):
    stored = made.RAGGED
    words = as_stored("input", stored["input"], [[1, 2, 3], [], [4]], torch.device("cpu"))
    assert words.values.tolist() == [1, 2, 3, 4]
    assert words.lengths.tolist() == [3, 0, 1]
    tree = {"words": [5, 6, -1], "children": [[-1, -1], [-1, -1], [0, 1]], "level": [0, 0, 1]}
    forest = as_stored("tree", stored["tree"], [tree, tree], torch.device("cpu"))
    assert isinstance(forest, Forest)
    assert forest.lengths.tolist() == [3, 3]
    with pytest.raises(UserError, match="children"):
        as_stored("tree", stored["tree"], [{"words": [1]}], torch.device("cpu"))


GAN = {
    "model": {"kind": "conditional_gan", "width": 4},
    "data": {"kind": "digits"},
    "objective": {"kind": "adversarial"},
    "train": {"epochs": 1, "global_batch_size": 128},
}


@pytest.fixture(scope="module")
def gan(tmp_path_factory) -> cluster.Outcome:
    return cluster.train(GAN, run=str(tmp_path_factory.mktemp("runs") / "gan"))


def test_a_generator_makes_bytes_by_label(gan):
    model = gan.load_model()
    assert isinstance(model, Generator)
    made_rows = model(20, seed=3)
    assert made_rows.dtype == torch.uint8
    assert made_rows.shape == (20, 1, 8, 8)
    assert torch.equal(made_rows, model(20, seed=3))
    assert not torch.equal(made_rows, model(20, seed=4))
    assert not torch.equal(model(4, label="1"), model(4, label="2"))
    bare = model.net.generator(torch.randn(4, 100, generator=torch.Generator().manual_seed(0)), torch.full((4,), 2))
    # half a byte of rounding
    assert torch.allclose(127.5 * (bare + 1), model(4, label="2").float(), atol=0.5 + 1e-3)
    with pytest.raises(UserError, match="no class"):
        model(4, label="eleven")
    with pytest.raises(UserError, match="can be made at once"):
        model()
    assert "num" in repr(model)
    assert "label" in repr(model)


def test_a_generator_of_pairs_starts_from_bytes(tmp_path):
    pairs = {
        "model": {"kind": "pix2pix", "width": 4},
        "data": {"kind": "pairs", "edges_of": {"kind": "digits"}},
        "objective": {"kind": "adversarial", "l1_weight": 10.0},
        "train": {"epochs": 1, "global_batch_size": 256},
    }
    model = cluster.train(pairs, run=str(tmp_path / "run")).load_model()
    given = made.split_rows(prepared(model.recipe.data), "test").columns["condition"].values[:5]
    assert model(given=given).shape == (5, 1, 8, 8)
    assert model(given=given).dtype == torch.uint8
    with pytest.raises(UserError, match="starts from rows"):
        model(5)
    with pytest.raises(UserError, match="divided already"):
        model(given=given / 255)
