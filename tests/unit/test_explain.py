"""What a run's model goes by: in the report, and from Python for images of one's own."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import cluster
from cluster.inference.explain import explain
from jobs.report import write_report
from jobs.report.pictures import BLUE, RED, heat
from nn_models.errors import UserError

FEW = {"epochs": 3, "global_batch_size": 64}


def page(run: str) -> str:
    return Path(write_report(run)).read_text()


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> cluster.Outcome:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    return cluster.train({"model": {"kind": "mlp"}, "data": {"kind": "digits"}, "train": FEW}, run=str(folder))


def test_images_are_explained_in_the_report(digits):
    text = page(digits.run)
    assert "What it goes by" in text
    (section,) = re.findall(r'<ul class="examples pairs">(.*?)</ul>', text, re.DOTALL)
    assert section.count("<img") == 32
    assert "feature" not in section


def test_own_images_are_explained(digits):
    model = digits.load_model()
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
    found = explain(model, images)
    assert found.classes == model.predict(images)
    assert found.maps.shape == (3, 8, 8)
    assert np.abs(found.maps).max() <= 1
    hidden = images.astype(np.float32)
    hidden[:, :, :2, :2] = hidden.mean((2, 3), keepdims=True)  # the first of the places
    with torch.no_grad():
        chances = model(images).softmax(1)
        lost = (chances.max(1).values - model(hidden).softmax(1).gather(1, chances.argmax(1)[:, None])[:, 0]).numpy()
    np.testing.assert_allclose(found.maps[:, 0, 0], lost, atol=1e-5)  # float32; only that one hides the corner
    assert explain(model, images[:0]).maps.shape == (0, 8, 8)


@pytest.mark.parametrize("target", ["label", "numbers"])
def test_features_are_explained_by_name(tmp_path, target):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=400) for name in ("tells", "tells_nothing")}
    y = values["tells"] > 0 if target == "label" else 3 * values["tells"]
    pq.write_table(pa.table({**values, "y": pa.array(y)}), tmp_path / "rows.parquet")
    data = {"kind": "parquet", "path": str(tmp_path / "rows.parquet"), "input": [*values], "target": "y"}
    kind = "classification" if target == "label" else "regression"
    recipe = {"model": {"kind": "mlp", "hidden": [16]}, "data": data, "objective": {"kind": kind}}
    recipe |= {"optimizer": {"kind": "adam", "lr": 0.01}, "train": {"epochs": 15, "global_batch_size": 32}}
    run = cluster.train(recipe, run=str(tmp_path / "run")).run
    text = page(run)
    rows = re.findall(r'<th scope="row">(\w+)</th><td class="number">(-?[\d.]+) &plusmn;', text)
    assert [name for name, _ in rows] == ["tells", "tells_nothing"]
    lost = [float(value) for _, value in rows]
    assert lost[0] > 0.3
    assert abs(lost[1]) < 0.1
    assert ("R²" if target == "numbers" else "accuracy") in text[text.index("What it goes by") :][:200]
    with pytest.raises(UserError, match="no classes of images"):
        explain(cluster.open_model(run), np.zeros((1, 2)))


def test_rows_of_other_kinds_have_no_such_section(tmp_path):
    data = {"kind": "listops", "rows": 60, "depth": 2, "length": 12}
    recipe = {"model": {"kind": "tree_lstm", "hidden": 4, "embedding": 4}, "data": data, "train": FEW}
    text = page(cluster.train(recipe, run=str(tmp_path / "run")).run)
    assert "What it goes by" not in text
    assert "importance" not in text
    assert "occlusion" not in text


def test_heat_is_blue_for_and_red_against():
    values = np.array([[1.0, -1.0], [0.0, 0.5]])
    found = heat(np.full((3, 2, 2), 100, np.uint8), values, most=1.0)
    assert found[0, 0].tolist() == list(BLUE)
    assert found[0, 1].tolist() == list(RED)
    assert found[1, 0].tolist() == [114] * 3
