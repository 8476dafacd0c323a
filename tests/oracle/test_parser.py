"""The parser: its search against one written plainly, the scores and their gradients node by node, brackets by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cluster.data.layouts import Ragged
from nn_models import zoo
from nn_models.batch import Batch, Place
from nn_models.columns import Label, Tree
from nn_models.parser import Brackets, Parsed
from nn_models.parser_objective import ParseEvidence, ParsingSpec, Shaped, shaped
from nn_models.signature import Signature

SIGNATURE = Signature(columns={"input": Tree(size=30, known=25), "target": Label(size=2)})


# -- trees as nested pairs -----------------------------------------------------------------------------------------


def nested(words):
    """Random trees over lists of words."""
    return st.recursive(words, lambda below: st.tuples(below, below), max_leaves=9)


def numbered(trees):
    """No word comes twice in a sentence: equal scores would leave open which join comes first."""

    def number(tree, left):
        return left.pop() if isinstance(tree, int) else tuple(number(child, left) for child in tree)

    return [number(tree, list(range(16 + row, row, -1))) for row, tree in enumerate(trees)]


TREES = st.lists(nested(st.just(0)), min_size=1, max_size=5).map(numbered)


def leaves(tree) -> list[int]:
    return [tree] if isinstance(tree, int) else leaves(tree[0]) + leaves(tree[1])


def brackets(tree, first: int = 0) -> list[tuple[int, int]]:
    """Those of all joins, the whole last."""
    if isinstance(tree, int):
        return []
    middle = first + len(leaves(tree[0]))
    return [*brackets(tree[0], first), *brackets(tree[1], middle), (first, first + len(leaves(tree)))]


def forest(trees, *, backwards: bool = False):
    """Laid together; with `backwards` each tree is stored from its right to its left."""
    words, children, level, lengths = [], [], [], []
    for tree in trees:
        begin = len(words)

        def add(node, begin=begin) -> int:
            if isinstance(node, int):
                below = []
            else:
                below = [add(child) for child in (reversed(node) if backwards else node)]
                below = below[::-1] if backwards else below
            words.append(node if isinstance(node, int) else -1)
            children.append([*below, *[-1] * (2 - len(below))])
            level.append(1 + max(level[begin + child] for child in below) if below else 0)
            return len(words) - 1 - begin

        add(tree)
        lengths.append(len(words) - begin)
    fields = {"words": words, "children": children, "level": level}
    stored = Ragged.of({name: np.array(values, np.int32) for name, values in fields.items()}, lengths)
    return stored.collate(SIGNATURE["input"], torch.device("cpu"))


def net_of(seed: int = 0, **fields):
    torch.manual_seed(seed)
    net = zoo.build({"kind": "parser", "hidden": 5, "embedding": 4, **fields}, SIGNATURE).double()
    with torch.no_grad():
        net.cells.weight.uniform_(-1, 1)
        net.embedding.weight.uniform_(-2, 2)
        net.score.weight.uniform_(-2, 2)
    return net


# -- the same, plainly ---------------------------------------------------------------------------------------------


def word(net, number: int):
    return torch.tanh(net.words(net.embedding.weight[min(number, 25)]))


def joined(net, left, right):
    return torch.tanh(net.cells.weight @ torch.cat((left, right)) + net.cells.bias)


def scored(net, tree):
    """(state, score of all its joins)."""
    if isinstance(tree, int):
        return word(net, tree), 0.0
    (left, one), (right, other) = scored(net, tree[0]), scored(net, tree[1])
    p = joined(net, left, right)
    return p, one + other + (net.score.weight[0] * p).sum()


def found_plainly(net, words, true, *, margin: float, beam: int):
    """The brackets in the order of joins: lists of nodes, of which neighbours are joined; sets are told apart."""
    hypotheses = [(0.0, [(word(net, number), place, place + 1) for place, number in enumerate(words)], ())]
    for _ in range(len(words) - 1):
        reached = []
        for total, nodes, done in hypotheses:
            for at in range(len(nodes) - 1):
                (left, first, _), (right, _, end) = nodes[at], nodes[at + 1]
                p = joined(net, left, right)
                gain = (net.score.weight[0] * p).sum().item() + margin * ((first, end) not in true)
                reached.append((total + gain, [*nodes[:at], (p, first, end), *nodes[at + 2 :]], (*done, (first, end))))
        reached.sort(key=lambda one: -one[0])
        hypotheses, seen = [], set()
        for one in reached:
            if frozenset(one[2]) not in seen and len(hypotheses) < beam:
                seen.add(frozenset(one[2]))
                hypotheses.append(one)
    return list(hypotheses[0][2])


@settings(max_examples=40, deadline=None)
@given(trees=TREES, beam=st.sampled_from([1, 2, 3, 5]), margin=st.sampled_from([0.0, 0.7]), seed=st.integers(0, 3))
def test_search_and_scores_are_those_written_plainly(trees, beam, margin, seed):
    net = net_of(seed, train_beam=beam)
    parsed: Parsed = net(forest(trees), margin)
    for row, tree in enumerate(trees):
        true = brackets(tree)
        with torch.no_grad():
            wanted = found_plainly(net, leaves(tree), set(true), margin=margin, beam=beam)
        got = [tuple(bracket) for bracket in parsed.brackets[row].tolist() if bracket[0] >= 0]
        assert set(got) == set(wanted)  # with a beam the same tree may be reached in another order
        assert parsed.right[row].tolist()[: len(got)] == [bracket in true for bracket in got]
        assert not parsed.right[row, len(got) :].any()
        assert parsed.true_brackets[row] == len(true)
        with torch.no_grad():
            of_true, of_found = (float(scored(net, each)[1]) for each in (tree, built(leaves(tree), got)))
        # float64, sums of up to 8 scores
        assert parsed.true_score[row].item() == pytest.approx(of_true, abs=1e-12)
        assert parsed.score[row].item() == pytest.approx(of_found, abs=1e-12)


def built(words, joins):
    """The tree of these brackets."""
    nodes = {(place, place + 1): number for place, number in enumerate(words)}
    for first, end in joins:
        middle = next(b for a, b in nodes if a == first and (b, end) in nodes)
        nodes[first, end] = (nodes.pop((first, middle)), nodes.pop((middle, end)))
    (tree,) = nodes.values()
    return tree


@settings(max_examples=20, deadline=None)
@given(trees=TREES, backwards=st.booleans())
def test_loss_and_gradients_are_those_of_both_trees_node_by_node(trees, backwards):
    net, margin = net_of(), 0.5
    trees_laid = forest(trees, backwards=backwards)  # the order in which nodes are stored changes nothing
    batch = Batch({"input": trees_laid}, Place.of(len(trees)), lambda: None)
    measured = ParsingSpec(margin=margin, over="trees").build(SIGNATURE).measure(net, batch)
    plain, right, every = torch.zeros(()), 0, 0
    for tree in trees:
        true = brackets(tree)
        with torch.no_grad():
            found = found_plainly(net, leaves(tree), set(true), margin=margin, beam=1)
        wrong = sum(bracket not in true for bracket in found)
        loss = scored(net, built(leaves(tree), found))[1] + margin * wrong - scored(net, tree)[1]
        plain = plain + F.relu(torch.as_tensor(loss))
        whole = (0, len(leaves(tree)))
        right += 2 * sum(bracket in true for bracket in found if bracket != whole)
        every += sum(bracket != whole for bracket in [*true, *found])
    # float64: the same sums in another order
    assert measured.loss.item() == pytest.approx(plain.item(), abs=1e-12)
    assert (measured.sums.tolist(), measured.counts.tolist()) == ([right], [every])
    if not measured.loss.item() > 0:
        return
    mine = torch.autograd.grad(measured.loss, list(net.parameters()))
    theirs = torch.autograd.grad(plain, list(net.parameters()), allow_unused=True)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, atol=1e-10, rtol=0)


@settings(max_examples=20, deadline=None)
@given(trees=TREES, backwards=st.booleans(), seed=st.integers(0, 3))
def test_each_right_join_is_to_win_against_the_best_wrong_one(trees, backwards, seed):
    net, margin = net_of(seed), 0.5
    batch = Batch({"input": forest(trees, backwards=backwards)}, Place.of(len(trees)), lambda: None)
    measured = ParsingSpec(margin=margin, over="joins").build(SIGNATURE).measure(net, batch)
    plain = torch.zeros((), dtype=torch.float64)
    for tree in trees:
        true, words = brackets(tree), leaves(tree)
        nodes = [(word(net, number), place, place + 1) for place, number in enumerate(words)]
        while len(nodes) > 1:
            best = {}
            for at, ((left, first, _), (right, _, end)) in enumerate(pairwise(nodes)):
                p = joined(net, left, right)
                score = (net.score.weight[0] * p).sum()
                is_right = (first, end) in true
                if is_right not in best or score > best[is_right][0]:
                    best[is_right] = (score, at, (p, first, end))
            if len(best) == 2:
                plain = plain + F.relu(margin + best[False][0] - best[True][0])
            _, at, node = max(best.values(), key=lambda one: one[0].item())  # greedily, right or wrong
            nodes[at : at + 2] = [node]
    assert measured.loss.item() == pytest.approx(plain.item(), abs=1e-12)  # float64: the same sums in another order
    if not measured.loss.item() > 0:
        return
    mine = torch.autograd.grad(measured.loss, list(net.parameters()))
    for one, other in zip(mine, torch.autograd.grad(plain, list(net.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@settings(max_examples=40, deadline=None)
@given(trees=TREES, backwards=st.booleans())
def test_brackets_of_true_trees(trees, backwards):
    found = Brackets.of(forest(trees, backwards=backwards))
    for row, tree in enumerate(trees):
        words = leaves(tree)
        singles = [(place, place + 1) for place in range(len(words))]
        of_row = sorted(map(tuple, found.of_node[found.rows == row].tolist()))
        assert of_row == sorted([*brackets(tree), *singles])
        assert found.lengths[row] == len(words)
        longest = found.words.shape[1]
        every = [[a, b] for a in range(longest) for b in range(longest + 1)]
        every = torch.tensor([every]).expand(len(trees), -1, -1)
        true = [tuple(bracket) in brackets(tree) for bracket in every[row].tolist()]
        assert found.has(every)[row].tolist() == true


def test_trees_of_one_shape():
    def tree(words, shape):
        if len(words) == 1:
            return words[0]
        at = {"left": len(words) - 1, "right": 1, "balanced": (len(words) + 1) // 2}[shape]
        return (tree(words[:at], shape), tree(words[at:], shape))

    lengths = torch.arange(1, 12)
    for shape in ("left", "right", "balanced"):
        found = shaped(shape, lengths, 11)
        for number, row in zip(lengths.tolist(), found.tolist(), strict=True):
            got = [tuple(bracket) for bracket in row if bracket[0] >= 0]
            assert sorted(got) == sorted(brackets(tree(list(range(number)), shape)))
            assert number == 1 or got[-1] == (0, number)
        trees = [tree([1] * number, shape) for number in (1, 2, 5, 8)]
        batch = Batch({"input": forest(trees)}, Place.of(4), lambda: None)
        measured = ParsingSpec().build(SIGNATURE).measure(Shaped(shape), batch)
        assert measured.sums.tolist() == measured.counts.tolist() == [18]  # 2 x (0 + 0 + 3 + 6): without whole ones


def test_evidence_counts_brackets_by_size_and_keeps_sentences():
    net = net_of()
    net.eval()
    trees = [((1, 2), (3, (4, 5))), (1, (2, (3, 4))), 6, (((1, 2), 3), 4), (7, 8)]
    objective = ParsingSpec().build(SIGNATURE)
    evidence, right, wrong = ParseEvidence(), 0, 0
    for begin in (0, 3):
        part = trees[begin : begin + 3]
        place = Place.of(len(part))._replace(ids=np.arange(len(part)) + begin)
        batch = Batch({"input": forest(part)}, place, lambda: None)
        outputs = objective.measure(net, batch).outputs
        evidence.add(batch, outputs)
        many = (outputs.brackets[..., 0] >= 0).sum(1) > 1
        all_right = (outputs.right | (outputs.brackets[..., 0] < 0)).all(1)
        right, wrong = right + int((many & all_right).sum()), wrong + int((many & ~all_right).sum())
    found = evidence.tensors(lambda values: values, torch.device("cpu"))
    assert found["sizes"].sum(0)[1:].tolist() == [sum(len(brackets(tree)) for tree in trees)] * 2
    assert found["sizes"][2, 2] == 5
    assert len(found["example_rows"]) == right + wrong == 3
    assert found["example_predictions.lengths"].sum() == len(found["example_predictions.values"])


def test_a_chain_of_a_thousand_words():
    words, children, level = [0], [[-1, -1]], [0]
    for number in range(1000):
        words += [number % 9, -1]
        below = [len(children) - 1, len(children)]
        children += [[-1, -1], below if number % 2 else below[::-1]]
        level += [0, number + 1]
    fields = {"words": words, "children": children, "level": level}
    stored = Ragged.of({name: np.array(values, np.int32) for name, values in fields.items()}, [len(words)])
    net = net_of()
    parsed = net(stored.collate(SIGNATURE["input"], torch.device("cpu")), 0.1)
    assert parsed.true_brackets.tolist() == [1000]
    assert parsed.brackets[0, -1].tolist() == [0, 1001]
    (parsed.score - parsed.true_score).sum().backward()
