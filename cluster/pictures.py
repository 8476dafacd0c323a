"""Pictures: grids of images as PNG files."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

COLUMNS = 10  # so that each column is a class of the ten that the usual sets have

SIDE = 32  # smaller images are enlarged to about so many pixels

GAP = 2  # pixels between images


def beside(*series: Tensor) -> Tensor:
    """Series of images (rows, C, H, W), of any number of channels, row by row: (rows * series, 1 or 3, H, W)."""
    shown = [images[:, :3] if images.shape[1] >= 3 else images[:, :1] for images in series]
    channels = max(images.shape[1] for images in shown)
    alike = [images.expand(-1, channels, -1, -1) for images in shown]
    return torch.stack(alike, dim=1).flatten(0, 1)


def png(images: Tensor, *, columns: int) -> bytes:
    """Images (rows, C, H, W) in [-1, 1], of one channel or three, as a PNG file of a grid."""
    pixels = ((images.nan_to_num(0.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return grid(list(pixels), columns=columns)


def grid(images: Sequence[NDArray[np.uint8]], *, columns: int) -> bytes:
    """Images (C, H, W) of one size, left to right and top to bottom, on white."""
    channels, height, width = images[0].shape
    scale = max(1, SIDE // max(height, width))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell = (height * scale + GAP, width * scale + GAP)
    sheet = np.full((rows * cell[0] + GAP, columns * cell[1] + GAP, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (GAP + number * size for number, size in zip(divmod(index, columns), cell, strict=True))
        large = image.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1)
        sheet[top : top + height * scale, left : left + width * scale] = large
    buffer = io.BytesIO()
    Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet[:, :, :3]).save(buffer, format="PNG")
    return buffer.getvalue()
