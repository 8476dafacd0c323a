"""Loader: whatever holds the rows, a rank gets those that the order says, normalised as the manifest says."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.data.augment import Augmentation
from cluster.data.keys import digest_part
from cluster.data.loader import HeldRows, HeldTraining, StreamedTraining
from cluster.data.order import LaneOrder, WholeOrder, held, shuffle_window, training_order
from cluster.data.scaling import Normalise
from cluster.data.shards import DataSet
from cluster.data.sources.images import DigitsSpec
from cluster.recipe.loading import load_recipe
from cluster.training.splits import open_splits
from nn_models.errors import UserError
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")

CPU = torch.device("cpu")
KINDS = ["images", "features", "numbers"]
WINDOW = 60  # rows: less than the set, so that it is streamed


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, DataSet]:
    """Prepared sets of 640 training rows in 20 row groups, and of 160 in 5."""
    folder = tmp_path_factory.mktemp("sets")
    specs = {
        "images": made.images(folder / "images", 800),
        "features": made.features(folder / "features", 800),
        "numbers": made.features(folder / "numbers", 800, target="number"),
        "few images": made.images(folder / "few", 200),
    }
    return {kind: made.written(spec, folder / kind / "out") for kind, spec in specs.items()}


def training(data: DataSet, *, window=None, batch=50, seed=0, rank=0, world_size=1, augmentation=None):
    """A rank's training rows: held, or streamed where there is a window."""
    order = training_order(data.manifest, global_batch_size=batch, seed=seed, window=window)
    place = {"rank": rank, "world_size": world_size, "augmentation": augmentation}
    if window is None:
        return HeldTraining(HeldRows(data.table("train"), data.manifest, CPU), order, **place)
    return StreamedTraining(data, order, device=CPU, **place)


def normalised(data: DataSet, inputs: np.ndarray) -> np.ndarray:
    """What a model reads, computed by NumPy in float64."""
    manifest = data.manifest
    shape = (-1, 1, 1) if inputs.ndim == 4 else (-1,)
    unit = 255 if manifest.input_dtype == "uint8" else 1
    return (inputs / unit - np.reshape(manifest.mean, shape)) / np.reshape(manifest.std, shape)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["held", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_gets_the_rows_of_the_order(kind, window, sets):
    data = sets[kind]
    stored = made.split_rows(data, "train")
    whole: dict[int, list[int]] = {}
    for world_size in (1, 2, 3, 5):
        digest = np.zeros(2, np.int64)
        ranks = [training(data, window=window, rank=rank, world_size=world_size) for rank in range(world_size)]
        order = ranks[0].order
        assert isinstance(order, WholeOrder if window is None else LaneOrder)
        for step, batches in enumerate(zip(*(rows.batches(1, 0) for rows in ranks), strict=True)):
            assert sum(batch.num_rows for batch in batches) == batches[0].global_rows == order.global_rows(1, step)
            for rank, batch in enumerate(batches):
                assert batch.ids.tolist() == order.rows(1, step, rank, world_size).tolist()
                assert len(batch.inputs) == len(batch.targets) == max(1, batch.num_rows)
                inputs, targets = batch.inputs.numpy()[: batch.num_rows], batch.targets.numpy()[: batch.num_rows]
                # float32 of float64: three roundings of numbers up to 10
                np.testing.assert_allclose(inputs, normalised(data, stored.inputs[batch.ids]), rtol=1e-5, atol=1e-5)
                np.testing.assert_array_equal(targets, stored.targets[batch.ids])
                assert batch.inputs.dtype == torch.float32
                assert batch.targets.dtype == (torch.float32 if kind == "numbers" else torch.int64)
                digest += digest_part(batch.ids, batch.start)
            whole.setdefault(world_size, []).extend(row for batch in batches for row in batch.ids.tolist())
        assert step + 1 == order.num_steps
        assert sorted(whole[world_size]) == list(range(640))
        assert whole[world_size] == whole[1]


@pytest.mark.parametrize("window", [None, WINDOW], ids=["held", "streamed"])
def test_resuming_at_a_step_gives_the_tail(window, sets):
    rows = training(sets["images"], window=window, rank=1, world_size=2)
    whole = list(rows.batches(2, 0))
    for first in (1, 7, len(whole) - 1, len(whole)):
        tail = list(rows.batches(2, first))
        assert len(tail) == len(whole) - first
        for batch, other in zip(tail, whole[first:], strict=True):
            assert (batch.start, batch.ids.tolist()) == (other.start, other.ids.tolist())
            assert torch.equal(batch.inputs, other.inputs)
            assert torch.equal(batch.targets, other.targets)


def test_epochs_may_be_walked_in_any_order(sets):
    rows = training(sets["features"], window=WINDOW)
    first = [batch.ids.tolist() for batch in rows.batches(0, 0)]
    other = [batch.ids.tolist() for batch in rows.batches(5, 0)]
    assert [batch.ids.tolist() for batch in rows.batches(0, 0)] == first != other


@pytest.mark.parametrize("window", [None, WINDOW], ids=["held", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_stands_in_for_an_empty_slice(kind, window, sets):
    world_size = 9 if window is None else 6  # six lanes share a batch of eight unevenly
    ranks = [training(sets[kind], window=window, batch=8, rank=r, world_size=world_size) for r in range(world_size)]
    steps = list(zip(*(rows.batches(0, 0) for rows in ranks), strict=True))
    assert len(steps) == 80
    batches = [batch for step in steps for batch in step]
    assert sum(batch.num_rows for batch in batches) == 640
    empty = [batch for batch in batches if batch.num_rows == 0]
    assert empty
    for batch in empty:
        assert len(batch.ids) == 0
        assert len(batch.inputs) == len(batch.targets) == 1
        assert batch.global_rows > 0


def test_every_step_of_a_streamed_set_has_rows():
    order = LaneOrder([1, 40, 3, 3, 2] * 9, global_batch_size=2, seed=0, window=1)
    assert min(order.global_rows(0, step) for step in range(order.num_steps)) >= 1


def test_batches_of_equal_lanes_differ_by_one_row():
    for batch in (5, 24, 32, 100, 127):
        order = LaneOrder([16] * 48, global_batch_size=batch, seed=0, window=1)
        whole = WholeOrder(16 * 48, global_batch_size=batch, seed=0)
        sizes = [order.global_rows(0, step) for step in range(order.num_steps)]
        assert sizes == [whole.global_rows(0, step) for step in range(whole.num_steps)]


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 8])
def test_ranks_of_a_streamed_set_get_like_shares(world_size):
    order = LaneOrder([16] * 40, global_batch_size=64, seed=0, window=1)  # some lanes have one row group more
    for step in range(order.num_steps):
        shares = [len(order.rows(0, step, rank, world_size)) for rank in range(world_size)]
        assert max(shares) <= 64 / world_size * 1.5 + 1  # 40 row groups on 24 lanes: 2 or 1 each


def test_evaluation_passes_over_each_row_once(sets):
    data = sets["images"]
    rows = HeldRows(data.table("test"), data.manifest, CPU)
    stored = made.split_rows(data, "test")
    for world_size in (1, 3, 100):
        seen, targets = [], []
        for rank in range(world_size):
            for raw, inputs, labels in rows.pass_over(7, rank=rank, world_size=world_size):
                assert len(raw) == len(inputs) <= 7
                seen.append(raw.numpy())
                targets += labels.tolist()
        np.testing.assert_array_equal(np.concatenate(seen), stored.inputs)
        assert targets == stored.targets.tolist()


def test_one_row(tmp_path):
    data = made.written(made.features(tmp_path / "in", 1, target="number"), tmp_path / "out")
    (batch,) = training(data, batch=128).batches(0, 0)
    assert (batch.num_rows, batch.global_rows) == (1, 1)
    assert batch.inputs.tolist() == [[0.0] * 4]  # a constant is its own mean
    (idle,) = training(data, batch=128, rank=0, world_size=3).batches(0, 0)
    assert idle.num_rows == 0


def test_normalised_training_rows_have_mean_0_and_deviation_1(sets):
    for kind in ("images", "features"):
        data = sets[kind]
        inputs = torch.from_numpy(np.array(made.split_rows(data, "train").inputs))
        ready = Normalise(data.manifest, CPU)(inputs).double()
        ready = ready.movedim(1, -1).flatten(0, -2) if kind == "images" else ready
        torch.testing.assert_close(ready.mean(0), torch.zeros_like(ready[0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(ready.std(0, correction=0), torch.ones_like(ready[0]), atol=1e-5, rtol=0)


def test_grey_images_are_normalised(tmp_path):
    data = made.written(made.images(tmp_path / "in", 100, shape=(1, 5, 4)), tmp_path / "out")
    stored = made.split_rows(data, "train").inputs
    ready = Normalise(data.manifest, CPU)(torch.from_numpy(np.array(stored)))
    np.testing.assert_allclose(ready.numpy(), normalised(data, stored), atol=1e-5)


def test_the_window_follows_from_recipe_and_manifest(sets, monkeypatch):
    manifest = sets["images"].manifest
    assert manifest.row_bytes == 3 * 6 * 5 + 8
    assert shuffle_window(manifest, None) is None
    assert shuffle_window(manifest, 639) == 639
    assert shuffle_window(manifest, 640) is None
    assert held(manifest, "train", None)
    assert not held(manifest, "train", 100)
    monkeypatch.setattr("cluster.data.order.HELD_BYTES", 640 * manifest.row_bytes - 1)
    assert shuffle_window(manifest, None) == 159
    monkeypatch.setattr("cluster.data.order.HELD_BYTES", 80 * manifest.row_bytes - 1)
    with pytest.raises(UserError, match=r"data: the validation split has 80 rows of 98 bytes.*hold out less"):
        held(manifest, "validation", None)


def test_only_what_is_held_travels(sets):
    data = sets["features"]
    assert set(open_splits(data, window=None).tables) == {"train", "validation", "test"}
    assert set(open_splits(data, window=WINDOW).tables) == {"validation", "test"}


def test_a_damaged_shard_is_named_while_it_is_streamed(tmp_path):
    data = made.written(made.images(tmp_path / "in", 3000, row_group_size=1000), tmp_path / "out")
    file = tmp_path / "out" / "train-00001.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=rf"{file}: the shard cannot be read"):
        for _ in training(data, window=100).batches(0, 0):
            pass
    with pytest.raises(UserError, match=rf"{file}: the shard does not have the checksum"):
        training(data)


def test_an_epoch_that_is_left_early_ends_its_threads(sets):
    import threading

    batches = training(sets["features"], window=WINDOW).batches(0, 0)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards")]


def test_more_ranks_than_lanes_are_refused(sets):
    with pytest.raises(UserError, match="25 workers cannot share 12 lanes"):
        training(sets["features"], window=WINDOW, batch=20, rank=0, world_size=25)


# -- augmentation ----------------------------------------------------------------------------------------------------

AUGMENT = [
    {"kind": "horizontal_flip"},
    {"kind": "random_crop", "padding": 1},
    {"kind": "rotation"},
    {"kind": "resized_crop"},
    {"kind": "color_jitter"},
    {"kind": "erasing"},
]


def augmentation(seed: int = 0, shape=(3, 6, 5)) -> Augmentation:
    recipe = load_recipe({"model": {"kind": "mlp"}, "data": {"kind": "digits", "augment": AUGMENT}})
    return Augmentation(recipe.data.augment, shape=shape, seed=seed)


def test_augmentation_leaves_the_gpus_stream_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("the GPU is seeded"))
    images = torch.zeros(2, 3, 6, 5, dtype=torch.uint8)
    augmentation()(images, np.arange(2), epoch=0)


def by_row(data: DataSet, **where) -> dict[int, torch.Tensor]:
    """Row id -> what became of it in epoch 3."""
    changed = {}
    for batch in training(data, augmentation=augmentation(), **where).batches(3, 0):
        changed |= dict(zip(batch.ids.tolist(), batch.inputs, strict=False))
    return changed


def test_augmentation_is_a_function_of_seed_epoch_and_row(sets):
    data = sets["few images"]
    alone = by_row(data)
    assert len(alone) == 160
    torch.manual_seed(12345)
    for where in ({"batch": 17}, {"window": WINDOW}, {"rank": 1, "world_size": 2}):
        other = by_row(data, **where)
        assert all(torch.equal(alone[row], image) for row, image in other.items())
    plain = {
        row: image
        for batch in training(data).batches(3, 0)
        for row, image in zip(batch.ids.tolist(), batch.inputs, strict=True)
    }
    assert sum(torch.equal(alone[row], plain[row]) for row in plain) < 5


def test_other_seeds_epochs_and_rows_are_changed_otherwise():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 6, 5), dtype=np.uint8))
    ids = np.array([7])
    changed = [augmentation()(image, ids, 0), augmentation(1)(image, ids, 0), augmentation()(image, ids, 1)]
    changed.append(augmentation()(image, np.array([8]), 0))
    assert len({tuple(one.flatten().tolist()) for one in changed}) == 4
    assert torch.equal(augmentation()(image, ids, 0), changed[0])
    assert changed[0].dtype == torch.uint8
    assert changed[0].shape == image.shape


def test_augmentation_leaves_torchs_generator_alone():
    images = torch.zeros(4, 3, 6, 5, dtype=torch.uint8)
    before = torch.get_rng_state()
    augmentation()(images, np.arange(4), 0)
    assert torch.equal(torch.get_rng_state(), before)


# -- memory ----------------------------------------------------------------------------------------------------------


def peak_of_streaming(data: DataSet) -> tuple[int, int]:
    """(bytes of NumPy's arrays, bytes of Arrow's buffers) at the worst moment of an epoch."""
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        for _ in training(data, window=500, batch=200).batches(0, 0):
            pass
        return tracemalloc.get_traced_memory()[1], pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


def test_streaming_a_larger_set_needs_no_more_memory(tmp_path):
    peaks = []
    for rows in (2_000, 8_000):  # of 1.5 kB: the small set has 3 MB, the large one 12 MB
        folder = tmp_path / str(rows)
        spec = made.images(folder, rows, shape=(3, 32, 16), row_group_size=1000, validation_fraction=0, test_fraction=0)
        peaks.append(peak_of_streaming(made.written(spec, folder / "out")))
    (small_numpy, small_arrow), (large_numpy, large_arrow) = peaks
    # Two blocks of each of 24 lanes are in memory, each of one row group of 42 rows: 3 MB, and a batch of 1 MB. The
    # order of the larger set takes some kB more, and the threads may read another two row groups at once.
    assert 2e6 < small_numpy < 6e6
    assert large_numpy - small_numpy < 1e6
    assert small_arrow > 1e4
    assert large_arrow - small_arrow < 1e6


def test_digits_can_be_streamed(tmp_path):
    data = made.written(DigitsSpec(), tmp_path / "out")
    assert sum(batch.num_rows for batch in training(data, window=200, batch=64).batches(0, 0)) == 1258
