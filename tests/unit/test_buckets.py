"""Buckets: rows of like length in one batch, as the recipe says, and equal for any number of ranks."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from cluster.data.order import Buckets, WholeOrder
from cluster.data.prepare import prepared
from cluster.recipe.fit import check
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints
from cluster.training.splits import open_splits
from nn_models.errors import UserError
from tests.toy.chapter import TOY, ToyRecipe, ToyTextSpec


class ToyRowsSpec(ToyTextSpec):
    """The toy's windows as rows that have nothing to do with each other."""

    order: ClassVar[Literal["shuffled", "streams"]] = "shuffled"
    kind: Literal["toy_rows"] = "toy_rows"  # type: ignore[assignment]


class RowsRecipe(ToyRecipe):
    """A recipe on them."""

    data: Annotated[ToyRowsSpec | ToyTextSpec, Field(discriminator="kind")]  # type: ignore[assignment]


def recipe(**data):
    train = {**TOY["train"], "checkpoint_every_steps": 2}
    return {**TOY, "data": {"kind": "toy_rows", "validation_fraction": 0.2, **data}, "train": train}


# -- the order -------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9), st.integers(0, 9))
def test_batches_share_the_rows_of_their_window_by_length(num_rows, batch, num_steps, seed):
    lengths = np.random.default_rng(seed).integers(1, 50, num_rows, dtype=np.int32)
    plain = WholeOrder(num_rows, global_batch_size=batch, seed=seed)
    order = WholeOrder(num_rows, global_batch_size=batch, seed=seed, buckets=Buckets(num_steps, lengths))
    assert order.num_steps == plain.num_steps
    for first in range(0, plain.num_steps, num_steps):
        steps = range(first, min(first + num_steps, plain.num_steps))
        whose = {each: [each.rows(2, step, 0, 1) for step in steps] for each in (plain, order)}
        sizes = [[len(rows) for rows in found] for found in whose.values()]
        assert sizes[0] == sizes[1]
        together = [sorted(np.concatenate(found).tolist()) for found in whose.values()]
        assert together[0] == together[1]
        spans = sorted((lengths[rows].min(), lengths[rows].max()) for rows in whose[order])
        assert all(low[1] <= high[0] for low, high in itertools.pairwise(spans))
        for rows in whose[order]:
            assert (np.diff(lengths[rows]) >= 0).all()  # so a batch's pieces pad little as well
        longest = [sum(int(lengths[rows].max()) for rows in found) for found in whose.values()]
        if len(set(sizes[0])) == 1:  # with batches of two sizes, the larger may now have longer rows
            assert longest[1] <= longest[0]


def test_a_bucket_of_one_batch_keeps_what_each_holds():
    lengths = np.random.default_rng(0).integers(1, 50, 103, dtype=np.int32)
    plain = WholeOrder(103, global_batch_size=10, seed=0)
    order = WholeOrder(103, global_batch_size=10, seed=0, buckets=Buckets(1, lengths))
    for step in range(plain.num_steps):
        assert sorted(order.rows(1, step, 0, 1)) == sorted(plain.rows(1, step, 0, 1))


def test_short_rows_do_not_always_come_first():
    lengths = np.arange(100, dtype=np.int32)
    order = WholeOrder(100, global_batch_size=10, seed=0, buckets=Buckets(10, lengths))
    firsts = {int(order.rows(epoch, 0, 0, 1).min()) for epoch in range(8)}
    assert len(firsts) > 2


def test_the_recipe_says_so_and_batches_pad_less():
    described = {bucket: RowsRecipe.model_validate(recipe(bucket=bucket)) for bucket in (None, 1, 4)}
    splits = open_splits(prepared(described[None].data), window=None)
    padding = {}
    held = {}
    for bucket, one in described.items():
        rows = splits.training(one, rank=0, world_size=1, device=torch.device("cpu"))
        batches = [batch["input"] for (batch,) in rows.batches(0)]
        padding[bucket] = sum(len(text.lengths) * text.longest - int(text.lengths.sum()) for text in batches)
        held[bucket] = [sorted(rows.order.rows(0, step, 0, 1).tolist()) for step in range(rows.order.num_steps)]
    assert padding[4] < padding[1] == padding[None]
    assert held[1] == held[None] != held[4]


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Undisturbed for 0 to 3 ranks, and killed in mid-epoch and resumed on none, on 2, and on 2 and then none."""
    folder = tmp_path_factory.mktemp("buckets")
    jobs = []
    for name, *worlds in (
        *(("0", 0), ("1", 1), ("2", 2), ("3", 3)),
        *(("0 again", 0, 0), ("2 again", 2, 2), ("2 then 0", 2, 0)),
    ):
        for turn, world in enumerate(worlds):
            dies = {"dies_at": 14} if turn + 1 < len(worlds) else {}  # of 9 steps an epoch
            job = {"class": "tests.unit.test_buckets:RowsRecipe", "recipe": recipe(bucket=3)}
            jobs.append({**job, "run": str(folder / name), "world_size": world, **dies})
    line = [sys.executable, "-m", "tests.unit.ranks", json.dumps(jobs)]
    output = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    assert [set(found) for found in json.loads(output)] == [{9} if "dies_at" in job else {0} for job in jobs]
    return folder


def lines(path: Path):
    found = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["split"] == "train"]


@pytest.mark.parametrize("other", ["1", "2", "3", "2 then 0"])
def test_any_number_of_ranks_sees_the_same(runs, other):
    digests, losses = (
        [[line[name] for line in lines(runs / run) if name in line] for run in ("0", other)]
        for name in ("rows_digest", "loss")
    )
    assert digests[0] == digests[1]
    assert len(digests[0]) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4)  # float32 sums in another order


@pytest.mark.parametrize("world", ["0", "2"])
def test_killed_in_mid_epoch_it_ends_bit_for_bit_the_same(runs, world):
    states = [
        Checkpoints(Folder(runs / name / "checkpoints"), keep=1).newest()["model"] for name in (world, f"{world} again")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (
            lambda: load_recipe({"model": {"kind": "mlp"}, "data": {"kind": "digits", "bucket": 4}}),
            "data.bucket: 4: rows of digits are all of one length; leave it out",
        ),
        (
            lambda: RowsRecipe.model_validate({**TOY, "data": {"kind": "toy_text", "bucket": 4}}),
            "data.bucket: 4: rows are windows of one text, in its order; leave it out",
        ),
        (
            lambda: RowsRecipe.model_validate(recipe(bucket=4, shuffle_window=20)),
            "data.bucket: 4: rows that are streamed are shuffled within their windows only; "
            "leave it or data.shuffle_window out",
        ),
    ],
)
def test_what_has_no_buckets_is_refused(described, message):
    one = described()
    with pytest.raises(UserError) as caught:
        check(one, prepared(one.data).manifest)
    assert str(caught.value) == message
