"""ListOps: what expressions come to, their three forms, and what is drawn."""

import json
import statistics

import numpy as np
import pytest

from cluster.data.prepare import prepared
from cluster.data.sources.flat_trees import spelled
from cluster.data.sources.listops import (
    WORDS,
    ListOpsSpec,
    binary_tree,
    nary_tree,
    tokens,
    value,
)
from nn_models.errors import UserError
from nn_models.spec import validate
from tests.unit import made

EXPRESSION = (("[MAX", 3), ("2", 0), ("[SM", 2), ("9", 0), ("4", 0), ("0", 0))
SMALL = {"rows": 300, "depth": 3, "length": 20}


def python_value(text: str) -> int:
    """By Python's own lists, functions and evaluation."""
    source = text.replace("[MAX ", "max([").replace("[MIN ", "min([")
    source = source.replace("[MED ", "median([").replace("[SM ", "total([").replace(" ]", "])").replace(" ", ", ")
    functions = {"max": max, "min": min, "median": lambda x: int(np.median(x)), "total": lambda x: sum(x) % 10}
    return eval(source, functions)  # of what was generated here


def drawn(**fields):
    return ListOpsSpec(**{**SMALL, **fields}).open().expressions


def test_an_expression_in_its_three_forms():
    assert " ".join(tokens(EXPRESSION)) == "[MAX 2 [SM 9 4 ] 0 ]"
    assert value(EXPRESSION) == 3
    binary, nary = binary_tree(EXPRESSION), nary_tree(EXPRESSION)
    assert spelled(binary.words, binary.children) == "(((([MAX 2) ((([SM 9) 4) ])) 0) ])"
    assert nary.words == ["2", "9", "4", "[SM", "0", "[MAX"]
    assert nary.children[-1] == (0, 3, 4)
    assert nary.children[3] == (1, 2)
    assert nary.labels == ["2", "9", "4", "3", "0", "3"]
    assert [label for label, word in zip(binary.labels, binary.words, strict=True) if word is None] == list("2933333")
    assert [word for word in binary.words if word] == tokens(EXPRESSION)  # from left to right


def test_values_are_pythons():
    for expression in drawn():
        assert value(expression) == python_value(" ".join(tokens(expression)))
    assert statistics.median([1, 4]) == 2.5  # rounded down, as by int


def test_what_is_drawn_keeps_to_its_bounds_and_comes_once():
    expressions = drawn()
    written = [tokens(expression) for expression in expressions]
    assert len({" ".join(text) for text in written}) == 300
    assert max(map(len, written)) <= 20
    depths = [max(np.cumsum([(token[0] == "[") - (token == "]") for token in text])) for text in written]
    assert (min(depths), max(depths)) == (1, 3)
    arguments = [count for expression in expressions for _, count in expression if count]
    assert (min(arguments), max(arguments)) == (2, 5)
    assert drawn() == expressions
    assert drawn(seed=1) != expressions


@pytest.mark.parametrize("form", ["binary", "nary", "tokens"])
def test_forms_hold_the_same_expressions_and_values(form):
    data = prepared(ListOpsSpec(form=form, **SMALL))
    column = data.manifest.signature["input"]
    assert column.names == WORDS
    expressions = {json.dumps(tokens(expression)): value(expression) for expression in drawn()}
    found = {}
    for split in ("train", "validation", "test"):
        rows = made.split_rows(data, split).columns
        fields, offsets, labels = rows["input"].fields, rows["input"].offsets, rows["target"].values
        for first, end, label in zip(offsets[:-1], offsets[1:], labels.tolist(), strict=True):
            numbers = fields["words" if form != "tokens" else "values"][first:end].tolist()
            words = [WORDS[number] if number >= 0 else None for number in numbers]
            if form != "tokens":
                words = in_order(words, fields["children"][first:end].tolist(), nary=form == "nary")
            found[json.dumps(words)] = label
    assert found == expressions


def in_order(words, children, *, nary: bool):
    """The words of a tree as they are written."""

    def below(node):
        kids = [word for child in children[node] if child >= 0 for word in below(child)]
        own = [] if words[node] is None else [words[node]]
        return [*own, *kids, *(["]"] if nary and kids else [])]

    return below(len(words) - 1)


def test_the_same_rows_are_tested_whatever_the_form():
    splits = []
    for form in ("binary", "tokens"):
        data = prepared(ListOpsSpec(form=form, **SMALL))
        splits.append(
            [made.split_rows(data, split).columns["target"].values.tolist() for split in data.manifest.splits]
        )
    assert splits[0] == splits[1]


@pytest.mark.parametrize(("form", "classes"), [("binary", 11), ("nary", 10)])
def test_nodes_can_have_values_too(form, classes):
    data = prepared(ListOpsSpec(form=form, labels="nodes", **SMALL))
    roots = prepared(ListOpsSpec(form=form, **SMALL))
    assert data.manifest.signature.num_outputs == classes
    for split in ("train", "validation", "test"):
        target = made.split_rows(data, split).columns["target"]
        assert target.fields["values"][target.offsets[1:] - 1].tolist() == (
            made.split_rows(roots, split).columns["target"].values.tolist()
        )
    with pytest.raises(UserError, match="labels: tokens have no nodes; set labels to root"):
        validate(ListOpsSpec, {"kind": "listops", "form": "tokens", "labels": "nodes"}, prefix="data")


def test_more_than_there_are_is_refused():
    with pytest.raises(
        UserError, match=r"data.rows: 5,000, but of depth 1 and length 4 only 400 were found; lower rows"
    ):
        ListOpsSpec(rows=5000, depth=1, length=4, max_arguments=2).open()
    with pytest.raises(UserError, match="max_arguments: 5 and two brackets are more than length"):
        validate(ListOpsSpec, {"kind": "listops", "length": 6}, prefix="data")
