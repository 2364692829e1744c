"""Keys without repeats, and keys grouped by owner, against NumPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.serve.following import partitions_of
from ekko.store.kernels.distinct import distinct, grouped

KEYS = st.lists(st.integers(0, 30) | st.integers(0, (1 << 64) - 1), max_size=200).map(lambda keys: np.array(keys, np.uint64))


@given(KEYS)
def test_each_key_once_in_the_order_of_first_occurrence(keys: np.ndarray) -> None:
    unique, places = distinct(keys)
    assert unique.tolist() == list(dict.fromkeys(keys.tolist()))
    assert np.array_equal(unique[places], keys)


@given(KEYS, st.lists(st.integers(0, 3), min_size=1, max_size=8), st.sampled_from([8, 64]))
def test_keys_by_owner_keep_their_order(keys: np.ndarray, owners: list[int], shards: int) -> None:
    order, ends, touched = grouped(keys, shards, np.array(owners), 4)
    partitions = partitions_of(keys, shards, len(owners))  # where readers say that they are
    assert np.array_equal(touched, np.bincount(partitions, minlength=len(owners)))
    for owner in range(4):
        assert np.array_equal(order[ends[owner] : ends[owner + 1]], np.flatnonzero(np.array(owners)[partitions] == owner))


@pytest.mark.parametrize("count", [1, 2, 3, 4_096])
def test_full_scratch_tables(count: int) -> None:
    keys = np.arange(count, dtype=np.uint64) << np.uint64(40)
    assert np.array_equal(distinct(keys)[1], np.arange(count))
