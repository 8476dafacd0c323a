"""explain: which parts of images a run's classifier goes by."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.runs.predictor import OpenedModel, Predictor, pieces
from cluster.training.evaluation import autocast
from nn_models.columns import Image, Label
from nn_models.errors import UserError
from nn_models.explaining import occlusion, spread


@dataclass(frozen=True)
class Explained:
    """Of each image the predicted class, and `maps` (rows, H, W) float32: see nn_models.explaining.occlusion."""

    classes: list[str]
    maps: NDArray[np.float32]


def explain(model: OpenedModel, images: Any) -> Explained:
    """What an opened model (`cluster.open_model`) goes by in images (rows, channels, H, W), as the files hold them.

    A pixel's value is how much less probable the predicted class becomes when what is around it is hidden. It takes 65
    times as long as predicting. Raises UserError for a model that predicts no classes of images.
    """
    model = check_explained(model)
    height, width = model.manifest.signature["input"].row_shape[1:]
    classes: list[str] = []
    maps = [np.zeros((0, height, width), np.float32)]

    def outputs(rows: torch.Tensor) -> torch.Tensor:
        with autocast(model.recipe.train.precision, model.device):
            return model.net(rows).float()

    for rows in pieces({"input": images}):
        scaled = model.scaled(rows["input"])["input"]
        assert isinstance(scaled, torch.Tensor)
        if len(scaled):
            predicted, found = occlusion(outputs, scaled)
            names = model.classes
            classes += [names[number] if names else str(number) for number in predicted.tolist()]
            maps.append(spread(found, (height, width)).cpu().numpy())
    return Explained(classes, np.concatenate(maps))


def check_explained(model: OpenedModel) -> Predictor:
    """The model. Raises UserError for one that predicts no classes of images."""
    columns = model.manifest.signature.columns
    images, classes = isinstance(columns["input"], Image), isinstance(columns.get("target"), Label)
    if not isinstance(model, Predictor) or not images or not classes:
        what = f"a {model.recipe.model.kind}, which predicts no classes of images"
        raise UserError(model.recipe.name, what, "give the run of an image classifier")
    return model
