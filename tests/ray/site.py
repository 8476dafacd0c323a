"""A site of three hosts on this machine, each with its own network, processes, /tmp, home and sshd; and its user.

Nothing of it is seen from outside, and it sees no processes of outside: all ends with the process that has made it, and
a `ray stop` on a host ends what runs on that host only. For root on Linux, with iproute2, util-linux and openssh.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("head", "left", "right")
USERS_ADDRESS = "198.51.100.100"  # of the network that RFC 5737 keeps for examples
ADDRESSES = {name: f"198.51.100.{number}" for number, name in enumerate(NAMES, start=1)}
NEEDED = ("unshare", "nsenter", "ip", "mount", "rsync", "ssh", "ssh-keygen", "/usr/sbin/sshd")
UNSHARED = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
KEPT = (Path(__file__).parents[2], Path(sys.prefix), Path(sys.base_prefix))  # also where they are in /tmp
SSHD = """
Port 22
HostKey {home}/host_key
AuthorizedKeysFile {home}/.ssh/authorized_keys
PasswordAuthentication no
UsePAM no
StrictModes no
PermitRootLogin yes
PidFile none
"""


def lacking() -> str | None:
    """What this machine lacks for a site; None where it can have one."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    probe = [*UNSHARED, "ip", "link", "add", "bridge", "type", "bridge"]
    if subprocess.run(probe, capture_output=True).returncode:
        return "needs namespaces and network bridges"
    return None


class Site:
    """The hosts, and the user's machine: both in one folder, where the hosts' homes are too."""

    def __init__(self, folder: Path, process: "subprocess.Popen[str]") -> None:
        self.folder = folder
        self.pid = _only_child(process.pid)

    def start(self, *command: str, cwd: Path, **options: Any) -> "subprocess.Popen[str]":
        """Start what the user types in a folder."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--pid", "--mount", "--uts", "env", f"--chdir={cwd}"]
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MANTA_"))}
        programs = f"{Path(sys.executable).parent}{os.pathsep}{mine['PATH']}"
        mine |= {"HOME": str(self.folder / "user"), "PATH": programs, "TMPDIR": "/tmp"}
        return subprocess.Popen([*enter, *command], env=mine, text=True, **options)

    def run(self, *command: str, cwd: Path, timeout: float) -> str:
        """What a command of the user's prints; fails where it does."""
        began = self.start(
            *command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            told, _ = began.communicate(timeout=timeout)
        finally:
            began.kill()
        assert began.returncode == 0, f"{' '.join(command)}\n{told}"
        return str(told)

    def processes(self) -> list[str]:
        """The command lines of all processes of the hosts, but for their first one and sshd."""
        listed = self.run("ps", "-eo", "args", cwd=self.folder, timeout=60).splitlines()
        return [line for line in listed if "/site-packages/ray/" in line or "ray::" in line]


@contextmanager
def site(folder: Path, storage: str) -> Iterator[Site]:
    """Three hosts with sshd; `storage`, a path of theirs in /mnt, is one folder for all of them. Ends them all."""
    for name in ("user", *NAMES):
        (folder / name / ".ssh").mkdir(parents=True)
        (folder / name / "passwd").write_text(
            f"root:x:0:0:root:{folder / name}:/bin/bash\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n"
        )
    key = folder / "user" / ".ssh" / "id_ed25519"
    _new_key(key)
    for name in NAMES:
        _new_key(folder / name / "host_key")
        shutil.copy(key.with_suffix(".pub"), folder / name / ".ssh" / "authorized_keys")
        (folder / name / "sshd_config").write_text(SSHD.format(home=folder / name))
        (folder / name / ".bashrc").write_text("case $- in *i*) ;; *) return ;; esac\n")  # as Debian's begins
    command = [*UNSHARED, sys.executable, "-m", "tests.ray.site", str(folder), storage]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=KEPT[0])
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield Site(folder, process)
    finally:
        process.kill()
        process.wait()


def _new_key(file: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)


def _only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


# -- inside ------------------------------------------------------------------------------------------------------------


def _do(*command: str) -> None:
    subprocess.run(command, check=True)


def _own_folders(folder: Path, name: str) -> None:
    """An empty /mnt, an empty /tmp but for what is needed of it, and a home."""
    _do("mount", "-t", "tmpfs", "none", "/mnt")
    Path("/mnt/outside").mkdir()
    _do("mount", "--rbind", "/tmp", "/mnt/outside")
    _do("mount", "-t", "tmpfs", "none", "/tmp")
    for kept in [folder, *KEPT]:
        if kept.is_relative_to("/tmp"):
            kept.mkdir(parents=True, exist_ok=True)
            _do("mount", "--bind", str(Path("/mnt/outside") / kept.relative_to("/tmp")), str(kept))
    _do("umount", "--recursive", "--lazy", "/mnt/outside")
    _do("mount", "--bind", str(folder / name / "passwd"), "/etc/passwd")  # which ssh and sshd take homes from


def _make(folder: Path, storage: str) -> None:
    """Be the user's machine: make the network and the hosts, and wait until standard input ends."""
    _own_folders(folder, "user")
    _do("ip", "link", "set", "lo", "up")
    _do("ip", "link", "add", "bridge", "type", "bridge")
    _do("ip", "address", "add", f"{USERS_ADDRESS}/24", "dev", "bridge")
    _do("ip", "link", "set", "bridge", "up")
    hosts: dict[str, subprocess.Popen[bytes]] = {}
    for name, address in ADDRESSES.items():
        inside = [sys.executable, "-m", "tests.ray.site", str(folder), storage, name, address]
        host = subprocess.Popen([*UNSHARED, *inside], stdout=subprocess.DEVNULL)
        while not Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text():
            time.sleep(0.05)
        _do("ip", "link", "add", name, "type", "veth", "peer", "name", "eth", "netns", str(_only_child(host.pid)))
        _do("ip", "link", "set", name, "master", "bridge", "up")
        hosts[address] = host
    for address, host in hosts.items():
        while subprocess.run(["ssh-keyscan", "-T", "1", address], capture_output=True).stdout == b"":
            assert host.poll() is None, f"{address} has died"
            time.sleep(0.2)
    print("ready", flush=True)
    sys.stdin.read()


def _be_host(folder: Path, storage: str, name: str, address: str) -> None:
    """Be a host: its first process."""
    _do("hostname", name)
    _own_folders(folder, name)
    _do("mount", "-t", "tmpfs", "none", "/dev/shm")
    _do("mount", "-t", "tmpfs", "none", "/run")
    Path("/run/sshd").mkdir()
    Path(storage).mkdir(parents=True)
    _do("mount", "--bind", str(folder / "storage"), storage)
    _do("ip", "link", "set", "lo", "up")
    while subprocess.run(["ip", "link", "show", "eth"], capture_output=True).returncode:
        time.sleep(0.05)
    _do("ip", "address", "add", f"{address}/24", "dev", "eth")
    _do("ip", "link", "set", "eth", "up")
    _do("ip", "route", "add", "default", "via", USERS_ADDRESS)
    subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", str(folder / name / "sshd_config")])
    while True:  # as the first process of a host does, wait for those whose parents have ended
        with suppress(ChildProcessError):
            os.wait()


def main(arguments: Sequence[str]) -> None:
    """`FOLDER STORAGE` for the site, `FOLDER STORAGE NAME ADDRESS` for a host."""
    folder, storage, *host = arguments
    if host:
        _be_host(Path(folder), storage, *host)
    else:
        _make(Path(folder), storage)


if __name__ == "__main__":
    main(sys.argv[1:])
