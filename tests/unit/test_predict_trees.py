"""Trees that are given to trained models, in brackets or as sentences: what is said of each node, what is refused."""

import logging

import pytest
import torch

import cluster
from cluster.data.sources.flat_trees import of_joins, spelled
from cluster.inference.predict import predict_tree
from cluster.runs.given_trees import read_tree
from jobs.commands.trees import tree_json, tree_lines
from nn_models.errors import UserError

FEW = {"epochs": 1, "global_batch_size": 16}
LISTOPS = {"kind": "listops", "rows": 60, "depth": 2, "length": 12}
MAX_2_9 = "((([MAX 2) 9) ])"


def trained(folder, **recipe) -> str:
    return cluster.train({"train": FEW, "optimizer": {"kind": "adam", "lr": 1e-2}, **recipe}, run=str(folder)).run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    net = {"kind": "tree_lstm", "hidden": 5, "embedding": 4}
    nodes = {"data": {**LISTOPS, "labels": "nodes"}, "objective": {"kind": "node_labels"}}
    return {
        "nodes": trained(folder / "nodes", model=net, **nodes),
        "root": trained(folder / "root", model=net, data=LISTOPS),
        "nary": trained(
            folder / "nary",
            model={**net, "kind": "child_sum_tree_lstm"},
            data={**LISTOPS, "form": "nary"},
        ),
        "parser": trained(
            folder / "parser",
            model={"kind": "parser", "hidden": 16, "embedding": 8},
            data={**LISTOPS, "rows": 400},
            objective={"kind": "parsing"},
            train={"epochs": 6, "global_batch_size": 16},
        ),
        "digits": trained(folder / "digits", model={"kind": "mlp", "hidden": [4]}, data={"kind": "digits"}),
    }


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("((It works) .)", "((It works) .)"),
        ("(3 (2 It) (4 (2 's) (4 great)))", "(It ('s great))"),  # numbers are labels of the treebank
        ("((2 3) 4)", "((2 3) 4)"),
        ("(2 (3 4))", "(2 (3 4))"),
        ("(2 3)", "(2 3)"),
        ("film", "film"),
        (" (a\n(b c)) ", "(a (b c))"),
        ("(a\N{NO-BREAK SPACE}b c)", "(a\N{NO-BREAK SPACE}b c)"),
    ],
)
def test_brackets_with_and_without_labels(text, tree):
    found = read_tree(text, path="--text")
    assert spelled(found.words, found.children) == tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("((a b)", "--text, column 1: a bracket is opened and not closed; write a tree such as ((It works) .)"),
        ("(a b))", "--text, column 6: ')' after the end of the tree; write a tree such as"),
        ("", "--text, column 1: an empty tree; write a tree such as"),
        ("()", "--text, column 1: a node without a word or children; write a tree such as"),
    ],
)
def test_what_is_no_tree_is_refused(text, message):
    with pytest.raises(UserError) as caught:
        read_tree(text, path="--text")
    assert str(caught.value).startswith(message)


def test_each_node_has_its_class_and_confidence(runs):
    found = predict_tree(runs["nodes"], MAX_2_9)
    model = cluster.open_model(runs["nodes"])
    assert found.labels == model.predict([MAX_2_9])
    scores = model([MAX_2_9]).softmax(1).max(1).values
    assert found.confidences == pytest.approx(scores.tolist())
    lines = list(tree_lines(found))
    assert len(lines) == 7
    assert lines[-1].startswith("\u2514\u2500 ")
    assert lines[-1].endswith("  ]")
    assert lines[3].startswith("\u2502  \u2502  \u251c\u2500 ")
    assert lines[3].endswith(" %  [MAX")
    assert tree_json(found)["tree"] == MAX_2_9
    # two trees at once: their nodes one after the other
    assert len(model.predict([MAX_2_9, "2"])) == 8


def test_where_only_roots_were_learned_the_root_alone_has_a_class(runs):
    found = predict_tree(runs["root"], MAX_2_9)
    assert found.labels[:-1] == [None] * 6
    assert found.labels[-1] in "0123456789"
    assert [found.labels[-1]] == cluster.open_model(runs["root"]).predict([MAX_2_9])
    assert list(tree_lines(found))[1] == "\u251c\u2500 \u2022"


def test_a_parser_finds_the_tree_of_a_sentence(runs):
    sentence = "[MAX 2 [MIN 4 7 ] ]"
    tree = cluster.open_model(runs["parser"]).parse(sentence)
    assert [word for word in tree.words if word] == sentence.split()
    model = cluster.open_model(runs["parser"])
    assert model.predict([sentence, "2 3"]) == [spelled(tree.words, tree.children), "(2 3)"]
    assert model([tree, "(2 3)"]).brackets.shape == (2, 6, 2)
    alone = predict_tree(runs["parser"], sentence)
    assert alone.tree == tree
    assert set(alone.labels) == {None}
    given = predict_tree(runs["nodes"], sentence, parser=runs["parser"])
    assert given.tree == tree
    assert None not in given.labels
    assert predict_tree(runs["parser"], "(([MAX 2) ([MIN (4 (7 (] ])))))").tree == tree  # it does without brackets
    assert len(predict_tree(runs["parser"], "2").tree.words) == 1
    assert predict_tree(runs["parser"], "2\N{NO-BREAK SPACE}3 4\n").tree.words == ["2\N{NO-BREAK SPACE}3", "4", None]
    assert predict_tree(runs["nodes"], "2\N{NO-BREAK SPACE}3").tree.words == [
        "2\N{NO-BREAK SPACE}3"
    ]  # one word, a tree


def test_words_that_the_model_does_not_know_are_told(runs, caplog):
    caplog.set_level(logging.WARNING)
    model = cluster.open_model(runs["nodes"])
    unknown = model(["(2 eleven)"])
    assert "input: 1 words are not in the vocabulary: 'eleven'" in caplog.text
    assert torch.equal(unknown, model(["(2 twelve)"]))


@pytest.mark.parametrize(
    ("run", "text", "parser", "message"),
    [
        ("nodes", "[MAX 2 9 ]", None, "--text: a sentence, where the model reads trees; put it in brackets, such as"),
        ("nodes", " ", None, "--text: no words; put it in brackets"),
        ("nodes", "[MAX 2 9 ]", "root", "--parser: {root} has a tree_lstm, which parses nothing; give a parser's"),
        ("nodes", "(2 3)", "parser", "--parser: the text is a tree already; leave it out, or the brackets"),
        ("nodes", "(2 3 4)", None, "input: a node of 3 children, where the model has learned from trees of at most 2"),
        ("nodes", "((2 3)", None, "--text, column 1: a bracket is opened and not closed"),
        ("nary", "(2 3)", None, "input: the model reads a word at every node, and brackets have them at the leaves"),
        ("parser", "2 3", "parser", "--parser: {parser} is a parser itself; leave it out"),
        ("parser", " ", None, "--text: no words; give a sentence"),
        ("digits", "(2 3)", None, "{digits}: its model predicts no classes of trees (input: image 1 x 8 x 8); give"),
    ],
)
def test_what_does_not_fit_is_refused(runs, run, text, parser, message):
    with pytest.raises(UserError) as caught:
        predict_tree(runs[run], text, parser=parser and runs[parser])
    assert str(caught.value).startswith(message.format(**runs))


def test_a_tree_deeper_than_pythons_stack():
    deep = of_joins(["a"] * 3000, [(0, end) for end in range(2, 3001)])
    text = spelled(deep.words, deep.children)
    found = read_tree(text, path="--text")
    assert spelled(found.words, found.children) == text
