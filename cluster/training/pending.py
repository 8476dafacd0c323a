"""Pending: what the steps since the last line of metrics have added up, kept on the device until it is needed."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.data.loader import Batch
from cluster.data.order import RowIds, digest_part


class Pending:
    """Losses and metric sums of at most `num_steps` steps. A step only stores references: none waits, none adds."""

    def __init__(self, num_steps: int, num_metrics: int, device: torch.device) -> None:
        self._num_steps, self._num_metrics, self._device = num_steps, num_metrics, device
        self._used: list[tuple[RowIds, int, int]] = []  # ids, start and global rows of each step's batch
        self._steps: list[int] = []  # of each piece of a batch, with its loss and metric sums
        self._losses: list[Tensor] = []
        self._metrics: list[Tensor] = []
        self.grad_norm: Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether the next step would find no room."""
        return len(self._used) == self._num_steps

    def begin(self, batch: Batch) -> None:
        """Note the rows of a new step."""
        self._used.append((batch.ids, batch.start, batch.global_rows))

    def add(self, loss: Tensor, metrics: Tensor) -> None:
        """The summed loss () and metric sums (metrics,) of one piece of the step's batch."""
        self._steps.append(len(self._used) - 1)
        self._losses.append(loss)
        self._metrics.append(metrics)

    def collect(self) -> tuple[Tensor, NDArray[np.int64], int]:
        """(steps, 1 + metrics) sums of this rank, its part of the digest, and the rows of all ranks; starts anew."""
        sums = torch.zeros(len(self._used), 1 + self._num_metrics, dtype=torch.float64, device=self._device)
        if self._steps:
            where = torch.tensor(self._steps, device=self._device)
            sums[:, 0].index_add_(0, where, torch.stack(self._losses).double())
            sums[:, 1:].index_add_(0, where, torch.stack(self._metrics).double())
        digest = np.sum([digest_part(ids, start) for ids, start, _ in self._used], axis=0)
        rows = sum(rows for _, _, rows in self._used)
        self._used, self._steps, self._losses, self._metrics = [], [], [], []
        return sums, digest, rows
