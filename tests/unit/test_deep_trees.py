"""Trees deeper than Python's recursion limit, all the way: prepared, trained on, reported, predicted."""

import json
import sys
from pathlib import Path

import pytest

from cluster.inference.evaluate import evaluate_run
from cluster.inference.predict import predict_tree
from cluster.recipe.loading import load_recipe
from cluster.runs.train import train
from jobs.commands.trees import tree_json, tree_lines
from jobs.report.page import write_report
from nn_models.errors import UserError
from tests.unit.test_report_of_sequences import LOST

DEPTH = sys.getrecursionlimit() + 200
LEFT = "(1 " * DEPTH + "(0 a)" + " (1 b))" * DEPTH
RIGHT = "(0 (0 b) " * DEPTH + "(1 a)" + ")" * DEPTH
ONE_CHILD = "(0 " * DEPTH + "(0 a)" + ")" * DEPTH


def run_of(folder: Path, model: str, *trees: str) -> str:
    for name in ("train", "test"):
        (folder / f"{name}.txt").write_text("".join(f"{tree}\n" for tree in trees))
    paths = {"path": str(folder / "train.txt"), "test_path": str(folder / "test.txt"), "validation_fraction": 0.0}
    described = {
        "model": {"kind": model, "hidden": 3},
        "data": {"kind": "trees", **paths},
        "objective": {"kind": "parsing" if model == "parser" else "node_labels"},
        "train": {"epochs": 1, "global_batch_size": 2},
    }
    outcome = train(load_recipe(described), num_workers=0, run=str(folder / "run"))
    write_report(outcome.run)
    assert LOST not in (folder / "run" / "report.html").read_text()
    assert evaluate_run(outcome.run)["metrics"]["test/loss"] == pytest.approx(outcome.metrics["test/loss"], rel=1e-5)
    return outcome.run


@pytest.mark.parametrize(("model", "deep"), [("tree_lstm", LEFT), ("rntn", RIGHT), ("child_sum_tree_lstm", ONE_CHILD)])
def test_nodes_of_deep_trees_have_labels(tmp_path, model, deep):
    run = run_of(tmp_path, model, deep, "(1 (0 a) (1 b))", "(0 b)")
    found = predict_tree(run, LEFT)
    assert len(found.labels) == len(found.tree.words) == 2 * DEPTH + 1
    assert set(found.labels) <= {"0", "1"}
    lines = list(tree_lines(found))
    assert len(lines) == len(found.labels)
    assert json.loads(json.dumps(tree_json(found)))["labels"] == found.labels


def test_a_deep_tree_is_learned_to_be_found(tmp_path):
    run = run_of(tmp_path, "parser", LEFT, "(1 (0 a) (1 b))", "(1 (1 (0 a) (1 b)) (0 a))")
    words = ["a", *["b"] * DEPTH]
    found = predict_tree(run, " ".join(words))
    assert [word for word in found.tree.words if word] == words


def test_a_bracket_that_a_deep_tree_lacks_is_named(tmp_path):
    with pytest.raises(UserError, match=r"train\.txt, line 1, column 1: a bracket is opened and not closed"):
        run_of(tmp_path, "tree_lstm", LEFT[:-1])
