"""The labelled parser: F1 of brackets with labels as evalb counts it, its loss by hand, a net that learns both."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import cluster
from cluster.data.layouts import Ragged as Stored
from cluster.data.prepare import prepared
from cluster.data.sources.flat_trees import of_brackets, spelled
from cluster.data.sources.treebank import laid
from cluster.inference.predict import predict_tree
from cluster.recipe.fit import check
from cluster.recipe.loading import load_recipe
from jobs.report.page import write_report
from nn_models import zoo
from nn_models.batch import Batch, Place, Ragged
from nn_models.columns import Label, Labels, Tree
from nn_models.errors import UserError
from nn_models.labelled_parser import LabelledParsingSpec
from nn_models.parser_objective import ParsingSpec, Shaped
from nn_models.signature import Signature

NUM_WORDS, NUM_LABELS = 9, 3
SIGNATURE = Signature(columns={"input": Tree(size=NUM_WORDS), "target": Labels(size=NUM_LABELS)})
WORD, LABEL = st.integers(0, NUM_WORDS - 1), st.integers(0, NUM_LABELS - 1)
TREE = st.recursive(
    st.builds("({} {})".format, LABEL, WORD),
    lambda below: st.builds("({} {} {})".format, LABEL, below, below),
    max_leaves=9,
)
CPU = torch.device("cpu")


def batch_of(trees) -> Batch:
    flat = [of_brackets(tree, labelled=True, where="") for tree in trees]
    stored: Stored = laid(flat, {str(word): word for word in range(NUM_WORDS)}, 2)
    forest = stored.collate(SIGNATURE["input"], CPU)
    labels = torch.tensor([int(label) for tree in flat for label in tree.labels], dtype=torch.int32)
    target = Ragged(labels, forest.lengths, int(forest.lengths.max()))
    return Batch({"input": forest, "target": target}, Place.of(len(trees)), lambda: None)


def net_of(seed: int):
    torch.manual_seed(seed)
    net = zoo.build({"kind": "labelled_parser", "hidden": 5, "embedding": 4}, SIGNATURE).double()
    with torch.no_grad():
        for weight in (net.cells.weight, net.score.weight, net.label.weight, net.embedding.weight):
            weight.uniform_(-2, 2)
    return net


def nodes(tree: str):
    """[(label, first word, behind the last, below)] of all nodes, children before parents."""
    flat, starts, found = of_brackets(tree, labelled=True, where=""), 0, []
    for label, below in zip(flat.labels, flat.children, strict=True):
        if below:
            found.append((int(label), found[below[0]][1], found[below[-1]][2], below))
        else:
            found.append((int(label), starts, starts + 1, ()))
            starts += 1
    return found


def said(net, tree: str, spans) -> list[int]:
    """The likeliest label of each of the joins at these spans, node by node."""
    words = [word for word in of_brackets(tree, labelled=True, where="").words if word is not None]
    states = {(at, at + 1): torch.tanh(net.words(net.embedding.weight[int(word)])) for at, word in enumerate(words)}
    labels = []
    for first, end in spans:
        middle = next(b for a, b in states if a == first and (b, end) in states)
        both = torch.cat((states.pop((first, middle)), states.pop((middle, end))))
        states[first, end] = torch.tanh(net.cells.weight @ both + net.cells.bias)
        labels.append(int(net.label(states[first, end]).argmax()))
    return labels


@settings(max_examples=40, deadline=None)
@given(trees=st.lists(TREE, min_size=1, max_size=5), seed=st.integers(0, 5))
def test_brackets_are_counted_as_evalb_does(trees, seed):
    """evalb: matched brackets are the common ones of two multisets of (label, first, end); F = 2 matched / (all)."""
    net, batch = net_of(seed).eval(), batch_of(trees)
    measured = LabelledParsingSpec().build(SIGNATURE).measure(net, batch)
    matched = every = 0
    for tree, brackets in zip(trees, measured.outputs.brackets.tolist(), strict=True):
        spans = [(first, end) for first, end in brackets if first >= 0]
        found = Counter(zip(said(net, tree, spans), *zip(*spans, strict=True), strict=True)) if spans else Counter()
        true = Counter((label, first, end) for label, first, end, below in nodes(tree) if below)
        matched += (found & true).total()
        every += found.total() + true.total()
    assert measured.sums[1].item() == 2 * matched
    assert measured.counts[1].item() == every


@settings(max_examples=20, deadline=None)
@given(trees=st.lists(TREE, min_size=1, max_size=4), seed=st.integers(0, 5), weight=st.sampled_from([0.0, 0.7]))
def test_the_loss_is_that_of_the_trees_and_of_the_labels(trees, seed, weight):
    net, batch = net_of(seed), batch_of(trees)
    plain = ParsingSpec().build(SIGNATURE).measure(net, batch)
    both = LabelledParsingSpec(weight=weight).build(SIGNATURE).measure(net, batch)
    entropy = torch.zeros(())
    for tree in trees:
        states = []
        for (label, _, _, below), word in zip(
            nodes(tree), of_brackets(tree, labelled=True, where="").words, strict=True
        ):
            if below:
                children = torch.cat([states[child] for child in below])
                states.append(torch.tanh(net.cells.weight @ children + net.cells.bias))
            else:
                states.append(torch.tanh(net.words(net.embedding.weight[int(word)])))
            entropy = entropy + F.cross_entropy(net.label(states[-1]), torch.tensor(label))
    # float64: the same sums in another order
    assert both.loss.item() == pytest.approx((plain.loss + weight * entropy).item(), abs=1e-10)
    assert both.sums[0] == plain.sums[0]
    mine = torch.autograd.grad(both.loss, net.label.weight, allow_unused=True)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(weight * entropy, net.label.weight)[0], atol=1e-10, rtol=0)


def test_trees_of_one_shape_have_no_label_that_is_right():
    batch = batch_of(["(1 (2 (0 1) (0 2)) (0 3))"])
    objective = LabelledParsingSpec().build(SIGNATURE)
    measured = objective.measure(Shaped("left"), batch)
    assert measured.sums.tolist() == [2, 0]
    assert measured.counts.tolist() == [2, 4]
    assert [metric.name for metric in objective.compared] == ["bracket_f1"]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("labelled_parsing", "objective.kind: labelled_parsing needs labels to predict, but listops has a label"),
        ("parsing", "objective.kind: parsing takes no model that gives labelled_tree, as labelled_parser does"),
    ],
)
def test_data_without_labels_of_nodes_are_refused(objective, message):
    recipe = load_recipe(
        {
            "data": {"kind": "listops", "rows": 60},
            "model": {"kind": "labelled_parser"},
            "objective": {"kind": objective},
        }
    )
    with pytest.raises(UserError) as caught:
        check(recipe, prepared(recipe.data).manifest)
    assert str(caught.value).startswith(message)


def test_a_net_for_labels_of_whole_trees_is_refused():
    roots = Signature(columns={"input": Tree(size=2), "target": Label(size=2)})
    with pytest.raises(UserError, match=r"model\.kind: labelled_parser learns the label of each node, but the data"):
        zoo.build({"kind": "labelled_parser"}, roots)


def test_a_run_finds_trees_with_labels(tmp_path):
    """A small grammar: S -> N V, N -> D A, V -> B N | C; what a word is tells all of it."""
    generator = np.random.default_rng(0)

    def noun() -> str:
        return f"(N (D {generator.choice(['the', 'a'])}) (A {generator.choice(['cat', 'dog', 'bird'])}))"

    def sentence() -> str:
        verb = f"(V (B {generator.choice(['sees', 'hears'])}) {noun()})" if generator.random() < 0.6 else "(C sleeps)"
        return f"(S {noun()} {verb})"

    (tmp_path / "trees.txt").write_text("".join(f"{sentence()}\n" for _ in range(300)))
    run = cluster.train(
        {
            "model": {"kind": "labelled_parser", "hidden": 12, "embedding": 8},
            "data": {"kind": "trees", "path": str(tmp_path / "trees.txt")},
            "objective": {"kind": "labelled_parsing"},
            "optimizer": {"kind": "adam", "lr": 0.02},
            "train": {"epochs": 6, "global_batch_size": 16},
        },
        run=str(tmp_path / "run"),
    )
    metrics = run.metrics
    assert metrics["test/labelled_bracket_f1"] == metrics["test/bracket_f1"] == 1
    assert metrics["test/left_bracket_f1"] < 0.7
    assert "test/left_labelled_bracket_f1" not in metrics
    found = predict_tree(run.run, "the bird hears a dog")
    text = "(S (N (D the) (A bird)) (V (B hears) (N (D a) (A dog))))"
    assert spelled(found.tree.words, found.tree.children, found.labels) == text
    assert cluster.open_model(run.run).predict(["the bird hears a dog"]) == [text]
    write_report(run.run)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the parser, with labels" in page
    assert "with labels these count too, as evalb has it" in page
