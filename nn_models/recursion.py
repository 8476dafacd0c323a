"""Recursion: the states of all nodes of a forest, one matrix product a level, with their derivatives.

Each function goes up the levels in buffers that are there before, and down again by hand: autograd would keep a
gradient of all nodes for every level. The weights' gradients are one product over all nodes.

Shapes: N nodes of all trees, the leaves first; M of them above the leaves, n of one level; A arcs from children to
parents, a of them to one level; H units.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nn_models.batch import Forest

MAX_OUTER = 1 << 23  # numbers of outer products that are in memory at once


class Nodes(Protocol):
    """What the recursion needs of nodes: their `children` (N, arity), -1 for none, and the nodes of each level."""

    @property
    def children(self) -> Tensor:
        """Places among all nodes, in levels below."""

    def spans(self) -> list[tuple[int, int]]:
        """(first, past-the-last) node of each level, the leaves first."""


class Pairs:
    """Where the two children of each node stand, and where each node stands among its parent's two."""

    def __init__(self, forest: Nodes) -> None:
        leaves, *above = forest.spans()
        self.num_nodes, self.num_leaves = leaves[1] if not above else above[-1][1], leaves[1]
        self.num_above = self.num_nodes - self.num_leaves
        self.spans = above
        children = forest.children[self.num_leaves :]
        if children.shape[1] < 2:
            children = torch.nn.functional.pad(children, (0, 2 - children.shape[1]), value=-1)
        # (M, 2): a child that is not there is the node behind the last, whose state is 0
        self.children = torch.where(children < 0, self.num_nodes, children)
        # (N,): place of a node among all (2 * M) children; a root is behind the last, where no gradient comes from
        links = children.new_full((self.num_nodes + 1,), 2 * self.num_above)
        links[self.children.flatten()] = torch.arange(2 * self.num_above, device=children.device)
        self.links = links[: self.num_nodes]

    def inside(self, first: int, end: int) -> slice:
        """Of a level: where its nodes stand among those above the leaves."""
        return slice(first - self.num_leaves, end - self.num_leaves)

    def gather(self, states: Tensor, inside: slice, out: Tensor) -> Tensor:
        """The children's states (N + 1, H) of a level as (n, 2 H), into rows of `out` (M, 2 H)."""
        rows = out[inside]
        torch.index_select(states, 0, self.children[inside].flatten(), out=rows.view(-1, states.shape[1]))
        return rows


class TanhOfPairs(torch.autograd.Function):
    """h = tanh(W [h1; h2] + b), or with a tensor V: h_k = tanh([h1; h2]^T V_k [h1; h2] + (W [h1; h2] + b)_k)."""

    @staticmethod
    def forward(ctx: Any, forest: Nodes, leaves: Tensor, weight: Tensor, bias: Tensor, tensor: Tensor | None) -> Tensor:
        """Leaves (N - M, H), weight (H, 2 H), bias (H,), tensor (H, 2 H, 2 H) -> (N, H)."""
        pairs, size = Pairs(forest), leaves.shape[1]
        hidden = leaves.new_zeros(pairs.num_nodes + 1, size)
        hidden[: pairs.num_leaves] = leaves
        below = leaves.new_empty(pairs.num_above, 2 * size)
        folded = None if tensor is None else tensor.transpose(0, 1).flatten(1)  # (2 H, H * 2 H)
        for first, end in pairs.spans:
            inside = pairs.inside(first, end)
            x = pairs.gather(hidden, inside, below)
            sums = torch.addmm(bias, x, weight.t())
            if folded is not None:
                sums += torch.bmm((x @ folded).unflatten(1, (size, 2 * size)), x[:, :, None])[:, :, 0]
            torch.tanh(sums, out=hidden[first:end])
        ctx.pairs = pairs
        ctx.save_for_backward(hidden, below, weight, tensor)
        return hidden[:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the loss by (N, H)."""
        pairs: Pairs = ctx.pairs
        hidden, below, weight, tensor = ctx.saved_tensors
        size = hidden.shape[1]
        slopes = torch.addcmul(hidden.new_ones(()), hidden[:-1], hidden[:-1], value=-1)  # tanh' = 1 - tanh^2
        passed = _passed(pairs, size, grad)
        sums = below.new_empty(pairs.num_above, size)
        # x^T V_k x has the derivative (V_k + V_k^T) x
        both = None if tensor is None else (tensor + tensor.transpose(1, 2)).transpose(0, 1).flatten(1)
        for first, end in reversed(pairs.spans):
            inside = pairs.inside(first, end)
            own = passed.index_select(0, pairs.links[first:end]).add_(grad[first:end])
            torch.mul(own, slopes[first:end], out=sums[inside])
            down = passed[2 * inside.start : 2 * inside.stop].view(-1, 2 * size)
            torch.mm(sums[inside], weight, out=down)
            if both is not None:
                by_unit = (below[inside] @ both).unflatten(1, (size, 2 * size))
                down += torch.bmm(sums[inside][:, None], by_unit)[:, 0]
        of_leaves = grad[: pairs.num_leaves] + passed.index_select(0, pairs.links[: pairs.num_leaves])
        of_tensor = None if tensor is None else _outer(sums, below)
        return None, of_leaves, sums.t() @ below, sums.sum(0), of_tensor


def _passed(pairs: Pairs, size: int, like: Tensor) -> Tensor:
    """Room for what parents pass down to each of their children; no parent passes nothing."""
    passed = like.new_empty(2 * pairs.num_above + 1, size)
    passed[-1] = 0
    return passed


def _outer(sums: Tensor, below: Tensor) -> Tensor:
    """(H, 2 H, 2 H): sum over nodes of sums (M, H) times the outer product of below (M, 2 H) with itself."""
    size, width = sums.shape[1], below.shape[1]
    found = sums.new_zeros(size * width, width)
    rows = max(1, MAX_OUTER // (size * width))
    for first in range(0, len(sums), rows):
        x = below[first : first + rows]
        found.addmm_((sums[first : first + rows, :, None] * x[:, None]).flatten(1).t(), x)
    return found.view(size, width, width)


class LSTMOfPairs(torch.autograd.Function):
    """The binary Tree-LSTM above its leaves (Tai et al. 2015, eq. 9-14, where x is 0).

    Gates stand in the order o, i, f1, f2, u; the first is moved by the gradient of h, the others by that of c.
    """

    @staticmethod
    def forward(ctx: Any, forest: Forest, leaf_h: Tensor, leaf_c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Leaves' h and c (N - M, H), weight (5 H, 2 H), bias (5 H,) -> h (N, H)."""
        pairs, size = Pairs(forest), leaf_h.shape[1]
        h, c = (leaf.new_zeros(pairs.num_nodes + 1, size) for leaf in (leaf_h, leaf_c))
        h[: pairs.num_leaves], c[: pairs.num_leaves] = leaf_h, leaf_c
        below_h, below_c = (leaf_h.new_empty(pairs.num_above, 2 * size) for _ in range(2))
        gates = leaf_h.new_empty(pairs.num_above, 5, size)
        for first, end in pairs.spans:
            inside = pairs.inside(first, end)
            x = pairs.gather(h, inside, below_h)
            cells = pairs.gather(c, inside, below_c).unflatten(1, (2, size))
            own = torch.addmm(bias, x, weight.t(), out=gates[inside].view(-1, 5 * size)).unflatten(1, (5, size))
            own[:, :4].sigmoid_()
            own[:, 4].tanh_()
            o, i, f1, f2, u = own.unbind(1)
            new = torch.mul(i, u, out=c[first:end])  # c = i u + f1 c1 + f2 c2
            new.addcmul_(f1, cells[:, 0]).addcmul_(f2, cells[:, 1])
            torch.mul(o, new.tanh(), out=h[first:end])
        ctx.pairs = pairs
        ctx.save_for_backward(c, below_h, below_c, gates, weight)
        return h[:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the loss by h (N, H)."""
        pairs: Pairs = ctx.pairs
        c, below_h, below_c, gates, weight = ctx.saved_tensors
        size = c.shape[1]
        o, i, _, _, u = gates.unbind(1)
        # what does not hang on the recursion is computed for all nodes at once
        tanh_c = c[pairs.num_leaves : -1].tanh()
        one = c.new_ones(())
        by_c = torch.addcmul(one, tanh_c, tanh_c, value=-1).mul_(o)  # dh/dc
        slopes = gates.sub(gates * gates)  # sigmoid' = s - s^2
        torch.addcmul(one, u, u, value=-1, out=slopes[:, 4])
        slopes[:, 0] *= tanh_c
        slopes[:, 1] *= u
        slopes[:, 2:4] *= below_c.unflatten(1, (2, size))
        slopes[:, 4] *= i
        passed_h, passed_c = (_passed(pairs, size, grad) for _ in range(2))
        sums = torch.empty_like(gates)
        for first, end in reversed(pairs.spans):
            inside = pairs.inside(first, end)
            links = pairs.links[first:end]
            d_h = passed_h.index_select(0, links).add_(grad[first:end])
            d_c = passed_c.index_select(0, links).addcmul_(d_h, by_c[inside])
            torch.mul(slopes[inside, 0], d_h, out=sums[inside, 0])
            torch.mul(slopes[inside, 1:], d_c[:, None], out=sums[inside, 1:])
            down = slice(2 * inside.start, 2 * inside.stop)
            torch.mm(sums[inside].flatten(1), weight, out=passed_h[down].view(-1, 2 * size))
            torch.mul(gates[inside, 2:4], d_c[:, None], out=passed_c[down].view(-1, 2, size))
        links = pairs.links[: pairs.num_leaves]
        of_leaf_h = grad[: pairs.num_leaves] + passed_h.index_select(0, links)
        of_leaf_c = passed_c.index_select(0, links)
        flat = sums.flatten(1)
        return None, of_leaf_h, of_leaf_c, flat.t() @ below_h, flat.sum(0)


class LSTMOfSums(torch.autograd.Function):
    """The Child-Sum Tree-LSTM (Tai et al. 2015, eq. 2-8), what is made of the words being given.

    Gates stand in the order i, o, u, f. Each node's h is multiplied with all four matrices once, on its own level: of
    what comes out, i, o and u are added up over the children, and f stays each child's own.
    """

    @staticmethod
    def forward(ctx: Any, forest: Forest, given: Tensor, weight: Tensor) -> Tensor:
        """Of the words (N, 4 H), weight (4 H, H) -> h (N, H)."""
        num_nodes, size = len(given), weight.shape[1]
        h, c = (given.new_empty(num_nodes, size) for _ in range(2))
        up = torch.empty_like(given)  # U h of every node
        gates = given[:, : 3 * size].clone()
        forget = given.new_empty(len(forest.arcs), size)
        for (first, end), (first_arc, end_arc) in zip(forest.spans(), forest.arc_spans(), strict=True):
            own, arcs = gates[first:end], slice(first_arc, end_arc)
            children, parents = forest.arcs[arcs], forest.parents[arcs]
            if end_arc > first_arc:
                theirs = up.index_select(0, children)
                own.index_add_(0, parents - first, theirs[:, : 3 * size])
                f = given[:, 3 * size :].index_select(0, parents).add_(theirs[:, 3 * size :])
                torch.sigmoid(f, out=forget[arcs])
            own[:, : 2 * size].sigmoid_()
            own[:, 2 * size :].tanh_()
            i, o, u = own.chunk(3, 1)
            new = torch.mul(i, u, out=c[first:end])  # c = i u + sum_k f_k c_k
            if end_arc > first_arc:
                new.index_add_(0, parents - first, forget[arcs] * c.index_select(0, children))
            torch.mul(o, new.tanh(), out=h[first:end])
            torch.mm(h[first:end], weight.t(), out=up[first:end])
        ctx.forest = forest
        ctx.save_for_backward(h, c, gates, forget, weight)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the loss by h (N, H)."""
        forest: Forest = ctx.forest
        h, c, gates, forget, weight = ctx.saved_tensors
        num_nodes, size, num_arcs = len(c), c.shape[1], len(forest.arcs)
        i, o, u = gates.chunk(3, 1)
        one, tanh_c = c.new_ones(()), c.tanh()
        by_c = torch.addcmul(one, tanh_c, tanh_c, value=-1).mul_(o)  # dh/dc
        slopes = gates.sub(gates * gates).unflatten(1, (3, size))  # sigmoid' = s - s^2
        torch.addcmul(one, u, u, value=-1, out=slopes[:, 2])
        slopes[:, 0] *= u
        slopes[:, 1] *= tanh_c
        slopes[:, 2] *= i
        # (A,) each: the derivative of a child's c by its forget gate's sum
        by_forget = forget.sub(forget * forget).mul_(c.index_select(0, forest.arcs))
        # where each node is a child among the arcs; a root is behind the last, where no gradient comes from
        own_arc = forest.arcs.new_full((num_nodes,), num_arcs)
        own_arc[forest.arcs] = torch.arange(num_arcs, device=own_arc.device)
        passed_up, passed_c = grad.new_empty(num_arcs + 1, 4 * size), grad.new_empty(num_arcs + 1, size)
        passed_up[-1], passed_c[-1] = 0, 0
        of_given = grad.new_zeros(num_nodes, 4, size)
        levels = list(zip(forest.spans(), forest.arc_spans(), strict=True))
        for (first, end), (first_arc, end_arc) in reversed(levels):
            mine, arcs = own_arc[first:end], slice(first_arc, end_arc)
            d_h = torch.addmm(grad[first:end], passed_up.index_select(0, mine), weight)
            d_c = passed_c.index_select(0, mine).addcmul_(d_h, by_c[first:end])
            sums = of_given[first:end]
            torch.mul(slopes[first:end], d_c[:, None], out=sums[:, :3])
            torch.mul(slopes[first:end, 1], d_h, out=sums[:, 1])
            if end_arc == first_arc:
                continue
            parents = forest.parents[arcs] - first
            from_c = d_c.index_select(0, parents)
            passed = passed_up[arcs].view(-1, 4, size)
            passed[:, :3] = sums[:, :3].index_select(0, parents)
            of_forget = torch.mul(from_c, by_forget[arcs], out=passed[:, 3])
            sums[:, 3].index_add_(0, parents, of_forget)
            torch.mul(from_c, forget[arcs], out=passed_c[arcs])
        of_weight = passed_up[:-1].t() @ h.index_select(0, forest.arcs)
        return None, of_given.flatten(1), of_weight
