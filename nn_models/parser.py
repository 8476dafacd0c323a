"""Parser: a recursive net that learns which neighbours to join (Socher, Lin, Ng & Manning 2011).

Shapes: B sentences of the batch, L words of all of them, N nodes of their true trees, T words of the longest, H units,
K hypotheses of a search, M = T - 1 joins. A bracket is the first word of a node, and the one behind its last.
"""

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from nn_models.activations import initialise
from nn_models.batch import Forest
from nn_models.columns import Tree
from nn_models.errors import UserError
from nn_models.model import reading
from nn_models.recursive import RecursiveCells, WordVectors
from nn_models.signature import Signature
from nn_models.word_vectors import WordVectorsSpec

MIX = (-7046029254386353131, -4417276706812531889)  # odd numbers of 64 bits without a pattern


class Brackets(NamedTuple):
    """Where the nodes of true trees stand: `of_node` (N, 2) in words of their sentence, `rows` (N,) which sentence.

    `words` (B, T) are the nodes of each sentence's words in their order, N where it is shorter; `lengths` (B,) how many
    words it has; `keys` (N,), sorted, are those of the nodes that join two, all others standing behind them, and
    `nodes` (N,) whose they are.
    """

    of_node: Tensor
    rows: Tensor
    words: Tensor
    lengths: Tensor
    keys: Tensor
    nodes: Tensor

    @classmethod
    def of(cls, forest: Forest) -> "Brackets":
        """Those of trees of at most two children a node; a level at a time, and nothing is read back."""
        spans, children = forest.spans(), forest.children
        num_nodes, num_rows = len(forest.words), len(forest.lengths)
        sizes = children.new_ones(num_nodes + 1)
        sizes[-1] = 0
        for first, end in spans[1:]:
            sizes[first:end] = sizes[children[first:end]].sum(1)  # of -1, no child, that is the last
        starts = children.new_zeros(num_nodes + 1)
        for first, end in reversed(spans[1:]):
            left, right = children[first:end, 0], children[first:end, 1]
            own = starts[first:end].clone()
            starts[left] = own
            starts[right] = own + sizes[left]
        starts, sizes = starts[:-1], sizes[:-1]
        numbers = torch.arange(num_rows, device=children.device)
        rows = torch.repeat_interleave(numbers, forest.lengths, output_size=num_nodes)[forest.places]
        longest = (forest.longest + 1) // 2
        words = children.new_full((num_rows, longest), num_nodes)
        num_leaves = spans[0][1]
        words[rows[:num_leaves], starts[:num_leaves]] = torch.arange(num_leaves, device=children.device)
        of_node = torch.stack((starts, starts + sizes), 1)
        keys = _keys(rows, of_node, longest)
        joins = (children >= 0).sum(1) == 2
        keys, nodes = torch.where(joins, keys, torch.iinfo(torch.int64).max).sort()
        return cls(of_node, rows, words, sizes[forest.roots], keys, nodes)

    def has(self, brackets: Tensor) -> Tensor:
        """Whether brackets (B, ..., 2) are those of nodes of the true trees."""
        return self.nodes_at(brackets) < len(self.keys)

    def nodes_at(self, brackets: Tensor) -> Tensor:
        """The nodes of the true trees that have brackets (B, ..., 2), N for none."""
        rows = torch.arange(len(brackets), device=brackets.device).view(-1, *[1] * (brackets.dim() - 2))
        wanted = _keys(rows, brackets, self.words.shape[1])
        places = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[places] == wanted, self.nodes[places], len(self.keys))


def _keys(rows: Tensor, brackets: Tensor, longest: int) -> Tensor:
    """A number for each bracket of each sentence."""
    first, end = brackets.unbind(-1)
    return (rows * (longest + 1) + first) * (longest + 1) + end


class Labelled(NamedTuple):
    """What a parser says of labels: `scores` (N, C) of all nodes of the true trees, in the order of their Forest.

    `labels` (B, M) are the likeliest ones of the joins that were found, and `nodes` (B, M) the nodes of the true trees
    that have their brackets, N for none.
    """

    scores: Tensor
    labels: Tensor
    nodes: Tensor


class Parsed(NamedTuple):
    """What a parser makes of sentences: `brackets` (B, M, 2) in the order of the joins, -1 behind a sentence's last.

    `right` (B, M) whether the true tree has such a node; `true_brackets` (B,) how many joins that has; and the scores
    (B,) of the trees that were found, and of the true ones. `rivals` (B, M, 2) are, before each join, the scores of the
    best one that the true tree has, and of the best one that it has not; `rivalry` (B, M) is where there are both.
    """

    brackets: Tensor
    right: Tensor
    true_brackets: Tensor
    score: Tensor
    true_score: Tensor
    rivals: Tensor
    rivalry: Tensor
    labelled: Labelled | None = None


class Levels(NamedTuple):
    """Nodes as the recursion goes up: `children` (N, 2), -1 for none, and the number of nodes at each level's end."""

    children: Tensor
    ends: tuple[int, ...]

    def spans(self) -> list[tuple[int, int]]:
        """See Forest."""
        return list(zip((0, *self.ends[:-1]), self.ends, strict=True))


class ParserNet(nn.Module):
    """Joins two neighbours after two until a sentence is one node, those first whose join has the highest score.

        words:  x = tanh(A w + a)        p = tanh(W [c1; c2] + b)        score of a join = u^T p
        score of a tree = sum over its joins

    (Socher et al. 2011, eq. 1-6), and where nodes have labels, of which there are `num_labels`,

        probabilities of a node's labels = softmax(L p + l)

    (its category classifiers). In training a join that the true tree does not have scores `margin` more than it would,
    so that what is found is the tree that violates the margin most, as far as the search finds it.
    """

    def __init__(
        self,
        vectors: WordVectors,
        hidden: int,
        *,
        beam: int,
        train_beam: int,
        dropout: float,
        num_labels: int | None = None,
    ) -> None:
        super().__init__()
        self.beam, self.train_beam = beam, train_beam
        self.embedding = vectors
        self.dropout = nn.Dropout(dropout)
        self.words = nn.Linear(vectors.embedding_dim, hidden)
        initialise(self.words, activation="tanh")
        self.cells = RecursiveCells(hidden)
        self.score = nn.Linear(hidden, 1, bias=False)  # all trees of a sentence have as many joins: a bias tells none
        initialise(self.score, activation=None)
        self.label = None if num_labels is None else nn.Linear(hidden, num_labels)
        if self.label is not None:
            initialise(self.label, activation=None)

    @torch.compiler.disable  # batches differ in their levels: each would be compiled anew
    def forward(self, forest: Forest, margin: float = 0.0) -> Parsed:
        """The trees that are found of the sentences whose true trees these are."""
        num_leaves = forest.spans()[0][1]
        x = torch.tanh(self.words(self.dropout(self.embedding(forest.words[:num_leaves]))))
        true = Brackets.of(forest)
        if self.training:
            found = self._search(x, true, margin=margin, beam=self.train_beam)
        else:
            found = self._search(x, true, margin=0.0, beam=self.beam)
        joins = found.brackets[..., 0] >= 0
        score, rivals, of_found = scores_of(found, x, self.cells, self.score.weight)
        two = (forest.children[num_leaves:] >= 0).all(1)
        of_true = self.cells.up(forest, x)
        of_nodes = (of_true[num_leaves:] * self.score.weight).sum(1) * two
        true_score = score.new_zeros(len(true.lengths)).index_add(0, true.rows[num_leaves:], of_nodes)
        num_true = torch.zeros_like(true.lengths).index_add(0, true.rows[num_leaves:], two.long())
        right, rivalry = true.has(found.brackets) & joins, (found.rivals >= 0).flatten(2).all(2)
        labelled = None
        if self.label is not None:
            labels = self.label(of_found[num_leaves:]).argmax(1).view(joins.shape[1], len(joins)).t()
            labelled = Labelled(self.label(of_true), labels, true.nodes_at(found.brackets))
        return Parsed(found.brackets, right, num_true, score, true_score, rivals, rivalry, labelled)

    @torch.no_grad()
    def _search(self, leaves: Tensor, true: Brackets, *, margin: float, beam: int) -> "Found":
        leaves, weight, bias = leaves.detach().to(self.cells.weight.dtype), self.cells.weight, self.cells.bias
        with torch.autocast(leaves.device.type, enabled=False) if leaves.device.type != "meta" else torch.no_grad():

            def join(left: Tensor, right: Tensor, brackets: Tensor) -> tuple[Tensor, Tensor]:
                p = torch.tanh(F.linear(torch.cat((left, right), -1), weight, bias))
                score = (p * self.score.weight[0]).sum(-1)
                return p, score + margin * ~true.has(brackets) if margin else score

            return search(leaves, true, join, beam=beam)


class Found(NamedTuple):
    """Of each sentence the tree that a search has found: its brackets (B, M, 2), and all trees' nodes, join by join.

    `rivals` (B, M, 2, 2): before each join the nodes of the best true one, and of the best wrong one; -1 for none.
    """

    brackets: Tensor
    levels: Levels
    rivals: Tensor


def scores_of(found: Found, leaves: Tensor, cells: RecursiveCells, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The scores (B,) of the trees that were found, and (B, M, 2) of the rivals before each join; states of nodes."""
    joins = found.brackets[..., 0] >= 0
    of_found = cells.up(found.levels, leaves)
    own = (of_found[len(leaves) :] * weight).sum(1)
    score = (own.view(joins.shape[1], len(joins)).t() * joins).sum(1)
    both = torch.cat((of_found, of_found.new_zeros(1, of_found.shape[1])))[found.rivals].flatten(3)
    parents = torch.tanh(cells.bias + both @ cells.weight.t().to(both.dtype))
    return score, (parents * weight[0]).sum(3), of_found


def search(leaves: Tensor, true: Brackets, join: Any, *, beam: int) -> Found:
    """Join neighbours M times in all sentences at once, with the best K = `beam` hypotheses of each kept; 1 is greedy.

    `leaves` (L, H) are the words' states. `join` of left and right states (..., H) and brackets (..., 2), the sentences
    first, gives the states of parents and their scores. Hypotheses that come to the same brackets in another order are
    one.
    """
    (rows, longest), lengths = true.words.shape, true.lengths
    device, joins = leaves.device, longest - 1
    padded = torch.cat((leaves, leaves.new_zeros(1, leaves.shape[1])))
    outside = longest  # the slot that what is not there is written to
    slots = torch.arange(longest + 1, device=device)
    pad = F.pad(true.words.clamp(max=len(leaves)), (0, 1), value=len(leaves))
    # (B, K, T + 1) each: of a slot, which is the first word of a node, its state, where it ends, the slot before it
    state = padded[pad][:, None].repeat(1, beam, 1, 1)
    end = (slots + 1).clamp(max=outside).repeat(rows, beam, 1)
    before = torch.where((slots > 0) & (slots < outside), slots - 1, outside).repeat(rows, beam, 1)
    node = pad[:, None].repeat(1, beam, 1)
    limit = lengths[:, None, None]

    def following(end: Tensor) -> Tensor:
        return torch.where(end < limit, end, outside)

    def candidates(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the nodes at these slots (B, K, n) and those that follow would be, its score, -inf for none, and
        whether the true tree has it.
        """
        after = following(end.gather(2, at))
        brackets = torch.stack((at, end.gather(2, after)), -1)
        parents, scores = join(_rows(state, at), _rows(state, after), brackets)
        return parents, scores.masked_fill((at == outside) | (after == outside), -torch.inf), true.has(brackets)

    parent, score, is_true = candidates(slots.repeat(rows, beam, 1))
    total = score.new_zeros(rows, beam)
    total[:, 1:] = -torch.inf
    mixed = lengths.new_zeros(rows, beam)  # (B, K): a number for the set of a hypothesis's brackets
    kept = torch.full((rows, beam, joins, 8), -1, device=device)  # of each join: its bracket, children, and rivals
    hypotheses = torch.arange(beam, device=device).expand(rows, -1)
    for step in range(joins):
        sets = mixed[..., None] + _mixed(_brackets(slots, end, following(end))) if beam > 1 else mixed
        value, chosen = best_joins(total[..., None] + score, sets, beam)
        going = (lengths > step + 1)[:, None]  # else the sentence is one node
        source = torch.where(going, chosen // (longest + 1), hypotheses)
        total = torch.where(going, value, total)
        if beam > 1:
            state, end, before, node, parent, score, is_true, mixed, kept = (
                values.gather(1, source.view(rows, beam, *[1] * (values.dim() - 2)).expand_as(values))
                for values in (state, end, before, node, parent, score, is_true, mixed, kept)
            )
        joined = going & (value > -torch.inf)
        left = torch.where(joined, chosen % (longest + 1), outside)[..., None]
        right = torch.where(joined[..., None], end.gather(2, left), outside)
        bracket = torch.cat((left, end.gather(2, right)), 2)
        both = torch.cat((bracket, node.gather(2, left), node.gather(2, right)), 2)
        for other in (is_true, ~is_true):
            rival, at = score.masked_fill(~other, -torch.inf).max(2, keepdim=True)
            nodes = torch.cat((node.gather(2, at), node.gather(2, following(end.gather(2, at)))), 2)
            both = torch.cat((both, torch.where(rival > -torch.inf, nodes, -1)), 2)
        kept[:, :, step] = torch.where(joined[..., None], both, -1)
        mixed = mixed + _mixed(bracket) * joined
        state.scatter_(2, _wide(left, state), _rows(parent, left))
        end.scatter_(2, left, bracket[..., 1:])
        end[..., outside] = outside
        node.scatter_(
            2, left, len(leaves) + step * rows + torch.arange(rows, device=device)[:, None, None].expand_as(left)
        )
        score.scatter_(2, right, -torch.inf)
        before.scatter_(2, following(end.gather(2, left)), left)
        before[..., outside] = outside
        changed = torch.cat((left, before.gather(2, left)), 2)
        parents, scores, truths = candidates(changed)
        parent.scatter_(2, _wide(changed, parent), parents)
        score.scatter_(2, changed, scores)
        is_true.scatter_(2, changed, truths)
    best = kept[:, 0]
    children = best[..., 2:4].transpose(0, 1).flatten(0, 1)  # the joins of all sentences, step after step
    levels = torch.cat((children.new_full((len(leaves), 2), -1), children))
    ends = tuple(len(leaves) + rows * step for step in range(joins + 1))
    return Found(best[..., :2], Levels(levels, ends), best[..., 4:].unflatten(2, (2, 2)))


def _brackets(slots: Tensor, end: Tensor, after: Tensor) -> Tensor:
    """(B, K, T + 1, 2): those of joins of the nodes in all slots with these that follow."""
    return torch.stack((slots.expand_as(end), end.gather(2, after)), -1)


def best_joins(values: Tensor, sets: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """The best K of (B, K, n) joins of hypotheses, falling, and where they stand, (B, K) each; none twice.

    `sets` (B, K, n) are numbers of the sets of nodes that they lead to; they are not looked at where K is 1.
    """
    flat = values.flatten(1)
    if beam == 1:
        value, place = flat.max(1, keepdim=True)
        return value, place
    top = flat.topk(min(beam * beam, flat.shape[1]), 1)  # no set comes from more than K hypotheses
    same = sets.flatten(1).gather(1, top.indices)
    again = (same[:, :, None] == same[:, None]).tril(-1).any(2)
    kept = top.values.masked_fill(again, -torch.inf)
    if kept.shape[1] < beam:
        kept = F.pad(kept, (0, beam - kept.shape[1]), value=-torch.inf)
    chosen = kept.topk(beam, 1)
    return chosen.values, top.indices.gather(1, chosen.indices.clamp(max=top.indices.shape[1] - 1))


def _mixed(brackets: Tensor) -> Tensor:
    """Brackets (..., 2) as numbers whose sums tell sets of them apart."""
    first, end = brackets.unbind(-1)
    return scrambled((first << 32) + end)


def scrambled(numbers: Tensor) -> Tensor:
    """Whole numbers without a pattern, a different one for each (after Steele et al. 2014, SplitMix)."""
    value = numbers * MIX[0]
    value = (value ^ (value >> 29)) * MIX[1]
    return value ^ (value >> 32)


def _wide(places: Tensor, like: Tensor) -> Tensor:
    """Places (B, K, n) for rows of (B, K, T + 1, H)."""
    return places[..., None].expand(-1, -1, -1, like.shape[3])


def _rows(values: Tensor, places: Tensor) -> Tensor:
    """The rows (B, K, n, H) of (B, K, T + 1, H) at (B, K, n)."""
    return values.gather(2, _wide(places, values))


BEAM = Field(1, description="hypotheses that the search keeps; 1 is greedy")
TRAIN_BEAM = Field(1, description="the same in training")


class ParserSpec(WordVectorsSpec):
    """Parser: learns which neighbours of a sentence to join (Socher et al. 2011)."""

    reads = reading(input=Tree)
    gives = frozenset({"tree"})
    kind: Literal["parser"] = "parser"
    embedding: PositiveInt = Field(50, description="numbers that stand for a word")
    hidden: PositiveInt = Field(50, description="numbers of each node")
    beam: PositiveInt = BEAM
    train_beam: PositiveInt = TRAIN_BEAM
    dropout: float = Field(0.0, ge=0, lt=1, description="share of words' vectors dropped in training")

    def check(self, signature: Signature) -> None:
        """See ModelSpec."""
        super().check(signature)
        column = signature["input"]
        assert isinstance(column, Tree)
        if column.arity != 2 or column.words_at != "leaves":
            what = (
                f"nodes have up to {column.arity} children" if column.arity != 2 else "nodes with children have words"
            )
            raise UserError(
                "model.kind",
                f"{self.kind} learns from binary trees with words at the leaves, but {what}",
                "choose another data set",
            )

    def build(self, signature: Signature) -> ParserNet:
        """The module: trees -> Parsed."""
        return self.net(signature)

    def net(self, signature: Signature, num_labels: int | None = None) -> ParserNet:
        """The module, with so many labels, or without."""
        column = signature["input"]
        assert isinstance(column, Tree)
        vectors = WordVectors(column.num_known, self.embedding, std=0.1, scale=1.0)
        search = {"beam": self.beam, "train_beam": self.train_beam}
        net = ParserNet(vectors, self.hidden, dropout=self.dropout, num_labels=num_labels, **search)
        self.settle(net)
        return net
