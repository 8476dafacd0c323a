"""Nodes that are about to go, and processes that are told to end: the run is saved, and goes on elsewhere."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import cluster
from tests.ray.faults import MARK, digests, left_over, steps_done, wait_for, weights

RECIPE: dict[str, Any] = {
    "name": "moved",
    "data": {"kind": "digits"},
    "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "train": {"epochs": 3, "global_batch_size": 100, "log_every_steps": 2, "ema_decay": 0.9, "cpus_per_worker": 1},
}


def paced(until: Path) -> dict[str, Any]:
    """The recipe, whose steps take a while until there is such a file."""
    return {**RECIPE, "model": {"kind": "custom", "target": "tests.ray.nets:Paced", "arguments": {"until": str(until)}}}


@pytest.fixture(scope="module")
def undisturbed(ray, tmp_path_factory) -> cluster.Outcome:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "go").touch()
    return cluster.train(paced(folder / "go"), num_workers=2, run=str(folder / "run"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of all that is started here."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    mark = str(tmp_path_factory.mktemp("mark"))
    # without a token: this cluster listens on this machine for these tests alone
    return {**others, MARK: mark, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def hosts(environment) -> Iterator[dict[str, Any]]:
    """A cluster of three nodes beside a head that trains nothing: see tests.ray.hosts."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    process = subprocess.Popen([sys.executable, "-m", "tests.ray.hosts"], **pipes)
    assert process.stdout
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.communicate("")
    wait_for(lambda: not left_over({MARK: environment[MARK]}), seconds=60)


def drain(hosts: dict[str, Any], node: str, environment: dict[str, str]) -> None:
    """Warn that the node goes in two minutes."""
    asked = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", "--deadline-remaining-seconds=120"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={hosts['address']}"]
    subprocess.run([*ray, f"--node-id={node}", *asked], check=True, capture_output=True, env=environment, timeout=120)


class Driver:
    """`manta train`, whose steps are slow until it is told to `end`."""

    def __init__(self, folder: Path, environment: dict[str, str], *options: str) -> None:
        self.run, self._go, self._mark = folder / "run", folder / "go", {MARK: environment[MARK]}
        (folder / "recipe.yaml").write_text(json.dumps(paced(self._go)))
        self._command = [sys.executable, "-m", "jobs", "train", str(folder / "recipe.yaml"), f"--run={self.run}"]
        self.process = subprocess.Popen(
            [*self._command, *options, "--no-report"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def workers(self) -> list[psutil.Process]:
        """Those of Ray Train's, which have the environment of their node."""
        return [found for found in left_over(self._mark) if "RayTrainWorker" in " ".join(found.cmdline())]

    def trains(self, *, after: int = 0) -> int:
        """Return once it has begun to train, and not as it did when this was returned before."""
        file = self.run / "metrics.jsonl"  # its lines are written anew at each start

        def begun() -> int:
            assert self.process.poll() is None
            return file.exists() and steps_done(self.run) and file.stat().st_ino != after

        wait_for(begun)
        return file.stat().st_ino

    def end(self) -> tuple[dict[str, Any], str]:
        """Train the rest at full speed: result.json, and what was told on standard error."""
        self._go.touch()
        _, errors = self.process.communicate(timeout=240)
        return json.loads((self.run / "result.json").read_text()), errors


def same(run: Path, other: str) -> bool:
    ours, theirs = weights(run), weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs) and digests(run) == digests(other)


def test_a_run_whose_workers_are_warned_is_moved_and_nothing_shows_of_it(undisturbed, environment, hosts, tmp_path):
    driver = Driver(tmp_path, environment, "--workers=2", f"--address={hosts['address']}")
    first = driver.trains()
    driver.workers()[1].send_signal(signal.SIGTERM)
    second = driver.trains(after=first)
    raylet = int(driver.workers()[0].environ()["RAY_RAYLET_PID"])
    node = hosts["nodes"][hosts["raylets"].index(raylet)]
    drain(hosts, node, environment)
    driver.trains(after=second)
    assert all(int(worker.environ()["RAY_RAYLET_PID"]) != raylet for worker in driver.workers())
    result, errors = driver.end()
    assert (driver.process.returncode, result["restarts"], result["preemptions"]) == (0, 0, 2), errors
    assert 0 < result["lost_s"] < result["wall_s"]
    assert "was told to end (SIGTERM): saved after step" in errors
    assert re.search(rf"node \S+ \({node[:8]}\) is drained, and goes in 1\d\d s: saved after step", errors)
    assert same(driver.run, undisturbed.run)
    assert result["metrics"] == undisturbed.metrics


def test_a_run_whose_drivers_node_goes_is_saved_and_says_how_to_go_on(environment, hosts, tmp_path):
    driver = Driver(tmp_path, environment, "--workers=2", f"--address={hosts['address']}")
    driver.trains()
    drain(hosts, hosts["head"], environment)
    _, errors = driver.process.communicate(timeout=240)
    assert driver.process.returncode == 1
    told = re.search(r"error: the driver's node is drained: saved after step (\d+); to go on: manta train \S+", errors)
    assert told, errors
    assert json.loads((driver.run / "result.json").read_text())["status"] == "failed"
    newest = max(path.name for path in (driver.run / "checkpoints").iterdir())
    assert newest == f"step-{int(told[1]):010d}.pt"
