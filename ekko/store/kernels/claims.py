"""Kernels over the shards that a batch claims: what `p2p.loops` does with NumPy, and its module describes; and a bitmap."""

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.compile import Int, kernel
from ekko.store.kernels.counters import hear
from p2p.loops import CONTRADICTION, NOT_ASCENDING, SEVERAL_TREES, SOUND, Loops

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
U16 = NDArray[np.uint16]


@kernel(
    "int64(Array(uint32, 1, 'C', readonly=True), Array(uint64, 1, 'C', readonly=True), Array(uint16, 1, 'C', readonly=True), "
    "Array(uint16, 1, 'C', readonly=True), uint64, int64, int64)"
)
def claims_fault(shards: U32, prev: U64, part: U16, parts: U16, stamp: Int, trees: Int, shards_max: Int) -> Int:
    """See `p2p.loops.claims_fault`."""
    strange = mixed = False
    tree = shards[0] % trees
    for i in range(shards.size):
        mixed |= shards[i] % trees != tree
        strange |= prev[i] >= stamp or part[i] >= parts[i]
    if mixed:
        return SEVERAL_TREES
    if shards[shards.size - 1] >= shards_max:
        return NOT_ASCENDING
    for i in range(1, shards.size):
        if shards[i] <= shards[i - 1]:
            return NOT_ASCENDING
    return CONTRADICTION if strange else SOUND


@kernel(
    "boolean(uint64[:], Array(uint32, 1, 'C', readonly=True), Array(uint64, 1, 'C', readonly=True), "
    "Array(uint16, 1, 'C', readonly=True), uint64, Array(uint64, 1, 'C', readonly=True))"
)
def merge_all(column: U64, shards: U32, base: U64, parts: U16, stamp: Int, until: U64) -> bool:
    """See `p2p.loops.merge_all`."""
    for i in range(shards.size):
        if parts[i] != 1 or column[shards[i]] < base[i]:
            return False
    for i in range(shards.size):
        column[shards[i]] = max(column[shards[i]], until[i] if until.size else stamp)
    return True


@kernel("void(uint64[::1], int64[:])")
def set_bits(words: U64, numbers: NDArray[np.int64]) -> None:
    """Set the bits with these numbers, counted from the lowest of words[0], and no others."""
    words[:] = 0
    for i in range(numbers.size):
        words[numbers[i] >> 6] |= np.uint64(1) << np.uint64(numbers[i] & 63)


COMPILED = Loops(claims_fault, merge_all, hear)
