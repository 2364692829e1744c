"""Kernels of the update cache: a ring of changes and the vector of what left it. `ekko.store.recent` says what they are for."""

import numpy as np
from numpy.typing import NDArray

from ekko.model import SHARDS_MAX
from ekko.store import layout
from ekko.store.kernels.atomics import load_i64, load_u64, prefetch_near, store_i64, store_u64
from ekko.store.kernels.compile import Int, inline_kernel, kernel
from ekko.store.kernels.index import mix64
from ekko.store.kernels.places import PLACE_BITS, is_current, row_at
from p2p.stamps import WRITERS_MAX

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

_ENTRY_BYTES = 16
_ENTRY_STAMP = 8
_PLACE_BITS = np.uint64(PLACE_BITS)  # of the place in an entry's first word; the shard is above it
_PLACE_MASK = np.uint64((1 << PLACE_BITS) - 1)
assert SHARDS_MAX <= 1 << 64 - PLACE_BITS
_NONE = np.uint64(0)  # below every stamp
# Above every stamp: what is asked with for shards that are not wanted.
ABOVE_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_WRITER_MASK = np.uint64(WRITERS_MAX - 1)
_ROWS = layout.TABLE.offset("rows")
_STAMP = layout.ROW.offset("stamp")
_KEY = layout.ROW.offset("key")
_FLAGS = layout.ROW.offset("flags")
_FREE = layout.FLAG_FREE
_PREFETCH_ROWS = 32

# Words of a cache's state: changes ever recorded, ever dropped, and left out at once; how far back the last answer looked.
HEAD, TAIL, LEFT_OUT, DEPTH = range(4)
# What `compare` says of an asker's vector.
KNOWS_NOTHING, BEHIND, DOMINATES = range(3)

# The kernels get addresses, as those over rows do: an array handed to a helper costs its reference count, an atomic operation,
# each time (measured: 200 ns a row). What is at them:
#   ring        {place | shard << 48, stamp} for each entry; the length is a power of two
#   dvv         uint64[4096, shards], by writer
#   thresholds  uint64[4096], by writer
#   writers     int64: how many writers DVV has; then their ids


@inline_kernel
def _list_writer(writers: Int, writer: Int) -> None:
    count = load_i64(writers)
    for i in range(1, count + 1):
        if load_i64(writers + 8 * i) == writer:
            return
    store_i64(writers + 8 * (count + 1), writer)
    store_i64(writers, count + 1)


@inline_kernel
def merge_dvv(stamp: Int, shard: Int, shards: Int, dvv: Int, writers: Int) -> None:
    """A row with this stamp is not in the ring."""
    writer = np.int64(stamp & _WRITER_MASK)
    place = dvv + (writer * shards + shard) * 8
    bound = load_u64(place)
    if stamp > bound:
        if bound == _NONE:
            _list_writer(writers, writer)
        store_u64(place, stamp)


@inline_kernel
def _drop(entry: Int, shards: Int, dvv: Int, thresholds: Int, writers: Int) -> None:
    """Leave an entry to DVV. Its row may have a younger one: DVV is a bound, and may be too high."""
    stamp = load_u64(entry + _ENTRY_STAMP)
    merge_dvv(stamp, np.int64(load_u64(entry) >> _PLACE_BITS), shards, dvv, writers)
    threshold = thresholds + np.int64(stamp & _WRITER_MASK) * 8
    store_u64(threshold, max(load_u64(threshold), stamp))


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64[::1])")
def prune(keep: Int, ring: Int, mask: Int, shards: Int, dvv: Int, thresholds: Int, writers: Int, state: I64) -> None:
    """Drop the oldest entries until `keep` are left."""
    tail = max(state[TAIL], state[HEAD] - keep)
    for entry in range(state[TAIL], tail):
        _drop(ring + (entry & mask) * _ENTRY_BYTES, shards, dvv, thresholds, writers)
    state[TAIL] = tail


@kernel(
    "void(int64[::1], Array(uint64, 1, 'C', readonly=True), Array(uint64, 1, 'C', readonly=True), uint64, int64, int64, int64, "
    "int64, int64, int64, int64, int64[::1])"
)
def record(
    places: I64,
    keys: U64,
    stamps: U64,
    stamp: Int,
    room: Int,
    ring: Int,
    mask: Int,
    shards: Int,
    dvv: Int,
    thresholds: Int,
    writers: Int,
    state: I64,
) -> None:
    """Enter the rows just written (place >= 0); `stamps` is empty when all carry `stamp`."""
    head, tail, left_out = state[HEAD], state[TAIL], 0
    for i in range(places.size):
        if places[i] < 0:
            continue
        shard = np.int64(mix64(keys[i]) % np.uint64(shards))
        row_stamp = stamps[i] if stamps.size else stamp
        threshold = thresholds + np.int64(row_stamp & _WRITER_MASK) * 8
        if row_stamp > load_u64(threshold):
            while head - tail >= room:
                _drop(ring + (tail & mask) * _ENTRY_BYTES, shards, dvv, thresholds, writers)
                tail += 1
        if row_stamp > load_u64(threshold):  # again: what was dropped may have been younger
            entry = ring + (head & mask) * _ENTRY_BYTES
            store_u64(entry, np.uint64(places[i]) | np.uint64(shard) << _PLACE_BITS)
            store_u64(entry + _ENTRY_STAMP, row_stamp)
            head += 1
        else:
            merge_dvv(row_stamp, shard, shards, dvv, writers)
            left_out += 1
    state[HEAD], state[TAIL] = head, tail
    state[LEFT_OUT] += left_out


@kernel("void(Array(uint64, 1, 'C', readonly=True), Array(uint64, 1, 'C', readonly=True), int64, int64, int64)")
def merge_rows(keys: U64, stamps: U64, shards: Int, dvv: Int, writers: Int) -> None:
    """Merge the stamps of rows that are not there any more."""
    for i in range(keys.size):
        merge_dvv(stamps[i], np.int64(mix64(keys[i]) % np.uint64(shards)), shards, dvv, writers)


@kernel("void(Array(uint64, 2, 'A', readonly=True), int64, int64, int64)")
def merge_bounds(bounds: U64, shards: Int, dvv: Int, writers: Int) -> None:
    """Merge what uint64[shards, 4096] says."""
    for writer in range(WRITERS_MAX):
        for shard in range(shards):
            if bounds[shard, writer]:
                merge_dvv(bounds[shard, writer], shard, shards, dvv, writers)


@kernel("int64(Array(uint64, 1, 'C', readonly=True), int64, int64, int64)")
def compare(base: U64, shards: Int, dvv: Int, writers: Int) -> Int:
    """Does the flattened vector uint64[shards * 4096] dominate DVV? Else: does it know anything of DVV's writers?"""
    dominates = True
    knows = False
    for i in range(1, load_i64(writers) + 1):
        writer = load_i64(writers + 8 * i)
        for shard in range(shards):
            known = base[shard * WRITERS_MAX + writer]
            dominates &= known >= load_u64(dvv + (writer * shards + shard) * 8)
            knows |= known != _NONE and known != ABOVE_ALL
    if dominates:
        return DOMINATES
    return BEHIND if knows else KNOWS_NOTHING


@kernel("int64(int64, int64, Array(uint64, 1, 'C', readonly=True), int64, int64, int64[::1], int64[::1])")
def select(table: Int, stride: Int, base: U64, ring: Int, mask: Int, state: I64, out: I64) -> Int:
    """Places of the rows in the ring above the flattened vector, into `out`; returns how many."""
    head = state[HEAD]
    candidates = 0
    for entry in range(state[TAIL], head):
        stamp = load_u64(ring + (entry & mask) * _ENTRY_BYTES + _ENTRY_STAMP)
        shard = np.int64(load_u64(ring + (entry & mask) * _ENTRY_BYTES) >> _PLACE_BITS)
        # Written whether it counts or not: the loop has no branch to mispredict.
        out[candidates] = entry
        candidates += stamp > base[shard * WRITERS_MAX + np.int64(stamp & _WRITER_MASK)]
    count = 0
    # Entries of rows that changed again since count too: had the oldest been dropped, DVV would be above this vector.
    state[DEPTH] = head - out[0] if candidates else 0
    for i in range(candidates):
        if i + _PREFETCH_ROWS < candidates:
            ahead = np.int64(load_u64(ring + (out[i + _PREFETCH_ROWS] & mask) * _ENTRY_BYTES) & _PLACE_MASK)
            prefetch_near(row_at(table, stride, ahead))
        entry = ring + (out[i] & mask) * _ENTRY_BYTES
        place = np.int64(load_u64(entry) & _PLACE_MASK)
        row = row_at(table, stride, place)
        # The place, too: rows of one step have one stamp, and two of them may have had the slot one after the other.
        if load_u64(row + _STAMP) == load_u64(entry + _ENTRY_STAMP) and is_current(row, place):
            out[count] = place
            count += 1
    return count
