"""Scene parser: which adjacent segments of a picture to join (Socher, Lin, Ng & Manning 2011, section 4).

Shapes: B scenes of the batch, N segments of all of them, T segments of the largest, M = T - 1 joins, H units, K
hypotheses of a search. What has been joined stands in the slot of its first segment.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from nn_models.activations import initialise
from nn_models.batch import Ragged, Scenes
from nn_models.columns import Scene
from nn_models.model import ModelSpec, reading
from nn_models.parser import BEAM, TRAIN_BEAM, Found, Levels, Parsed, best_joins, scores_of, scrambled
from nn_models.recursive import RecursiveCells
from nn_models.signature import Signature

# Of left and right states (..., H): those of their parents, and the scores of these.
Join = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Graph(NamedTuple):
    """Scenes as a search takes them: `segments` (B, T), places among the N, N where there is none; `lengths` (B,).

    `adjacent` (B, T, T) is symmetric; `inside` (B, T, T) has 1 where a segment is of an object, which is called by the
    first of its segments; `sizes` (B, T) are the segments of each object. An object is what can be reached from a
    segment through segments of its class.
    """

    segments: Tensor
    lengths: Tensor
    adjacent: Tensor
    inside: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, scenes: Scenes) -> "Graph":
        """Nothing is read back."""
        lengths, longest, num = scenes.lengths, scenes.longest, len(scenes.features)
        slots = torch.arange(num, device=lengths.device)
        segments = Ragged(slots, lengths, longest).padded(num)
        there = segments < num
        neighbours = Ragged(scenes.neighbours, lengths, longest).padded(-1)
        neighbours = torch.where(neighbours < 0, longest, neighbours)
        adjacent = there.new_zeros(len(lengths), longest, longest + 1).scatter(2, neighbours, True)[..., :longest]
        own = torch.eye(longest, dtype=torch.bool, device=lengths.device)
        adjacent = (adjacent | adjacent.transpose(1, 2)) & ~own
        objects = Ragged(scenes.objects, lengths, longest).padded(-1)
        reached = (((objects[:, :, None] == objects[:, None]) & adjacent) | own).float()
        for _ in range(longest.bit_length()):  # paths of one step, two, four, ...
            reached = (reached @ reached > 0).float()
        first = reached.argmax(2)
        inside = torch.zeros_like(reached).scatter(2, first[..., None], 1.0) * there[..., None]
        return cls(segments, lengths, adjacent, inside, inside.sum(1))


def right(inside: Tensor, sizes: Tensor) -> Tensor:
    """Whether a correct tree has such nodes (..., T), of so many segments of each object (..., T).

    Correct are all trees that join the segments of one object before they join these with others: a node is of one
    object, or of whole ones.
    """
    return ((inside > 0).sum(-1) == 1) | ((inside == 0) | (inside == sizes)).all(-1)


def search_scenes(
    leaves: Tensor, graph: Graph, join: Join, *, beam: int = 1, margin: float = 0.0, only_right: bool = False
) -> Found:
    """Join two adjacent nodes M times in all scenes at once, with the best K = `beam` hypotheses of each kept.

    What is joined is adjacent to all that either was. The node whose first segment comes first is on the left. A wrong
    join scores `margin` more, or is not made. Scenes that do not hang together end as several nodes. Brackets are the
    slots of what was joined, left and right. Hypotheses that come to the same nodes in another order are one; see
    `search`.
    """
    segments, _, adjacent, inside, sizes = graph
    (rows, longest), device = segments.shape, leaves.device
    slots = torch.arange(longest, device=device)
    order = slots[:, None] < slots
    node = segments
    state = torch.cat((leaves, leaves.new_zeros(1, leaves.shape[1])))[segments]

    def beside(place: Tensor) -> tuple[Tensor, Tensor]:
        """(R, T) each: scores of joins of the nodes in these slots (R,) with all others, and whether they are right."""
        swap = slots < place[:, None]
        own = _at(state, place)[:, None].expand_as(state)
        left, right_one = torch.where(swap[..., None], state, own), torch.where(swap[..., None], own, state)
        is_right = right(_at(inside, place)[:, None] + inside, sizes[:, None])
        score = join(left, right_one)[1]
        return score + margin * ~is_right if margin else score, is_right

    columns = [beside(slots[place].expand(rows)) for place in range(longest)]
    score, is_right = (torch.stack(values, 1) for values in zip(*columns, strict=True))
    # from here on R = B x K rows, a scene's hypotheses one after the other, of which the first alone is there to begin
    state, node, adjacent, inside, sizes, score, is_right = (
        values.repeat_interleave(beam, 0) for values in (state, node, adjacent, inside, sizes, score, is_right)
    )
    total = score.new_zeros(rows, beam)
    total[:, 1:] = -torch.inf
    code = scrambled(slots + 1).repeat(rows * beam, 1)  # of each node: a number for the set of its segments
    mixed = code.new_zeros(rows * beam)  # a number for the set of a hypothesis's nodes
    kept = torch.full((rows * beam, longest - 1, 8), -1, device=device)  # slots, children, and rivals
    hypotheses, scenes = torch.arange(beam, device=device).expand(rows, -1), torch.arange(rows, device=device)
    for step in range(longest - 1):
        open_ = score.masked_fill(~(adjacent & order), -torch.inf).flatten(1)
        truth = is_right.flatten(1)
        wanted = (open_.masked_fill(~truth, -torch.inf) if only_right else open_).view(rows, beam, -1)
        sets = mixed
        if beam > 1:
            wanted = total[..., None] + wanted
            sets = (mixed[:, None, None] + scrambled(code[:, :, None] + code[:, None])).view(rows, beam, -1)
        value, chosen = best_joins(wanted, sets, beam)
        going = value[:, :1] > -torch.inf  # all hypotheses of a scene make as many joins
        joined = (going & (value > -torch.inf)).flatten()
        if beam > 1:
            total = torch.where(going, value, total)
            source = torch.where(going, chosen // longest**2, hypotheses)
            from_ = (scenes[:, None] * beam + source).flatten()
            state, node, adjacent, inside, score, is_right, open_, truth, code, mixed, kept = (
                values[from_]
                for values in (state, node, adjacent, inside, score, is_right, open_, truth, code, mixed, kept)
            )
        left, right_one = chosen.flatten() % longest**2 // longest, chosen.flatten() % longest
        parts = [torch.stack((left, right_one), 1), torch.stack((_at(node, left), _at(node, right_one)), 1)]
        for others in (~truth, truth):
            rival, at = open_.masked_fill(others, -torch.inf).max(1)
            nodes = torch.stack((_at(node, at // longest), _at(node, at % longest)), 1)
            parts.append(torch.where(rival[:, None] > -torch.inf, nodes, -1))
        kept[:, step] = torch.where(joined[:, None], torch.cat(parts, 1), -1)
        here, gone = (joined[:, None] & (slots == place[:, None]) for place in (left, right_one))
        either = (_at(adjacent, left) | _at(adjacent, right_one)) & ~here & ~gone
        adjacent = adjacent & ~gone[:, None] & ~gone[..., None]
        adjacent = adjacent | (here[..., None] & either[:, None]) | (here[:, None] & either[..., None])
        parent = join(_at(state, left), _at(state, right_one))[0]
        state = torch.where(here[..., None], parent[:, None], state)
        inside = torch.where(here[..., None], (_at(inside, left) + _at(inside, right_one))[:, None], inside)
        node = torch.where(here, len(leaves) + step * rows + scenes.repeat_interleave(beam)[:, None], node)
        both = _at(code, left) + _at(code, right_one)
        code = torch.where(here, both[:, None], code)
        mixed = mixed + scrambled(both) * joined
        new_score, new_right = beside(left)
        score, is_right = _renewed(score, new_score, here), _renewed(is_right, new_right, here)
    kept = kept[::beam]  # the best hypothesis of each scene
    children = kept[..., 2:4].transpose(0, 1).flatten(0, 1)  # the joins of all scenes, step after step
    levels = torch.cat((children.new_full((len(leaves), 2), -1), children))
    ends = tuple(len(leaves) + rows * step for step in range(longest))
    return Found(kept[..., :2], Levels(levels, ends), kept[..., 4:].unflatten(2, (2, 2)))


def _renewed(pairs: Tensor, new: Tensor, here: Tensor) -> Tensor:
    """Symmetric (B, T, T) with new (B, T) in the row and the column where (B, T) `here` holds."""
    pairs = torch.where(here[..., None], new[:, None], pairs)
    return torch.where(here[:, None], new[..., None], pairs)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """Of (B, T, ...) what stands in the slots (B,)."""
    return values[torch.arange(len(values), device=values.device), places]


def right_joins(found: Found, graph: Graph) -> Tensor:
    """(B, M): which joins that were found are right."""
    inside, slots = graph.inside, torch.arange(graph.inside.shape[1], device=graph.inside.device)
    truths = [torch.zeros_like(graph.lengths, dtype=torch.bool)[:, None][:, :0]]
    for left, right_one in (pair.unbind(1) for pair in found.brackets.unbind(1)):
        both = _at(inside, left.clamp(min=0)) + _at(inside, right_one.clamp(min=0))
        truths.append((right(both, graph.sizes) & (left >= 0))[:, None])
        here = (slots == left[:, None])[..., None]
        inside = torch.where(here, both[:, None], inside)
    return torch.cat(truths, 1)


class SceneParserNet(nn.Module):
    """Joins two adjacent segments after two, those first whose join has the highest score; see ParserNet.

    segments:  x = tanh(A f + a)        p = tanh(W [c1; c2] + b)        score of a join = u^T p
    """

    def __init__(self, width: int, hidden: int, *, beam: int, train_beam: int) -> None:
        super().__init__()
        self.beam, self.train_beam = beam, train_beam
        self.segments = nn.Linear(width, hidden)
        initialise(self.segments, activation="tanh")
        self.cells = RecursiveCells(hidden)
        self.score = nn.Linear(hidden, 1, bias=False)
        initialise(self.score, activation=None)

    @torch.compiler.disable  # batches differ in their levels: each would be compiled anew
    def forward(self, scenes: Scenes, margin: float = 0.0) -> Parsed:
        """The trees that are found; beside them the correct ones that the search finds where it makes no wrong join."""
        x, graph = torch.tanh(self.segments(scenes.features)), Graph.of(scenes)
        found = self._search(x, graph, margin=margin if self.training else 0.0, only_right=False)
        true = self._search(x, graph, margin=0.0, only_right=True)
        score, rivals, _ = scores_of(found, x, self.cells, self.score.weight)
        true_score, *_ = scores_of(true, x, self.cells, self.score.weight)
        num_true, rivalry = (true.brackets[..., 0] >= 0).sum(1), (found.rivals >= 0).flatten(2).all(2)
        return Parsed(found.brackets, right_joins(found, graph), num_true, score, true_score, rivals, rivalry)

    @torch.no_grad()
    def _search(self, leaves: Tensor, graph: Graph, *, margin: float, only_right: bool) -> Found:
        leaves, weight, bias = leaves.detach().to(self.cells.weight.dtype), self.cells.weight, self.cells.bias

        def join(left: Tensor, right_one: Tensor) -> tuple[Tensor, Tensor]:
            p = torch.tanh(nn.functional.linear(torch.cat((left, right_one), -1), weight, bias))
            return p, (p * self.score.weight[0]).sum(-1)

        meta = leaves.device.type == "meta"
        beam = self.train_beam if self.training else self.beam
        with nullcontext() if meta else torch.autocast(leaves.device.type, enabled=False):
            return search_scenes(leaves, graph, join, beam=beam, margin=margin, only_right=only_right)


class SceneParserSpec(ModelSpec):
    """Scene parser: learns which adjacent segments of a picture to join (Socher et al. 2011)."""

    reads = reading(input=Scene)
    gives = frozenset({"joins"})
    sections = ()
    kind: Literal["scene_parser"] = "scene_parser"
    hidden: PositiveInt = Field(50, description="numbers of each node")
    beam: PositiveInt = BEAM
    train_beam: PositiveInt = TRAIN_BEAM

    def build(self, signature: Signature) -> SceneParserNet:
        """The module: scenes -> Parsed."""
        column = signature["input"]
        assert isinstance(column, Scene)
        return SceneParserNet(column.width, **self.settings())
