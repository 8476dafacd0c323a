"""Evidence: what there is to see of a test beside its figures, gathered over all its batches."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from nn_models.batch import Batch
from nn_models.examples import Examples, Gather, gather_here
from nn_models.figures import Gathered
from nn_models.likeliest import likeliest

MAX_CONFUSION_CLASSES = 1000  # of 100,000 classes the matrix would take 80 GB


class Evidence(Protocol):
    """What an objective shows; `section` names the part of the report that reads it."""

    section: str

    def add(self, batch: Batch, outputs: Any) -> None:
        """Take in one batch and what the objective's `Measured.outputs` were; not of rows that stand in."""

    def tensors(
        self, across: Callable[[Tensor], Tensor], device: torch.device, gather: Gather = gather_here
    ) -> dict[str, Tensor]:
        """What is kept, on the CPU, by name. Called by all ranks.

        `across` sums a tensor on the device over them; `gather` gives that of each, in their order.
        """


class ClassEvidence:
    """The confusion matrix, the first right predictions and the most confident wrong ones, of all rows of all ranks."""

    section = "classes"

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._confusion: Tensor | None = None
        self._examples = Examples(2)

    def add(self, batch: Batch, outputs: Tensor) -> None:
        """See Evidence: outputs (B, C)."""
        targets, size = batch["target"], self._num_classes
        if size <= MAX_CONFUSION_CLASSES:
            counted = confusion(outputs, targets, size)
            self._confusion = counted if self._confusion is None else self._confusion + counted
        predictions, confidences = confidence(outputs)
        columns = {"inputs": batch.stored["input"], "targets": targets, "predictions": predictions}
        columns["confidences"] = confidences.float()
        right, ids = predictions == targets, batch.place.ids
        self._examples.keep(0, ids, torch.where(right, 0.0, -torch.inf), columns)
        self._examples.keep(1, ids, torch.where(right, -torch.inf, confidences), columns)

    def tensors(
        self, across: Callable[[Tensor], Tensor], device: torch.device, gather: Gather = gather_here
    ) -> dict[str, Tensor]:
        """See Evidence."""
        if self._num_classes > MAX_CONFUSION_CLASSES:
            return self._examples.tensors(gather, device)
        counted = self._confusion
        if counted is None:  # a rank of more than there are rows
            counted = torch.zeros(self._num_classes, self._num_classes, dtype=torch.int64, device=device)
        return {"confusion": across(counted).cpu(), **self._examples.tensors(gather, device)}


class NumberEvidence:
    """Predicted numbers beside the true ones, of all rows in their units; the inputs of the first ones, as examples."""

    section = "numbers"

    def __init__(self) -> None:
        self._examples = Examples(1)
        self._rows = Gathered()

    def add(self, batch: Batch, outputs: Tensor) -> None:
        """See Evidence: outputs (B, K)."""
        outputs = batch.unscale("target", outputs.double())
        targets = batch.stored.get("target")
        if not isinstance(targets, Tensor):
            targets = batch.unscale("target", batch["target"].double().reshape(outputs.shape))
        targets = targets.double().reshape(outputs.shape)
        self._rows.add(batch, torch.cat((targets, outputs), 1))
        columns = {"inputs": batch.stored["input"], "targets": targets.float(), "predictions": outputs.float()}
        self._examples.keep(0, batch.place.ids, torch.zeros(len(outputs), device=outputs.device), columns)

    def tensors(
        self, across: Callable[[Tensor], Tensor], device: torch.device, gather: Gather = gather_here
    ) -> dict[str, Tensor]:
        """See Evidence."""
        targets, predictions = self._rows.whole(across, device).cpu().chunk(2, 1)
        whole = {"targets": targets.contiguous(), "predictions": predictions.contiguous()}
        return {**whole, **self._examples.tensors(gather, device)}


def confusion(outputs: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """(C, C), int64: rows of true class i taken for class j. Matrices of batches add up."""
    pairs = targets * num_classes + likeliest(outputs)
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def confidence(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's predicted class (B,) and the probability (B,) the model gives it."""
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # autocast makes logits of half precision
    probabilities, predictions = wide.softmax(1).max(1)
    return predictions, probabilities
