"""Pictures: what the generator makes of the same noise again and again, as grids of images."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cluster.adversarial.features import some_rows
from cluster.adversarial.quality import SEED, Make
from cluster.data.loader import symmetric
from cluster.data.shards import DataSet
from cluster.storage import Folder
from nn_models.adversarial import AdversarialSpec

COLUMNS = 10  # so that each column is a class of the ten that the usual sets have
ROWS = 6
PAIRS = 8  # of a paired model: rows of (given, made, true)
SIDE = 32  # smaller images are enlarged to about so many pixels
GAP = 2  # pixels between images


class Pictures:
    """A grid for each look: RUN/samples/step-0000000100.png. There is none for rows that are no images."""

    def __init__(self, folder: Folder, data: DataSet, spec: AdversarialSpec) -> None:
        self._folder = folder
        self._drawn = len(data.manifest.input_shape) == 3
        self._true: Tensor | None = None
        self._given: Tensor | None = None
        num = PAIRS if spec.paired else COLUMNS * ROWS
        self._condition: Tensor | None = None
        if spec.paired:
            rows = some_rows(data, "validation", num)
            assert rows.condition is not None  # the model's check() refuses data without
            self._condition = self._given = symmetric(torch.from_numpy(rows.condition))
            self._true = symmetric(torch.from_numpy(rows.inputs))
            num = len(rows.ids)
        elif spec.conditional:
            self._condition = torch.arange(num) % COLUMNS % data.manifest.num_outputs
        self._source = torch.randn(num, spec.noise_size, generator=torch.Generator().manual_seed(SEED))

    def write(self, step: int, make: Make) -> None:
        """Draw what is made of the same noise, and conditions, as ever."""
        if not self._drawn:
            return
        made = make(self._source, self._condition)
        if self._given is not None and self._true is not None:
            content = png(beside(self._given, made, self._true), columns=6)
        else:
            content = png(made, columns=COLUMNS)
        self._folder.write_bytes(f"step-{step:010d}.png", content)


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
