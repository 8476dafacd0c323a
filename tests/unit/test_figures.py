"""Metrics of whole splits and class weights: scikit-learn says the same, and so does any number of ranks."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

import cluster
from cluster.data.prepare import prepared
from cluster.inference.evaluate import evaluate_run
from cluster.recipe.loading import dump_recipe, load_recipe, parse_yaml
from cluster.tuning.fused.groups import why_not
from cluster.tuning.target import target
from nn_models.batch import Batch, Place
from nn_models.class_weights import weights_of
from nn_models.classification import Classification, ClassificationSpec
from nn_models.columns import Label
from nn_models.errors import UserError
from nn_models.figures import ClassFigures, NumberFigures
from nn_models.signature import Signature

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # torch's own
]

CPU = torch.device("cpu")
ALL = ("balanced_accuracy", "macro_f1", "auroc", "top5_accuracy")


def batches(targets, sizes):
    """Batches of consecutive rows, of these sizes."""
    first = 0
    for size in sizes:
        ids = np.arange(first, first + size)
        place = Place(ids, first, size, len(targets), size, len(targets))
        yield slice(first, first + size), Batch({"target": targets[first : first + size]}, place, lambda: None)
        first += size


def on_ranks(make, targets, outputs, sizes):
    """The values of figures that got their batches in turn, as so many ranks would."""
    ranks = [make(), make()]
    for number, (rows, batch) in enumerate(batches(targets, sizes)):
        ranks[number % 2].add(batch, outputs[rows])
    waiting: list[list] = [[], []]

    class Apart(Exception):
        pass

    def values(rank, known):
        calls = iter(known)

        def across(tensor):
            waiting[rank].append(tensor)
            for total in calls:
                return total
            raise Apart

        try:
            return ranks[rank].values(across, CPU)
        except Apart:
            return None

    known: list = []
    while True:
        waiting[0].clear(), waiting[1].clear()
        found = values(0, known), values(1, known)
        if found[0] is not None:
            assert found[0] == found[1]
            return found[0]
        known.append(waiting[0][-1] + waiting[1][-1])


@settings(max_examples=40, deadline=None)
@given(
    classes=st.integers(2, 12),
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    rounded=st.booleans(),
    seed=st.integers(0, 100),
)
def test_figures_of_classes(classes, sizes, rounded, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(sizes)
    targets = torch.randint(0, classes, (rows,), generator=generator).clamp(max=classes - 1 - seed % 2)
    outputs = torch.randn(rows, classes, generator=generator) + F.one_hot(targets, classes)
    outputs = outputs.round() if rounded else outputs  # equal scores
    found = on_ranks(lambda: ClassFigures(classes, ALL), targets, outputs, sizes)
    y, taken = targets.numpy(), outputs.max(1).indices.numpy()
    present = np.unique(y)
    recall = oracle.recall_score(y, taken, labels=present, average="macro", zero_division=0)
    assert found["balanced_accuracy"] == pytest.approx(recall)
    assert found["macro_f1"] == pytest.approx(oracle.f1_score(y, taken, average="macro"))
    scores = outputs.double().softmax(1).numpy()
    areas = [oracle.roc_auc_score(y == c, scores[:, c]) for c in present if len(present) > 1]
    assert found["auroc"] == pytest.approx(np.mean(areas) if areas else np.nan, nan_ok=True)
    if not rounded and classes > 5:  # which five, of equal ones, is anybody's choice
        best = oracle.top_k_accuracy_score(y, outputs.numpy(), k=5, labels=np.arange(classes))
        assert found["top5_accuracy"] == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 3), sizes=st.lists(st.integers(2, 40), min_size=2, max_size=6), offset=st.floats(-1e6, 1e6)
)
def test_figures_of_numbers(outputs, sizes, offset):
    generator = torch.Generator().manual_seed(len(sizes))
    targets = torch.randn(sum(sizes), outputs, generator=generator, dtype=torch.float64) + offset
    predictions = targets + torch.randn(targets.shape, generator=generator)
    found = on_ranks(NumberFigures, targets, predictions, sizes)
    assert found["r2"] == pytest.approx(oracle.r2_score(targets, predictions), rel=1e-9)


def test_equal_numbers_have_an_r2():
    same = torch.ones(4, 1)
    assert on_ranks(NumberFigures, same, same, [2, 2]) == {"r2": 1.0}
    assert on_ranks(NumberFigures, same, same + 1, [2, 2]) == {"r2": 0.0}


# -- in training -----------------------------------------------------------------------------------------------------


def rare(folder):
    """386 common rows and 14 rare ones, which overlap."""
    generator = np.random.default_rng(0)
    x = np.concatenate((generator.normal(size=(386, 2)), generator.normal(size=(14, 2)) + 1.5))
    pq.write_table(pa.table({"a": x[:, 0], "b": x[:, 1], "y": ["common"] * 386 + ["rare"] * 14}), folder / "r.parquet")
    return {
        "model": {"kind": "mlp", "hidden": []},
        "data": {"kind": "parquet", "path": str(folder / "r.parquet"), "input": ["a", "b"], "target": "y",
                 "test_fraction": 0.3},
        "optimizer": {"kind": "adamw", "lr": 0.05},
        "train": {"epochs": 5, "global_batch_size": 50, "log_every_steps": 1},
    }  # fmt: skip


def lines(run, split):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def test_a_test_has_all_figures_and_validation_those_asked_for(tmp_path):
    recipe = rare(tmp_path) | {"objective": {"kind": "classification", "metrics": ["auroc"]}}
    outcome = cluster.train(recipe, run=str(tmp_path / "run"))
    assert {"test/accuracy", "test/balanced_accuracy", "test/macro_f1", "test/auroc"} < outcome.metrics.keys()
    assert "test/top5_accuracy" not in outcome.metrics
    validation = {name for name in outcome.metrics if name.startswith("validation/")}
    assert validation == {"validation/loss", "validation/accuracy", "validation/auroc"}
    assert all("auroc" not in line for line in lines(tmp_path / "run", "train"))
    found = evaluate_run(outcome.run)["metrics"]
    assert found == pytest.approx({name: v for name, v in outcome.metrics.items() if name.startswith("test/")})
    plain = cluster.train(rare(tmp_path), run=str(tmp_path / "plain"))
    assert {name for name in plain.metrics if name.startswith("validation/")} == validation - {"validation/auroc"}
    assert outcome.metrics["test/loss"] == plain.metrics["test/loss"]  # figures change nothing


def test_a_sweep_takes_a_figure_that_is_declared(tmp_path):
    sweep = {"space": {"optimizer.lr": {"choice": [0.1]}}, "metric": "validation/balanced_accuracy"}
    recipe = load_recipe(rare(tmp_path) | {"sweep": sweep})
    manifest = prepared(recipe.data).manifest
    with pytest.raises(UserError, match=r"sweep\.metric: .*add it to objective\.metrics"):
        target(recipe, manifest)
    declared = load_recipe(recipe, {"objective.metrics": ["balanced_accuracy"]})
    assert target(declared, manifest) == ("validation/balanced_accuracy", "max")
    assert why_not(recipe, manifest) is None
    assert why_not(declared, manifest).path == "objective.metrics"


def test_what_says_nothing_is_refused():
    with pytest.raises(UserError, match=r"objective\.metrics: top5_accuracy of 3 classes is always 1"):
        ClassificationSpec(metrics=("top5_accuracy",)).build(Signature(input_shape=(2,), num_outputs=3))


# -- class weights ---------------------------------------------------------------------------------------------------


def label(*rows, names=()):
    return Label(size=len(rows), names=names, counts={"train": rows})


def test_balanced_weights():
    y = np.repeat([0, 1, 2], [70, 20, 10])
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=y)
    assert weights_of("balanced", label(70, 20, 10)).numpy() == pytest.approx(wanted, rel=1e-6)
    assert weights_of("balanced", label(70, 0, 30))[1] == 1


def test_given_weights_are_1_on_average():
    weights = weights_of({"b": 10.0}, label(90, 10, names=("a", "b")))
    assert float(weights[1] / weights[0]) == pytest.approx(10)
    assert float(weights @ torch.tensor([0.9, 0.1])) == pytest.approx(1)
    assert (weights_of({"a": 3.0, "b": 3.0}, label(90, 10, names=("a", "b"))) == 1).all()


def test_weights_that_do_not_fit():
    names = ("common", "rare")
    with pytest.raises(UserError, match=r"objective\.class_weights\.rear: .*did you mean rare"):
        weights_of({"rear": 2.0}, label(9, 1, names=names))
    with pytest.raises(UserError, match="no training row would count"):
        weights_of({"common": 0.0}, label(9, 0, names=names))
    with pytest.raises(UserError, match="prepare it again"):
        weights_of("balanced", Label(size=2))
    for weight in (-1, "b", True, None):
        with pytest.raises(UserError, match=rf"^objective\.class_weights\.3: must be a number from 0, not {weight!r}$"):
            load_recipe("digits-mlp", {"objective.class_weights": {"3": weight}})
    for wanted in ("balance", 3, ["3"], True):
        with pytest.raises(UserError, match=r"^objective\.class_weights: must .*not "):
            load_recipe("digits-mlp", {"objective.class_weights": wanted})


def test_names_as_yaml_has_them():
    recipe = load_recipe("digits-mlp", {"objective.class_weights": {3: 2, True: 0.5}})
    assert recipe.objective.class_weights == {"3": 2.0, "true": 0.5}
    assert load_recipe(parse_yaml(dump_recipe(recipe), name="r")).objective == recipe.objective


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_row_of_weight_2_counts_as_two_rows(smoothing):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 3, (9,), generator=generator)
    weighted = Classification(label_smoothing=smoothing, weights=torch.tensor([1.0, 2.0, 1.0]))
    plain = Classification(label_smoothing=smoothing)
    twice = torch.cat((torch.arange(9), (targets == 1).nonzero()[:, 0]))

    def loss(objective, rows):
        batch = Batch({"input": outputs[rows], "target": targets[rows]}, Place.of(len(rows)), lambda: None)
        measured = objective.measure(lambda x: x, batch)
        each = objective.measure_each(outputs[rows][None], batch, shared=True, each={})
        assert float(each[0]) == pytest.approx(float(measured.loss))
        each = objective.measure_each(
            outputs[rows][None], batch, shared=True, each={"label_smoothing": torch.tensor([smoothing]).double()}
        )
        assert float(each[0]) == pytest.approx(float(measured.loss), rel=1e-6)
        return float(measured.loss)

    assert loss(weighted, torch.arange(9)) == pytest.approx(loss(plain, twice))


def test_rare_rows_are_found_where_classes_weigh_as_much(tmp_path):
    recipe = rare(tmp_path)
    plain = cluster.train(recipe, run=str(tmp_path / "plain")).metrics
    weighted = recipe | {"objective": {"kind": "classification", "class_weights": "balanced"}}
    balanced = cluster.train(weighted, run=str(tmp_path / "balanced")).metrics
    assert plain["test/balanced_accuracy"] == 0.5  # it says common of all
    assert balanced["test/balanced_accuracy"] > 0.7


def test_ranks_weigh_and_figure_as_one(tmp_path):
    objective = {"kind": "classification", "class_weights": {"rare": 20}, "metrics": list(ALL[:3])}
    recipe = rare(tmp_path) | {"objective": objective}
    recipe["train"] = recipe["train"] | {"accumulation": 2, "epochs": 3}
    jobs = [{"recipe": recipe, "run": str(tmp_path / f"{size}"), "world_size": size} for size in (0, 3)]
    done = subprocess.run([sys.executable, "-m", "tests.unit.ranks", json.dumps(jobs)], timeout=200, check=True)
    assert done.returncode == 0
    for split in ("train", "validation", "test"):
        ours, theirs = lines(tmp_path / "3", split), lines(tmp_path / "0", split)
        assert len(ours) == len(theirs) > 0
        for line, other in zip(ours, theirs, strict=True):
            for name in ("loss", "accuracy", *ALL):
                # float32 sums in another order
                assert line.get(name) == pytest.approx(other.get(name), abs=1e-5), (split, name)
    assert "auroc" in ours[-1]
