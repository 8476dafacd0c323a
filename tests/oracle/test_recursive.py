"""Recursive nets level by level against a plain recursion node by node, torch.nn.LSTM, and numerical derivatives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nn_models import zoo
from nn_models.batch import Forest
from nn_models.columns import Label, Labels, Tree
from nn_models.recursion import LSTMOfPairs, LSTMOfSums, TanhOfPairs
from nn_models.signature import Signature

WORDS, KNOWN, CLASSES, HIDDEN = 9, 6, 4, 5
BINARY = ("recursive", "rntn", "tree_lstm")
MODELS = (*BINARY, "child_sum_tree_lstm")

# A tree here is (word or -1, [its children]): what the recursion below walks, and what `laid` lays out as it is stored.


def laid(trees) -> Forest:
    """The forest of some trees, walked without recursion: chains may be long."""
    words, children, level, lengths = [], [], [], []
    arity = max(2, *(len(kids) for tree in trees for _, kids in walk(tree)))
    for tree in trees:
        place = {}
        for node in walk(tree):
            word, kids = node
            place[id(node)] = len(place)
            below = [place[id(kid)] for kid in kids]
            words.append(word)
            children.append(below + [-1] * (arity - len(kids)))
            first = len(level) - len(place) + 1
            level.append(1 + max(level[first + kid] for kid in below) if below else 0)
        lengths.append(len(place))
    arrays = [np.array(values, np.int32) for values in (words, children, level)]
    return Forest.of(*map(torch.from_numpy, arrays), torch.tensor(lengths))


def walk(tree):
    """Children before parents."""
    found, open_ = [], [tree]
    while open_:
        node = open_.pop()
        found.append(node)
        open_ += node[1]
    return found[::-1]


def leaf_or_node(arity: int, words_above: bool):
    word = st.integers(0, WORDS - 1)
    above = word | st.just(-1) if words_above else st.just(-1)
    leaf = st.builds(lambda found: (found, []), word)
    return st.recursive(leaf, lambda tree: st.tuples(above, st.lists(tree, min_size=1, max_size=arity)), max_leaves=9)


def trees_for(kind: str):
    tree = leaf_or_node(4, True) if kind == "child_sum_tree_lstm" else leaf_or_node(2, False)
    return st.lists(tree, min_size=1, max_size=5)


def net_for(kind: str, dtype, *, each_node: bool = True):
    nary = kind == "child_sum_tree_lstm"
    column = Tree(size=WORDS, known=KNOWN, arity=4 if nary else 2, words_at="nodes" if nary else "leaves")
    target = Labels(size=CLASSES) if each_node else Label(size=CLASSES)
    torch.manual_seed(0)
    sizes = {"hidden": HIDDEN} if kind in ("recursive", "rntn") else {"hidden": HIDDEN, "embedding": 3}
    net = zoo.build({"kind": kind, **sizes}, Signature(columns={"input": column, "target": target})).to(dtype)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn_like(weight) * 0.5)
        net.embedding.weight /= net.embedding.scale
    return net


# -- the recursion, from the papers ------------------------------------------------------------------------------------


def state(net, kind: str, node):
    """(h, c) of one node, by recursion."""
    word, kids = node
    return one_node(net, kind, word, [state(net, kind, kid) for kid in kids])


def one_node(net, kind: str, word: int, below):
    """(h, c) of one node, from those of its children."""
    cells, table = net.cells, net.embedding.scale * net.embedding.weight
    x = table[min(word, KNOWN)] if word >= 0 else torch.zeros_like(table[0])
    if kind == "child_sum_tree_lstm":  # Tai et al. 2015, eq. 2-8
        w, b, u = cells.words.weight, cells.words.bias, cells.weight
        (wi, wo, wu, wf), (bi, bo, bu, bf), (ui, uo, uu, uf) = w.chunk(4), b.chunk(4), u.chunk(4)
        total = sum((h for h, _ in below), torch.zeros(HIDDEN, dtype=w.dtype))
        i, o = torch.sigmoid(wi @ x + ui @ total + bi), torch.sigmoid(wo @ x + uo @ total + bo)
        c = i * torch.tanh(wu @ x + uu @ total + bu)
        for h_k, c_k in below:
            c = c + torch.sigmoid(wf @ x + uf @ h_k + bf) * c_k
        return o * torch.tanh(c), c
    if len(below) == 1:  # a child that is not there has a state of zeros
        below = [below[0], (torch.zeros(HIDDEN, dtype=table.dtype),) * 2]
    if kind == "tree_lstm":  # eq. 9-14
        if not below:
            (wo, wc), (bo, bc) = cells.leaf.weight.chunk(2), cells.leaf.bias.chunk(2)
            c = wc @ x + bc
            return torch.sigmoid(wo @ x + bo) * torch.tanh(c), c
        (h1, c1), (h2, c2) = below
        sums = cells.weight @ torch.cat((h1, h2)) + cells.left_bias + cells.right_bias
        o, i, f1, f2, u = sums.chunk(5)
        c = torch.sigmoid(i) * torch.tanh(u) + torch.sigmoid(f1) * c1 + torch.sigmoid(f2) * c2
        return torch.sigmoid(o) * torch.tanh(c), c
    if not below:
        return x, None
    both = torch.cat([h for h, _ in below])
    sums = cells.weight @ both + cells.bias
    if kind == "rntn":  # Socher et al. 2013, eq. 3
        sums = sums + torch.stack([both @ slice_ @ both for slice_ in cells.tensor])
    return torch.tanh(sums), None


def by_node(net, kind, trees, *, each_node: bool):
    """Outputs as the net gives them, by recursion: of each node, or of the roots."""
    hidden = [state(net, kind, node)[0] for tree in trees for node in (walk(tree) if each_node else [tree])]
    return net.output(torch.stack(hidden))


# float32: sums of a dozen products in another order; float64 has twice the digits
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_levels_equal_a_recursion_in_outputs_and_all_gradients(kind, dtype, data):
    trees = data.draw(trees_for(kind))
    each_node = data.draw(st.booleans())
    net = net_for(kind, dtype, each_node=each_node)
    ours, theirs = net(laid(trees)), by_node(net, kind, trees, each_node=each_node)
    close = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    torch.testing.assert_close(ours, theirs, **close)
    weights = torch.randn(ours.shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    names, parameters = zip(*net.named_parameters(), strict=True)
    mine = torch.autograd.grad((ours * weights).sum(), parameters, allow_unused=True)
    other = torch.autograd.grad((theirs * weights).sum(), parameters, allow_unused=True)
    for name, one, two, weight in zip(names, mine, other, parameters, strict=True):
        assert one is not None, name  # ranks wait for the gradient of each
        two = torch.zeros_like(weight) if two is None else two
        of_largest = TOLERANCES[dtype] * max(1.0, two.abs().max().item())  # sums of terms that nearly cancel
        torch.testing.assert_close(one, two, atol=of_largest, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_tree_says_the_same_wherever_it_stands_in_a_batch(kind, data):
    trees = data.draw(trees_for(kind))
    order = data.draw(st.permutations(range(len(trees))))
    net = net_for(kind, torch.float64, each_node=False)
    said, other = net(laid(trees)), net(laid([trees[place] for place in order]))
    torch.testing.assert_close(said[order], other, atol=1e-12, rtol=0)  # float64, sums of other products' shapes
    for tree, row in zip(trees, said, strict=True):
        torch.testing.assert_close(net(laid([tree]))[0], row, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_a_chain_of_3000_nodes(kind):
    """Against a loop, whose depth does not matter; autograd's own engine has no recursion either."""
    net = net_for(kind, torch.float64, each_node=False)
    with torch.no_grad():  # a chain neither dies nor explodes
        for weight in net.cells.parameters():
            weight *= 0.5
    summed = kind == "child_sum_tree_lstm"
    tree = (1, [])
    hidden = state(net, kind, tree)
    for number in range(2999 if summed else 1499):
        word = number % WORDS
        beside = [] if summed else [(word, [])]
        tree = (word if summed else -1, [tree, *beside])
        hidden = one_node(net, kind, tree[0], [hidden, *(state(net, kind, leaf) for leaf in beside)])
    said, wanted = net(laid([tree])), net.output(hidden[0][None])
    torch.testing.assert_close(said, wanted, atol=1e-10, rtol=0)  # float64, 3000 steps that shrink
    parameters = list(net.parameters())
    mine = torch.autograd.grad(said.sum(), parameters)
    other = torch.autograd.grad(wanted.sum(), parameters)
    torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kind", MODELS)
def test_trees_of_one_node(kind):
    net = net_for(kind, torch.float64)
    trees = [(word, []) for word in (0, KNOWN - 1, KNOWN, WORDS - 1)]
    said = net(laid(trees))
    torch.testing.assert_close(said, by_node(net, kind, trees, each_node=True))
    torch.testing.assert_close(said[2], said[3])  # unknown words have one vector
    assert not torch.isclose(said[1], said[2]).all()
    said.sum().backward()
    assert all(weight.grad is not None for weight in net.parameters())


@pytest.mark.parametrize("kind", BINARY)
def test_trees_whose_nodes_have_one_child_at_most(kind):
    net = net_for(kind, torch.float64)
    column = Tree(size=WORDS, arity=1)
    trees = column.imagine(2)
    said = net(trees)
    tree = (-1, [(-1, [(0, [])])])
    torch.testing.assert_close(said, by_node(net, kind, [tree, tree], each_node=True))


# -- oracles that nobody here wrote --------------------------------------------------------------------------------


def test_child_sum_on_a_chain_is_torchs_lstm():
    net = net_for("child_sum_tree_lstm", torch.float64)
    words = [3, 0, 5, 2, 2, 1, 4]
    tree = (words[0], [])
    for word in words[1:]:
        tree = (word, [tree])
    lstm = nn.LSTM(3, HIDDEN).double()
    with torch.no_grad():  # torch's gates are i, f, g, o
        for ours, theirs in (
            (net.cells.words.weight, lstm.weight_ih_l0),
            (net.cells.weight, lstm.weight_hh_l0),
            (net.cells.words.bias, lstm.bias_ih_l0),
        ):
            i, o, u, f = ours.chunk(4)
            theirs.copy_(torch.cat((i, f, u, o)))
        lstm.bias_hh_l0.zero_()
    steps = net.embedding.scale * net.embedding.weight.detach()[words]
    hidden, _ = lstm(steps)
    said = net(laid([tree]))
    torch.testing.assert_close(said, net.output(hidden), atol=1e-12, rtol=0)  # float64, 7 steps
    mine = torch.autograd.grad(said.square().sum(), net.cells.weight)[0]
    other = torch.autograd.grad(net.output(hidden).square().sum(), lstm.weight_hh_l0)[0]
    i, f, u, o = other.chunk(4)
    torch.testing.assert_close(mine, torch.cat((i, o, u, f)), atol=1e-10, rtol=0)


def test_an_rntn_whose_tensor_is_zero_is_a_recursive_net():
    rntn, plain = net_for("rntn", torch.float64), net_for("recursive", torch.float64)
    with torch.no_grad():
        rntn.cells.tensor.zero_()
    plain.load_state_dict({name: value for name, value in rntn.state_dict().items() if name != "cells.tensor"})
    trees = [(-1, [(1, []), (-1, [(2, []), (7, [])])]), (3, [])]
    assert torch.equal(rntn(laid(trees)), plain(laid(trees)))


FOREST = [(-1, [(-1, [(0, []), (1, [])]), (2, [])]), (3, []), (-1, [(4, []), (5, [])])]
NARY = [(1, [(-1, [(0, []), (1, []), (2, [(5, [])])]), (2, [])]), (3, [])]


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def test_derivatives_are_those_of_torchs_gradcheck():
    forest, nary = laid(FOREST), laid(NARY)
    leaves, nodes = forest.levels[1], len(nary.words)
    plain = (numbers(leaves, 3), numbers(3, 6), numbers(3))
    assert torch.autograd.gradcheck(lambda *values: TanhOfPairs.apply(forest, *values, None), plain)
    tensor = (*plain, numbers(3, 6, 6))
    assert torch.autograd.gradcheck(lambda *values: TanhOfPairs.apply(forest, *values), tensor)
    gated = (numbers(leaves, 3), numbers(leaves, 3), numbers(15, 6), numbers(15))
    assert torch.autograd.gradcheck(lambda *values: LSTMOfPairs.apply(forest, *values), gated)
    summed = (numbers(nodes, 12), numbers(12, 3))
    assert torch.autograd.gradcheck(lambda *values: LSTMOfSums.apply(nary, *values), summed)


@pytest.mark.parametrize(
    ("model", "cells"),
    [
        ({"kind": "tree_lstm", "hidden": 150, "embedding": 300}, 316_800),  # Tai et al.'s code
        ({"kind": "child_sum_tree_lstm", "hidden": 150, "embedding": 300}, 4 * (150 * 300 + 150 * 150 + 150)),
        ({"kind": "recursive", "hidden": 30}, 30 * 60 + 30),
        ({"kind": "rntn", "hidden": 30}, 30 * 60 + 30 + 30 * 60 * 60),
    ],
)
def test_numbers_of_parameters(model, cells):
    net = zoo.build(model, Signature(columns={"input": Tree(size=11), "target": Labels(size=5)}))
    assert sum(weight.numel() for weight in net.cells.parameters()) == cells
    size = model.get("embedding", model["hidden"])
    assert net.embedding.weight.shape == (12, size)  # and the unknown word
    assert sum(weight.numel() for weight in net.output.parameters()) == 5 * (model["hidden"] + 1)
