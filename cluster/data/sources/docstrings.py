"""docstrings: what Python's own library says of its functions, and whether each gives something back."""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.data.layouts import Array
from cluster.data.sources.base import Part
from cluster.data.sources.labelled_text import LabelledTextSpec, Texts
from nn_models.errors import UserError

NOT_OF_IT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
GIVES = ("nothing", "something")
LEAST_WORDS = 4  # of a docstring: fewer only say the function's name again
Function = ast.FunctionDef | ast.AsyncFunctionDef


class DocstringsSpec(LabelledTextSpec):
    """The docstrings of Python's library, to tell functions that return or yield something from those that do not.

    They are read from its source files, so there are a few more or less in another version of Python. The functions of
    one file are in one split.
    """

    kind: Literal["docstrings"] = "docstrings"

    def fingerprint(self) -> str:
        """See DataSpec."""
        return hashlib.sha256(f"{sys.version} {_root()}".encode()).hexdigest()

    def texts(self) -> Texts:
        """See LabelledTextSpec."""
        rows = _functions()
        if not rows:
            raise UserError(
                "data.kind", f"no source files in {_root()}", "take a Python that has them, or another data set"
            )
        return _Docstrings({"train": [Part(len(rows), None, "docstrings")]})


@dataclass(frozen=True)
class _Docstrings:
    """See Texts; the one part are all functions."""

    pools: Mapping[str, list[Part]]
    each_token = False
    names = ("the docstring", "what the function gives")

    def texts(self, part: Part) -> list[Any]:
        """See Texts."""
        return [text for text, _, _ in _functions()]

    def labels(self, part: Part) -> list[Any]:
        """See Texts."""
        return [label for _, label, _ in _functions()]

    def groups(self, part: Part) -> Array | None:
        """See Texts: the files."""
        return np.array([file for _, _, file in _functions()], np.object_)


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@cache
def _functions() -> tuple[tuple[str, str, str], ...]:
    """(docstring, GIVES, file) of each function of the library, each docstring once."""
    found: dict[str, tuple[str, str, str]] = {}
    root = _root()
    for file in sorted(root.rglob("*.py")):
        inside = file.relative_to(root)
        if NOT_OF_IT & set(inside.parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):  # such as a file of another version's grammar
            continue
        for function in ast.walk(tree):
            if not isinstance(function, Function) or not (text := ast.get_docstring(function)):
                continue
            if len(text.split()) >= LEAST_WORDS:
                found.setdefault(text, (text, GIVES[_gives_something(function)], inside.as_posix()))
    return tuple(found.values())


def _gives_something(function: Function) -> bool:
    """Whether it yields, or returns anything but None."""
    return any(
        isinstance(node, ast.Yield | ast.YieldFrom) or (isinstance(node, ast.Return) and not _is_none(node.value))
        for node in _own(function)
    )


def _is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """What belongs to a function, and not to those inside of it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            yield child
            yield from _own(child)
