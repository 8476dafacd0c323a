"""Runs on trees and scenes: equal for any number of ranks, resumed bit for bit; figures, evidence, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cluster.data.layouts import Ragged
from cluster.data.manifest import Manifest, Shard, StoredColumn
from cluster.data.prepare import prepared
from cluster.recipe.fit import check
from cluster.recipe.loading import load_recipe
from cluster.runs.train import train
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints
from nn_models import zoo
from nn_models.batch import Batch, Forest, Place
from nn_models.classification import ClassificationSpec
from nn_models.columns import Label, Labels, Tokens, Tree
from nn_models.errors import UserError
from nn_models.signature import Signature
from nn_models.tree_objectives import NodeLabelsSpec
from tests.unit import made

TREES = Signature(columns={"input": Tree(size=9, known=6), "target": Labels(size=5)})


def forest(seed: int = 0, rows: int = 6):
    """Random trees, their labels, and how many nodes each has."""
    generator = np.random.default_rng(seed)
    leaves = generator.integers(1, 7, rows)
    fields = made.trees(leaves, generator)
    fields["words"] = np.where(fields["words"] < 0, -1, fields["words"] % 9).astype(np.int32)
    column = TREES["input"]
    laid = Ragged.of(fields, 2 * leaves - 1).collate(column, torch.device("cpu"))
    labels = torch.from_numpy(generator.integers(0, 5, int((2 * leaves - 1).sum())).astype(np.int32))
    from nn_models.batch import Ragged as Elements

    return laid, Elements(labels, laid.lengths, int(laid.lengths.max())), 2 * leaves - 1


def batch_of(trees: Forest, labels) -> Batch:
    place = Place.of(len(trees.lengths))
    return Batch({"input": trees, "target": labels}, place, lambda: None, stored={"input": trees})


# -- the objective -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poles", [None, ((0, 1), (3, 4)), ((4,), (2, 0))])
def test_accuracies_of_nodes_roots_and_poles(poles):
    torch.manual_seed(0)
    net = zoo.build({"kind": "rntn", "hidden": 4}, TREES)
    trees, labels, sizes = forest(rows=40)
    objective = NodeLabelsSpec(poles=poles).build(TREES)
    measured = objective.measure(net, batch_of(trees, labels))
    outputs = net(trees)
    assert measured.loss.item() == pytest.approx(F.cross_entropy(outputs, labels.values.long(), reduction="sum").item())
    probabilities, true = outputs.softmax(1).detach().numpy(), labels.values.numpy()
    right = probabilities.argmax(1) == true
    roots = np.cumsum(sizes) - 1
    sums, counts = [right.sum(), right[roots].sum()], [len(right), 40]
    if poles:
        said = probabilities[roots][:, list(poles[1])].sum(1) > probabilities[roots][:, list(poles[0])].sum(1)
        meant = [(label in poles[0], label in poles[1]) for label in true[roots]]
        sums.append(sum(high if says else low for says, (low, high) in zip(said, meant, strict=True)))
        counts.append(sum(low or high for low, high in meant))
    assert measured.sums.tolist() == sums
    assert measured.counts.tolist() == counts
    assert len(objective.metrics) == len(sums)


def test_evidence_is_the_same_in_parts_and_counts_unknown_words():
    torch.manual_seed(0)
    net = zoo.build({"kind": "recursive", "hidden": 4}, TREES)
    objective = NodeLabelsSpec().build(TREES)
    whole = objective.evidence(TREES)
    parts = [forest(seed, rows=30) for seed in range(2)]
    right = words = unknown = 0
    for number, (trees, labels, _) in enumerate(parts):
        batch = batch_of(trees, labels)
        batch = Batch(batch.columns, batch.place._replace(ids=batch.place.ids + 30 * number), batch.draw_keys)
        outputs = objective.measure(net, batch).outputs
        whole.add(batch, outputs)
        right += int((outputs.argmax(1) == labels.values).sum())
        words += int((trees.words >= 0).sum())
        unknown += int((trees.words >= 6).sum())
    found = whole.tensors(lambda values: values, torch.device("cpu"))
    assert found["words"].tolist() == [unknown, words]
    assert found["confusion"].diagonal().sum() == right == found["heights"][:, 0].sum()
    assert found["confusion"].sum() == found["heights"][:, 1].sum() == sum(sizes.sum() for *_, sizes in parts)
    assert found["root_confusion"].sum() == 60
    lengths = found["example_inputs.lengths"]
    for name in ("targets", "predictions", "confidences"):
        assert torch.equal(found[f"example_{name}.lengths"], lengths)
        assert len(found[f"example_{name}.values"]) == lengths.sum()
    # trees as they are stored: with these a net says the same again
    fields = {name: found[f"example_inputs.{name}"] for name in ("words", "children", "level")}
    again = net(Forest.of(*fields.values(), lengths))
    assert torch.equal(again.argmax(1), found["example_predictions.values"])
    roots = lengths.cumsum(0) - 1
    is_right = found["example_predictions.values"][roots] == found["example_targets.values"][roots]
    assert is_right.tolist() == sorted(is_right.tolist(), reverse=True)  # the right ones first
    assert 0 < is_right.sum() < len(roots)


@pytest.mark.parametrize("kind", ["recursive", "rntn", "tree_lstm", "child_sum_tree_lstm"])
def test_half_precision_is_for_the_products_beside_the_recursion(kind):
    torch.manual_seed(0)
    net = zoo.build({"kind": kind, "hidden": 4}, TREES)
    trees, *_ = forest(rows=9)
    exact = net(trees)
    with torch.autocast("cpu", torch.bfloat16):
        said = net(trees)
    assert said.dtype == torch.bfloat16
    torch.testing.assert_close(said.float(), exact, atol=0.05, rtol=0.05)  # eight bits of mantissa
    said.float().sum().backward()
    assert {weight.grad.dtype for weight in net.parameters()} == {torch.float32}


# -- runs ----------------------------------------------------------------------------------------------------------

SENTENCES = (
    "(3 (2 It) (4 (2 's) (4 great)))",
    "(1 (2 (2 It) (2 's)) (0 (1 not) (3 great)))",
    "(2 film)",
    "(0 (0 bad) (2 film))",
)
LISTOPS = {
    "model": {"kind": "child_sum_tree_lstm", "hidden": 6, "embedding": 5},
    "data": {"kind": "listops", "form": "nary", "rows": 120, "depth": 3, "length": 20},
    "optimizer": {"kind": "adagrad", "lr": 0.1},
    "train": {"epochs": 2, "global_batch_size": 16, "log_every_steps": 1, "checkpoint_every_steps": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Undisturbed for 0, 1 and 2 ranks; killed in mid-epoch and resumed on as many, and on others."""
    folder = tmp_path_factory.mktemp("runs")
    lines = [f"{SENTENCES[number % 4]}\n" for number in range(50)]
    for name in ("train", "dev", "test"):
        (folder / f"{name}.txt").write_text("".join(lines if name == "train" else lines[:9]))
    sst = {
        "model": {"kind": "tree_lstm", "hidden": 6, "embedding": 5, "dropout": 0.1},
        "data": {"kind": "sst", "path": str(folder)},
        "objective": {"kind": "node_labels", "poles": [[0, 1], [3, 4]]},
        "optimizer": {"kind": "adagrad", "lr": 0.1},
        "train": {**LISTOPS["train"], "clip_norm": 1.0},
    }
    parser = {
        **LISTOPS,
        "model": {"kind": "parser", "hidden": 6, "embedding": 5, "dropout": 0.1},
        "data": {**LISTOPS["data"], "form": "binary"},
        "objective": {"kind": "parsing"},
    }
    plain_parser = {**parser, "model": {**parser["model"], "dropout": 0.0}}
    scenes = {
        **LISTOPS,
        "model": {"kind": "scene_parser", "hidden": 6},
        "data": {"kind": "scenes", "rows": 120, "segments": 7},
        "objective": {"kind": "scene_parsing"},
    }
    beam = {**scenes, "model": {**scenes["model"], "beam": 3, "train_beam": 2}}
    beam["objective"] = {**scenes["objective"], "over": "trees"}
    labelled = {**sst, "model": {"kind": "labelled_parser", "hidden": 6}, "objective": {"kind": "labelled_parsing"}}
    without = {**sst, "model": {**sst["model"], "dropout": 0.0}}
    jobs = []
    for name, recipe, *worlds in (
        ("nodes 0", without, 0),
        ("nodes 1", without, 1),
        ("nodes 2", without, 2),
        ("nodes 2 then 0", without, 2, 0),
        ("dropped 0", sst, 0),
        ("dropped 0 again", sst, 0, 0),
        ("dropped 2", sst, 2),
        ("dropped 2 again", sst, 2, 2),
        ("roots 0", LISTOPS, 0),
        ("roots 1", LISTOPS, 1),
        ("roots 2", LISTOPS, 2),
        ("roots 2 again", LISTOPS, 2, 2),
        ("parser 0", plain_parser, 0),
        ("parser 2", plain_parser, 2),
        ("joins 2", parser, 2),
        ("joins 2 again", parser, 2, 2),
        ("labelled 0", labelled, 0),
        ("labelled 2", labelled, 2),
        ("labelled 2 again", labelled, 2, 2),
        ("scenes 0", scenes, 0),
        ("scenes 0 again", scenes, 0, 0),
        ("scenes 1", scenes, 1),
        ("scenes 2", scenes, 2),
        ("scenes 2 then 0", scenes, 2, 0),
        ("beam 0", beam, 0),
        ("beam 2", beam, 2),
        ("beam 2 again", beam, 2, 2),
    ):
        for turn, world in enumerate(worlds):
            dies = {"dies_at": 5} if turn + 1 < len(worlds) else {}
            jobs.append({"recipe": recipe, "run": str(folder / name), "world_size": world, **dies})
    line = [sys.executable, "-m", "tests.unit.ranks", json.dumps(jobs)]
    output = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout
    codes = json.loads(output.splitlines()[-1])
    assert [set(found) for found in codes] == [{9} if "dies_at" in job else {0} for job in jobs]
    return folder


def lines_of(path: Path, split: str):
    found = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["split"] == split]


def figures(path: Path, split: str) -> np.ndarray:
    names = ("loss", "accuracy", "root_accuracy", "binary_accuracy", "bracket_f1", "labelled_bracket_f1")
    return np.array([[line[name] for name in names if name in line] for line in lines_of(path, split)])


def digests(path: Path):
    return [line["rows_digest"] for line in lines_of(path, "train") if "rows_digest" in line]


def weights(path: Path):
    return Checkpoints(Folder(path / "checkpoints"), keep=1).newest()["model"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("nodes 0", "nodes 1"),
        ("nodes 0", "nodes 2"),
        ("nodes 0", "nodes 2 then 0"),
        ("roots 0", "roots 1"),
        ("roots 0", "roots 2"),
        ("parser 0", "parser 2"),
        ("labelled 0", "labelled 2"),
        ("scenes 0", "scenes 1"),
        ("scenes 0", "scenes 2"),
        ("scenes 0", "scenes 2 then 0"),
        ("beam 0", "beam 2"),
    ],
)
def test_any_number_of_ranks_sees_the_same_rows_and_comes_to_the_same(runs, one, other):
    assert digests(runs / one) == digests(runs / other)
    assert len(digests(runs / one)) == 2
    for split in ("train", "validation", "test"):
        # float32 sums in another order, under Adagrad, whose first steps hang on a gradient's sign
        np.testing.assert_allclose(figures(runs / other, split), figures(runs / one, split), rtol=2e-3)


@pytest.mark.parametrize("name", ["dropped 0", "dropped 2", "roots 2", "joins 2", "labelled 2", "scenes 0", "beam 2"])
def test_killed_in_mid_epoch_it_ends_bit_for_bit_the_same(runs, name):
    whole, again = runs / name, runs / f"{name} again"
    assert digests(whole) == digests(again)
    for split in ("train", "validation", "test"):
        assert np.array_equal(figures(whole, split), figures(again, split))
    mine, other = weights(whole), weights(again)
    assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.slow
def test_listops_from_trees_and_flat(tmp_path):
    """The recipe's Tree-LSTM gets 97 % or more of whole expressions right, of which a flat LSTM gets about 60 %."""
    found = train(load_recipe("listops-tree-lstm"), num_workers=0, run=str(tmp_path / "tree"))
    assert found.metrics["test/root_accuracy"] >= 0.97
    flat = load_recipe(
        "listops-tree-lstm",
        overrides={
            "model": {"kind": "lstm", "hidden": 128, "embedding": 50},
            "data": {"kind": "listops", "form": "tokens"},
            "objective": {"kind": "classification"},
        },
    )
    assert train(flat, num_workers=0, run=str(tmp_path / "flat")).metrics["test/accuracy"] < 0.7


@pytest.mark.slow
def test_listops_trees_are_found(tmp_path):
    """The recipe's parser finds nearly all brackets; trees of one shape have a quarter of them, and less."""
    found = train(load_recipe("listops-parser"), num_workers=0, run=str(tmp_path / "run")).metrics
    assert found["test/bracket_f1"] >= 0.99
    assert max(found[f"test/{shape}_bracket_f1"] for shape in ("left", "right", "balanced")) < 0.4


# -- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "columns", "message"),
    [
        ({"model": {"kind": "tree_lstm"}}, {"input": Tree(size=9, arity=3), "target": Label(size=2)},
         "model.kind: tree_lstm reads binary trees, but nodes have up to 3 children; set model.kind to child_sum"),
        ({"model": {"kind": "rntn"}}, {"input": Tree(size=9, words_at="nodes"), "target": Label(size=2)},
         "model.kind: rntn reads words at the leaves, but other nodes have some too; set model.kind to child_sum"),
        ({"model": {"kind": "parser"}, "objective": {"kind": "parsing"}},
         {"input": Tree(size=9, arity=3), "target": Label(size=2)},
         "model.kind: parser learns from binary trees with words at the leaves, but nodes have up to 3 children"),
        ({"model": {"kind": "parser"}, "objective": {"kind": "parsing"}},
         {"input": Tree(size=9, words_at="nodes"), "target": Label(size=2)},
         "model.kind: parser learns from binary trees with words at the leaves, but nodes with children have words"),
        ({"model": {"kind": "parser"}, "objective": {"kind": "parsing"}},
         {"input": Tokens(size=9), "target": Label(size=3)},
         "objective.kind: parsing needs a tree to predict, but listops has tokens"),
        ({"model": {"kind": "lstm"}}, {"input": Tree(size=9), "target": Label(size=2)},
         "model.kind: lstm reads image or sequence or tokens input, but the data has tree input over 9 words"),
        ({"model": {"kind": "recursive"}}, {"input": Tree(size=9), "target": Labels(size=2)},
         "objective.kind: classification needs a label to predict, but listops has labels; set objective.kind to"),
        ({"model": {"kind": "recursive"}, "objective": {"kind": "node_labels", "poles": [[0], [3]]}},
         {"input": Tree(size=9), "target": Labels(size=3)}, "objective.poles: no class 3 in listops, which has 3"),
        ({"model": {"kind": "recursive"}, "objective": {"kind": "node_labels"}},
         {"input": Tree(size=9), "target": Label(size=3)}, "objective.kind: node_labels needs labels to predict, but"),
        ({"model": {"kind": "recursive"}}, {"input": Tokens(size=9), "target": Label(size=3)},
         "model.kind: recursive reads tree input, but the data has tokens input over 9 words"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(recipe, columns, message):
    stored = {name: StoredColumn(column=column, dtype="int32") for name, column in columns.items()}
    shard = Shard(file="train-00000.parquet", rows=90, row_groups=(90,), bytes=1, sha256="")
    manifest = Manifest(source="made", columns=stored, splits={"train": (shard,)})
    with pytest.raises(UserError) as caught:
        check(load_recipe({"data": {"kind": "listops"}, **recipe}), manifest)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("poles", [[[0, 1], [1, 2]], [[], [1]]])
def test_poles_that_are_not_apart(poles):
    recipe = {"model": {"kind": "rntn"}, "data": {"kind": "listops"}}
    with pytest.raises(UserError, match=r"objective.poles: two sets of classes, none of them in both"):
        load_recipe({**recipe, "objective": {"kind": "node_labels", "poles": poles}})


def test_the_best_is_chosen_by_what_there_is():
    recipe = {"model": {"kind": "rntn"}, "data": {"kind": "listops"}}
    with pytest.raises(UserError, match=r"objective.best: there are no poles to decide between"):
        load_recipe({**recipe, "objective": {"kind": "node_labels", "best": "binary_accuracy"}})
    chosen = load_recipe({**recipe, "objective": {"kind": "node_labels", "best": "accuracy"}})
    assert chosen.objective.reported(chosen.model, TREES).best == chosen.objective.build(TREES).best == "accuracy"


def test_a_net_for_labels_of_roots_is_trained_by_classification_alone():
    data = prepared(load_recipe(LISTOPS).data)
    assert isinstance(load_recipe(LISTOPS).objective, ClassificationSpec)
    check(load_recipe(LISTOPS), data.manifest)


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        ("parser", "classification", "objective.kind: classification takes no model that gives tree, as parser does"),
        (
            "tree_lstm",
            "parsing",
            "objective.kind: parsing takes no model that gives elements or row, as tree",
        ),
    ],
)
def test_only_parsing_trains_a_parser(model, objective, message):
    recipe = load_recipe({"model": {"kind": model}, "data": {"kind": "listops"}, "objective": {"kind": objective}})
    with pytest.raises(UserError) as caught:
        recipe.objective.check(recipe.model)
    assert str(caught.value).startswith(message)
