"""Hosts in network namespaces of this machine, on one switch, each with an address of its own."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

SUBNET = "10.213.7"  # inside of the namespaces only


@dataclass(frozen=True)
class Host:
    """One of them."""

    namespace: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """Before a command that is to run there."""
        return ["ip", "netns", "exec", self.namespace]


def possible() -> bool:
    """Whether this process may make some, and limit what passes between them."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        return False
    try:
        with hosts(1) as (host,):
            limit(host, "40mbit")
    except subprocess.CalledProcessError:
        return False
    return True


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many of them, which reach each other and nothing else."""
    names = [f"manta-{os.getpid()}-{number}" for number in range(count)]
    switch = f"manta-{os.getpid()}-switch"
    with ExitStack() as stack:
        for name in (switch, *names):
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "delete", name)
        _run("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "switch", "up")
        found = []
        for number, name in enumerate(names):
            port, address = f"port{number}", f"{SUBNET}.{number + 1}"
            peer = ["peer", "name", "eth0", "netns", name]
            _run("ip", "-n", switch, "link", "add", port, "type", "veth", *peer)
            _run("ip", "-n", switch, "link", "set", port, "master", "switch", "up")
            for device in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", device, "up")
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            found.append(Host(name, address))
        yield found


def limit(host: Host, rate: str) -> None:
    """Let no more than this pass from the host."""
    bucket = ["tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]  # netem would delay too; few kernels have it
    _run("tc", "-n", host.namespace, "qdisc", "add", "dev", "eth0", "root", *bucket)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
