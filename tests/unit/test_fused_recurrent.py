"""Fused recurrent nets: each trial has the figures that it would have alone; and which of them are fused."""

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster.data.layouts import Dense
from cluster.data.manifest import StoredColumn
from cluster.data.prepare import prepared
from cluster.data.sources.base import labels
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.tuning.fused.groups import groups, pays, why_not
from cluster.tuning.ledger import SweepDirectory
from cluster.tuning.sweep import _Sweep
from nn_models.columns import Tokens
from nn_models.errors import UserError
from tests.unit import made
from tests.unit.fusing import alone, check, close, fused, lines, runs, together

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # torch's own
]

OBJECTIVES = {"adding": "regression", "series": "forecast", "images": "classification", "words": "classification"}
WORDS, LENGTH = ("a", "b", "c", "d", "e"), 5


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Rows of few steps: over dozens of them a net may multiply what rounding leaves beyond what `close` allows."""
    folder = tmp_path_factory.mktemp("data")
    words = np.random.default_rng(0).integers(0, len(WORDS), (100, LENGTH), dtype=np.int32)
    texts = made.columns(
        {
            "input": StoredColumn(column=Tokens(names=WORDS, size=len(WORDS), length=LENGTH), dtype="int32"),
            "target": labels(("more", "less")),
        },
        {"input": Dense(words), "target": Dense((words.sum(1) % 2).astype(np.int64))},
    )
    made.written(texts, folder / "words")
    return {
        "adding": {"kind": "adding", "rows": 100, "length": 6},
        "series": {"kind": "el_nino", "window": 6, "horizon": 2, "stride": 5, "season": None},
        "images": made.images(folder / "images", 100).model_dump(mode="json", exclude_defaults=True)
        | {"kind": "parquet"},
        "words": {"kind": "shards", "path": str(folder / "words")},
        "ragged": {"kind": "shards", "path": str(made.written(made.ragged(100), folder / "ragged").folder)},
    }


@pytest.fixture
def recipes(data):
    """Recipes of a model that are alike but for what `differing` sets."""

    def make(rows: str, model: dict[str, Any], *differing: dict[str, Any], **sections: Any) -> list[Recipe]:
        content = {
            "model": {"hidden": 6} | model,
            "data": data[rows],
            "objective": {"kind": OBJECTIVES.get(rows, "classification")},
            "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
            "train": {"epochs": 2, "global_batch_size": 20, "clip_norm": 1.0, "log_every_steps": 1},
        }
        return [load_recipe(content | sections, overrides=changes) for changes in differing]

    return make


SEEDS = [{"train.seed": 3}, {"train.seed": 4, "optimizer.lr": 0.05}, {"train.seed": 3, "optimizer.lr": 0.02}]
RATES = [{"optimizer.lr": lr} for lr in (0.01, 0.03)]
ADAMW = {"optimizer": {"kind": "adamw"}}
NETS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "gru": ("adding", {"kind": "gru"}, SEEDS, {}),
    "gru, two layers in both directions": (
        "adding",
        {"kind": "gru", "layers": 2, "bidirectional": True, "initial_state": "learned"},
        RATES,
        ADAMW,
    ),
    "gru, reset before": ("series", {"kind": "gru", "reset": "before", "pool": "mean"}, SEEDS, {}),
    "gru, normalised": ("adding", {"kind": "gru", "layer_norm": True}, RATES, {}),
    "gru of rows": ("images", {"kind": "gru", "pool": "max"}, SEEDS, {}),
    "gru of words": ("words", {"kind": "gru", "embedding": 4}, RATES, ADAMW),
    "rnn": ("series", {"kind": "rnn"}, SEEDS, {}),
    "rnn, two layers": ("adding", {"kind": "rnn", "layers": 2, "activation": "relu"}, RATES, ADAMW),
    "rnn, both directions": ("adding", {"kind": "rnn", "bidirectional": True, "activation": "sigmoid"}, SEEDS, {}),
    "rnn of reordered rows": ("images", {"kind": "rnn", "permutation": 5}, RATES, ADAMW),
}


@pytest.mark.parametrize("name", NETS)
def test_each_trial_is_what_it_is_alone(name, recipes, tmp_path):
    rows, model, differing, sections = NETS[name]
    check(recipes(rows, model, *differing, **sections), tmp_path)


def test_vectors_that_are_frozen_stay_as_they_are(recipes, tmp_path):
    vectors = np.random.default_rng(1).normal(size=(len(WORDS), 4)).astype(np.float32)
    save_file({"vectors": vectors}, tmp_path / "v.safetensors", metadata={"words": '["a", "b", "c", "d", "e"]'})
    model = {"kind": "gru", "embedding": 4, "vectors": str(tmp_path / "v.safetensors"), "freeze_vectors": True}
    check(recipes("words", model, *RATES, **ADAMW), tmp_path)


def test_dropout_between_layers_is_each_trials_own(recipes, tmp_path):
    rates = [{"model.dropout": rate} for rate in (0.0, 0.8)]
    described = recipes("adding", {"kind": "gru", "layers": 2, "pool": "mean"}, *rates)
    where = runs(tmp_path, "fused", 2)
    together(described, where)
    alone(described[0], Folder(tmp_path / "alone"))
    close(lines(where[0]), lines(Folder(tmp_path / "alone")))  # one without dropout is as if there were none
    first = [lines(run, "train")[0]["loss"] for run in where]
    assert first[0] != pytest.approx(first[1], rel=1e-3)  # of the same weights and rows


def test_trials_of_the_ordinary_loop_go_on_fused(recipes, tmp_path):
    train = {"epochs": 2, "global_batch_size": 20, "log_every_steps": 1}
    described = recipes("adding", {"kind": "gru", "layers": 2}, *RATES, train=train, **ADAMW)
    where, apart = runs(tmp_path, "fused", 2), runs(tmp_path, "alone", 2)
    for recipe, run, other in zip(described, where, apart, strict=True):
        shorter = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
        alone(shorter, run)
        alone(recipe, other)
    together(described, where)
    for one, other in zip(where, apart, strict=True):
        close(lines(one), lines(other))


@pytest.mark.parametrize(
    ("rows", "model", "objective", "reason"),
    [
        ("adding", {"kind": "lstm"}, "regression", "model.kind: lstm: no batch"),
        ("adding", {"kind": "peephole_lstm"}, "regression", "model.kind: peephole_lstm: no batch"),
        ("ragged", {"kind": "gru"}, "classification", "data: the rows' input differ in length"),
        ("copy", {"kind": "gru"}, "step_labels", "objective.kind: step_labels: it asks more"),
        ("text", {"kind": "gru"}, "next_token", "objective.kind: next_token: it asks more"),
    ],
)
def test_what_cannot_be_fused_says_why(rows, model, objective, reason, recipes, data, tmp_path):
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question. " * 20)
    others = {
        "copy": {"kind": "copy", "rows": 50, "count": 2, "delay": 2},
        "text": {"kind": "text", "path": str(tmp_path / "text.txt"), "window": 10},
    }
    sections = {"objective": {"kind": objective}, "data": others.get(rows) or data[rows]}
    (described,) = recipes("adding", model, {}, **sections)
    manifest = prepared(described.data).manifest
    assert str(why_not(described, manifest)).startswith(reason)
    assert not pays(described, manifest)
    with pytest.raises(UserError, match=reason):
        fused([described, described], runs(tmp_path, "fused", 2))


@pytest.mark.parametrize("kind", ["rnn", "gru"])
def test_small_nets_pay(kind, recipes):
    sizes = [{"model.hidden": 64}, {"model.hidden": 256}, {"model.hidden": 64, "train.global_batch_size": 512}]
    described = recipes("adding", {"kind": kind}, *sizes)
    manifest = prepared(described[0].data).manifest
    assert [pays(recipe, manifest) for recipe in described] == [True, False, False]
    assert groups([*described, *described], manifest=manifest) == [[0, 3], [1, 4], [2, 5]]  # where it is asked for


@pytest.mark.parametrize(
    ("rows", "asked", "most"), [("adding", None, 8), ("adding", 5, 5), ("ragged", None, 1), ("ragged", 5, None)]
)
def test_a_sweep_asks_with_its_data_whether_it_can_fuse(rows, asked, most, recipes, tmp_path):
    space = {"space": {"optimizer.lr": {"choice": [0.01 * number for number in range(1, 9)]}}, "num_trials": 8}
    (described,) = recipes(rows, {"kind": "gru"}, {}, sweep=space)
    sweep = _Sweep(described, SweepDirectory(tmp_path / "sweep"), 1, False)
    if most is None:
        with pytest.raises(UserError, match="differ in length"):
            sweep.fuse(asked)
        return
    sweep.state.concurrency = 1
    sweep.fuse(asked)
    assert sweep.most_fused == most
