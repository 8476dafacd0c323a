"""The scene parser: its search against one of sets of segments written plainly, and against that of sentences."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from torch.nn import functional as F

from cluster.data.layouts import Ragged
from cluster.data.sources.scenes import ScenesSpec
from nn_models import zoo
from nn_models.batch import Batch, Place
from nn_models.columns import Scene, Tree
from nn_models.errors import UserError
from nn_models.parser import Brackets, search
from nn_models.scene_objective import Ordered, SceneEvidence, SceneParsingSpec
from nn_models.scene_parser import Graph, search_scenes
from nn_models.signature import Signature

WIDTH, DEGREE = 3, 6
SIGNATURE = Signature(columns={"input": Scene(width=WIDTH, degree=DEGREE, names=("a", "b", "c"))})
CPU = torch.device("cpu")


@st.composite
def a_scene(draw, *, connected: bool = True):
    """(features, edges, classes): a random tree of edges and some more; not connected: any edges, or none."""
    num = draw(st.integers(1, DEGREE + 1))
    edges = {(draw(st.integers(0, place - 1)), place) for place in range(1, num)} if connected else set()
    pairs = [(one, other) for other in range(num) for one in range(other)]
    edges |= set(draw(st.lists(st.sampled_from(pairs), max_size=5))) if pairs else set()
    classes = draw(st.lists(st.integers(0, 2), min_size=num, max_size=num))
    features = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(num, WIDTH)).astype(np.float32)
    return features, sorted(edges), classes


def laid(scenes):
    neighbours, features, classes = [], [], []
    for of_scene, edges, labels in scenes:
        rows = np.full((len(labels), DEGREE), -1, np.int32)
        for place, row in enumerate(rows):
            named = [other for one, other in edges if one == place]  # each edge by one of its two segments
            row[: len(named)] = named
        neighbours.append(rows)
        features.append(of_scene)
        classes += labels
    fields = {
        "features": np.concatenate(features),
        "neighbours": np.concatenate(neighbours),
        "objects": np.array(classes, np.int32),
    }
    stored = Ragged.of(fields, [len(labels) for _, _, labels in scenes])
    value = stored.collate(SIGNATURE["input"], CPU)
    object.__setattr__(value, "features", value.features.double())
    return value


def net_of(seed: int = 0, **fields):
    torch.manual_seed(seed)
    net = zoo.build({"kind": "scene_parser", "hidden": 5, **fields}, SIGNATURE).double()
    with torch.no_grad():
        net.cells.weight.uniform_(-1, 1)
        net.score.weight.uniform_(-2, 2)
    return net


# -- the same, plainly ---------------------------------------------------------------------------------------------


def parts(num, edges):
    """How many parts of a graph hang together, and which each node is of."""
    matrix = np.zeros((num, num))
    for one, other in edges:
        matrix[one, other] = 1
    return connected_components(matrix, directed=False)


def is_right(segments, scene) -> bool:
    """Of one object, or of whole ones."""
    _, edges, classes = scene
    num, names = parts(len(classes), [edge for edge in edges if classes[edge[0]] == classes[edge[1]]])
    objects = [frozenset(np.flatnonzero(names == name).tolist()) for name in range(num)]
    return any(segments <= each for each in objects) or all(each <= segments or not each & segments for each in objects)


class Tried(NamedTuple):
    """A hypothesis: its score with margins, and the tree's; its nodes, [left, right] joins, rivals' scores at each."""

    value: float
    score: torch.Tensor | float
    nodes: dict
    joins: list
    rivals: list


def joins_of(net, tried, scene, *, margin, only_right):
    """(gain, score, is right, left, right, state) of all joins that can be made."""
    _, edges, _ = scene
    for left in tried.nodes:
        for other in tried.nodes:
            touching = any((a in left and b in other) or (a in other and b in left) for a, b in edges)
            if min(left) < min(other) and touching:
                p = torch.tanh(net.cells.weight @ torch.cat((tried.nodes[left], tried.nodes[other])) + net.cells.bias)
                score, truth = (net.score.weight[0] * p).sum(), is_right(left | other, scene)
                yield score.item() + margin * (not truth), score, truth, left, other, p


def found_plainly(net, scene, *, margin: float = 0.0, only_right: bool = False, beam: int = 1):
    """([left, right] sets of joins, the tree's score, [best right, best wrong] scores): hypotheses as lists."""
    nodes = {
        frozenset([at]): torch.tanh(net.segments(row)) for at, row in enumerate(torch.from_numpy(scene[0]).double())
    }
    hypotheses = [Tried(0.0, 0.0, nodes, [], [])]
    while True:
        reached = []
        for tried in hypotheses:
            options = list(joins_of(net, tried, scene, margin=margin, only_right=only_right))
            best = [max((option for option in options if option[2] is truth), default=None) for truth in (True, False)]
            rivals = [*tried.rivals, None if None in best else [option[1] for option in best]]
            for gain, score, truth, left, other, p in options:
                if truth or not only_right:
                    nodes = {key: state for key, state in tried.nodes.items() if key not in (left, other)}
                    joins = [*tried.joins, (left, other)]
                    reached.append(
                        Tried(tried.value + gain, tried.score + score, nodes | {left | other: p}, joins, rivals)
                    )
        if not reached:
            return hypotheses[0].joins, hypotheses[0].score, hypotheses[0].rivals
        hypotheses, seen = [], set()
        for tried in sorted(reached, key=lambda tried: -tried.value):
            made = frozenset(left | other for left, other in tried.joins)
            if made not in seen and len(hypotheses) < beam:
                seen.add(made)
                hypotheses.append(tried)


def made(slots):
    """The nodes of joins of what stands in these slots."""
    nodes, found = {}, set()
    for left, other in slots:
        if left >= 0:
            nodes[left] = nodes.get(left, frozenset([left])) | nodes.get(other, frozenset([other]))
            found.add(nodes[left])
    return found


SCENES = st.lists(a_scene(), min_size=1, max_size=4)
ANY = st.lists(a_scene(connected=False), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(scenes=SCENES | ANY, margin=st.sampled_from([0.0, 0.7]), seed=st.integers(0, 3), beam=st.sampled_from([1, 2, 4]))
def test_search_and_scores_are_those_written_plainly(scenes, margin, seed, beam):
    net = net_of(seed, train_beam=beam)
    parsed = net(laid(scenes), margin)
    for row, scene in enumerate(scenes):
        joins, score, _ = found_plainly(net, scene, margin=margin, beam=beam)
        best, true_score, _ = found_plainly(net, scene, only_right=True, beam=beam)
        slots = [[min(left), min(other)] for left, other in joins]
        right = [is_right(left | other, scene) for left, other in joins]
        found, is_found = parsed.brackets[row].tolist(), parsed.right[row].tolist()
        if beam == 1:
            assert found == slots + [[-1, -1]] * (len(found) - len(slots))
            assert is_found == right + [False] * (len(found) - len(slots))
        else:  # the orders of joins that lead to one tree score alike, but for how sums are rounded
            assert made(found) == {left | other for left, other in joins}
            assert sum(is_found) == sum(right)
        assert parsed.true_brackets[row] == len(best) == len(joins)  # joins that are right never lead nowhere
        # float64, sums of up to 6 scores
        assert parsed.score[row].item() == pytest.approx(float(torch.as_tensor(score).detach()), abs=1e-12)
        assert parsed.true_score[row].item() == pytest.approx(float(torch.as_tensor(true_score).detach()), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(scenes=SCENES, over=st.sampled_from([("joins", 1), ("trees", 1), ("trees", 3)]), seed=st.integers(0, 3))
def test_loss_and_gradients_are_those_node_by_node(scenes, over, seed):
    over, beam = over  # which rivals a join has depends on the order, which rounding decides where there are several
    net, margin = net_of(seed, train_beam=beam), 0.5
    batch = Batch({"input": laid(scenes)}, Place.of(len(scenes)), lambda: None)
    measured = SceneParsingSpec(margin=margin, over=over).build(SIGNATURE).measure(net, batch)
    plain = torch.zeros((), dtype=torch.float64)
    for scene in scenes:
        joins, score, rivals = found_plainly(net, scene, margin=margin if over == "trees" else 0.0, beam=beam)
        if over == "trees":
            wrong = sum(not is_right(left | other, scene) for left, other in joins)
            gap = score + margin * wrong - found_plainly(net, scene, only_right=True, beam=beam)[1]
            plain = plain + F.relu(torch.as_tensor(gap))
        else:
            plain = plain + sum(F.relu(margin + other - right) for right, other in filter(None, rivals))
    assert measured.loss.item() == pytest.approx(plain.item(), abs=1e-12)  # float64: the same sums in another order
    if not measured.loss.item() > 0:
        return
    mine = torch.autograd.grad(measured.loss, list(net.parameters()))
    for one, other in zip(mine, torch.autograd.grad(plain, list(net.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    beam=st.sampled_from([1, 2, 5]),
)
def test_a_chain_of_segments_is_parsed_as_a_sentence(lengths, seed, beam):
    generator = np.random.default_rng(seed)
    scenes = [
        (generator.normal(size=(num, WIDTH)), [(place, place + 1) for place in range(num - 1)], [0] * num)
        for num in lengths
    ]
    words, children, level = [], [], []
    for num in lengths:  # branching left
        words += [0] * num + [-1] * (num - 1)
        children += [[-1, -1]] * num + [[0 if at == 0 else num + at - 1, at + 1] for at in range(num - 1)]
        level += [0] * num + list(range(1, num))
    fields = {name: np.array(v, np.int32) for name, v in (("words", words), ("level", level))}
    fields["children"] = np.array(children, np.int32).reshape(-1, 2)
    forest = Ragged.of(fields, [2 * num - 1 for num in lengths]).collate(Tree(size=1), CPU)
    net, value = net_of(seed), laid(scenes)

    def join(left, right, brackets=None):
        p = torch.tanh(F.linear(torch.cat((left, right), -1), net.cells.weight, net.cells.bias))
        return p, (p * net.score.weight[0]).sum(-1)

    with torch.no_grad():
        leaves = torch.tanh(net.segments(value.features))
        chain = search(leaves, Brackets.of(forest), join, beam=beam)
        graph = search_scenes(leaves, Graph.of(value), join, beam=beam)
    assert graph.levels.ends == chain.levels.ends
    if beam == 1:
        assert torch.equal(graph.levels.children, chain.levels.children)
    for of_scene, of_sentence in zip(graph.brackets.tolist(), chain.brackets.tolist(), strict=True):
        nodes = {(min(node), max(node) + 1) for node in made(of_scene)}
        assert nodes == {(first, end) for first, end in of_sentence if first >= 0}


def test_right_nodes_and_what_is_counted_by_hand():
    # 0 - 1 - 2 - 3, classes a a b a: the last is an object of its own
    scene = (np.zeros((4, WIDTH)), [(0, 1), (1, 2), (2, 3)], [0, 0, 1, 0])
    assert [is_right(frozenset(s), scene) for s in ([0, 1], [1, 2], [2, 3], [0, 1, 2], [1, 2, 3])] == [
        *[True, False, True, True],
        False,
    ]
    value = laid([scene, (np.zeros((1, WIDTH)), [], [2])])
    batch = Batch({"input": value}, Place.of(2), lambda: None)
    objective = SceneParsingSpec().build(SIGNATURE)
    measured = objective.measure(Ordered("nearest"), batch)  # all are equally near: the first join is (0, 1)
    assert measured.outputs.right.tolist() == [[True, True, True], [False] * 3]
    assert measured.sums.tolist() == measured.counts.tolist() == [4]  # 2 x 2: without the whole
    evidence = SceneEvidence()
    evidence.add(batch, measured.outputs)
    assert evidence.tensors(lambda v: v, CPU)["steps"][:4].tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize("order", ["nearest", "random"])
def test_joins_that_nobody_has_learned_are_the_same_in_any_batch(order):
    source = ScenesSpec(rows=6).open()
    (part,) = source.pools["train"]
    rows, column = source.load(part)["input"], source.columns["input"].column
    together = Ordered(order)(rows.collate(column, CPU)).brackets
    for row in range(6):
        alone = Ordered(order)(rows.take(slice(row, row + 1)).collate(column, CPU)).brackets[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :] == -1).all()


def test_a_neighbour_that_is_not_there_is_refused():
    scene = (np.zeros((2, WIDTH), np.float32), [(0, 2)], [0, 1])
    with pytest.raises(UserError, match=r"data: a segment has the neighbour 2, but its scene has 2 segments"):
        laid([(np.zeros((3, WIDTH), np.float32), [(0, 1), (1, 2)], [0] * 3), scene])


def test_drawn_scenes_are_the_same_again_and_hang_together():
    one, other = (ScenesSpec(rows=50, seed=3).open() for _ in range(2))
    for scene, again in zip(one.scenes["train"], other.scenes["train"], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(scene, again, strict=True))
        edges = [(a, int(b)) for a, row in enumerate(scene.neighbours) for b in row if b >= 0]
        assert parts(len(scene.objects), edges)[0] == 1
        assert 7 <= len(scene.objects) <= 14
    assert not np.array_equal(
        one.scenes["train"][0].features[:7], ScenesSpec(rows=50).open().scenes["train"][0].features[:7]
    )
