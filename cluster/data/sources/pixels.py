"""Pixels: encoded images (PNG, JPEG, …) to arrays of one size; the edges in images."""

import io
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cluster.data.sources.base import BadRows

MODES = {1: "L", 3: "RGB"}
# What is opened: no format whose reader is only a stub, or runs another program (EPS). Those that are recognised by no
# more than a guess come last.
FORMATS = (
    "PNG", "JPEG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "AVIF", "JPEG2000", "QOI", "PPM", "ICO", "SUN", "SGI", "PCX",
    "TGA",
)  # fmt: skip
LUMINANCE = np.array([19595, 38470, 7471], np.int32)  # 0.299, 0.587, 0.114 of 2^16
BLOCK_PIXELS = 1 << 20  # whose gradients are in memory at once


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def endings() -> tuple[str, ...]:
    """Of the names of files in these formats, with the dot, in small letters."""
    return tuple(ending for ending, name in Image.registered_extensions().items() if name in formats())


def decode_image(
    content: bytes,
    *,
    name: str,
    channels: int,
    size: tuple[int, int] | None,
    size_field: str | None = None,
    whose: str = "the first image has",
) -> NDArray[np.uint8]:
    """The image as a viewer shows it, (channels, height, width). `size` is (height, width); None keeps its own.

    It is upright, and what is transparent lies on white. An image of another size is resized, or refused where
    `size_field` names the field or option that was not given; `whose` says of what the size is. Raises BadRows naming
    the image where it cannot be used.
    """
    try:
        with Image.open(io.BytesIO(content), formats=formats()) as image:
            _refuse(image, name)
            picture = _shown(image).convert(MODES[channels])
    except BadRows:
        raise
    except UnidentifiedImageError:
        raise BadRows(name, f"{len(content)} bytes in no known image format", "replace or remove it") from None
    except Exception as error:  # decoders raise TypeError, struct.error, … for damaged bytes
        raise BadRows(name, f"not a readable image ({error})", "replace or remove it") from None
    own_size = picture.size[::-1]
    if size and own_size != size:
        if size_field:
            raise BadRows(
                name,
                f"{own_size[0]}x{own_size[1]} pixels where {whose} {size[0]}x{size[1]}",
                f"set {size_field} to resize them all",
                names=(size_field,),
            )
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def _refuse(image: Image.Image, name: str) -> None:
    """Raise BadRows for what no viewer shows as one picture of bytes."""
    # Pillow clips larger pixels to 255: a picture of sixteen bits would become all white
    if image.mode.startswith(("I", "F")):
        raise BadRows(name, f"pixels of more than 8 bits (mode {image.mode})", "convert the images to 8 bits")
    # a camera's MPO has the same scene again, as a preview or for the other eye
    if (pictures := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        raise BadRows(name, f"{pictures} pictures in one file ({image.format})", "save the one that counts")


def _shown(image: Image.Image) -> Image.Image:
    """Upright, as its EXIF data say, and on white where it is transparent."""
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright
    page = Image.new("RGBA", upright.size, "white")
    page.alpha_composite(upright.convert("RGBA"))
    return page


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
