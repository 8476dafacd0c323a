"""Pairs: what an image is made from travels with it, through the shards to the batches."""

import json
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster.data.augment import augmentation_of
from cluster.data.layouts import Dense
from cluster.data.loader import Held, HeldRows, Reading, RowsOfRank, StreamedRows
from cluster.data.order import LaneOrder, training_order
from cluster.data.prepare import prepared
from cluster.data.rows import Rows
from cluster.data.shards import ROW_GROUP_BYTES, DataSet, write_shard
from cluster.data.sources.base import labels, pixels
from cluster.data.sources.catalogue import AnyDataSpec
from cluster.data.sources.images import DigitsSpec
from cluster.data.sources.pairs import PairsSpec
from cluster.recipe.fit import check
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from nn_models.batch import Batch
from nn_models.errors import UserError
from nn_models.spec import validate
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")

CPU = torch.device("cpu")
GAN = {"model": {"kind": "pix2pix", "width": 4}, "objective": {"kind": "adversarial"}}


# -- shards ----------------------------------------------------------------------------------------------------------


def test_row_groups_hold_both_images_within_their_bytes(tmp_path):
    images = Dense(np.zeros((100, 3, 100, 300), np.uint8))
    rows = Rows(np.arange(100), {"input": images, "target": Dense(np.zeros(100, np.int64)), "condition": images})
    columns = {"input": pixels((3, 100, 300)), "target": labels(("all",)), "condition": pixels((3, 100, 300))}
    shard = write_shard(Folder(tmp_path), "a.parquet", rows, columns)
    assert max(shard.row_groups) == ROW_GROUP_BYTES // 180_000
    assert pq.read_schema(tmp_path / "a.parquet").names == ["row", "input", "target", "condition"]


def test_other_sources_are_written_as_ever(tmp_path):
    data = made.written(made.images(tmp_path / "in", 40), tmp_path / "out")
    assert "condition" not in (tmp_path / "out" / "manifest.json").read_text()
    assert data.table("train").column_names == ["row", "input", "target"]
    assert data.manifest.signature.condition_shape is None


def test_shards_that_do_not_fit_the_condition_are_named(tmp_path):
    data = made.written(PairsSpec(edges_of=DigitsSpec()), tmp_path / "out")
    assert data.manifest.row_bytes == 64 + 64 + 8
    file = tmp_path / "out" / "manifest.json"
    content = json.loads(file.read_text())
    assert content["columns"]["condition"]["column"]["shape"] == [1, 8, 8]
    content["columns"]["condition"]["column"]["shape"] = [1, 9, 9]
    file.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"parquet: the shard holds \S+ in column condition where manifest.json says \S+; de"
    ):
        DataSet(str(tmp_path / "out")).verify()


# -- batches ---------------------------------------------------------------------------------------------------------

WINDOW = 60


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> DataSet:
    """640 training rows in 20 row groups: colour images to be made from their edges."""
    folder = tmp_path_factory.mktemp("pairs")
    return made.written(PairsSpec(edges_of=made.images(folder / "in", 800, shape=(3, 6, 7))), folder / "out")


def training(
    data: DataSet, *, window=None, batch=50, rank=0, world_size=1, augmentation=None, first_step=0
) -> Iterator[Batch]:
    """A rank's batches of epoch 1, from -1 to 1 as pix2pix reads them."""
    order = training_order(data.manifest, global_batch_size=batch, seed=0, window=window)
    names = set(data.manifest.columns)
    reading = Reading(data.manifest, CPU, names=names, scale="symmetric", seed=0, augmentation=augmentation)
    rows: RowsOfRank
    if isinstance(order, LaneOrder):
        rows = StreamedRows(data, order, reading, rank=rank, world_size=world_size)
    else:
        held = Held(data.table("train"), data.manifest, CPU, names=names)
        rows = HeldRows(held, order, reading, rank=rank, world_size=world_size)
    return (batch for (batch,) in rows.batches(1, first_step))


@pytest.mark.parametrize("window", [None, WINDOW], ids=["held", "streamed"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_row_comes_with_what_it_is_made_from(window, world_size, pairs):
    stored = made.split_rows(pairs, "train").columns["condition"].values
    expected = torch.from_numpy(stored.astype(np.float32)) / 127.5 - 1
    seen = 0
    for rank in range(world_size):
        for batch in training(pairs, window=window, rank=rank, world_size=world_size):
            ids = batch.place.ids
            assert batch["condition"].dtype == torch.float32
            assert torch.equal(batch["condition"][: len(ids)], expected[ids])
            np.testing.assert_array_equal(batch.stored["condition"][: len(ids)].numpy(), stored[ids])
            seen += len(ids)
    assert seen == 640
    assert expected.min() == -1
    assert expected.max() <= 1


@pytest.mark.parametrize("window", [None, WINDOW], ids=["held", "streamed"])
def test_a_row_that_stands_in_has_a_condition_too(window, pairs):
    world_size = 9 if window is None else 6
    empty = [
        batch
        for rank in range(world_size)
        for batch in training(pairs, window=window, batch=8, rank=rank, world_size=world_size)
        if not batch.place.num_rows
    ]
    assert empty
    assert {tuple(batch["condition"].shape) for batch in empty} == {(1, 1, 6, 7)}


def test_resuming_at_a_step_gives_the_same_conditions(pairs):
    for window in (None, WINDOW):
        tail = list(training(pairs, window=window, first_step=7))
        for batch, other in zip(list(training(pairs, window=window))[7:], tail, strict=True):
            assert torch.equal(batch["condition"], other["condition"])


def test_rows_of_other_sources_have_no_condition(tmp_path):
    plain = made.written(made.images(tmp_path / "in", 40), tmp_path / "out")
    for window in (None, 20):
        assert not any("condition" in batch for batch in training(plain, window=window))


def test_a_condition_has_no_mean_and_deviation(pairs):
    assert (pairs.manifest.columns["condition"].mean, pairs.manifest.columns["condition"].std) == ((), ())
    message = "data: no mean and deviation of its condition are kept, which standard inputs need; choose a model that"
    with pytest.raises(UserError, match=message):
        Reading(pairs.manifest, CPU, names={"input", "condition"}, scale="standard", seed=0)


# -- augmentation ----------------------------------------------------------------------------------------------------

MOVING = [
    {"kind": "horizontal_flip"},
    {"kind": "random_crop", "padding": 2},
    {"kind": "rotation", "degrees": 90},
    {"kind": "resized_crop"},
]


def test_both_images_are_moved_alike(tmp_path):
    images = made.images(tmp_path / "in", 30, shape=(3, 6, 7), row_group_size=8)
    copies = {"kind": "pairs", "path": images.path, "condition": "x", "input": "x"}  # each is to be made from itself
    copies |= {"image_shape": [3, 6, 7], "validation_fraction": 0, "test_fraction": 0, "augment": MOVING}
    data = prepared(validate(AnyDataSpec, copies, prefix="data"))
    specs = load_recipe(GAN | {"data": copies}).data.augment
    augmentation = augmentation_of(specs, data.manifest.signature, {"input", "condition"})
    changed: dict[int, torch.Tensor] = {}
    for window in (None, 10):
        for batch in training(data, window=window, batch=8, augmentation=augmentation):
            assert torch.equal(batch.stored["input"], batch.stored["condition"])
            for row, image in zip(batch.place.ids.tolist(), batch.stored["condition"], strict=True):
                assert torch.equal(changed.setdefault(row, image), image)  # held or streamed
    plain = made.split_rows(data, "train").columns["condition"].values
    same = [np.array_equal(changed[row].numpy(), plain[row]) for row in changed]
    assert sum(same) < 5


@pytest.mark.parametrize("kind", ["color_jitter", "erasing"])
def test_what_would_change_them_otherwise_is_refused(kind, pairs):
    augment = [{"kind": "horizontal_flip"}, {"kind": kind}]
    for section in ({"kind": "pairs", "edges_of": {"kind": "digits"}}, {"kind": "shards", "path": "x"}):
        with pytest.raises(UserError) as caught:
            check(load_recipe(GAN | {"data": section | {"augment": augment}}), pairs.manifest)
        assert str(caught.value) == (
            f"data.augment: {kind} would not change both images of a pair alike; leave it out, and use "
            "horizontal_flip, random_crop, rotation, resized_crop"
        )
    check(
        load_recipe(GAN | {"data": {"kind": "pairs", "edges_of": {"kind": "digits"}, "augment": MOVING}}),
        pairs.manifest,
    )
