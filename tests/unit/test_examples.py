"""Examples of a test: chosen from all its rows on all ranks, whatever the rows are made of."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

import cluster
from cluster.data.prepare import prepared
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.context import GroupContext, LocalContext
from cluster.training.evaluation import evaluate_best
from cluster.training.splits import open_splits
from nn_models.batch import Batch, Forest, Place, Ragged, Value
from nn_models.evidence import ClassEvidence
from nn_models.examples import Examples
from nn_models.objectives import only_here
from tests.unit import made
from tests.unit.ranks import forked
from tests.unit.test_report import report, write_run

CPU = torch.device("cpu")


def together(ranks: Sequence[Examples | ClassEvidence]) -> list[dict[str, Tensor]]:
    """What each rank gets of its `tensors`, where all call it."""
    told: list[list[Tensor]] = []

    def note(values: Tensor, mine: list[Tensor]) -> list[Tensor]:
        mine.append(values)
        return [values]

    def ask(rank: Examples | ClassEvidence, gather):
        return rank.tensors(gather, CPU) if isinstance(rank, Examples) else rank.tensors(only_here, CPU, gather)

    for rank in ranks:
        mine: list[Tensor] = []
        told.append(mine)
        ask(rank, partial(note, mine=mine))
    found = []
    for rank in ranks:
        calls = iter(zip(*told, strict=True))
        found.append(ask(rank, lambda _, calls=calls: list(next(calls))))
    return found


SCORES = st.lists(st.sampled_from([0.25, 0.5, 0.75, -np.inf]), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(SCORES, st.integers(1, 5), st.integers(1, 7), st.integers(1, 6))
def test_the_best_of_all_rows_on_any_number_of_ranks(scores, num_ranks, batch_size, num):
    ranks = [Examples(1, num=num) for _ in range(num_ranks)]
    values = torch.tensor(scores)
    for place, first in enumerate(range(0, len(scores), batch_size)):  # dealt to ranks, some of which may have none
        ids = np.arange(first, min(first + batch_size, len(scores)))
        columns = {"twice": torch.from_numpy(2 * ids)}
        ranks[place % num_ranks].keep(0, ids, values[first : first + len(ids)], columns)
    expected = sorted((i for i, s in enumerate(scores) if s > -np.inf), key=lambda i: (-scores[i], i))[:num]
    for found in together(ranks):
        assert found.get("example_rows", torch.empty(0)).tolist() == expected
        if expected:
            assert found["example_twice"].tolist() == [2 * row for row in expected]


def test_a_number_that_is_none_is_the_least_sure():
    examples = Examples(1, num=2)
    examples.keep(0, np.arange(3), torch.tensor([torch.nan, 0.5, 0.25]), {"x": torch.arange(3)})
    assert examples.tensors(lambda values: [values], CPU)["example_rows"].tolist() == [1, 2]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rows_of_different_lengths_and_trees_are_kept_as_they_are_stored(num_ranks, tmp_path):
    data = made.written(made.ragged(60), tmp_path / "data")
    held = made.split_rows(data, "train")
    columns = {name: (held.columns[name], made.RAGGED[name].column) for name in ("input", "steps", "tree")}
    scores = torch.from_numpy(np.random.default_rng(1).permutation(len(held.ids)).astype(np.float32))
    ranks = [Examples(1, num=5) for _ in range(num_ranks)]
    for number, first in enumerate(range(0, len(held.ids), 8)):
        where = np.arange(first, min(first + 8, len(held.ids)))
        values: dict[str, Value] = {name: rows.take(where).collate(kind, CPU) for name, (rows, kind) in columns.items()}
        assert isinstance(values["tree"], Forest)
        ranks[number % num_ranks].keep(0, where, scores[where], values)
    best = np.argsort(-scores.numpy())[:5]
    for found in together(ranks):
        assert found["example_rows"].tolist() == best.tolist()
        for name, (rows, _) in columns.items():
            wanted = rows.take(best)
            assert found[f"example_{name}.lengths"].tolist() == np.diff(wanted.offsets).tolist()
            for field, expected in wanted.fields.items():
                np.testing.assert_array_equal(found[f"example_{name}.{field}"].numpy(), expected)


def logits(rows: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(rows, classes, generator=generator), torch.randint(0, classes, (rows,), generator=generator)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_most_confident_wrong_rows_are_there_and_the_first_right_ones(num_ranks):
    outputs, targets = logits(500)
    images = torch.arange(500)[:, None]
    ranks = [ClassEvidence(3) for _ in range(num_ranks)]
    for number, first in enumerate(range(0, 500, 30)):
        rows = slice(first, min(first + 30, 500))
        ids = np.arange(500)[rows]
        columns = {"input": images[rows], "target": targets[rows]}
        place = Place.of(len(ids))._replace(ids=ids)
        ranks[number % num_ranks].add(Batch(columns, place, lambda: targets, columns), outputs[rows])
    confidences, predictions = outputs.softmax(1).max(1)
    right = predictions == targets
    wrong = (~right).nonzero()[:, 0]
    surest = wrong[confidences[wrong].argsort(descending=True)][:24]
    for found in together(ranks):
        told = found["example_predictions"] != found["example_targets"]
        assert found["example_rows"][told].tolist() == surest.tolist()
        assert found["example_inputs"][told][:, 0].tolist() == surest.tolist()
        assert found["example_rows"][~told].tolist() == right.nonzero()[:24, 0].tolist()


RECIPE = {
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits"},
    "train": {"epochs": 2, "global_batch_size": 100},
}


def test_two_workers_leave_the_examples_of_one(tmp_path):
    run = tmp_path / "one"
    cluster.train(RECIPE, run=str(run))
    recipe = load_recipe(str(run / "recipe.yaml"))
    splits = open_splits(prepared(recipe.data), window=None)

    def test(rank: int, *, world_size: int, where: Path) -> None:
        place = {"run": Folder(where), "splits": splits, "device": CPU}
        context = GroupContext(**place) if world_size else LocalContext(**place)
        signature = splits.manifest.signature
        evaluate_best(recipe.model.build(signature), recipe.objective.build(signature), recipe=recipe, context=context)

    expected = load_file(run / "evaluation.safetensors")
    for world_size in (2, 3):
        where = tmp_path / str(world_size)
        (where / "model").mkdir(parents=True)
        (where / "model" / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes())
        assert forked(partial(test, world_size=world_size, where=where), world_size=world_size) == [0] * world_size
        found = load_file(where / "evaluation.safetensors")
        assert found.keys() == expected.keys()
        # float32; other slices are multiplied in another order
        np.testing.assert_allclose(found.pop("example_confidences"), expected["example_confidences"], rtol=1e-5)
        for name, values in found.items():
            np.testing.assert_array_equal(values, expected[name])
    wrong = expected["confusion"].sum() - expected["confusion"].trace()
    shown = (expected["example_predictions"] != expected["example_targets"]).sum()
    assert shown == min(24, wrong)


@pytest.mark.parametrize("name", ["input", "tree", "steps"])
def test_the_page_shows_such_rows_and_misses_no_filters(name, tmp_path):
    stored = made.split_rows(made.written(made.ragged(20), tmp_path / "data"), "train").columns[name].take(np.arange(6))
    value = stored.collate(made.RAGGED[name].column, CPU)
    assert isinstance(value, Forest | Ragged)
    outputs = torch.eye(2)[[0, 1, 0, 1, 0, 1]]
    columns = {"input": value, "target": torch.tensor([0, 1, 0, 0, 1, 1])}
    evidence = ClassEvidence(2)
    evidence.add(Batch(columns, Place.of(6), lambda: torch.arange(6), columns), outputs)
    run = write_run(tmp_path / "run")
    signature = {"columns": {"input": {"names": [f"word{number}" for number in range(made.NUM_WORDS)]}}}
    about = {"section": "classes", "split": "test", "class_names": '["a", "b"]', "signature": json.dumps(signature)}
    save_file(evidence.tensors(only_here, CPU), run / "evaluation.safetensors", about)
    page = report(run)
    assert "Learned filters" not in page.headings
    assert "Not on this page" not in page.headings
    assert page.words.count("a → b") == page.words.count("b → a") == 1
    if name == "tree":
        first = [f"word{number}" for number in stored.take(np.array([0])).fields["words"] if number >= 0]
        assert " ".join(first) in page.words
