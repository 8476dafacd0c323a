"""Fused trials beside the same trials alone: what both leave behind, and whether it is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.data.prepare import prepared
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints, read_model
from cluster.training.context import LocalContext
from cluster.training.loop import fit
from cluster.training.run_directory import RunDirectory, read_metrics
from cluster.training.splits import Splits, open_splits
from cluster.tuning.fused.loop import FusedLoop
from nn_models.batch import Batch, Place

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order, 16 steps
CLOCKS = {"time_s", "rows_per_s", "train_s", "saved_at", "first_step_at"}


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
