"""Format: how a graph becomes the content of a file, and how such a file computes."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cluster.inference.export.graph import ELSE, Graph
from cluster.training.checkpoints import one_line
from nn_models.errors import UserError

Rows = Sequence[Tensor]  # of each input, in their order
Computes = Callable[[Rows], list[Tensor]]  # rows -> the outputs, in their order


@dataclass(frozen=True)
class Format:
    """One of them. `written` gives a file's content, `opened` what computes as the file says.

    `metadata` are texts that stand in the file beside the graph. Both raise UserError where the graph cannot be had so.
    `opened` is only ever given what `written` has just made: a file of others might hold code.
    """

    name: str
    endings: tuple[str, ...]
    what: str  # the file, for people
    needs: tuple[str, ...]  # packages that an extra of the same name brings
    written: Callable[[Graph, Rows, Mapping[str, str]], bytes]
    opened: Callable[[bytes, Graph], Computes]

    def refuse_missing(self) -> None:
        """Raise UserError where a package that it needs is not installed."""
        missing = [package for package in self.needs if find_spec(package) is None]
        if missing:
            raise UserError(
                "--format",
                f"{self.name} needs {', '.join(missing)}, not installed here",
                f"pip install 'manta-train[{self.name}]'",
            )


def exported(graph: Graph, rows: Rows) -> ExportedProgram:
    """The graph as torch.export follows it, for any number of rows. Raises UserError where it cannot.

    It goes through the code with these rows and notes each operation, so no number of a row may decide which follows.
    """
    shapes = {port.name: {0: Dim("rows", min=1)} for port in graph.inputs}
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(graph, tuple(rows), dynamic_shapes=shapes, strict=False)
    except GuardOnDataDependentSymNode as error:
        why = (
            "a number that the model computes decides what it computes next, where a graph does the same with all rows"
        )
        raise UserError("--format", why, ELSE) from error
    except Exception as error:  # of many kinds: what a user's own module does is not known
        raise cannot_follow("torch.export", error) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters tell their developers: warnings, and the graph as far as it came."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def cannot_follow(what: str, error: Exception) -> UserError:
    """The error for a graph that an exporter refuses."""
    reason = f"{type(error).__name__}: {one_line(error)}"
    return UserError("--format", f"{what} cannot follow what the model computes ({reason})", ELSE)
