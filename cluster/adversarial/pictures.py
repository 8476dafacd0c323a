"""Pictures: what the generator makes of the same noise again and again, as grids of images."""

import torch
from torch import Tensor

from cluster.adversarial.halves import described
from cluster.adversarial.quality import SEED, Make, read_rows
from cluster.data.shards import DataSet
from cluster.pictures import COLUMNS, beside, png
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from nn_models.columns import Image

ROWS = 6
PAIRS = 8  # where images are given: rows of (given, made, true)


class Pictures:
    """A grid for each look: RUN/samples/step-0000000100.png. There is none for rows that are no images."""

    def __init__(self, folder: Folder, data: DataSet, recipe: Recipe) -> None:
        self._folder = folder
        model, signature = described(recipe)[0], data.manifest.signature
        self._drawn = isinstance(signature["input"], Image)
        self._true: Tensor | None = None
        num = COLUMNS * ROWS
        self._condition: Tensor | None = None
        if model.given and isinstance(signature[model.given], Image):
            rows = read_rows(data, "validation", PAIRS, recipe=recipe)
            self._condition, self._true = rows[model.given], rows["input"]
            num = len(self._true)
        elif model.given:
            self._condition = torch.arange(num) % COLUMNS % signature[model.given].num_outputs
        self._source = torch.randn(num, model.noise_size, generator=torch.Generator().manual_seed(SEED))

    def write(self, step: int, make: Make) -> None:
        """Draw what is made of the same noise, and conditions, as ever."""
        if not self._drawn:
            return
        made = make(self._source, self._condition)
        if self._true is not None and self._condition is not None:
            content = png(beside(self._condition, made, self._true), columns=6)
        else:
            content = png(made, columns=COLUMNS)
        self._folder.write_bytes(f"step-{step:010d}.png", content)
