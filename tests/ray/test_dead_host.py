"""A host of three dies: how long it takes until training goes on, with the health checks of ray-cluster.yaml."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.ray.faults import MARK, steps_done, wait_for

MOST_S = 20


def settings_of_head() -> dict[str, str]:
    """What ray-cluster.yaml sets before it starts Ray's head."""
    text = Path(__file__).parents[2].joinpath("ray-cluster.yaml").read_text()
    found = dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", text))
    assert len(found) == 3
    return found


def workers(mark: str) -> list[psutil.Process]:
    """Those of Ray Train's with the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()) and process.environ().get(MARK) == mark:
                found.append(process)
    return found


@pytest.mark.slow
def test_training_goes_on_soon_after_a_host_has_died(tmp_path):
    run, mark = tmp_path / "run", str(tmp_path)
    others = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # without a token: this cluster listens on this machine for this test alone
    environment = {**others, **settings_of_head(), MARK: mark, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    hosts = subprocess.Popen([sys.executable, "-m", "tests.ray.hosts"], **pipes)
    driver = None
    try:
        assert hosts.stdout
        place = json.loads(hosts.stdout.readline())
        options = ["--workers=2", f"--address={place['address']}", f"--run={run}", "--no-report"]
        long = ["--set=train.epochs=3000", "--set=train.checkpoint_every_steps=50"]
        driver = subprocess.Popen(
            [sys.executable, "-m", "jobs", "train", "digits-mlp", *options, *long],
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        wait_for(lambda: steps_done(run) > 200)
        first = (run / "metrics.jsonl").stat().st_ino
        victim = workers(mark)[0]
        raylet = int(victim.environ()["RAY_RAYLET_PID"])
        assert raylet in place["raylets"]
        for process in (psutil.Process(raylet), victim):
            process.kill()
        killed = time.monotonic()
        wait_for(lambda: (run / "metrics.jsonl").stat().st_ino != first)  # lines are written anew at a start
        took = time.monotonic() - killed
        print(f"training goes on {took:.1f} s after the death of a host")
        assert took < MOST_S
    finally:
        if driver:
            driver.terminate()
            driver.wait()
        hosts.communicate("")
