"""Sparse autoencoders: of a row's code, few numbers are far from 0.

Shapes: B rows of the batch, N rows of the global batch, K numbers of a code.
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from nn_models.batch import Batch
from nn_models.coding import Coded, CodingSpec
from nn_models.metrics import Metric
from nn_models.model import ModelSpec
from nn_models.objectives import Across, at_least_float32
from nn_models.reconstruction import LossName, RebuildingSpec, Reconstruction, Values
from nn_models.signature import Signature

Penalty = Literal["kl", "l1"]
ACTIVE = 0.1  # from here on, either way, a number of a code counts as active
EDGE = 1e-6  # that a mean activation keeps from 0 and 1, where the divergence is infinite

SPARSE_METRICS = (
    Metric("mean_activation", words="mean activation"),
    Metric("active_share", words="share of active units"),
)


class Sparse(Reconstruction):
    """Reconstruction, and a penalty on the codes h, `weight` times

        l1: sum_k |h_k| of each row
        kl: N sum_k KL(rho || m_k), m_k = (1/N) sum h_k over the global batch   (Ng 2011, CS294A notes, section 3)

    with KL between Bernoulli distributions, m_k the mean over the rows of all ranks, and its gradient what one rank
    that held all of them would compute. Where a batch is computed in pieces (train.accumulation), the mean is that of a
    piece over all ranks. `mean_activation` is the mean of |h_k| over rows and units, `active_share` the share of the
    units of a row with |h_k| > 0.1.
    """

    metrics = (*Reconstruction.metrics, *SPARSE_METRICS)

    def __init__(self, *, loss: LossName, penalty: Penalty, rho: float, weight: float) -> None:
        super().__init__(loss=loss)
        self._kind, self.rho, self.weight = penalty, rho, weight

    def penalty(self, coded: Coded, batch: Batch, across: Across, values: Values) -> tuple[Tensor, list[Tensor]]:
        """See Reconstruction."""
        weight, rho = values.get("weight", self.weight), values.get("rho", self.rho)
        codes = at_least_float32(coded.codes)
        sizes = codes.detach().abs()
        sums = [sizes.mean(1).sum(dtype=torch.float64), (sizes > ACTIVE).double().mean(1).sum()]
        if self._kind == "l1":
            return weight * codes.abs().sum(), sums
        return weight * of_mean(codes, lambda means: bernoulli_divergence(rho, means).sum(), batch, across), sums


def of_mean(values: Tensor, function: Callable[[Tensor], Tensor], batch: Batch, across: Across) -> Tensor:
    """These rows' part of N f(m), with m (K,) the mean of `values` (B, K) over the N rows of all ranks.

    The parts add up to N f(m), and the gradient of a rank's part is that of the whole by its own rows: df/dm.
    """
    there = float(bool(batch.place.num_rows))  # a row that stands in is none of the batch's
    own = values.sum(0) * there
    count = own.new_full((1,), float(batch.place.num_rows))
    summed = across(torch.cat((own.detach(), count)))
    rows = summed[-1].clamp(min=1)
    means = (summed[:-1] + own - own.detach()) / rows
    found = function(means)
    return rows * found - ((rows - count) * found.detach()).sum()


def bernoulli_divergence(rho: float | Tensor, means: Tensor) -> Tensor:
    """KL(rho || m) = rho log(rho / m) + (1 - rho) log((1 - rho) / (1 - m)) of each mean, in nats."""
    means = means.clamp(EDGE, 1 - EDGE)
    return rho * (rho / means).log() + (1 - rho) * ((1 - rho) / (1 - means)).log()


class SparseSpec(RebuildingSpec):
    """Give each row again by a code of which few numbers are active."""

    objective = Sparse
    kind: Literal["sparse"] = "sparse"
    penalty: Penalty = Field("kl", description="kl: mean activations near rho; l1: the sum of what is active")
    rho: float = Field(0.05, gt=0, lt=1, description="mean activation of each unit that kl aims at")
    weight: PositiveFloat = Field(1e-3, description="how often the penalty counts, beside an error a number")

    def check(self, model: ModelSpec) -> None:
        """See ObjectiveSpec."""
        super().check(model)
        if self.penalty == "kl" and isinstance(model, CodingSpec):
            model.check_code("sigmoid", kind=self.kind, why="from 0 to 1 for a mean activation to have a divergence")

    def build(self, signature: Signature) -> Sparse:
        """The objective."""
        return Sparse(loss=self.loss, penalty=self.penalty, rho=self.rho, weight=self.weight)
