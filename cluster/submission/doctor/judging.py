"""Judging: lines about a node's machine, from what was measured: ok, a warning, or failed, and what to do then.

Pure functions. Mappings are from nodes' names; the first name is that of the node where the doctor was called.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Literal

from cluster.runtime.limits import size
from cluster.submission.doctor.files import DataRead, Written
from cluster.submission.doctor.machine import CODE, Machine

Status = Literal["ok", "warning", "failed"]
Resources = Mapping[str, float]

# What signs its requests with the time is refused past some minutes (Kerberos, and so NFS with it, 5; S3 15), and what
# compares times of files or lines of logs between nodes goes wrong by a second already. NTP keeps milliseconds.
MOST_SKEW_S, MUCH_SKEW_S = 300.0, 1.0
# Ray puts no more objects on a disk that is used beyond 95 % (RAY_local_fs_capacity_threshold).
MOST_USED, MUCH_USED = 0.95, 0.90
# Of an object store, which holds results of tasks beside the data; what does not fit is spilled to disk and read back.
MOST_FILLED = 0.8
MOST_NAMED = 3


@dataclass(frozen=True)
class Line:
    """One check."""

    check: str
    status: Status
    message: str
    fix: str | None = None

    def facts(self) -> dict[str, str | None]:
        """As JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Offset:
    """How far a node's clock is ahead of this one's, give or take so much. Seconds."""

    ahead_s: float
    uncertain_s: float


def answering(names: Sequence[str], silent: Mapping[str, tuple[str, str | None]]) -> Line:
    """`silent`: what was wrong with nodes that did not answer, and what to do."""
    if silent:
        fixes = dict.fromkeys(fix or "see Ray's logs there" for _, fix in silent.values())
        told = "; ".join(f"{name}: {problem}" for name, (problem, _) in silent.items())
        return Line("nodes", "failed", told, "; ".join(fixes))
    many = f"{len(names)} nodes answer: {some(names)}" if len(names) > 1 else f"one node: {names[0]}"
    return Line("nodes", "ok", many)


def versions(found: Mapping[str, Mapping[str, str]]) -> Line:
    """All nodes' should be those of the first."""
    here, *_ = found.values()
    told, own = [], False
    for what in dict.fromkeys(name for of_node in found.values() for name in of_node):
        if what == "manta" and _all_equal(of_node.get(CODE) for of_node in found.values()):
            continue  # brought along, it is not installed, and none the less the same
        wanted = here.get(what)
        others: dict[str | None, list[str]] = defaultdict(list)
        for node, of_node in found.items():
            if of_node.get(what) != wanted:
                others[of_node.get(what)].append(node)
        own |= bool(others) and what == CODE
        for version, nodes in others.items():
            told.append(f"{what} {version or 'missing'} on {some(nodes)}, {wanted or 'missing'} here")
    if told:
        manta = " (manta: update it there, or `manta submit --with-manta`)" if own else ""
        return Line("versions", "failed", "; ".join(told), f"install the same versions on all nodes{manta}")
    shown = ", ".join(f"{name} {here[name]}" for name in ("python", "ray", "torch", "manta") if name in here)
    return Line("versions", "ok", f"{shown}{', the same everywhere' if len(found) > 1 else ''}")


def clocks(offsets: Mapping[str, Offset]) -> Line:
    """Offsets from the clock here; what the measuring leaves open is in a node's favour."""
    surely = {name: max(0.0, abs(offset.ahead_s) - offset.uncertain_s) for name, offset in offsets.items()}
    wrong = [name for name, by_s in surely.items() if by_s > MUCH_SKEW_S]
    if not wrong:
        most = max((abs(o.ahead_s) + o.uncertain_s for o in offsets.values()), default=0.0)
        return Line("clocks", "ok", f"within {seconds(most)} of each other")
    told = ", ".join(
        f"{name}'s is {seconds(abs(offsets[name].ahead_s))} {'ahead' if offsets[name].ahead_s > 0 else 'behind'}"
        for name in wrong
    )
    status: Status = "failed" if max(surely.values()) > MOST_SKEW_S else "warning"
    return Line("clocks", status, told, "run NTP (chrony, systemd-timesyncd) on all nodes")


def cores(machines: Mapping[str, Machine], resources: Mapping[str, Resources]) -> Line:
    """What Ray hands out is what there is."""
    over = {n: resources[n].get("CPU", 0) for n, m in machines.items() if resources[n].get("CPU", 0) > m.cores}
    if over:
        told = ", ".join(f"{name} has {machines[name].cores} cores and hands out {over[name]:g}" for name in over)
        return Line("cores", "warning", told, "start Ray there with --num-cpus of as many as there are")
    all_of, handed = sum(m.cores for m in machines.values()), sum(resources[name].get("CPU", 0) for name in machines)
    least = f"{_least(machines)}{size(min(m.memory_bytes for m in machines.values()))} of memory"
    return Line("cores", "ok", f"{all_of}{f', {handed:g} of them handed out' if handed != all_of else ''}; {least}")


def gpus(machines: Mapping[str, Machine], resources: Mapping[str, Resources], *, wanted: bool) -> Line | None:
    """Ray's are those that torch sees. None where nobody has or wants one."""
    rays = {name: int(resources[name].get("GPU", 0)) for name in machines}
    told = []
    for name, found in machines.items():
        if rays[name] > len(found.gpus):
            why = f" ({found.gpu_problem})" if found.gpu_problem else ""
            told.append(f"Ray has {rays[name]} on {name} and torch sees {len(found.gpus)}{why}")
    if told:
        return Line("GPUs", "failed", "; ".join(told), "install a torch build for its driver, see `nvidia-smi` there")
    idle = [name for name, found in machines.items() if len(found.gpus) > rays[name]]
    if wanted and not any(rays.values()):
        reason = next((found.gpu_problem for found in machines.values() if found.gpu_problem), None)
        seen = f"torch sees some on {some(idle)}, and Ray has none" if idle else f"there is none ({reason})"
        return Line("GPUs", "failed", seen, "leave out --gpu, start Ray with --num-gpus, or see `nvidia-smi` there")
    if idle:
        return Line("GPUs", "warning", f"torch sees more than Ray has on {some(idle)}", "start Ray with --num-gpus")
    if not any(rays.values()):
        return None
    kinds = dict.fromkeys(gpu.name for found in machines.values() for gpu in found.gpus)
    return Line("GPUs", "ok", f"{sum(rays.values())}, torch sees them all: {some([*kinds])}")


def object_store(resources: Mapping[str, Resources], *, data_bytes: int) -> Line | None:
    """The data that is held goes there once, and is pulled to every node. None without Ray."""
    named = "object_store_memory"
    rooms = {name: int(of_node[named]) for name, of_node in resources.items() if named in of_node}
    if not rooms:
        return None
    short = [name for name, room in rooms.items() if data_bytes > MOST_FILLED * room]
    told = f"{_least(rooms)}{size(min(rooms.values()))}"
    if short:
        message = (
            f"{size(data_bytes)} of data, and {told} of room on {some(short)}: it is spilled to disk and read back"
        )
        return Line("object store", "warning", message, "start Ray there with a larger --object-store-memory")
    return Line("object store", "ok", f"{told}{f', {size(data_bytes)} of data' if data_bytes else ''}")


def shared_memory(machines: Mapping[str, Machine], resources: Mapping[str, Resources]) -> Line | None:
    """It holds the object store. None where there is no such thing."""
    found = {name: machine.shared_memory for name, machine in machines.items() if machine.shared_memory}
    if not found:
        return None
    small = [n for n, disk in found.items() if disk.total < resources.get(n, {}).get("object_store_memory", 0)]
    if small:
        message = (
            f"{size(found[small[0]].total)} on {some(small)}, less than the object store: Ray uses the disk for it"
        )
        return Line("shared memory", "failed", message, "give it room: `docker run --shm-size`, or a larger /dev/shm")
    return Line("shared memory", "ok", f"{_least(found)}{size(min(disk.free for disk in found.values()))} free")


def disk(machines: Mapping[str, Machine]) -> Line:
    """The one where Ray has its files."""
    found = {name: machine.temporary for name, machine in machines.items() if machine.temporary}
    used = {name: 1 - disk.free / max(1, disk.total) for name, disk in found.items()}
    full = [name for name, part in used.items() if part > MUCH_USED]
    if full:
        told = ", ".join(f"{name} has {size(found[name].free)} left ({used[name]:.1%} used)" for name in full)
        status: Status = "failed" if max(used.values()) > MOST_USED else "warning"
        where = found[full[0]].path
        return Line("disk", status, f"{where}: {told}", "make room, or start Ray there with another --temp-dir")
    least = min((disk.free for disk in found.values()), default=0)
    return Line("disk", "ok", f"{_least(found)}{size(least)} free for Ray's files")


def storage(where: str, found: Mapping[str, Written], *, needed_bytes: int) -> Line:
    """Every node can write there, and there is room."""
    failed = {name: written for name, written in found.items() if written.problem}
    if failed:
        told = dict.fromkeys(f"{written.problem} on {name}" for name, written in failed.items())
        fixes = dict.fromkeys(written.fix for written in failed.values() if written.fix)
        return Line("storage", "failed", some([*told], "; "), "; ".join(fixes) or "check permissions and mounts there")
    short = [n for n, written in found.items() if written.free_bytes is not None and written.free_bytes < needed_bytes]
    if short:
        free = size(found[short[0]].free_bytes or 0)
        message = f"{where}: {free} left on {some(short)}, and checkpoints take {size(needed_bytes)}"
        return Line("storage", "failed", message, "make room there, or lower train.keep_checkpoints")
    slowest = min(written.bytes_per_s for written in found.values())
    return Line("storage", "ok", f"{where} can be written, {_least(found)}{rate(slowest)}")


def shared_storage(where: str, unseen: Mapping[str, Sequence[str]]) -> Line:
    """`unseen`: of each node, the nodes whose files it does not see."""
    blind = {name: others for name, others in unseen.items() if others}
    if not blind:
        return Line("shared storage", "ok", "what one node writes all nodes read")
    # a node that is blind to all others, and all others to it, is the one to look at
    alone = [name for name, others in blind.items() if len(others) == len(unseen) - 1]
    if len(alone) == len(unseen):
        who = "each node has its own"
    elif alone:
        who = f"{some(alone)} {'sees' if len(alone) == 1 else 'see'} nothing of the others"
    else:
        who = f"not all that the others write is seen on {some([*blind])}"
    fix = "mount the same storage on all nodes, or give --run a URI such as s3://bucket/run"
    return Line("shared storage", "failed", f"{where}: {who}", fix)


def data(found: Mapping[str, DataRead]) -> Line:
    """Of what every node reads for itself."""
    failed = {name: read for name, read in found.items() if read.problem}
    if failed:
        told = [f"{read.problem} on {name}" for name, read in failed.items()]
        fixes = dict.fromkeys(read.fix for read in failed.values() if read.fix)
        return Line("data", "failed", some(told, "; "), "; ".join(fixes))
    rates = [read.bytes_per_s for read in found.values() if read.bytes_per_s]
    return Line("data", "ok", f"read by all nodes{f', {_least(rates)}{rate(min(rates))}' if rates else ''}")


# -- words -----------------------------------------------------------------------------------------------------------


def some(names: Sequence[str], by: str = ", ") -> str:
    """The first of them, and how many more there are."""
    more = len(names) - MOST_NAMED
    return by.join(names[:MOST_NAMED]) + (f"{by}and {more} more" if more > 0 else "")


def seconds(value: float) -> str:
    """For people: `12 ms`."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"


def rate(bytes_per_s: float) -> str:
    """For people, as disks and networks are sold: `118 MB/s`."""
    for unit, many in (("GB", 1e9), ("MB", 1e6)):
        if bytes_per_s >= many:
            return f"{bytes_per_s / many:.3g} {unit}/s"
    return f"{bytes_per_s / 1e3:.3g} kB/s"


def _least(of: Sized) -> str:
    """Before what is said of the node that has least."""
    return "at least " if len(of) > 1 else ""


def _all_equal(values: Iterable[str | None]) -> bool:
    return len(set(values)) == 1
