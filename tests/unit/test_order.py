"""Order: a pure function of (row groups, seed, epoch); the properties that data-parallel training rests on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data.keys import digest_part, digest_text
from cluster.data.manifest import Manifest, StoredColumn
from cluster.data.order import (
    Buckets,
    InOrder,
    LaneOrder,
    StreamOrder,
    WholeOrder,
    bounds,
    held,
    shuffle_window,
    training_order,
)
from nn_models.columns import Image, Label, Tokens
from nn_models.errors import UserError

groups = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@st.composite
def orders(draw):
    """An order of any kind, and the most ranks it is tried with."""
    row_groups = draw(groups)
    num_rows = sum(row_groups)
    batch = draw(st.integers(1, 100))
    seed = draw(st.integers(0, 5))
    weights = draw(st.sampled_from([1, 7, "elements"]))
    if weights == "elements":
        weights = np.random.default_rng(seed).integers(0, 9, num_rows, dtype=np.int32)
    match draw(st.sampled_from(["whole", "buckets", "in order", "streams", "lanes"])):
        case "whole":
            return WholeOrder(num_rows, global_batch_size=batch, seed=seed, weights=weights), 7
        case "buckets":
            lengths = np.random.default_rng(seed + 1).integers(0, 9, num_rows, dtype=np.int32)
            buckets = Buckets(draw(st.integers(1, 9)), lengths)
            return WholeOrder(num_rows, global_batch_size=batch, seed=seed, weights=weights, buckets=buckets), 7
        case "in order":
            return InOrder(num_rows, batch_size=batch, weights=weights), 7
        case "streams":
            return StreamOrder(num_rows, num_streams=batch, weights=weights), 7
    window = draw(st.integers(1, 500))
    order = LaneOrder(row_groups, global_batch_size=batch, seed=seed, window=window, weights=weights)
    return order, order.num_lanes


def walk(order, epoch, world_size):
    """The epoch's rows in global order, put together from the ranks' slices, with the digest."""
    rows, digest = [], np.zeros(2, np.int64)
    for step in range(order.num_steps):
        places = [order.place(epoch, step, rank, world_size) for rank in range(world_size)]
        for rank, place in enumerate(places):
            assert place.ids.tolist() == order.rows(epoch, step, rank, world_size).tolist()
            assert place.start == order.start(epoch, step, rank, world_size) == len(rows)
            assert place.num_rows == len(place.ids)
            assert place.weight == order.weigh(place.ids)
            digest += digest_part(place.ids, place.start)
            rows.extend(place.ids.tolist())
        # each rank knows what the whole batch weighs before the step, and all of them the same
        assert {place.global_rows for place in places} == {sum(place.num_rows for place in places)}
        assert {place.global_weight for place in places} == {sum(place.weight for place in places)}
        assert len(rows) == sum(order.global_rows(epoch, k) for k in range(step + 1))
    return rows, digest_text(digest)


@settings(max_examples=60)
@given(orders(), st.integers(0, 3), st.integers(1, 24))
def test_any_world_size_sees_the_same_rows_once(case, epoch, world_size):
    order, most = case
    alone, digest = walk(order, epoch, 1)
    assert sorted(alone) == list(range(order.num_rows))
    assert walk(order, epoch, min(world_size, most)) == (alone, digest)


@settings(max_examples=40)
@given(groups, st.integers(1, 100), st.integers(1, 500))
def test_a_lane_is_read_block_after_block(row_groups, batch, window):
    order = LaneOrder(row_groups, global_batch_size=batch, seed=0, window=window)
    for lane in range(order.num_lanes):
        read = [index for step in range(order.num_steps) for index, _ in order.pieces(0, lane, step)]
        assert read == sorted(read)  # never back: a block can be dropped once the next is in use
        assert set(read) == set(range(len(order.lanes(0)[lane].groups)))


def test_batches_of_a_whole_order_differ_by_one_row_at_most():
    order = WholeOrder(1003, global_batch_size=100, seed=0)
    sizes = {order.global_rows(0, step) for step in range(order.num_steps)}
    assert order.num_steps == 11
    assert sizes == {91, 92}


def test_epochs_and_seeds_differ():
    order = WholeOrder(100, global_batch_size=10, seed=0)
    other = WholeOrder(100, global_batch_size=10, seed=1)
    digests = {walk(order, 0, 1)[1], walk(order, 1, 1)[1], walk(other, 0, 1)[1]}
    assert len(digests) == 3


def test_the_digest_sees_an_exchange_of_two_rows():
    rows = np.arange(1000)
    swapped = rows.copy()
    swapped[[3, 700]] = swapped[[700, 3]]
    assert digest_text(digest_part(rows, 0)) != digest_text(digest_part(swapped, 0))


def test_lane_shuffles_stay_within_the_window():
    order = LaneOrder([10] * 48, global_batch_size=32, seed=0, window=240)
    for lane in range(order.num_lanes):
        for index, block in enumerate(order.lanes(0)[lane].groups):
            assert len(order.block(0, lane, index).ids) == 10 * len(block) == 10


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


def test_more_ranks_than_lanes_is_refused():
    order = LaneOrder([5, 5, 5], global_batch_size=4, seed=0, window=5)
    with pytest.raises(UserError, match=r"4 workers cannot share 3 lanes.*at most 3"):
        order.rows(0, 0, 0, 4)


def test_the_window_follows_from_recipe_and_manifest(monkeypatch):
    columns = {
        "input": StoredColumn(column=Image(shape=(3, 6, 5)), dtype="uint8", moments=False),
        "target": StoredColumn(column=Label(size=3), dtype="int64"),
    }
    shard = {"file": "a", "rows": 640, "row_groups": [32] * 20, "bytes": 1, "sha256": ""}
    few = shard | {"rows": 80, "row_groups": [80]}
    manifest = Manifest(source="made", columns=columns, splits={"train": (shard,), "validation": (few,)})
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


# -- weights ---------------------------------------------------------------------------------------------------------


def test_rows_weigh_a_number_each_or_their_elements():
    lengths = np.array([3, 0, 5, 1, 1, 2], np.int32)
    each = [
        (order.place(0, 0, 0, 2).weight, order.place(0, 0, 0, 2).global_weight, order.place(0, 0, 1, 2).global_weight)
        for order in (InOrder(6, batch_size=4), InOrder(6, batch_size=4, weights=35))
    ]
    assert each == [(2, 4, 4), (70, 140, 140)]
    order = InOrder(6, batch_size=4, weights=lengths)
    first, second = (order.place(0, 0, rank, 2) for rank in range(2))
    assert (first.ids.tolist(), second.ids.tolist()) == ([0, 1], [2, 3])  # 3 and 0 of 9, then 5 and 1
    assert (first.weight, second.weight, first.global_weight) == (3, 6, 9)
    assert order.place(0, 1, 0, 1).weight == 3


@settings(max_examples=100)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 9), st.integers(0, 9), st.integers(0, 40))
def test_ranks_are_cut_where_they_weigh_about_the_same(num_rows, batch, world_size, seed, most):
    weights = np.random.default_rng(seed).integers(0, most + 1, num_rows, dtype=np.int32)
    for order in (
        WholeOrder(num_rows, global_batch_size=batch, seed=seed, weights=weights),
        InOrder(num_rows, batch_size=batch, weights=weights),
    ):
        for step in range(order.num_steps):
            places = [order.place(1, step, rank, world_size) for rank in range(world_size)]
            largest = max(int(weights[place.ids].max(initial=0)) for place in places)
            for place in places:
                # a row goes to the rank whose share its middle lies in, so each end is off by half a row at most
                assert abs(place.weight - place.global_weight / world_size) <= largest


@pytest.mark.parametrize("weights", [1, 35])
def test_ranks_are_cut_by_the_work_of_rows_that_weigh_the_same(weights):
    work = np.random.default_rng(0).integers(1, 60, 90, dtype=np.int32)
    orders = (
        WholeOrder(90, global_batch_size=30, seed=2, weights=weights, work=work),
        InOrder(90, batch_size=30, weights=weights, work=work),
    )
    for order in orders:
        by_number = []
        for step in range(order.num_steps):
            places = [order.place(0, step, rank, 2) for rank in range(2)]
            taken = [int(work[place.ids].sum()) for place in places]
            assert abs(taken[0] - taken[1]) <= work.max()
            by_number.append(len(places[0].ids) == len(places[1].ids))
            assert [place.weight for place in places] == [weights * len(place.ids) for place in places]
            assert {place.global_weight for place in places} == {weights * 30}
            assert np.array_equal(np.concatenate([place.ids for place in places]), order.rows(0, step, 0, 1))
        assert not all(by_number)


@settings(max_examples=50)
@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 9), st.sampled_from([1, 35]))
def test_rows_of_one_weight_are_cut_by_their_number(num_rows, batch, world_size, weight):
    order = WholeOrder(num_rows, global_batch_size=batch, seed=0, weights=weight)
    for step in range(order.num_steps):
        sizes = [order.place(0, step, rank, world_size).num_rows for rank in range(world_size)]
        whole = order.global_rows(0, step)
        assert sizes == [end - first for first, end in (bounds(whole, world_size, rank) for rank in range(world_size))]


def test_weights_do_not_change_the_order():
    weights = np.random.default_rng(0).integers(0, 9, 500, dtype=np.int32)
    for plain, weighted in (
        (WholeOrder(500, global_batch_size=32, seed=3), WholeOrder(500, global_batch_size=32, seed=3, weights=weights)),
        (
            LaneOrder([20] * 25, global_batch_size=32, seed=3, window=99),
            LaneOrder([20] * 25, global_batch_size=32, seed=3, window=99, weights=weights),
        ),
    ):
        assert walk(plain, 2, 3)[1] == walk(weighted, 2, 3)[1] == walk(weighted, 2, 1)[1]


def test_a_batch_that_weighs_nothing_still_has_its_rows():
    order = InOrder(5, batch_size=5, weights=np.zeros(5, np.int32))
    places = [order.place(0, 0, rank, 3) for rank in range(3)]
    assert [row for place in places for row in place.ids.tolist()] == list(range(5))
    assert {place.global_weight for place in places} == {0}


# -- evaluation ------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(0, 300), st.integers(1, 60), st.integers(1, 9))
def test_evaluation_takes_rows_as_they_stand(num_rows, batch, world_size):
    order = InOrder(num_rows, batch_size=batch)
    assert order.num_steps == -(-num_rows // batch)
    assert walk(order, 0, world_size)[0] == list(range(num_rows))
    assert walk(order, 5, world_size) == walk(order, 0, world_size)  # in any epoch
    sizes = [order.global_rows(0, step) for step in range(order.num_steps)]
    assert sizes[:-1] == [batch] * (len(sizes) - 1)


# -- streams ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9))
def test_streams_go_on_where_they_ended(num_rows, num_streams, world_size):
    order = StreamOrder(num_rows, num_streams=num_streams)
    streams: dict[int, list[int]] = {}
    owners: dict[int, set[int]] = {}
    for step in range(order.num_steps):
        numbers = 0
        for rank in range(world_size):
            low, _ = bounds(order.num_streams, world_size, rank)
            ids = order.rows(0, step, rank, world_size).tolist()
            # the rank's streams from its first on: in the last step the first few of them, in the same places
            for stream, row in enumerate(ids, start=low):
                streams.setdefault(stream, []).append(row)
                owners.setdefault(stream, set()).add(rank)
            numbers += len(ids)
        assert numbers == order.global_rows(0, step)
        if step + 1 < order.num_steps:
            assert numbers == order.num_streams
    assert len(streams) == order.num_streams == min(num_streams, num_rows)
    assert all(len(ranks) == 1 for ranks in owners.values())
    # each is one stretch of the text, read on and on; together they are the text
    assert [row for stream in sorted(streams) for row in streams[stream]] == list(range(num_rows))
    lengths = [len(streams[stream]) for stream in sorted(streams)]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1
    assert order.num_steps == max(lengths)


def test_streams_of_an_epoch_are_those_of_every_other():
    order = StreamOrder(103, num_streams=10)
    assert walk(order, 0, 3) == walk(order, 4, 2)
    assert order.rows(0, 2, 0, 1).tolist() == [2, 13, 24, 35, 45, 55, 65, 75, 85, 95]  # three streams are longer
    assert order.rows(0, 10, 0, 1).tolist() == [10, 21, 32]
    assert order.rows(0, 10, 0, 2).tolist() == [10, 21, 32]
    assert order.rows(0, 10, 1, 2).tolist() == []
    assert (order.start(0, 10, 1, 2), order.start(0, 10, 0, 2)) == (103, 100)


def test_the_manifest_says_which_order_it_is():
    shard = {"file": "a", "rows": 100, "row_groups": [40, 60], "bytes": 1, "sha256": ""}
    columns = {"input": StoredColumn(column=Tokens(size=96, length=35), dtype="int32")}
    shuffled = Manifest(source="made", columns=columns, splits={"train": (shard,), "validation": (shard,)})
    streams = shuffled.model_copy(update={"order": "streams"})
    assert shuffled.row_bytes == streams.row_bytes == 140
    settings = {"global_batch_size": 8, "seed": 0, "weights": 35}
    assert isinstance(training_order(shuffled, window=None, **settings), WholeOrder)
    lanes = training_order(shuffled, window=50, **settings)
    assert isinstance(lanes, LaneOrder)
    for window in (None, 50):  # not shuffled, whatever the window
        order = training_order(streams, window=window, **settings)
        assert isinstance(order, StreamOrder)
        assert order.num_streams == 8
        assert shuffle_window(streams, window) is None
        assert held(streams, "train", window)
        assert order.place(0, 0, 0, 2).weight == 4 * 35
    assert lanes.place(0, 0, 0, 1).global_weight == lanes.global_rows(0, 0) * 35
