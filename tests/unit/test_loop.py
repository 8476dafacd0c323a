"""The loop: it computes what a plain loop computes, survives any interruption, and keeps the best weights."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import SessionLog
from torch import nn
from torch.optim import lr_scheduler

import cluster
from cluster.data.keys import digest_part, digest_text
from cluster.data.manifest import Manifest
from cluster.data.order import training_order
from cluster.data.prepare import prepare, prepared
from cluster.data.rows import Rows
from cluster.data.scaling import Scaling
from cluster.data.sources.prepared import ShardsSpec
from cluster.errors import Diverged
from cluster.recipe.fit import check
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training import loop
from cluster.training.checkpoints import Checkpoints, read_model, restore_model
from cluster.training.context import LocalContext
from cluster.training.events import Events
from cluster.training.journal import Journal
from cluster.training.loop import fit
from cluster.training.run_directory import RunDirectory, read_metrics
from cluster.training.splits import open_splits
from nn_models.errors import UserError
from tests.unit import made
from tests.unit.event_files import events

pytestmark = [
    pytest.mark.filterwarnings("error"),
    # torch's own, while it traces a checkpoint or a compiled graph
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

CPU = torch.device("cpu")
ROWS = 200  # 160 of them to train on: 8 steps of 20
SGD = {"kind": "sgd", "lr": 0.1, "momentum": 0.9}
CLOCKS = {"time_s", "rows_per_s"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Data sections: 160 training rows each."""
    folder = tmp_path_factory.mktemp("files")
    specs = {
        "features": made.features(folder / "features", ROWS),
        "numbers": made.features(folder / "numbers", ROWS, target="number"),
        "images": made.images(folder / "images", ROWS),
        "train only": made.features(folder / "train", ROWS, validation_fraction=0, test_fraction=0),
        "no test": made.features(folder / "test", ROWS, test_fraction=0),
        "no validation": made.features(folder / "validation", ROWS, validation_fraction=0),
        "five": made.features(folder / "five", 5, validation_fraction=0, test_fraction=0),
    }
    return {name: spec.model_dump(exclude_defaults=True) | {"kind": "parquet"} for name, spec in specs.items()}


@pytest.fixture
def recipe(files):
    """A small recipe, changed as it is told: `recipe(model={…}, train={…}, data="images")`."""

    def make(data: str = "features", *, window: int | None = None, **sections: dict[str, Any]) -> Recipe:
        train = {"epochs": 3, "global_batch_size": 20, "log_every_steps": 1} | sections.pop("train", {})
        content = {
            "model": {"kind": "mlp", "hidden": [8], "activation": "tanh"},
            "data": files[data] | ({"shuffle_window": window} if window else {}),
            "optimizer": SGD,
            "train": train,
        }
        if data == "numbers":
            content["objective"] = {"kind": "regression"}
        return load_recipe(content | sections)

    return make


@pytest.fixture
def run(tmp_path):
    """Fits a recipe; returns (what `fit` returned, the run's directory)."""

    def fitted(recipe: Recipe, name: str = "run") -> tuple[dict[str, Any], Path]:
        return fit(recipe, context=context(recipe, tmp_path / name)), tmp_path / name

    return fitted


def context(recipe: Recipe, path: Path) -> LocalContext:
    splits = open_splits(prepared(recipe.data), window=recipe.data.shuffle_window)
    check(recipe, splits.manifest)
    return LocalContext(run=Folder(path), splits=splits, device=CPU)


def custom(name: str, **arguments: Any) -> dict[str, Any]:
    return {"kind": "custom", "target": f"tests.unit.nets:{name}", "arguments": arguments}


def newest(path: Path) -> dict[str, Any]:
    state = Checkpoints(Folder(path / "checkpoints"), keep=1).newest()
    assert state is not None
    return state


def lines(path: Path, split: str | None = None) -> list[dict[str, Any]]:
    return [line for line in read_metrics(RunDirectory(str(path))) if split in (None, line["split"])]


def step_losses(path: Path) -> list[float]:
    return [line["loss"] for line in lines(path, "train") if "rows_digest" not in line]


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def timeless(value: Any) -> Any:
    """Without what a clock has measured."""
    if isinstance(value, dict):
        left_out = CLOCKS | {"train_s", "saved_at", "first_step_at"}
        return {key: timeless(inner) for key, inner in value.items() if key not in left_out}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


# -- the same as a plain loop ----------------------------------------------------------------------------------------


def scaled(manifest: Manifest, rows: Rows, name: str = "input") -> torch.Tensor:
    """The rows' inputs, or targets, as a model reads them."""
    stored = torch.from_numpy(np.array(rows.columns[name].values))
    return Scaling(manifest.columns, "standard", CPU)({name: stored})[name]


class Plain:
    """A loop as anybody would write it, over the same order of rows."""

    def __init__(self, recipe: Recipe) -> None:
        data = prepared(recipe.data)
        self.recipe, self.manifest = recipe, data.manifest
        rows = made.split_rows(data, "train")
        self.inputs = scaled(data.manifest, rows)
        self.targets = scaled(data.manifest, rows, "target")
        train = recipe.train
        self.order = training_order(
            data.manifest, global_batch_size=train.global_batch_size, seed=train.seed, window=recipe.data.shuffle_window
        )
        torch.manual_seed(train.seed)
        self.model = recipe.model.build(data.manifest.signature)
        self.untrained = copy.deepcopy(self.model.state_dict())
        self.losses: list[float] = []
        self.weights: list[dict[str, torch.Tensor]] = []  # after each step

    def train(self, optimizer: torch.optim.Optimizer, schedule=None, clip_norm: float | None = None) -> "Plain":
        for epoch in range(self.recipe.train.epochs):
            for step in range(self.order.num_steps):
                ids = torch.from_numpy(self.order.rows(epoch, step, 0, 1))
                optimizer.zero_grad()
                outputs = self.model(self.inputs[ids])
                if self.targets.dtype == torch.int64:
                    loss = nn.functional.cross_entropy(outputs, self.targets[ids], reduction="sum")
                else:
                    error = nn.functional.mse_loss(outputs, self.targets[ids], reduction="sum")
                    loss = error / self.targets.shape[1]
                (loss * (1 / len(ids))).backward()  # the mean, rounded as the loop rounds it
                if clip_norm:
                    nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
                optimizer.step()
                if schedule:
                    schedule.step()
                self.losses.append(loss.item() / len(ids))
                self.weights.append(copy.deepcopy(self.model.state_dict()))
        return self

    def sgd(self, **options) -> "Plain":
        return self.train(torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9), **options)


@pytest.mark.parametrize("data", ["features", "images", "numbers"])
@pytest.mark.parametrize("window", [None, 50], ids=["held", "streamed"])
def test_equals_a_plain_loop_bit_for_bit(data, window, recipe, run):
    described = recipe(data, window=window)
    plain = Plain(described).sgd()
    result, path = run(described)
    assert result["steps"] == len(plain.losses) == 3 * plain.order.num_steps
    assert step_losses(path) == plain.losses
    assert same(newest(path)["model"], plain.weights[-1])


def test_the_epochs_line_sums_up_its_rows(recipe, run):
    described = recipe()
    _, path = run(described)
    order = Plain(described).order
    for epoch, line in enumerate(entry for entry in lines(path, "train") if "rows_digest" in entry):
        steps = lines(path, "train")[epoch * 9 : epoch * 9 + 8]
        assert line["loss"] == pytest.approx(sum(step["loss"] for step in steps) / 8, rel=1e-12)  # 20 rows each
        digest = sum(digest_part(order.rows(epoch, step, 0, 1), order.start(epoch, step, 0, 1)) for step in range(8))
        assert line["rows_digest"] == digest_text(digest)
        assert (line["step"], line["epoch"], line["end_of_epoch"]) == (8 * epoch + 8, epoch, True)


def test_clipping_equals_a_plain_loop(recipe, run):
    described = recipe(train={"clip_norm": 0.05})
    plain = Plain(described).sgd(clip_norm=0.05)
    _, path = run(described)
    assert same(newest(path)["model"], plain.weights[-1])
    norms = [line["grad_norm"] for line in lines(path, "train") if "grad_norm" in line]
    assert max(norms) > 0.05  # as it was before it was clipped
    unclipped = Plain(described).sgd()
    assert not same(unclipped.weights[-1], plain.weights[-1])


def test_recorded_norms_of_the_gradient_change_nothing_else(recipe, run):
    _, clipped = run(recipe(train={"clip_norm": 1e9}), "clipped")  # never reached: its norms are of the same steps
    _, recorded = run(recipe(train={"record_grad_norm": True}), "recorded")
    _, plain = run(recipe(), "plain")
    norms = {path: [line["grad_norm"] for line in lines(path, "train") if "grad_norm" in line] for path in
             (clipped, recorded, plain)}  # fmt: skip
    assert norms[recorded] == norms[clipped] != []
    assert norms[plain] == []
    assert same(newest(recorded)["model"], newest(plain)["model"])
    described = recipe(train={"record_grad_norm": True})
    assert described.deciding() == recipe().deciding()  # a run may be resumed with it, or without


@pytest.mark.parametrize("window", [None, 50], ids=["held", "streamed"])
def test_accumulation_changes_nothing_but_rounding(window, recipe, run):
    _, once = run(recipe(window=window), "once")
    _, thrice = run(recipe(window=window, train={"accumulation": 3}), "thrice")
    _, past_rows = run(recipe(window=window, train={"accumulation": 1000}), "past")
    for path in (thrice, past_rows):
        # float32 sums in another order, over 24 steps with momentum
        np.testing.assert_allclose(step_losses(path), step_losses(once), rtol=1e-4)
        for name, weight in newest(once)["model"].items():
            torch.testing.assert_close(newest(path)["model"][name], weight, rtol=1e-3, atol=1e-5)


def test_the_moving_average_is_what_is_evaluated_and_kept(recipe, run):
    described = recipe(train={"ema_decay": 0.9})
    plain = Plain(described).sgd()
    _, path = run(described)
    average = {name: weight.double() for name, weight in plain.untrained.items()}
    for updates, weights in enumerate(plain.weights):
        decay = min(0.9, (1 + updates) / (10 + updates))
        average = {name: decay * average[name] + (1 - decay) * weights[name].double() for name in average}
    state = newest(path)
    assert same(state["model"], plain.weights[-1])
    for name, weight in average.items():
        # float32 against float64 over 24 steps
        torch.testing.assert_close(state["average"][f"module.{name}"].double(), weight, rtol=1e-5, atol=1e-6)
    model = described.model.build(plain.manifest.signature)
    data = prepared(described.data)
    rows = made.split_rows(data, "validation")
    targets = torch.from_numpy(np.array(rows.columns["target"].values))
    found = {}
    for kind, weights in (("averaged", average), ("plain", plain.weights[-1])):
        model.load_state_dict({name: weight.float() for name, weight in weights.items()})
        outputs = model(scaled(data.manifest, rows))
        right = (outputs.argmax(1) == targets).float().mean().item()
        found[kind] = (-right, nn.functional.cross_entropy(outputs, targets).item())
    line = lines(path, "validation")[-1]
    assert line["weights"] == min(found, key=lambda kind: found[kind])  # equal accuracies are decided by the loss
    assert line["loss"] == pytest.approx(found[line["weights"]][1], rel=1e-4)  # float32


def test_bf16_runs_and_keeps_float32_weights(recipe, run):
    result, path = run(recipe(train={"precision": "bf16"}))
    assert {weight.dtype for weight in newest(path)["model"].values()} == {torch.float32}
    _, exact = run(recipe(), "fp32")
    losses = step_losses(path)
    assert losses != step_losses(exact)
    np.testing.assert_allclose(losses, step_losses(exact), rtol=0.05)  # eight bits of mantissa, 24 steps
    assert math.isfinite(result["metrics"]["test/loss"])


@pytest.mark.slow
def test_a_compiled_model_runs(recipe, run):
    result, path = run(recipe(train={"compile": True, "ema_decay": 0.5}))
    _, plain = run(recipe(train={"ema_decay": 0.5}), "plain")
    np.testing.assert_allclose(step_losses(path), step_losses(plain), rtol=1e-4)  # fused sums
    assert result["steps"] == 24


# -- schedules and optimizers ----------------------------------------------------------------------------------------


def torchs(kind: str, optimizer: torch.optim.Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    if kind == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=0.1 * 0.2)
    if kind == "linear":
        return lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.2, total_iters=steps)
    if kind == "step":
        return lr_scheduler.StepLR(optimizer, step_size=steps // 3, gamma=0.5)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


SCHEDULES = {
    "constant": {"kind": "constant"},
    "cosine": {"kind": "cosine", "final": 0.2},
    "linear": {"kind": "linear", "final": 0.2},
    "step": {"kind": "step", "gamma": 0.5, "num_drops": 2},
}


@pytest.mark.parametrize("warmup", [0, 6])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_is_torchs(kind, warmup, recipe, run):
    described = recipe(schedule=SCHEDULES[kind] | {"warmup_steps": warmup})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torchs(kind, optimizer, 24 - warmup)
    if warmup:
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        schedule = lr_scheduler.SequentialLR(optimizer, [rise, schedule], [warmup])
    rates = []
    for _ in range(24):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    _, path = run(described)
    ours = [line["learning_rate"] for line in lines(path, "train") if "learning_rate" in line]
    np.testing.assert_allclose(ours, rates, rtol=1e-9)  # torch multiplies step by step, in float64


def test_the_rate_drops_at_equal_parts():
    schedule = load_recipe(
        {"model": {"kind": "mlp"}, "data": {"kind": "digits"}, "schedule": {"kind": "step", "num_drops": 99}}
    ).schedule
    drops = [round(math.log10(schedule.factor(step, 100))) for step in range(100)]
    assert drops == [-step for step in range(100)]


def test_a_warm_up_may_be_longer_than_the_run(recipe, run):
    _, path = run(recipe(schedule={"kind": "cosine", "warmup_steps": 99}))
    rates = [line["learning_rate"] for line in lines(path, "train") if "learning_rate" in line]
    np.testing.assert_allclose(rates, [0.1 * (step + 1) / 100 for step in range(24)], rtol=1e-12)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "eps": 1e-6, "momentum": 0.5, "weight_decay": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05, "eps": 1e-8, "weight_decay": 0.01}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_is_torchs(kind, recipe, run):
    optimizer, options = OPTIMIZERS[kind]
    described = recipe(optimizer={"kind": kind} | options, train={"epochs": 1})
    plain = Plain(described)
    plain.train(optimizer(plain.model.parameters(), **options))
    _, path = run(described)
    for name, weight in plain.weights[-1].items():
        # float32; the fused step of adam rounds otherwise
        torch.testing.assert_close(newest(path)["model"][name], weight, rtol=1e-4, atol=1e-6)


# -- the end of a run ------------------------------------------------------------------------------------------------


def test_patience_ends_a_run_that_does_not_improve(recipe, run):
    result, _ = run(recipe(optimizer={"kind": "sgd", "lr": 1e-30}, train={"epochs": 50, "patience": 2}))
    assert result["stopped_early"]
    assert (result["epochs"], result["best"]["epoch"]) == (3, 1)
    assert result["checkpoint"] == "checkpoints/step-0000000024.pt"
    again, _ = run(recipe(optimizer={"kind": "sgd", "lr": 1e-30}, train={"epochs": 50, "patience": 2}))
    assert timeless(again) == timeless(result)  # resumed, it finds that it is done


def test_the_best_weights_are_kept_and_not_the_last(recipe, run):
    described = recipe(model=custom("Worsening", step=10), train={"epochs": 4, "keep_checkpoints": 10})
    result, path = run(described)
    accuracies = [line["accuracy"] for line in lines(path, "validation")]
    assert accuracies[0] > max(accuracies[1:])
    best, validation = dict(result["best"]), lines(path, "validation")[0]
    figures = best.pop("metrics")
    assert best == {
        "metric": "validation/accuracy",
        "value": accuracies[0],
        "loss": validation["loss"],
        "epoch": 1,
        "step": 8,
    }
    assert figures.items() >= {f"validation/{name}": validation[name] for name in ("accuracy", "loss")}.items()
    checkpoints = sorted((path / "checkpoints").iterdir())
    assert [file.name for file in checkpoints] == [f"step-{8 * epoch:010d}.pt" for epoch in (1, 2, 3, 4)]
    first = torch.load(checkpoints[0], weights_only=True)["model"]
    assert same(load_file(path / "model/model.safetensors"), first)
    model, saved = restore_model(Folder(path), described)
    assert same(dict(model.state_dict()), first)
    assert not model.training
    assert saved.best == result["best"]
    assert saved.manifest.class_names == ("0", "1", "2")


def test_of_equal_accuracies_the_smaller_loss_is_best(recipe, run):
    result, path = run(recipe(train={"epochs": 6}))
    validation = lines(path, "validation")
    best = min(validation, key=lambda line: (-line["accuracy"], line["loss"]))
    assert (result["best"]["epoch"], result["best"]["loss"]) == (best["epoch"] + 1, best["loss"])


def test_only_the_newest_checkpoints_are_kept(recipe, run):
    _, path = run(recipe(train={"epochs": 2, "checkpoint_every_steps": 3, "keep_checkpoints": 3}))
    assert [file.name for file in sorted((path / "checkpoints").iterdir())] == [
        "step-0000000012.pt",
        "step-0000000015.pt",
        "step-0000000016.pt",
    ]


@pytest.mark.parametrize(
    ("data", "splits", "best"),
    [
        ("features", {"train", "validation", "test"}, "validation/accuracy"),
        ("no test", {"train", "validation"}, "validation/accuracy"),
        ("no validation", {"train", "test"}, "train/accuracy"),
        ("train only", {"train"}, "train/accuracy"),
        ("numbers", {"train", "validation", "test"}, "validation/loss"),
    ],
)
def test_whatever_splits_there_are(data, splits, best, recipe, run):
    result, path = run(recipe(data))
    assert {name.split("/")[0] for name in result["metrics"]} == splits
    assert result["best"]["metric"] == best
    assert {line["split"] for line in lines(path)} == splits
    assert (path / "evaluation.safetensors").exists() == ("test" in splits)
    assert read_model(Folder(path)).best == result["best"]


def test_regression_learns(recipe, run):
    described = recipe("numbers", model={"kind": "mlp", "hidden": []}, train={"epochs": 20})
    result, path = run(described)
    names = ("loss", "mse", "mae")
    tested = ("r2", "mean_mse", "mean_mae", "linear_mse", "linear_mae")
    assert list(result["metrics"]) == [
        *(f"{split}/{name}" for split in ("train", "validation") for name in names),
        *(f"test/{name}" for name in (*names, *tested)),
    ]
    assert result["metrics"]["test/loss"] < 0.05
    data = prepared(described.data)
    rows = made.split_rows(data, "test")
    model, saved = restore_model(Folder(path), described)
    with torch.no_grad():
        standardised = model(scaled(saved.manifest, rows))
    outputs = Scaling(saved.manifest.columns, "standard", CPU).inverse("target", standardised).numpy()
    targets = rows.columns["target"].values
    assert result["metrics"]["test/mae"] == pytest.approx(np.abs(outputs - targets).mean(), rel=1e-5)  # float32
    evidence = load_file(path / "evaluation.safetensors")
    np.testing.assert_array_equal(evidence["example_targets"], targets[:20])


def test_classification_leaves_evidence(recipe, run):
    result, path = run(recipe("images"))
    evidence = load_file(path / "evaluation.safetensors")
    assert evidence["confusion"].sum() == 20
    assert evidence["confusion"].diag().sum() / 20 == result["metrics"]["test/accuracy"]
    assert evidence["example_inputs"].dtype == torch.uint8
    assert evidence["example_inputs"].shape[1:] == (3, 6, 5)


def test_many_classes_have_no_confusion_matrix(tmp_path, run):
    table = pa.table({"x": np.arange(3000, dtype=np.float32), "y": np.arange(3000) % 1500})
    pq.write_table(table, tmp_path / "many.parquet")
    described = load_recipe(
        {
            "model": {"kind": "mlp", "hidden": []},
            "data": {"kind": "parquet", "path": str(tmp_path / "many.parquet"), "input": "x", "target": "y"},
            "train": {"epochs": 1, "global_batch_size": 1000},
        }
    )
    _, path = run(described)
    evidence = load_file(path / "evaluation.safetensors")
    assert "confusion" not in evidence
    assert evidence["example_predictions"].dtype == torch.int64


@pytest.mark.parametrize("batch", [1, 4, 5, 1000])
def test_five_rows(batch, recipe, run):
    result, _ = run(recipe("five", train={"global_batch_size": batch, "log_every_steps": 10**12}))
    assert result["steps"] == 3 * math.ceil(5 / batch)


def test_a_custom_model(recipe, run):
    described = recipe("images", model=custom("Linear", scale=0.5))
    plain = Plain(described).sgd()
    _, path = run(described)
    assert same(newest(path)["model"], plain.weights[-1])


def test_a_model_with_shared_weights_that_are_not_contiguous(recipe, run):
    described = recipe(model=custom("Strided"))
    result, path = run(described)
    model, _ = restore_model(Folder(path), described)
    assert torch.equal(model.weight, model.same)
    assert result["metrics"]["test/accuracy"] > 0.5


@pytest.mark.parametrize("interval", [1, 4, 5])  # of 8 steps an epoch: with and without one that ends with it
def test_events_for_tensorboard(interval, recipe, run):
    _, path = run(recipe(train={"epochs": 2, "log_every_steps": interval}))
    (file,) = (path / "events").iterdir()
    assert "tfevents" in file.name  # by which TensorBoard finds it
    told = {}
    for event in events(file):
        for value in event.summary.value:
            assert (value.tag, event.step) not in told  # no two values at one step
            told[value.tag, event.step] = value.simple_value

    def tag(line: dict[str, Any]) -> str:
        return "train_interval" if line["split"] == "train" and "rows_digest" not in line else line["split"]

    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [step for name, step in told if name == "train/loss"] == [8, 16]
    assert told == {
        (f"{tag(line)}/{name}", line["step"]): np.float32(value)
        for line in lines
        for name, value in line.items()
        if isinstance(value, float) and name != "time_s"
    }


def test_events_of_a_run_that_goes_on_are_in_a_file_of_their_own(tmp_path):
    for step in (5, 3):
        written = Events(tmp_path, purge_step=step)
        written.add(step, {"train/loss": float(step)})
        written.close()
    found = [list(events(file)) for file in tmp_path.iterdir()]
    assert sorted(told[1].step for told in found) == [3, 5]
    assert all(told[0].file_version == "brain.Event:2" for told in found)
    assert all(told[1].session_log.status == SessionLog.START for told in found)


# -- what others do to a run -------------------------------------------------------------------------------------------


def interrupted(described: Recipe, path: Path) -> None:
    """A run of which checkpoints and the best weights are there, and no result."""
    cluster.train(described, run=str(path))
    (path / "result.json").unlink()


def test_two_drivers_do_not_write_one_run(recipe, tmp_path):
    described, path = recipe(train={"epochs": 2}), tmp_path / "run"
    interrupted(described, path)
    with (
        Folder(path).claimed(),
        pytest.raises(UserError, match="another process is at work here; wait for it, or stop"),
    ):
        cluster.train(described, run=str(path), resume=True)
    assert cluster.train(described, run=str(path), resume=True).status == "finished"


def test_a_run_whose_model_was_deleted_goes_on(recipe, tmp_path, caplog):
    described, path = recipe(train={"epochs": 3}), tmp_path / "run"
    interrupted(described, path)
    (path / "model" / "model.safetensors").unlink()
    checkpoints = Checkpoints(Folder(path / "checkpoints"), keep=1)
    checkpoints.folder.delete(checkpoints.names()[-1])
    outcome = cluster.train(described, run=str(path), resume=True)
    assert outcome.result["best"]["epoch"] == 3  # the only one since
    assert "the best weights are gone" in caplog.text


@pytest.mark.parametrize("content", ["[1, 2]", "{}", '{"status": '])
def test_a_damaged_result_is_named(content, recipe, tmp_path):
    described, path = recipe(train={"epochs": 1}), tmp_path / "run"
    interrupted(described, path)
    (path / "result.json").write_text(content)
    with pytest.raises(UserError, match=r"result.json: .*restore it, or delete it"):
        cluster.train(described, run=str(path), resume=True)


def test_a_sweep_is_not_resumed_as_a_run(recipe, tmp_path):
    described, path = recipe(train={"epochs": 1}), tmp_path / "run"
    space = {"space": {"optimizer.lr": {"grid": [0.1, 0.2]}}, "searcher": "grid"}
    content = described.model_dump(mode="json") | {"sweep": space}
    RunDirectory(str(path)).begin(load_recipe(content), {})
    with pytest.raises(UserError, match="is a sweep, not a run; continue it with manta sweep"):
        cluster.train(described, run=str(path), resume=True)


# -- divergence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "step", "what"),
    [
        ("NaNLoss", 13, "the loss became NaN or infinite at step 13 (epoch 2)"),
        ("NaNLoss", 9, "the loss became NaN or infinite at step 9 (epoch 2)"),
        ("InfiniteGradient", 13, "the loss became NaN or infinite at step 14 (epoch 2)"),
        ("InfiniteGradient", 12, "the weights became NaN or infinite at step 12 (epoch 2)"),  # a checkpoint is due
        ("InfiniteGradient", 16, "the weights became NaN or infinite at step 16 (epoch 2)"),  # the epoch's last
        ("NaNEvaluation", 16, "the validation loss became NaN or infinite at step 16 (epoch 2)"),
    ],
)
@pytest.mark.parametrize("interval", [1, 50])
def test_divergence_names_the_step_and_keeps_the_good_state(net, step, what, interval, recipe, tmp_path):
    described = recipe(
        model=custom(net, step=step), train={"log_every_steps": interval, "checkpoint_every_steps": 6, "epochs": 5}
    )
    where = context(described, tmp_path / "run")
    with pytest.raises(Diverged) as caught:
        fit(described, context=where)
    assert str(caught.value).startswith(what + "; lower optimizer.lr (now 0.1), set train.clip_norm")
    state = newest(tmp_path / "run")
    assert state["progress"]["step"] == (12 if step > 12 else 8)
    assert all(weight.isfinite().all() for weight in state["model"].values())
    saved = read_model(Folder(tmp_path / "run"))
    assert saved.best["step"] == 8
    assert all(weight.isfinite().all() for weight in saved.weights.values())


def test_a_rate_that_is_too_large_diverges_where_a_plain_loop_does(recipe, tmp_path):
    described = recipe("numbers", model={"kind": "mlp", "hidden": []}, optimizer={"kind": "sgd", "lr": 1e6})
    plain = Plain(described)
    plain.train(torch.optim.SGD(plain.model.parameters(), lr=1e6))
    step = next(number for number, loss in enumerate(plain.losses, 1) if not math.isfinite(loss))
    with pytest.raises(Diverged, match=rf"at step {step} \(epoch 1\)"):
        fit(described, context=context(described, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


# -- interruption and resuming ---------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """What a kill looks like from inside."""


def interrupt(monkeypatch, step: int) -> None:
    """The next `fit` ends while it takes this step."""
    whole = Journal.stepped

    def stepping(self, *steps):
        if self.progress.step + 1 == step:
            monkeypatch.setattr(Journal, "stepped", whole)
            raise Interrupted
        whole(self, *steps)

    monkeypatch.setattr(Journal, "stepped", stepping)


ADAM = {"kind": "adamw", "lr": 0.01}
EVERYTHING = {  # that a checkpoint must hold
    "model": {"kind": "mlp", "hidden": [8], "dropout": 0.3, "batch_norm": True},
    "schedule": {"kind": "cosine", "warmup_steps": 3},
    "train": {"ema_decay": 0.8, "checkpoint_every_steps": 3, "clip_norm": 1.0, "accumulation": 2},
}


@pytest.mark.parametrize(
    ("window", "optimizer", "interval"),
    [(None, SGD, 1), (50, SGD, 4), (None, ADAM, 4), (50, ADAM, 1)],
    ids=["held-sgd", "streamed-sgd", "held-adamw", "streamed-adamw"],
)
def test_a_run_that_was_interrupted_ends_like_one_that_was_not(
    window, optimizer, interval, recipe, run, tmp_path, monkeypatch
):
    train = EVERYTHING["train"] | {"log_every_steps": interval, "epochs": 2}
    described = recipe(window=window, **EVERYTHING | {"train": train, "optimizer": optimizer})
    whole, undisturbed = run(described, "whole")
    assert whole["steps"] == 16
    for steps in ((1,), (2, 8, 9), (12, 12, 15), (16,)):
        path = tmp_path / f"interrupted-{steps}"
        for step in steps:
            interrupt(monkeypatch, step)
            with pytest.raises(Interrupted):
                fit(described, context=context(described, path))
        result = fit(described, context=context(described, path))
        assert timeless(result) == timeless(whole)
        assert timeless(lines(path)) == timeless(lines(undisturbed))
        state, other = newest(path), newest(undisturbed)
        assert same(timeless(state["progress"]) | {"time_s": 0}, timeless(other["progress"]) | {"time_s": 0})
        for part in ("model", "optimizer", "average", "generators"):
            assert same(state[part], other[part]), part
        assert same(read_model(Folder(path))._asdict(), read_model(Folder(undisturbed))._asdict())


def test_a_finished_run_that_is_resumed_changes_nothing(recipe, run):
    result, path = run(recipe())
    before = lines(path), newest(path)
    again, _ = run(recipe())
    assert timeless(again) == timeless(result)
    assert lines(path)[:-1] == before[0][:-1]
    assert timeless(lines(path)[-1]) == timeless(before[0][-1])  # the test is done anew
    assert same(newest(path), before[1])


def test_more_epochs_go_on_where_fewer_ended(recipe, run):
    _, path = run(recipe(train={"epochs": 2}))
    run(recipe(train={"epochs": 4}))
    _, straight = run(recipe(train={"epochs": 4}), "straight")
    assert same(newest(path)["model"], newest(straight)["model"])
    assert step_losses(path) == step_losses(straight)


def test_the_best_weights_may_be_newer_than_the_checkpoint(recipe, run):
    _, path = run(recipe(train={"epochs": 4, "keep_checkpoints": 10}))
    saved = read_model(Folder(path))
    for file in sorted((path / "checkpoints").iterdir())[1:]:
        file.unlink()
    assert newest(path)["progress"]["best"]["step"] < saved.best["step"]
    # the epochs that follow come to worse figures than they came to before
    result, _ = run(recipe(train={"epochs": 4}, optimizer=SGD | {"lr": 1e-12, "momentum": 0}))
    assert result["best"] == saved.best
    assert same(read_model(Folder(path))._asdict(), saved._asdict())


def test_a_line_that_a_kill_cut_short_is_dropped(recipe, run, monkeypatch, tmp_path):
    described = recipe(train={"checkpoint_every_steps": 3})
    interrupt(monkeypatch, 12)
    with pytest.raises(Interrupted):
        run(described)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 12, "spl')
    assert len(read_metrics(RunDirectory(str(tmp_path / "run")))) == 13  # 11 steps, the epoch's, its validation
    run(described)
    _, undisturbed = run(described, "undisturbed")
    assert timeless(lines(tmp_path / "run")) == timeless(lines(undisturbed))


# -- bad checkpoints -------------------------------------------------------------------------------------------------


class Malicious:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def unfinished(recipe, tmp_path, monkeypatch):
    """(recipe, directory) of a run with two checkpoints that was interrupted."""
    described = recipe(train={"checkpoint_every_steps": 3})
    interrupt(monkeypatch, 12)
    with pytest.raises(Interrupted):
        fit(described, context=context(described, tmp_path / "run"))
    return described, tmp_path / "run"


def refusal(described: Recipe, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        fit(described, context=context(described, path))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped", "other", "malicious"])
def test_a_bad_checkpoint_is_named_and_runs_nothing(damage, unfinished, tmp_path):
    described, path = unfinished
    file = path / "checkpoints" / "step-0000000009.pt"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_text("not a checkpoint")
    elif damage == "flipped":
        content[200] ^= 1
        file.write_bytes(content)
    elif damage == "other":
        torch.save(newest(path)["model"], file)
    else:
        torch.save({"progress": Malicious(tmp_path / "ran")}, file)
    message = refusal(described, path)
    assert message.startswith(f"{file}: damaged checkpoint (")
    assert message.endswith("delete it to resume from the one before, step-0000000008.pt")
    assert not (tmp_path / "ran").exists()
    file.unlink()
    result = fit(described, context=context(described, path))
    assert result["steps"] == 24


class SeesOther(LocalContext):
    """A rank that lists other files than rank 0, whose newest checkpoint is of step `newest`."""

    newest = 8

    def share(self, value):
        return self.newest if isinstance(value, int) else value


def test_all_ranks_resume_from_the_step_that_rank_0_sees(unfinished, monkeypatch):
    described, path = unfinished
    assert Checkpoints(Folder(path / "checkpoints"), keep=1).newest_step() == 9
    there = context(described, path)
    where = SeesOther(run=there.run, splits=there.splits, device=CPU)
    resumed = loop.Loop(described, where)
    resumed.close()
    assert resumed.progress.step == 8
    monkeypatch.setattr(SeesOther, "newest", 7)
    with pytest.raises(UserError, match=r"step-0000000007.pt: no such checkpoint here; .* that all nodes share"):
        loop.Loop(described, where)


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(unfinished):
    described, path = unfinished
    file = path / "checkpoints" / "step-0000000009.pt"
    file.unlink()
    file.mkdir()  # like one without permission, but for root as well
    message = refusal(described, path)
    assert message.startswith(f"{path}/checkpoints/step-0000000009.pt: cannot be read (")
    assert "delete" not in message


def test_checkpoints_that_are_no_folder(unfinished):
    described, path = unfinished
    (path / "checkpoints").rename(path / "elsewhere")
    (path / "checkpoints").write_text("")
    assert refusal(described, path).startswith(f"{path}/checkpoints: not a folder that can be read (")


def test_the_only_checkpoint_is_bad(unfinished):
    described, path = unfinished
    for file in (path / "checkpoints").iterdir():
        file.unlink()
    (path / "checkpoints" / "step-0000000009.pt").write_bytes(b"")
    assert refusal(described, path).endswith("delete it to resume from the beginning")


def test_checkpoints_of_another_model(unfinished, recipe):
    _, path = unfinished
    other = recipe(model={"kind": "mlp", "hidden": [9]})
    assert refusal(other, path) == f"{path}/checkpoints: checkpoints of another model; choose another --run"


def test_data_that_has_changed_since(unfinished, recipe, files, tmp_path):
    described, path = unfinished
    spec = made.features(tmp_path / "more", ROWS + 100)
    changed = described.model_copy(update={"data": spec})
    message = refusal(changed, path)
    assert "the data has changed since this run began, from 160 rows of 4 with 3 outputs to 240 rows" in message


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "header"])
def test_bad_weights_are_named(damage, recipe, run):
    described = recipe(train={"epochs": 1})
    _, path = run(described)
    file = path / "model" / "model.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        bad = {"truncated": content[:-10], "empty": b"", "header": (2).to_bytes(8, "little") + b"[]"}
        file.write_bytes(bad[damage])
    with pytest.raises(UserError, match=rf"{file}: (no model here|damaged \()"):
        restore_model(Folder(path), described)


def test_weights_of_another_recipe(recipe, run):
    _, path = run(recipe(train={"epochs": 1}))
    with pytest.raises(UserError, match=r"model.safetensors: not the weights of .*/model/recipe.yaml"):
        restore_model(Folder(path), recipe(model={"kind": "mlp", "hidden": [9]}))


# -- several ranks ---------------------------------------------------------------------------------------------------

RANKED = {
    # name: (data, window, sections)
    "whole": ("features", None, {}),
    "everything": ("numbers", 50, {"train": {"accumulation": 3, "clip_norm": 0.5, "ema_decay": 0.9}}),
    "small": ("five", None, {"train": {"global_batch_size": 2}}),  # batches of one and two rows, three ranks
}
SIZES = {"whole": 3, "everything": 2, "small": 3}


@pytest.fixture(scope="module")
def ranked(files, tmp_path_factory):
    """Directories of runs on 0 (no process group), 2 and 3 ranks, and of one that was killed; and the exit codes."""
    folder = tmp_path_factory.mktemp("ranked")

    def described(data: str, window: int | None, sections: dict[str, Any]) -> dict[str, Any]:
        train = {"epochs": 2, "global_batch_size": 20, "log_every_steps": 1} | sections.get("train", {})
        return {
            "model": sections.get("model", {"kind": "mlp", "hidden": [8], "activation": "tanh"}),
            "data": files[data] | ({"shuffle_window": window} if window else {}),
            "objective": {"kind": "regression" if data == "numbers" else "classification"},
            "optimizer": SGD,
            "train": train,
        }

    jobs = [
        {"recipe": described(*RANKED[name]), "run": str(folder / f"{name}-{size}"), "world_size": size}
        for name in RANKED
        for size in (0, SIZES[name])
    ]
    (folder / "buffers").mkdir()
    norm = {"model": custom("Normalised", folder=str(folder / "buffers"))}
    jobs.append({"recipe": described("features", None, norm), "run": str(folder / "norm"), "world_size": 2})
    # each start is killed in its own eleventh step of the 24, and the next one goes on with other ranks
    killed = {"model": custom("Killed", step=11), "train": {"checkpoint_every_steps": 3, "epochs": 3}}
    sizes = (0, 2, 3)
    jobs += [
        {"recipe": described("features", None, killed), "run": str(folder / "killed"), "world_size": n} for n in sizes
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.ranks", json.dumps(jobs)], stdout=subprocess.PIPE, text=True, timeout=400
    )
    assert done.returncode == 0
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("name", RANKED)
def test_ranks_compute_what_one_computes(name, ranked):
    folder, _ = ranked
    size = SIZES[name]
    alone, together = folder / f"{name}-0", folder / f"{name}-{size}"
    ours, theirs = lines(together), lines(alone)
    assert len(ours) == len(theirs) > 0
    for line, other in zip(ours, theirs, strict=True):
        for figure in ("step", "epoch", "split", "rows_digest", "learning_rate"):
            assert line.get(figure) == other.get(figure)
        # float32 sums in another order, at most 16 steps
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
    for name_, weight in newest(alone)["model"].items():
        torch.testing.assert_close(newest(together)["model"][name_], weight, rtol=1e-4, atol=1e-5)  # the same
    result = json.loads((together / "result.json").read_text())
    assert result["world_size"] == size
    assert result["steps"] == newest(alone)["progress"]["step"]


def test_ranks_evaluate_with_the_same_running_statistics(ranked):
    folder, _ = ranked
    # after both epochs, and the test; rank 0 alone then looks inside
    evaluations = sorted(int(file.name.split("-")[0]) for file in (folder / "buffers").glob("*-1.pt"))
    assert evaluations == [0, 1, 2]
    for number in evaluations:
        ranks = [torch.load(folder / "buffers" / f"{number}-{rank}.pt", weights_only=True) for rank in range(2)]
        assert same(ranks[0], ranks[1])
    best = read_model(Folder(folder / "norm"))
    tested = torch.load(folder / "buffers" / "2-0.pt", weights_only=True)
    assert same([best.weights["layers.1.running_mean"], best.weights["layers.1.running_var"]], tested)


def test_a_killed_run_goes_on_with_other_numbers_of_ranks(ranked, recipe, run):
    folder, codes = ranked
    assert codes[-3] == [9]
    assert 9 in codes[-2]  # the other rank may have seen its peer's death first
    assert codes[-1] == [0, 0, 0]
    model = custom("Killed", step=10**6)
    _, path = run(recipe(model=model, train={"checkpoint_every_steps": 3}))
    ours, theirs = lines(folder / "killed"), lines(path)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line.get("rows_digest") for line in ours] == [line.get("rows_digest") for line in theirs]
    np.testing.assert_allclose(step_losses(folder / "killed"), step_losses(path), atol=1e-5)  # float32 sums


# -- an object store -------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch):
    """s3:// in memory: a store that, unlike a disk, cannot append to a file."""
    fsspec = pytest.importorskip("fsspec")
    store = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
    from_uri = fs.FileSystem.from_uri

    def from_uri_or_memory(uri: str):
        return (store, uri.removeprefix("s3://")) if uri.startswith("s3://") else from_uri(uri)

    here = SimpleNamespace(**vars(fs) | {"FileSystem": SimpleNamespace(from_uri=from_uri_or_memory)})
    monkeypatch.setattr("cluster.storage.fs", here)
    yield "s3://bucket"
    Folder("s3://bucket").delete()


def test_a_run_in_an_object_store(bucket, recipe, run, tmp_path, monkeypatch):
    described = recipe(window=50, train={"checkpoint_every_steps": 3})
    described = described.model_copy(update={"data": shards(described, f"{bucket}/my data")})
    whole, undisturbed = run(described)
    where = context(described, tmp_path)
    where.run = Folder(f"{bucket}/my run")
    interrupt(monkeypatch, 14)
    with pytest.raises(Interrupted):
        fit(described, context=where)
    assert timeless(fit(described, context=where)) == timeless(whole)
    assert timeless(read_metrics(RunDirectory(where.run))) == timeless(lines(undisturbed))
    assert where.run.names() == ["checkpoints", "evaluation.safetensors", "events", "metrics.jsonl", "model"]
    assert same(read_model(where.run).weights, read_model(Folder(undisturbed)).weights)


def shards(described: Recipe, path: str) -> ShardsSpec:
    prepare(described.data, Folder(path))
    return ShardsSpec(path=path, shuffle_window=described.data.shuffle_window)
