"""Hosts of a cluster on this machine: three nodes and a head that trains nothing, and how one of them dies.

Either separate raylets at one address, or, where this may be done, network namespaces with addresses of their own.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.ray.faults import MARK, wait_for
from tests.ray.heads import ROOT

NUM_HOSTS = 3
PROGRAMS = Path(sys.executable).parent


class Hosts:
    """A cluster, on which a driver can be run and of which hosts die."""

    address: str
    inside: Sequence[str] = ()  # comes before a command that is to run on the head's host

    def __init__(self, settings: dict[str, str], mark: str) -> None:
        mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        mine |= {"PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        mine |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment = {**mine, **settings, MARK: mark}

    def host_of(self, worker: psutil.Process) -> int:
        """A number that is the same for all processes of one host."""
        raise NotImplementedError

    def die(self, host: int) -> None:
        """End all of its processes without a goodbye."""
        raise NotImplementedError


class Raylets(Hosts):
    """Nodes at one address: a host is its raylet, by its process id."""

    def host_of(self, worker: psutil.Process) -> int:
        return int(worker.environ()["RAY_RAYLET_PID"])

    def die(self, host: int) -> None:
        raylet = psutil.Process(host)
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.Error):
                process.kill()


@contextmanager
def raylets(settings: dict[str, str], mark: str) -> Iterator[Hosts]:
    """Started by Ray's own Cluster in a process of its own: this one may have another Ray."""
    hosts = Raylets(settings, mark)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": hosts.environment}
    process = subprocess.Popen([sys.executable, "-m", "tests.ray.hosts"], **pipes)
    try:
        assert process.stdout
        hosts.address = json.loads(process.stdout.readline())["address"]
        yield hosts
    finally:
        process.communicate("")


def main() -> None:
    """`python -m tests.ray.hosts [3]`, until standard input ends.

    Prints {"address", "raylets": their process ids, "nodes": their ids, "head": that of the head}.
    """
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    number = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_HOSTS
    nodes = [cluster.add_node(num_cpus=1, include_dashboard=False) for _ in range(number)]
    pids = [node.all_processes["raylet"][0].process.pid for node in nodes]
    ids = {"nodes": [node.node_id for node in nodes], "head": cluster.head_node.node_id}
    print(json.dumps({"address": cluster.address, "raylets": pids, **ids}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


# -- hosts with addresses of their own --------------------------------------------------------------------------------


def can_part() -> bool:
    """Whether this process may make network namespaces, and has iproute2 to join them with."""
    try:
        tries = (["unshare", "--net", "true"], ["ip", "-V"])
        return all(subprocess.run(command, capture_output=True).returncode == 0 for command in tries)
    except FileNotFoundError:
        return False


class Namespaces(Hosts):
    """Namespaces without names, which go with the processes in them; a host is its namespace's inode.

    They hang on a bridge, in one more namespace: nothing of this machine's own network is touched.
    """

    def __init__(self, settings: dict[str, str], mark: str) -> None:
        super().__init__(settings, mark)
        self._holders: list[subprocess.Popen[bytes]] = []
        self._rays: list[subprocess.Popen[bytes]] = []
        self._cables: dict[int, str] = {}  # a host's end at the bridge

    def build(self) -> None:
        """The bridge, the head and the other hosts, with a cable each."""
        self._new_namespace()
        self._at_bridge("link", "add", "bridge", "type", "bridge")
        self._at_bridge("link", "set", "bridge", "up")
        for number in range(1, NUM_HOSTS + 2):
            holder = self._new_namespace()
            self._at_bridge("link", "add", f"to{number}", "type", "veth", "peer", "name", "eth0", "netns", str(holder))
            self._at_bridge("link", "set", f"to{number}", "master", "bridge", "up")
            self._ip(number, "link", "set", "lo", "up")
            self._ip(number, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            self._ip(number, "link", "set", "eth0", "up")
            self._cables[_namespace(holder)] = f"to{number}"
        self.inside = self._enter(1)
        self.address = "10.77.0.1:6379"

    def start_ray(self, temporary: Path) -> None:
        """The head first, which trains nothing; then all others. Each has a temporary folder of its own in there."""
        places = [f"--temp-dir={temporary / str(number)}" for number in range(NUM_HOSTS + 2)]
        self._ray(1, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false", places[1])
        wait_for(self._answers)
        for number in range(2, NUM_HOSTS + 2):
            self._ray(number, f"--address={self.address}", "--num-cpus=1", places[number])
        wait_for(lambda: self._num_nodes() == NUM_HOSTS + 1)

    def host_of(self, worker: psutil.Process) -> int:
        return _namespace(worker.pid)

    def die(self, host: int) -> None:
        """The cable comes first, so that nobody hears of its end."""
        self._at_bridge("link", "set", self._cables[host], "down")
        _kill_all({host})

    def remove(self) -> None:
        """All processes in the namespaces, and these with them."""
        _kill_all({_namespace(holder.pid) for holder in self._holders if holder.poll() is None})
        for process in [*self._holders, *self._rays]:
            process.wait()

    def _new_namespace(self) -> int:
        own = _namespace(os.getpid())
        holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self._holders.append(holder)
        wait_for(lambda: _namespace(holder.pid) != own)
        return holder.pid

    def _enter(self, number: int) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._holders[number].pid}/ns/net", "--"]

    def _ip(self, number: int, *arguments: str) -> None:
        subprocess.run([*self._enter(number), "ip", *arguments], check=True)

    def _at_bridge(self, *arguments: str) -> None:
        self._ip(0, *arguments)

    def _ray(self, number: int, *options: str) -> None:
        command = [*self._enter(number), str(PROGRAMS / "ray"), "start", "--block"]
        command += [f"--node-ip-address=10.77.0.{number}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started = subprocess.Popen([*command, *options], env=self.environment, start_new_session=True, **quiet)
        self._rays.append(started)

    def _answers(self) -> bool:
        knock = "import socket; socket.create_connection(('10.77.0.1', 6379), 2)"
        command = [*self.inside, sys.executable, "-c", knock]
        return subprocess.run(command, capture_output=True).returncode == 0

    def _num_nodes(self) -> int:
        count = "from ray._raylet import GcsClient as C; print(sum(node.state == 0 for node in "
        count += f"C(address='{self.address}').get_all_node_info(timeout=5).values()))"
        command = [*self.inside, sys.executable, "-c", count]
        asked = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        return int(asked.stdout) if asked.returncode == 0 else 0


def _namespace(pid: int) -> int:
    """Of the network that a process is in; 0 where it has gone."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def _kill_all(namespaces: set[int]) -> None:
    own = _namespace(os.getpid())
    assert own not in namespaces
    assert 0 not in namespaces
    for process in psutil.process_iter():
        if _namespace(process.pid) in namespaces:
            with suppress(psutil.Error):
                process.kill()


@contextmanager
def namespaces(settings: dict[str, str], mark: str) -> Iterator[Hosts]:
    """Started as on hosts anywhere: `ray start` on each."""
    hosts = Namespaces(settings, mark)
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as place:  # sockets' paths are short
        try:
            hosts.build()
            hosts.start_ray(Path(place))
            yield hosts
        finally:
            hosts.remove()


if __name__ == "__main__":
    main()
