"""A cluster of one head with its job server, as `ray start` makes it, with token authentication on; and a proxy."""

import os
import secrets
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from tests.ray.faults import wait_for

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Head:
    """Where it answers, and its token."""

    url: str  # of the job server
    port: int  # of Ray itself
    token: str


def free_ports(count: int) -> list[int]:
    """Ports that the system has chosen."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


@contextmanager
def started_head(num_cpus: int) -> Iterator[Head]:
    """Start it, and end its processes, and no others, afterwards."""
    port, dashboard, agent = free_ports(3)
    token = secrets.token_hex(32)
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    programs = Path(sys.executable).parent
    mine |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    mine |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as place:  # sockets' paths are short
        options = [f"--port={port}", "--node-ip-address=127.0.0.1", f"--num-cpus={num_cpus}", f"--temp-dir={place}"]
        options += [
            "--include-dashboard=true",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
        ]
        process = subprocess.Popen(
            [str(programs / "ray"), "start", "--head", "--block", *options],
            env=mine,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{dashboard}"
            wait_for(lambda: process.poll() is not None or _answers(url, token))
            assert process.poll() is None
            yield Head(url, port, token)
        finally:
            started = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            for one in [process, *started]:
                with suppress(psutil.Error, ProcessLookupError):
                    one.kill()
            process.wait()


def _answers(url: str, token: str) -> bool:
    with suppress(requests.RequestException):
        headers = {"Authorization": f"Bearer {token}"}
        nodes = requests.get(f"{url}/api/v0/nodes", headers=headers, timeout=2)
        jobs = requests.get(f"{url}/api/jobs/", headers=headers, timeout=2)
        return nodes.ok and jobs.ok and bool(nodes.json()["data"]["result"]["result"])
    return False


class Proxy:
    """Hands bytes to and fro between whoever connects and a server, until it is told to do something else."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._silent = False
        self.num_dropped = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                self._pairs.append((client, server))
                threading.Thread(target=self._hand, args=(client, server), daemon=True).start()

    def _hand(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        with selectors.DefaultSelector() as chosen, suppress(OSError, ValueError, KeyError):
            for one in other:
                chosen.register(one, selectors.EVENT_READ)
            while True:
                for key, _ in chosen.select(timeout=0.2):
                    content = key.fileobj.recv(1 << 16)
                    if not content:
                        raise OSError
                    if not self._silent:
                        other[key.fileobj].sendall(content)
        for one in other:
            one.close()

    def drop(self) -> None:
        """Cut all connections, in the middle of whatever they carry."""
        pairs, self._pairs = self._pairs, []
        self.num_dropped += len(pairs)
        for pair in pairs:
            for one in pair:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def die(self) -> None:
        """Cut all connections and take no more."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.drop()

    def fall_silent(self) -> None:
        """Take connections, and hand on nothing."""
        self._silent = True
