"""Contractive autoencoders: codes that move little where rows do.

Shapes: B rows of the batch, D numbers of a row, K numbers of a code.
"""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from nn_models.batch import Batch
from nn_models.coding import Coded
from nn_models.metrics import Metric
from nn_models.objectives import Across, at_least_float32
from nn_models.reconstruction import LossName, RebuildingSpec, Reconstruction, Values
from nn_models.signature import Signature


class Contractive(Reconstruction):
    """Reconstruction, and `weight` times the squared norm of the encoder's Jacobian (Rifai et al. 2011, eq. 2).

    ||J(x)||^2 = sum_k sum_d (dh_k / dx_d)^2        the metric `contraction`, a row
    """

    metrics = (*Reconstruction.metrics, Metric("contraction", "less", words="norm of the code's Jacobian, squared"))

    options = {"contraction": True}  # noqa: RUF012  # of Mapping, which nobody changes

    def __init__(self, *, loss: LossName, weight: float) -> None:
        super().__init__(loss=loss)
        self.weight = weight

    def penalty(self, coded: Coded, batch: Batch, across: Across, values: Values) -> tuple[Tensor, list[Tensor]]:
        """See Reconstruction."""
        assert coded.contraction is not None  # it was asked for
        norms = at_least_float32(coded.contraction)
        return values.get("weight", self.weight) * norms.sum(), [norms.detach().sum(dtype=torch.float64)]


class ContractiveSpec(RebuildingSpec):
    """Give each row again by a code that moves little where the row does."""

    objective = Contractive
    kind: Literal["contractive"] = "contractive"
    weight: PositiveFloat = Field(1e-3, description="how often the norm counts, beside an error a number")

    def build(self, signature: Signature) -> Contractive:
        """The objective."""
        return Contractive(loss=self.loss, weight=self.weight)
