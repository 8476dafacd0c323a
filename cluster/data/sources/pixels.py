"""Pixels: encoded images (PNG, JPEG, …) to arrays of one size."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nn_models.errors import UserError

MODES = {1: "L", 3: "RGB"}


def decode_image(content: bytes, *, name: str, channels: int, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """The image as (channels, height, width). `size` is (height, width); None keeps the image's own.

    Raises UserError naming the image where it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            picture = image.convert(MODES[channels])
            if size and picture.size != size[::-1]:
                picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable image ({error}); replace or remove it") from None
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
