"""Parsing: scores of true trees above those of all others, and how many brackets are right, beside trees of one shape.

Shapes: B sentences of the batch, M joins of the longest, T words of it.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn
from torch.nn import functional as F

from nn_models.batch import Batch, Forest, Ragged
from nn_models.columns import Tree
from nn_models.evidence import Evidence
from nn_models.examples import Examples, Gather, gather_here
from nn_models.metrics import Metric
from nn_models.model import ModelSpec, reading
from nn_models.objectives import Across, Baseline, Measured, Objective, SupervisedSpec, at_least_float32, only_here
from nn_models.parser import Brackets, Parsed
from nn_models.signature import Signature

Over = Literal["joins", "trees"]
F1 = Metric("bracket_f1", "more", words="F1 of brackets (unlabelled)", short="F1")
SHAPES = {"left": "all to the left", "right": "all to the right", "balanced": "balanced"}


class Parsing(Objective):
    """Max-margin parsing, over whole trees (Taskar et al. 2004; Socher et al. 2011, eq. 7-8) or over each join.

        trees:  loss = max(0, s(found) + margin * |joins of found that the true tree has not| - s(true))
        joins:  loss = sum over the joins of found  max(0, margin + s(best wrong join) - s(best right join))

    Over joins the search learns from the states that it comes to itself, as with a dynamic oracle (Goldberg & Nivre
    2012), and without loss a greedy search makes no mistake. Over trees there is no loss, and so nothing is learned,
    where the true tree has the highest score but the search does not find it.

    `bracket_f1` is of the brackets of all sentences together, without labels, and without those around a whole
    sentence, which every tree has: 2 right / (found + true). In training over trees what is found is the tree that
    violates the margin most; elsewhere it is the tree of the highest score.
    """

    metrics: tuple[Metric, ...] = (F1,)
    best = F1.name

    def __init__(self, margin: float, *, over: Over) -> None:
        self.margin, self.over = margin, over

    def measure(self, model: Any, batch: Batch, *, carry: Any = None, across: Across = only_here) -> Measured:
        """`model` gives Parsed of the batch's trees."""
        return self._measured(self._parsed(model, batch))

    def _parsed(self, model: Any, batch: Batch) -> Parsed:
        parsed: Parsed = model(batch["input"], self.margin if self.over == "trees" else 0.0)
        return parsed

    def _measured(self, parsed: Parsed) -> Measured:
        found = parsed.brackets[..., 0] >= 0
        if self.over == "trees":
            wrong = (found & ~parsed.right).sum(1)
            violated = at_least_float32(parsed.score) - at_least_float32(parsed.true_score) + self.margin * wrong
        else:
            right, other = at_least_float32(parsed.rivals).unbind(2)
            violated = (self.margin + other - right).masked_fill(~parsed.rivalry, 0)
        loss = F.relu(violated).sum()
        num_found = found.sum(1)
        right = (parsed.right.sum(1) - 1).clamp(min=0)  # without the whole sentence, the last
        all_found, true = (num_found - 1).clamp(min=0), (parsed.true_brackets - 1).clamp(min=0)
        sums, counts = 2 * right.sum(), (all_found + true).sum()
        outputs: dict[str, Any] = {
            name: value.detach() for name, value in parsed._asdict().items() if isinstance(value, Tensor)
        }
        return Measured(loss, sums[None].double(), counts=counts[None].double(), outputs=Parsed(**outputs))

    def predicted(self, outputs: Parsed) -> Tensor:
        """See Objective: the brackets (B, M, 2)."""
        return outputs.brackets

    def baseline(self, signature: Signature, model: ModelSpec) -> Baseline:
        """See Objective: trees of one shape."""
        return Shapes()

    def evidence(self, signature: Signature) -> Evidence:
        """See Objective."""
        return ParseEvidence()


class Shapes:
    """Trees that branch to the left, to the right, or in the middle, whatever the words are."""

    def add(self, batch: Batch) -> None:
        """See Baseline: they learn nothing."""

    def models(self, across: Across, device: torch.device) -> Mapping[str, nn.Module]:
        """See Baseline."""
        return {shape: Shaped(shape) for shape in SHAPES}


class Shaped(nn.Module):
    """Trees of one of the SHAPES over the words of others."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, forest: Forest, margin: float = 0.0) -> Parsed:
        """See ParserNet; without scores."""
        true = Brackets.of(forest)
        brackets = shaped(self.shape, true.lengths, true.words.shape[1])
        found = brackets[..., 0] >= 0
        two = (forest.children >= 0).sum(1) == 2
        num_true = torch.zeros_like(true.lengths).index_add(0, true.rows, two.long())
        none = num_true.new_zeros(len(num_true), dtype=torch.float32)
        no_rivals = none[:, None, None].expand(-1, found.shape[1], 2)
        return Parsed(brackets, true.has(brackets) & found, num_true, none, none, no_rivals, torch.zeros_like(found))


def shaped(shape: str, lengths: Tensor, longest: int) -> Tensor:
    """Brackets (B, M or more, 2) of trees over so many words (B,), of at most `longest`; -1 for none."""
    steps = torch.arange(1, longest, device=lengths.device).expand(len(lengths), -1)
    if shape == "balanced":
        level = torch.stack((torch.zeros_like(lengths), lengths), 1)[:, None]  # (B, 1, 2)
        levels = []
        for _ in range(max(longest - 1, 0).bit_length()):
            levels.append(level)
            middle = (level.sum(2, keepdim=True) + 1) // 2  # of an odd number the first half has one more
            level = torch.stack((torch.cat((level[..., :1], middle), 2), torch.cat((middle, level[..., 1:]), 2)), 2)
            level = level.flatten(1, 2)
        levels.reverse()  # whole sentences last
        brackets = torch.cat(levels, 1) if levels else level[:, :0]
        there = brackets[..., 1] - brackets[..., 0] > 1
    else:
        ends = lengths[:, None].expand_as(steps)
        left, right = (torch.zeros_like(steps), steps + 1), (ends - 1 - steps, ends)
        brackets = torch.stack(left if shape == "left" else right, 2)
        there = steps < lengths[:, None]
    return torch.where(there[..., None], brackets, -1)


class ParseEvidence:
    """Brackets of each size, right and found and true; the longest sentences all of whose brackets are right, and
    those with the largest share of wrong ones.

    `sizes` (64, 3): brackets around so many words (the last also around more) that are right, found, and true.
    Examples have the true trees as stored, and the brackets that were found (joins, 2) in `predictions`.
    """

    section = "parses"

    def __init__(self) -> None:
        self._examples = Examples(2)
        self._sizes: Tensor | None = None

    def add(self, batch: Batch, outputs: Parsed) -> None:
        """See Evidence."""
        forest = batch["input"]
        found = outputs.brackets[..., 0] >= 0
        true, num = Brackets.of(forest), found.sum(1)
        joins = (forest.children >= 0).sum(1) == 2
        counted = [
            _by_size(outputs.brackets[outputs.right]),
            _by_size(outputs.brackets[found]),
            _by_size(true.of_node[joins]),
        ]
        sizes = torch.stack(counted, 1)
        self._sizes = sizes if self._sizes is None else self._sizes + sizes
        flat = outputs.brackets[found].int()
        columns = {"inputs": forest, "predictions": Ragged(flat, num, found.shape[1])}
        wrong = (found & ~outputs.right).sum(1) / num.clamp(min=1)
        told = num > 1  # one or two words have one tree
        ids = batch.place.ids
        self._examples.keep(0, ids, torch.where(told & (wrong == 0), num.double(), -torch.inf), columns)
        self._examples.keep(1, ids, torch.where(told & (wrong > 0), wrong, -torch.inf), columns)

    def tensors(
        self, across: Callable[[Tensor], Tensor], device: torch.device, gather: Gather = gather_here
    ) -> dict[str, Tensor]:
        """See Evidence."""
        sizes = torch.zeros(SIZES, 3, dtype=torch.int64, device=device) if self._sizes is None else self._sizes
        return {"sizes": across(sizes).cpu(), **self._examples.tensors(gather, device)}


SIZES = 64


def _by_size(brackets: Tensor) -> Tensor:
    """(64,): how many brackets (n, 2) are around so many words."""
    return torch.bincount((brackets[:, 1] - brackets[:, 0]).clamp(max=SIZES - 1), minlength=SIZES)


class ParsingSpec(SupervisedSpec):
    """Learn the trees of sentences: true ones score higher than all others (max-margin)."""

    reads = reading(input=Tree)
    takes = frozenset({"tree"})
    objective: ClassVar[type[Objective]] = Parsing
    baselines = tuple(
        Metric(f"{name}_{F1.name}", "more", words=f"{F1.words}, trees {words}") for name, words in SHAPES.items()
    )
    kind: Literal["parsing"] = "parsing"
    over: Over = Field("joins", description="what is to win by the margin: each right join, or the true tree")
    margin: NonNegativeFloat = Field(0.5, description="by how much; over trees for each join that the true one lacks")

    def build(self, signature: Signature) -> Parsing:
        """The objective."""
        return Parsing(self.margin, over=self.over)
