"""Nodes that do not share a disk: data travels to them, and a run whose directory they do not see is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import cluster
from cluster.data.prepare import prepare
from cluster.data.sources.images import DigitsSpec
from cluster.storage import Folder
from tests.ray.conftest import EXACT
from tests.ray.faults import MARK, digests, left_over, wait_for, weights
from tests.ray.heads import free_ports

NAMESPACE = ["unshare", "--mount"]  # where this user may not make one, there is no such node to try it with
MAY = shutil.which("unshare") and not subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode
pytestmark = pytest.mark.skipif(not MAY, reason="needs the right to make a mount namespace")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What the other node does not see: it has an empty directory there."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of the driver and the head; the other node has another cache."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    mark = str(tmp_path_factory.mktemp("mark"))
    # without a token: this cluster listens on this machine for these tests alone
    return {**others, MARK: mark, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """The other node's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def address(environment, place, cache) -> Iterator[str]:
    """Of a cluster of a head that trains nothing, and a node that does not share `place` with it."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    head = subprocess.Popen([sys.executable, "-m", "tests.ray.hosts", "0"], **pipes)
    assert head.stdout
    found = str(json.loads(head.stdout.readline())["address"])
    # as tests of Ray's own start several nodes on one machine
    ports = f"--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port={free_ports(1)[0]}"
    start = f"{sys.executable} -m ray.scripts.scripts start --block --address={found} --num-cpus=2 {ports}"
    node = subprocess.Popen(
        [*NAMESPACE, "sh", "-c", f"mount -t tmpfs none {place} && exec {start}"],
        env={**environment, "MANTA_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: node.poll() is not None or num_cpus(found, environment) == 2)
        assert node.poll() is None
        yield found
    finally:
        with suppress(psutil.Error):
            for one in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
                one.kill()
        node.wait()
        head.communicate("")
    wait_for(lambda: not left_over({MARK: environment[MARK]}), seconds=60)


NUM_CPUS = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR'); print(ray.cluster_resources().get('CPU', 0))"


def num_cpus(address: str, environment: dict[str, str]) -> float:
    found = subprocess.run([sys.executable, "-c", NUM_CPUS, address], capture_output=True, env=environment, check=True)
    return float(found.stdout)


def streamed(folder: Path) -> dict[str, Any]:
    """A recipe whose workers read the prepared files."""
    return {**EXACT, "data": {"kind": "shards", "path": str(folder), "shuffle_window": 100}}


def train(recipe: dict[str, Any], run: Path, address: str, environment: dict[str, str], folder: Path) -> Any:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "jobs", "train", str(folder / "recipe.yaml"), f"--run={run}", "--no-report"]
    options = ["--workers=2", f"--address={address}"]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def test_prepared_files_that_a_node_does_not_see_travel_to_it(place, environment, cache, address, tmp_path):
    prepare(DigitsSpec(), Folder(place / "data"))
    recipe = streamed(place / "data")
    done = train(recipe, tmp_path / "run", address, environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"prepared files travel to \S+ \(\w{{8}}\), which do not see {place}/data\n", done.stderr)
    (arrived,) = (cache / "data").iterdir()
    assert arrived.name.startswith("shipped-")
    whole = cluster.train(recipe, run=str(tmp_path / "whole"))
    assert digests(tmp_path / "run") == digests(whole.run)
    ours, theirs = weights(tmp_path / "run"), weights(whole.run)
    for name in theirs:
        # float32, 45 steps, gradients summed over two ranks instead of one
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-5), name


def test_a_run_whose_directory_a_node_does_not_see_is_refused(place, environment, address, tmp_path):
    before = sorted(place.iterdir())
    refused = train(EXACT, place / "run", address, environment, tmp_path)
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: --run: {place}/run is not one directory for all nodes that may train: ")
    assert line.endswith(
        " does not see it; give --run a URI or a folder that all of them share, or set MANTA_STORAGE to one"
    )
    assert sorted(place.iterdir()) == before
