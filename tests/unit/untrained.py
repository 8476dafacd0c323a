"""Runs of built-in recipes as they are before training: what needs a model's weights, and no good ones."""

from pathlib import Path

import torch

from cluster.data.manifest import Manifest
from cluster.data.prepare import prepared
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.checkpoints import save_model
from cluster.training.run_directory import RunDirectory
from tests.unit.shapes import SHAPES, manifest

BEST = {"metric": "train/loss", "value": 1.0, "loss": 1.0, "epoch": 0, "step": 0, "metrics": {"train/loss": 1.0}}


def builtin(folder: Path, name: str, **overrides) -> str:
    """A run of a built-in recipe whose data is here, or of another of the same shape."""
    recipe = load_recipe(name, overrides)
    if recipe.data.kind == "text":
        text = folder.parent / "input.txt"
        text.write_text("".join(chr(33 + number * number % 65) for number in range(50_000)))
        recipe = load_recipe(name, {**overrides, "data.path": str(text)})
    return run(folder, recipe, SHAPES.get(recipe.data.kind) or prepared(recipe.data).manifest)


def branching(folder: Path) -> str:
    """A run of a user's net in which the numbers decide what is computed."""
    model = {"kind": "custom", "target": "tests.unit.nets:Branching"}
    recipe = load_recipe({"model": model, "data": {"kind": "digits"}})
    return run(folder, recipe, manifest((1, 8, 8), dtype="uint8", num_outputs=10))


def run(folder: Path, recipe: Recipe, manifest: Manifest) -> str:
    """A run's directory with the model as it was drawn."""
    torch.manual_seed(0)
    model = recipe.model.build(manifest.signature)
    RunDirectory(str(folder)).write_start(recipe, {})
    save_model(Folder(folder), model.state_dict(), best=BEST, manifest=manifest)
    return str(folder)
