"""The kernel that looks for rows to be evicted: a sample, so that the work is bounded whatever the table's size.

For the writer's own thread: it takes no lock.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import load_u32, load_u64, prefetch_near
from ekko.store.kernels.compile import Int, kernel
from ekko.store.kernels.index import mix64
from ekko.store.kernels.places import place_of
from p2p.stamps import WRITERS_MAX

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

_PREFETCH_ROWS = 16
_ROWS = layout.TABLE.offset("rows")
_FLAGS = layout.ROW.offset("flags")
_STAMP = layout.ROW.offset("stamp")
_KEY = layout.ROW.offset("key")
_NOT_LIVE = layout.FLAG_TOMBSTONE | layout.FLAG_FREE
_WRITER_MASK = np.uint64(WRITERS_MAX - 1)


@kernel(
    "int64(int64, int64, int64, int64, int64, uint64, Array(uint64, 1, 'C', readonly=True), uint64, int64[::1], uint64[::1], "
    "uint64[::1])"
)
def sample(
    table: Int,
    stride: Int,
    used: Int,
    vector: Int,
    shards: Int,
    newest: Int,
    until: U64,
    seed: Int,
    places: I64,
    keys: U64,
    stamps: U64,
) -> Int:
    """Look at places.size slots, drawn from `used` by a hash of `seed` and their number; returns how many may be evicted.

    These are live rows up to the stamp `newest`, and to `until` of their writer, that the vector covers: no tombstones, and no
    strays, which others may lack. `vector` is the address of uint64[4096, shards]. A slot may come twice.
    """
    rows = table + _ROWS
    count = 0
    for i in range(places.size):
        ahead = np.int64(mix64(np.uint64(seed + np.uint64(i + _PREFETCH_ROWS))) % np.uint64(used))
        prefetch_near(rows + ahead * stride)
        slot = np.int64(mix64(np.uint64(seed + np.uint64(i))) % np.uint64(used))
        row = rows + slot * stride
        flags = load_u32(row + _FLAGS)
        stamp = load_u64(row + _STAMP)
        if flags & _NOT_LIVE or stamp > newest or stamp > until[np.int64(stamp & _WRITER_MASK)]:
            continue
        key = load_u64(row + _KEY)
        shard = np.int64(mix64(key) % np.uint64(shards))
        if stamp > load_u64(vector + (np.int64(stamp & _WRITER_MASK) * shards + shard) * 8):
            continue
        places[count] = place_of(slot, flags)
        keys[count] = key
        stamps[count] = stamp
        count += 1
    return count
