"""A look-up goes through its keys in parts: the slots of a part are searched, then its rows are read; and what is fetched when.

Two passes over a part beat one pass that does both, for rows of several lines: with 4 million rows of 64 values, 85 ns a key,
and 86 to 90 in blocks of 16 and 32 keys with entries fetched two blocks ahead, and rows one. Short rows are fetched as soon as
their slots are known, so that the next search runs while they come; a part is then as large as what the nearest cache holds of
them: 46 ns a key instead of 49 to 53 with 16 values. With 64 values that costs 4 %.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.atomics import prefetch_bytes
from ekko.store.kernels.compile import Int, inline_kernel
from ekko.store.kernels.index import resolve, resolve_and_fetch
from ekko.store.kernels.rows import PART_KEYS, PREFETCH_ROWS

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

# Rows up to so many bytes are short: float32 up to dim 26, a byte a value up to dim 100.
_SHORT_ROW_BYTES = 128
_PART_KEYS_SHORT = 128


@inline_kernel
def part_keys(stride: Int) -> Int:
    """How many keys a part has at most."""
    return _PART_KEYS_SHORT if stride <= _SHORT_ROW_BYTES else PART_KEYS


@inline_kernel
def resolve_part(index: Int, capacity_log2: Int, keys: U64, slots: I64, base: Int, stride: Int) -> None:
    """`resolve`; short rows, the first of which is at `base`, are on their way afterwards."""
    if stride <= _SHORT_ROW_BYTES:
        resolve_and_fetch(index, capacity_log2, keys, slots, base, stride)
    else:
        resolve(index, capacity_log2, keys, slots)


@inline_kernel
def fetch_first(base: Int, stride: Int, count: Int, slots: I64) -> Int:
    """Fetch the first rows of a part, unless they are on their way; returns how many rows ahead the others are to be."""
    if stride <= _SHORT_ROW_BYTES:
        return np.int64(count)
    for i in range(min(count, PREFETCH_ROWS)):
        prefetch_bytes(base + slots[i] * stride, stride)
    return np.int64(PREFETCH_ROWS)
