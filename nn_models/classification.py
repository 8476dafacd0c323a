"""Classification: one of several classes a row: cross entropy, accuracy, metrics of whole splits.

Shapes: B rows of the batch, C classes, R models of fused trials.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from nn_models.batch import Batch
from nn_models.class_weights import ClassWeights, weights_of
from nn_models.columns import Label
from nn_models.errors import UserError
from nn_models.evidence import ClassEvidence, Evidence
from nn_models.explaining import explained, rows_explained
from nn_models.figures import CLASS_FIGURES, MAX_SCORES, TOP, TOP_FROM_CLASSES, ClassFigures, Figures
from nn_models.likeliest import likeliest
from nn_models.metrics import Metric
from nn_models.model import reading
from nn_models.objectives import Across, Measured, Objective, RowObjectiveSpec, at_least_float32, only_here
from nn_models.signature import Signature


class Classification(Objective):
    """Cross entropy of the softmax, the negative log likelihood of the true class y (Bishop 2006, eq. 4.108).

        p = softmax(outputs)        loss = -sum_c q_c log p_c        q_c = (1 - s) [c = y] + s / C

    with label smoothing s (Szegedy et al. 2016, section 7). With class weights w, which are 1 on average over the
    training rows, a row's loss counts w_y times. The metric `accuracy` counts rows whose largest output is the true
    class, whatever they weigh.
    """

    metrics = (Metric("accuracy", "more"),)
    whole = CLASS_FIGURES
    best = "accuracy"
    sections = ("occlusion", "importance")

    def __init__(
        self, *, label_smoothing: float, weights: Tensor | None = None, gathered: tuple[str, ...] = ()
    ) -> None:
        """`weights` (C,) as `weights_of` gives them; `gathered` are metrics of the whole split in validation too."""
        self.label_smoothing, self.gathered = label_smoothing, gathered
        self._weights = weights

    def measure(self, model: Any, batch: Batch, *, carry: Any = None, across: Across = only_here) -> Measured:
        """Outputs (B, C) against targets (B,), int64."""
        outputs, targets = model(batch["input"]), batch["target"]
        scores, smoothing = at_least_float32(outputs), self.label_smoothing
        if self._weights is None:
            loss = F.cross_entropy(scores, targets, reduction="sum", label_smoothing=smoothing)
        else:  # torch's own weights are something else where labels are smoothed
            each_row = F.cross_entropy(scores, targets, reduction="none", label_smoothing=smoothing)
            loss = (each_row * self._weights_of(targets)).sum()
        outputs = outputs.detach()
        right = (likeliest(outputs) == targets).sum(0, keepdim=True, dtype=torch.float64)
        return Measured(loss, right, outputs=outputs)

    def measure_each(
        self, outputs: Tensor, batch: Batch, *, shared: bool, each: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See Objective. The same without vmap, by which it takes as long as a small model."""
        smoothings = each.get("label_smoothing")
        ends = (self.label_smoothing,) if smoothings is None else (0.0, 1.0)
        targets = batch["target"]
        scores = outputs.transpose(1, 2)  # (R, classes, B), which torch goes through much faster than classes last
        labels = targets.expand(len(outputs), -1) if shared else targets.t()
        rows = [F.cross_entropy(scores, labels, reduction="none", label_smoothing=end) for end in ends]
        if self._weights is not None:
            rows = [row * self._weights_of(labels) for row in rows]
        losses = rows[0].sum(1)
        if smoothings is not None:  # torch's label_smoothing is no tensor, but the loss is linear in it
            losses = torch.lerp(losses, rows[1].sum(1), smoothings)
        right = scores.detach().max(1).indices == labels  # argmax takes twenty times as long as max
        return losses, right.sum(1, dtype=torch.float64).unsqueeze(1)

    def predicted(self, outputs: Tensor) -> Tensor:
        """See Objective: (B,) of outputs (B, C)."""
        return likeliest(outputs)

    def _weights_of(self, targets: Tensor) -> Tensor:
        assert self._weights is not None
        self._weights = self._weights.to(targets.device)  # once
        return self._weights[targets]

    def figures(self, signature: Signature, *, num_rows: int | None = None) -> Figures | None:
        """See Objective. A test does without those that say little or take much memory, unless they are asked for."""
        names, num_classes = set(self.gathered), signature.num_outputs
        if num_rows is not None:
            names |= {"balanced_accuracy", "macro_f1"}
            names |= {"top5_accuracy"} if num_classes >= TOP_FROM_CLASSES else set()
            names |= {"auroc"} if num_rows * num_classes <= MAX_SCORES else set()
        return ClassFigures(num_classes, names) if names else None

    def evidence(self, signature: Signature) -> Evidence:
        """See Objective."""
        return ClassEvidence(signature["target"].num_outputs)

    def inspected_rows(self, signature: Signature) -> int:
        """See Objective."""
        return rows_explained(signature["input"])

    def inspect(self, model: Any, signature: Signature, batch: Batch) -> Mapping[str, Tensor]:
        """See Objective: what it goes by in images; of features how much accuracy is lost without each."""

        def accuracy(outputs: Tensor) -> Tensor:
            return (likeliest(outputs) == batch["target"]).double().mean()

        return explained(model, signature, batch, score=accuracy, classes=True)


class ClassificationSpec(RowObjectiveSpec):
    """Predict one of several classes: cross entropy and accuracy, with weights for the classes where they are rare."""

    reads = reading(target=Label)
    objective = Classification
    kind: Literal["classification"] = "classification"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread evenly over all classes")
    class_weights: ClassWeights = Field(
        None,
        description="how often a row of a class counts in the loss, 1 on average: balanced (each class as much), or "
        "class: weight, relative to 1 for the others",
    )
    metrics: tuple[Literal["balanced_accuracy", "macro_f1", "auroc", "top5_accuracy"], ...] = Field(
        (), description="figures that each validation measures too, for sweeps and curves; the test has them anyway"
    )

    def build(self, signature: Signature) -> Classification:
        """The objective. Raises UserError where there are too few classes."""
        if signature.num_outputs < 2:
            raise UserError(
                "objective.kind",
                f"classification needs at least 2 classes, but the data has {signature.num_outputs}",
                "choose another data set",
            )
        label = signature["target"]
        weights = None if self.class_weights is None else weights_of(self.class_weights, cast(Label, label))
        if "top5_accuracy" in self.metrics and label.num_outputs <= TOP:
            raise UserError("objective.metrics", f"top5_accuracy of {label.num_outputs} classes is always 1", "drop it")
        return Classification(label_smoothing=self.label_smoothing, weights=weights, gathered=self.metrics)
