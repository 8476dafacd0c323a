"""What leads a run dies: Ray Train's controller, or the raylet or GCS of an embedded Ray."""

import json
import os
import subprocess
import sys
from typing import Any

import psutil
import pytest
import torch

import cluster
from cluster.errors import RunFailed
from cluster.runs import going_on
from cluster.runtime import RaySession
from cluster.runtime.lifeline import Lifeline
from tests.ray.conftest import EXACT
from tests.ray.faults import digests, killing, steps_done, wait_for, weights
from tests.ray.test_faults import LONG
from tests.ray.test_halves import TRAINED


@pytest.fixture(scope="module")
def undisturbed(ray, tmp_path_factory):
    return cluster.train(EXACT, num_workers=2, run=str(tmp_path_factory.mktemp("whole") / "run"), overrides=LONG).run


def long_recipe() -> dict[str, Any]:
    """What `undisturbed` trains, in one piece."""
    recipe = dict(EXACT)
    for path, value in LONG.items():
        section, field = path.split(".")
        recipe[section] = {**recipe[section], field: value}
    return recipe


def same(run, other) -> bool:
    ours, theirs = weights(run), weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs) and digests(run) == digests(other)


def test_a_killed_controller_is_started_again(ray, undisturbed, tmp_path):
    run = tmp_path / "run"
    with killing("ray::TrainController", when=lambda: steps_done(run) >= 30):
        outcome = cluster.train(EXACT, num_workers=2, run=str(run), overrides=LONG)
    assert outcome.result["restarts"] == 1
    assert same(run, undisturbed)


def test_a_controller_that_dies_more_often_than_is_allowed_fails_the_run(ray, tmp_path):
    run = tmp_path / "run"
    with (
        killing("ray::TrainController", when=lambda: steps_done(run) >= 5),
        pytest.raises(RunFailed, match=r"more often than train\.max_failures allows \(0\)"),
    ):
        cluster.train(EXACT, num_workers=2, run=str(run), overrides={**LONG, "train.max_failures": 0})
    assert json.loads((run / "result.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(("name", "recipe", "workers"), [("raylet", "net", 2), ("gcs_server", "gan", 1)])
def test_a_run_goes_on_with_an_embedded_ray_started_anew(undisturbed, tmp_path, name, recipe, workers):
    run = tmp_path / "run"
    chosen = long_recipe() if recipe == "net" else {**TRAINED, "name": "played"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(chosen))
    command = [sys.executable, "-m", "jobs", "train", str(tmp_path / "recipe.yaml"), f"--workers={workers}"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment}
    driver = psutil.Popen([*command, f"--run={run}", "--no-report"], **pipes)
    wait_for(lambda: steps_done(run) >= 20)
    next(p for p in driver.children(recursive=True) if p.name() == name).kill()
    _, errors = driver.communicate(timeout=200)
    result = json.loads((run / "result.json").read_text())
    assert (driver.returncode, result["status"], result["restarts"]) == (0, "finished", 1), errors
    assert f"Ray's {'GCS' if name == 'gcs_server' else name} has died; it is started anew" in errors
    if recipe == "net":
        assert same(run, undisturbed)


def test_who_hangs_in_a_ray_that_has_gone_has_a_last_word(ray, monkeypatch, capfd):
    """Where no call of Ray's returns any more, the process ends itself, and says how to go on."""
    ended: list[int] = []
    monkeypatch.setattr(going_on, "LAST_WORD_S", 0.5)
    monkeypatch.setattr(going_on.os, "_exit", ended.append)
    lifeline = Lifeline(ray, embedded=True)
    assert lifeline.broken() is None
    monkeypatch.setattr(lifeline, "broken", lambda: "Ray's GCS has died")
    session = RaySession(ray, embedded=True, lifeline=lifeline)
    with going_on.last_word(session, lambda reason: f"{reason}; to go on: manta train"):
        wait_for(lambda: ended, seconds=10)
    assert set(ended) == {going_on.EXIT_CODE}
    assert "error: Ray's GCS has died; to go on: manta train\n" in capfd.readouterr().err
