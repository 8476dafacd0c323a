"""Tracker: what is told of a run to a place where people compare runs, and what they are told."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

Parameter = str | int | float | bool
Status = Literal["finished", "failed", "stopped"]


@dataclass(frozen=True)
class Begun:
    """A run whose first line of metrics is there. `known` is what the tracker called it before it was continued."""

    name: str
    parameters: Mapping[str, Parameter]  # of the recipe, by dotted path
    where: str  # its directory
    known: str | None = None


@dataclass(frozen=True)
class Ended:
    """How it ended: the figures of the weights that it keeps, as `test/accuracy`, and its files, by names in the run.

    Of these there are report.html, recipe.yaml, environment.json, result.json and what is in model/, where they are.
    """

    status: Status
    metrics: Mapping[str, float]
    files: Mapping[str, Path]


class Tracker(ABC):
    """One of them, for one run, used by one thread. Whatever it raises ends the tracking, and nothing else."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # packages that an extra of the same name brings

    @abstractmethod
    def begin(self, begun: Begun) -> str:
        """Take up a run. Returns what it is called there, for when it is continued."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the figures of one line of metrics, as TensorBoard's tags name them: `train_interval/loss`."""

    @abstractmethod
    def end(self, ended: Ended) -> None:
        """Take in the end, once."""

    @property
    @abstractmethod
    def where(self) -> str:
        """Where people find the run, in a line."""
