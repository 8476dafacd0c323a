"""Equal runs leave equal files of weights and evidence, so that a checksum shows that a resumed run is the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

import cluster
from cluster.storage import Folder
from cluster.training.checkpoints import packed, read_model, save_model
from cluster.training.loop import Loop
from tests.unit import made

CALLS = 20  # the library orders two keys at random: that all of these agree by chance is one in half a million


def test_the_same_content_is_the_same_bytes():
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.arange(3), "é": torch.zeros(0, dtype=torch.bfloat16)}
    keys = [f"key {number}" for number in range(6)]
    files = {packed(tensors, dict.fromkeys(order, "schön")) for order in [keys, keys[::-1]] for _ in range(CALLS)}
    assert len(files) == 1


def test_the_library_reads_what_was_packed(tmp_path):
    tensors = {"weight": torch.randn(3, 5), "half": torch.randn(7).bfloat16(), "none": torch.zeros(0, 4)}
    metadata = {"best": json.dumps({"value": 0.5}), "name": "Größe \u2028 \n \\ \x00"}
    file = tmp_path / "packed.safetensors"
    file.write_bytes(packed(tensors, metadata))
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == metadata
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert start % 8 == 0  # so that a file that is mapped into memory can be used as it is
    assert all(torch.equal(load(file.read_bytes())[name], tensor) for name, tensor in tensors.items())


def recipe(folder: Path) -> dict:
    return {
        "model": {"kind": "mlp", "hidden": [4]},
        "data": made.features(folder / "rows", 120).model_dump(),
        "train": {"epochs": 3, "global_batch_size": 20},
    }


def test_equal_runs_leave_equal_files(tmp_path):
    described = recipe(tmp_path)
    for name in ("one", "two"):
        cluster.train(described, run=str(tmp_path / name))
    for file in ("model/model.safetensors", "evaluation.safetensors"):
        one, two = (tmp_path / name / file for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), file


def test_a_run_that_was_interrupted_and_resumed_leaves_the_same_files(tmp_path):
    described = recipe(tmp_path)
    cluster.train(described, run=str(tmp_path / "whole"))

    validate, done = Loop._validate, []

    def interrupted(loop: Loop) -> None:
        validate(loop)
        done.append(loop)
        if len(done) == 2:  # the first epoch has left a checkpoint
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cluster.train(described, run=str(tmp_path / "resumed"))
    cluster.train(described, run=str(tmp_path / "resumed"), resume=True)
    for file in ("model/model.safetensors", "evaluation.safetensors"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_saving_the_same_weights_again_changes_no_byte(tmp_path):
    cluster.train(recipe(tmp_path), run=str(tmp_path / "run"))
    run = Folder(tmp_path / "run")
    before, saved = (tmp_path / "run/model/model.safetensors").read_bytes(), read_model(run)
    for _ in range(CALLS):
        save_model(run, saved.weights, best=saved.best, manifest=saved.manifest)
        assert (tmp_path / "run/model/model.safetensors").read_bytes() == before
