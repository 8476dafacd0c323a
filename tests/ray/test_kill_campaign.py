"""The kill campaign: any process of a run, at any step: each run ends, by itself or by the line that it prints.

`MANTA_KILLS=8 MANTA_SEED=3 pytest -m slow tests/ray/test_kill_campaign.py` for fewer of them, or the same again.
"""

import hashlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.ray.faults import MARK, left_over, steps_done, wait_for
from tests.ray.test_halves import TRAINED
from tests.ray.test_ray_gone import long_recipe

KILLS = int(os.environ.get("MANTA_KILLS", "40"))
SEED = int(os.environ.get("MANTA_SEED", str(time.time_ns() % 10**6)))
LAST_WORDS_S = 15  # from the death of raylet or GCS to a word of ours
# how a process is known, and the recipe whose run has it
VICTIMS = {
    "worker": ("RayTrainWorker", "net"),
    "controller": ("ray::TrainController", "net"),
    "driver": ("jobs", "net"),
    "raylet": ("raylet", "net"),
    "GCS": ("gcs_server", "net"),
    "generator": ("GeneratorActor", "gan"),
    "discriminator": ("DiscriminatorActor", "gan"),
    "raylet of a GAN": ("raylet", "gan"),
    "GCS of a GAN": ("gcs_server", "gan"),
}
WORKERS = {"net": 2, "gan": 1}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    found = {"net": long_recipe(), "gan": {**TRAINED, "name": "played"}}
    for name, recipe in found.items():
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))
    return {name: folder / f"{name}.yaml" for name in found}


def environment(place: Path) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**others, MARK: str(place), "OMP_NUM_THREADS": "1"}


def command(recipe: Path, run: Path, workers: int) -> list[str]:
    return [sys.executable, "-m", "jobs", "train", str(recipe), f"--workers={workers}", f"--run={run}", "--no-report"]


@pytest.fixture(scope="module")
def undisturbed(recipes, tmp_path_factory) -> dict[str, Path]:
    runs = {}
    for name, recipe in recipes.items():
        runs[name] = tmp_path_factory.mktemp(name) / "run"
        subprocess.run(
            command(recipe, runs[name], WORKERS[name]),
            check=True,
            capture_output=True,
            env=environment(runs[name]),
            timeout=300,
        )
    return runs


def weights(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def kill(driver: psutil.Popen, title: str, choose: random.Random) -> bool:
    """SIGKILL to one process with the title among a run's; whether one was met."""
    found = []
    for process in [driver, *driver.children(recursive=True)]:
        try:
            names = process.name(), process.cmdline()
        except psutil.Error:  # it has just ended
            continue
        is_it = title == names[0] or (title in " ".join(names[1]) and title not in ("raylet", "gcs_server"))
        if title == "jobs":
            is_it = process.pid == driver.pid
        if is_it:
            found.append(process)
    if found:
        choose.choice(found).kill()
    return bool(found)


@pytest.mark.slow
@pytest.mark.timeout(90 * KILLS + 300)
def test_whatever_is_killed_the_run_ends_with_the_same_weights(recipes, undisturbed, tmp_path):
    print(f"MANTA_KILLS={KILLS} MANTA_SEED={SEED}")
    choose, ended = random.Random(SEED), Counter()
    names = list(VICTIMS)
    for number in range(KILLS):
        victim = names[number % len(names)]
        title, kind = VICTIMS[victim]
        run, steps = tmp_path / f"{number}" / "run", steps_done(undisturbed[kind])
        step = choose.randrange(steps * 3 // 4)
        ended[survived(victim, title, kind, step, recipes[kind], run, choose)] += 1
        assert weights(run) == weights(undisturbed[kind]), f"kill {number}: {victim} at step {step}"
    print(dict(ended))
    assert ended.total() == KILLS


def survived(victim: str, title: str, kind: str, step: int, recipe: Path, run: Path, choose: random.Random) -> str:
    """Kill in a run once it is past the step; how it came to its end: by itself, or resumed."""
    run.parent.mkdir(parents=True)
    again = command(recipe, run, WORKERS[kind])
    errors = run.parent / "errors"
    with errors.open("w") as file:
        driver = psutil.Popen(again, stdout=file, stderr=file, env=environment(run), start_new_session=True)
        wait_for(lambda: steps_done(run) > step or driver.poll() is not None)
        assert driver.poll() is None, errors.read_text()
        wait_for(lambda: kill(driver, title, choose) or driver.poll() is not None)
        killed = time.monotonic()
        code = driver.wait(timeout=200)
    took, how = time.monotonic() - killed, "by itself"
    if code:
        how, words = "resumed", errors.read_text()
        lines = re.findall(r"error: .*; to go on: manta (.*)", words)
        if victim != "driver":
            assert (code, len(lines)) == (1, 1), words
            assert took < LAST_WORDS_S or "max_failures" in words, words
            assert json.loads((run / "result.json").read_text())["status"] == "failed"
            again = [sys.executable, "-m", "jobs", *shlex.split(lines[0]), "--no-report"]
        else:
            again = [*again, "--resume"]
        subprocess.run(again, check=True, capture_output=True, env=environment(run), timeout=300)
    print(f"{victim} at step {step}: {how}, {took:.1f} s after the kill", flush=True)
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished"
    wait_for(lambda: not left_over({MARK: str(run)}), seconds=90)
    return how
