"""Objectives: (model, batch) -> loss, and metric sums with their counts.

Losses and metrics are sums over rows, never means: sums over batches and ranks add up, and the training loop
divides by the number of rows once.

Shapes: B rows of the batch, C classes, K predicted numbers.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from nn_models.adversarial import AdversarialSpec
from nn_models.errors import UserError
from nn_models.model import ModelSpec
from nn_models.spec import Spec


class Measured(NamedTuple):
    """What an objective finds in one batch: the differentiable sum of the rows' losses, and detached outputs."""

    loss: Tensor
    outputs: Tensor


class Objective(ABC):
    """What a model is trained for. `names` are the metrics; the best weights are those with the best `best_metric`."""

    names: ClassVar[tuple[str, ...]]
    best_metric: ClassVar[str]
    mode: ClassVar[Literal["min", "max"]]

    @abstractmethod
    def measure(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Measured:
        """Run the model; the loss is a float32 sum even where autocast makes outputs of half precision."""

    @abstractmethod
    def sums(self, measured: Measured, targets: Tensor) -> Tensor:
        """Each metric in `names` summed over the rows: float64, on the batch's device, without waiting for it."""


class Classification(Objective):
    """Cross entropy of the softmax, the negative log likelihood of the true class y (Bishop 2006, eq. 4.108).

        p = softmax(outputs)        loss = -sum_c q_c log p_c        q_c = (1 - s) [c = y] + s / C

    with label smoothing s (Szegedy et al. 2016, section 7). The metric `accuracy` counts rows whose largest
    output is the true class.
    """

    names = ("accuracy",)
    best_metric = "validation/accuracy"
    mode = "max"

    def __init__(self, num_classes: int, *, label_smoothing: float) -> None:
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing

    def measure(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Measured:
        """Outputs (B, C) against targets (B,), int64."""
        outputs = model(inputs)
        loss = F.cross_entropy(
            at_least_float32(outputs), targets, reduction="sum", label_smoothing=self.label_smoothing
        )
        return Measured(loss, outputs.detach())

    def sums(self, measured: Measured, targets: Tensor) -> Tensor:
        """(1,): the number of rows classified correctly."""
        return (measured.outputs.argmax(1) == targets).sum(0, keepdim=True, dtype=torch.float64)

    def confusion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(C, C), int64: rows of true class i taken for class j. Matrices of batches add up."""
        pairs = targets * self.num_classes + outputs.argmax(1)
        return torch.bincount(pairs, minlength=self.num_classes**2).view(self.num_classes, self.num_classes)

    def confidence(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's predicted class (B,) and the probability (B,) the model gives it."""
        probabilities, predictions = at_least_float32(outputs).softmax(1).max(1)
        return predictions, probabilities


class Regression(Objective):
    """Mean squared error over a row's K numbers; the metrics are `mse`, which is the loss, and `mae`.

    loss = (1/K) sum_k (output_k - target_k)^2
    """

    names = ("mse", "mae")
    best_metric = "validation/loss"
    mode = "min"

    def __init__(self, num_outputs: int) -> None:
        self.num_outputs = num_outputs

    def measure(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Measured:
        """Outputs (B, K) against targets (B, K), or (B,) where K is 1."""
        outputs = model(inputs)
        predictions = at_least_float32(outputs)
        loss = F.mse_loss(predictions, _like(targets, predictions), reduction="sum") / self.num_outputs
        return Measured(loss, outputs.detach())

    def sums(self, measured: Measured, targets: Tensor) -> Tensor:
        """(2,): squared and absolute errors, averaged over a row's numbers and summed over the rows."""
        predictions = at_least_float32(measured.outputs)
        absolute = F.l1_loss(predictions, _like(targets, predictions), reduction="sum") / self.num_outputs
        return torch.stack((measured.loss.detach(), absolute)).double()


def _like(targets: Tensor, predictions: Tensor) -> Tensor:
    """Targets in the predictions' shape and precision: (B,) against (B, 1) would broadcast to (B, B)."""
    return targets.reshape(predictions.shape).to(predictions.dtype)


class ObjectiveSpec(Spec):
    """Base of every objective's description; `target_kind` says what it needs the data's targets to be."""

    target_kind: ClassVar[Literal["label", "number"]]
    kind: str

    def check(self, model: ModelSpec) -> None:
        """Raise UserError where the model is not one net."""
        if isinstance(model, AdversarialSpec):
            raise UserError(
                "objective.kind",
                f"{self.kind} trains one net, but {model.kind} is a generator and a discriminator",
                "set objective.kind to adversarial",
            )

    def build(self, num_outputs: int) -> Objective:
        """The objective for a model with so many outputs."""
        raise NotImplementedError


class ClassificationSpec(ObjectiveSpec):
    """Predict one of several classes: cross entropy and accuracy."""

    target_kind = "label"
    kind: Literal["classification"] = "classification"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread evenly over all classes")

    def build(self, num_outputs: int) -> Classification:
        """The objective for `num_outputs` classes."""
        if num_outputs < 2:
            raise UserError(
                "objective.kind",
                f"classification needs at least 2 classes, but the data has {num_outputs}",
                "choose another data set, or set objective.kind to regression",
            )
        return Classification(num_outputs, label_smoothing=self.label_smoothing)


class RegressionSpec(ObjectiveSpec):
    """Predict numbers: mean squared error, and mean absolute error."""

    target_kind = "number"
    kind: Literal["regression"] = "regression"

    def build(self, num_outputs: int) -> Regression:
        """The objective for `num_outputs` numbers a row."""
        return Regression(num_outputs)


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or in float64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))  # autocast makes logits of half precision
