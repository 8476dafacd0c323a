"""Order: a pure function of (row groups, seed, epoch); the properties that data-parallel training rests on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data.keys import digest_part, digest_text
from cluster.data.order import LaneOrder, WholeOrder
from nn_models.errors import UserError

groups = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@st.composite
def orders(draw):
    row_groups = draw(groups)
    batch = draw(st.integers(1, 100))
    seed = draw(st.integers(0, 5))
    if draw(st.booleans()):
        return WholeOrder(sum(row_groups), global_batch_size=batch, seed=seed), 7
    order = LaneOrder(row_groups, global_batch_size=batch, seed=seed, window=draw(st.integers(1, 500)))
    return order, order.num_lanes


def walk(order, epoch, world_size):
    """The epoch's rows in global order, put together from the ranks' slices, with the digest."""
    rows, digest = [], np.zeros(2, np.int64)
    for step in range(order.num_steps):
        for rank in range(world_size):
            ids = order.rows(epoch, step, rank, world_size)
            assert order.start(epoch, step, rank, world_size) == len(rows)
            digest += digest_part(ids, len(rows))
            rows.extend(ids.tolist())
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


def test_more_ranks_than_lanes_is_refused():
    order = LaneOrder([5, 5, 5], global_batch_size=4, seed=0, window=5)
    with pytest.raises(UserError, match=r"4 workers cannot share 3 lanes.*at most 3"):
        order.rows(0, 0, 0, 4)
