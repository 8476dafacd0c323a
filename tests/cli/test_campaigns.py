"""Campaigns: mutated recipes and damaged files by the thousand: no traceback, no hang, no message without a path."""

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import cluster
from cluster.data.prepare import prepare
from cluster.recipe.loading import builtin_recipes, load_recipe
from cluster.storage import Folder
from cluster.tuning.ledger import SweepDirectory, TrialRecord
from nn_models.errors import UserError
from tests.cli.mutations import changed, damage, replaced, spoiled
from tests.unit import made

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEEDS = st.integers(0, 2**32)  # of random.Random: a failure names its own
LONGEST_S = 10  # of CPU time: the machine may be busy
PROCESS_BYTES = 6 << 30  # of memory, for commands in processes of their own


def campaign(examples: int) -> Any:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, database=None, suppress_health_check=checks)


def told_well(code: int, err: str, seconds: float) -> None:
    """The command did what it should, or said in lines of `error: path: message` what the user must change."""
    errors = [line for line in err.split("\n") if line.startswith("error: ")]
    assert "Traceback" not in err
    assert code in (0, 2) or (code == 1 and "NaN or infinite" in err), err
    assert code == 0 or errors, err
    assert all(re.match(r"error: [^\s].*?: ", line) for line in errors), err
    assert all(len(line) < 3000 for line in errors), err
    assert seconds < LONGEST_S


@pytest.fixture
def told(manta, monkeypatch, tmp_path):
    """Runs a command up to where training or Ray would start, and sees how it ended; returns the exit code."""
    monkeypatch.chdir(tmp_path)

    def stop(*_: Any, **__: Any) -> Any:
        raise UserError("here", "all was well so far")

    monkeypatch.setattr("cluster.tuning.sweep.ray_session", stop)

    def run(*arguments: object, train: bool = False) -> int:
        with monkeypatch.context() as patch:
            if not train:
                patch.setattr("cluster.runs.train.run_here", stop)
            began = time.process_time()
            code, _, err = manta(*arguments)
        told_well(code, err, time.process_time() - began)
        return code

    return run


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> list[dict[str, Any]]:
    """What is mutated: the built-in recipes on small data, as they are written and with all defaults, and others."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in "ab":
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.full((9, 8, 3), 10 * number, np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    features = made.features(folder / "features", 80).model_dump(mode="json", exclude_unset=True)
    images = made.images(folder / "images", 160, shape=(1, 8, 8)).model_dump(mode="json", exclude_unset=True)
    prepare(load_recipe("digits-mlp").data, Folder(folder / "shards"))
    found = [yaml.safe_load(text) for text in builtin_recipes().values()]
    for recipe in found:
        pairs = recipe["data"]["kind"] == "pairs"
        recipe["data"] = {"kind": "pairs", "edges_of": {"kind": "digits"}} if pairs else {"kind": "digits"}
    sweep = {
        "optimizer.lr": {"loguniform": [1e-4, 1]},
        "model.hidden": {"choice": [[4], [8, 8]]},
        "schedule": {"choice": [{"kind": "cosine"}, {"kind": "constant", "warmup_steps": {"randint": [0, 100]}}]},
    }
    crop = [{"kind": "random_crop", "padding": 2}, {"kind": "horizontal_flip"}]
    custom = {"kind": "custom", "target": "tests.unit.nets:Linear", "arguments": {"scale": 2.0}}
    found += [
        {"model": {"kind": "cnn"}, "data": images | {"augment": crop}},
        {"model": {"kind": "cnn"}, "data": {"kind": "image_folder", "path": str(folder / "photos"), "channels": 1}},
        {
            "model": {"kind": "mlp"},
            "data": {"kind": "shards", "path": str(folder / "shards")},
            "changes": [{"epoch": 1, "set": {"optimizer.lr": 0.1}}],
        },
        {"model": {"kind": "gan"}, "data": features, "objective": {"kind": "adversarial"}},
        {"model": custom, "data": features},
        {"model": {"kind": "mlp"}, "data": features, "sweep": {"space": sweep, "num_trials": 4}},
    ]
    whole = [load_recipe(json.loads(json.dumps(recipe))).model_dump(mode="json") for recipe in found]
    return [*found, *whole]


def mutated(recipes: list[dict[str, Any]], rng: random.Random) -> bytes:
    """A recipe's file in which something is other."""
    recipe = rng.choice(recipes)
    if rng.random() < 0.15:
        return spoiled(yaml.dump(recipe).encode(), rng)
    return yaml.dump(changed(recipe, rng), allow_unicode=True).encode(errors="surrogatepass")


@campaign(3000)
@given(seed=SEEDS)
def test_mutated_recipes(seed, recipes, told, tmp_path):
    rng = random.Random(seed)
    (tmp_path / "recipe.yaml").write_bytes(mutated(recipes, rng))
    command = rng.choice(["show", "train", "sweep"])
    told(command, tmp_path / "recipe.yaml", *([] if command == "show" else ["--run", tmp_path / "out"]))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("model/*.safetensors"))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


@campaign(12)
@given(seed=SEEDS)
def test_mutated_recipes_in_processes_of_their_own(seed, recipes, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(mutated(recipes, random.Random(seed)))
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "show", str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (PROCESS_BYTES, PROCESS_BYTES)),
    )
    told_well(done.returncode, done.stderr, 0)


# -- files -------------------------------------------------------------------------------------------------------------

COMMANDS = {
    "run": (["report", "{}"], ["evaluate", "{}"], ["generate", "{}", "--out", "made.png"], ["show", "{}/recipe.yaml"]),
    "half": (["report", "{}"], ["evaluate", "{}"], ["train", "{}/recipe.yaml", "--run", "{}", "--resume"]),
    "game": (["report", "{}"], ["evaluate", "{}"], ["generate", "{}", "--num", "4", "--out", "made.png"]),
    "half game": (["report", "{}"], ["train", "{}/recipe.yaml", "--run", "{}", "--resume"]),
    "shards": (["data", "inspect", "{}"], ["evaluate", "{}/../run", "--data", "{}"]),
    "sweep": (["report", "{}"], ["sweep", "{}/recipe.yaml", "--run", "{}", "--resume"]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with what COMMANDS name."""
    folder = tmp_path_factory.mktemp("whole")
    tiny = {
        "name": "tiny",
        "model": {"kind": "mlp", "hidden": [4], "batch_norm": True},
        "data": made.features(folder / "rows", 80).model_dump(),
        "optimizer": {"kind": "adamw"},
        "train": {"epochs": 2, "global_batch_size": 20, "ema_decay": 0.9},
    }
    game = {
        "name": "game",
        "model": {"kind": "conditional_gan", "noise_size": 4, "width": 8},
        "data": made.images(folder / "images", 160, shape=(1, 8, 8)).model_dump(),
        "objective": {"kind": "adversarial"},
        "train": {"epochs": 2, "global_batch_size": 32, "ema_decay": 0.9},
    }
    for name, recipe in {"run": tiny, "game": game}.items():
        cluster.train(recipe, run=str(folder / name))
        half = folder / {"run": "half", "game": "half game"}[name]
        shutil.copytree(folder / name, half)
        (half / "result.json").unlink()
        sorted((half / "checkpoints").glob("step-*"))[-1].unlink()
    prepare(load_recipe(tiny).data, Folder(folder / "shards"))
    swept = load_recipe(tiny | {"sweep": {"space": {"optimizer.lr": {"uniform": [0.1, 1]}}, "num_trials": 3}})
    sweep = SweepDirectory(str(folder / "sweep"))
    sweep.begin(swept, {})
    for index, status in enumerate(["finished", "running", "pruned"]):
        trial = folder / "sweep" / "trials" / f"{index:04d}"
        shutil.copytree(folder / ("half" if status == "running" else "run"), trial)
        sweep.write(TrialRecord(index, {"optimizer.lr": 0.5}, status=status, value=0.5, epochs=2))
        sweep.trial(index).write_json("lineage.json", [{"epoch": 0, "trial": index, "set": {"optimizer.lr": 0.5}}])
    return folder


@campaign(300)
@given(seed=SEEDS)
def test_damaged_files(seed, whole, told, tmp_path):
    rng = random.Random(seed)
    kind = rng.choice([*COMMANDS, "half", "half", "sweep"])
    for name in {kind, "run"}:
        replaced(tmp_path / name, whole / name)
    place = tmp_path / kind
    # pictures and events are written and never read
    files = [f for f in sorted(place.rglob("*")) if f.is_file() and not {"samples", "events"} & set(f.parts)]
    damage(rng.choice(files), rng)
    command = rng.choice(COMMANDS[kind])
    told(*(part.format(place) for part in command), train=True)
