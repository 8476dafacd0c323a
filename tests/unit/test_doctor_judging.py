"""What the doctor says of measurements: which line, whose node, and what to do."""

from dataclasses import replace

import pytest

from cluster.runtime import Workers
from cluster.submission.doctor import judging, judging_runs
from cluster.submission.doctor.files import DataRead, Written
from cluster.submission.doctor.judging import Line, Offset
from cluster.submission.doctor.links import Link, Linked
from cluster.submission.doctor.machine import CODE, Disk, Gpu, Machine
from cluster.submission.doctor.steps import Steps

GIB = 1 << 30
DISK = Disk("/tmp/ray", 100 * GIB, 50 * GIB)
VERSIONS = {"python": "3.12.1", "ray": "2.60.0", "torch": "2.11.0", "manta": "0.1.0", CODE: "aa"}
MACHINE = Machine(VERSIONS, 8, 16 * GIB, Disk("/dev/shm", 8 * GIB, 8 * GIB), DISK, ())
GPU = Gpu("H200", 80 * GIB, 80 * GIB)
CPUS = {"CPU": 8.0, "object_store_memory": 4.0 * GIB}
NAMES = ["a", "b", "c"]


def statuses(line: Line | None) -> tuple[str, str]:
    assert line is not None
    assert line.status == "ok" or line.fix
    return line.status, line.message


def test_versions_are_those_of_the_first_node():
    same = judging.versions({"a": VERSIONS, "b": VERSIONS})
    assert same == Line("versions", "ok", "python 3.12.1, ray 2.60.0, torch 2.11.0, manta 0.1.0, the same everywhere")
    others = {"a": VERSIONS, "b": {**VERSIONS, "torch": "2.10.0"}, "c": {**VERSIONS, "torch": "2.10.0"}}
    assert statuses(judging.versions(others)) == ("failed", "torch 2.10.0 on b, c, 2.11.0 here")
    code = judging.versions({"a": VERSIONS, "b": {**VERSIONS, CODE: "bb"}})
    assert (code.status, code.message) == ("failed", "code of manta bb on b, aa here")
    assert code.fix is not None
    assert "--with-manta" in code.fix


def test_manta_that_is_brought_along_is_not_installed_and_the_same():
    brought = {name: version for name, version in VERSIONS.items() if name != "manta"}
    assert judging.versions({"a": VERSIONS, "b": brought}).status == "ok"
    missing = {name: version for name, version in VERSIONS.items() if name != "torch"}
    assert statuses(judging.versions({"a": VERSIONS, "b": missing})) == ("failed", "torch missing on b, 2.11.0 here")


@pytest.mark.parametrize(
    ("ahead_s", "status", "told"),
    [
        (0.01, "ok", "within 11 ms of each other"),
        (-4.0, "warning", "b's is 4.0 s behind"),
        (1000.0, "failed", "b's is 17 min ahead"),
    ],
)
def test_clocks(ahead_s: float, status: str, told: str):
    line = judging.clocks({"a": Offset(0.0, 0.001), "b": Offset(ahead_s, 0.001)})
    assert statuses(line) == (status, told)


def test_a_clock_that_cannot_be_read_quickly_is_not_held_against_a_node():
    assert judging.clocks({"a": Offset(0.0, 0.0), "b": Offset(3.0, 2.5)}).status == "ok"


def test_cores_that_are_handed_out_twice():
    assert judging.cores({"a": MACHINE}, {"a": CPUS}) == Line("cores", "ok", "8; 16 GiB of memory")
    assert statuses(judging.cores({"a": MACHINE}, {"a": {"CPU": 64}}))[0] == "warning"


def test_gpus_of_ray_are_seen_by_torch():
    with_gpu = replace(MACHINE, gpus=(GPU,))
    without = replace(MACHINE, gpu_problem="torch finds no driver")
    assert judging.gpus({"a": without}, {"a": CPUS}, wanted=False) is None
    ours = judging.gpus({"a": with_gpu, "b": with_gpu}, {"a": {"GPU": 1}, "b": {"GPU": 1}}, wanted=True)
    assert statuses(ours) == ("ok", "2, torch sees them all: H200")
    blind = judging.gpus({"a": with_gpu, "b": without}, {"a": {"GPU": 1}, "b": {"GPU": 2}}, wanted=False)
    assert statuses(blind) == ("failed", "Ray has 2 on b and torch sees 0 (torch finds no driver)")
    none = judging.gpus({"a": without}, {"a": CPUS}, wanted=True)
    assert statuses(none) == ("failed", "there is none (torch finds no driver)")
    unused = judging.gpus({"a": with_gpu}, {"a": CPUS}, wanted=False)
    assert statuses(unused) == ("warning", "torch sees more than Ray has on a")
    assert statuses(judging.gpus({"a": with_gpu}, {"a": CPUS}, wanted=True))[0] == "failed"


def test_data_fits_into_the_object_store_and_that_into_shared_memory():
    assert judging.object_store({"a": {"CPU": 1}}, data_bytes=1) is None
    assert statuses(judging.object_store({"a": CPUS}, data_bytes=GIB)) == ("ok", "4 GiB, 1 GiB of data")
    assert statuses(judging.object_store({"a": CPUS, "b": CPUS}, data_bytes=4 * GIB))[0] == "warning"
    assert statuses(judging.shared_memory({"a": MACHINE}, {"a": CPUS})) == ("ok", "8 GiB free")
    docker = replace(MACHINE, shared_memory=Disk("/dev/shm", 64 << 20, 64 << 20))
    line = judging.shared_memory({"a": MACHINE, "b": docker}, {"a": CPUS, "b": CPUS})
    assert statuses(line) == ("failed", "64 MiB on b, less than the object store: Ray uses the disk for it")
    assert judging.shared_memory({"a": replace(MACHINE, shared_memory=None)}, {"a": CPUS}) is None


@pytest.mark.parametrize(("free", "status"), [(50, "ok"), (8, "warning"), (4, "failed")])
def test_rays_disk(free: int, status: str):
    full = replace(MACHINE, temporary=replace(DISK, free=free * GIB))
    line = judging.disk({"a": MACHINE, "b": full})
    assert statuses(line)[0] == status
    assert status == "ok" or f"b has {free} GiB left" in line.message


def test_storage_that_cannot_be_written_or_is_too_small():
    fine = Written(bytes_per_s=2e8, free_bytes=100 * GIB)
    assert statuses(judging.storage("/runs", {"a": fine, "b": fine}, needed_bytes=GIB)) == (
        "ok",
        "/runs can be written, at least 200 MB/s",
    )
    full = Written("/runs: cannot be written (No space left on device)", "make room there")
    line = judging.storage("/runs", {"a": fine, "b": full}, needed_bytes=GIB)
    assert line == Line(
        "storage", "failed", "/runs: cannot be written (No space left on device) on b", "make room there"
    )
    small = judging.storage("/runs", {"a": replace(fine, free_bytes=GIB)}, needed_bytes=2 * GIB)
    assert statuses(small) == ("failed", "/runs: 1 GiB left on a, and checkpoints take 2 GiB")
    assert judging.storage("s3://b/r", {"a": replace(fine, free_bytes=None)}, needed_bytes=GIB).status == "ok"


@pytest.mark.parametrize(
    ("unseen", "told"),
    [
        ({"a": [], "b": [], "c": []}, None),
        ({"a": ["c"], "b": ["c"], "c": ["a", "b"]}, "/runs: c sees nothing of the others"),
        ({"a": ["b", "c"], "b": ["a", "c"], "c": ["a", "b"]}, "/runs: each node has its own"),
        ({"a": ["b"], "b": ["a"]}, "/runs: each node has its own"),
        ({"a": ["c"], "b": [], "c": []}, "/runs: not all that the others write is seen on a"),
    ],
)
def test_storage_that_is_not_the_same(unseen: dict[str, list[str]], told: str | None):
    line = judging.shared_storage("/runs", unseen)
    assert statuses(line) == (("failed", told) if told else ("ok", "what one node writes all nodes read"))


def test_data_that_a_node_cannot_read():
    assert judging.data({"a": DataRead(bytes_per_s=1e9)}) == Line("data", "ok", "read by all nodes, 1 GB/s")
    line = judging.data({"a": DataRead(bytes_per_s=1e9), "b": DataRead("x.parquet: is missing", "prepare it")})
    assert line == Line("data", "failed", "x.parquet: is missing on b", "prepare it")


# -- links -------------------------------------------------------------------------------------------------------------


def linked(*rates: float, latency_s: float = 1e-4) -> Linked:
    """A ring of nodes whose links have these rates, in bytes a second."""
    links = tuple(Link(n, (n + 1) % len(rates), latency_s, rate) for n, rate in enumerate(rates))
    return Linked(0.1, 0.2, 3e-4, links)


def test_links_that_are_as_they_should_be():
    line = judging_runs.network("gloo", linked(1e9, 9e8, 1.1e9), NAMES)
    told = "900 MB/s, 100 µs or better between neighbours; a small all-reduce takes 300 µs"
    assert line == Line("network (gloo)", "ok", told)


@pytest.mark.parametrize(
    ("rates", "status", "where"),
    [
        ((1e9, 5e6, 6e6), "failed", "slow at c: 5 MB/s, 100 µs"),
        ((5e7, 5e6, 6e6), "failed", "slow at c: 5 MB/s"),  # what is less bad does not hide it
        ((1e9, 5e6, 1e9), "failed", "slow between b and c: 5 MB/s"),
        ((5e6, 5e6, 5e6), "failed", "slow between all nodes: 5 MB/s"),
        ((1e10, 1e10, 1e9), "warning", "slow between c and a: 1 GB/s"),  # not slow, but for these
        ((5e7, 1e9, 1e9), "warning", "slow between a and b: 50 MB/s"),
    ],
)
def test_slow_links_and_whose_they_are(rates: tuple[float, ...], status: str, where: str):
    found, message = statuses(judging_runs.network("gloo", linked(*rates), NAMES))
    assert (found, message.startswith(where)) == (status, True), message


@pytest.mark.parametrize(("latency_s", "status"), [(5e-4, "ok"), (5e-3, "warning"), (5e-2, "failed")])
def test_late_links(latency_s: float, status: str):
    line = judging_runs.network("nccl", linked(1e9, 1e9, 1e9, latency_s=latency_s), NAMES)
    assert statuses(line)[0] == status
    two = Linked(0.1, 0.2, 3e-4, (Link(0, 1, latency_s, 1e9),))
    assert statuses(judging_runs.network("nccl", two, NAMES[:2]))[0] == status


# -- a run -------------------------------------------------------------------------------------------------------------


def test_placement():
    workers, nodes, busy = Workers(4, 4, 2, False), {"a": CPUS, "b": CPUS}, {"a": {"CPU": 1.0}, "b": {"CPU": 4.0}}
    assert statuses(judging_runs.placement(workers, nodes, nodes, asked=True)) == (
        "ok",
        "4 workers of 2 CPU each have room, for 8 there is some now",
    )
    assert statuses(judging_runs.placement(workers, nodes, busy, asked=True)) == (
        "warning",
        "4 workers of 2 CPU each have to wait: there is room for 2 now, for 8 in all",
    )
    refused = judging_runs.placement(workers, nodes, busy, asked=True, refused=("never", "ask for fewer"))
    assert refused == Line("placement", "failed", "never", "ask for fewer")
    grows = judging_runs.placement(replace(workers, least=8, most=8), {"a": CPUS}, {"a": CPUS}, asked=True)
    told = "8 workers of 2 CPU each wait until the cluster has grown: there is room for 4"
    assert statuses(grows) == ("warning", told)
    one = Workers(1, 1, 16, False)
    assert statuses(judging_runs.placement(one, nodes, nodes, asked=False))[0] == "failed"
    many = judging_runs.placement(replace(one, cpus=1), nodes, busy, asked=False)
    assert statuses(many) == ("ok", "room for 16 workers of 1 CPU each, 5 of them now")


def test_steps_against_the_exchange_of_their_gradients():
    even = {"a": Steps(1.0, 0.1), "b": Steps(1.0, 0.1)}
    alone = judging_runs.speed(even, replicas=2, exchange_s=None, gradient_bytes=0)
    assert statuses(alone) == ("ok", "a step takes a worker 100 ms")
    quick = judging_runs.speed(even, replicas=2, exchange_s=0.025, gradient_bytes=4 << 20)
    assert statuses(quick)[0] == "ok"
    assert quick.message.endswith("2 workers on different nodes are up to 1.6 times one")  # 2 * 0.1 / 0.125
    slow = judging_runs.speed(even, replicas=2, exchange_s=0.1, gradient_bytes=4 << 20)
    assert statuses(slow)[0] == "warning"
    assert slow.message.endswith("4 MiB of gradients 100 ms: 2 workers are no faster than one")
    three = judging_runs.speed(even, replicas=3, exchange_s=0.1, gradient_bytes=4 << 20)
    assert three.status == "ok"  # 3 * 0.1 / 0.2


def test_a_node_that_computes_slowly():
    steps = {"a": Steps(1.0, 0.1), "b": Steps(1.0, 0.3)}
    told = "a step takes a worker 300 ms on b and 100 ms elsewhere: all wait for the slowest"
    assert statuses(judging_runs.speed(steps, replicas=2, exchange_s=0.01, gradient_bytes=4)) == ("warning", told)


def test_the_time_to_the_first_step_is_the_sum_of_what_comes_before_it():
    line = judging_runs.first_step({"this process": 2.0, "data": 0.0, "workers": 8.0, "the step": 0.5})
    told = "about 10.5 s after the start (this process 2.0 s, workers 8.0 s, the step 500 ms)"
    assert line == Line("first step", "ok", told)


def test_nodes_that_do_not_answer():
    assert judging.answering(["a"], {}) == Line("nodes", "ok", "one node: a")
    line = judging.answering(["a"], {"b": ("did not answer within 60 s", None)})
    assert line == Line("nodes", "failed", "b: did not answer within 60 s", "see Ray's logs there")


def test_long_lists_are_cut():
    assert judging.some(["a", "b", "c", "d", "e"]) == "a, b, c, and 2 more"
