"""Augmentation: random changes of training images; what happens to a row is a function of its key.

The kinds are those of torchvision's transforms v2, with the same distributions, but whole batches at a time, on their
device, and with numbers of each row's own.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat

from cluster.data.manifest import Manifest
from nn_models.columns import Image
from nn_models.errors import UserError
from nn_models.signature import Signature
from nn_models.spec import Spec

if TYPE_CHECKING:  # torch takes a second to import, and whoever only reads recipes or writes shards does not need it
    from torch import Tensor

    from cluster.data.transforms import Parameters, Transform
    from nn_models.batch import Value

Probability = Annotated[float, Field(ge=0, le=1)]


class AugmentSpec(Spec):
    """Base of the kinds of changes."""

    moves: ClassVar[bool] = False  # it only moves pixels about: images of a pair stay aligned, and keep their colours


class HorizontalFlipSpec(AugmentSpec):
    """Mirror left and right with probability `p`."""

    moves = True
    kind: Literal["horizontal_flip"] = "horizontal_flip"
    p: Probability = 0.5

    def build(self, shape: tuple[int, ...]) -> "Transform":
        """The transform for images of (channels, height, width)."""
        from cluster.data.transforms import HorizontalFlip

        return HorizontalFlip(self.p)


class RandomCropSpec(AugmentSpec):
    """Pad by `padding` pixels of zeros on each side, then cut out the original size anywhere."""

    moves = True
    kind: Literal["random_crop"] = "random_crop"
    padding: Annotated[int, Field(ge=1, le=1024)] = 4

    def build(self, shape: tuple[int, ...]) -> "Transform":
        """The transform for images of (channels, height, width)."""
        from cluster.data.transforms import RandomCrop

        return RandomCrop(self.padding)


class RotationSpec(AugmentSpec):
    """Rotate by up to `degrees` either way."""

    moves = True
    kind: Literal["rotation"] = "rotation"
    degrees: PositiveFloat = 10.0

    def build(self, shape: tuple[int, ...]) -> "Transform":
        """The transform for images of (channels, height, width)."""
        from cluster.data.transforms import Rotation

        return Rotation(self.degrees)


class ResizedCropSpec(AugmentSpec):
    """Cut out a rectangle of at least `min_area` of the image and enlarge it to the original size."""

    moves = True
    kind: Literal["resized_crop"] = "resized_crop"
    min_area: Annotated[float, Field(gt=0, le=1)] = 0.5

    def build(self, shape: tuple[int, ...]) -> "Transform":
        """The transform for images of (channels, height, width)."""
        from cluster.data.transforms import ResizedCrop

        return ResizedCrop(shape, self.min_area)


class ColorJitterSpec(AugmentSpec):
    """Change brightness, contrast and saturation by up to these shares."""

    kind: Literal["color_jitter"] = "color_jitter"
    brightness: NonNegativeFloat = 0.2
    contrast: NonNegativeFloat = 0.2
    saturation: NonNegativeFloat = 0.2

    def build(self, shape: tuple[int, ...]) -> "Transform":
        """The transform for images of (channels, height, width). Raises UserError where these are no colours."""
        from cluster.data.transforms import ColorJitter

        if shape[0] not in (1, 3):
            raise UserError(
                "data.augment", f"color_jitter changes grey or RGB images, not {shape[0]} channels", "leave it out"
            )
        return ColorJitter(self.brightness, self.contrast, self.saturation)


class ErasingSpec(AugmentSpec):
    """Blank a random rectangle with probability `p` (Zhong et al. 2017)."""

    kind: Literal["erasing"] = "erasing"
    p: Probability = 0.25

    def build(self, shape: tuple[int, ...]) -> "Transform":
        """The transform for images of (channels, height, width)."""
        from cluster.data.transforms import Erasing

        return Erasing(shape, self.p)


AnyAugmentSpec = Annotated[
    HorizontalFlipSpec | RandomCropSpec | RotationSpec | ResizedCropSpec | ColorJitterSpec | ErasingSpec,
    Field(discriminator="kind"),
]


PIXELS_AT_ONCE = 1 << 18  # of all channels, where a processor makes floats of them: 1 MiB stays in its cache


class Augmentation:
    """The transforms of a recipe, one after the other, applied to batches of images."""

    def __init__(
        self, specs: Sequence[AnyAugmentSpec], *, shape: tuple[int, ...], names: Sequence[str] = ("input",)
    ) -> None:
        """`shape` is that of an image, (channels, height, width); `names` are the columns that are moved as one."""
        self._transforms: list[Transform] = [spec.build(shape) for spec in specs]
        self._names = tuple(names)

    def of_columns(self, stored: "Mapping[str, Value]", keys: "Tensor") -> "dict[str, Value]":
        """The stored columns of a batch with its images changed; several a row as one, so that they still fit."""
        import torch

        images = cast("list[Tensor]", [stored[name] for name in self._names])
        changed = self(images[0] if len(images) == 1 else torch.cat(images, 1), keys)
        parts = changed.split([image.shape[1] for image in images], 1)
        return {**stored, **dict(zip(self._names, parts, strict=True))}

    def draw(self, keys: "Tensor") -> "list[Parameters]":
        """What each transform does to the rows of these keys (B,) int64."""
        from nn_models.noise import AUGMENTATION, uniform

        counts = [transform.numbers for transform in self._transforms]
        numbers = uniform(keys, sum(counts), stream=AUGMENTATION).split(counts, 1)
        return [transform.draw(own) for transform, own in zip(self._transforms, numbers, strict=True)]

    def apply(self, images: "Tensor", drawn: "Sequence[Parameters]") -> "Tensor":
        """`images` (B, channels, height, width) uint8, changed as was drawn for each row."""
        for transform, parameters in zip(self._transforms, drawn, strict=True):
            images = transform.apply(images, parameters)
        return images

    def __call__(self, images: "Tensor", keys: "Tensor") -> "Tensor":
        """Changed copies of `images` (B, channels, height, width) uint8, whose keys are `keys` (B,), on one device.

        What moves pixels about takes any number of channels, so that images laid on top of each other move as one.
        """
        import torch

        drawn = self.draw(keys)
        pieces = math.ceil(images.numel() / PIXELS_AT_ONCE)
        if pieces == 1 or images.device.type != "cpu" or not any(one.floats for one in self._transforms):
            return self.apply(images, drawn)
        rows = math.ceil(len(images) / pieces)
        changed = []
        for start in range(0, len(images), rows):
            own = slice(start, start + rows)
            parameters = [{name: values[own] for name, values in one.items()} for one in drawn]
            changed.append(self.apply(images[own], parameters))
        return torch.cat(changed)


def augmentation_of(
    specs: Sequence[AnyAugmentSpec], signature: Signature, read: Collection[str]
) -> Augmentation | None:
    """How the columns that are read are augmented; None for not at all."""
    if not specs:
        return None
    return Augmentation(specs, shape=signature["input"].row_shape, names=_images(signature, read))


def check_augment(specs: Sequence[AnyAugmentSpec], manifest: Manifest, read: Collection[str], *, source: str) -> None:
    """Raise UserError where the rows hold no images that these could change."""
    if not specs:
        return
    names = _images(manifest.signature, read)
    if "input" not in names or any(manifest.columns[name].dtype != "uint8" for name in names):
        raise UserError("data.augment", f"{source} has no images to change", "leave it out")
    if len(names) > 1 and (odd := [spec.kind for spec in specs if not spec.moves]):
        moving = [spec.model_fields["kind"].default for spec in get_args(get_args(AnyAugmentSpec)[0]) if spec.moves]
        raise UserError(
            "data.augment",
            f"{', '.join(odd)} would not change both images of a pair alike",
            f"leave it out, and use {', '.join(moving)}",
        )


def _images(signature: Signature, read: Collection[str]) -> list[str]:
    return [name for name, column in signature.columns.items() if isinstance(column, Image) and name in read]
