"""Labelled parser: a parser that learns the labels of nodes too, and F1 of brackets with labels.

Shapes: B sentences of the batch, M joins of the longest, N nodes of the true trees, C classes.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch.nn import functional as F

from nn_models.batch import Batch
from nn_models.columns import Labels, Tree
from nn_models.metrics import Metric
from nn_models.model import check_column, reading
from nn_models.objectives import Across, Measured, Objective, at_least_float32, only_here
from nn_models.parser import ParserNet, ParserSpec
from nn_models.parser_objective import F1, Over, Parsing, ParsingSpec
from nn_models.sequence_objectives import step_labels
from nn_models.signature import Signature

LABELLED = Metric("labelled_bracket_f1", "more", words="F1 of brackets (labelled)", short="labelled F1")


class LabelledParserSpec(ParserSpec):
    """Parser that also says the label of each node, by softmax (Socher et al. 2011)."""

    gives = frozenset({"labelled_tree"})
    kind: Literal["labelled_parser"] = "labelled_parser"  # type: ignore[assignment]

    def check(self, signature: Signature) -> None:
        """See ModelSpec."""
        super().check(signature)
        learns = f"{self.kind} learns the label of each node"
        fix = "choose data whose nodes have labels, or set model.kind to parser"
        check_column(signature, "target", (Labels,), path="model.kind", reads=learns, fix=fix)

    def build(self, signature: Signature) -> ParserNet:
        """The module: trees -> Parsed, with labels."""
        return self.net(signature, signature.num_outputs)


class LabelledParsing(Parsing):
    """Parsing, and a label for each node of the true trees, words included: category classifiers (Socher et al. 2011).

        loss = loss of Parsing - weight * sum over nodes log softmax(y)[label]

    `labelled_bracket_f1` is evalb's bracketing F-measure (Black et al. 1991; Sekine & Collins 1997): a bracket is right
    where the true tree has one around the same words with the same label, and 2 right / (found + true) is of all
    sentences together. Those around whole sentences count, since their labels can be wrong, and words do not. Nothing
    is left out, as punctuation is by evalb's parameter files; a node of one child in the true tree is no bracket.
    """

    metrics = (F1, LABELLED)
    best = LABELLED.name

    def __init__(self, margin: float, *, over: Over, weight: float) -> None:
        super().__init__(margin, over=over)
        self.weight = weight

    @property
    def compared(self) -> tuple[Metric, ...]:
        """See Objective: trees of one shape have no labels."""
        return (F1,)

    def measure(self, model: Any, batch: Batch, *, carry: Any = None, across: Across = only_here) -> Measured:
        """`model` gives Parsed of the batch's trees, with labels, or without: then none is right."""
        parsed = self._parsed(model, batch)
        found = self._measured(parsed)
        assert found.counts is not None
        loss, right = found.loss, torch.zeros_like(found.sums[0])
        if parsed.labelled is not None:
            scores, labels, nodes = parsed.labelled
            true = step_labels(batch)[batch["input"].places]
            loss = loss + self.weight * F.cross_entropy(at_least_float32(scores), true, reduction="sum")
            same = labels == F.pad(true, (0, 1), value=-1)[nodes]
            right = (same & parsed.right).sum().double()
        every = ((parsed.brackets[..., 0] >= 0).sum() + parsed.true_brackets.sum()).double()
        sums, counts = (
            torch.cat((one, other[None])) for one, other in ((found.sums, 2 * right), (found.counts, every))
        )
        return Measured(loss, sums, counts=counts, outputs=found.outputs)


class LabelledParsingSpec(ParsingSpec):
    """Learn the trees of sentences and the labels of their nodes (max-margin, and cross entropy)."""

    reads = reading(input=Tree, target=Labels)
    takes = frozenset({"labelled_tree"})
    objective: ClassVar[type[Objective]] = LabelledParsing
    kind: Literal["labelled_parsing"] = "labelled_parsing"  # type: ignore[assignment]
    weight: NonNegativeFloat = Field(0.1, description="of the labels' cross entropy, beside the loss of the trees")

    def build(self, signature: Signature) -> LabelledParsing:
        """The objective."""
        return LabelledParsing(self.margin, over=self.over, weight=self.weight)
