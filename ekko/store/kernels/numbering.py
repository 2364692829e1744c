"""Kernels of a key map (`ekko.torch.key_map`): any keys of 64 bits, numbered in the order in which they come.

An open-addressing index: `slots`, int64 of a power of two, holds numbers, or EMPTY; the key itself is in `keys`, uint64, by its
number. At most half of it is filled. What is removed leaves no mark: entries behind it move up.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.compile import Int, inline_kernel, kernel
from ekko.store.kernels.index import mix64

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

EMPTY = -1


@inline_kernel
def _slot(slots: I64, keys: U64, key: Int) -> Int:
    """Where a key's number is, or where it belongs."""
    mask = slots.size - 1
    slot = np.int64(mix64(key)) & mask
    while slots[slot] != EMPTY and keys[slots[slot]] != key:
        slot = (slot + 1) & mask
    return slot


@kernel("void(Array(uint64, 1, 'C', readonly=True), int64[::1], uint64[::1], int64[::1])")
def find(wanted: U64, slots: I64, keys: U64, numbers: I64) -> None:
    """The number of each key of uint64[n], or EMPTY."""
    for i in range(wanted.size):
        numbers[i] = slots[_slot(slots, keys, wanted[i])]


@kernel("int64(Array(uint64, 1, 'C', readonly=True), int64[::1], uint64[::1], int64[::1], int64[::1], int64[::1], int64[::1])")
def find_or_add(wanted: U64, slots: I64, keys: U64, free: I64, counts: I64, numbers: I64, added: I64) -> Int:
    """The number of each key of uint64[n]; one that has none gets the last of `free`, or the next one.

    Args:
        wanted: keys.
        slots: the index.
        keys: uint64[rows], by number.
        free: int64[rows]: numbers that were given back.
        counts: int64[3]: how many of these there are, how many numbers were ever given out, how many are in `added`.
        numbers: int64[n], written.
        added: int64[n]: numbers given out now.

    Returns:
        How many are done: fewer than n where numbers have run out.
    """
    for i in range(wanted.size):
        slot = _slot(slots, keys, wanted[i])
        if slots[slot] == EMPTY:
            if counts[0] > 0:
                counts[0] -= 1
                number = free[counts[0]]
            elif counts[1] < keys.size:
                number = counts[1]
                counts[1] += 1
            else:
                return i
            keys[number] = wanted[i]
            slots[slot] = number
            added[counts[2]] = number
            counts[2] += 1
        numbers[i] = slots[slot]
    return wanted.size


@kernel("int64(Array(uint64, 1, 'C', readonly=True), int64[::1], uint64[::1], int64[::1], int64[::1], int64[::1])")
def remove(wanted: U64, slots: I64, keys: U64, free: I64, counts: I64, removed: I64) -> Int:
    """Give back the numbers of keys, those that have any; they are in `removed`, int64[n]. Returns how many."""
    mask = slots.size - 1
    count = 0
    for i in range(wanted.size):
        hole = _slot(slots, keys, wanted[i])
        number = slots[hole]
        if number == EMPTY:
            continue
        removed[count] = number
        count += 1
        free[counts[0]] = number
        counts[0] += 1
        slot = (hole + 1) & mask
        while slots[slot] != EMPTY:
            home = np.int64(mix64(keys[slots[slot]])) & mask
            if ((slot - home) & mask) >= ((slot - hole) & mask):  # it is found from its home on through the hole
                slots[hole] = slots[slot]
                hole = slot
            slot = (slot + 1) & mask
        slots[hole] = EMPTY
    return count


@kernel("void(Array(int64, 1, 'C', readonly=True), int64[::1], uint64[::1])")
def fill(numbers: I64, slots: I64, keys: U64) -> None:
    """Write the numbers of int64[n], all of different keys, into an empty index."""
    for i in range(numbers.size):
        slots[_slot(slots, keys, keys[numbers[i]])] = numbers[i]
