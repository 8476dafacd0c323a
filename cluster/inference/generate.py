"""What a run's best generator makes, and how good it is, from RUN/model alone."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.adversarial.halves import described, sample
from cluster.adversarial.quality import restored_halves
from cluster.data.manifest import Manifest
from cluster.data.prepare import prepared
from cluster.data.scaling import symmetric
from cluster.data.shards import some_rows
from cluster.storage import Folder
from cluster.training.run_directory import RECIPE, RunDirectory
from nn_models.errors import UserError, did_you_mean

MOST_NUMBERS = 100_000_000  # that are made at once: 400 MB


@dataclass(frozen=True)
class Generated:
    """Rows that a generator made: (rows, *input_shape), images in [-1, 1]; of paired models also what they go by."""

    made: Tensor
    given: Tensor | None = None  # the images they were made from
    true: Tensor | None = None  # and those they should be
    num_classes: int | None = None  # of conditional models: so many come in turn


def generate(
    run: str, *, num: int, label: str | None = None, seed: int = 0, device: torch.device | None = None
) -> Generated:
    """`num` rows that the best generator of a run makes.

    `label` is the class that a conditional model shall make, by name or number; without one all classes come in turn.
    Paired models are given the first images of the test split. Raises UserError where the run has no generator, no such
    class, or too few images to start from, or where the rows would take too much memory.
    """
    folder = Folder(run)
    recipe = RunDirectory(folder).recipe(f"model/{RECIPE}")
    if recipe.adversarial is None:
        raise UserError(run, f"a {recipe.model.kind}, which generates nothing", "give the run of a GAN")
    halves, manifest = restored_halves(folder, recipe)
    model = described(recipe)[0]
    if label is not None and not model.conditional:
        raise UserError(
            "--label", f"{model.kind} makes rows without labels", "leave it out, or train a conditional_gan"
        )
    most = MOST_NUMBERS // math.prod(manifest.input_shape)
    if not 1 <= num <= most:
        raise UserError("--num", f"{num} rows of {manifest.input_shape}; from 1 to {most} can be made at once")
    condition = given = true = num_classes = None
    if model.paired:
        data = prepared(recipe.data)
        if (data.manifest.input_shape, data.manifest.condition_shape) != (
            manifest.input_shape,
            manifest.condition_shape,
        ):
            raise UserError(run, f"{recipe.data.kind} no longer holds pairs of the size that this run was trained on")
        split = "test" if data.manifest.rows("test") else "validation"
        if num > data.manifest.rows(split):
            raise UserError(
                "--num", f"{num} images, but the {split} split has only {data.manifest.rows(split)} to start from"
            )
        rows = some_rows(data, split, num)
        assert rows.condition is not None  # the model was trained on pairs
        condition = given = symmetric(torch.from_numpy(rows.condition))
        true = symmetric(torch.from_numpy(rows.inputs))
    elif model.conditional:
        num_classes = manifest.num_outputs if label is None else None
        classes = torch.arange(num) % manifest.num_outputs
        condition = classes if label is None else torch.full((num,), _class(label, manifest))
    source = torch.randn(num, model.noise_size, generator=torch.Generator().manual_seed(seed))
    device = device or torch.device("cpu")
    made = sample(halves.to(device).generator, source, condition, device=device, seed=seed)
    return Generated(made, given, true, num_classes)


def _class(label: str, manifest: Manifest) -> int:
    names = list(manifest.class_names)
    if label in names:
        return names.index(label)
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    raise UserError("--label", f"{label!r} is no class of this run's data", did_you_mean(label, names))
