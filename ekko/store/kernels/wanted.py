"""Keys that readers want on the device: a ring that any number of processes write to, without a lock, and one reads.

A writer takes numbers by one atomic add, and writes an entry for each: its key, then, released, its number plus one. Who reads
compares that with the number that it expects: larger, and another key has taken its place; smaller, and its writer is not done.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.atomics import add_u64, store_release_i64, store_u64
from ekko.store.kernels.compile import Int, kernel

HEAD = 64  # uint64: numbers given out so far
ENTRIES = 4096  # {key, number plus one} each
ENTRY_BYTES = 16


@kernel("void(int64, int64, Array(uint64, 1, 'C', readonly=True))")
def post(ring: Int, capacity_log2: Int, keys: NDArray[np.uint64]) -> None:
    """Write so many keys, no more than the ring has entries."""
    mask = (1 << capacity_log2) - 1
    first = np.int64(add_u64(ring + HEAD, np.uint64(keys.size)))
    for i in range(keys.size):
        number = first + i
        entry = ring + ENTRIES + (number & mask) * ENTRY_BYTES
        store_u64(entry, keys[i])
        store_release_i64(entry + 8, number + 1)
