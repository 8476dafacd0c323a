"""Export: a file gives what the opened model gives, of every recipe, or it is said why there can be none."""

import json
import os
import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cluster
from cluster.data.prepare import prepared
from cluster.errors import RunFailed
from cluster.inference.export.check import TOLERANCE, largest_difference, made_rows
from cluster.inference.export.exporting import export
from cluster.inference.export.formats import FORMATS, base
from cluster.inference.export.graph import graph_of
from cluster.inference.export.hub import hub_files, write_files
from cluster.recipe.loading import builtin_recipes, load_recipe
from cluster.storage import Folder
from nn_models.errors import UserError
from nn_models.pix2pix import DropoutNoise
from tests.unit import made, untrained

# one of each kind of graph, and of the nets that exporters treat in their own ways
SEVERAL = ["rows-lstm", "series-gru", "fashion-conditional-vae", "digits-gan"]


@pytest.fixture
def run_of(tmp_path):
    """Makes an untrained run of a built-in recipe."""
    return lambda name, **overrides: untrained.builtin(tmp_path / "run", name, **overrides)


def regression(folder: Path) -> str:
    """A run of a small net that predicts two numbers."""
    data = made.features(folder / "in", 240, target="numbers")
    recipe = load_recipe({"model": {"kind": "mlp"}, "data": data, "objective": {"kind": "regression"}})
    return untrained.run(folder / "run", recipe, prepared(data).manifest)


def compared(run: str, name: str) -> None:
    """Export it, or see that what is refused is refused for the right reason."""
    model = cluster.open_model(run)
    ragged = [column for column in model.recipe.model.reads if model.manifest.signature[column].layout == "ragged"]
    draws = any(isinstance(module, DropoutNoise) for module in model.net.modules())
    if ragged or draws:
        with pytest.raises(UserError, match="as many elements as it has" if ragged else "draws numbers of its own"):
            export(run, format=FORMATS[name])
        return
    found = export(run, format=FORMATS[name])
    assert found.difference <= TOLERANCE
    assert found.content


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipes_model_is_exported_or_refused_with_the_reason(name, run_of):
    compared(run_of(name), "torchscript")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipes_model_in_the_formats_that_take_longer(name, format, run_of):
    compared(run_of(name), format)


@pytest.mark.parametrize("name", SEVERAL)
def test_one_of_each_kind_in_onnx_and_torch_export(name, run_of):
    run = run_of(name)
    for format in ("onnx", "torch-export"):
        compared(run, format)


@pytest.mark.parametrize("name", builtin_recipes())
def test_the_folder_of_every_recipe_can_be_loaded_as_its_card_says(name, run_of, tmp_path, monkeypatch, capsys):
    files, difference = hub_files(run_of(name))
    assert difference == 0
    folder = tmp_path / "hub"
    write_files(folder, files)
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / "snippet.py").write_text(code)
    monkeypatch.chdir(folder)
    runpy.run_path(str(tmp_path / "snippet.py"))
    assert len(capsys.readouterr().out.splitlines()) > 4
    assert f"# {name}\n" in card
    assert "| `train/loss` | 1.0000 |" in card


def test_the_folder_has_the_runs_own_figures(tmp_path):
    run = str(tmp_path / "run")
    cluster.train("digits-mlp", run=run, overrides={"train.epochs": 1})
    files, _ = hub_files(run)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    accuracy = result["metrics"]["test/accuracy"]
    assert f"| `test/accuracy` | {accuracy:.4f} |" in files["README.md"].decode()
    write_files(tmp_path / "hub", files)
    # a run's directory for whoever reads RUN/model
    assert cluster.evaluate(str(tmp_path / "hub"))["metrics"]["test/accuracy"] == pytest.approx(accuracy, abs=1e-12)


# -- what a file says is what the opened model says --------------------------------------------------------------------


def answers(run: str, rows, *, format: str = "onnx") -> dict[str, np.ndarray]:
    """What the exported file gives for these rows, by name."""
    graph = graph_of(cluster.open_model(run))
    computes = FORMATS[format].opened(export(run, format=FORMATS[format]).content, graph)
    names = [port.name for port in graph.outputs]
    return {name: values.numpy() for name, values in zip(names, computes([*map(torch.as_tensor, rows)]), strict=True)}


def test_classes_and_their_probabilities(run_of):
    run = run_of("digits-cnn")
    model = cluster.open_model(run)
    rows = made.split_rows(prepared(load_recipe("digits-cnn").data), "test").columns["input"].values
    found = answers(run, [rows])
    scores = model(rows)
    assert found["probabilities"] == pytest.approx(scores.softmax(1).numpy(), abs=1e-6)  # sums of float32
    assert [model.classes[number] for number in found["label"]] == model.predict(rows)


def test_the_next_token_of_each_place_in_a_window(run_of):
    run = run_of("docs-lstm")
    model = cluster.open_model(run)
    (rows,) = made_rows(graph_of(model), 3)
    found = answers(run, [rows], format="torchscript")
    assert found["probabilities"].shape == (*rows.shape, model.manifest.signature["target"].size)
    wanted = model(rows).softmax(1).reshape(found["probabilities"].shape)
    assert found["probabilities"] == pytest.approx(wanted.numpy(), abs=1e-6)  # sums of float32


def test_numbers_in_their_units(tmp_path):
    run = regression(tmp_path)
    model = cluster.open_model(run)
    rows = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    assert answers(run, [rows])["numbers"] == pytest.approx(model.predict(rows).numpy(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("relative", [True, False])
def test_a_forecast_from_the_last_steps_in_their_units(run_of, relative):
    run = run_of("series-gru", **{"data.relative": relative})
    model = cluster.open_model(run)
    past = np.random.default_rng(0).normal(20, 3, (5, model.window, len(model.ahead.columns))).astype(np.float32)
    found = answers(run, [past], format="torchscript")["forecast"]
    assert found == pytest.approx(model.forecast(past).numpy(), abs=1e-4)  # degrees, about 20 of them, in float32


@pytest.mark.parametrize("name", ["fashion-conv-autoencoder", "fashion-conditional-vae"])
def test_codes_rows_and_errors(run_of, name):
    run = run_of(name)
    model = cluster.open_model(run)
    rows = made_rows(graph_of(model), 7)
    found = answers(run, rows, format="torchscript")
    told = {"target": rows[1]} if model.told else {}
    assert found["codes"] == pytest.approx(model.encode(rows[0], **told).numpy(), abs=1e-5)
    assert found["rows"] == pytest.approx(model(rows[0], **told).numpy(), abs=1e-3)  # bytes, of 255
    assert found["error"] == pytest.approx(model.errors(rows[0], **told).numpy(), rel=1e-5)


def test_a_generator_of_the_class_asked_for(run_of):
    run = run_of("digits-conditional-gan")
    model = cluster.open_model(run)
    noise = torch.randn(6, 64, generator=torch.Generator().manual_seed(4))
    found = answers(run, [noise, torch.full((6,), 3)])["rows"]
    assert (found.round().astype(np.uint8) == model(6, label="3", seed=4).numpy()).mean() > 0.99  # halves round apart


def test_a_generator_that_starts_from_images(run_of):
    run = run_of("fashion-pix2pix", **{"model.dropout": 0.0})
    model = cluster.open_model(run)
    (given,) = made_rows(graph_of(model), 4)
    found = answers(run, [given], format="torchscript")["rows"]
    assert (found.round().astype(np.uint8) == model(given=given).numpy()).mean() > 0.99  # halves round apart


def test_names_and_shapes_stand_in_the_file(run_of, tmp_path):
    import onnx

    content = export(run_of("digits-cnn"), format=FORMATS["onnx"]).content
    file = onnx.load_from_string(content)
    onnx.checker.check_model(file, full_check=True)
    told = {prop.key: prop.value for prop in file.metadata_props}
    assert json.loads(told["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(told["inputs"])[0]["dtype"] == "uint8"
    (rows,) = file.graph.input
    assert rows.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [axis.dim_value for axis in rows.type.tensor_type.shape.dim][1:] == [1, 8, 8]
    assert next(axis.dim_param for axis in rows.type.tensor_type.shape.dim) == "rows"


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_file_that_gives_other_numbers_is_a_failure(run_of, monkeypatch):
    right = FORMATS["torchscript"]

    def opened(content, graph):
        computes = right.opened(content, graph)
        return lambda rows: [values + 2e-4 if values.is_floating_point() else values for values in computes(rows)]

    with pytest.raises(RunFailed, match=r"gives other numbers, by 0\.0002"):
        export(run_of("digits-mlp"), format=replace(right, opened=opened))


def test_what_is_no_number_or_of_another_shape_is_no_small_difference(run_of):
    graph = graph_of(cluster.open_model(run_of("digits-mlp")))

    def changed(change):
        def computes(rows):
            label, probabilities = graph(*rows)
            return [label, change(probabilities)]

        return largest_difference(graph, computes)

    assert changed(lambda values: values) == 0
    assert changed(lambda values: torch.full_like(values, torch.nan)) == np.inf
    for change in (lambda values: values[:, :3], lambda values: values.double()):
        with pytest.raises(UserError, match="gives something else"):
            changed(change)


def test_a_package_that_is_missing_is_named(run_of, monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        export(run_of("digits-mlp"), format=FORMATS["onnx"])
    assert str(caught.value) == (
        "--format: onnx needs onnx, onnxscript, onnxruntime, not installed here; pip install 'manta-train[onnx]'"
    )


def test_a_net_whose_numbers_decide_what_follows(tmp_path, capfd):
    run = untrained.branching(tmp_path / "run")
    with pytest.raises(UserError, match=r"a number that the model computes decides .*--format safetensors-hub"):
        export(run, format=FORMATS["torch-export"])
    assert capfd.readouterr().err == ""
    with pytest.raises(RunFailed, match="gives other numbers"):  # a trace keeps the branch that it has seen
        export(run, format=FORMATS["torchscript"])


def test_a_run_without_a_model(tmp_path):
    recipe = load_recipe("digits-mlp")
    from cluster.training.run_directory import RunDirectory

    RunDirectory(str(tmp_path / "run")).write_start(recipe, {})
    with pytest.raises(UserError, match="no model here"):
        export(str(tmp_path / "run"), format=FORMATS["torchscript"])
    assert os.listdir(Folder(tmp_path / "run").path)
