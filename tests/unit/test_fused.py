"""Fused trials: each has the figures that it would have alone, whatever happens to the others."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional as F

from cluster.data.manifest import StoredColumn
from cluster.data.prepare import prepared
from cluster.errors import Diverged
from cluster.recipe.loading import load_recipe
from cluster.recipe.optimizers import AnyOptimizerSpec
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.average import MovingAverage
from cluster.training.checkpoints import Checkpoints, read_model
from cluster.training.context import LocalContext
from cluster.training.loop import fit
from cluster.training.run_directory import RunDirectory, read_metrics
from cluster.training.splits import Splits, open_splits
from cluster.tuning.fused import layers as fused_layers
from cluster.tuning.fused.groups import groups, pays, why_not
from cluster.tuning.fused.loop import FusedLoop
from cluster.tuning.fused.member import Member, Weights
from cluster.tuning.fused.model import FusedModel
from cluster.tuning.fused.optimizers import FusedOptimizers
from nn_models.batch import Batch, Place
from nn_models.classification import Classification, ClassificationSpec
from nn_models.columns import Image, Sequence
from nn_models.errors import UserError
from nn_models.spec import validate
from tests.unit import made

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # torch's own
]

CPU = torch.device("cpu")
ROWS = 200  # 160 of them to train on: 8 steps of 20
SGD = {"kind": "sgd", "lr": 0.1, "momentum": 0.9}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order, 16 steps
CLOCKS = {"time_s", "rows_per_s", "train_s", "first_step_at"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("files")
    specs = {
        "features": made.features(folder / "features", ROWS),
        "numbers": made.features(folder / "numbers", ROWS, target="number"),
        "images": made.images(folder / "images", ROWS),
        "no validation": made.features(folder / "validation", ROWS, validation_fraction=0),
        "train only": made.features(folder / "train", ROWS, validation_fraction=0, test_fraction=0),
    }
    return {name: spec.model_dump(exclude_defaults=True) | {"kind": "parquet"} for name, spec in specs.items()}


@pytest.fixture
def recipes(files):
    """Recipes that are alike but for what `differing` sets: `recipes({"optimizer.lr": 0.1}, {…}, data="images")`."""

    def make(*differing: dict[str, Any], data: str = "features", **sections: Any) -> list[Recipe]:
        content = {
            "model": {"kind": "mlp", "hidden": [8], "activation": "tanh"},
            "data": files[data] | sections.pop("data_fields", {}),
            "optimizer": SGD,
            "train": {"epochs": 2, "global_batch_size": 20, "log_every_steps": 1} | sections.pop("train", {}),
        }
        if data == "numbers":
            content["objective"] = {"kind": "regression"}
        return [load_recipe(content | sections, overrides=changes) for changes in differing]

    return make


def splits_of(recipe: Recipe) -> Splits:
    return open_splits(prepared(recipe.data), window=recipe.data.shuffle_window)


def runs(folder: Path, name: str, count: int) -> list[Folder]:
    return [Folder(folder / f"{name}-{number}").create() for number in range(count)]


def fused(recipes: list[Recipe], where: list[Folder]) -> FusedLoop:
    return FusedLoop(recipes, splits=splits_of(recipes[0]), runs=where, device=CPU)


def together(recipes: list[Recipe], where: list[Folder]) -> dict[int, dict[str, Any]]:
    with fused(recipes, where) as loop:
        while not loop.ended:
            loop.epoch()
        return loop.conclude()


def alone(recipe: Recipe, where: Folder) -> dict[str, Any]:
    return fit(recipe, context=LocalContext(run=where, splits=splits_of(recipe), device=CPU))


def batch_of(**columns: torch.Tensor) -> Batch:
    rows = len(columns["input"])
    return Batch(columns, Place.of(rows), lambda: torch.arange(rows))


def lines(run: Folder, split: str | None = None) -> list[dict[str, Any]]:
    return [line for line in read_metrics(RunDirectory(run)) if split in (None, line["split"])]


def newest(run: Folder) -> dict[str, Any]:
    state = Checkpoints(run / "checkpoints", keep=1).newest()
    assert state is not None
    return state


def close(one: Any, other: Any, where: str = "") -> None:
    """Equal but for clocks and the rounding of numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - CLOCKS:
            close(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, (mine, yours) in enumerate(zip(one, other, strict=True)):
            close(mine, yours, f"{where}[{number}]")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, **CLOSE, msg=lambda text: f"{where}: {text}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5), where
    else:
        assert one == other, where


def same_run(one: Folder, other: Folder) -> None:
    """The runs' metrics, checkpoints, best weights and evaluation are the same."""
    close(lines(one), lines(other), "metrics")
    ours, theirs = newest(one), newest(other)
    for state in (ours, theirs):
        del state["generators"]  # nothing has drawn from it, but vmap has a stream for all trials
    close(ours, theirs, "checkpoint")
    close(read_model(one).weights, read_model(other).weights, "best")
    names = ["checkpoints", "evaluation.safetensors", "events", "metrics.jsonl", "model"]
    assert one.names() == other.names() == names


def check(recipes: list[Recipe], folder: Path) -> dict[int, dict[str, Any]]:
    """Fused trials are what they are alone."""
    where, apart = runs(folder, "fused", len(recipes)), runs(folder, "alone", len(recipes))
    results = together(recipes, where)
    for number, recipe in enumerate(recipes):
        close(results[number], alone(recipe, apart[number]), f"result {number}")
        same_run(where[number], apart[number])
    return results


# -- the same as alone -----------------------------------------------------------------------------------------------

RATES = [{"optimizer.lr": lr} for lr in (0.01, 0.1, 0.3)]
VARIANTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "rates": (RATES, {}),
    "seeds": ([{"train.seed": 3}, {"train.seed": 4, "optimizer.lr": 0.2}, {"train.seed": 3}], {}),
    "momenta": (
        [
            {"optimizer.momentum": 0.0, "optimizer.weight_decay": 0.1},
            {"optimizer.momentum": 0.5},
            {"optimizer.momentum": 0.8, "optimizer.nesterov": True},
        ],
        {"schedule": {"kind": "cosine", "warmup_steps": 3}},
    ),
    "adam": (
        [{"optimizer.lr": 0.01}, {"optimizer.betas": [0.8, 0.9], "optimizer.weight_decay": 0.1}],
        {"optimizer": {"kind": "adam", "eps": 1e-6}},
    ),
    "adamw": ([{"optimizer.lr": 0.01}, {"optimizer.weight_decay": 0.5}], {"optimizer": {"kind": "adamw"}}),
    "rmsprop": ([{"optimizer.lr": 0.01}, {"optimizer.alpha": 0.9}], {"optimizer": {"kind": "rmsprop"}}),
    "adagrad": ([{"optimizer.lr": 0.01}, {"optimizer.lr": 0.05}], {"optimizer": {"kind": "adagrad"}}),
    "smoothing": ([{"objective.label_smoothing": share} for share in (0.0, 0.1, 0.3)], {}),
    "numbers": (RATES[:2], {"data": "numbers"}),
    "no validation": (RATES[:2], {"data": "no validation"}),
    "average, clipped, in pieces": (RATES, {"train": {"ema_decay": 0.9, "clip_norm": 0.05, "accumulation": 3}}),
    "recorded norms": (RATES, {"train": {"record_grad_norm": True}}),
    "in pieces of own rows": ([{"train.seed": 3}, {"train.seed": 4}], {"train": {"accumulation": 3}}),
    "normalised": (RATES[:2], {"model": {"kind": "mlp", "hidden": [8, 8], "batch_norm": True}}),
    "averages of running statistics": (
        RATES[:2],
        {"model": {"kind": "mlp", "hidden": [8], "batch_norm": True}, "train": {"ema_decay": 0.8}},
    ),
    "images": (
        [{"optimizer.lr": 0.01, "train.seed": seed} for seed in (3, 4, 4)],
        {"data": "images", "model": {"kind": "cnn", "channels": [4], "hidden": [8]}},
    ),
    "augmented": (
        [{"optimizer.lr": 0.01, "train.seed": seed} for seed in (3, 4)],
        {"data": "images", "data_fields": {"augment": [{"kind": "horizontal_flip"}]}, "train": {"epochs": 1}},
    ),
    "streamed": (RATES[:2], {"data_fields": {"shuffle_window": 50}}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_trial_is_what_it_is_alone(name, recipes, tmp_path):
    differing, sections = VARIANTS[name]
    check(recipes(*differing, **sections), tmp_path)


def test_dropout_differs_between_trials_and_trains_them(recipes, tmp_path):
    described = recipes(*[{"model.dropout": rate} for rate in (0.0, 0.2, 0.8)], train={"epochs": 8})
    where = runs(tmp_path, "fused", 3)
    results = together(described, where)
    alone(described[0], Folder(tmp_path / "alone"))
    close(lines(where[0]), lines(Folder(tmp_path / "alone")))  # one without dropout is as if there were none
    losses = [results[number]["metrics"]["train/loss"] for number in range(3)]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("how", ["features first", "rows first", "vmap"])
def test_a_dropped_share_is_the_trials_own(how):
    members = [nn.Sequential(nn.Dropout(rate)) for rate in (0.0, 0.25, 0.75)]
    template = copy.deepcopy(members[0])
    fused_layers.free_dropout(template, members)
    _, buffers = torch.func.stack_module_state(members)  # type: ignore[arg-type]
    torch.manual_seed(0)
    if how == "vmap":

        def drop(buffers: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(template, buffers, (x,))

        dropped = vmap(drop, in_dims=(0, None), out_dims=1, randomness="different")(buffers, torch.ones(200, 100))
    else:
        fused_layers.widen(template)
        ones = torch.ones(3, 100, 200) if how == "features first" else torch.ones(200, 3 * 100)
        dropped = torch.func.functional_call(template, buffers, (ones,))
        dropped = dropped.permute(2, 0, 1) if how == "features first" else dropped.view(200, 3, 100)
    rates = buffers["0.rate"]
    shares = (dropped == 0).float().mean((0, 2))
    torch.testing.assert_close(shares, rates, atol=0.01, rtol=0)  # 20,000 draws: three deviations are 0.009
    for rate, outputs in zip(rates, dropped.unbind(1), strict=True):
        left = outputs[outputs > 0]
        torch.testing.assert_close(left, torch.ones_like(left) / (1 - rate))  # makes up for what is dropped
    template.eval()
    assert torch.equal(template(torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_while_checkpoints_are_written_leaves_a_step_that_all_have(keep, recipes, tmp_path, monkeypatch):
    described = recipes(*[{"train.seed": seed} for seed in range(3)], train={"epochs": 4, "keep_checkpoints": keep})
    undisturbed = together(described, runs(tmp_path, "whole", 3))
    where = runs(tmp_path, "killed", 3)
    written = []
    save_as = Checkpoints.save_as

    def killed(self, name, state):
        written.append(name)
        if len(written) == 3 * 2 + 2:  # in the third epoch, one of three is written
            raise KeyboardInterrupt
        save_as(self, name, state)

    monkeypatch.setattr(Checkpoints, "save_as", killed)
    with fused(described, where) as loop:

        def train() -> None:
            while not loop.ended:
                loop.epoch()
                loop._background.wait()

        with pytest.raises(KeyboardInterrupt):
            train()
    monkeypatch.undo()
    with fused(described, where) as loop:
        assert loop.epochs_done == 2
        while not loop.ended:
            loop.epoch()
        resumed = loop.conclude()
    for number, result in undisturbed.items():
        close(resumed[number]["metrics"], result["metrics"])


# -- moving averages -------------------------------------------------------------------------------------------------


def test_moving_averages_are_those_of_each_trial_alone(recipes):
    train = {"ema_decay": 0.5}
    described = recipes({}, {"train.seed": 4}, model={"kind": "mlp", "hidden": [3], "batch_norm": True}, train=train)
    signature = splits_of(described[0]).manifest.signature
    model = FusedModel(described, signature, device=CPU)
    modules = []
    for recipe in described:
        torch.manual_seed(recipe.train.seed)
        modules.append(recipe.model.build(signature))
    averages = [MovingAverage(module, 0.5) for module in modules]
    generator = torch.Generator().manual_seed(0)
    for step in range(10):  # the decay is 0.1 at first and 0.5 from the eighth on
        for place, (module, average) in enumerate(zip(modules, averages, strict=True)):
            changed = {
                name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 1
                for name, tensor in module.state_dict().items()
            }
            module.load_state_dict(changed)
            average.update()
            model.load(place, changed, None)
        model.update_average()
        if step == 5:
            model.keep([1])
            modules, averages = modules[1:], averages[1:]
    ours, theirs = model.averages(0), averages[0].state_dict()
    assert ours is not None
    assert ours.keys() == theirs.keys()
    assert "module.hidden.0.norm.running_mean" in ours
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    for name, tensor in model.weights(0, averaged=True).items():
        assert torch.equal(tensor, theirs[f"module.{name}"])
    for name, tensor in modules[0].state_dict().items():
        assert torch.equal(model.weights(0)[name], tensor)


def test_the_better_weights_are_evaluated_and_kept(recipes, tmp_path):
    # a net that learns fast is ahead of its average; one whose steps are far too large is behind it
    described = recipes({"optimizer.lr": 0.01}, {"optimizer.lr": 3.0}, train={"epochs": 3, "ema_decay": 0.99})
    where = runs(tmp_path, "fused", 2)
    results = together(described, where)
    for number, result in results.items():
        told = {line["epoch"] + 1: line["weights"] for line in lines(where[number], "validation")}
        best, state = result["best"], newest(where[number])
        assert best["weights"] == told[best["epoch"]]
        assert read_model(where[number]).best["weights"] == best["weights"]
        if best["epoch"] == 3:  # the newest checkpoint is of this epoch
            kept = {"plain": state["model"], "averaged": state["average"]}[best["weights"]]
            prefix = "module." if best["weights"] == "averaged" else ""
            for name, tensor in read_model(where[number]).weights.items():
                assert torch.equal(tensor, kept[f"{prefix}{name}"])
    assert results[0]["best"]["weights"] == "plain"
    assert results[0]["best"]["epoch"] == 3
    assert results[1]["best"]["weights"] == "averaged"


@pytest.mark.parametrize(
    ("averaged", "plain", "chosen"),
    [
        ((0.5, 1.0), (0.6, 1.0), "plain"),
        ((0.6, 1.0), (0.5, 0.5), "averaged"),
        ((0.5, 1.0), (0.5, 0.9), "plain"),  # of equal accuracy, the smaller loss
        ((0.5, 1.0), (0.5, 1.0), "averaged"),
        ((0.1, 9.0), (0.5, math.nan), "averaged"),
        ((0.5, math.inf), (0.1, 9.0), "plain"),
        ((0.5, math.nan), (0.5, math.nan), "averaged"),
    ],
)
def test_which_weights_are_the_better_ones(averaged, plain, chosen, recipes, tmp_path):
    (recipe,) = recipes({})
    member = Member.of(0, recipe, Folder(tmp_path), names=["loss", "accuracy"], chosen="averaged")
    measured: dict[Weights, tuple[float, float]] = {"averaged": averaged, "plain": plain}
    found = {kind: {"accuracy": accuracy, "loss": loss} for kind, (accuracy, loss) in measured.items()}
    finite = member.validated(found, Classification(label_smoothing=0.0))
    assert member.chosen == chosen
    assert member.about == {"weights": chosen}
    assert finite == math.isfinite(measured[member.chosen][1])


def test_without_held_out_rows_the_averaged_weights_are_kept(recipes, tmp_path):
    where = runs(tmp_path, "fused", 2)
    results = together(recipes(*RATES[:2], data="train only", train={"ema_decay": 0.9, "epochs": 1}), where)
    for number, result in results.items():
        assert "weights" not in result["best"]
        average = newest(where[number])["average"]
        for name, tensor in read_model(where[number]).weights.items():
            assert torch.equal(tensor, average[f"module.{name}"])


# -- leaving the batch -----------------------------------------------------------------------------------------------


def test_the_others_do_not_notice_that_one_stops(recipes, tmp_path):
    described = recipes(*[{"train.seed": seed} for seed in (3, 4, 4)], train={"epochs": 4, "ema_decay": 0.5})
    where, apart = runs(tmp_path, "fused", 3), runs(tmp_path, "alone", 3)
    with fused(described, where) as loop:
        assert loop.live == (0, 1, 2)
        metrics = loop.epoch()
        assert metrics.keys() == {0, 1, 2}
        assert metrics[0].keys() == {f"{a}/{b}" for a in ("train", "validation") for b in ("loss", "accuracy")}
        stopped = loop.stop(0)  # the others have one seed, and from now on one batch
        assert loop.live == (1, 2)
        while not loop.ended:
            assert loop.epoch().keys() == {1, 2}
        results = loop.conclude()
    for number in (1, 2):
        close(results[number], alone(described[number], apart[number]))
        same_run(where[number], apart[number])
    assert results[0] is stopped
    assert (stopped["epochs"], stopped["steps"], stopped["stopped_early"]) == (1, 8, True)
    assert stopped["checkpoint"] == "checkpoints/step-0000000008.pt"
    assert stopped["metrics"]["test/loss"] == lines(where[0], "test")[0]["loss"]
    # the ordinary loop can go on with it, and ends where it would have ended
    close(alone(described[0], where[0]), alone(described[0], apart[0]))


def test_patience_is_each_trials_own(recipes, tmp_path):
    # the first cannot learn anything: its first epoch is its best
    described = recipes({"optimizer.lr": 1e-30}, {"optimizer.lr": 0.1}, train={"epochs": 4, "patience": 2})
    results = check(described, tmp_path)
    assert [results[number]["epochs"] for number in (0, 1)] == [3, 4]
    assert [results[number]["stopped_early"] for number in (0, 1)] == [True, False]


@pytest.mark.parametrize("interval", [1, 3, 50])
def test_one_that_diverges_takes_no_other_with_it(interval, recipes, tmp_path):
    described = recipes(
        {"optimizer.lr": 0.1}, {"optimizer.lr": 3e38}, {"optimizer.lr": 0.2}, train={"log_every_steps": interval}
    )
    where, apart = runs(tmp_path, "fused", 3), runs(tmp_path, "alone", 3)
    results = together(described, where)
    assert results.keys() == {0, 2}
    for number in (0, 2):
        close(results[number], alone(described[number], apart[number]))
        same_run(where[number], apart[number])
    with fused(described, runs(tmp_path, "again", 3)) as loop:
        assert loop.epoch().keys() == {0, 2}
        ours = loop.failures[1]
    with pytest.raises(Diverged) as theirs:
        alone(described[1], apart[1])
    assert str(ours) == str(theirs.value)
    assert [line["step"] for line in lines(where[1])] == [line["step"] for line in lines(apart[1])]


def test_all_may_diverge(recipes, tmp_path):
    with fused(recipes({"optimizer.lr": 3e38}, {"optimizer.lr": 1e38}), runs(tmp_path, "fused", 2)) as loop:
        assert loop.epoch() == {}
        assert loop.ended
        assert loop.conclude() == {}
        assert loop.failures.keys() == {0, 1}


# -- resuming --------------------------------------------------------------------------------------------------------

ADAM = {"kind": "adamw", "lr": 0.01}
MIDWAY = {"epochs": 3, "checkpoint_every_steps": 3, "keep_checkpoints": 20, "ema_decay": 0.9}


@pytest.mark.parametrize("step", [3, 8, 14])
def test_resumed_trials_end_bit_for_bit_where_undisturbed_ones_do(step, recipes, tmp_path):
    model = {"kind": "mlp", "hidden": [8], "batch_norm": True, "dropout": 0.2}
    described = recipes({"train.seed": 1}, {"model.dropout": 0.4}, model=model, optimizer=ADAM, train=MIDWAY)
    whole, broken = runs(tmp_path, "whole", 2), runs(tmp_path, "broken", 2)
    together(described, whole)
    together(described, broken)
    for run in broken:  # as after a kill: what came after this step is lost, for one of them a little more
        for name in (run / "checkpoints").names():
            if name > f"step-{step:010d}.pt" and (run is broken[1] or name > f"step-{step + 5:010d}.pt"):
                (run / "checkpoints").delete(name)
    together(described, broken)
    for one, other in zip(whole, broken, strict=True):
        ours, theirs = newest(one), newest(other)
        for part in ("model", "average"):
            for name, tensor in ours[part].items():
                assert torch.equal(tensor, theirs[part][name])
        close(lines(one), lines(other))


def test_trials_without_a_common_checkpoint_begin_anew(recipes, tmp_path, caplog):
    described = recipes(*RATES[:2])
    whole, broken = runs(tmp_path, "whole", 2), runs(tmp_path, "broken", 2)
    together(described, whole)
    together(described, broken)
    (broken[1] / "checkpoints").delete("step-0000000008.pt")
    (broken[0] / "checkpoints").delete("step-0000000016.pt")
    together(described, broken)
    assert "begin anew" in caplog.text
    for one, other in zip(whole, broken, strict=True):
        same_run(one, other)


def test_trials_of_the_ordinary_loop_go_on_fused(recipes, tmp_path):
    described = recipes(*RATES[:2], optimizer=ADAM, train={"epochs": 3, "keep_checkpoints": 9, "ema_decay": 0.5})
    where, apart = runs(tmp_path, "fused", 2), runs(tmp_path, "alone", 2)
    for recipe, run, other in zip(described, where, apart, strict=True):
        alone(recipe, run)
        alone(recipe, other)
        for name in ("step-0000000016.pt", "step-0000000024.pt"):
            (run / "checkpoints").delete(name)
    together(described, where)
    for one, other in zip(where, apart, strict=True):
        same_run(one, other)


def test_a_concluded_group_is_concluded_again(recipes, tmp_path):
    described = recipes(*RATES[:2], train={"patience": 1})
    where = runs(tmp_path, "fused", 2)
    results = together(described, where)
    close(json.loads(json.dumps(results)), json.loads(json.dumps(together(described, where))))


def test_checkpoints_of_another_model_are_refused(recipes, tmp_path):
    where = runs(tmp_path, "fused", 2)
    together(recipes(*RATES[:2]), where)
    with pytest.raises(UserError, match="another model"):
        fused(recipes(*RATES[:2], model={"kind": "mlp", "hidden": [9]}), where)


def test_without_held_out_rows_the_last_training_metrics_decide(recipes, tmp_path):
    where = runs(tmp_path, "fused", 2)
    results = together(recipes(*RATES[:2], data="train only"), where)
    for number, result in results.items():
        assert result["best"]["metric"] == "train/accuracy"
        assert result["metrics"].keys() == {"train/loss", "train/accuracy"}
        assert read_model(where[number]).best["value"] == result["best"]["value"]


# -- which go together -----------------------------------------------------------------------------------------------


def test_groups_hold_what_differs_in_values_that_can_be_batched(recipes):
    described = [
        *recipes({"optimizer.lr": 0.1}, {"train.seed": 4, "model.dropout": 0.5, "name": "other"}),
        *recipes({"model.hidden": [9]}, {"optimizer.momentum": 0.1}, {"train.epochs": 3}),
        *recipes({"optimizer.lr": 1e-3}, {"optimizer.weight_decay": 0.1}, optimizer={"kind": "adamw"}),
        *recipes({"train.compile": True}, {"train.compile": True}),
    ]
    assert groups(described) == [[0, 1, 3], [2], [4], [5, 6], [7], [8]]
    assert groups(described[:5], 2) == [[0, 1], [2], [3], [4]]
    assert groups([]) == []
    streamed = recipes({}, {"train.seed": 4}, {"optimizer.lr": 0.2}, data_fields={"shuffle_window": 50})
    assert groups(streamed) == [[0, 2], [1]]
    assert groups(streamed, manifest=prepared(streamed[0].data).manifest) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train.compile": True}, "train.compile"),
        ({"changes": [{"epoch": 1, "set": {"optimizer.lr": 0.2}}]}, "changes"),
        ({"train.precision": "bf16"}, "train.precision"),
        ({"model": {"kind": "custom", "target": "tests.unit.nets:LooksAtValues"}}, "model.kind: custom"),
        ({"model": {"kind": "gan"}, "objective": {"kind": "adversarial"}}, "adversarial"),
    ],
)
def test_what_cannot_be_fused_says_why(changes, reason, recipes, tmp_path):
    (described,) = recipes(changes)
    manifest = prepared(described.data).manifest
    assert str(why_not(described)).startswith(reason)
    assert str(why_not(described, manifest)).startswith(reason)
    assert not pays(described, manifest)
    with pytest.raises(UserError, match=reason):
        fused([described, described], runs(tmp_path, "fused", 2))


class _MoreThanOutputs(ClassificationSpec):
    fuses = False


class _CountsElements(ClassificationSpec):
    counts = "input"


@pytest.mark.parametrize("objective", [_MoreThanOutputs(), _CountsElements()], ids=lambda spec: type(spec).__name__)
def test_what_an_objective_measures_must_follow_from_outputs(objective, recipes):
    (described,) = recipes({})
    assert why_not(described) is None
    reason = why_not(described.model_copy(update={"objective": objective}))
    assert reason is not None
    assert reason.path == "objective.kind"


def test_rows_of_different_lengths_are_not_fused(recipes):
    (described,) = recipes({}, model={"kind": "custom", "target": "tests.unit.nets:Linear"})
    manifest = prepared(described.data).manifest
    reasons = {}
    for length in (2, None):
        column = StoredColumn(column=Sequence(width=2, length=length), mean=(0.0, 0.0), std=(1.0, 1.0))
        sequences = manifest.model_copy(update={"columns": manifest.columns | {"input": column}})
        reasons[length] = why_not(described, sequences)
    assert reasons[2] is None
    assert reasons[None] is not None
    assert reasons[None][:2] == (
        "data",
        "the rows' input differ in length, so that those of several trials make no batch",
    )


def test_own_models_run_by_vmap(recipes, tmp_path):
    model = {"kind": "custom", "target": "tests.unit.nets:Linear"}
    described = recipes(*RATES[:2], {"train.seed": 4}, model=model)
    manifest = prepared(described[0].data).manifest
    assert groups(described) == [[0], [1], [2]]  # nobody knows without the data
    assert groups(described, manifest=manifest) == [[0, 1, 2]]
    assert not pays(described[0], manifest)
    check(described, tmp_path)


def test_small_nets_pay(recipes):
    nets = {"mlp": {"hidden": [512]}, "cnn": {"channels": [8]}, "alexnet": {}}
    small_images = prepared(recipes({}, data="images")[0].data).manifest
    image = small_images.columns["input"].model_copy(update={"column": Image(shape=(3, 28, 28))})
    images = small_images.model_copy(update={"columns": small_images.columns | {"input": image}})
    for kind, fields in nets.items():
        (small,) = recipes({}, data="images", model={"kind": kind, **fields})
        (large,) = recipes({"train.global_batch_size": 512}, data="images", model={"kind": kind, **fields})
        paying = pays(small, images), pays(large, images)
        assert paying == {"mlp": (True, True), "cnn": (True, False), "alexnet": (False, False)}[kind]


def test_a_group_that_is_none_is_refused(recipes, tmp_path):
    with pytest.raises(UserError, match="group them first"):
        fused(recipes({}, {"model.hidden": [9]}), runs(tmp_path, "fused", 2))


# -- the parts -------------------------------------------------------------------------------------------------------

SPECS = [
    [{"kind": "sgd"}, {"kind": "sgd", "momentum": 0.9, "weight_decay": 0.1}],
    [{"kind": "sgd", "lr": 0.2, "momentum": 0.5, "nesterov": True}, {"kind": "sgd", "lr": 0.1}],
    [{"kind": "adam", "lr": 0.1}, {"kind": "adam", "lr": 0.01, "betas": [0.5, 0.9], "weight_decay": 0.1}],
    [{"kind": "adamw", "lr": 0.1, "eps": 1e-3}, {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1}],
]


@pytest.mark.parametrize("pair", SPECS, ids=lambda pair: pair[0]["kind"])
def test_optimizers_equal_torchs(pair):
    specs: list[Any] = [validate(AnyOptimizerSpec, content) for content in pair]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, *shape, dtype=torch.float64, generator=generator) for shape in ((4, 3), (4,))]
    specs = [specs[0], specs[1], specs[0]]
    stacks = {str(number): stack.clone().requires_grad_() for number, stack in enumerate(start)}
    together_ = FusedOptimizers(specs, stacks)
    apart = [[nn.Parameter(stack[place].clone()) for stack in start] for place in range(3)]
    optimizers = [spec.build(own) for spec, own in zip(specs, apart, strict=True)]
    places = [0, 1, 2]
    for step in range(6):
        if step == 3:  # the first leaves
            places = [1, 2]
            stacks = {name: stack.detach()[1:].clone().requires_grad_() for name, stack in stacks.items()}
            together_ = together_.kept([1, 2], stacks)
        factor = 1 / (step + 1)
        together_.zero_grad()
        gradients = [torch.randn(3, *stack.shape[1:], dtype=torch.float64, generator=generator) for stack in start]
        for stack, gradient in zip(stacks.values(), gradients, strict=True):
            stack.grad = gradient[places].clone()
        together_.step(factor)
        for place in places:
            for parameter, gradient in zip(apart[place], gradients, strict=True):
                parameter.grad = gradient[place].clone()
            optimizers[place].param_groups[0]["lr"] = specs[place].lr * factor
            optimizers[place].step()
    for number, place in enumerate(places):
        for stack, parameter in zip(stacks.values(), apart[place], strict=True):
            torch.testing.assert_close(stack[number].detach(), parameter.detach(), rtol=1e-12, atol=1e-14)
        ours, theirs = together_.state_dict(number), optimizers[place].state_dict()
        close(ours, theirs)
        assert together_.rates()[number] == theirs["param_groups"][0]["lr"]


@pytest.mark.parametrize("quick", [True, False], ids=["oneDNN", "bmm"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared rows", "own rows"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_batched_linear_layer_is_torchs(quick, shared, bias, monkeypatch):
    if quick and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(fused_layers, "ONEDNN_WORK", 0 if quick else 10**12)
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Sequential(nn.Linear(5, 4, bias=bias), nn.Linear(4, 6, bias=bias)) for _ in range(3)]
    template = copy.deepcopy(layers[0])
    fused_layers.widen(template)
    weights, _ = torch.func.stack_module_state(layers)  # type: ignore[arg-type]
    x = torch.randn(7, 5 if shared else 15, generator=generator, requires_grad=True)
    y = torch.func.functional_call(template, weights, (x,))
    own = [x] * 3 if shared else x.chunk(3, 1)
    expected = torch.stack([layer(rows).t() for layer, rows in zip(layers, own, strict=True)])
    torch.testing.assert_close(y, expected)
    wanted = torch.randn(y.shape, generator=generator)
    inputs = [x, *(parameter for layer in layers for parameter in layer.parameters())]
    theirs = torch.autograd.grad((expected * wanted).sum(), inputs)
    ours = torch.autograd.grad((y * wanted).sum(), [x, *weights.values()])
    torch.testing.assert_close(ours[0], theirs[0])
    stride = len(weights)
    for number, gradient in enumerate(ours[1:]):
        torch.testing.assert_close(gradient, torch.stack(theirs[1 + number :: stride]))


@pytest.mark.parametrize("shared", [True, False], ids=["shared rows", "own rows"])
@pytest.mark.parametrize("data", ["images", "numbers"])
def test_wide_layers_compute_what_vmap_does(data, shared, recipes):
    model = {"kind": "mlp", "hidden": [8, 5], "batch_norm": True}
    if data == "images":
        model = {"kind": "cnn", "channels": [4, 6], "pooling": "average", "batch_norm": True}
    described = recipes(*[{"train.seed": seed} for seed in range(3)], data=data, model=model)
    manifest = splits_of(described[0]).manifest
    generator = torch.Generator().manual_seed(0)
    lead = (6,) if shared else (6, 3)
    inputs = torch.randn(*lead, *manifest.signature.input_shape, generator=generator)
    targets = torch.randint(0, 3, lead, generator=generator)
    if data == "numbers":
        targets = torch.randn(*lead, manifest.signature.num_outputs, generator=generator)
    batch = batch_of(input=inputs, target=targets)
    found = []
    for wide in (True, False):
        batched = FusedModel(described, manifest.signature, device=CPU, wide=wide)
        losses, metrics = batched.measure(batch, shared=shared)
        losses.sum().backward()
        gradients = [weight.grad for weight in batched.parameters.values()]
        after = batched.evaluate(batch, averaged=False) if shared else None  # with the running statistics
        found.append([losses.detach(), metrics, gradients, batched.buffers, after])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)  # float32, sums in another order


def test_losses_are_the_sums_of_torchs_cross_entropy(recipes):
    described = recipes({"objective.label_smoothing": 0.1}, {"objective.label_smoothing": 0.4, "train.seed": 1})
    model = FusedModel(described, splits_of(described[0]).manifest.signature, device=CPU)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(9, 4, generator=generator), torch.tensor([0, 1, 2] * 3)
    losses, metrics = model.measure(batch_of(input=inputs, target=targets), shared=True)
    for number, recipe in enumerate(described):
        torch.manual_seed(recipe.train.seed)
        outputs = recipe.model.build(splits_of(recipe).manifest.signature)(inputs)
        smoothing = recipe.objective.label_smoothing  # type: ignore[union-attr]
        expected = F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=smoothing)
        assert losses[number].item() == pytest.approx(expected.item(), rel=1e-6)
        assert metrics[number].tolist() == [(outputs.argmax(1) == targets).sum().item()]
    np.testing.assert_array_equal(model.finite(), [True, True])
