"""Pixels: encoded images (PNG, JPEG, …) to arrays of one size."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nn_models.errors import UserError

MODES = {1: "L", 3: "RGB"}


def decode_image(
    content: bytes, *, name: str, channels: int, size: tuple[int, int] | None, size_field: str | None = None
) -> NDArray[np.uint8]:
    """The image as (channels, height, width). `size` is (height, width); None keeps the image's own.

    An image of another size is resized, or refused where `size_field` names the recipe's field that was not given.
    Raises UserError naming the image where it cannot be used.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            mode, own_size = image.mode, image.size[::-1]
            # Pillow clips larger pixels to 255: a picture of sixteen bits would become all white
            picture = None if mode.startswith(("I", "F")) else image.convert(MODES[channels])
    except UnidentifiedImageError:
        raise UserError(f"{name}: {len(content)} bytes in no known image format; replace or remove it") from None
    except Exception as error:  # decoders raise TypeError, struct.error, … for damaged bytes
        raise UserError(f"{name}: not a readable image ({error}); replace or remove it") from None
    if picture is None:
        raise UserError(f"{name}: pixels of more than 8 bits (mode {mode}); convert the images to 8 bits")
    if size and own_size != size:
        if size_field:
            raise UserError(
                f"{name}: {own_size[0]}x{own_size[1]} pixels where the first image has {size[0]}x{size[1]}; "
                f"set {size_field} to resize them all"
            )
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def resize(images: NDArray[np.generic], size: tuple[int, int]) -> NDArray[np.generic]:
    """Images (rows, channels, height, width) at another (height, width), interpolated linearly."""
    if images.shape[2:] == size:
        return images
    resized = np.empty((*images.shape[:2], *size), np.uint8)
    for target, image in zip(resized.reshape(-1, *size), images.reshape(-1, *images.shape[2:]), strict=True):
        target[:] = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    return resized
