"""Searchers: the same trials from the same seed, all points of a grid, learning from trials, also a dead process's."""

import json
import logging
import math
import sys

import pytest

from cluster.recipe.sweep import SweepSpec
from cluster.tuning.searchers import GridSearcher, OptunaSearcher, RandomSearcher, make_searcher
from cluster.tuning.space import Space
from nn_models.errors import UserError
from nn_models.spec import validate

pytestmark = pytest.mark.filterwarnings("error")

EVERYTHING = {
    "optimizer": {
        "choice": [
            {"kind": "sgd", "lr": {"loguniform": [1e-2, 1]}, "momentum": {"uniform": [0, 0.99]}},
            {"kind": "adam", "lr": {"loguniform": [1e-4, 1e-2]}},
        ]
    },
    "model.hidden": {"choice": [[64], [{"randint": [8, 99]}, 16]]},
    "model.dropout": {"quniform": [0, 0.9, 0.1]},
    "train.clip_norm": {"normal": [1, 0.1]},
}
QUADRATIC = {"x": {"uniform": [-5, 5]}, "y": {"uniform": [-5, 5]}}


def searcher(paths, mode="min", **sweep):
    spec = validate(SweepSpec, {"space": paths, **sweep})
    return make_searcher(spec, Space(spec), mode)


def quadratic(overrides) -> float:
    return (overrides["x"] - 2) ** 2 + (overrides["y"] + 1) ** 2


def test_make_searcher():
    assert isinstance(searcher(QUADRATIC), RandomSearcher)
    assert isinstance(searcher({"x": {"grid": [1]}}, searcher="grid"), GridSearcher)
    assert isinstance(searcher(QUADRATIC, searcher="optuna"), OptunaSearcher)


# -- random and grid -------------------------------------------------------------------------------------------------


def test_random_depends_on_seed_and_index_only():
    first, second = searcher(EVERYTHING, seed=3), searcher(EVERYTHING, seed=3)
    expected = [first.ask(index) for index in range(20)]
    first.tell(0, expected[0], 1.0)
    assert [second.ask(index) for index in reversed(range(20))] == expected[::-1]
    assert first.ask(7) == expected[7]
    assert len({json.dumps(drawn) for drawn in expected}) == 20
    assert searcher(EVERYTHING, seed=4).ask(0) != expected[0]


def test_grid_takes_each_point_once():
    grid = searcher({"a": {"grid": [1, 2]}, "b": {"choice": [3, 4]}}, searcher="grid")
    asked = [grid.ask(index) for index in range(6)]
    assert asked == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}, None, None]
    grid.tell(0, {"a": 1, "b": 3}, None)
    few = searcher({"a": {"grid": [1, 2]}, "b": {"choice": [3, 4]}}, searcher="grid", num_trials=3)
    assert [few.ask(index) for index in range(4)] == [*asked[:3], None]


# -- Optuna ----------------------------------------------------------------------------------------------------------


def run(search, indices, measure):
    """Ask and tell, one trial after another; the values."""
    values = []
    for index in indices:
        overrides = search.ask(index)
        values.append(measure(overrides))
        search.tell(index, overrides, values[-1])
    return values


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_optuna_learns(mode, sign):
    late, best = [], []
    for seed in range(3):
        search = searcher(QUADRATIC, mode, searcher="optuna", num_trials=30, seed=seed)
        values = [sign * value for value in run(search, range(40), lambda o: sign * quadratic(o))]
        late += values[30:]
        best.append(min(values))
    # At random: a mean of 21.7, that of 30 trials with a standard deviation of 3, and 0.75 as the best of 40.
    assert sum(late) / 30 < 13
    assert sum(best) / 3 < 0.5


def test_optuna_learns_which_branch_is_better():
    def measure(overrides):
        section = overrides["optimizer"]
        kinds.append(section["kind"])
        return abs(math.log10(section["lr"]) + 1) if section["kind"] == "sgd" else 5.0

    kinds = []
    run(searcher({"optimizer": EVERYTHING["optimizer"]}, searcher="optuna", num_trials=30), range(60), measure)
    assert kinds[20:].count("sgd") > 28  # at random 20 of 40, with a standard deviation of 3


def test_optuna_draws_from_the_space():
    spec = validate(SweepSpec, {"space": EVERYTHING, "searcher": "optuna", "num_trials": 9})
    space = Space(spec)
    search = make_searcher(spec, space, "min")
    kinds = set()
    for index in range(25):
        overrides = search.ask(index)
        assert space.locate(overrides) is not None
        kinds.add(overrides["optimizer"]["kind"])
        search.tell(index, overrides, None if index % 4 == 3 else float(index % 7))
    assert kinds == {"sgd", "adam"}


def test_a_resumed_search_goes_on_as_it_would_have():
    """Told, through JSON, of the trials of a process that was killed."""
    sweep = {"searcher": "optuna", "num_trials": 9, "seed": 5}

    def measure(overrides):
        return overrides["model.dropout"] + abs(overrides["train.clip_norm"] - 1)

    whole, asked = searcher(EVERYTHING, **sweep), []
    for index in range(16):
        asked.append(whole.ask(index))
        whole.tell(index, asked[-1], measure(asked[-1]))
    resumed = searcher(EVERYTHING, **sweep)
    for index, overrides in enumerate(asked[:9]):
        resumed.tell(index, json.loads(json.dumps(overrides)), measure(overrides))
    for index in range(9, 16):
        again = resumed.ask(index)
        # a normal value is stored as its quantile, to within rounding
        assert again == {**asked[index], "train.clip_norm": pytest.approx(asked[index]["train.clip_norm"], rel=1e-6)}
        resumed.tell(index, asked[index], measure(asked[index]))
    assert len({json.dumps(overrides) for overrides in asked}) == 16  # it never begins anew


def test_replayed_trials_are_learnt_from():
    search = searcher(QUADRATIC, searcher="optuna", num_trials=3)
    for index in range(40):
        x, y = -5 + 10 * (index * 0.37 % 1), -5 + 10 * (index * 0.71 % 1)
        search.tell(index, {"x": x, "y": y}, quadratic({"x": x, "y": y}))
    drawn = [search.ask(index) for index in range(40, 60)]
    assert sum(quadratic(overrides) for overrides in drawn) / 20 < 15  # 22 at random


def test_optuna_asked_and_told_more_than_once():
    search = searcher(QUADRATIC, searcher="optuna", num_trials=3)
    first = search.ask(0)
    assert search.ask(0) is first
    search.tell(0, first, 1.0)
    search.tell(0, first, 2.0)
    assert [trial.value for trial in search._study.get_trials()] == [1.0]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_optuna_is_told_of_failures(value):
    search = searcher(QUADRATIC, searcher="optuna", num_trials=3)
    for index in range(6):
        search.tell(index, search.ask(index), value)
    search.tell(9, {"x": 0.0, "y": 0.0}, value)
    assert {trial.state.name for trial in search._study.get_trials()} == {"FAIL"}
    assert search.ask(10) is not None


def test_a_trial_that_went_on_with_other_values_is_learnt_with_those():
    search = searcher(QUADRATIC, searcher="optuna", num_trials=3)
    search.ask(0)
    search.tell(0, {"x": 1.0, "y": 2.0}, 3.0)
    complete = [trial for trial in search._study.get_trials() if trial.state.name == "COMPLETE"]
    assert [(trial.params, trial.value) for trial in complete] == [({"x": 1.0, "y": 2.0}, 3.0)]


def test_trials_from_before_the_space_was_changed_are_left_out():
    search = searcher(QUADRATIC, searcher="optuna", num_trials=3)
    search.tell(0, {"x": 9.0, "y": 0.0}, 1.0)
    search.tell(1, {"x": 1.0}, 1.0)
    assert not search._study.get_trials()
    assert search.ask(2) is not None


def test_optuna_at_once():
    """Trials that run at the same time differ."""
    search = searcher(QUADRATIC, searcher="optuna", num_trials=12)
    drawn = [search.ask(index) for index in range(12)]
    assert len({json.dumps(overrides) for overrides in drawn}) == 12
    for index in reversed(range(12)):
        search.tell(index, drawn[index], quadratic(drawn[index]))
    assert search.ask(12) not in drawn


def test_parameters_are_named_by_their_place():
    search = searcher(EVERYTHING, searcher="optuna", num_trials=3)
    for index in range(10):
        search.tell(index, search.ask(index), 0.0)
    names = {name for trial in search._study.get_trials() for name in trial.params}
    assert names == {
        "optimizer",
        "optimizer.choice.0.lr",
        "optimizer.choice.0.momentum",
        "optimizer.choice.1.lr",
        "model.hidden",
        "model.hidden.choice.1.0",
        "model.dropout",
        "train.clip_norm",
    }


def test_optuna_is_quiet(capfd):
    search = searcher(QUADRATIC, searcher="optuna", num_trials=3)
    run(search, range(5), quadratic)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("optuna").level == logging.WARNING


def test_optuna_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        UserError, match=r"sweep.searcher: optuna cannot be imported \(.*\); pip install optuna, or cho"
    ):
        searcher(QUADRATIC, searcher="optuna")
