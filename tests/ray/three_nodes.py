"""Three nodes of a cluster on this machine, each with a current directory and an environment of its own."""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.ray.faults import wait_for
from tests.ray.heads import ROOT, free_ports

STORE_BYTES = 100 << 20


@dataclass(frozen=True)
class Cluster:
    """Where its head answers, and what its driver's environment is."""

    address: str
    environment: Mapping[str, str]


@contextmanager
def started_nodes(
    folders: Sequence[Path],
    *,
    variables: Sequence[Mapping[str, str]] = ({}, {}, {}),
    prefixes: Sequence[Sequence[str]] = ((), (), ()),
    addresses: Sequence[str] = ("127.0.0.1",) * 3,
) -> Iterator[Cluster]:
    """Start a node in each folder, the first as the head, and end their processes, and no others, afterwards.

    Each has a name of its own, node-0 and so on, `variables` in its environment, and begins with a `prefix`, such as
    `ip netns exec NAME`.
    """
    port, *agents = free_ports(1 + len(folders))
    programs = Path(sys.executable).parent
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    mine |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    mine |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray = [str(programs / "ray"), "start", "--block", "--num-cpus=1", f"--object-store-memory={STORE_BYTES}"]
    address = f"{addresses[0]}:{port}"
    started: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True)))
        for number, (folder, own, prefix) in enumerate(zip(folders, variables, prefixes, strict=True)):
            options = [f"--node-name=node-{number}", f"--node-ip-address={addresses[number]}"]
            options += [f"--dashboard-agent-listen-port={agents[number]}"]
            if number:
                options += [f"--address={address}"]
            else:
                options += ["--head", f"--port={port}", f"--temp-dir={place}", "--include-dashboard=false"]
            process = subprocess.Popen(
                [*prefix, *ray, *options],
                cwd=folder,
                env=mine | own,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(end, process)
            started.append(process)
            wait_for(lambda: _raylets(place) == len(started) or any(one.poll() is not None for one in started))
            assert process.poll() is None
        yield Cluster(address, mine)


def _raylets(place: Path) -> int:
    """How many listen: the nodes have one folder, that of the head."""
    return len([*place.glob("session_2*/sockets/raylet*")])


def end(process: subprocess.Popen[bytes]) -> None:
    """A node's processes."""
    started = []
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    for one in [process, *started]:
        with suppress(psutil.Error, ProcessLookupError):
            one.kill()
    process.wait()
