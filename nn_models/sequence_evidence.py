"""Evidence of sequences: labels of steps, right and wrong; and what a language model writes.

Shapes: B rows of a batch, N steps of all rows, T steps of the longest, C classes, V words.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nn_models.batch import Batch, Ragged, Value
from nn_models.columns import Tokens
from nn_models.evidence import MAX_CONFUSION_CLASSES, confusion
from nn_models.examples import Examples, Gather, gather_here
from nn_models.likeliest import likeliest


class StepEvidence:
    """The confusion matrix of all steps; of all rows those with the most wrong steps, and the first without any."""

    section = "steps"

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._confusion: Tensor | None = None
        self._examples = Examples(2)

    def add(self, batch: Batch, outputs: Tensor) -> None:
        """See Evidence: outputs (N, C)."""
        labels, size = batch["target"], self._num_classes
        targets = (labels.values if isinstance(labels, Ragged) else labels.flatten()).long()
        if size <= MAX_CONFUSION_CLASSES:
            counted = confusion(outputs, targets, size)
            self._confusion = counted if self._confusion is None else self._confusion + counted
        predictions = likeliest(outputs)
        wrong = _of_rows((predictions != targets).double(), labels)
        columns = {
            "inputs": batch.stored["input"],
            "targets": _like(labels, targets.int()),
            "predictions": _like(labels, predictions.int()),
        }
        ids = batch.place.ids
        self._examples.keep(0, ids, torch.where(wrong > 0, wrong, -torch.inf), columns)
        self._examples.keep(1, ids, torch.where(wrong > 0, -torch.inf, 0.0), columns)

    def tensors(
        self, across: Callable[[Tensor], Tensor], device: torch.device, gather: Gather = gather_here
    ) -> dict[str, Tensor]:
        """See Evidence."""
        examples = self._examples.tensors(gather, device)
        if self._num_classes > MAX_CONFUSION_CLASSES:
            return examples
        counted = self._confusion
        if counted is None:  # a rank of more than there are rows
            counted = torch.zeros(self._num_classes, self._num_classes, dtype=torch.int64, device=device)
        return {"confusion": across(counted).cpu(), **examples}


def _of_rows(values: Tensor, labels: Value) -> Tensor:
    """(N,) -> (B,): sums over each row's steps."""
    if isinstance(labels, Ragged):
        return values.new_zeros(len(labels.lengths)).index_add_(0, labels.rows(), values)
    assert isinstance(labels, Tensor)
    return values.view(labels.shape).sum(1)


def _like(labels: Value, values: Tensor) -> Value:
    """(N,) laid as the labels are."""
    if isinstance(labels, Ragged):
        return Ragged(values, labels.lengths, labels.longest, labels.cpu_lengths)
    assert isinstance(labels, Tensor)
    return values.view(labels.shape)


@torch.no_grad()
def written(model: Any, start: Tensor, num: int, *, temperature: float, generator: torch.Generator) -> Iterator[int]:
    """So many tokens that follow those in `start` (n,), one at a time, each as soon as it is drawn.

    A token is drawn from softmax(scores / temperature), and is the likeliest one at 0; `generator` is one of the CPU.
    `model` is called as NextToken calls it.
    """
    words, state = start[None], None
    for _ in range(num):
        scores, state = model(words, state, keep_state=True)
        last = scores[-1].float().cpu()
        if temperature:
            token = int(torch.multinomial((last / temperature).softmax(0), 1, generator=generator))
        else:
            token = int(last.argmax())
        yield token
        words = torch.tensor([[token]], device=start.device)


def first_token(column: Tokens) -> int:
    """What a text begins after where nothing else is said: the end of a line, where there is one."""
    return column.names.index("\n") if "\n" in column.names else 0


@torch.no_grad()
def bits_of_steps(model: Any, words: Tensor, following: Tensor) -> Tensor:
    """(B, T): the bits -log2 p that each following token costs, in windows (B, T) that all begin anew."""
    outputs = model(words).float()
    return F.cross_entropy(outputs, following.flatten().long(), reduction="none").view(words.shape) / math.log(2)
