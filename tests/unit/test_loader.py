"""Loader: whatever holds the rows, a rank gets those that the order says, at the scale that is asked for."""

import itertools
import threading
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from cluster.data.keys import digest_part, row_keys
from cluster.data.loader import Held, HeldRows, Reading, RowsOfRank, StreamedRows
from cluster.data.order import InOrder, LaneOrder, StreamOrder, WholeOrder, training_order
from cluster.data.shards import DataSet
from cluster.data.sources.images import DigitsSpec
from cluster.training.splits import open_splits
from nn_models.batch import Batch, Ragged
from nn_models.errors import UserError
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")

CPU = torch.device("cpu")
KINDS = ["images", "features", "numbers"]
WINDOW = 60  # rows: less than the set, so that it is streamed
HELD_OR_STREAMED = pytest.mark.parametrize("window", [None, WINDOW], ids=["held", "streamed"])


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, DataSet]:
    """Prepared sets of 640 training rows in 20 row groups."""
    folder = tmp_path_factory.mktemp("sets")
    specs = {
        "images": made.images(folder / "images", 800),
        "features": made.features(folder / "features", 800),
        "numbers": made.features(folder / "numbers", 800, target="number"),
        "ragged": made.ragged(800),
    }
    return {kind: made.written(spec, folder / kind / "out") for kind, spec in specs.items()}


def training(
    data: DataSet, *, window=None, batch=50, seed=0, rank=0, world_size=1, names=None, counts=None, device=CPU
) -> RowsOfRank:
    """A rank's training rows: held, or streamed where there is a window."""
    weights = 1 if counts is None else data.lengths("train", counts)
    order = training_order(data.manifest, global_batch_size=batch, seed=seed, window=window, weights=weights)
    reading = Reading(data.manifest, device, names=names or set(data.manifest.columns), scale="standard", seed=seed)
    if isinstance(order, LaneOrder):
        return StreamedRows(data, order, reading, rank=rank, world_size=world_size)
    rows = Held(data.table("train"), data.manifest, device, names=reading.names)
    return HeldRows(rows, order, reading, rank=rank, world_size=world_size)


def whole(rows: RowsOfRank, epoch: int, first_step: int = 0) -> list[Batch]:
    """The rank's batches of an epoch, each in one piece."""
    batches = []
    for pieces in rows.batches(epoch, first_step):
        assert len(pieces) == 1
        batches += pieces
    return batches


def of_ranks(data: DataSet, world_size: int, epoch: int, **where) -> list[tuple[Batch, ...]]:
    """The batches of all ranks, step by step: equally many of each."""
    ranks = [training(data, rank=rank, world_size=world_size, **where) for rank in range(world_size)]
    return list(zip(*(whole(rows, epoch) for rows in ranks), strict=True))


def normalised(data: DataSet, inputs: np.ndarray) -> np.ndarray:
    """What a model reads, computed by NumPy in float64."""
    stored = data.manifest.columns["input"]
    shape = (-1, 1, 1) if inputs.ndim == 4 else (-1,)
    unit = 255 if stored.dtype == "uint8" else 1
    return (inputs / unit - np.reshape(stored.mean, shape)) / np.reshape(stored.std, shape)


@HELD_OR_STREAMED
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_gets_the_rows_of_the_order(kind, window, sets):
    data = sets[kind]
    stored = made.split_rows(data, "train").columns
    order = training(data, window=window).order
    assert isinstance(order, WholeOrder if window is None else LaneOrder)
    seen: dict[int, list[int]] = {}
    for world_size in (1, 2, 3, 5):
        digest = np.zeros(2, np.int64)
        for step, batches in enumerate(of_ranks(data, world_size, 1, window=window)):
            places = [batch.place for batch in batches]
            assert sum(place.num_rows for place in places) == places[0].global_rows == order.global_rows(1, step)
            for rank, batch in enumerate(batches):
                place = batch.place
                assert place.ids.tolist() == order.rows(1, step, rank, world_size).tolist()
                assert len(batch["input"]) == len(batch["target"]) == len(batch.keys) == max(1, place.num_rows)
                inputs, targets = batch["input"][: place.num_rows], batch["target"][: place.num_rows]
                # float32 of float64: three roundings of numbers up to 10
                expected = normalised(data, stored["input"].values[place.ids])
                np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-5)
                wanted = stored["target"].values[place.ids]
                if kind == "numbers":  # standardised
                    moments = data.manifest.columns["target"]
                    wanted = (wanted.astype(np.float64) - moments.mean) / moments.std
                np.testing.assert_allclose(targets.numpy(), wanted, rtol=1e-5, atol=1e-5)
                for name in ("input", "target"):
                    raw = batch.stored[name][: place.num_rows]
                    np.testing.assert_array_equal(raw.numpy(), stored[name].values[place.ids])
                assert batch.keys[: place.num_rows].tolist() == row_keys(0, 1, place.ids).tolist()
                assert batch["input"].dtype == torch.float32
                assert batch["target"].dtype == (torch.float32 if kind == "numbers" else torch.int64)
                digest += digest_part(place.ids, place.start)
            seen.setdefault(world_size, []).extend(row for place in places for row in place.ids.tolist())
        assert step + 1 == order.num_steps
        assert sorted(seen[world_size]) == list(range(640))
        assert seen[world_size] == seen[1]


@HELD_OR_STREAMED
def test_resuming_at_a_step_gives_the_tail(window, sets):
    rows = training(sets["images"], window=window, rank=1, world_size=2)
    batches = whole(rows, 2)
    for first in (1, 7, len(batches) - 1, len(batches)):
        tail = whole(rows, 2, first)
        assert len(tail) == len(batches) - first
        for batch, other in zip(tail, batches[first:], strict=True):
            assert (batch.place.start, batch.place.ids.tolist()) == (other.place.start, other.place.ids.tolist())
            assert torch.equal(batch["input"], other["input"])
            assert torch.equal(batch["target"], other["target"])
            assert torch.equal(batch.keys, other.keys)


def test_epochs_may_be_walked_in_any_order(sets):
    rows = training(sets["features"], window=WINDOW)
    first = [batch.place.ids.tolist() for batch in whole(rows, 0)]
    other = [batch.place.ids.tolist() for batch in whole(rows, 5)]
    assert [batch.place.ids.tolist() for batch in whole(rows, 0)] == first != other


@HELD_OR_STREAMED
@pytest.mark.parametrize("kind", [*KINDS, "ragged"])
def test_a_row_stands_in_for_an_empty_slice(kind, window, sets):
    world_size = 9 if window is None else 6  # six lanes share a batch of eight unevenly
    steps = of_ranks(sets[kind], world_size, 0, window=window, batch=8)
    assert len(steps) == 80
    batches = [batch for step in steps for batch in step]
    assert sum(batch.place.num_rows for batch in batches) == 640
    empty = [batch for batch in batches if batch.place.num_rows == 0]
    assert empty
    for batch in empty:
        assert len(batch.place.ids) == batch.place.weight == 0
        assert batch.place.global_rows == batch.place.global_weight > 0
        assert len(batch["target"]) == len(batch.keys) == 1
        inputs = batch["input"]
        assert len(inputs.lengths if isinstance(inputs, Ragged) else inputs) == 1


# -- pieces ----------------------------------------------------------------------------------------------------------


def values_of(batch: Batch) -> dict[str, list]:
    """The batch's rows as plain lists, without the one that stands in; trees as the words of their nodes."""
    num, found = batch.place.num_rows, {}
    for name, value in batch.columns.items():
        if isinstance(value, Tensor):
            found[name] = value[:num].tolist()
        elif isinstance(value, Ragged):
            found[name] = [row.tolist() for row in value.values.split(value.lengths.tolist())][:num]
        else:
            words = torch.empty_like(value.words).index_copy(0, value.places, value.words)
            sizes = torch.diff(value.places[value.roots] + 1, prepend=torch.tensor([0])).tolist()
            found[name] = [row.tolist() for row in words.split(sizes)][:num]
    return found


@HELD_OR_STREAMED
@pytest.mark.parametrize("kind", ["images", "ragged"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_step_is_cut_into_pieces(world_size, kind, window, sets):
    counts = "input" if kind == "ragged" else None
    num_pieces: dict[tuple[int, int], int] = {}  # of a step: equally many on all ranks
    for rank in range(world_size):
        rows = training(sets[kind], window=window, rank=rank, world_size=world_size, batch=41, counts=counts)
        uncut = [(batch.place, values_of(batch), batch.keys.tolist()) for batch in whole(rows, 1)]
        for wanted in (3, 100):
            steps = zip(rows.batches(1, pieces=wanted), uncut, strict=True)
            for step, (cut, (place, values, keys)) in enumerate(steps):
                assert num_pieces.setdefault((wanted, step), len(cut)) == len(cut)
                assert len(cut) == min(wanted, max(1, place.global_rows // world_size))
                places, sizes = [piece.place for piece in cut], [piece.place.num_rows for piece in cut]
                assert max(sizes) - min(sizes) <= 1
                assert [row for part in places for row in part.ids.tolist()] == place.ids.tolist()
                assert [part.start for part in places] == [place.start + sum(sizes[:k]) for k in range(len(cut))]
                assert sum(part.weight for part in places) == place.weight
                assert {(part.global_rows, part.global_weight) for part in places} == {
                    (place.global_rows, place.global_weight)
                }
                found = [values_of(piece) for piece in cut]
                assert {name: [row for piece in found for row in piece[name]] for name in values} == values
                drawn = [key for piece in cut for key in piece.keys[: piece.place.num_rows].tolist()]
                assert drawn == keys[: place.num_rows]


# -- rows that differ in length --------------------------------------------------------------------------------------


@HELD_OR_STREAMED
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ragged_columns_of_a_rank(world_size, window, sets):
    data = sets["ragged"]
    stored = made.split_rows(data, "train").columns
    moments = data.manifest.columns["steps"]
    lengths = data.lengths("train", "input")
    seen, balance = [], []
    for batches in of_ranks(data, world_size, 3, window=window, counts="input"):
        assert len({batch.place.global_weight for batch in batches}) == 1
        assert sum(batch.place.weight for batch in batches) == batches[0].place.global_weight
        balance.append(max(batch.place.weight for batch in batches) - batches[0].place.global_weight / world_size)
        for batch in batches:
            ids = batch.place.ids
            assert batch.place.weight == lengths[ids].sum()
            seen += ids.tolist()
            if not len(ids):
                continue
            assert batch.place.weight == len(batch["input"].values) == len(batch["marks"].values)
            for name in ("input", "marks"):
                taken = stored[name].take(ids)
                assert batch[name].lengths.tolist() == taken.lengths.tolist()
                assert batch[name].values.tolist() == taken.fields["values"].tolist()
                assert batch[name].values.dtype == torch.int32
            # the numbers in a sequence's elements are scaled, and stored beside it as they are
            taken = stored["steps"].take(ids).fields["values"]
            assert batch["steps"].longest == lengths[ids].max()
            assert batch["steps"].values.dtype == torch.float32
            expected = (taken - np.array(moments.mean)) / np.array(moments.std)
            np.testing.assert_allclose(batch["steps"].values.numpy(), expected, rtol=1e-5, atol=1e-5)  # see above
            np.testing.assert_array_equal(batch.stored["steps"].values.numpy(), taken)
            np.testing.assert_array_equal(batch["target"].numpy(), stored["target"].values[ids])
            whole_tree = stored["tree"].take(ids)
            forest = batch["tree"]
            assert len(forest.roots) == len(ids)
            in_order = torch.empty_like(forest.words).index_copy(0, forest.places, forest.words)
            assert in_order.tolist() == whole_tree.fields["words"].tolist()
            assert (forest.places[forest.roots] + 1).tolist() == whole_tree.offsets[1:].tolist()
    assert sorted(seen) == list(range(640))
    if window is None:  # ranks are cut where they weigh the same; a row has six elements at most
        assert max(balance) <= 6


def test_streams_keep_their_place_in_the_batch(sets, tmp_path):
    data = sets["ragged"]
    order = StreamOrder(640, num_streams=6)
    names = {"input", "target"}
    reading = Reading(data.manifest, CPU, names=names, scale="standard", seed=0)
    rows = Held(data.table("train"), data.manifest, CPU, names=names)
    assert rows.num_rows == 640
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            batches = whole(HeldRows(rows, order, reading, rank=rank, world_size=world_size), 0)
            assert len(batches) == 107
            for batch, after in itertools.pairwise(batches):
                going_on = len(after.place.ids)
                assert (after.place.ids - batch.place.ids[:going_on] == 1).all()
                assert set(after.columns) == names


def test_only_columns_that_are_read_are_gathered(sets):
    for window in (None, WINDOW):
        for batch in whole(training(sets["ragged"], window=window, names={"steps"}), 0):
            assert list(batch.columns) == list(batch.stored) == ["steps"]
    table = sets["ragged"].table("train")
    gathered = Held(table, sets["ragged"].manifest, CPU, names={"target", "tree"}).gather(np.array([3, 3, 0]))
    assert set(gathered) == {"target", "tree"}
    assert gathered["target"].tolist() == table["target"].to_numpy()[[3, 3, 0]].tolist()


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_passes_over_each_row_once(sets):
    data = sets["images"]
    stored = made.split_rows(data, "test").columns
    reading = Reading(data.manifest, CPU, names={"input", "target"}, scale="standard", seed=0)
    rows = Held(data.table("test"), data.manifest, CPU, names=reading.names)
    order = InOrder(rows.num_rows, batch_size=7)
    for world_size in (1, 3, 100):
        ranks = [whole(HeldRows(rows, order, reading, rank=r, world_size=world_size), 0) for r in range(world_size)]
        seen, targets = [], []
        for batches in zip(*ranks, strict=True):
            assert sum(batch.place.num_rows for batch in batches) <= 7
            for batch in batches:
                seen.append(batch.stored["input"][: batch.place.num_rows].numpy())
                targets += batch["target"][: batch.place.num_rows].tolist()
        np.testing.assert_array_equal(np.concatenate(seen), stored["input"].values)
        assert targets == stored["target"].values.tolist()


def test_one_row(tmp_path):
    data = made.written(made.features(tmp_path / "in", 1, target="number"), tmp_path / "out")
    (batch,) = whole(training(data, batch=128), 0)
    assert (batch.place.num_rows, batch.place.global_rows) == (1, 1)
    assert batch["input"].tolist() == [[0.0] * 4]  # a constant is its own mean
    (idle,) = whole(training(data, batch=128, rank=0, world_size=3), 0)
    assert idle.place.num_rows == 0


# -- what is held ----------------------------------------------------------------------------------------------------


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
        whole(training(data, window=100), 0)
    with pytest.raises(UserError, match=rf"{file}: the shard does not have the checksum"):
        training(data)


def test_an_epoch_that_is_left_early_ends_its_threads(sets):
    batches = training(sets["features"], window=WINDOW).batches(0)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards")]


def test_more_ranks_than_lanes_are_refused(sets):
    with pytest.raises(UserError, match="25 workers cannot share 12 lanes"):
        training(sets["features"], window=WINDOW, batch=20, rank=0, world_size=25)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@HELD_OR_STREAMED
@pytest.mark.parametrize("kind", ["images", "ragged"])
def test_batches_on_a_gpu_are_those_of_the_cpu(kind, window, sets, monkeypatch):
    here = whole(training(sets[kind], window=window), 1)
    for share in (4, 1 << 60):  # kept there, or too large to be
        monkeypatch.setattr("cluster.data.loader.RESIDENT_SHARE", share)
        there = whole(training(sets[kind], window=window, device=torch.device("cuda", 0)), 1)
        for batch, other in zip(here, there, strict=True):
            assert other.keys.device.type == "cuda"
            assert torch.equal(other.keys.cpu(), batch.keys)
            for name, value in batch.columns.items():
                moved = other[name].to(CPU)
                pairs = (
                    [(value, moved)]
                    if isinstance(value, Tensor)
                    else [(v, getattr(moved, field)) for field, v in vars(value).items()]
                )
                for ours, theirs in pairs:
                    # float32: a multiplication and an addition, which the GPU may round once
                    same = torch.allclose(theirs, ours, atol=1e-6) if isinstance(ours, Tensor) else ours == theirs
                    assert same


# -- memory ----------------------------------------------------------------------------------------------------------


def peak_of_streaming(data: DataSet) -> tuple[int, int]:
    """(bytes of NumPy's arrays, bytes of Arrow's buffers) at the worst moment of an epoch."""
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        for _ in training(data, window=500, batch=200).batches(0):
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
    # Two blocks of each of 24 lanes are in memory, each of one row group of 42 rows: 3 MB, as Arrow has read them, and
    # a batch of 1 MB. The order of the larger set takes some kB more, and the threads may read another two row groups
    # at once.
    assert 5e5 < small_numpy < 3e6
    assert 1e6 < small_arrow < 5e6
    assert 2e6 < small_numpy + small_arrow < 6e6
    assert large_numpy - small_numpy < 1e6
    assert large_arrow - small_arrow < 1e6


def test_digits_can_be_streamed(tmp_path):
    data = made.written(DigitsSpec(), tmp_path / "out")
    assert sum(batch.place.num_rows for batch in whole(training(data, window=200, batch=64), 0)) == 1258
