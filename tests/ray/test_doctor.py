"""`manta doctor` on a cluster of three nodes finds each fault that was planted; what hangs is not waited for."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.data.prepare import prepare
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from tests.ray import namespaces
from tests.ray.heads import ROOT
from tests.ray.three_nodes import Cluster, started_nodes

SMALL_DISK = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs"]


def may_mount() -> bool:
    """Whether this process may mount a disk, which in many containers even root may not."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() or subprocess.run([*SMALL_DISK, folder], capture_output=True).returncode:
            return False
        subprocess.run(["umount", "--lazy", folder], check=True)
    return True


MAY_MOUNT = may_mount()
CWD = "/proc/self/cwd"  # leads each node's processes to the folder that the node was started in
OTHER = "torchvision"


@dataclass(frozen=True)
class Told:
    """What a doctor told, by the check."""

    code: int
    lines: dict[str, dict[str, Any]]
    err: str

    def failed(self) -> set[str]:
        """Checks that failed but for that of the network, which this machine may be too busy for."""
        return {name for name, line in self.lines.items() if line["status"] == "failed" and "network" not in name}


@dataclass(frozen=True)
class Ward:
    """A cluster whose nodes have something, and what two doctors told of it."""

    first: Told  # with what single nodes have wrong
    second: Told  # with a storage that two cannot use
    on_a_network: bool  # each node is a host of its own, and one of them is badly connected


def told(processes: Sequence[subprocess.Popen[str]]) -> Iterator[Told]:
    for process in processes:
        out, err = process.communicate(timeout=300)
        checks = json.loads(out)["checks"]
        yield Told(process.returncode, {line["check"]: line for line in checks}, err)


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    """Both doctors at once: starting processes takes most of the time."""
    place = tmp_path_factory.mktemp("ward")
    folders = [place / f"node-{number}" for number in range(3)]
    with ExitStack() as stack:
        for folder in folders:
            folder.mkdir()
        plant(place, folders, stack)
        library = place / "library"
        (library / f"{OTHER}-0.0.1.dist-info").mkdir(parents=True)
        (library / f"{OTHER}-0.0.1.dist-info" / "METADATA").write_text(f"Name: {OTHER}\nVersion: 0.0.1\n")
        hosts = stack.enter_context(namespaces.hosts(3)) if namespaces.possible() else []
        network: dict[str, Any] = {}
        if hosts:
            namespaces.limit(hosts[2], "40mbit")
            network = {"addresses": [host.address for host in hosts], "prefixes": [host.prefix for host in hosts]}
        variables: list[dict[str, str]] = [{}, {}, {"PYTHONPATH": f"{library}{os.pathsep}{ROOT}"}]
        cluster = stack.enter_context(started_nodes(folders, variables=variables, **network))
        prefix = hosts[0].prefix if hosts else []
        streamed = [f"--set=data={{kind: shards, path: {CWD}/data, shuffle_window: 256}}"]
        first = doctor(cluster, prefix, folders[0], f"--run={CWD}/own", "digits-mlp", "--workers=4", *streamed)
        second = doctor(cluster, prefix, folders[0], f"--run={CWD}/bad", "digits-cnn", "--workers=3")
        for process in (first, second):
            stack.callback(process.kill)
        one, other = told([first, second])
        for folder in folders:  # nothing is left of either
            assert not [*folder.glob("*/.manta-doctor-*")]
        return Ward(one, other, on_a_network=bool(hosts))


def plant(place: Path, folders: Sequence[Path], stack: ExitStack) -> None:
    """What is in the folders: data that node-1 has not all of, `own`, which node-2 has for itself, and `bad`."""
    prepare(load_recipe("digits-mlp").data, Folder(folders[0] / "data"))
    shutil.copytree(folders[0] / "data", folders[1] / "data")
    next((folders[1] / "data").glob("train-*")).unlink()
    (folders[2] / "data").symlink_to(folders[0] / "data")
    for name in ("shared", "bad"):
        (place / name).mkdir()
    for folder in folders[:2]:
        (folder / "own").symlink_to(place / "shared")
    (folders[2] / "own").mkdir()
    (folders[0] / "bad").symlink_to(place / "bad")
    (folders[1] / "bad").write_text("a file, where a folder should be")
    if MAY_MOUNT:
        full = folders[2] / "bad"
        full.mkdir()
        subprocess.run([*SMALL_DISK, full], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", full], check=True)
    else:
        (folders[2] / "bad").symlink_to(place / "bad")


def doctor(cluster: Cluster, prefix: Sequence[str], folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-m", "jobs", "doctor", f"--address={cluster.address}", "--json", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=dict(cluster.environment), **pipes)


def test_each_fault_of_a_node_is_found_and_no_other(ward: Ward):
    first, second = ward.first, ward.second
    assert (first.code, second.code) == (1, 1), first.err + second.err
    assert first.failed() == {"versions", "shared storage", "data", "placement"}
    assert second.failed() == {"versions", "storage"}
    for found in (first, second):
        assert found.lines["nodes"]["message"] == "3 nodes answer: node-0, node-1, node-2"
        assert found.lines["versions"]["message"].startswith(f"{OTHER} 0.0.1 on node-2, ")
        assert {"clocks", "disk", "object store", "recipe", "first step"} <= set(found.lines)
    assert first.lines["shared storage"]["message"] == f"{CWD}/own: node-2 sees nothing of the others"
    assert "train-00000.parquet: the shard is missing on node-1" in first.lines["data"]["message"]
    assert "4 workers of 1 CPU each can never be placed" in first.lines["placement"]["message"]
    assert f"{CWD}/bad: cannot be written" in second.lines["storage"]["message"]
    assert " on node-1" in second.lines["storage"]["message"]
    assert second.lines["placement"]["status"] == "ok"
    assert all(line["fix"] for found in (first, second) for line in found.lines.values() if line["status"] == "failed")


@pytest.mark.skipif(not MAY_MOUNT, reason="needs the right to mount a disk")
def test_a_disk_that_is_full_is_found_by_writing(ward: Ward):
    storage = ward.second.lines["storage"]
    assert "No space left on device" in storage["message"]
    assert "on node-2" in storage["message"]
    assert "make room there" in storage["fix"]


def test_a_slow_link_is_found_and_whose_it_is(ward: Ward):
    if not ward.on_a_network:
        pytest.skip("only root may make network namespaces, with iproute2")
    network = ward.first.lines["network (gloo)"]
    assert network["status"] == "failed"
    # 40 Mbit/s are 5 MB/s; on a busy machine the other link may be late, too
    assert re.match(r"slow (at node-2|between all nodes): [345](\.\d+)? MB/s, ", network["message"])


# -- what hangs --------------------------------------------------------------------------------------------------------


def test_a_node_that_hangs_or_dies_is_told_and_asked_no_more(ray: Any):
    from cluster.runtime import RaySession
    from cluster.submission.doctor.gathering import examining

    with examining(RaySession(ray, embedded=False)) as surgery:
        (name,) = surgery.names
        broken = surgery.ask(int, "no number")
        assert broken.failed[name][0].startswith("ValueError: invalid literal for int()")
        assert surgery.silent == {}  # it answers
        began = time.monotonic()
        hung = surgery.ask(time.sleep, 1000, within_s=1.0)
        assert time.monotonic() - began < 60
        assert (hung.found, hung.failed) == ({}, {})
        assert surgery.silent == {name: ("did not answer within 1 s", None)}
        assert surgery.names == []
        assert surgery.ask(time.time).found == {}
    with examining(RaySession(ray, embedded=False)) as surgery:
        surgery.ask(os._exit, 3)
        assert surgery.silent[name][0].startswith("its process has died (")
