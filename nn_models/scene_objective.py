"""Parsing of scenes: the objective of Parsing, beside joins at random and of the segments that are most alike.

Shapes: B scenes of the batch, M joins of the largest.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nn_models.batch import Batch, Scenes
from nn_models.columns import Scene
from nn_models.evidence import Evidence
from nn_models.examples import Gather, gather_here
from nn_models.metrics import Metric
from nn_models.model import ModelSpec, reading
from nn_models.objectives import Across, Baseline, Objective
from nn_models.parser import Parsed
from nn_models.parser_objective import F1, Parsing, ParsingSpec
from nn_models.scene_parser import Graph, right_joins, search_scenes
from nn_models.signature import Signature

ORDERS = {"random": "in a random order", "nearest": "the most alike first"}
STEPS = 64


class SceneParsing(Parsing):
    """Parsing of scenes, all of whose correct trees will do: over trees the true one is that which the search finds."""

    def baseline(self, signature: Signature, model: ModelSpec) -> Baseline:
        """See Objective: joins that nobody has learned."""
        return Orders()

    def evidence(self, signature: Signature) -> Evidence:
        """See Objective."""
        return SceneEvidence()


class Orders:
    """Joins at random, or of the segments that are most alike first."""

    def add(self, batch: Batch) -> None:
        """See Baseline: they learn nothing."""

    def models(self, across: Across, device: torch.device) -> Mapping[str, nn.Module]:
        """See Baseline."""
        return {name: Ordered(name) for name in ORDERS}


class Ordered(nn.Module):
    """Joins in one of the ORDERS."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order

    def forward(self, scenes: Scenes, margin: float = 0.0) -> Parsed:
        """See SceneParserNet; without scores."""
        graph, features = Graph.of(scenes), scenes.features.double()
        # sums of features, and of how many segments: what is joined has their means
        leaves = torch.cat((features, torch.ones_like(features[:, :1])), 1)
        join = _nearest if self.order == "nearest" else _random
        found, true = search_scenes(leaves, graph, join), search_scenes(leaves, graph, join, only_right=True)
        joins = found.brackets[..., 0] >= 0
        none = leaves.new_zeros(len(graph.lengths), dtype=torch.float32)
        no_rivals = none[:, None, None].expand(-1, joins.shape[1], 2)
        num_true = (true.brackets[..., 0] >= 0).sum(1)
        right = right_joins(found, graph)
        return Parsed(found.brackets, right, num_true, none, none, no_rivals, torch.zeros_like(joins))


def _nearest(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Means that are close to each other score high."""
    one, other = (states[..., :-1] / states[..., -1:].clamp(min=1) for states in (left, right))
    return left + right, -(one - other).square().sum(-1)


def _random(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scores without a pattern, the same wherever a scene stands."""
    return left + right, torch.frac((left + 2 * right).sum(-1) * 1e5).abs()


class SceneEvidence:
    """`steps` (64, 2): of each join, in the order in which they are made, how many are right, and how many there are.

    The last stands for those behind it as well.
    """

    section = "scenes"

    def __init__(self) -> None:
        self._steps: Tensor | None = None

    def add(self, batch: Batch, outputs: Parsed) -> None:
        """See Evidence."""
        found = outputs.brackets[..., 0] >= 0
        place = torch.arange(found.shape[1], device=found.device).clamp(max=STEPS - 1)
        counts = torch.stack((outputs.right.sum(0), found.sum(0)), 1)
        steps = counts.new_zeros(STEPS, 2).index_add(0, place, counts)
        self._steps = steps if self._steps is None else self._steps + steps

    def tensors(
        self, across: Callable[[Tensor], Tensor], device: torch.device, gather: Gather = gather_here
    ) -> dict[str, Tensor]:
        """See Evidence."""
        steps = torch.zeros(STEPS, 2, dtype=torch.int64, device=device) if self._steps is None else self._steps
        return {"steps": across(steps).cpu()}


class SceneParsingSpec(ParsingSpec):
    """Learn the trees of scenes: right joins of segments score higher than all others (max-margin)."""

    reads = reading(input=Scene)
    takes = frozenset({"joins"})
    objective: ClassVar[type[Objective]] = SceneParsing
    baselines = tuple(
        Metric(f"{name}_{F1.name}", "more", words=f"{F1.words}, joins {words}") for name, words in ORDERS.items()
    )
    kind: Literal["scene_parsing"] = "scene_parsing"  # type: ignore[assignment]

    def build(self, signature: Signature) -> Any:
        """The objective."""
        return SceneParsing(self.margin, over=self.over)
