"""A run across hosts, one of which dies: how soon it goes on, with the settings of ray-cluster.yaml and of manta."""

import json
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import cluster
from tests.ray.conftest import EXACT
from tests.ray.faults import MARK, digests, steps_done, wait_for, weights
from tests.ray.hosts import Hosts, can_part, namespaces, raylets

# momentum, dropout and the average are in the checkpoints, which fall in mid-epoch
LONG = {
    "model.hidden": [256, 256],
    "model.dropout": 0.2,
    "train.ema_decay": 0.9,
    "train.epochs": 40,
    "train.checkpoint_every_steps": 5,
}


def settings_of_head() -> dict[str, str]:
    """What ray-cluster.yaml sets before it starts Ray's head."""
    text = Path(__file__).parents[2].joinpath("ray-cluster.yaml").read_text()
    found = dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", text))
    assert len(found) == 3
    return found


def processes(mark: str, title: str) -> list[psutil.Process]:
    """Those with the mark in their environment and this in their title."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if title in " ".join(process.cmdline()) and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def driver(hosts: Hosts, run: Path, recipe: Path, **overrides: Any) -> subprocess.Popen[str]:
    command = [*hosts.inside, sys.executable, "-m", "jobs", "train", str(recipe), "--workers=2", "--no-report"]
    command += [f"--address={hosts.address}", f"--run={run}"]
    command += [f"--set={path}={json.dumps(value)}" for path, value in overrides.items()]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=hosts.environment)


def result_of(process: subprocess.Popen[str], run: Path) -> dict[str, Any]:
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def same(run: Path, outcome: cluster.Outcome) -> bool:
    ours, theirs = weights(run), weights(outcome.run)
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    equal = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return equal and digests(run) == digests(outcome.run) and metrics == outcome.metrics


@pytest.fixture(params=[raylets, *([pytest.param(namespaces, marks=pytest.mark.slow)] if can_part() else [])])
def hosts(request, tmp_path):
    with request.param(settings_of_head(), str(tmp_path)) as started:
        yield started


def test_a_run_across_hosts_survives_one_and_ends_with_the_figures_of_a_local_one(ray, hosts, tmp_path):
    (tmp_path / "exact.json").write_text(json.dumps(EXACT))
    run, mark = tmp_path / "run", str(tmp_path)
    process = driver(hosts, run, tmp_path / "exact.json", **LONG)
    try:
        wait_for(lambda: process.poll() is not None or steps_done(run) >= 20)
        first = (run / "metrics.jsonl").stat().st_ino
        places = [hosts.host_of(worker) for worker in processes(mark, "RayTrainWorker")]
        assert len(places) == len(set(places)) == 2
        (controller,) = processes(mark, "TrainController")
        assert controller.environ()["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "10"  # else 60 s
        hosts.die(places[0])
        began = time.monotonic()
        wait_for(lambda: (run / "metrics.jsonl").stat().st_ino != first)  # lines are written anew at a start
        print(f"training goes on {time.monotonic() - began:.1f} s after the death of a host")
        assert steps_done(run) >= 5  # from one of its checkpoints
        result = result_of(process, run)
    finally:
        process.kill()
        process.wait()
    assert (result["status"], result["restarts"]) == ("finished", 1)
    assert same(run, cluster.train(EXACT, num_workers=2, run=str(tmp_path / "local"), overrides=LONG))


@pytest.mark.slow
def test_a_run_across_hosts_ends_with_the_figures_of_a_local_one(ray, hosts, tmp_path):
    (tmp_path / "exact.json").write_text(json.dumps(EXACT))
    result = result_of(driver(hosts, tmp_path / "run", tmp_path / "exact.json"), tmp_path / "run")
    assert (result["status"], result["restarts"], result["world_size"]) == ("finished", 0, 2)
    assert same(tmp_path / "run", cluster.train(EXACT, num_workers=2, run=str(tmp_path / "local")))
