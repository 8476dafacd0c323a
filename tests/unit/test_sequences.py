"""Language models and labels of steps: truncated backpropagation, any number of ranks, resumed in mid-stream."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cluster.data.manifest import Manifest, Shard, StoredColumn
from cluster.recipe.fit import check
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints
from nn_models import zoo
from nn_models.batch import Batch, Place, Ragged
from nn_models.columns import Label, Labels, Sequence, Tokens
from nn_models.errors import UserError
from nn_models.sequence_objectives import NextTokenSpec, StepLabelsSpec
from nn_models.signature import Signature

WORDS, WINDOW, ROWS = 7, 6, 4
STREAM = Signature(columns={"input": Tokens(size=WORDS, length=WINDOW), "target": Labels(size=WORDS, length=WINDOW)})
RECIPE = {
    "name": "text",
    "model": {"kind": "lstm", "hidden": 8, "embedding": 5, "layers": 2, "initial_state": "learned"},
    "data": {"kind": "python_docs", "unit": "words", "max_words": 50, "window": 16},
    "objective": {"kind": "next_token"},
    "optimizer": {"kind": "sgd", "lr": 0.5, "momentum": 0.5},
    "train": {"epochs": 2, "global_batch_size": 200, "clip_norm": 1.0, "log_every_steps": 1, "keep_checkpoints": 1},
}
MODELS = [{"kind": kind, "hidden": 5, "embedding": 3} for kind in ("rnn", "lstm", "peephole_lstm", "gru")]


def batch(words) -> Batch:
    windows = {"input": words[:, :-1], "target": words[:, 1:]}
    return Batch(windows, Place.of(len(words)), lambda: torch.arange(len(words)))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["kind"])
def test_truncated_backpropagation_is_that_of_each_window_with_the_values_of_all_before(model):
    torch.manual_seed(0)
    net = zoo.build(model, STREAM).double()
    objective = NextTokenSpec().build(STREAM)
    words = torch.randint(WORDS, (ROWS, 2 * WINDOW + 1))
    first = objective.measure(net, batch(words[:, : WINDOW + 1]))
    second = objective.measure(net, batch(words[:, WINDOW:]), carry=first.carry)
    whole = objective.measure(net, batch(words))  # one window: full backpropagation
    assert whole.loss.item() == pytest.approx((first.loss + second.loss).item(), abs=1e-10)
    outputs = net(words[:, :-1]).unflatten(0, (ROWS, -1))
    wanted = F.cross_entropy(outputs.transpose(1, 2), words[:, 1:], reduction="sum")
    assert whole.loss.item() == pytest.approx(wanted.item(), abs=1e-10)
    full = torch.autograd.grad(whole.loss, list(net.parameters()))
    torch.testing.assert_close(full, torch.autograd.grad(wanted, list(net.parameters())), atol=1e-10, rtol=0)
    weight = dict(net.named_parameters())["output.weight"]  # the output's derivative does not pass through time
    cut = torch.autograd.grad(first.loss + second.loss, weight)[0]
    torch.testing.assert_close(cut, full[[id(p) for p in net.parameters()].index(id(weight))], atol=1e-10, rtol=0)
    assert not any(part.requires_grad for part in second.carry)


def test_without_a_carried_state_each_window_begins_anew():
    torch.manual_seed(0)
    net, objective = zoo.build(MODELS[1], STREAM), NextTokenSpec(carry_state=False).build(STREAM)
    words = torch.randint(WORDS, (ROWS, WINDOW + 1))
    measured = objective.measure(net, batch(words), carry=tuple(torch.ones(ROWS, 1, 5) for _ in range(2)))
    assert measured.carry is None
    assert torch.equal(measured.loss, objective.measure(net, batch(words)).loss)


def test_bits_and_accuracy_are_of_tokens():
    torch.manual_seed(0)
    net, objective = zoo.build(MODELS[0], STREAM), NextTokenSpec().build(STREAM)
    words = torch.randint(WORDS, (ROWS, WINDOW + 1))
    measured = objective.measure(net, batch(words))
    bits, right = measured.sums.tolist()
    assert bits == pytest.approx(measured.loss.item() / math.log(2))
    assert right == (net(words[:, :-1]).argmax(1) == words[:, 1:].flatten()).sum()
    assert [metric.name for metric in objective.metrics] == ["bits_per_token", "accuracy"]


@pytest.mark.parametrize("ragged", [False, True])
def test_labels_of_steps(ragged):
    length = None if ragged else 3
    columns = {"input": Sequence(width=2, length=length), "target": Labels(size=4, length=length)}
    torch.manual_seed(0)
    net = zoo.build({"kind": "gru", "hidden": 5, "bidirectional": True}, Signature(columns=columns))
    steps, labels = torch.randn(6, 2), torch.randint(4, (6,), dtype=torch.int32)
    lengths = torch.tensor([1, 3, 2])
    given = (
        {"input": Ragged(steps, lengths, 3), "target": Ragged(labels, lengths, 3)}
        if ragged
        else {"input": steps.view(2, 3, 2), "target": labels.view(2, 3)}
    )
    measured = StepLabelsSpec().build(STREAM).measure(net, Batch(given, Place.of(3 if ragged else 2), lambda: None))
    outputs = net(given["input"])
    assert outputs.shape == (6, 4)
    torch.testing.assert_close(measured.loss, F.cross_entropy(outputs, labels.long(), reduction="sum"))
    assert measured.sums.tolist() == [(outputs.argmax(1) == labels).sum()]


# -- runs ----------------------------------------------------------------------------------------------------------


def ranks(jobs):
    line = [sys.executable, "-m", "tests.unit.ranks", json.dumps(jobs)]
    return json.loads(subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def lines(path: Path, split: str):
    found = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["split"] == split]


def figures(path: Path, split: str) -> np.ndarray:
    return np.array([[line[name] for name in ("loss", "bits_per_token", "accuracy")] for line in lines(path, split)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Undisturbed for 0 and 2 ranks; killed in mid-stream and resumed on as many; on 2 and resumed on none."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = {**RECIPE, "train": {**RECIPE["train"], "checkpoint_every_steps": 2}}
    jobs = []
    for name, *worlds in (("0", 0), ("1", 1), ("2", 2), ("0 again", 0, 0), ("2 again", 2, 2), ("2 then 0", 2, 0)):
        for turn, world in enumerate(worlds):
            dies = {"dies_at": 8} if turn + 1 < len(worlds) else {}
            jobs.append({"recipe": recipe, "run": str(folder / name), "world_size": world, **dies})
    codes = ranks(jobs)
    assert [set(found) for found in codes] == [{9} if "dies_at" in job else {0} for job in jobs]
    return folder


@pytest.mark.parametrize("other", ["1", "2", "2 then 0"])
def test_streams_are_the_same_for_any_number_of_ranks(runs, other):
    whole, other = runs / "0", runs / other
    digests = [
        [line["rows_digest"] for line in lines(path, "train") if "rows_digest" in line] for path in (whole, other)
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 2
    for split in ("train", "validation", "test"):
        # float32 sums in another order
        np.testing.assert_allclose(figures(other, split), figures(whole, split), rtol=2e-4)


@pytest.mark.parametrize("world", ["0", "2"])
def test_killed_in_mid_stream_it_ends_bit_for_bit_the_same(runs, world):
    whole, other = runs / world, runs / f"{world} again"
    assert np.array_equal(figures(whole, "validation"), figures(other, "validation"))
    assert np.array_equal(figures(whole, "train"), figures(other, "train"))
    states = [Checkpoints(Folder(path / "checkpoints"), keep=1).newest()["model"] for path in (whole, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"kind": "gru", "bidirectional": True}},
            "objective.kind: gru reads each text from its end as well, so it has seen the next token; "
            "set model.bidirectional to false",
        ),
        (
            {"model": {"kind": "lstm", "tied": True, "hidden": 8, "embedding": 5}},
            "model.tied: an embedding of 5 and 8 outputs of the cells; give both one size",
        ),
        ({"model": {"kind": "rnn", "permutation": 3}}, "model.permutation: tokens 6 over 7 words has no fixed number"),
        ({"model": {"kind": "mlp"}}, "objective.kind: next_token takes no model that gives row, as mlp does"),
        ({"objective": {"kind": "classification"}}, "objective.kind: classification needs a label to predict, but"),
        ({"data": {"kind": "digits"}}, "objective.kind: next_token needs labels to predict, but digits has a label"),
        (
            {"model": {"kind": "gru", "reset": "before", "layer_norm": True}},
            "model.layer_norm: goes with reset: after only; leave one of them out",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    signature = Signature(columns={"input": Tokens(size=7), "target": Label(size=3)}) if "data" in changes else STREAM
    columns = {name: StoredColumn(column=column, dtype="int32") for name, column in signature.columns.items()}
    shard = Shard(file="train-00000.parquet", rows=90, row_groups=(90,), bytes=1, sha256="")
    manifest = Manifest(source="made", columns=columns, splits={"train": (shard,)})
    with pytest.raises(UserError) as caught:
        check(load_recipe({**RECIPE, **changes}), manifest)
    assert message in str(caught.value)
