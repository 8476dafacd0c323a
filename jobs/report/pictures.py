"""Pictures: arrays of pixels as data URIs, the examples of an evaluation among them."""

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs.report.files import Tensors

Array = NDArray[Any]

MAX_PIXELS = 128  # a side, of photographs
BLUE, RED = (47, 99, 214), (214, 69, 47)  # with transparency both read well on light and on dark


def example_shape(tensors: Tensors) -> tuple[int, ...] | None:
    """(channels, height, width) of the examples; None where they are no pictures."""
    shape = tensors.shapes.get("example_inputs", ())
    return shape[1:] if len(shape) == 4 and min(shape) > 0 and min(shape[2:]) > 1 else None


def pictures(images: Array) -> list[str]:
    """Data URIs of [n, channels, height, width]: 3 channels as RGB, else the first as gray."""
    images = images.transpose(0, 2, 3, 1) if images.shape[1] == 3 else images[:, 0]
    if images.dtype != np.uint8:
        images = np.nan_to_num(images.astype(np.float32), posinf=0.0, neginf=0.0)
        low, high = min(images.min(initial=0.0), 0.0), images.max(initial=0.0)
        if low < 0 or high > 1:  # normalised rows: stretch what is there
            low, high = images.min(), images.max()
        else:
            low, high = 0.0, 1.0
        images = ((images - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    return [data_uri(image) for image in images]


def data_uri(pixels: Array) -> str:
    """A picture of [height, width] or [height, width, 3 or 4] uint8, large photographs made smaller."""
    image, buffer, kind = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO(), "png"
    if image.mode != "RGBA" and max(image.size) > MAX_PIXELS // 2:
        image.thumbnail((MAX_PIXELS, MAX_PIXELS))
        kind = "jpeg"
    image.save(buffer, kind, **({"quality": 88} if kind == "jpeg" else {"compress_level": 3}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def heat(image: Array, values: Array, *, most: float) -> Array:
    """An image (channels, H, W) uint8, gray and faint, under values (H, W): blue above 0, red below; (H, W, 3) uint8.

    `most` is the value of the full colour.
    """
    gray = image.astype(np.float32).mean(0)[..., None]
    strength = np.clip(np.abs(values.astype(np.float32)) / max(most, 1e-12), 0, 1)[..., None]
    colours = np.where(values[..., None] > 0, np.array(BLUE, np.float32), np.array(RED, np.float32))
    found: Array = ((1 - strength) * (64 + gray / 2) + strength * colours).round().astype(np.uint8)
    return found
