"""Pixels: encoded images (PNG, JPEG, …) to arrays of one size; the edges in images."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nn_models.errors import UserError

MODES = {1: "L", 3: "RGB"}
LUMINANCE = np.array([19595, 38470, 7471], np.int32)  # 0.299, 0.587, 0.114 of 2^16
BLOCK_PIXELS = 1 << 20  # whose gradients are in memory at once


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
        raise UserError(name, f"{len(content)} bytes in no known image format", "replace or remove it") from None
    except Exception as error:  # decoders raise TypeError, struct.error, … for damaged bytes
        raise UserError(name, f"not a readable image ({error})", "replace or remove it") from None
    if picture is None:
        raise UserError(name, f"pixels of more than 8 bits (mode {mode})", "convert the images to 8 bits")
    if size and own_size != size:
        if size_field:
            raise UserError(
                name,
                f"{own_size[0]}x{own_size[1]} pixels where the first image has {size[0]}x{size[1]}",
                f"set {size_field} to resize them all",
                names=(size_field,),
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


def edges(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """How steep the luminance is at each pixel: (rows, 1 or 3 channels, height, width) -> (rows, 1, height, width).

        grey = 0.299 red + 0.587 green + 0.114 blue        (ITU-R BT.601)
        edge = min(255, sqrt(g_x^2 + g_y^2) / 4)

    with Sobel's 3 x 3 derivatives g_x and g_y. A quarter, so that a step from black to white gives 255: no other pixel
    of the image, let alone another image, decides the scale. Beyond its border the image goes on as it ends.
    """
    found = np.empty((len(images), 1, *images.shape[2:]), np.uint8)
    block_rows = max(1, BLOCK_PIXELS // (images.shape[2] * images.shape[3]))
    for first in range(0, len(images), block_rows):
        block = images[first : first + block_rows].astype(np.int32)
        # in whole numbers, as Pillow does: the same on every machine
        grey = block[:, 0] if block.shape[1] == 1 else block.transpose(0, 2, 3, 1) @ LUMINANCE + 0x8000 >> 16
        grey = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
        smooth_y = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
        smooth_x = grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
        steep_x = smooth_y[:, :, 2:] - smooth_y[:, :, :-2]
        steep_y = smooth_x[:, 2:] - smooth_x[:, :-2]
        magnitude = np.sqrt(np.square(steep_x) + np.square(steep_y)) / 4
        found[first : first + block_rows, 0] = np.minimum(255, np.round(magnitude))
    return found
