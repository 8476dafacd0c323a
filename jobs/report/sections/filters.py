"""Filters: the weights that look at the picture itself, of the first convolution or of the first dense layer."""

import json
import math
import re
from typing import Any

import numpy as np

from cluster.data.manifest import Manifest
from jobs.report.files import AbsentError, Tensors
from jobs.report.pictures import BLUE, RED, data_uri, example_shape
from jobs.report.sections.section import MODEL, Run, Section
from nn_models.spec import validate

MAX_FILTERS = 64


def _read(run: Run) -> dict[str, Any]:
    tensors = Tensors(run.folder, MODEL)
    if not _of_pictures(tensors):
        return {}
    return _first_layer(tensors, example_shape(run.evaluation) if run.evaluation else None)


def _of_pictures(tensors: Tensors) -> bool:
    """Whether rows may be pictures, (channels, height, width), by the data that the weights were trained on."""
    described = tensors.metadata.get("data")
    return described is None or len(validate(Manifest, json.loads(described), prefix="data").signature.input_shape) == 3


def _first_layer(tensors: Tensors, image_shape: tuple[int, ...] | None) -> dict[str, Any]:
    """What the template shows; rows of shape `image_shape`, (channels, height, width), or None where unknown."""

    def priority(name: str) -> tuple[Any, ...]:
        numbered = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
        other_channels = image_shape is not None and tensors.shapes[name][1] != image_shape[0]
        return (bool(re.search("decoder|generator", name)), other_channels, numbered)

    num_inputs = math.prod(image_shape or (0,))
    shapes = tensors.shapes
    names = [name for name, shape in shapes.items() if len(shape) == 4 and min(shape) > 0 and min(shape[2:]) > 1]
    if not names:
        names = [name for name, shape in shapes.items() if len(shape) == 2 and shape[1] == num_inputs and shape[0]]
    if not names:
        raise AbsentError("no layer of this model looks at pictures")
    name = min(names, key=priority)
    weights = np.nan_to_num(tensors[name][:MAX_FILTERS].astype(np.float32), posinf=0.0, neginf=0.0)
    if weights.ndim == 2:
        weights = weights.reshape(-1, *(image_shape or ()))
    scale = float(np.quantile(np.abs(weights), 0.995)) or 1.0  # one scale for all: a weak filter looks weak
    weights = np.clip(weights / scale, -1, 1)
    if weights.shape[1] == 3:
        pixels = (127.5 + 127.5 * weights).astype(np.uint8).transpose(0, 2, 3, 1)
    else:
        signed = weights[:, 0]
        pixels = np.empty((*signed.shape, 4), np.uint8)
        pixels[..., :3] = np.where(signed[..., None] > 0, BLUE, RED)
        pixels[..., 3] = 255 * np.abs(signed)
    return {
        "name": name,
        "shape": " x ".join(map(str, shapes[name])),
        "num_filters": shapes[name][0],
        "signed": weights.shape[1] != 3,
        "channels": weights.shape[1],
        "pictures": [data_uri(picture) for picture in pixels],
    }


SECTION = Section(name="filters", template="filters.html", read=_read, title="The learned filters", file=MODEL)
