"""Checks over whole batches, against their NumPy meaning."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.store.kernels.checks import all_finite, last_occurrences

KEYS = st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1), max_size=60)


@given(st.lists(st.floats(width=32), max_size=40))
def test_all_finite(values: list[float]) -> None:
    rows = np.array(values, np.float32)
    assert all_finite(rows) is bool(np.isfinite(rows).all())


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 511, 1023])
def test_one_bad_value_anywhere(bad: float, place: int) -> None:
    rows = np.zeros((64, 16), np.float32)
    assert all_finite(rows)
    rows.reshape(-1)[place] = bad
    assert not all_finite(rows)
    assert all_finite(rows[:, ::2]) is (place % 2 == 1), "strided rows are checked by value, not by memory"


@given(KEYS)
def test_last_occurrences(keys: list[int]) -> None:
    expected = sorted({key: i for i, key in enumerate(keys)}.values())
    found = last_occurrences(np.array(keys, np.uint64))
    if len(expected) == len(keys):
        assert found is None
    else:
        assert found is not None
        assert found.tolist() == expected


def test_last_occurrences_of_many_keys() -> None:
    keys = np.random.default_rng(3).integers(0, 5_000, 100_000).astype(np.uint64)
    found = last_occurrences(keys)
    assert found is not None
    assert found.tolist() == sorted({key: i for i, key in enumerate(keys.tolist())}.values())
    assert last_occurrences(np.arange(100_000, dtype=np.uint64)) is None
