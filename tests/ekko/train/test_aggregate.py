"""Gradients of several pushes become one sum a key, in one order."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ekko.errors import ModelError
from ekko.train.optimizers import aggregate

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

keys_of_a_push = st.lists(st.integers(0, 12) | st.integers(0, (1 << 64) - 1), max_size=40)


def gradients_of(keys: list[U64], dim: int, seed: int) -> list[F32]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((len(own), dim)).astype(np.float32) for own in keys]


def in_order(keys: list[U64], gradients: list[F32]) -> tuple[U64, F32]:
    """What is promised, a row at a time."""
    sums: dict[int, F32] = {}
    for own, rows in zip(keys, gradients, strict=True):
        for key, row in zip(own.tolist(), rows, strict=True):
            sums[key] = sums[key] + row if key in sums else row.copy()
    ordered = sorted(sums)
    dim = gradients[0].shape[1]
    return np.array(ordered, np.uint64), np.array([sums[key] for key in ordered], np.float32).reshape(-1, dim)


@given(st.lists(keys_of_a_push, min_size=1, max_size=5), st.sampled_from([1, 3, 16, 33]), st.integers(0, 1000))
def test_sums_are_those_of_additions_in_order(pushes: list[list[int]], dim: int, seed: int) -> None:
    keys = [np.array(push, np.uint64) for push in pushes]
    gradients = gradients_of(keys, dim, seed)
    for found, expected in zip(aggregate(keys, gradients), in_order(keys, gradients), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("times", [2, 20])
def test_sums_are_those_of_coalesce(times: int) -> None:
    """To the bit where a key occurs twice. With more, torch adds in an order of its own."""
    random = np.random.default_rng(1)
    keys = np.split(random.permutation(np.repeat(np.arange(300, dtype=np.uint64), times)), 3)
    gradients = gradients_of(keys, 24, 2)
    rows, values = torch.tensor(np.concatenate(keys).astype(np.int64)), torch.tensor(np.concatenate(gradients))
    theirs = torch.sparse_coo_tensor(rows[None], values, (300, 24), check_invariants=False).coalesce()
    found, sums = aggregate(keys, gradients)
    np.testing.assert_array_equal(found, theirs.indices()[0].numpy())
    np.testing.assert_allclose(sums, theirs.values().numpy(), rtol=0, atol=0 if times == 2 else 1e-5)


def test_what_is_in_that_form_already_is_not_copied() -> None:
    keys, rows = np.array([1, 5, 9], np.uint64), np.ones((3, 4), np.float32)
    found, sums = aggregate([keys], [rows])
    assert found is keys
    assert sums is rows


def test_what_does_not_fit_is_refused() -> None:
    keys, rows = np.array([2, 1], np.uint64), np.ones((2, 4), np.float32)
    for bad_keys, bad_rows, message in (
        ([], [], "at least one"),
        ([keys], [rows, rows], "expected as many"),
        ([keys.astype(np.int64)], [rows], "keys are int64"),
        ([keys], [rows[:1]], "gradients are float32.1, 4.: expected contiguous float32.2, 4."),
        ([keys, keys], [rows, np.ones((2, 3), np.float32)], "expected contiguous float32.2, 4."),
        ([keys], [rows.T.copy().T], "expected contiguous"),
        ([keys], [np.zeros(33, np.uint8)[1:].view(np.float32).reshape(2, 4)], "expected contiguous"),
    ):
        with pytest.raises(ModelError, match=message):
            aggregate(bad_keys, bad_rows)  # type: ignore[arg-type]
