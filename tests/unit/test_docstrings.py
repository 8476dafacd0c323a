"""Docstrings of Python's library: a function gives something back, or nothing; those of one file are in one split."""

import ast
import inspect
import textwrap

import numpy as np
import pytest

from cluster.data.prepare import prepared
from cluster.data.sources import docstrings
from cluster.data.sources.docstrings import GIVES, DocstringsSpec
from cluster.recipe.loading import load_recipe
from nn_models.errors import UserError


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of forty files of two functions each, in the place of Python's."""
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "lib"
    for number in range(40):
        path = root / f"package{number % 4}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'def take():\n    """Take number {number} and return it."""\n    return {number}\n'
            f'def leave():\n    """Leave number {number} where it is."""\n    return None\n'
            'def short():\n    """Too short."""\n'
        )
    (root / "broken.py").write_text("def (:\n")
    (root / "test").mkdir()
    (root / "test" / "a.py").write_text('def f():\n    """A test is none of it."""\n')
    monkeypatch.setattr(docstrings, "_root", lambda: root)
    docstrings._functions.cache_clear()
    yield root
    docstrings._functions.cache_clear()


def test_functions_of_a_file_stay_together(library):
    data = prepared(DocstringsSpec(validation_fraction=0.2, test_fraction=0.1))
    assert [data.manifest.rows(split) for split in ("train", "validation", "test")] == [56, 16, 8]
    assert data.manifest.class_names == GIVES
    names, seen = data.manifest.signature["input"].names, {}
    for split in ("train", "validation", "test"):
        table = data.table(split)
        rows = [[names[number] for number in row] for row in table["input.values"].to_pylist()]
        assert [row[0] for row in rows] == [("Leave", "Take")[label] for label in table["target"].to_pylist()]
        seen[split] = [row[2] for row in rows]
    assert all(seen["train"].count(number) == 2 for number in seen["train"])
    assert set(seen["validation"]) == {"<unknown>"}


def test_a_library_without_sources_is_named(library):
    for file in library.rglob("*.py"):
        file.unlink()
    with pytest.raises(UserError, match=r"data.kind: no source files in .*lib; take a Python that has them"):
        prepared(DocstringsSpec())


def gives_returned():
    return 1


def gives_yielded():
    yield


def gives_nothing():
    return


def gives_none():
    def inner():
        return 1

    print(lambda: inner())
    return None


async def gives_in_a_branch():
    if np:
        return [each + 1 for each in ()]


@pytest.mark.parametrize(
    ("function", "gives"),
    [
        (gives_returned, True),
        (gives_yielded, True),
        (gives_in_a_branch, True),
        (gives_nothing, False),
        (gives_none, False),
    ],
)
def test_what_a_function_gives_is_its_own(function, gives):
    (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert docstrings._gives_something(parsed) is gives


@pytest.mark.slow
def test_the_recipe_beats_the_majority_by_far(tmp_path):
    import cluster

    outcome = cluster.train(load_recipe("docstrings-gru"), run=str(tmp_path / "run"))
    assert outcome.metrics["test/accuracy"] > 0.75  # 65 % of the rows are of one class
