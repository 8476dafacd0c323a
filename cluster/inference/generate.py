"""What a run's best generator makes, from RUN/model alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.adversarial.halves import described
from cluster.adversarial.quality import read_rows
from cluster.data.prepare import prepared
from cluster.runs.opened import Generator, open_model
from nn_models.errors import UserError


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
    model = open_model(run, device=device)
    if not isinstance(model, Generator):
        raise UserError(run, f"a {model.recipe.model.kind}, which generates nothing", "give the run of a GAN")
    condition = true = num_classes = None
    if model.starts and label is None:
        condition, true = _pairs(run, model, num)
    elif model.given is not None and label is None:
        num_classes = model.given.column.num_outputs
    made = model.made(num, label=label, condition=condition, seed=seed, path="--")
    return Generated(made, condition, true, num_classes)


def _pairs(run: str, model: Generator, num: int) -> tuple[Tensor, Tensor]:
    """The first rows to start from of the recipe's data, and those that they are to become."""
    recipe, trained_on = model.recipe, model.manifest.signature
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
