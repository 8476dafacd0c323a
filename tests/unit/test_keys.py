"""Keys: a function of seed, epoch and row, without likeness between neighbours."""

import numpy as np
import pytest

from cluster.data.keys import row_keys

pytestmark = pytest.mark.filterwarnings("error")  # NumPy warns where a scalar wraps around


def test_no_two_rows_have_the_same_key():
    ids = np.arange(20_000)
    keys = np.concatenate([row_keys(seed, epoch, ids) for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 2)])
    assert keys.dtype == np.int64
    assert len(np.unique(keys)) == len(keys) == 180_000


def test_a_key_depends_on_its_own_row_alone():
    ids = np.array([5, 0, 7, 2**62])
    keys = row_keys(3, 4, ids)
    assert [int(row_keys(3, 4, ids[place : place + 1])[0]) for place in range(4)] == keys.tolist()
    np.testing.assert_array_equal(row_keys(3, 4, ids.astype(np.uint64)), keys)
    assert len(row_keys(3, 4, ids[:0])) == 0
    # pinned: a run that goes on, on whatever machine, must draw what it would have drawn
    assert row_keys(0, 0, np.arange(3)).tolist() == [-6343559117420686202, -1481249976195441455, 1409106914302989908]


def test_each_bit_of_seed_epoch_and_row_changes_half_of_the_bits():
    ids = np.arange(500)
    keys = row_keys(9, 3, ids)
    for bit in range(30):
        for other in (row_keys(9 ^ 1 << bit, 3, ids), row_keys(9, 3 ^ 1 << bit, ids), row_keys(9, 3, ids ^ 1 << bit)):
            shares = np.unpackbits((keys ^ other).view(np.uint8)).reshape(500, 64).mean(0)
            assert np.abs(shares - 0.5).max() < 0.5 * 5 / 500**0.5  # 5 deviations; 5,760 shares are compared
