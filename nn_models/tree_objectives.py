"""Objectives of trees: a label for each node, and how right the roots are.

Shapes: B trees of the batch, N nodes of all trees, C classes.
"""

from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor
from torch.nn import functional as F

from nn_models.batch import Batch
from nn_models.columns import Labels, Tree
from nn_models.errors import UserError
from nn_models.evidence import Evidence
from nn_models.metrics import LOSS, Metric, Reported
from nn_models.model import ModelSpec, reading
from nn_models.objectives import Across, Measured, Objective, SupervisedSpec, at_least_float32, only_here
from nn_models.sequence_objectives import step_labels
from nn_models.signature import Signature
from nn_models.spec import invalid
from nn_models.tree_evidence import TreeEvidence

Classes = tuple[NonNegativeInt, ...]
NODES, ROOTS, POLES = (
    Metric("accuracy", "more"),  # of nodes; in words it is what other objectives call theirs
    Metric("root_accuracy", "more", words="accuracy of whole trees"),
    Metric("binary_accuracy", "more", words="accuracy of whole trees between two poles"),
)


class NodeLabels(Objective):
    """A class for each node: cross entropy of all nodes; accuracies of all nodes, and of whole trees by their roots.

        loss = -sum over nodes log softmax(y)[label]

    With two poles, sets of classes such as the negative and the positive ones, trees of other classes are left out, and
    whichever pole has the higher probability is what the net says (Socher et al. 2013, section 5.1).
    """

    metrics: tuple[Metric, ...] = (NODES, ROOTS, POLES)
    best = ROOTS.name
    last_says = True

    def __init__(self, *, poles: tuple[Classes, Classes] | None, best: str) -> None:
        self.metrics = (NODES, ROOTS, *([POLES] if poles else []))
        self.best = best
        self._poles = poles

    def measure(self, model: Any, batch: Batch, *, carry: Any = None, across: Across = only_here) -> Measured:
        """Outputs (N, C) against labels (N,), tree after tree, the root last in each."""
        outputs, labels = model(batch["input"]), step_labels(batch)
        scores = at_least_float32(outputs)
        loss = F.cross_entropy(scores, labels, reduction="sum")
        scores = scores.detach()
        right = scores.argmax(1) == labels
        roots = batch["input"].lengths.cumsum(0) - 1
        sums, counts = [right.sum(), right[roots].sum()], [len(labels), len(roots)]
        found = [torch.full_like(sums[0], count) for count in counts]
        if self._poles:
            root_labels = labels[roots]
            by_class = scores[roots].unbind(1)  # an index of numbers would be copied to the device at each step
            low, high = (torch.stack([by_class[number] for number in pole]).logsumexp(0) for pole in self._poles)
            is_low, is_high = (_among(root_labels, pole) for pole in self._poles)
            sums.append(torch.where(high > low, is_high, is_low).sum())
            found.append((is_low | is_high).sum())
        return Measured(loss, torch.stack(sums).double(), counts=torch.stack(found).double(), outputs=outputs.detach())

    def predicted(self, outputs: Tensor) -> Tensor:
        """See Objective: (N,) of outputs (N, C), tree after tree."""
        return outputs.argmax(1)

    def evidence(self, signature: Signature) -> Evidence:
        """See Objective."""
        column = signature["input"]
        assert isinstance(column, Tree)
        return TreeEvidence(signature.num_outputs, num_known=column.num_known)


def _among(labels: Tensor, classes: Classes) -> Tensor:
    return torch.stack([labels == number for number in classes]).any(0)


class NodeLabelsSpec(SupervisedSpec):
    """Predict a class for each node of a tree."""

    reads = reading(input=Tree, target=Labels)
    takes = frozenset({"elements"})
    counts = "input"
    objective = NodeLabels
    kind: Literal["node_labels"] = "node_labels"
    poles: tuple[Classes, Classes] | None = Field(
        None, description="two sets of classes between which whole trees are decided too, such as [[0, 1], [3, 4]]"
    )
    best: Literal["root_accuracy", "accuracy", "binary_accuracy"] = Field(
        "root_accuracy", description="by which the best weights are chosen: of whole trees, of all nodes, between poles"
    )

    @model_validator(mode="after")
    def _poles_are_apart(self) -> "NodeLabelsSpec":
        if self.poles and (not all(self.poles) or set(self.poles[0]) & set(self.poles[1])):
            raise invalid("two sets of classes, none of them in both", "give such as [[0, 1], [3, 4]]", field="poles")
        if self.best == POLES.name and not self.poles:
            raise invalid("there are no poles to decide between", "set poles, or another best", field="best")
        return self

    def check_data(self, signature: Signature, *, source: str) -> None:
        """See ObjectiveSpec."""
        super().check_data(signature, source=source)
        size = signature.num_outputs
        if self.poles and (highest := max(map(max, self.poles))) >= size:
            raise UserError("objective.poles", f"no class {highest} in {source}, which has {size}", "leave it out")

    def reported(self, model: ModelSpec, signature: Signature | None) -> Reported:
        """See ObjectiveSpec."""
        metrics = (LOSS, NODES, ROOTS, *([POLES] if self.poles else []))
        return Reported(metrics, metrics, self.best)

    def build(self, signature: Signature) -> NodeLabels:
        """The objective."""
        return NodeLabels(poles=self.poles, best=self.best)
