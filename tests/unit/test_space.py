"""A sweep's space: how it is written, what is drawn, what is refused and in which words; its target and budget."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data.manifest import Manifest
from cluster.recipe.distributions import parse
from cluster.recipe.loading import dump_recipe, load_recipe, parse_yaml
from cluster.recipe.recipe import Recipe
from cluster.recipe.sweep import SweepSpec
from cluster.tuning.budget import budget, promoted_epochs, rungs
from cluster.tuning.space import Space, columns
from cluster.tuning.target import Target, reported, target
from nn_models.errors import UserError
from nn_models.spec import validate

pytestmark = pytest.mark.filterwarnings("error")

MINIMAL = {"model": {"kind": "mlp"}, "data": {"kind": "digits"}}
GAN = {"model": {"kind": "dcgan"}, "data": {"kind": "digits"}, "objective": {"kind": "adversarial"}}
PIX2PIX = {"model": {"kind": "pix2pix"}, "data": {"kind": "digits"}, "objective": {"kind": "adversarial"}}

# the example of the documentation
OPTIMIZERS = {
    "choice": [
        {"kind": "sgd", "lr": {"loguniform": [1e-2, 1]}, "momentum": {"uniform": [0, 0.99]}},
        {"kind": "adam", "lr": {"loguniform": [1e-4, 1e-2]}},
    ]
}


def recipe(space, source=MINIMAL, **sweep) -> Recipe:
    return load_recipe(source, {"sweep": {"space": space, **sweep}})


def space(paths, **sweep) -> Space:
    return Space(validate(SweepSpec, {"space": paths, **sweep}))


def refusal(paths, source=MINIMAL, **sweep) -> str:
    """With what the sweep is refused, by its section or beside the recipe."""
    with pytest.raises(UserError) as caught:
        accept(paths, source, **sweep)
    return str(caught.value)


def accept(paths, source=MINIMAL, **sweep) -> None:
    read = recipe(paths, source, **sweep)
    assert read.sweep
    Space(read.sweep).check(read)


def manifest(shape=(1, 8, 8), *, num_outputs=10, target_kind="label", splits=("train", "validation")) -> Manifest:
    shard = {"file": "a", "rows": 100, "row_groups": [100], "bytes": 1, "sha256": ""}
    return validate(
        Manifest,
        {
            "source": "made",
            "input_shape": shape,
            "input_dtype": "float32",
            "target_kind": target_kind,
            "num_outputs": num_outputs,
            "class_names": [str(name) for name in range(num_outputs)] if target_kind == "label" else [],
            "mean": [0.0] * shape[0],
            "std": [1.0] * shape[0],
            "splits": {split: [shard] for split in splits},
        },
    )


# -- the section -----------------------------------------------------------------------------------------------------


def test_a_recipe_has_a_sweep_or_none():
    plain = load_recipe(MINIMAL)
    assert plain.sweep is None
    assert "sweep" not in dump_recipe(plain)
    swept = recipe({"optimizer": OPTIMIZERS, "train.clip_norm": {"choice": [None, 1]}}, num_trials=4)
    read = validate(Recipe, parse_yaml(dump_recipe(swept), name="x"))
    assert read == swept
    assert read.sweep.space["optimizer"] == OPTIMIZERS
    assert list(read.sweep.space) == ["optimizer", "train.clip_norm"]  # a grid's order
    assert load_recipe(swept, {"sweep": None}) == plain
    assert load_recipe(swept, {"sweep.num_trials": 5}).sweep.num_trials == 5


def test_defaults():
    spec = validate(SweepSpec, {"space": {"optimizer.lr": {"uniform": [0, 1]}}})
    assert Space(spec).num_trials == 16
    assert (spec.searcher, spec.scheduler, spec.grace_epochs, spec.reduction_factor) == ("random", "asha", 1, 3)
    assert [spec.perturb_every(epochs) for epochs in (1, 10, 25)] == [1, 1, 2]
    assert spec.model_copy(update={"perturb_epochs": 4}).perturb_every(25) == 4


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({}, "sweep.space: is empty; give it a path and its distribution, such as optimizer.lr: {uniform: [0.1, 1]}"),
        ([1], "sweep.space: must be a section of fields, not [1]"),
        ({"optimizer.lr": 0.1}, "sweep.space.optimizer.lr: must be one distribution, such as {choice: [1, 2]} or {log"),
        ({"optimizer.lr": [0.1, 1]}, "sweep.space.optimizer.lr: must be one distribution, such as"),
        ({"optimizer.lr": {}}, "sweep.space.optimizer.lr: must be one distribution"),
        ({"optimizer.lr": {"choice": [1], "grid": [1]}}, "sweep.space.optimizer.lr: must be one distribution"),
        (
            {"optimizer.lr": {"logunifrom": [0.1, 1]}},
            "sweep.space.optimizer.lr: unknown distribution 'logunifrom'; did you mean loguniform?",
        ),
        (
            {"optimizer.lr": {"values": [0.1, 1]}},
            "sweep.space.optimizer.lr: unknown distribution 'values'; known: choice, grid, loguniform, normal",
        ),
        (
            {"optimizer": {"lr": {"uniform": [0.1, 1]}}},
            "sweep.space.optimizer: unknown distribution 'lr'; paths are written with dots, such as optimizer.lr",
        ),
        ({"optimizer.lr": {"choice": []}}, "sweep.space.optimizer.lr.choice: there is nothing to choose from; list"),
        ({"optimizer.lr": {"choice": 3}}, "sweep.space.optimizer.lr.choice: must be a list of what to choose from, no"),
        ({"optimizer.lr": {"uniform": []}}, "sweep.space.optimizer.lr.uniform: must be two bounds, as in [0.1, 0.9], "),
        ({"optimizer.lr": {"uniform": None}}, "sweep.space.optimizer.lr.uniform: must be two bounds, as in [0.1, 0.9]"),
        ({"optimizer.lr": {"uniform": [0.1]}}, "sweep.space.optimizer.lr.uniform: must be two bounds, as in [0.1, 0."),
        (
            {"optimizer.lr": {"uniform": [0.1, math.inf]}},
            "sweep.space.optimizer.lr.uniform: must be two bounds, as in [0.1, 0.9], of finite numbers; inf is not one",
        ),
        ({"optimizer.lr": {"uniform": [0.1, math.nan]}}, "of finite numbers; nan is not one"),
        ({"optimizer.lr": {"uniform": [0.1, None]}}, "of finite numbers; None is not one"),
        ({"optimizer.lr": {"uniform": [0.1, True]}}, "of finite numbers; True is not one"),
        ({"optimizer.lr": {"uniform": [0.1, "high"]}}, "of finite numbers; 'high' is not one"),
        ({"optimizer.lr": {"uniform": [1, 0.1]}}, "uniform: the lower bound 1 is above the upper one 0.1; swap them"),
        (
            {"optimizer.lr": {"uniform": [1, 1]}},
            "uniform: both bounds are 1; widen them, or set the value in the recip",
        ),
        ({"optimizer.lr": {"uniform": [-1e308, 1e308]}}, "uniform: the range from -1e+308 to 1e+308 is too large"),
        ({"optimizer.lr": {"loguniform": [0, 1]}}, "loguniform: the lower bound 0 has no logarithm; set it above 0"),
        ({"optimizer.lr": {"loguniform": [-1, 1]}}, "loguniform: the lower bound -1 has no logarithm"),
        ({"optimizer.lr": {"loguniform": [1, 0.1]}}, "loguniform: the lower bound 1 is above the upper one 0.1"),
        ({"optimizer.lr": {"loguniform": [1]}}, "loguniform: must be two bounds, as in [1e-4, 1e-1], not [1]"),
        ({"train.seed": {"quniform": [1, 2]}}, "quniform: must be two bounds and a step, as in [16, 128, 16], not [1"),
        ({"train.seed": {"quniform": [1, 2, 0]}}, "quniform: the step 0 must be above 0"),
        ({"train.seed": {"quniform": [1, 2, -0.5]}}, "quniform: the step -0.5 must be above 0"),
        ({"train.seed": {"quniform": [2, 1, 1]}}, "quniform: the lower bound 2 is above the upper one 1; swap them"),
        ({"train.seed": {"quniform": [1, 3, 4]}}, "quniform: no multiple of 4 lies between 1 and 3; widen the bounds"),
        ({"train.seed": {"quniform": [0, 1, 1e-30]}}, "quniform: the step 1e-30 is nothing beside the range; use unif"),
        ({"train.seed": {"randint": [3, 3]}}, "randint: no integer is from 3 to below 3: the upper bound is not inclu"),
        ({"train.seed": {"randint": [5, 3]}}, "the upper bound is not included; set it to 6 at least"),
        ({"train.seed": {"randint": [0.5, 3]}}, "randint: the bounds must be integers, not [0.5, 3]; use uniform for"),
        ({"train.seed": {"randint": [0, 10**20]}}, "randint: the bounds must not be beyond 9007199254740992"),
        ({"train.seed": {"randint": [4]}}, "randint: must be two integers, as in [1, 5], not [4]"),
        ({"optimizer.lr": {"normal": [0.1]}}, "normal: must be a mean and a standard deviation, as in [0.5, 0.1], not"),
        ({"optimizer.lr": {"normal": [0.1, 0]}}, "normal: the standard deviation 0 must be above 0"),
        (
            {"optimizer": {"choice": [{"kind": "sgd"}, {"kind": "sgd", "lr": {"uniform": []}}]}},
            "sweep.space.optimizer.choice.1.lr.uniform: must be two bounds",
        ),
        ({"data.augment": {"choice": [[{"choice": []}]]}}, "sweep.space.data.augment.choice.0.0.choice: there is noth"),
        ({"sweep.seed": {"choice": [1]}}, "sweep.space.sweep.seed: a trial has no sweep of its own; choose a path of"),
        ({"sweep": {"choice": [None]}}, "sweep.space.sweep: a trial has no sweep of its own"),
        ({"": {"choice": [1]}}, "sweep.space: '' is not a path; write it with dots, such as optimizer.lr"),
        ({"optimizer..lr": {"choice": [1]}}, "sweep.space: 'optimizer..lr' is not a path"),
        ({"optimizer. lr": {"choice": [1]}}, "sweep.space: 'optimizer. lr' is not a path"),
        (
            {"optimizer": OPTIMIZERS, "optimizer.lr": {"uniform": [0.1, 1]}},
            "sweep.space.optimizer.lr: lies within optimizer, which is in the space as well; put it into the sections",
        ),
        (
            {"optimizer.lr": {"grid": [0.1, 1]}},
            "sweep.space.optimizer.lr: all values of a grid are tried by the searcher grid only, not by random; set",
        ),
        ({"optimizer": {"choice": [{"kind": "sgd", "lr": {"grid": [1]}}]}}, "sweep.space.optimizer.choice.0.lr: all v"),
    ],
    ids=str,
)
def test_what_cannot_be_written(paths, message):
    said = refusal(paths)
    assert message in said
    assert said.startswith("sweep.space")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"searcher": "grid"}, "sweep.space.optimizer.lr: uniform has no points to try one by one; list values with g"),
        ({"scheduler": "pbt", "num_trials": 1}, "sweep.num_trials: pbt needs 2 trials at least"),
        ({"reduction_factor": 1}, "sweep.reduction_factor: must be greater than or equal to 2, not 1"),
        ({"num_trials": 0}, "sweep.num_trials: must be greater than 0, not 0"),
        ({"searcher": "optune"}, "sweep.searcher: must be 'random', 'grid' or 'optuna', not 'optune'"),
        ({"schedular": "asha"}, "sweep.schedular: unknown field; did you mean scheduler?"),
        ({"mode": "best"}, "sweep.mode: must be 'min' or 'max', not 'best'"),
    ],
)
def test_fields_that_do_not_fit(sweep, message):
    assert message in refusal({"optimizer.lr": {"uniform": [0.1, 1]}}, **sweep)


def test_all_problems_are_told_at_once():
    said = refusal({"optimizer.lr": {"uniform": []}, "train.seed": {"randint": [0]}})
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "sweep.space.optimizer.lr.uniform",
        "sweep.space.train.seed.randint",
    ]


@pytest.mark.parametrize("path", ["optimizer.lr", "optimizer.momentum", "schedule.final", "objective.label_smoothing"])
def test_pbt_takes_what_can_change_in_mid_training(path):
    assert space({path: {"choice": [1, 2]}}, scheduler="pbt").num_trials == 16


@pytest.mark.parametrize(
    "path", ["optimizer", "schedule", "schedule.kind", "model.hidden", "train.seed", "train.clip_norm"]
)
def test_pbt_takes_nothing_else(path):
    assert refusal({path: {"choice": [1, 2]}}, scheduler="pbt").startswith(
        f"sweep.space.{path}: pbt changes values in mid-training, and this one cannot change there; leave it out"
    )


def test_pbt_over_a_grid_of_one_point():
    with pytest.raises(UserError, match=r"sweep.space: pbt needs 2 trials at least, but the grid has 1 point"):
        space({"optimizer.lr": {"grid": [1]}}, scheduler="pbt", searcher="grid")


# -- beside a recipe -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "paths",
    [
        {"optimizer": OPTIMIZERS, "model.dropout": {"uniform": [0, 1]}},  # 1 itself is never drawn
        {"optimizer.lr": {"uniform": [0, 1]}},
        {"optimizer.lr": {"normal": [0.1, 1]}},
        {"optimizer.lr": {"loguniform": ["1e-4", "1e-1"]}},
        {"model.hidden": {"choice": [[], [64], [{"quniform": [16, 64, 16]}, 32]]}},
        {"model.hidden": {"choice": [[{"choice": [1, 2]}]]}},
        {"train.clip_norm": {"choice": [None, {"uniform": [0.1, 1]}]}},
        # momentum only with sgd, nesterov only with a momentum
        {"optimizer.kind": {"choice": ["adam", "sgd"]}, "optimizer.momentum": {"uniform": [0, 0.9]}},
        {
            "optimizer": {
                "choice": [{"kind": "sgd", "momentum": {"choice": [0, 0.9]}, "nesterov": {"choice": [True, False]}}]
            }
        },
        {"data.augment": {"choice": [[], [{"kind": "rotation", "degrees": {"uniform": [1, 20]}}]]}},
        {"model": {"choice": [{"kind": "mlp"}, {"kind": "cnn", "channels": {"choice": [[8], [8, 16]]}}]}},
    ],
    ids=str,
)
def test_spaces_that_fit(paths):
    accept(paths)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"optimizer.lrr": {"choice": [1]}}, "sweep.space.optimizer.lrr: unknown field; did you mean lr?"),
        ({"optimiser.lr": {"choice": [1]}}, "sweep.space.optimiser.lr: optimiser: unknown field; did you mean optimiz"),
        ({"optimizer.momentum": {"choice": [0.9]}}, "sweep.space.optimizer.momentum: unknown field; known: betas, eps"),
        ({"optimizer.lr.x": {"choice": [1]}}, "sweep.space.optimizer.lr.x: optimizer.lr is a value, not a section; se"),
        ({"model.kind": {"choice": ["mpl"]}}, "sweep.space.model.kind: unknown kind 'mpl'; did you mean mlp?"),
        (
            {"optimizer.lr": {"uniform": [-1, 1]}},
            "sweep.space.optimizer.lr: uniform from -1 to 1 reaches -1, which can be in no trial: optimizer.lr: must",
        ),
        (
            {"model.dropout": {"uniform": [0, 2]}},
            "sweep.space.model.dropout: uniform from 0 to 2 reaches 2, which can be in no trial: model.dropout",
        ),
        ({"model.dropout": {"quniform": [0, 1, 0.25]}}, "quniform from 0 to 1 in steps of 0.25 reaches 1, which can"),
        ({"train.epochs": {"randint": [0, 3]}}, "randint from 0 to 2 reaches 0, which can be in no trial: train.epoch"),
        (
            {"train.epochs": {"uniform": [1, 9]}},
            "train.epochs: must be a valid integer, got a number with a fractional",
        ),
        ({"optimizer.lr": {"normal": [-1, 1]}}, "normal of mean -1 and deviation 1 reaches -1, which can be in no"),
        (
            {"model.hidden": {"choice": [[4], 4]}},
            "sweep.space.model.hidden.choice.1: 4 can be in no trial: model.hidden: must be a list, not 4",
        ),
        (
            {"optimizer": {"choice": [{"kind": "sgd"}, {"kind": "adam", "momentum": 0.9}]}},
            "sweep.space.optimizer.choice.1: {kind: adam, momentum: 0.9} can be in no trial: optimizer.momentum: unk",
        ),
        (
            {"optimizer": {"choice": [{"kind": "sgd", "lr": {"uniform": [-1, 1]}}]}},
            "sweep.space.optimizer.choice.0.lr: uniform from -1 to 1 reaches -1, which can be in no trial: optimizer",
        ),
        (
            {"optimizer": {"choice": [{"kind": "sgd", "lr": {"logunifrom": [0.1, 1]}}]}},
            "optimizer.lr: must be a valid number, not {'logunifrom': [0.1, 1]}",
        ),
        (
            {"optimizer.kind": {"choice": ["sgd", "adam"]}, "optimizer.momentum": {"choice": [0.9, 2]}},
            "sweep.space.optimizer.momentum.choice.1: 2 can be in no trial: optimizer.momentum: must be less than 1",
        ),
        ({"optimizer": {"choice": [{"kind": "sgd", "nesterov": True}]}}, "can be in no trial: optimizer: nesterov nee"),
    ],
    ids=str,
)
def test_what_no_trial_can_have(paths, message):
    said = refusal(paths)
    assert message in said
    assert said.startswith("sweep.space.")
    assert "\n" not in said


def test_each_problem_of_a_space_has_its_fields():
    read = recipe({"model.dropuot": {"choice": [0.1]}, "optimizer": {"choice": [{"kind": "sgd", "nesterov": True}]}})
    assert read.sweep
    with pytest.raises(UserError) as caught:
        Space(read.sweep).check(read)
    path, option = caught.value.problems
    assert path[:4] == ("sweep.space.model.dropuot", "unknown field", "did you mean dropout?", "unknown field")
    assert option[:4] == (
        "sweep.space.optimizer.choice.0",
        "{kind: sgd, nesterov: true} can be in no trial: optimizer: nesterov needs a momentum",
        "set momentum, for instance to 0.9, or nesterov to false",
        None,
    )


def test_a_wrong_path_does_not_make_others_wrong():
    kinds = {"optimizer.kind": {"choice": ["sgd", "adam"]}, "optimizer.momentum": {"uniform": [0, 0.9]}}
    said = refusal({**kinds, "model.dropuot": {"choice": [0.1]}, "train.epochs": {"randint": [0, 2]}})
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "sweep.space.model.dropuot",
        "sweep.space.train.epochs",
    ]


def test_models_that_cannot_read_the_data():
    read = recipe({"model": {"choice": [{"kind": "mlp"}, {"kind": "cnn"}]}})
    assert read.sweep
    Space(read.sweep).check(read, manifest())
    with pytest.raises(
        UserError, match=r"^sweep.space.model.choice.1: {kind: cnn} can be in no trial: model.kind: cnn"
    ):
        Space(read.sweep).check(read, manifest((4,)))


def test_a_trials_recipe():
    read = recipe({"optimizer": OPTIMIZERS})
    assert read.sweep
    section = {"kind": "sgd", "lr": 0.5}
    trial = Space(read.sweep).trial(read, {"optimizer": section})
    assert trial == load_recipe(MINIMAL, {"optimizer": section})
    assert trial.sweep is None
    assert "sweep" not in dump_recipe(trial)
    with pytest.raises(UserError, match=r"optimizer.lr: must be greater than 0"):
        Space(read.sweep).trial(read, {"optimizer.lr": 0})


# -- drawing ---------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**32)
bounds = st.lists(st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=2, max_size=2, unique=True)


def draw(raw, seed):
    return space({"a": raw}).sample(np.random.default_rng(seed))["a"]


@given(bounds.map(sorted), seeds)
def test_uniform_lies_within_its_bounds(ends, seed):
    value = draw({"uniform": ends}, seed)
    assert type(value) is float
    assert ends[0] <= value <= ends[1]


@given(st.lists(st.floats(1e-12, 1e12), min_size=2, max_size=2, unique=True).map(sorted), seeds)
def test_loguniform_lies_within_its_bounds(ends, seed):
    value = draw({"loguniform": ends}, seed)
    assert type(value) is float
    assert ends[0] <= value <= ends[1]


@given(st.integers(-50, 50), st.integers(1, 50), st.sampled_from([1, 3, 0.1, 0.25, 1e-3]), seeds)
def test_quniform_is_a_multiple_within_its_bounds(first, count, q, seed):
    low, high = round(first * q, 6), (first + count) * q + q / 3  # as people write it: 0.3, not 3 * 0.1
    raw = {"quniform": [low, high, q]}
    value = draw(raw, seed)
    assert type(value) is type(q)
    assert low - 1e-12 <= value <= high
    assert abs(value / q - round(value / q)) < 1e-9
    probed = parse(raw).probes()
    assert probed[1] == pytest.approx(low)  # both bounds count
    assert probed[2] == pytest.approx(high - q / 3)


def test_quniform_has_no_stray_digits():
    assert {draw({"quniform": [0, 0.9, 0.1]}, seed) for seed in range(200)} == {n / 10 for n in range(10)}
    assert {draw({"quniform": ["16", 64, 16]}, seed) for seed in range(50)} == {16, 32, 48, 64}


@given(st.integers(-99, 99), st.integers(1, 20), seeds)
def test_randint_leaves_out_its_upper_bound(low, count, seed):
    value = draw({"randint": [low, low + count]}, seed)
    assert type(value) is int
    assert low <= value < low + count


def test_distributions_are_spread_as_they_say():
    def many(raw):
        return np.array([draw(raw, seed) for seed in range(1000)])

    # 1000 draws: the mean of a uniform share is within 4 of its standard deviations, 0.29 / sqrt(1000)
    assert abs(many({"uniform": [2, 4]}).mean() - 3) < 0.08
    assert abs(np.log10(many({"loguniform": [1e-4, 1e-2]})).mean() + 3) < 0.08
    normal = many({"normal": [5, 2]})
    assert abs(normal.mean() - 5) < 0.26
    assert 1.8 < normal.std() < 2.2
    assert set(many({"randint": [0, 3]})) == {0, 1, 2}
    assert set(many({"choice": [3, 4]})) == {3, 4}


@given(seeds)
def test_a_branch_has_its_own_keys_only(seed):
    drawn = space({"optimizer": OPTIMIZERS, "train.seed": {"randint": [0, 9]}}).sample(np.random.default_rng(seed))
    section = drawn["optimizer"]
    if section["kind"] == "sgd":
        assert section.keys() == {"kind", "lr", "momentum"}
        assert 1e-2 <= section["lr"] <= 1
    else:
        assert section.keys() == {"kind", "lr"}
        assert 1e-4 <= section["lr"] <= 1e-2


def test_choices_at_any_depth():
    nested = space({"a": {"choice": [{"b": [1, {"choice": [{"choice": [{"c": {"choice": [5]}}]}]}], "normal": 1}]}})
    assert nested.sample(np.random.default_rng(0)) == {"a": {"b": [1, {"c": 5}], "normal": 1}}


def test_what_is_drawn_is_ones_own():
    spec = validate(SweepSpec, {"space": {"model.hidden": {"choice": [[64]]}}})
    Space(spec).sample(np.random.default_rng(0))["model.hidden"].append(1)
    assert Space(spec).sample(np.random.default_rng(0)) == {"model.hidden": [64]}


# -- grids -----------------------------------------------------------------------------------------------------------


def test_a_grids_points_and_their_order():
    grid = space({"a": {"grid": [1, 2]}, "b": {"choice": ["x", "y", "z"]}}, searcher="grid")
    points = [(point["a"], point["b"]) for point in grid.grid()]
    assert points == [(1, "x"), (1, "y"), (1, "z"), (2, "x"), (2, "y"), (2, "z")]
    assert grid.num_grid_points == grid.num_trials == 6
    assert list(grid.grid()[0]) == ["a", "b"]


def test_a_grid_of_sections():
    sections = [
        {"kind": "sgd", "lr": {"grid": [1, 2]}, "betas": [{"grid": [3, 4]}, 5]},
        {"kind": "adam"},
        {"grid": [{"kind": "x"}]},
    ]
    grid = space({"o": {"choice": sections}}, searcher="grid")
    assert grid.grid() == [
        {"o": {"kind": "sgd", "lr": 1, "betas": [3, 5]}},
        {"o": {"kind": "sgd", "lr": 1, "betas": [4, 5]}},
        {"o": {"kind": "sgd", "lr": 2, "betas": [3, 5]}},
        {"o": {"kind": "sgd", "lr": 2, "betas": [4, 5]}},
        {"o": {"kind": "adam"}},
        {"o": {"kind": "x"}},
    ]
    assert list(grid.grid()[0]["o"]) == ["kind", "lr", "betas"]


trees = st.recursive(
    st.integers(0, 3),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"choice": options})
        | st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from("xyz"), inner, max_size=2)
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from("abc"), trees.map(lambda t: {"choice": [t, 7]}), min_size=1), seeds)
def test_any_sample_is_a_point_of_the_grid(paths, seed):
    grid = space(paths, searcher="grid")
    points = grid.grid()
    assert len(points) == grid.num_grid_points
    drawn = grid.sample(np.random.default_rng(seed))
    assert drawn in points
    assert grid.locate(drawn) is not None


def test_fewer_trials_than_points():
    assert space({"a": {"grid": list(range(20))}}, searcher="grid").num_trials == 20  # not the default of 16
    assert space({"a": {"grid": list(range(20))}}, searcher="grid", num_trials=5).num_trials == 5
    assert space({"a": {"grid": [1, 2]}}, searcher="grid", num_trials=5).num_trials == 2
    assert space({"a": {"uniform": [0, 1]}}).num_grid_points is None
    huge = {str(path): {"grid": list(range(10))} for path in range(9)}
    with pytest.raises(
        UserError, match=r"sweep.space: a grid of 1,000,000,000 points; set sweep.num_trials to at most"
    ):
        space(huge, searcher="grid")
    assert space(huge, searcher="grid", num_trials=9).grid_point(10)["7"] == 1


# -- finding again, and mutating -------------------------------------------------------------------------------------

EVERYTHING = {
    "optimizer": OPTIMIZERS,
    "model.hidden": {"choice": [[64], [{"randint": [8, 99]}, 16], {"choice": [None, True, 1]}]},
    "model.dropout": {"quniform": [0, 0.9, 0.1]},
    "train.seed": {"randint": [1, 1000]},
    "train.clip_norm": {"normal": [1, 0.1]},
}


@given(seeds)
def test_draws_are_found_again_even_after_json(seed):
    everything = space(EVERYTHING)
    names = {}

    def draw(name, distribution):
        names[name] = distribution.sample(rng)
        return names[name]

    rng = np.random.default_rng(seed)
    overrides = everything.draw(draw)
    assert everything.locate(overrides) == names
    assert everything.locate(json.loads(json.dumps(overrides))) == names


@pytest.mark.parametrize(
    "changes",
    [
        {"train.seed": 1000},
        {"train.seed": 1.5},
        {"train.seed": True},
        {"model.dropout": 0.15},
        {"model.hidden": [64, 64, 64]},
        {"model.hidden": 2},
        {"optimizer": {"kind": "adam", "lr": 1.0}},
        {"optimizer": {"kind": "adam"}},
        {"optimizer": "adam"},
        {"other.path": 3},
        {"train.clip_norm": math.nan},
    ],
    ids=str,
)
def test_what_is_of_another_space_is_not_found(changes):
    everything = space(EVERYTHING)
    assert everything.locate(everything.sample(np.random.default_rng(0)) | changes) is None


@given(seeds)
def test_mutations_stay_within_the_space(seed):
    everything, rng = space(EVERYTHING), np.random.default_rng(seed)
    before = everything.sample(rng)
    after = everything.perturb(before, rng)
    assert everything.locate(after) is not None
    assert everything.perturb({"of": "another space"}, rng).keys() == EVERYTHING.keys()


def test_mutations_are_near_or_new():
    rate = space({"optimizer.lr": {"loguniform": [1e-4, 1]}, "schedule.warmup_steps": {"randint": [0, 9]}})
    mutated = [
        rate.perturb({"optimizer.lr": 0.01, "schedule.warmup_steps": 1}, np.random.default_rng(seed))
        for seed in range(400)
    ]
    rates = [value["optimizer.lr"] for value in mutated]
    assert 0.15 < 1 - sum(any(math.isclose(r, 0.01 * f) for f in (0.8, 1.2)) for r in rates) / 400 < 0.35
    assert {0, 2} < {value["schedule.warmup_steps"] for value in mutated}  # an integer moves, however small


# -- for people ------------------------------------------------------------------------------------------------------


def test_descriptions():
    paths = {
        "optimizer": OPTIMIZERS,
        "model.hidden": {"choice": [[64], None, True]},
        "model.dropout": {"quniform": [0, 0.9, 0.3]},
        "train.seed": {"randint": [0, 4]},
        "train.clip_norm": {"normal": [1, 0.1]},
    }
    assert space(paths).describe() == [
        (
            "optimizer",
            "choice of {kind: sgd, lr: loguniform from 0.01 to 1, momentum: uniform from 0 to 0.99} | "
            "{kind: adam, lr: loguniform from 0.0001 to 0.01}",
        ),
        ("model.hidden", "choice of [64] | null | true"),
        ("model.dropout", "quniform from 0 to 0.9 in steps of 0.3"),
        ("train.seed", "randint from 0 to 3"),
        ("train.clip_norm", "normal of mean 1 and deviation 0.1"),
    ]


def test_columns():
    overrides = {
        "optimizer": {"kind": "sgd", "lr": 0.1, "more": {"deep": 1}},
        "model.hidden": [64, 32],
        "train.clip_norm": None,
        "model.arguments": {},
        "data.augment": [{"kind": "rotation"}],
    }
    assert columns(overrides) == {
        "optimizer.kind": "sgd",
        "optimizer.lr": 0.1,
        "optimizer.more.deep": 1,
        "model.hidden": "[64, 32]",
        "train.clip_norm": None,
        "model.arguments": "{}",
        "data.augment": '[{"kind": "rotation"}]',
    }
    assert columns({}) == {}


# -- the metric ------------------------------------------------------------------------------------------------------

RATE = {"optimizer.lr": {"uniform": [0.1, 1]}}


@pytest.mark.parametrize(
    ("source", "sweep", "expected"),
    [
        (MINIMAL, {}, ("validation/accuracy", "max")),
        (MINIMAL, {"metric": "validation/loss"}, ("validation/loss", "min")),
        (MINIMAL, {"metric": "train/accuracy"}, ("train/accuracy", "max")),
        (MINIMAL, {"metric": "validation/loss", "mode": "max"}, ("validation/loss", "max")),
        (MINIMAL | {"objective": {"kind": "regression"}}, {}, ("validation/loss", "min")),
        (MINIMAL | {"objective": {"kind": "regression"}}, {"metric": "validation/mae"}, ("validation/mae", "min")),
        (GAN, {}, ("validation/frechet_distance", "min")),
        (GAN, {"metric": "validation/diversity"}, ("validation/diversity", "max")),
        (GAN, {"metric": "train/generator_loss", "mode": "min"}, ("train/generator_loss", "min")),
        (PIX2PIX, {}, ("validation/l1", "min")),
    ],
)
def test_targets(source, sweep, expected):
    assert target(recipe(RATE, source, **sweep)) == Target(*expected)


def test_the_data_decides_what_can_be_compared():
    assert target(load_recipe(MINIMAL), manifest(splits=("train",))) == ("train/accuracy", "max")
    assert target(load_recipe(GAN), manifest()) == ("validation/frechet_distance", "min")
    assert target(load_recipe(GAN), manifest((4,), target_kind="number")) == ("validation/frechet_distance", "min")
    assert target(load_recipe(PIX2PIX), manifest()) == ("validation/frechet_distance", "min")
    with pytest.raises(
        UserError, match=r"sweep.metric: digits has no classes to compare what dcgan makes by; set it to"
    ):
        target(load_recipe(GAN), manifest(target_kind="number"))


@pytest.mark.parametrize(
    ("source", "metric", "message"),
    [
        (
            MINIMAL,
            "validation/acuracy",
            "this recipe reports no validation/acuracy; did you mean validation/accuracy? ",
        ),
        (
            MINIMAL,
            "frechet",
            "reports no frechet; known: train/accuracy, train/loss, validation/accuracy, validation/l",
        ),
        (MINIMAL, "test/accuracy", "no test/accuracy; trials are compared while they train, before they are tested; d"),
        (GAN, "validation/accuracy", "It reports train/generator_loss, train/discriminator_loss, train/real_accuracy"),
        (GAN, "train/generator_loss", "sweep.mode: set it to min or max: whether less or more train/generator_loss is"),
    ],
)
def test_metrics_that_cannot_be(source, metric, message):
    with pytest.raises(UserError, match=re.escape(message)):
        target(recipe(RATE, source, metric=metric))


def test_reported_metrics_of_gans():
    wasserstein = load_recipe(GAN, {"objective.loss": "wasserstein", "model.discriminator_norm": "layer"})
    assert "train/real_accuracy" not in reported(wasserstein)
    assert "train/l1" in reported(load_recipe(PIX2PIX, {"objective.l1_weight": 100}))
    conditional = load_recipe(GAN, {"model": {"kind": "conditional_gan"}})
    assert "validation/label_agreement" in reported(conditional)
    assert "validation/label_agreement" not in reported(conditional, manifest((4,)))


# -- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "grace", "factor", "expected"),
    [(10, 1, 3, [1, 3, 9]), (9, 1, 3, [1, 3]), (27, 2, 4, [2, 8]), (1, 1, 3, []), (3, 5, 2, []), (8, 1, 2, [1, 2, 4])],
)
def test_rungs(epochs, grace, factor, expected):
    assert rungs(epochs, grace, factor) == expected


def test_promoted_epochs():
    # 16 to epoch 1, 6 of them to 3, 2 to 9, 1 to 10
    assert promoted_epochs(16, 10, [1, 3, 9], 3) == 16 + 6 * 2 + 2 * 6 + 1
    assert promoted_epochs(16, 10, [], 3) == 160


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 9), st.integers(2, 5))
def test_no_share_promoted_costs_more_than_all(num_trials, epochs, grace, factor):
    steps = rungs(epochs, grace, factor)
    assert epochs <= promoted_epochs(num_trials, epochs, steps, factor) <= num_trials * epochs


@pytest.mark.parametrize(
    ("sweep", "lines"),
    [
        (
            {},
            [
                "16 trials of at most 10 epochs: 160 epochs at most",
                "asha: rungs at epoch 1, 3, 9; about 41 epochs where one trial in 3 goes on at each",
            ],
        ),
        ({"scheduler": "none", "num_trials": 1}, ["1 trial of at most 10 epochs: 10 epochs at most"]),
        (
            {"grace_epochs": 10, "num_trials": 2},
            [
                "2 trials of at most 10 epochs: 20 epochs at most",
                "asha stops none: no trial is longer than sweep.grace_epochs",
            ],
        ),
        (
            {"scheduler": "median", "num_trials": 2},
            [
                "2 trials of at most 10 epochs: 20 epochs at most",
                "median: a trial stops where its mean so far is worse than the median of the others'",
            ],
        ),
        (
            {"scheduler": "pbt", "num_trials": 2},
            [
                "2 trials of at most 10 epochs: 20 epochs at most",
                "pbt: the worst quarter goes on from the best, mutated, every 1 epoch",
            ],
        ),
    ],
)
def test_budgets(sweep, lines):
    assert budget(recipe(RATE, **sweep)).lines() == lines


def test_the_longest_trial_counts():
    assert budget(recipe({"train.epochs": {"randint": [2, 31]}}, num_trials=2)).longest == 60
    sections = {"train": {"choice": [{"epochs": 3}, {"global_batch_size": 8}]}}
    assert budget(recipe(sections, num_trials=2)).epochs == 10  # of the recipe's default
