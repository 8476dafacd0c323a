"""UserError: its fields, alone and several together, through pickle, JSON and a move within the recipe."""

import copy
import json
import pickle

import pytest

from nn_models.errors import Problem, UserError, closest, did_you_mean, is_within

ONE = Problem("model.channels", "[8, 8] makes 2 poolings", "shorten it to 1")
UNKNOWN = Problem("trian", "unknown field", "did you mean train?", "unknown field")
IMAGE = Problem("a.png", "4x5 pixels", "set data.image_size to resize them all", names=("data.image_size",))


def test_one_problem():
    error = UserError("model.channels", "[8, 8] makes 2 poolings", "shorten it to 1")
    assert str(error) == "model.channels: [8, 8] makes 2 poolings; shorten it to 1"
    assert (error.path, error.message, error.fix) == ONE[:3]
    assert error.problems == (ONE,)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (("--run", "is taken"), "--run: is taken"),
        (("--run", "is taken", "choose another"), "--run: is taken; choose another"),
        (
            ("", "the current directory is gone", "cd to one that exists"),
            "the current directory is gone; cd to one that",
        ),
        (("a", "b: c; d", "e"), "a: b: c; d; e"),
    ],
)
def test_text(fields, text):
    assert str(UserError(*fields)).startswith(text)
    assert str(UserError(*fields)) == str(Problem(*fields)) == f"{Problem(*fields)}"


def test_several_problems_are_a_line_each_and_told_once():
    error = UserError.of([UNKNOWN, ONE, UNKNOWN])
    assert error.problems == (UNKNOWN, ONE)
    assert str(error) == f"{UNKNOWN}\n{ONE}"
    assert (error.path, error.message, error.fix) == ("trian", "unknown field", "did you mean train?")


@pytest.mark.parametrize("problems", [[ONE], [UNKNOWN], [IMAGE], [ONE, UNKNOWN, IMAGE], [Problem("", "gone")]])
def test_fields_survive_processes(problems):
    error = UserError.of(problems)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        assert (again.problems, str(again)) == (error.problems, str(error))
    assert copy.copy(error).problems == error.problems
    assert UserError.from_plain(json.loads(json.dumps(error.plain()))).problems == error.problems


def test_moved_to_another_place_of_the_recipe():
    places = {"data.image_size": "data.edges_of.image_size", "data.path": "data.edges_of.path"}
    error = UserError.of([IMAGE, Problem("data.path", "data.path is no folder"), Problem("data.path.0", "x")])
    assert str(error.moved(places)) == (
        "a.png: 4x5 pixels; set data.edges_of.image_size to resize them all\n"
        "data.edges_of.path: data.path is no folder\n"
        "data.edges_of.path.0: x"
    )
    # what only looks like such a path stays: other fields, files, and what a fix does not declare to name
    others = UserError.of([Problem("data.paths", "x"), Problem("/data.path", "x", "delete /data.path")])
    assert others.moved(places).problems == others.problems


def test_moving_keeps_the_kind():
    moved = UserError("data.rot", "unknown field", kind="unknown field").moved({"data": "data.edges_of"})
    assert moved.problems == (Problem("data.edges_of.rot", "unknown field", kind="unknown field"),)


def test_within():
    assert is_within("optimizer", "optimizer")
    assert is_within("optimizer.lr", "optimizer")
    assert not is_within("optimizers.lr", "optimizer")
    assert not is_within("optimizer", "optimizer.lr")


def test_hints():
    assert closest("lerning", ["learning", "rate"]) == "learning"
    assert did_you_mean("lerning", ["rate", "learning"]) == "did you mean learning?"
    assert closest("zzz", ["learning", "rate"]) is None
    assert did_you_mean("zzz", ["rate", "learning"]) == "known: learning, rate"
