"""What a run's best generator makes, from RUN/model alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.adversarial.halves import described, sample
from cluster.adversarial.quality import read_rows, restored_halves
from cluster.data.prepare import prepared
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.run_directory import RECIPE, RunDirectory
from nn_models.columns import Image, Label
from nn_models.errors import UserError, did_you_mean
from nn_models.signature import Signature

MOST_NUMBERS = 100_000_000  # that are made at once: 400 MB


@dataclass(frozen=True)
class Generated:
    """Rows that a generator made: (rows, *input_shape), images in [-1, 1]; also the images that they go by."""

    made: Tensor
    given: Tensor | None = None  # the images they were made from
    true: Tensor | None = None  # and those they should be
    num_classes: int | None = None  # where labels are given: so many come in turn


def generate(
    run: str, *, num: int, label: str | None = None, seed: int = 0, device: torch.device | None = None
) -> Generated:
    """`num` rows that the best generator of a run makes.

    `label` is the class that a conditional model shall make, by name or number; without one all classes come in turn.
    Models that start from an image are given the first ones of the test split. Raises UserError where the run has no
    generator, no such class, or too few images to start from, or where the rows would take too much memory.
    """
    folder = Folder(run)
    recipe = RunDirectory(folder).recipe(f"model/{RECIPE}")
    if recipe.model.gives != "halves":
        raise UserError(run, f"a {recipe.model.kind}, which generates nothing", "give the run of a GAN")
    halves, manifest = restored_halves(folder, recipe)
    model, signature = described(recipe)[0], manifest.signature
    given = signature[model.given] if model.given else None
    if label is not None and not isinstance(given, Label):
        raise UserError(
            "--label", f"{model.kind} makes rows without labels", "leave it out, or train a conditional_gan"
        )
    most = MOST_NUMBERS // signature.input_size
    if not 1 <= num <= most:
        raise UserError("--num", f"{num} rows of {signature.input_shape}; from 1 to {most} can be made at once")
    condition = images = true = num_classes = None
    if isinstance(given, Image):
        condition, true = _pairs(run, recipe, signature, num)
        images = condition
    elif isinstance(given, Label):
        num_classes = given.size if label is None else None
        classes = torch.arange(num) % given.size
        condition = classes if label is None else torch.full((num,), _class(label, given))
    source = torch.randn(num, model.noise_size, generator=torch.Generator().manual_seed(seed))
    device = device or torch.device("cpu")
    made = sample(halves.to(device).generator, source, condition, device=device, seed=seed)
    return Generated(made, images, true, num_classes)


def _pairs(run: str, recipe: Recipe, trained_on: Signature, num: int) -> tuple[Tensor, Tensor]:
    """The first images to start from of the recipe's data, and those that they are to become."""
    data, name = prepared(recipe.data), described(recipe)[0].given
    assert name is not None
    if any(data.manifest.signature.columns.get(column) != trained_on[column] for column in ("input", name)):
        raise UserError(run, f"{recipe.data.kind} no longer holds pairs of the size that this run was trained on")
    split = "test" if data.manifest.rows("test") else "validation"
    if num > data.manifest.rows(split):
        raise UserError(
            "--num", f"{num} images, but the {split} split has only {data.manifest.rows(split)} to start from"
        )
    rows = read_rows(data, split, num, recipe=recipe)
    return rows[name], rows["input"]


def _class(label: str, given: Label) -> int:
    names = list(given.names)
    if label in names:
        return names.index(label)
    if label.isdecimal() and int(label) < given.size:
        return int(label)
    raise UserError("--label", f"{label!r} is no class of this run's data", did_you_mean(label, names))
