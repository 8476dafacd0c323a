"""Trained nets on other trees than their own: read with the run's words, labels by name, whatever else there is."""

from pathlib import Path

import pytest

from cluster.data.sources.trees import TreesSpec
from cluster.inference.evaluate import evaluate_run
from cluster.recipe.loading import load_recipe
from cluster.runs.train import train
from nn_models.errors import UserError

TRAIN = ("(good (ok a) (good nice))", "(bad (bad not) (good nice))", "(ok (ok a) (ok film))", "(bad poor)")
TEST = ("(good (ok the) (good nice))", "(bad (bad not) (good (ok a) (good nice)))", "(ok film)")
WHOLE = {"validation_fraction": 0.0, "test_fraction": 0.0}


def run_of(folder: Path, model: dict, objective: str = "node_labels", train_trees=TRAIN) -> str:
    folder.mkdir()
    for name, trees in (("train", train_trees), ("test", TEST)):
        (folder / f"{name}.txt").write_text("".join(f"{tree}\n" for tree in trees) * 8)
    described = {
        "model": {"hidden": 5, "embedding": 4, **model},
        "data": {"kind": "trees", "path": str(folder / "train.txt"), "test_path": str(folder / "test.txt")},
        "objective": {"kind": objective},
        "optimizer": {"kind": "adagrad", "lr": 0.2},
        "train": {"epochs": 3, "global_batch_size": 8},
    }
    return train(load_recipe(described), num_workers=0, run=str(folder / "run")).run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    return {
        "binary": run_of(folder / "binary", {"kind": "tree_lstm"}),
        "any": run_of(folder / "any", {"kind": "child_sum_tree_lstm"}),
        "parser": run_of(folder / "parser", {"kind": "parser"}, "parsing"),
    }


def figures(run: str, folder: Path, *trees: str) -> dict[str, float]:
    """Of a run on files of these trees, all of them at once."""
    path = folder / "trees.txt"
    path.write_text("".join(f"{tree}\n" for tree in trees))
    found = evaluate_run(run, data=TreesSpec(path=str(path), **WHOLE), split="train")
    assert found["rows"] == len(trees)
    return {name.removeprefix("train/"): value for name, value in found["metrics"].items()}


def test_its_own_test_trees_alone_give_the_same_figures(runs, tmp_path):
    """Among themselves their words and labels have other numbers than the run's."""
    own = {name.removeprefix("test/"): value for name, value in evaluate_run(runs["binary"])["metrics"].items()}
    found = figures(runs["binary"], tmp_path, *TEST * 8)
    assert found == pytest.approx({name: own[name] for name in found}, abs=1e-6)  # float32: the same sums, in one step
    assert {"loss", "accuracy", "root_accuracy"} <= found.keys()


def test_unknown_words_are_one_and_counted(runs, tmp_path, caplog):
    caplog.set_level("INFO")
    one = figures(runs["binary"], tmp_path, "(good (ok quite) (good nice))", "(bad (bad never) (ok film))")
    assert "2 of 4 tokens (50 %) of input in train are not in the vocabulary of 5" in caplog.text
    other = figures(runs["binary"], tmp_path, "(good (ok never) (good nice))", "(bad (bad tree\u00a0house) (ok film))")
    assert one == other
    known = figures(runs["binary"], tmp_path, "(good (ok a) (good nice))", "(bad (bad not) (ok film))")
    assert known["loss"] != one["loss"]


def test_labels_are_read_by_name(runs, tmp_path):
    one, other = (figures(runs["binary"], tmp_path, tree) for tree in ("(bad poor)", "(good poor)"))
    both = figures(runs["binary"], tmp_path, "(bad poor)", "(good poor)")
    assert both["loss"] == pytest.approx((one["loss"] + other["loss"]) / 2, rel=1e-6)  # float32
    with pytest.raises(UserError) as caught:
        figures(runs["binary"], tmp_path, "(good nice)", "(fine (good nice) (ok film))")
    message = f"{tmp_path}/trees.txt, line 2: the label 'fine' is none of bad, good, ok"
    assert str(caught.value).startswith(message)


def test_nodes_of_more_children_than_in_training(runs, tmp_path):
    wide = "(good (ok a) (good nice) (ok film) (bad not))"
    one, other = figures(runs["any"], tmp_path, wide), figures(runs["any"], tmp_path, TEST[0])
    both = figures(runs["any"], tmp_path, wide, TEST[0])
    assert both["root_accuracy"] == pytest.approx((one["root_accuracy"] + other["root_accuracy"]) / 2)
    assert both["loss"] == pytest.approx((5 * one["loss"] + 3 * other["loss"]) / 8, rel=1e-6)  # float32
    with pytest.raises(UserError, match=r"--data: the model of .* cannot read it: tree_lstm reads binary trees"):
        figures(runs["binary"], tmp_path, wide)


def test_labels_that_a_parser_does_not_read_may_be_any(runs, tmp_path):
    trees = ("(S (D the) (N (A nice) (N film)))", "(S (V (V is) (N it)) (A poor))")
    renamed = tuple(tree.replace("(N", "(X").replace("(A", "(Y") for tree in trees)
    assert figures(runs["parser"], tmp_path, *trees) == figures(runs["parser"], tmp_path, *renamed)


def test_labels_of_whole_trees_are_none_of_nodes(runs, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"tree": "(a film)", "y": "good"}\n{"tree": "(a nice)", "y": "bad"}\n')
    with pytest.raises(UserError, match=r"--data: the rows of trees are tree over 5 words with 3 label outputs, but"):
        evaluate_run(runs["binary"], data=TreesSpec(path=str(tmp_path), target="y", **WHOLE), split="train")
