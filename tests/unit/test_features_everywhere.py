"""The classifier that qualities are measured by comes to the same figures on other processors and threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster.adversarial.features import WEIGHTS, open_features
from cluster.adversarial.quality import Quality
from cluster.data.prepare import prepare
from cluster.data.shards import DataSet
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import TrainSpec
from cluster.storage import Folder

FEW = {"epochs": 3, "global_batch_size": 64}


def floor(folder: str) -> dict[str, float]:
    """What real digits reach, by a classifier that is trained for it."""
    recipe = load_recipe("digits-dcgan")
    prepare(recipe.data, Folder(folder))
    data = DataSet(Folder(folder))
    return Quality(open_features(data, train=TrainSpec(**FEW)), data, recipe=recipe, split="test").floor


def elsewhere(folder: Path, *, threads: int, **environment: str) -> dict[str, float]:
    """The same in a process that uses other instructions, or so many threads."""
    code = (
        "import json, sys, torch; torch.set_num_threads(int(sys.argv[2]));"
        "from tests.unit.test_features_everywhere import floor; print(json.dumps(floor(sys.argv[1])))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(threads)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(finished.stdout.splitlines()[-1])


def test_its_figures_are_those_of_other_machines(tmp_path):
    plain = floor(str(tmp_path / "plain"))
    old = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
    found = elsewhere(tmp_path / "old", threads=torch.get_num_threads() + 1, OMP_WAIT_POLICY="PASSIVE", **old)
    # sums of float64 in another order, which training makes more of; features are rounded to float32
    assert found == pytest.approx(plain, rel=1e-5)


def test_it_is_kept_as_float32_and_leaves_no_trace(tmp_path):
    prepare(load_recipe("digits-dcgan").data, Folder(tmp_path))
    state = torch.random.get_rng_state()
    features = open_features(DataSet(Folder(tmp_path)), train=TrainSpec(epochs=1, global_batch_size=64))
    assert features is not None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert {value.dtype for value in features.state_dict().values()} <= {torch.float32, torch.int64}
    assert any(tmp_path.rglob(Path(WEIGHTS).name))
