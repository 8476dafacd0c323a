"""`manta export`: what is written and printed, and what is refused."""

import json
import os

import numpy as np
import pytest
import torch

from tests.unit import untrained

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    return untrained.builtin(tmp_path_factory.mktemp("runs") / "digits", "digits-mlp")


def test_a_file_is_written_and_what_it_takes_is_told(manta, digits, tmp_path):
    out = tmp_path / "net.pt"
    code, printed, err = manta("export", digits, "--format", "torchscript", "--out", out)
    assert (code, err) == (0, "")
    assert printed.splitlines()[0] == str(out)
    assert "uint8 (rows, 1, 8, 8)" in printed
    assert "largest difference from PyTorch on 36 made rows: 0.0e+00" in printed
    extra = {"manta.json": ""}
    module = torch.jit.load(str(out), _extra_files=extra)
    label, probabilities = module(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    assert label.shape == (4,)
    assert probabilities.sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-6)  # of float32
    classes = json.loads(json.loads(extra["manta.json"])["classes"])
    assert classes == [str(digit) for digit in range(10)]
    assert os.listdir(tmp_path) == ["net.pt"]


def test_torch_loads_a_pt2_file_and_onnx_runtime_an_onnx_file(manta, digits, tmp_path):
    import onnxruntime

    code, printed, _ = manta("export", digits, "--format", "torch-export", "--out", tmp_path / "net.pt2", "--json")
    assert code == 0
    assert json.loads(printed)["difference"] <= 1e-4
    rows = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), np.uint8)
    _, wanted = torch.export.load(tmp_path / "net.pt2").module()(torch.from_numpy(rows))
    code, printed, _ = manta("export", digits, "--format", "onnx", "--out", tmp_path / "net.onnx", "--json")
    assert code == 0
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    _, found = session.run(None, {"input": rows})
    assert found == pytest.approx(wanted.numpy(), abs=1e-4)


def test_a_folder_is_written(manta, digits, tmp_path):
    out = tmp_path / "hub"
    assert manta("export", digits, "--format", "safetensors-hub", "--out", out)[0] == 0
    assert sorted(os.listdir(out)) == ["README.md", "model"]
    assert os.listdir(tmp_path) == ["hub"]
    (out / "model" / "old").write_text("")
    assert manta("export", digits, "--format", "safetensors-hub", "--out", out, "--overwrite")[0] == 0
    assert sorted(os.listdir(out)) == ["README.md", "model"]
    assert sorted(os.listdir(out / "model")) == ["model.safetensors", "recipe.yaml"]


def test_what_is_there_stays_unless_it_is_to_be_replaced(manta, refused, digits, tmp_path):
    out = tmp_path / "net.pt"
    out.write_text("mine")
    message = refused("export", digits, "--format", "torchscript", "--out", out)
    assert message == f"--out: {out} exists; replace it with --overwrite"
    assert out.read_text() == "mine"
    assert manta("export", digits, "--format", "torchscript", "--out", out, "--overwrite")[0] == 0
    assert out.read_bytes()[:2] == b"PK"


def test_a_folder_of_something_else_is_not_replaced(refused, digits, tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "thesis.tex").write_text("")
    assert "exists; replace it with --overwrite" in refused(
        "export", digits, "--format", "safetensors-hub", "--out", hub
    )
    message = refused("export", digits, "--format", "safetensors-hub", "--out", hub, "--overwrite")
    assert message == f"--out: {hub} holds something else (thesis.tex); choose another place"
    assert os.listdir(hub) == ["thesis.tex"]


def test_a_run_is_not_replaced_by_its_own_model(refused, tmp_path):
    run = untrained.builtin(tmp_path / "run", "digits-mlp")
    before = sorted(os.listdir(run))
    message = refused("export", run, "--format", "safetensors-hub", "--out", run, "--overwrite")
    assert message.endswith("holds something else (environment.json); choose another place")
    assert sorted(os.listdir(run)) == before


def test_a_file_that_gives_other_numbers_is_not_written(manta, tmp_path):
    run, out = untrained.branching(tmp_path / "run"), tmp_path / "net.pt"
    code, printed, err = manta("export", run, "--format", "torchscript", "--out", out)
    assert (code, printed) == (1, "")
    assert "gives other numbers" in err
    assert "nothing was written" in err
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--format", "onx", "--out", "a.onnx"), "--format: 'onx' is no format; did you mean onnx?"),
        (("--format", "onnx", "--out", "a.pt"), "--out: 'a.pt' is not the name of an ONNX file; end it in .onnx"),
        (("--format", "torchscript", "--out", "no/a.pt"), "is not a folder; make it first"),
        (("--format", "safetensors-hub", "--out", "no/hub"), "is not a folder; make it first"),
        (("--format", "safetensors-hub", "--out", "s3://bucket/hub"), "is no folder on this machine"),
        (("--format", "safetensors-hub", "--out", "file"), "is a file or a link"),
    ],
)
def test_wrong_options(refused, digits, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert words in refused("export", digits, *options)
    assert os.listdir(tmp_path) == ["file"]


def test_runs_that_have_no_graph_or_no_model(refused, tmp_path):
    out = tmp_path / "a.pt2"
    run = untrained.builtin(tmp_path / "run", "sst-tree-lstm")
    assert "its input is a tree" in refused("export", run, "--format", "torch-export", "--out", out)
    assert "not a run's directory" in refused("export", tmp_path, "--format", "torch-export", "--out", out)
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    assert "no model here" in refused("export", run, "--format", "safetensors-hub", "--out", tmp_path / "hub")
    assert sorted(os.listdir(tmp_path)) == ["run"]
