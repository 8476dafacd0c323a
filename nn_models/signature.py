"""Signature: what a data set feeds a model and wants back."""

import math

from pydantic import PositiveInt

from nn_models.spec import Spec


class Signature(Spec):
    """What one row of a data set looks like to a model.

    `input_shape` is (channels, height, width) for images and (features,) for feature vectors;
    `num_outputs` is the number of classes, or of regression targets. Where rows are pairs of images,
    `input_shape` is the image to be made and `condition_shape` the one it is made from, both (channels, height, width).
    """

    input_shape: tuple[PositiveInt, ...]
    num_outputs: PositiveInt
    condition_shape: tuple[PositiveInt, ...] | None = None

    @property
    def input_kind(self) -> str:
        """`"features"` or `"image"`, from the number of dimensions."""
        return {1: "features", 3: "image"}.get(len(self.input_shape), f"{len(self.input_shape)}-dimensional")

    @property
    def input_size(self) -> int:
        """Numbers in one row's input."""
        return math.prod(self.input_shape)
