"""Kernels for who sends keys elsewhere: each key once, and keys grouped by who is to get them."""

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.compile import Int, kernel
from ekko.store.kernels.index import mix64

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]


@kernel("int64(Array(uint64, 1, 'C', readonly=True), int64[::1], uint64[::1], int64[::1])")
def _distinct(keys: U64, table: I64, unique: U64, places: I64) -> int:
    """`table`: zeros, a power of two of them and more than twice as many as keys: positions in `unique`, plus one."""
    mask = table.size - 1
    count = 0
    for i in range(keys.size):
        key = keys[i]
        position = np.int64(mix64(key)) & mask
        while table[position] != 0 and unique[table[position] - 1] != key:
            position = (position + 1) & mask
        if table[position] == 0:
            unique[count] = key
            count += 1
            table[position] = count
        places[i] = table[position] - 1
    return count


def distinct(keys: U64) -> tuple[U64, I64]:
    """Each key once, uint64[u] in the order of first occurrence; and where each of uint64[n] is among them, int64[n]."""
    table = np.zeros(1 << (2 * keys.size).bit_length(), np.int64)
    unique, places = np.empty(keys.size, np.uint64), np.empty(keys.size, np.int64)
    count = _distinct(np.ascontiguousarray(keys, np.uint64), table, unique, places)
    return unique[:count], places


@kernel(
    "void(Array(uint64, 1, 'C', readonly=True), int64, Array(int64, 1, 'C', readonly=True), int64[::1], int64[::1], int64[::1])"
)
def _grouped(keys: U64, shards: Int, owners: I64, touched: I64, ends: I64, order: I64) -> None:
    """`ends`: zeros, one for each owner and one more, the first of which stays 0; `touched`: zeros, one for each partition."""
    owner_of = np.empty(keys.size, np.int32)
    for i in range(keys.size):
        partition = np.int64(mix64(keys[i]) % np.uint64(shards)) % owners.size
        owner = owners[partition]
        touched[partition] += 1
        owner_of[i] = owner
        ends[owner + 1] += 1
    for owner in range(1, ends.size):
        ends[owner] += ends[owner - 1]
    place = ends[:-1].copy()
    for i in range(keys.size):
        owner = owner_of[i]
        order[place[owner]] = i
        place[owner] += 1


def grouped(keys: U64, shards: int, owners: I64, count: int) -> tuple[I64, I64, I64]:
    """Keys by owner.

    Args:
        keys: uint64[n].
        shards: of their model.
        owners: int64[partitions], from 0 to count - 1: whose each partition is.
        count: of owners.

    Returns:
        int64[n], the positions of the first owner's keys, then of the second's, each in their order; int64[count + 1], where
        each owner's begin in it, and n; int64[partitions], how many keys each partition has.
    """
    order, ends, touched = np.empty(keys.size, np.int64), np.zeros(count + 1, np.int64), np.zeros(owners.size, np.int64)
    _grouped(np.ascontiguousarray(keys, np.uint64), shards, np.ascontiguousarray(owners, np.int64), touched, ends, order)
    return order, ends, touched
