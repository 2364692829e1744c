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
from ekko.store.kernels.atomics import load_acquire_i64, load_u64, prefetch_once, prefetch_write, store_release_i64, store_u64
from ekko.store.kernels.compile import Int, inline_kernel, kernel

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
def first_entry(index: Int, capacity_log2: Int, key: Int) -> Int:
    """Address of the entry at which the search for a key begins."""
    return index + _ENTRIES + np.int64(mix64(key) >> np.uint64(64 - capacity_log2)) * _ENTRY_BYTES


@inline_kernel
def next_entry(index: Int, capacity_log2: Int, entry: Int) -> Int:
    """The entry after this one, round the end."""
    entry += _ENTRY_BYTES
    return entry if entry != index + _ENTRIES + (_ENTRY_BYTES << capacity_log2) else index + _ENTRIES


@inline_kernel
def search(index: Int, capacity_log2: Int, key: Int, entry: Int) -> Int:
    """Address of the key's entry, or of the empty one where it belongs; the search begins at `entry`. For the writer."""
    while slot_at(entry) >= 0 and load_u64(entry) != key:
        entry = next_entry(index, capacity_log2, entry)
    return entry


@inline_kernel
def find(index: Int, capacity_log2: Int, key: Int, entry: Int) -> Int:
    """The key's slot, or -1; the search begins at `entry`. For readers: each entry is looked at once, since the writer may fill
    an empty one with another key at any time.
    """
    slot = slot_at(entry)
    while slot != -1 and (slot < 0 or load_u64(entry) != key):  # past removed entries
        entry = next_entry(index, capacity_log2, entry)
        slot = slot_at(entry)
    return slot


@inline_kernel
def slot_at(entry: Int) -> Int:
    """The slot in an entry; -1 when it is empty. Where there is one, key and row are there too."""
    return load_acquire_i64(entry + _SLOT) - 1


@inline_kernel
def publish(entry: Int, key: Int, slot: Int) -> None:
    """Fill an empty entry; from here on readers find the row."""
    store_u64(entry, key)
    store_release_i64(entry + _SLOT, slot + 1)


@kernel("void(int64, int64, Array(uint64, 1, 'C', readonly=True), int64[::1])")
def resolve(index: Int, capacity_log2: Int, keys: U64, slots: I64) -> None:
    """Find every key: its slot, or -1. `slots` is at least as long as `keys`."""
    count = keys.size
    for ahead in range(count + PREFETCH_KEYS):
        if ahead < count:
            slots[ahead] = first_entry(index, capacity_log2, keys[ahead])  # until it is overwritten by the slot
            prefetch_once(slots[ahead])
        i = ahead - PREFETCH_KEYS
        if i >= 0:
            slots[i] = find(index, capacity_log2, keys[i], slots[i])


@kernel("void(int64, int64, int64, int64, int64, int64)")
def insert_rows(index: Int, capacity_log2: Int, table: Int, stride: Int, slot_begin: Int, slot_end: Int) -> None:
    """Enter the rows of these slots, which may be there already: how a larger index is filled."""
    rows = table + _ROWS + _ROW_KEY
    for ahead in range(slot_begin, slot_end + PREFETCH_KEYS):
        if ahead < slot_end:
            prefetch_write(first_entry(index, capacity_log2, load_u64(rows + ahead * stride)))
        slot = ahead - PREFETCH_KEYS
        if slot >= slot_begin:
            key = load_u64(rows + slot * stride)
            publish(search(index, capacity_log2, key, first_entry(index, capacity_log2, key)), key, slot)


@kernel("boolean(Array(uint64, 1, 'C', readonly=True), int64, Array(uint32, 1, 'C', readonly=True))")
def all_in_shards(keys: U64, shards: Int, chosen: NDArray[np.uint32]) -> bool:
    """Whether the shard of every key is among the chosen ones, each of which is below `shards`."""
    mask = np.zeros(shards, np.bool_)
    for i in range(chosen.size):
        mask[chosen[i]] = True
    inside = True
    for i in range(keys.size):
        inside &= mask[np.int64(mix64(keys[i]) % np.uint64(shards))]
    return inside


@kernel("void(Array(uint64, 1, 'C', readonly=True), int64, int64[::1])")
def shards_of(keys: U64, shards: Int, out: I64) -> None:
    """The shard of each key: `mix64(key) mod shards`."""
    for i in range(keys.size):
        out[i] = np.int64(mix64(keys[i]) % np.uint64(shards))
