"""Evidence of trees: which classes are taken for which, at which height, unknown words, and trees node by node.

Shapes: B trees of a batch, N nodes of them, C classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nn_models.batch import Batch, Forest, Ragged
from nn_models.evidence import confidence, confusion
from nn_models.examples import Examples, Gather, gather_here
from nn_models.sequence_objectives import step_labels

FEWEST_NODES, MOST_NODES = 15, 51  # of a tree that shows where the prediction turns
HEIGHTS = 64  # levels that are told apart; higher nodes count with the last


class TreeEvidence:
    """Of all trees of all ranks; the first ones whose root is right, and those whose root is most confidently wrong.

    `confusion` (C, C) counts nodes and `root_confusion` (C, C) trees, rows being the true classes; `heights` (64, 2)
    has for each level of nodes how many are right, and how many there are; `words` (2,) how many words are unknown, and
    how many there are. Examples have their trees as stored, and for each node its target, prediction and confidence;
    so have the `flipped_` ones, right trees with the most nodes that rightly have another class than their children.
    """

    section = "trees"

    def __init__(self, num_classes: int, *, num_known: int) -> None:
        """Words from `num_known` on are unknown."""
        self._num_classes, self._num_known = num_classes, num_known
        self._counts: dict[str, Tensor] = {}
        self._examples, self._flipped = Examples(2), Examples(1)

    def add(self, batch: Batch, outputs: Tensor) -> None:
        """See Evidence: outputs (N, C), tree after tree as stored."""
        forest, targets = batch["input"], step_labels(batch)
        predictions, confidences = confidence(outputs)
        right, roots = predictions == targets, forest.lengths.cumsum(0) - 1
        counts = {
            "confusion": confusion(outputs, targets, self._num_classes),
            "root_confusion": confusion(outputs[roots], targets[roots], self._num_classes),
            "heights": _by_height(forest, right),
            "words": torch.stack(((forest.words >= self._num_known).sum(), (forest.words >= 0).sum())),
        }
        self._counts = {name: self._counts.get(name, 0) + found for name, found in counts.items()}
        each_node = {"targets": targets, "predictions": predictions, "confidences": confidences.float()}
        columns = {"inputs": forest, **{name: _of_nodes(values, forest) for name, values in each_node.items()}}
        root_right = right[roots]
        self._examples.keep(0, batch.place.ids, torch.where(root_right, 0.0, -torch.inf), columns)
        self._examples.keep(1, batch.place.ids, torch.where(root_right, -torch.inf, confidences[roots]), columns)
        flips = _flips(forest, predictions, right)
        shares = flips / forest.lengths.clamp(min=FEWEST_NODES)
        told = root_right & (flips > 0) & (forest.lengths <= MOST_NODES)
        self._flipped.keep(0, batch.place.ids, torch.where(told, shares, -torch.inf), columns)

    def tensors(
        self, across: Callable[[Tensor], Tensor], device: torch.device, gather: Gather = gather_here
    ) -> dict[str, Tensor]:
        """See Evidence."""
        size = self._num_classes
        shapes = {"confusion": (size, size), "root_confusion": (size, size), "heights": (HEIGHTS, 2), "words": (2,)}
        none = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in shapes.items()}
        counted = {name: across(values).cpu() for name, values in {**none, **self._counts}.items()}
        flipped = self._flipped.tensors(gather, device).items()
        turned = {name.replace("example", "flipped", 1): values for name, values in flipped}
        return {**counted, **self._examples.tensors(gather, device), **turned}


def _of_nodes(values: Tensor, forest: Forest) -> Ragged:
    return Ragged(values, forest.lengths, len(values))  # at most so many in one row: the longest is not asked for


def _flips(forest: Forest, predictions: Tensor, right: Tensor) -> Tensor:
    """(B,): nodes above the leaves that rightly have another class than each of their children."""
    of_nodes, is_right = predictions[forest.places], right[forest.places]
    there = forest.children >= 0
    same = (of_nodes[forest.children.clamp(min=0)] == of_nodes[:, None]) & there
    turned = (is_right & there.any(1) & ~same.any(1)).long()
    stored = torch.empty_like(turned).index_copy_(0, forest.places, turned)
    return torch.zeros_like(forest.lengths).index_add(0, _of_nodes(stored, forest).rows(), stored)


def _by_height(forest: Forest, right: Tensor) -> Tensor:
    """(64, 2): nodes that are right, and all, of each level."""
    found = right.new_zeros(HEIGHTS, 2, dtype=torch.int64)
    by_level = right[forest.places]
    for height, (first, end) in enumerate(forest.spans()):
        row = found[min(height, HEIGHTS - 1)]
        row[0] += by_level[first:end].sum()
        row[1] += end - first
    return found
