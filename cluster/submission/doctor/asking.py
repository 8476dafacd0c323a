"""Asking: what an examination asks of nodes, wherever they are; and the one node that this process is."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from cluster.group import LOOPBACK
from cluster.recipe.recipe import Recipe
from cluster.runtime import Workers
from cluster.submission.doctor.judging import Offset
from cluster.submission.doctor.machine import Machine, machine
from cluster.submission.doctor.steps import Steps, measure_steps
from cluster.training.splits import Splits

T = TypeVar("T")
Problem = tuple[str, str | None]  # what is wrong, and what to do


@dataclass(frozen=True)
class Answers(Generic[T]):
    """What nodes answered, by their names, and what was wrong with those that could not."""

    found: dict[str, T] = field(default_factory=dict)
    failed: dict[str, Problem] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """What a worker computes with: its part of a global batch, its threads (0: those that torch chooses)."""

    replicas: int
    threads: int
    use_gpu: bool


class Nodes(Protocol):
    """Nodes that can be asked to do something."""

    silent: dict[str, Problem]  # those that do not answer
    starts_s: float  # until workers there have started

    @property
    def names(self) -> list[str]:
        """Of the nodes that answer."""

    def resources(self) -> dict[str, Mapping[str, float]]:
        """What Ray hands out of them, by their names."""

    def free(self) -> dict[str, Mapping[str, float]]:
        """What of it nobody holds at the moment."""

    def address(self, name: str) -> str:
        """Where the others reach a node."""

    def refusal(self, workers: Workers) -> Problem | None:
        """Why these workers can never be placed; None where they can."""

    def ask(
        self,
        function: Callable[..., T],
        *arguments: Any,
        each: Mapping[str, Mapping[str, Any]] | None = None,
        within_s: float = ...,
        **options: Any,
    ) -> Answers[T]:
        """Have all nodes call it at once; with `each`, only those named there, with options of their own."""

    def machines(self) -> Answers[Machine]:
        """What each node has."""

    def clocks(self) -> dict[str, Offset]:
        """How far each node's clock is from the one here."""

    def steps(
        self, recipe: Recipe, splits: Splits, share: Share, *, hosts: Sequence[str], within_s: float
    ) -> Answers[tuple[float, Steps]]:
        """Seconds until these nodes have the rows, and what steps take there."""


class Here:
    """This process, without Ray."""

    starts_s = 0.0

    def __init__(self) -> None:
        self.silent: dict[str, Problem] = {}
        self._machine = machine()
        self.name = platform.node() or "this machine"

    @property
    def names(self) -> list[str]:
        """See Nodes."""
        return [self.name]

    def resources(self) -> dict[str, Mapping[str, float]]:
        """See Nodes."""
        return {self.name: {"CPU": self._machine.cores, "GPU": len(self._machine.gpus)}}

    def free(self) -> dict[str, Mapping[str, float]]:
        """See Nodes."""
        return self.resources()

    def address(self, name: str) -> str:
        """See Nodes."""
        return LOOPBACK

    def refusal(self, workers: Workers) -> Problem | None:
        """See Nodes. A run without workers is placed here."""
        return None

    def ask(
        self,
        function: Callable[..., T],
        *arguments: Any,
        each: Mapping[str, Mapping[str, Any]] | None = None,
        within_s: float = 0.0,
        **options: Any,
    ) -> Answers[T]:
        """See Nodes. Nobody watches the time."""
        own = each[self.name] if each else {}
        return self._answer(lambda: function(*arguments, **options, **own))

    def _answer(self, call: Callable[[], T]) -> Answers[T]:
        try:
            return Answers({self.name: call()})
        except Exception as error:  # whatever a measure meets with is what it has found
            return Answers(failed={self.name: problem_of(error)})

    def machines(self) -> Answers[Machine]:
        """See Nodes."""
        return Answers({self.name: self._machine})

    def clocks(self) -> dict[str, Offset]:
        """See Nodes."""
        return {self.name: Offset(0.0, 0.0)}

    def steps(
        self, recipe: Recipe, splits: Splits, share: Share, *, hosts: Sequence[str], within_s: float
    ) -> Answers[tuple[float, Steps]]:
        """See Nodes."""
        return self._answer(lambda: (0.0, measure_steps(recipe, splits, **vars(share))))


def problem_of(error: BaseException) -> Problem:
    """An error as it is told in a line."""
    path, message = getattr(error, "path", None), getattr(error, "message", None)
    if path and message:
        return f"{path}: {message}", getattr(error, "fix", None)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' * bool(lines)}{''.join(lines[:1])}", None
