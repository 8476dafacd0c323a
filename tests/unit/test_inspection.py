"""What is looked at inside of trained nets, and the evidence of sequences: the same for any number of ranks."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torch.nn import functional as F

import cluster
from cluster.data.prepare import prepared
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.context import GroupContext, LocalContext
from cluster.training.evaluation import evaluate_best
from cluster.training.splits import open_splits
from nn_models import zoo
from nn_models.batch import Batch, Place, Ragged
from nn_models.columns import Features, Image, Label, Labels, Numbers, Sequence, Tokens
from nn_models.evidence import confusion
from nn_models.inspection import MOST_STEPS, MOST_UNITS
from nn_models.objectives import only_here
from nn_models.recurrence import GRUCell, LSTMCell
from nn_models.sequence_evidence import StepEvidence, first_token, written
from nn_models.sequence_objectives import TEMPERATURES, WRITTEN, NextTokenSpec
from nn_models.signature import Signature
from nn_models.spec import validate
from tests.toy.chapter import TOY, ToyRecipe
from tests.unit.ranks import forked

CPU = torch.device("cpu")
KINDS = {"rnn": (), "lstm": LSTMCell.gate_names, "peephole_lstm": LSTMCell.gate_names, "gru": GRUCell.gate_names}
INPUTS = {
    "vectors": Sequence(length=9, width=2),
    "ragged vectors": Sequence(width=2),
    "words": Tokens(size=7, length=9),
    "ragged words": Tokens(size=7),
    "image": Image(shape=(1, 5, 4)),
}


def inspected(model, column, target=None, **fields):
    """A net's Spec, the net, some rows of a column, and what is seen of them."""
    signature = Signature(columns={"input": column, "target": target or Label(size=3)})
    spec = validate(zoo.AnyModelSpec, {"kind": model, "hidden": 6, "embedding": 4, **fields})
    torch.manual_seed(1)
    net = spec.build(signature).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 9, 1, 4])
    num = int(lengths.sum())
    if isinstance(column, Image):
        values = torch.randn(4, *column.shape, generator=generator)
    elif isinstance(column, Tokens):
        values = torch.randint(7, (num,) if column.length is None else (4, column.length), generator=generator).int()
    else:
        values = torch.randn((num, 2) if column.length is None else (4, column.length, 2), generator=generator)
    given = Ragged(values, lengths, 9) if column.layout == "ragged" else values
    batch = Batch({"input": given}, Place.of(4), lambda: torch.arange(4))
    return spec, net, batch, spec.inspect(net, signature, batch)


@pytest.mark.parametrize("rows", INPUTS)
@pytest.mark.parametrize("model", KINDS)
def test_every_recurrent_net_shows_its_gradients_and_gates(model, rows):
    spec, _, _, found = inspected(model, INPUTS[rows])
    assert spec.sections == ("gradients", "gates")
    assert {name.partition("/")[0] for name in found} == set(spec.sections)
    states = "h" if model in ("rnn", "gru") else "hc"
    num_steps = 5 if rows == "image" else 9
    for net_name, own in (("trained", states), ("rnn", "h"), ("lstm", "hc"), ("gru", "h")):
        for state in own:
            norms = found.pop(f"gradients/{net_name}/0.0.{state}")
            assert len(norms) == num_steps + 1
            assert norms.isfinite().all()
    first = 5 if rows == "image" or "ragged" in rows else 9  # steps of the first row
    read = found.pop("gates/steps")
    width = {"image": (4,), "vectors": (2,), "ragged vectors": (2,)}.get(rows, ())
    assert tuple(read.shape) == (first, *width)
    assert set(found) == {f"gates/0.0.{gate}" for gate in KINDS[model]}
    for gate in found.values():
        assert gate.dtype == torch.uint8
        assert tuple(gate.shape) == (first, 6)


def test_looking_changes_nothing():
    spec, net, batch, first = inspected("gru", INPUTS["words"], dropout=0.5, layers=2, bidirectional=True)
    signature = Signature(columns={"input": INPUTS["words"], "target": Label(size=3)})
    state = torch.get_rng_state()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    again = spec.inspect(net, signature, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert all(torch.equal(net.state_dict()[name], value) for name, value in weights.items())
    assert not any(weight.grad is not None for weight in net.parameters())


def test_gates_are_those_of_the_equations():
    _, net, batch, found = inspected("lstm", INPUTS["vectors"])
    core, (h, c) = net.layers.core, torch.zeros(2, 6)
    for step in range(9):
        x = batch["input"][0, step]
        sums = core.weight_ih_l0 @ x + core.bias_ih_l0 + core.weight_hh_l0 @ h + core.bias_hh_l0
        i, f, g, o = sums.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        for name, gate in (("input", i), ("forget", f), ("output", o)):
            # float32, and rounded to whole numbers of 255
            assert (found[f"gates/0.0.{name}"][step] - 255 * gate.sigmoid()).abs().max() <= 0.51


def test_long_rows_and_wide_nets_keep_little():
    column = Sequence(length=MOST_STEPS + 40, width=2)
    _, _, _, found = inspected("gru", column, hidden=MOST_UNITS + 30)
    assert tuple(found["gates/0.0.reset"].shape) == (MOST_STEPS, MOST_UNITS)
    assert tuple(found["gates/steps"].shape) == (MOST_STEPS, 2)
    assert len(found["gradients/trained/0.0.h"]) == MOST_STEPS + 41  # these are numbers of a step only


def test_the_first_rows_of_a_split_are_those_whatever_its_order():
    recipe = ToyRecipe.model_validate(TOY)  # ragged rows, in streams
    splits = open_splits(prepared(recipe.data), window=None)
    batch = splits.first("validation", recipe, 5, device=CPU)
    lengths = batch["input"].lengths
    values = splits.held("validation", CPU, names=frozenset({"input"})).gather(np.arange(5))["input"]
    assert isinstance(values, Ragged)
    assert torch.equal(batch["input"].values, values.values)
    assert torch.equal(lengths, values.lengths)
    assert len(splits.first("validation", recipe, 10**6, device=CPU)["input"].lengths) == splits.manifest.rows(
        "validation"
    )


def test_other_models_show_their_filters():
    for kind, spec in zoo.MODELS.items():
        if kind in KINDS:
            assert spec.sections == ("gradients", "gates")
        else:
            # segments of scenes are no pictures that a filter could be shown as
            assert spec.sections[-1:] == (() if kind == "scene_parser" else ("filters",))
    signature = Signature(columns={"input": Features(size=3), "target": Label(size=2)})
    mlp = validate(zoo.AnyModelSpec, {"kind": "mlp", "hidden": [4]})
    assert mlp.inspect(mlp.build(signature), signature, signature.imagine(2)) == {}


# -- labels of steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_labels_of_steps_are_kept_where_they_are_wrong(ragged):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 4, 4, 4, 4]) if not ragged else torch.tensor([3, 1, 6, 2, 4])
    num = int(lengths.sum())
    labels, words = (torch.randint(3, (num,), generator=generator).int() for _ in range(2))
    outputs = F.one_hot(labels.long(), 3).double()
    starts = (lengths.cumsum(0) - lengths).tolist()
    for wrong in (starts[2], starts[2] + 1, starts[4]):  # two of the third row, one of the last
        outputs[wrong] = outputs[wrong].roll(1)
    evidence = StepEvidence(3)
    for first, end in ((0, 3), (3, 5)):  # batch by batch
        inside = slice(starts[first], starts[end] if end < 5 else num)

        def laid(values, first=first, end=end, inside=inside):
            if not ragged:
                return values[inside].view(end - first, -1)
            return Ragged(values[inside], lengths[first:end], int(lengths[first:end].max()))

        columns = {"input": laid(words), "target": laid(labels)}
        place = Place.of(end - first)._replace(ids=np.arange(first, end))
        evidence.add(Batch(columns, place, lambda: torch.arange(5), columns), outputs[inside])
    found = evidence.tensors(only_here, CPU)
    assert torch.equal(found["confusion"], confusion(outputs, labels.long(), 3))
    assert found["example_rows"].tolist() == [2, 4, 0, 1, 3]
    order = torch.cat([torch.arange(starts[row], starts[row] + lengths[row]) for row in (2, 4, 0, 1, 3)])
    end = ".values" if ragged else ""
    for name, values in (("inputs", words), ("targets", labels), ("predictions", outputs.argmax(1).int())):
        assert torch.equal(found[f"example_{name}{end}"].flatten(), values[order])
    if ragged:
        assert found["example_targets.lengths"].tolist() == [6, 4, 3, 1, 2]


# -- language models -------------------------------------------------------------------------------------------------

LETTERS = Signature(
    columns={
        "input": Tokens(names=("\n", "a", "b"), length=6, unit="characters"),
        "target": Labels(names=("\n", "a", "b"), size=3, length=6),
    }
)


def test_a_language_model_writes_and_says_what_each_token_costs():
    torch.manual_seed(0)
    net = zoo.build({"kind": "lstm", "hidden": 5, "embedding": 3}, LETTERS).eval()
    objective = NextTokenSpec().build(LETTERS)
    words = torch.randint(3, (4, 7), dtype=torch.int32)
    batch = Batch({"input": words[:, :-1], "target": words[:, 1:]}, Place.of(4), lambda: torch.arange(4))
    found = objective.inspect(net, LETTERS, batch)
    assert {name.partition("/")[0] for name in found} == set(objective.sections)
    assert tuple(found["text/written"].shape) == (len(TEMPERATURES), WRITTEN)
    assert torch.equal(found["text/following"], words[:, 1:])
    measured = objective.measure(net, batch)
    assert found["text/bits"].sum().item() == pytest.approx(measured.sums[0].item(), rel=1e-5)  # float32, 24 tokens
    likeliest = list(written(net, torch.tensor([0]), 5, temperature=0.0, generator=torch.Generator()))
    text = [0]
    for token in likeliest:
        assert token == int(net(torch.tensor([text]))[-1].argmax())
        text.append(token)
    assert first_token(LETTERS["input"]) == 0
    assert first_token(Tokens(names=("a", "\n"), unit="characters")) == 1


RECIPES = {
    "a language model": {
        "model": {"kind": "gru", "hidden": 8, "embedding": 4},
        "data": {"kind": "python_docs", "unit": "words", "max_words": 40, "window": 16},
        "objective": {"kind": "next_token"},
        "train": {"epochs": 1, "global_batch_size": 300},
    },
    "images by rows": {
        "model": {"kind": "lstm", "hidden": 8},
        "data": {"kind": "digits"},
        "train": {"epochs": 1, "global_batch_size": 200},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_any_number_of_ranks_sees_the_same(name, tmp_path):
    run = tmp_path / "one"
    cluster.train(RECIPES[name], run=str(run))
    recipe = load_recipe(str(run / "recipe.yaml"))
    splits = open_splits(prepared(recipe.data), window=None)

    def test(rank: int, *, world_size: int, where: Path) -> None:
        place = {"run": Folder(where), "splits": splits, "device": CPU}
        context = GroupContext(**place) if world_size else LocalContext(**place)
        signature = splits.manifest.signature
        evaluate_best(recipe.model.build(signature), recipe.objective.build(signature), recipe=recipe, context=context)

    expected = load_file(run / "evaluation.safetensors")
    with safe_open(run / "evaluation.safetensors", "np") as file:
        about = file.metadata()
    language = name == "a language model"
    explained = ["text"] if language else ["occlusion", "importance"]
    assert json.loads(about["inside"]) == [*explained, "gradients", "gates"]
    assert about.get("section") == (None if language else "classes")
    where = tmp_path / "three"
    (where / "model").mkdir(parents=True)
    (where / "model" / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes())
    assert forked(partial(test, world_size=3, where=where), world_size=3) == [0] * 3
    found = load_file(where / "evaluation.safetensors")
    assert found.keys() == expected.keys()
    for key in (key for key in expected if "/" in key):  # of the first rank, whatever there is beside it
        np.testing.assert_array_equal(found[key], expected[key])


def test_a_text_on_the_page_is_that_of_the_opened_model(tmp_path):
    outcome = cluster.train(RECIPES["a language model"], run=str(tmp_path / "run"))
    model = outcome.load_model()
    kept = load_file(tmp_path / "run" / "evaluation.safetensors")
    names = model.vocabulary.names
    for temperature, row in zip(kept["text/temperatures"].tolist(), kept["text/written"], strict=True):
        told = list(model.write(20, temperature=temperature, seed=0))
        assert [word.lstrip(" ") for word in told] == [names[number] for number in row[:20]]


def test_numbers_of_sequences_show_both(tmp_path):
    outcome = cluster.train(
        {
            "model": {"kind": "rnn", "hidden": 4},
            "data": {"kind": "adding", "length": 6, "rows": 300},
            "objective": {"kind": "regression"},
            "train": {"epochs": 1},
        },
        run=str(tmp_path / "run"),
    )
    kept = load_file(f"{outcome.run}/evaluation.safetensors")
    assert {"targets", "predictions", "gradients/trained/0.0.h", "gates/steps"} <= set(kept)
    assert Numbers(size=1).num_outputs == kept["targets"].shape[1]
