"""Pending: what the steps since the last line of metrics have added up, kept on the device until it is needed."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.data.keys import RowIds, digest_part
from cluster.data.loader import Batch


class Pending:
    """Losses and metric sums of at most `num_steps` steps, in memory that is taken once.

    A step waits for nothing, and allocates nothing that outlives it: small tensors kept from every step lie between the
    places of the large ones, so that these were taken anew from the system again and again (a CNN lost a tenth of its
    speed on a CPU).
    """

    def __init__(self, num_steps: int, num_metrics: int, device: torch.device) -> None:
        self._num_steps = num_steps
        self._sums = torch.zeros(num_steps, 1 + num_metrics, dtype=torch.float64, device=device)
        self._losses, self._metrics = self._sums[:, 0].unbind(), self._sums[:, 1:].unbind()  # views, one a step
        self._used: list[tuple[RowIds, int, int]] = []  # ids, start and global rows of each step's batch
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
        step = len(self._used) - 1
        self._losses[step].add_(loss)
        self._metrics[step].add_(metrics)

    def collect(self) -> tuple[Tensor, NDArray[np.int64], int]:
        """(steps, 1 + metrics) sums of this rank, its part of the digest, and the rows of all ranks; starts anew."""
        sums = self._sums[: len(self._used)].clone()
        self._sums.zero_()
        digest = np.sum([digest_part(ids, start) for ids, start, _ in self._used], axis=0)
        rows = sum(rows for _, _, rows in self._used)
        self._used = []
        return sums, digest, rows
