"""Checks over whole batches that would cost NumPy a temporary each."""

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.compile import Int, inline_kernel, kernel
from ekko.store.kernels.index import mix64

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

_MAGNITUDE = np.uint32(0x7FFF_FFFF)
INFINITY_BITS = 0x7F80_0000  # of a float32; what is not a number lies above


@kernel("boolean(Array(uint32, 1, 'C', readonly=True), uint32)")
def _all_below(bits: NDArray[np.uint32], limit: Int) -> bool:
    bad = np.uint32(0)
    for i in range(bits.size):
        # Without a branch, so that the loop becomes vector instructions.
        bad |= np.uint32((bits[i] & _MAGNITUDE) >= limit)
    return bool(bad == 0)


def all_below(rows: NDArray[np.float32], limit_bits: int) -> bool:
    """True when every magnitude in float32[...] is below the limit, given as the bits of a float32; NaN is above all limits."""
    return bool(_all_below(np.ascontiguousarray(rows, np.float32).reshape(-1).view(np.uint32), limit_bits))


def all_finite(rows: NDArray[np.float32]) -> bool:
    """True when no value of float32[...] is infinite or not a number."""
    return all_below(rows, INFINITY_BITS)


@inline_kernel
def _place(table: I64, mask: int, keys: U64, i: int) -> int:
    """Where keys[i] is in the scratch table of indices plus one, or where it belongs."""
    position = np.int64(mix64(keys[i])) & mask
    while table[position] != 0 and keys[table[position] - 1] != keys[i]:
        position = (position + 1) & mask
    return int(position)


@kernel("int64(Array(uint64, 1, 'C', readonly=True), int64[::1], int64[::1])")
def _last_occurrences(keys: U64, table: I64, out: I64) -> int:
    mask = table.size - 1
    distinct = 0
    for i in range(keys.size):
        position = _place(table, mask, keys, i)
        distinct += table[position] == 0
        table[position] = i + 1
    if distinct == keys.size:
        return distinct
    count = 0
    for i in range(keys.size):
        if table[_place(table, mask, keys, i)] == i + 1:
            out[count] = i
            count += 1
    return count


def last_occurrences(keys: U64) -> I64 | None:
    """Where each key of uint64[n] occurs for the last time, ascending; None when no key occurs twice."""
    table = np.zeros(1 << max(1, (2 * keys.size - 1).bit_length() if keys.size else 1), np.int64)
    out = np.empty(keys.size, np.int64)
    count = _last_occurrences(np.ascontiguousarray(keys, np.uint64), table, out)
    return None if count == keys.size else out[:count].copy()
