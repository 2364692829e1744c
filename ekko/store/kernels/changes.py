"""Kernels of sinks: which rows changed, noted in a ring of shared memory by the node and read there by other processes.

`ekko.store.changes` says how the two sides meet. The other kernels here find changed rows without the ring, and say what has
become of a key that has no live row.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import (
    fence_acquire,
    fence_program_order,
    fence_release,
    load_acquire_i64,
    load_acquire_u32,
    load_i64,
    load_u32,
    load_u64,
    prefetch_near,
    store_i64,
    store_release_i64,
    store_u64,
)
from ekko.store.kernels.compile import Int, kernel
from ekko.store.kernels.index import NOTHING, first_entry, has_tag, mix64, next_entry, slot_in, tag_of, word_at
from p2p.stamps import WRITERS_MAX

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

# What `removed` says of a key.
ABSENT, DELETED, LIVE, BUSY = 0, 1, 2, 3

_SPINS_MAX = 4_096
_PREFETCH_ROWS = 16
_SEARCHES_MAX = 8
_RESERVED = layout.CHANGES.offset("reserved")
_HEAD = layout.CHANGES.offset("head")
_ENTRIES = layout.CHANGES.offset("entries")
_ENTRY_BYTES = layout.CHANGE_BYTES
_ROWS = layout.TABLE.offset("rows")
_ROWS_USED = layout.TABLE.offset("rows_used")
_GENERATION = layout.TABLE.offset("index_generation")
_OWN_GENERATION = layout.INDEX.offset("generation")
_LOCK = layout.ROW.offset("lock")
_FLAGS = layout.ROW.offset("flags")
_STAMP = layout.ROW.offset("stamp")
_KEY = layout.ROW.offset("key")
_FREE = layout.FLAG_FREE
_TOMBSTONE = layout.FLAG_TOMBSTONE
_WRITER_BITS = 12
_WRITER_MASK = np.uint64(WRITERS_MAX - 1)
assert WRITERS_MAX == 1 << _WRITER_BITS


@kernel("void(int64, int64, Array(uint64, 1, 'C', readonly=True), uint64)")
def note(ring: Int, capacity: Int, keys: U64, what: Int) -> None:
    """Enter keys into the ring at this address; `what` is the second word of their entries."""
    head = load_i64(ring + _HEAD)
    first = max(0, keys.size - capacity)  # of more than it holds only the last are there afterwards
    store_i64(ring + _RESERVED, head + keys.size)
    # Nobody takes an entry for the one that was there before: it is known to go before it is touched.
    fence_release()
    fence_program_order()
    for i in range(first, keys.size):
        entry = ring + _ENTRIES + ((head + i) & (capacity - 1)) * _ENTRY_BYTES
        store_u64(entry, keys[i])
        store_u64(entry + 8, what)
    store_release_i64(ring + _HEAD, head + keys.size)


@kernel("int64(int64, int64, int64, uint64[:, ::1])")
def noted(ring: Int, capacity: Int, begin: Int, out: U64) -> Int:
    """Copy entries from `begin` on, as many as there are and have room; returns how many, or -1: some are gone."""
    head = load_acquire_i64(ring + _HEAD)
    count = min(head - begin, out.shape[0])
    if count < 0 or head - begin > capacity:
        return -1
    for i in range(count):
        entry = ring + _ENTRIES + ((begin + i) & (capacity - 1)) * _ENTRY_BYTES
        out[i, 0], out[i, 1] = load_u64(entry), load_u64(entry + 8)
    fence_acquire()
    return count if load_i64(ring + _RESERVED) - begin <= capacity else -1


@kernel(
    "int64(int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), Array(boolean, 1, 'C', readonly=True), "
    "uint64[::1], int64[::1])"
)
def keys_above(table: Int, stride: Int, shards: Int, begin: Int, base: U64, whole: Mask, keys: U64, done: I64) -> Int:
    """Keys of the rows in slots from `begin` on, tombstones too, that the flattened vector `base` does not cover.

    All rows where `base` is empty, and of the shards that are `whole`. Takes no lock: what is written meanwhile is noted in the
    ring, and of what was not, the words do not change. Returns how many keys; done[0] is the first slot not looked at, done[1]
    how many slots there are.
    """
    end = load_acquire_i64(table + _ROWS_USED)
    rows = table + _ROWS
    count = 0
    slot = begin
    while slot < end and count < keys.size:
        row = rows + slot * stride
        prefetch_near(row + _PREFETCH_ROWS * stride)
        slot += 1
        if load_u32(row + _FLAGS) & _FREE:
            continue
        key = load_u64(row + _KEY)
        if base.size:
            stamp = load_u64(row + _STAMP)
            shard = np.int64(mix64(key) % np.uint64(shards))
            if not whole[shard] and stamp <= base[(shard << _WRITER_BITS) + np.int64(stamp & _WRITER_MASK)]:
                continue
        keys[count] = key
        count += 1
    done[0], done[1] = slot, end
    return count


@kernel("int64(int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), uint8[::1], uint64[::1], int64)")
def removed(table: Int, stride: Int, index: Int, capacity_log2: Int, keys: U64, kinds: U8, stamps: U64, begin: Int) -> Int:
    """What has become of keys[begin:]: ABSENT, DELETED or LIVE, and the stamp of what is there, 0 of nothing.

    Returns how many keys are done; fewer than there are when a row was busy, and the caller is to yield, to see that it has the
    index that is in use, and to call again. The search is that of `whole_row.read_by_key`.
    """
    base = table + _ROWS
    for i in range(begin, keys.size):
        key, kind, stamp = keys[i], BUSY, np.uint64(0)
        tag = tag_of(key)
        for _ in range(_SEARCHES_MAX):
            moved = False
            kind, stamp = ABSENT, np.uint64(0)
            entry = first_entry(index, capacity_log2, key)
            word = word_at(entry)
            while word != NOTHING:
                if has_tag(word, tag):
                    row = base + slot_in(word) * stride
                    spins = 0
                    while True:
                        lock = load_acquire_u32(row + _LOCK)
                        flags, held, stamp = load_u32(row + _FLAGS), load_u64(row + _KEY), load_u64(row + _STAMP)
                        fence_acquire()
                        if lock & 1 == 0 and load_u32(row + _LOCK) == lock:
                            break
                        spins += 1
                        if spins >= _SPINS_MAX:
                            return i
                        fence_program_order()
                    if flags & _FREE == 0:
                        if held == key:
                            kind = DELETED if flags & _TOMBSTONE else LIVE
                            break
                        if not has_tag(word, tag_of(held)):
                            moved = True
                entry = next_entry(index, capacity_log2, entry)
                word = word_at(entry)
            if kind != ABSENT or not moved:
                break
            kind = BUSY
        if kind == BUSY or (kind == ABSENT and load_acquire_i64(table + _GENERATION) != load_i64(index + _OWN_GENERATION)):
            return i
        kinds[i] = kind
        stamps[i] = stamp if kind != ABSENT else np.uint64(0)
    return keys.size
