"""Regression: numbers are predicted; the loss is that of standardised numbers, the metrics are in their own units.

Shapes: B rows of the batch, D features, K predicted numbers.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from nn_models.batch import Batch
from nn_models.columns import Features, Numbers
from nn_models.evidence import Evidence, NumberEvidence
from nn_models.explaining import explained, rows_explained
from nn_models.figures import NUMBER_FIGURES, Figures, NumberFigures
from nn_models.metrics import Metric
from nn_models.model import ModelSpec, reading
from nn_models.objectives import Across, Baseline, Measured, Objective, RowObjectiveSpec, at_least_float32, only_here
from nn_models.signature import Signature

MOST_FEATURES = 2000  # of a linear regression: its normal equations hold the square of this

BASELINES = (
    Metric("mean_mse", "less", words="mse of always the mean"),
    Metric("mean_mae", "less", words="mae of always the mean"),
    Metric("linear_mse", "less", words="mse of linear regression"),
    Metric("linear_mae", "less", words="mae of linear regression"),
)


class Regression(Objective):
    """Mean squared error over a row's K numbers, standardised as the batch has them; metrics in the numbers' units.

        loss = (1/K) sum_k (output_k - target_k)^2
        mse = (1/K) sum_k s_k^2 (output_k - target_k)^2        mae = (1/K) sum_k s_k |output_k - target_k|

    with s_k the standard deviation of the k-th number over the training rows: what 1 of the batch's is in its units.
    """

    metrics: tuple[Metric, ...] = (Metric("mse", "less"), Metric("mae", "less"))
    whole = NUMBER_FIGURES
    sections = ("importance",)

    def __init__(self, num_outputs: int, *, gathered: tuple[str, ...] = ()) -> None:
        """`gathered` are metrics of the whole split in validation too."""
        self.num_outputs, self.gathered = num_outputs, gathered

    def measure(self, model: Any, batch: Batch, *, carry: Any = None, across: Across = only_here) -> Measured:
        """Outputs (B, K) against targets (B, K), or (B,) where K is 1."""
        outputs = model(batch["input"])
        predictions = at_least_float32(outputs)
        targets = _like(batch["target"], predictions)
        loss = F.mse_loss(predictions, targets, reduction="sum") / self.num_outputs
        errors = (predictions.detach() - targets).double().reshape(-1, self.num_outputs)
        errors = errors * _unit(batch, errors)
        sums = torch.stack(self.sums(errors)) / self.num_outputs
        return Measured(loss, sums, outputs=outputs.detach())

    def sums(self, errors: Tensor) -> tuple[Tensor, ...]:
        """Of each metric, K times its sum, of errors (B, K) in the numbers' units."""
        return errors.square().sum(), errors.abs().sum()

    def figures(self, signature: Signature, *, num_rows: int | None = None) -> Figures | None:
        """See Objective."""
        return NumberFigures() if self.gathered or num_rows is not None else None

    def baseline(self, signature: Signature, model: ModelSpec) -> Baseline:
        """See Objective: the mean, and a linear regression of features."""
        column = signature["input"]
        features = column.size if isinstance(column, Features) and column.size <= MOST_FEATURES else 0
        return LeastSquares(features, signature.num_outputs)

    def evidence(self, signature: Signature) -> Evidence:
        """See Objective."""
        return NumberEvidence()

    def inspected_rows(self, signature: Signature) -> int:
        """See Objective."""
        return rows_explained(signature["input"])

    def inspect(self, model: Any, signature: Signature, batch: Batch) -> Mapping[str, Tensor]:
        """See Objective: of features how much of R2, on average over the numbers, is lost without each."""

        def r2(outputs: Tensor) -> Tensor:
            targets = _like(batch["target"], outputs).double()
            errors = (outputs.double() - targets).square().sum(0)
            return (1 - errors / (targets - targets.mean(0)).square().sum(0).clamp(min=1e-12)).mean()

        return explained(model, signature, batch, score=r2, classes=False)


def _like(targets: Tensor, predictions: Tensor) -> Tensor:
    """Targets in the predictions' shape and precision: (B,) against (B, 1) would broadcast to (B, B)."""
    return targets.reshape(predictions.shape).to(predictions.dtype)


def _unit(batch: Batch, like: Tensor) -> Tensor:
    """(K,): what a difference of 1 between scaled targets is in the targets' units."""
    ones = like.new_ones(like.shape[1])
    return batch.unscale("target", ones) - batch.unscale("target", torch.zeros_like(ones))


class LeastSquares:
    """Models without training to compare with, from sums over all training rows: in float64, nothing is held.

    Linear regression by the normal equations, of standardised features; of collinear ones the shortest solution. The D
    numbers of a row may be of any shape: those of a window of a series are a linear autoregression.
    """

    def __init__(self, num_features: int, num_outputs: int) -> None:
        """Without features the mean is all there is."""
        self._features, self._outputs = num_features, num_outputs
        self._sums: Tensor | None = None  # (1 + D, 1 + D + K): of products of (1, x) with (1, x, y)

    def add(self, batch: Batch) -> None:
        """Take in a batch of training rows; not of rows that stand in."""
        targets = batch["target"].reshape(-1, self._outputs).double()
        ones = torch.ones_like(targets[:, :1])
        rows = torch.cat((ones, batch["input"].flatten(1).double()), 1) if self._features else ones
        sums = rows.T @ torch.cat((rows, targets), 1)
        self._sums = sums if self._sums is None else self._sums + sums

    def models(self, across: Across, device: torch.device) -> dict[str, nn.Module]:
        """By name, on the device. Called by all ranks; `across` sums a tensor on the device over them."""
        size = 1 + self._features
        sums = self._sums
        if sums is None:  # a rank of more than there are rows
            sums = torch.zeros(size, size + self._outputs, dtype=torch.float64, device=device)
        products, targets = across(sums).cpu().split((size, self._outputs), 1)
        found: dict[str, nn.Module] = {"mean": Affine(targets[:1] / products[:1, :1])}
        if self._features:
            found["linear"] = Affine(torch.linalg.pinv(products, hermitian=True) @ targets)
        return {name: model.to(device) for name, model in found.items()}


class Affine(nn.Module):
    """Outputs (B, K) = weights[0] + x weights[1:], weights (1 + D, K); a constant where there is only the first."""

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D), or rows of D numbers in any shape -> (B, K)."""
        constant = self.weights[0].expand(len(x), -1)
        return constant if len(self.weights) == 1 else constant + x.flatten(1).to(self.weights.dtype) @ self.weights[1:]


class PredictsNumbers(RowObjectiveSpec):
    """Base of the objectives that predict a row of numbers."""

    metrics: tuple[Literal["r2"], ...] = Field(
        (), description="figures that each validation measures too, for sweeps and curves; the test has them anyway"
    )


class RegressionSpec(PredictsNumbers):
    """Predict numbers: mean squared error of standardised ones, and the errors in their units."""

    reads = reading(target=Numbers)
    objective = Regression
    baselines = BASELINES
    kind: Literal["regression"] = "regression"

    def build(self, signature: Signature) -> Regression:
        """The objective."""
        return Regression(signature.num_outputs, gathered=self.metrics)
