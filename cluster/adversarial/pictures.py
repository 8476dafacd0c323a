"""Pictures: what the generator makes of the same noise again and again, as grids of images."""

import torch
from torch import Tensor

from cluster.adversarial.quality import SEED, Make
from cluster.data.scaling import symmetric
from cluster.data.shards import DataSet, some_rows
from cluster.pictures import COLUMNS, beside, png
from cluster.storage import Folder
from nn_models.adversarial import AdversarialSpec

ROWS = 6
PAIRS = 8  # of a paired model: rows of (given, made, true)


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
