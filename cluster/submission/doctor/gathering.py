"""Gathering: the measures of all nodes, by one actor on each, which reserves nothing; what hangs is waited for no more.

A node that does not answer within a bounded time, or whose process dies, is `silent` from then on: it is asked nothing
again, and keeps nobody waiting twice.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.recipe.recipe import Recipe
from cluster.runtime import RaySession, Workers, refuse_unplaceable
from cluster.runtime.lifeline import POLL_S
from cluster.submission.doctor.asking import Answers, Problem, Share, problem_of
from cluster.submission.doctor.judging import Offset
from cluster.submission.doctor.machine import Machine, machine
from cluster.submission.doctor.steps import Steps, measure_steps
from cluster.training.splits import Splits
from nn_models.errors import UserError

START_S = 120.0  # for a process to start and to import torch, from a network disk too
ANSWER_S = 60.0
PINGS = 5
STARTS = 2  # of processes, one after the other: Ray Train's controller, or what places a GAN's halves; and the workers

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """One of the cluster's, as Ray has it."""

    id: str
    name: str
    address: str
    resources: Mapping[str, float]


class Examiner:
    """What is done on a node; whatever it is, its function is that of the node's own manta."""

    def __init__(self, path: Sequence[str]) -> None:
        import torch  # noqa: F401  # as every worker does

        sys.path.extend(part for part in path if part not in sys.path)

    def now(self) -> float:
        """The time there."""
        return time.time()

    def call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """What the function returns there."""
        return function(*arguments, **options)


def living_nodes() -> list[Node]:
    """The cluster's; that of this process comes first. Names are told apart where several have the same."""
    here = ray.get_runtime_context().get_node_id()
    named = [(node.get("NodeName") or node["NodeManagerAddress"], node) for node in ray.nodes() if node["Alive"]]
    named.sort(key=lambda pair: (pair[1]["NodeID"] != here, pair[0], pair[1]["NodeID"]))
    names = [name for name, _ in named]
    found = []
    for name, node in named:
        told = name if names.count(name) == 1 else f"{name} ({node['NodeID'][:6]})"
        found.append(Node(node["NodeID"], told, node["NodeManagerAddress"], node["Resources"]))
    return found


class Surgery:
    """An examiner on each node; see Nodes."""

    def __init__(self, session: RaySession, nodes: Sequence[Node]) -> None:
        self._session = session
        self.nodes = {node.name: node for node in nodes}
        self.silent: dict[str, Problem] = {}
        path = [*sys.path]
        self._actors = {
            node.name: ray.remote(num_cpus=0, max_restarts=0)(Examiner)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
            .remote(path)
            for node in nodes
        }
        began = time.monotonic()
        self._answers({name: actor.now.remote() for name, actor in self._actors.items()}, within_s=START_S)
        self.starts_s = STARTS * (time.monotonic() - began)

    @property
    def names(self) -> list[str]:
        """Of the nodes that answer."""
        return [name for name in self.nodes if name not in self.silent]

    def ask(
        self,
        function: Callable[..., T],
        *arguments: Any,
        each: Mapping[str, Mapping[str, Any]] | None = None,
        within_s: float = ANSWER_S,
        **options: Any,
    ) -> Answers[T]:
        """Have all nodes do it at once; with `each`, only those named there, with options of their own."""
        chosen = {name: {**options, **(each[name] if each else {})} for name in (self.names if each is None else each)}
        calls = {
            name: self._actors[name].call.remote(function, *arguments, **own)
            for name, own in chosen.items()
            if name not in self.silent
        }
        return self._answers(calls, within_s=within_s)

    def _answers(self, calls: Mapping[str, Any], *, within_s: float) -> Answers[Any]:
        until = time.monotonic() + within_s
        waiting = list(calls.values())
        while waiting and time.monotonic() < until:
            self._session.refuse_lost()
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S, fetch_local=False)
        answers: Answers[Any] = Answers()
        for name, call in calls.items():
            if call in waiting:
                self._fall_silent(name, (f"did not answer within {within_s:.0f} s", None))
                continue
            try:
                answers.found[name] = ray.get(call, timeout=ANSWER_S)
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, BaseException) else error
                answers.failed[name] = problem_of(cause)
            except RayActorError as error:
                self._fall_silent(name, _death(error))
            except RayError as error:
                self._fall_silent(name, problem_of(error))
        return answers

    def _fall_silent(self, name: str, problem: Problem) -> None:
        self.silent[name] = problem
        with suppress(RayError):
            ray.kill(self._actors[name])

    def resources(self) -> dict[str, Mapping[str, float]]:
        """See Nodes."""
        return {name: self.nodes[name].resources for name in self.names}

    def free(self) -> dict[str, Mapping[str, float]]:
        """See Nodes."""
        from ray._private.state import available_resources_per_node  # of each node there is no public way to know it

        free = available_resources_per_node()
        return {name: free.get(self.nodes[name].id, {}) for name in self.names}

    def address(self, name: str) -> str:
        """See Nodes."""
        return self.nodes[name].address

    def refusal(self, workers: Workers) -> Problem | None:
        """See Nodes."""
        try:
            refuse_unplaceable(ray, workers)
        except UserError as error:
            return error.message, error.fix
        return None

    def machines(self) -> Answers[Machine]:
        """See Nodes."""
        return self.ask(_machine)

    def clocks(self) -> dict[str, Offset]:
        """See Nodes. Of several answers the quickest says it best."""
        found = {}
        for name in self.names:
            offsets = []
            for _ in range(PINGS):
                asked = time.time()
                answer = self._answers({name: self._actors[name].now.remote()}, within_s=ANSWER_S).found.get(name)
                got = time.time()
                if answer is None:
                    break
                offsets.append(Offset(answer - (asked + got) / 2, (got - asked) / 2))
            else:
                found[name] = min(offsets, key=lambda offset: offset.uncertain_s)
        return found

    def steps(
        self, recipe: Recipe, splits: Splits, share: Share, *, hosts: Sequence[str], within_s: float
    ) -> Answers[tuple[float, Steps]]:
        """See Nodes. The rows travel as those of a run do."""
        tables = self._session.references(splits.tables)
        plain, bare = recipe.model_dump(mode="json"), replace(splits, tables={})
        each: dict[str, dict[str, Any]] = {name: {} for name in hosts}
        return self.ask(_steps, plain, bare, tables, share, each=each, within_s=within_s)

    def close(self) -> None:
        """Leave no process behind."""
        for actor in self._actors.values():
            with suppress(RayError):
                ray.kill(actor)


@contextmanager
def examining(session: RaySession) -> Iterator[Surgery]:
    """An examiner on each living node, while the block runs."""
    surgery = Surgery(session, living_nodes())
    try:
        yield surgery
    finally:
        surgery.close()


# -- what is done on a node and needs Ray there ------------------------------------------------------------------------


def _machine() -> Machine:
    from ray._private.worker import _global_node  # no public way leads to the node's own folder

    return machine(_global_node.get_session_dir_path())


def _steps(recipe: Mapping[str, Any], splits: Splits, tables: Mapping[str, Any], share: Share) -> tuple[float, Steps]:
    began = time.perf_counter()
    held = dict(zip(tables, ray.get(list(tables.values())), strict=True))
    fetched = time.perf_counter() - began
    return fetched, measure_steps(Recipe.model_validate(recipe), replace(splits, tables=held), **vars(share))


def _death(error: RayActorError) -> Problem:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    missing = next((line for line in reversed(lines) if "No module named" in line), None)
    if missing:
        fix = "install manta there as it is here, or bring it along with `manta submit doctor --with-manta`"
        return f"cannot import what a worker imports ({missing.rpartition('Error: ')[2]})", fix
    telling = [line for line in lines if "Error" in line and "ActorDiedError" not in line]
    return f"its process has died ({(telling or lines or ['nobody knows why'])[-1]})", None
