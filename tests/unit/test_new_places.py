"""Runs and sweeps that are given no directory: each takes the next free name at once, before anyone else can."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest

import cluster
from cluster.recipe.loading import load_recipe
from cluster.training import run_directory
from cluster.training.run_directory import new_place
from nn_models.errors import UserError
from tests.unit import made

NAME = "tiny-20260102-030405"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty current directory, in which time stands still."""
    monkeypatch.setattr(run_directory, "datetime", SimpleNamespace(now=lambda: datetime(2026, 1, 2, 3, 4, 5)))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(
        {
            "name": "tiny",
            "model": {"kind": "mlp", "hidden": [4]},
            "data": made.features(tmp_path / "rows", 60).model_dump(),
            "train": {"epochs": 1, "global_batch_size": 20},
        }
    )


def test_no_two_get_the_same(recipe, here):
    together = Barrier(8)

    def take(_: int) -> str:
        together.wait()
        with new_place("runs", recipe) as place:
            Path(place, "recipe.yaml").write_text("")
            return place

    with ThreadPoolExecutor(8) as pool:
        places = set(pool.map(take, range(8)))
    assert places == {f"runs/{NAME}", *(f"runs/{NAME}-{number}" for number in range(1, 8))}


def test_a_name_is_taken_before_the_run_has_begun(recipe, here):
    with new_place("runs", recipe):  # by one that still prepares its data
        outcome = cluster.train(recipe)
    assert outcome.run == str(here / f"runs/{NAME}-1")
    assert not (here / "runs" / NAME).exists()
    assert cluster.train(recipe).run == str(here / "runs" / NAME)
    assert cluster.train(recipe).run == str(here / f"runs/{NAME}-2")


def test_what_is_refused_leaves_nothing_behind(recipe, here):
    with pytest.raises(UserError, match="global_batch_size"):
        cluster.train(recipe, overrides={"train.global_batch_size": 1, "model.batch_norm": True})
    with pytest.raises(UserError, match=r"sweep\.space"):
        cluster.sweep(recipe, overrides={"sweep": {"space": {"optimizer.lrr": {"uniform": [0, 1]}}}})
    assert list(here.iterdir()) == []


def test_a_place_that_cannot_be_made_is_named(recipe, here):
    (here / "runs").write_text("")
    with pytest.raises(UserError) as caught:
        cluster.train(recipe)
    assert str(caught.value) == "runs: not a directory; choose another one with --run"


def test_many_at_once_and_none_of_them_stays(recipe, here):
    with ExitStack() as stack:
        places = [stack.enter_context(new_place("sweeps", recipe)) for _ in range(3)]
        assert [Path(place).is_dir() for place in places] == [True] * 3
    assert list(here.iterdir()) == []
