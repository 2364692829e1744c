"""Gradients of several pushes as one: a row for each key, the sum over all places where the key occurs.

The order is fixed: a key's gradients are added as they come, push after push and row after row, so that every machine gets the
same bits. (torch's `coalesce` adds those of a key in an order that its sort leaves open: its bits are these for keys that
occur twice, and within rounding of these for others.) Keys are put in order by counting their bytes, a stable sort of keys
and of where their rows lie, so that each gradient is read once and each sum is written once.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ModelError
from ekko.train.optimizers import sums

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]


def aggregate(keys: Sequence[U64], gradients: Sequence[F32]) -> tuple[U64, F32]:
    """One row for each key of some pushes.

    Args:
        keys: uint64[n] of each push, contiguous; a key may occur in several and more than once in one.
        gradients: float32[n, dim] of each, C-contiguous, all of one dim.

    Returns:
        uint64[m], ascending, none twice; float32[m, dim], their sums. Where there is a single push in this form already, these
        are its own arrays.

    Raises:
        ModelError: nothing to add up, or arrays that do not fit each other.
    """
    if not keys or len(keys) != len(gradients):
        raise ModelError(
            f"there are {len(keys)} arrays of keys and {len(gradients)} of gradients: expected as many, at least one"
        )
    dim = gradients[0].shape[-1]
    for own, rows in zip(keys, gradients, strict=True):
        if own.ndim != 1 or own.dtype != np.uint64 or not own.flags.c_contiguous:
            raise ModelError(f"keys are {own.dtype}{list(own.shape)}: expected contiguous uint64[n]")
        fits = rows.shape == (len(own), dim) and rows.dtype == np.float32
        if not fits or not rows.flags.c_contiguous or not rows.flags.aligned:
            expected = [len(own), dim]
            raise ModelError(f"gradients are {rows.dtype}{list(rows.shape)}: expected contiguous float32{expected}")
    if len(keys) == 1 and sums.are_ascending(keys[0]):
        return keys[0], gradients[0]
    count = sum(map(len, keys))
    ordered, places = np.concatenate(keys), np.empty(count, np.int64)
    begin = 0
    for rows in gradients:
        end = begin + len(rows)
        places[begin:end] = np.arange(len(rows), dtype=np.int64) * (4 * dim) + rows.ctypes.data
        begin = end
    ordered, places = sums.sort(ordered, places, np.empty_like(ordered), np.empty_like(places))
    distinct = np.empty(count, np.uint64)
    starts = np.empty(count + 1, np.int64)
    found = sums.find_runs(ordered, distinct, starts)
    total = np.empty((found, dim), np.float32)
    sums.add_runs(places, starts, total)  # reads `gradients` by their addresses: they are still referred to here
    return distinct[:found].copy(), total
