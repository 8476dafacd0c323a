"""Judging, of what a run asks of the nodes together: links between them, placement, steps, the time until the first."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from cluster.runtime import Workers, places
from cluster.runtime.limits import size
from cluster.submission.doctor.judging import Line, Resources, Status, rate, seconds, some
from cluster.submission.doctor.links import Link, Linked
from cluster.submission.doctor.steps import Steps

# A local network answers in 0.05 to 0.5 ms; a busy host, or a cloud's other zone, in one or two. At 10 ms nodes are in
# different regions, or behind a tunnel: a step of a small net, which takes a few ms, then waits more than it computes.
MUCH_LATENCY_S, MOST_LATENCY_S = 2e-3, 10e-3
# 1 Gbit/s Ethernet, the least that is sold for this, carries 118 MB/s; a cable or switch that has fallen back to
# 100 Mbit/s 11.8 MB/s.
LITTLE_BYTES_PER_S, LEAST_BYTES_PER_S = 80e6, 15e6
# Links of one network are alike: one that is so many times slower than the median is not as it should be.
SLOWER_THAN_OTHERS = 4
EXCHANGED_BYTES = 4 << 20  # where no recipe says how large gradients are


def network(backend: str, found: Linked, names: Sequence[str]) -> Line:
    """`names` of the ranks."""
    check = f"network ({backend})"
    judged = {link: _wrong(link, found.links) for link in found.links}
    worst: Status = max(judged.values(), key=("ok", "warning", "failed").index)
    slowest = min(found.links, key=lambda link: link.bytes_per_s)
    latest = max(found.links, key=lambda link: link.latency_s)
    figures = f"{rate(slowest.bytes_per_s)}, {seconds(latest.latency_s)}"
    if worst == "ok":
        all_reduce = f"a small all-reduce takes {seconds(found.small_all_reduce_s)}"
        return Line(check, "ok", f"{figures} or better between neighbours; {all_reduce}")
    wrong = [link for link in found.links if judged[link] == worst]  # what is less bad would hide whose fault it is
    where = _where(wrong, [link for link in found.links if link not in wrong], names)
    fix = "see cables, switches, tunnels and the interface that the node's address is on (`ip addr`, `iperf3`)"
    return Line(check, worst, f"slow {where}: {figures}", fix)


def _wrong(link: Link, links: Sequence[Link]) -> Status:
    if link.latency_s > MOST_LATENCY_S or link.bytes_per_s < LEAST_BYTES_PER_S:
        return "failed"
    rates = sorted(other.bytes_per_s for other in links)
    odd = len(links) > 2 and link.bytes_per_s * SLOWER_THAN_OTHERS < rates[len(rates) // 2]
    weak = link.latency_s > MUCH_LATENCY_S or link.bytes_per_s < LITTLE_BYTES_PER_S
    return "warning" if odd or weak else "ok"


def _where(wrong: Sequence[Link], right: Sequence[Link], names: Sequence[str]) -> str:
    """`at node-3` where all of its links are slow and the others not, else the links."""
    ends: dict[int, int] = defaultdict(int)
    for link in wrong:
        ends[link.first] += 1
        ends[link.second] += 1
    fine = {end for link in right for end in (link.first, link.second)}
    guilty = [end for end, number in ends.items() if number == len(wrong) > 1 and end not in fine]
    if len(guilty) == 1:
        return f"at {names[guilty[0]]}"
    if not right and len(wrong) > 1:
        return "between all nodes"
    return "between " + some([f"{names[link.first]} and {names[link.second]}" for link in wrong], "; ")


def placement(
    workers: Workers,
    total: Mapping[str, Resources],
    free: Mapping[str, Resources],
    *,
    asked: bool,
    refused: tuple[str, str | None] | None = None,
) -> Line:
    """Whether there is room for the workers, or, where they were not asked for, for how many; `refused`: Ray's no."""
    room, now = places(workers.bundle, [*total.values()]), places(workers.bundle, [*free.values()])
    each = " and ".join(f"{amount:g} {name}" for name, amount in workers.bundle.items())
    if refused is not None:
        return Line("placement", "failed", *refused)
    if not asked:
        status: Status = "ok" if room else "failed"
        fix = None if room else "add nodes, or lower train.cpus_per_worker"
        return Line("placement", status, f"room for {room} workers of {each} each, {now} of them now", fix)
    if room < workers.least:  # and Ray does not say no: an autoscaler may bring nodes
        message = f"{workers.what} of {each} each wait until the cluster has grown: there is room for {room}"
        return Line("placement", "warning", message, "raise min_workers, to have the nodes examined too")
    if now < workers.least:
        message = f"{workers.what} of {each} each have to wait: there is room for {now} now, for {room} in all"
        return Line("placement", "warning", message, "see `ray status` for what holds the rest")
    return Line("placement", "ok", f"{workers.what} of {each} each have room, for {now} there is some now")


def speed(steps: Mapping[str, Steps], *, replicas: int, exchange_s: float | None, gradient_bytes: int) -> Line:
    """What a step takes: to compute, and to exchange gradients between nodes (None where no two nodes take part)."""
    slowest = max(steps, key=lambda name: steps[name].each_s)
    compute = steps[slowest].each_s
    fastest = min(found.each_s for found in steps.values())
    told = f"a step takes a worker {seconds(compute)}"
    if len(steps) > 1 and compute > 2 * fastest:
        others = f"and {seconds(fastest)} elsewhere: all wait for the slowest"
        return Line("steps", "warning", f"{told} on {slowest} {others}", f"see what else runs on {slowest}")
    if exchange_s is None or replicas < 2:
        return Line("steps", "ok", told)
    told += f" and exchanging {size(gradient_bytes)} of gradients {seconds(exchange_s)}"
    if exchange_s >= (replicas - 1) * compute:  # one worker alone would compute as much as all, and exchange nothing
        fix = "use fewer workers or a larger train.global_batch_size, or nodes that are better connected"
        return Line("steps", "warning", f"{told}: {replicas} workers are no faster than one", fix)
    gain = replicas * compute / (compute + exchange_s)
    return Line("steps", "ok", f"{told}: {replicas} workers on different nodes are up to {gain:.1f} times one")


def first_step(parts: Mapping[str, float]) -> Line:
    """An estimate, from seconds of what comes one after the other."""
    told = ", ".join(f"{name} {seconds(took)}" for name, took in parts.items() if took)
    return Line("first step", "ok", f"about {seconds(sum(parts.values()))} after the start ({told})")
