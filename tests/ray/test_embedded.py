"""An embedded Ray: whoever is not this user on this machine does not reach it, and nothing of it stays."""

import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.ray.faults import steps_done, wait_for

RUNS = {
    "run": ["train", "digits-mlp", "--workers=2", "--set=train.epochs=2"],
    "sweep": ["sweep", "digits-mlp", "--fuse=off", "--set=train.epochs=2", "--set=sweep.num_trials=2"],
    "gan": ["train", "digits-dcgan", "--workers=1", "--set=train.epochs=1"],
}
NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture
def place():
    """Where Ray's files go: its sockets' paths are too long for pytest's own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def world(place):
    """The environment of someone whose home cannot be read or written."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**mine, "HOME": "/proc/nope", "RAY_TMPDIR": str(place), "OMP_NUM_THREADS": "1"}


def start(*arguments: object, world: dict[str, str], **options: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs", *map(str, arguments), "--no-report"]
    return subprocess.Popen(command, env=world, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, **options)


def tree(driver: subprocess.Popen) -> list[psutil.Process]:
    root = psutil.Process(driver.pid)
    return [root, *root.children(recursive=True)]


def title(process: psutil.Process) -> str:
    return f"{process.name()} {' '.join(process.cmdline())}"


def alive(processes: list[psutil.Process]) -> list[str]:
    """What those that go on are; one that has ended may wait for whoever adopted it to take note."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(title(process))
    return found


def listening(driver: subprocess.Popen) -> tuple[set[tuple[str, str]], set[str]]:
    """All that the driver and its processes listen on until it ends, as (what, address); and the tokens they have."""
    found, tokens = set(), set()
    while driver.poll() is None:
        time.sleep(0.1)  # looking takes time from the run
        with suppress(psutil.Error):
            for process in tree(driver):
                with suppress(psutil.Error):
                    opened = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                    found |= {(title(process), connection.laddr.ip) for connection in opened}
                    told = process.environ() if "gcs_server" in title(process) else {}  # empty while it starts or ends
                    tokens |= {told[name] for name in ("RAY_AUTH_TOKEN",) if name in told}
    return found, tokens


@pytest.mark.parametrize("kind", RUNS)
def test_all_that_listens_is_on_loopback_with_a_token_that_no_file_has(world, place, tmp_path, kind):
    driver = start(*RUNS[kind], f"--run={tmp_path / 'run'}", world=world)
    sockets, tokens = listening(driver)
    assert driver.wait() == 0, driver.stderr.read()
    actors = {"run": "RayTrainWorker", "sweep": "ResourceTrainable", "gan": "GeneratorActor"}
    for part in ("gcs_server", "raylet", "DashboardAgent", "RuntimeEnvAgent", f"ray::{actors[kind]}"):
        assert any(part in what for what, _ in sockets), f"{part} was not met"
    open_to_others = {(what, where) for what, where in sockets if not is_loopback(where)}
    assert not open_to_others
    assert not [what for what, _ in sockets if "monitor.py" in what or "dashboard.py" in what]  # metrics, for everybody
    assert [len(token) for token in tokens] == [64]
    assert list(place.iterdir()) == []


def is_loopback(where: str) -> bool:
    address = ipaddress.ip_address(where)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def test_nobody_else_enters_its_folder_and_a_killed_driver_leaves_nothing(world, place, tmp_path):
    run = tmp_path / "run"
    driver = start("train", "digits-mlp", "--workers=2", "--set=train.epochs=5000", f"--run={run}", world=world)
    wait_for(lambda: steps_done(run) >= 20)
    (folder,) = place.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    processes = tree(driver)
    assert any("DashboardAgent" in title(process) for process in processes)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    with suppress(AssertionError):
        wait_for(lambda: not alive(processes))
    assert alive(processes) == []
    wait_for(lambda: not folder.exists())


def test_one_process_has_one_after_another_each_with_its_own_token(world):
    script = (
        "import os; from cluster.runtime import ray_session\n"
        "def token(): return os.environ['RAY_AUTH_TOKEN']\n"
        "for _ in range(2):\n"
        "    with ray_session(address=None, cpus=1, verbose=False) as session:\n"
        "        print(session.ray.get(session.ray.remote(token).remote()))\n"
        "assert 'RAY_AUTH_TOKEN' not in os.environ"
    )
    done = subprocess.run([sys.executable, "-c", script], env=world, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert len(first) == len(second) == 64
    assert first != second


def test_files_beside_a_custom_model_take_no_librarys_place_in_workers(world, tmp_path):
    for name in ("cluster", "nn_models", "numpy", "torch", "yaml", "ray", "nothing"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py was imported')")
    (tmp_path / "nets.py").write_text(NET)
    recipe = {"model": {"kind": "custom", "target": "nets:Net"}, "data": {"kind": "digits"}, "train": {"epochs": 1}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"name": "own", **recipe}))
    packages = {**world, "PYTHONPATH": str(Path(__file__).parents[2])}
    driver = start("train", "own.yaml", "--workers=1", "--run=run", world=packages, cwd=tmp_path)
    _, errors = driver.communicate(timeout=200)
    assert driver.returncode == 0, errors
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"


@pytest.fixture
def head(tmp_path, place):
    """The address of a cluster that was started with a token in the home; and the environment of its user."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    user = {**mine, "HOME": str(home), "RAY_TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--block"]
    command = [str(Path(sys.executable).parent / "ray"), "start", *options, "--include-dashboard=false"]
    server = {**user, "RAY_AUTH_MODE": "token"}
    process = subprocess.Popen(command, env=server, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: len(list(place.glob("ray/session_*/sockets/raylet*"))) > 0)
    yield f"127.0.0.1:{port}", user
    started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait()
    for child in started:
        with suppress(psutil.Error):
            child.kill()


def test_a_cluster_with_the_token_of_this_home_is_connected_to(head, tmp_path):
    address, user = head
    script = (
        "import sys, ray, cluster\n"  # Ray was imported before anyone could say that there is a token
        "where = {'address': sys.argv[1], 'run': sys.argv[2]}\n"
        "cluster.train('digits-mlp', num_workers=1, overrides={'train.epochs': 1}, **where)"
    )
    train = subprocess.run(
        [sys.executable, "-c", script, address, str(tmp_path / "run")], env=user, capture_output=True, text=True
    )
    assert train.returncode == 0, train.stderr
    few = ["--set=train.epochs=1", "--set=sweep.num_trials=1"]
    sweep = start("sweep", "digits-mlp", *few, f"--address={address}", f"--run={tmp_path / 'sweep'}", world=user)
    _, errors = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, errors
