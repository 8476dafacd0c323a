"""Examining: the checks, one after the other, of this machine alone or of every node of a cluster."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from cluster.data.prepare import prepared
from cluster.errors import RunFailed
from cluster.recipe.fit import check
from cluster.recipe.recipe import Recipe
from cluster.runs.admission import refuse_unreadable_files, refuse_what_cannot_start, workers_of
from cluster.runs.summary import Summary, summarise
from cluster.runtime import Workers, places, ray_session
from cluster.runtime.existing import Existing, refuse_temporary
from cluster.runtime.limits import size
from cluster.storage import Folder
from cluster.submission.doctor import judging, judging_runs
from cluster.submission.doctor.asking import Here, Nodes, Problem, Share
from cluster.submission.doctor.files import (
    Wanted,
    Written,
    clear_probe,
    new_key,
    read_wanted,
    remove_empty,
    unseen,
    write_probe,
)
from cluster.submission.doctor.judging import Line, some
from cluster.submission.doctor.links import Linked, gathered, measure_links, meeting_point
from cluster.training.splits import Splits, open_splits
from nn_models.errors import UserError

Tell = Callable[[Line], None]

LEAST_WRITTEN, MOST_WRITTEN = 16 << 20, 256 << 20  # bytes, to find a quota within seconds
STORAGE_S = 120.0
LINKS_S = 150.0
STEPS_S = 180.0


@dataclass(frozen=True)
class Asked:
    """What the nodes are to be fit for. `num_workers` None: for as many as there is room for."""

    storage: str
    recipe: Recipe | None = None
    num_workers: tuple[int, int] | None = None
    use_gpu: bool = False

    def workers(self, *, alone: bool) -> Workers:
        """Those asked for; where nobody says, one, or on this machine alone none."""
        num_workers = self.num_workers or ((0, 0) if alone else (1, 1))
        if self.recipe is None:
            return Workers(*num_workers, 1, self.use_gpu)
        return workers_of(self.recipe, num_workers, self.use_gpu, alone=alone)


@dataclass(frozen=True)
class Plan:
    """A recipe with its data, which are fit to begin."""

    recipe: Recipe
    splits: Splits
    summary: Summary
    opened_s: float  # that reading the data has taken

    @property
    def streamed(self) -> bool:
        """Whether workers read the training rows from storage."""
        return "train" not in self.splits.tables

    @property
    def wanted(self) -> Wanted:
        """What each node has to read for itself."""
        named = [getattr(self.recipe.model, field) for field in self.recipe.model.files]
        return Wanted(self.splits.where if self.streamed else None, tuple(str(path) for path in named if path))

    @property
    def gradient_bytes(self) -> int:
        """That replicas exchange in each step."""
        return 4 * self.summary.num_parameters

    @property
    def kept_bytes(self) -> int:
        """That a run's checkpoints take: those that are kept, one that is being written, and the best weights."""
        return self.summary.parameter_bytes * (self.recipe.train.keep_checkpoints + 1) + self.gradient_bytes


def examine(asked: Asked, *, there: Existing | None, tell: Tell, verbose: bool = False) -> None:
    """Tell a line for each check, as soon as it is known. Raises UserError where there is no cluster to examine."""
    began_s = time.time() - psutil.Process().create_time()  # importing torch is part of a run's start
    workers = asked.workers(alone=there is None)
    if not workers.most:
        _Examination(asked, workers, Here(), tell, began_s=began_s).run()
        return
    with ray_session(address=there, cpus=workers.most * workers.cpus, verbose=verbose) as session:
        from cluster.submission.doctor.gathering import examining

        with examining(session) as surgery:
            _Examination(asked, workers, surgery, tell, began_s=began_s).run()


class _Examination:
    """All checks of some nodes."""

    def __init__(self, asked: Asked, workers: Workers, nodes: Nodes, tell: Tell, *, began_s: float) -> None:
        self._asked, self._workers, self._nodes, self._tell_line = asked, workers, nodes, tell
        self._began_s = began_s
        self._told_silent: set[str] = set()
        self._without_data: set[str] = set()

    def run(self) -> None:
        """Tell all lines."""
        self._machines()
        plan = self._plan()
        self._storage(plan)
        if plan is not None:
            self._data(plan)
        self._placement()
        joined_s, exchange_s = self._network(plan)
        if plan is not None:
            self._steps(plan, joined_s, exchange_s)
        self._say_who_fell_silent()

    def _tell(self, line: Line | None) -> None:
        if line is not None:
            self._tell_line(line)

    def _say_who_fell_silent(self) -> None:
        """Of the nodes that have stopped to answer since the last time; all others are asked on."""
        fell = {name: problem for name, problem in self._nodes.silent.items() if name not in self._told_silent}
        self._told_silent |= set(fell)
        if fell:
            self._tell(judging.answering(self._nodes.names, fell))

    # -- what each node has --------------------------------------------------------------------------------------------

    def _machines(self) -> None:
        nodes = self._nodes
        machines = nodes.machines()
        self._say_who_fell_silent()
        if not self._told_silent:
            self._tell(judging.answering(nodes.names, {}))
        if machines.failed:
            self._tell(_broken("machine", machines.failed))
        if not machines.found:
            raise RunFailed("no node answers")
        self._tell(judging.versions({name: found.versions for name, found in machines.found.items()}))
        resources = nodes.resources()
        if len(machines.found) > 1:
            self._tell(judging.clocks(nodes.clocks()))
        self._tell(judging.cores(machines.found, resources))
        self._tell(judging.gpus(machines.found, resources, wanted=self._asked.use_gpu))
        self._tell(judging.shared_memory(machines.found, resources))
        self._tell(judging.disk(machines.found))

    # -- the recipe and its data ---------------------------------------------------------------------------------------

    def _plan(self) -> Plan | None:
        """The recipe with its data, as a run would open them here; None where one is not fit, which is told."""
        recipe = self._asked.recipe
        if recipe is None:
            return None
        began = time.perf_counter()
        try:
            data = prepared(recipe.data)
            splits = open_splits(data, window=recipe.data.shuffle_window)
        except (UserError, RunFailed) as error:
            self._tell(_refused("data", error))
            return None
        opened_s = time.perf_counter() - began
        try:
            check(recipe, data.manifest)
            refuse_what_cannot_start(recipe, splits, self._workers)
            refuse_unreadable_files(recipe, data.manifest)
            summary = summarise(recipe, data.manifest, num_workers=max(1, self._workers.replicas))
        except (UserError, RunFailed) as error:
            self._tell(_refused("recipe", error))
            return None
        weights = f"{summary.num_parameters:,} weights, {size(summary.parameter_bytes)} with their optimizer's state"
        self._tell(Line("recipe", "ok", f"{recipe.name}: {weights}; {summary.num_steps:,} steps"))
        return Plan(recipe, splits, summary, opened_s)

    def _data(self, plan: Plan) -> None:
        held = sum(table.nbytes for table in plan.splits.tables.values())
        self._tell(judging.object_store(self._nodes.resources(), data_bytes=held))
        rows = f"{plan.splits.manifest.rows('train'):,} training rows"
        if plan.wanted == Wanted():
            how = "" if len(self._nodes.names) < 2 else ", which travel to the other nodes: these need no files"
            self._tell(Line("data", "ok", f"{rows}, {size(held)} in memory{how}"))
            return
        read = self._nodes.ask(read_wanted, plan.wanted)
        self._say_who_fell_silent()
        self._tell(_broken("data", read.failed) if read.failed else judging.data(read.found))
        self._without_data = {name for name, one in read.found.items() if one.problem} | set(read.failed)

    # -- storage -------------------------------------------------------------------------------------------------------

    def _storage(self, plan: Plan | None) -> None:
        where, nodes = self._asked.storage, self._nodes
        try:
            refuse_temporary(Folder(where))
        except UserError as error:
            self._tell(_refused("storage", error))
            return
        needed = plan.kept_bytes if plan else 0
        num_bytes = min(MOST_WRITTEN, max(LEAST_WRITTEN, plan.summary.parameter_bytes if plan else 0))
        key = new_key()
        numbered = {name: f"node-{number}" for number, name in enumerate(nodes.names)}
        own = {name: {"name": file} for name, file in numbered.items()}
        written = nodes.ask(write_probe, where, key, num_bytes=num_bytes, each=own, within_s=STORAGE_S)
        try:
            self._say_who_fell_silent()
            if written.failed:
                self._tell(_broken("storage", written.failed))
            if written.found:
                self._tell(judging.storage(where, written.found, needed_bytes=needed))
            self._shared(where, key, written.found, numbered)
        finally:
            self._clear(where, key, written.found, own)

    def _shared(self, where: str, key: str, written: Mapping[str, Written], numbered: Mapping[str, str]) -> None:
        """Whether all nodes see what each of them has written."""
        wrote = [name for name, found in written.items() if not found.problem]
        if len(wrote) < 2:
            return
        names = {numbered[name]: name for name in wrote}
        seen = self._nodes.ask(unseen, where, key, [*names], each={name: {} for name in wrote}, within_s=STORAGE_S)
        self._say_who_fell_silent()
        if seen.failed:
            self._tell(_broken("shared storage", seen.failed))
        blind = {name: [names[file] for file in files] for name, files in seen.found.items()}
        if blind:
            self._tell(judging.shared_storage(where, blind))

    def _clear(
        self, where: str, key: str, written: Mapping[str, Written], own: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Every node its file, then the folder that they were in, then those that were made for it."""
        self._nodes.ask(clear_probe, where, key, each=own)
        self._nodes.ask(clear_probe, where, key)
        self._nodes.ask(remove_empty, each={name: {"folders": found.made} for name, found in written.items()})

    # -- all nodes together --------------------------------------------------------------------------------------------

    def _placement(self) -> None:
        if not self._workers.most:
            return
        total, free = self._nodes.resources(), self._nodes.free()
        refused = self._nodes.refusal(self._workers)
        asked = self._asked.num_workers is not None
        self._tell(judging_runs.placement(self._workers, total, free, asked=asked, refused=refused))

    def _hosts(self) -> list[str]:
        """The nodes that have room for a worker."""
        return [name for name, of_node in self._nodes.resources().items() if places(self._workers.bundle, [of_node])]

    def _network(self, plan: Plan | None) -> tuple[float, float | None]:
        """Seconds until the nodes have met, and of exchanging the gradients of a step (None where nobody does)."""
        hosts = self._hosts() if self._workers.most else []
        if len(hosts) < 2:
            return 0.0, None
        num_bytes = plan.gradient_bytes if plan else judging_runs.EXCHANGED_BYTES
        found: tuple[float, float | None] = (0.0, None)
        for backend in ("gloo", "nccl") if self._workers.use_gpu else ("gloo",):
            line, linked = measured_network(self._nodes, hosts, backend, num_bytes)
            self._say_who_fell_silent()
            self._tell(line)
            if linked is not None:
                found = linked.joined_s, linked.all_reduce_s
        return found

    def _steps(self, plan: Plan, joined_s: float, exchange_s: float | None) -> None:
        workers = self._workers
        hosts = [name for name in self._hosts() if name not in self._without_data]  # there no step can be taken
        if not hosts:
            return
        asked = self._asked.num_workers is not None
        replicas = max(1, workers.replicas if asked else len(hosts))
        threads = workers.cpus if workers.most else 0
        share = Share(replicas, threads, workers.use_gpu)
        steps = self._nodes.steps(plan.recipe, plan.splits, share, hosts=hosts, within_s=STEPS_S)
        self._say_who_fell_silent()
        if steps.failed:
            self._tell(_broken("steps", steps.failed))
        if not steps.found:
            return
        taken = {name: of_node for name, (_, of_node) in steps.found.items()}
        together = any(
            places(workers.bundle, [of_node]) >= workers.most for of_node in self._nodes.resources().values()
        )
        if asked and together:  # Ray puts them on one node
            exchange_s = None
        self._tell(
            judging_runs.speed(taken, replicas=replicas, exchange_s=exchange_s, gradient_bytes=plan.gradient_bytes)
        )
        fetched = max(fetched for fetched, _ in steps.found.values())
        parts = {
            "this process": self._began_s,
            "data": plan.opened_s + fetched,
            "workers": self._nodes.starts_s,
            "meeting": joined_s,
            "the step": max(found.first_s for found in taken.values()),
        }
        self._tell(judging_runs.first_step(parts))


def measured_network(
    nodes: Nodes, hosts: Sequence[str], backend: str, num_bytes: int
) -> tuple[Line | None, Linked | None]:
    """Have these nodes meet and talk."""
    check = f"network ({backend})"
    first = hosts[0]
    meeting = nodes.ask(meeting_point, each={first: {"address": nodes.address(first)}})
    if not meeting.found:
        return (_broken(check, meeting.failed) if meeting.failed else None), None
    device = "cuda:0" if backend == "nccl" else "cpu"
    shared = {"world_size": len(hosts), "backend": backend, "num_bytes": num_bytes, "device": device}
    each = {name: {"rank": rank, "address": nodes.address(name), **shared} for rank, name in enumerate(hosts)}
    answers = nodes.ask(measure_links, meeting.found[first], each=each, within_s=LINKS_S)
    if len(answers.found) < len(hosts):
        fix = "open all ports between the nodes, and see that each node's address is one that the others reach"
        failed = {name: (problem, fix) for name, (problem, _) in answers.failed.items()}
        return (_broken(check, failed) if failed else None), None
    linked = gathered([answers.found[name] for name in hosts])
    return judging_runs.network(backend, linked, hosts), linked


def _broken(check_name: str, failed: Mapping[str, Problem]) -> Line:
    """What could not be measured."""
    told = [f"{name}: {problem}" for name, (problem, _) in failed.items()]
    fixes = dict.fromkeys(fix for _, fix in failed.values() if fix)
    return Line(check_name, "failed", some(told, "; "), "; ".join(fixes) or None)


def _refused(check_name: str, error: UserError | RunFailed) -> Line:
    """What a run would be refused for."""
    if isinstance(error, UserError):
        more = len(error.problems) - 1
        return Line(
            check_name, "failed", f"{error.path}: {error.message}{f' (and {more} more)' * (more > 0)}", error.fix
        )
    return Line(check_name, "failed", str(error))
