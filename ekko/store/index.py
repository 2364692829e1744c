"""Kernels of the hash index: key to slot, open addressing over interleaved entries.

An entry is 16 bytes, {key, slot + 1}, so that a look-up of a present key costs one cache line of the index as a rule. Slot + 1
is written last, with release order: a reader that sees it sees the key and the whole row. Nothing leaves an index, so that no
look-up can lose its way; an index grows by being built anew beside the old one (`ekko.store.table`).

The position is the *top* bits of the key's hash, because the hash modulo the shards is the shard: with low bits, a store that
holds one partition only would crowd its index.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.atomics import (
    Int,
    fence_release,
    inline_kernel,
    kernel,
    load_acquire_i64,
    load_u64,
    prefetch_once,
    store_release_i64,
    store_u64,
)

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

# Keys whose index entries are on their way from memory at the same time. Measured: 16 to 32 are equal within noise.
PREFETCH_KEYS = 24

_ENTRIES = layout.INDEX.offset("entries")
_ENTRY_BYTES = layout.ENTRY_BYTES
_SLOT = layout.ENTRY.offset("slot_plus_one")
_ROWS = layout.TABLE.offset("rows")
_ROW_KEY = layout.ROW.offset("key")

_33 = np.uint64(33)
_MULTIPLIER_1 = np.uint64(0xFF51AFD7ED558CCD)
_MULTIPLIER_2 = np.uint64(0xC4CEB9FE1A85EC53)


@inline_kernel
def mix64(key: Int) -> Int:
    """The Murmur3 finaliser, a bijection of 64 bits."""
    key ^= key >> _33
    key *= _MULTIPLIER_1
    key ^= key >> _33
    key *= _MULTIPLIER_2
    key ^= key >> _33
    return key


@inline_kernel
def home(key: Int, capacity_log2: Int) -> Int:
    """Where the search for a key begins."""
    return np.int64(mix64(key) >> np.uint64(64 - capacity_log2))


@inline_kernel
def find(index: Int, capacity_log2: Int, key: Int, position: Int) -> Int:
    """The key's slot, or -1 when it is absent; the search begins at `position`."""
    mask = (1 << capacity_log2) - 1
    entries = index + _ENTRIES
    while True:
        entry = entries + position * _ENTRY_BYTES
        slot_plus_one = load_acquire_i64(entry + _SLOT)
        if slot_plus_one == 0:
            return -1
        if load_u64(entry) == key:
            return slot_plus_one - 1
        position = (position + 1) & mask


@inline_kernel
def insert(index: Int, capacity_log2: Int, key: Int, slot: Int) -> None:
    """Publish a key that is absent. The index must not be full."""
    mask = (1 << capacity_log2) - 1
    entries = index + _ENTRIES
    position = home(key, capacity_log2)
    while load_acquire_i64(entries + position * _ENTRY_BYTES + _SLOT) != 0:
        position = (position + 1) & mask
    entry = entries + position * _ENTRY_BYTES
    store_u64(entry, key)
    fence_release()
    store_release_i64(entry + _SLOT, slot + 1)


@inline_kernel
def _ask_for(index: Int, capacity_log2: Int, key: Int) -> Int:
    """Have the key's first entry fetched from memory; returns its address."""
    entry = index + _ENTRIES + home(key, capacity_log2) * _ENTRY_BYTES
    prefetch_once(entry)
    return entry


@kernel("void(int64, int64, Array(uint64, 1, 'C', readonly=True), int64[::1])")
def resolve(index: Int, capacity_log2: Int, keys: U64, slots: I64) -> None:
    """Find every key: its slot, or -1. `slots` is at least as long as `keys`."""
    end = index + _ENTRIES + (_ENTRY_BYTES << capacity_log2)
    count = keys.size
    for i in range(min(PREFETCH_KEYS, count)):
        slots[i] = _ask_for(index, capacity_log2, keys[i])
    for i in range(count):
        if i + PREFETCH_KEYS < count:
            slots[i + PREFETCH_KEYS] = _ask_for(index, capacity_log2, keys[i + PREFETCH_KEYS])
        entry = slots[i]  # until it is overwritten by the slot
        slot_plus_one = load_acquire_i64(entry + _SLOT)
        while slot_plus_one != 0 and load_u64(entry) != keys[i]:
            entry += _ENTRY_BYTES
            if entry == end:
                entry = index + _ENTRIES
            slot_plus_one = load_acquire_i64(entry + _SLOT)
        slots[i] = slot_plus_one - 1


@kernel("void(int64, int64, int64, int64, int64, int64)")
def insert_rows(index: Int, capacity_log2: Int, table: Int, stride: Int, slot_begin: Int, slot_end: Int) -> None:
    """Enter the rows of these slots, none of which the index holds yet: how a larger index is filled."""
    entries = index + _ENTRIES
    rows = table + _ROWS + _ROW_KEY
    for ahead in range(slot_begin, slot_end + PREFETCH_KEYS):
        if ahead < slot_end:
            prefetch_once(entries + home(load_u64(rows + ahead * stride), capacity_log2) * _ENTRY_BYTES)
        slot = ahead - PREFETCH_KEYS
        if slot >= slot_begin:
            insert(index, capacity_log2, load_u64(rows + slot * stride), slot)


@kernel("void(Array(uint64, 1, 'C', readonly=True), int64, int64[::1])")
def shards_of(keys: U64, shards: Int, out: I64) -> None:
    """The shard of each key: `mix64(key) mod shards`."""
    for i in range(keys.size):
        out[i] = np.int64(mix64(keys[i]) % np.uint64(shards))
