"""Augmentation by torchvision transforms v2; what happens to a row is a function of (seed, epoch, row)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat

from nn_models.spec import Spec

if TYPE_CHECKING:  # torchvision takes two seconds to import, and most runs have no augmentation
    import torch
    from torchvision.transforms import v2

Probability = Annotated[float, Field(ge=0, le=1)]


class HorizontalFlipSpec(Spec):
    """Mirror left and right with probability `p`."""

    kind: Literal["horizontal_flip"] = "horizontal_flip"
    p: Probability = 0.5

    def build(self, shape: tuple[int, ...]) -> "v2.Transform":
        """The transform for images of (channels, height, width)."""
        from torchvision.transforms import v2

        return v2.RandomHorizontalFlip(self.p)


class RandomCropSpec(Spec):
    """Pad by `padding` pixels of zeros on each side, then cut out the original size anywhere."""

    kind: Literal["random_crop"] = "random_crop"
    padding: Annotated[int, Field(ge=1, le=1024)] = 4

    def build(self, shape: tuple[int, ...]) -> "v2.Transform":
        """The transform for images of (channels, height, width)."""
        from torchvision.transforms import v2

        return v2.RandomCrop(shape[1:], padding=self.padding)


class RotationSpec(Spec):
    """Rotate by up to `degrees` either way."""

    kind: Literal["rotation"] = "rotation"
    degrees: PositiveFloat = 10.0

    def build(self, shape: tuple[int, ...]) -> "v2.Transform":
        """The transform for images of (channels, height, width)."""
        from torchvision.transforms import v2

        return v2.RandomRotation(self.degrees)


class ResizedCropSpec(Spec):
    """Cut out a rectangle of at least `min_area` of the image and enlarge it to the original size."""

    kind: Literal["resized_crop"] = "resized_crop"
    min_area: Annotated[float, Field(gt=0, le=1)] = 0.5

    def build(self, shape: tuple[int, ...]) -> "v2.Transform":
        """The transform for images of (channels, height, width)."""
        from torchvision.transforms import v2

        return v2.RandomResizedCrop(shape[1:], scale=(self.min_area, 1.0), antialias=True)


class ColorJitterSpec(Spec):
    """Change brightness, contrast and saturation by up to these shares."""

    kind: Literal["color_jitter"] = "color_jitter"
    brightness: NonNegativeFloat = 0.2
    contrast: NonNegativeFloat = 0.2
    saturation: NonNegativeFloat = 0.2

    def build(self, shape: tuple[int, ...]) -> "v2.Transform":
        """The transform for images of (channels, height, width)."""
        from torchvision.transforms import v2

        return v2.ColorJitter(self.brightness, self.contrast, self.saturation)


class ErasingSpec(Spec):
    """Blank a random rectangle with probability `p` (Zhong et al. 2017)."""

    kind: Literal["erasing"] = "erasing"
    p: Probability = 0.25

    def build(self, shape: tuple[int, ...]) -> "v2.Transform":
        """The transform for images of (channels, height, width)."""
        from torchvision.transforms import v2

        return v2.RandomErasing(self.p)


AnyAugmentSpec = Annotated[
    HorizontalFlipSpec | RandomCropSpec | RotationSpec | ResizedCropSpec | ColorJitterSpec | ErasingSpec,
    Field(discriminator="kind"),
]

# These only move pixels about: both images of a pair stay aligned, and neither changes its colours.
MOVING = (HorizontalFlipSpec, RandomCropSpec, RotationSpec, ResizedCropSpec)


class Augmentation:
    """The transforms of a recipe, applied to a batch of uint8 images row by row."""

    def __init__(self, specs: Sequence[AnyAugmentSpec], *, shape: tuple[int, ...], seed: int) -> None:
        from torchvision.transforms import v2

        self._transform = v2.Compose([spec.build(shape) for spec in specs])
        self._seed = seed

    def __call__(self, images: "torch.Tensor", ids: NDArray[np.int64], epoch: int) -> "torch.Tensor":
        """Changed copies of `images` (rows, channels, height, width), whose row ids are `ids`."""
        import torch

        # The transforms draw from torch's global generator: the model's own stream must not notice.
        with torch.random.fork_rng(devices=[]):
            changed = []
            for image, row in zip(images, ids.tolist(), strict=True):
                # the hash of a tuple of integers is the same in every process; torch.manual_seed would seed the GPU too
                torch.default_generator.manual_seed(hash((self._seed, epoch, row)) & 0x7FFFFFFFFFFFFFFF)
                changed.append(self._transform(image))
        return torch.stack(changed)
