"""Kernels of the hash index: key to slot, open addressing over entries of 8 bytes.

An entry is a slot and 31 bits of the key's hash, the tag; the key itself is in the row. So eight entries lie in a cache line,
and a search goes past another key's entry without a look at its row, but once in 2^31 times. Whoever finds a slot compares the
key in the row: readers do so anyway, since the slot may have changed hands (`ekko.store.kernels.whole_row`), and the writer
reads the row's stamp next to it.

An entry is one word, stored with release order: a reader that sees it sees the whole row.

An entry that is not needed any more is marked as removed, so that searches find their way past it, and the next key that comes
by may have it. An index that is full of keys and removed entries is built anew beside the old one (`ekko.store.table`).

The position is the *top* bits of the key's hash, because the hash modulo the shards is the shard: with low bits, a store that
holds one partition only would crowd its index. The tag is the low ones, which the position does not say already.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import (
    fence_program_order,
    load_acquire_i64,
    load_i64,
    load_u32,
    load_u64,
    prefetch_bytes,
    prefetch_near,
    prefetch_write,
    store_i64,
    store_release_i64,
)
from ekko.store.kernels.compile import Int, inline_kernel, kernel

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

# Keys whose index entries are on their way from memory at the same time. Measured: 16 to 32 are equal within noise.
PREFETCH_KEYS = 24
# The same for rows of which the key is compared.
_PREFETCH_ROWS = 32

_ENTRIES = layout.INDEX.offset("entries")
_ENTRY_BYTES = layout.ENTRY_BYTES
_REMOVED_COUNT = layout.INDEX.offset("removed")
_ROWS = layout.TABLE.offset("rows")
_ROW_KEY = layout.ROW.offset("key")
_ROW_FLAGS = layout.ROW.offset("flags")
_FREE = layout.FLAG_FREE

# Words of entries that hold no slot; all others are negative, since the uppermost bit of a tag is 1.
NOTHING, REMOVED = layout.ENTRY_EMPTY, layout.ENTRY_REMOVED
# What `slot_at` says of them.
EMPTY, _NO_MORE = -1, -2

_SLOT_MASK = (1 << 32) - 1
_TAG_SHIFT = 32
_TAG_MASK = np.uint64((1 << 31) - 1)
_TAG_SIGN = 1 << 31

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
    return _first_entry_of(index, capacity_log2, mix64(key))


@inline_kernel
def _first_entry_of(index: Int, capacity_log2: Int, hashed: Int) -> Int:
    return index + _ENTRIES + np.int64(hashed >> np.uint64(64 - capacity_log2)) * _ENTRY_BYTES


@inline_kernel
def next_entry(index: Int, capacity_log2: Int, entry: Int) -> Int:
    """The entry after this one, round the end."""
    entry += _ENTRY_BYTES
    return entry if entry != index + _ENTRIES + (_ENTRY_BYTES << capacity_log2) else index + _ENTRIES


@inline_kernel
def _previous_entry(index: Int, capacity_log2: Int, entry: Int) -> Int:
    """The entry before this one, round the end."""
    return (entry if entry != index + _ENTRIES else index + _ENTRIES + (_ENTRY_BYTES << capacity_log2)) - _ENTRY_BYTES


@inline_kernel
def tag_of(key: Int) -> Int:
    """What an entry says of its key, an int64 below 0."""
    return _tag_in(mix64(key))


@inline_kernel
def _tag_in(hashed: Int) -> Int:
    return np.int64(hashed & _TAG_MASK) - _TAG_SIGN


@inline_kernel
def word_at(entry: Int) -> Int:
    """The entry, an int64. Where it holds a slot, the row is there too."""
    return load_acquire_i64(entry)


@inline_kernel
def has_tag(word: Int, tag: Int) -> bool:
    """Whether the entry may be that of a key with this tag."""
    return bool(word >> _TAG_SHIFT == tag)


@inline_kernel
def slot_in(word: Int) -> Int:
    """The slot in an entry that holds one."""
    return word & _SLOT_MASK


@inline_kernel
def slot_at(entry: Int) -> Int:
    """The slot in an entry; negative when it is empty or removed."""
    word = word_at(entry)
    if word < 0:
        return slot_in(word)
    return np.int64(EMPTY) if word == NOTHING else np.int64(_NO_MORE)


@inline_kernel
def search(index: Int, capacity_log2: Int, table: Int, stride: Int, key: Int) -> Int:
    """Address of the key's entry, or of the one to put it in: the first removed one on the way, or the empty one at its end.

    For the writer.
    """
    entry = first_entry(index, capacity_log2, key)
    tag = tag_of(key)
    removed = np.int64(0)
    word = word_at(entry)
    while word != NOTHING:
        if has_tag(word, tag):
            if load_u64(table + _ROWS + slot_in(word) * stride + _ROW_KEY) == key:
                return entry
        elif word == REMOVED and removed == 0:
            removed = entry
        entry = next_entry(index, capacity_log2, entry)
        word = word_at(entry)
    return removed if removed else entry


@inline_kernel
def _find(index: Int, capacity_log2: Int, hashed: Int) -> Int:
    """The first slot that may be that of the key with this hash, or a negative number.

    For readers, too: each entry is looked at once, since the writer may fill an empty or removed one at any time.
    """
    entry = _first_entry_of(index, capacity_log2, hashed)
    tag = _tag_in(hashed)
    word = word_at(entry)
    while word != NOTHING and not has_tag(word, tag):
        entry = next_entry(index, capacity_log2, entry)
        word = word_at(entry)
    return slot_in(word) if word != NOTHING else np.int64(EMPTY)


@inline_kernel
def removed_in(index: Int) -> Int:
    """How many entries are removed; after a kill it may be too many."""
    return load_i64(index + _REMOVED_COUNT)


@inline_kernel
def _word_of(key: Int, slot: Int) -> Int:
    """The entry of a key that has this slot."""
    return tag_of(key) << _TAG_SHIFT | slot


@inline_kernel
def publish(index: Int, entry: Int, key: Int, slot: Int) -> None:
    """Fill an entry without a slot, or with this one; from here on readers find the row."""
    was_removed = word_at(entry) == REMOVED
    store_release_i64(entry, _word_of(key, slot))
    if was_removed:
        fence_program_order()
        store_i64(index + _REMOVED_COUNT, removed_in(index) - 1)


@inline_kernel
def retract(index: Int, capacity_log2: Int, key: Int, slot: Int) -> None:
    """Take the entry of a key away, if it has one with this slot."""
    entry = first_entry(index, capacity_log2, key)
    named = _word_of(key, slot)
    word = word_at(entry)
    while word != named:
        if word == NOTHING:
            return
        entry = next_entry(index, capacity_log2, entry)
        word = word_at(entry)
    store_i64(index + _REMOVED_COUNT, removed_in(index) + 1)
    fence_program_order()
    store_release_i64(entry, np.int64(REMOVED))
    # Where the next entry is empty, no search has to go past this one, nor past removed ones right before it.
    if word_at(next_entry(index, capacity_log2, entry)) == NOTHING:
        while word_at(entry) == REMOVED:
            store_release_i64(entry, np.int64(NOTHING))
            fence_program_order()
            store_i64(index + _REMOVED_COUNT, removed_in(index) - 1)
            entry = _previous_entry(index, capacity_log2, entry)


@inline_kernel
def _resolve(index: Int, capacity_log2: Int, keys: U64, slots: I64, rows: Int, stride: Int) -> None:
    """`resolve`; and fetch the rows, unless the address of the first one is 0."""
    count = keys.size
    for ahead in range(count + PREFETCH_KEYS):
        if ahead < count:
            hashed = mix64(keys[ahead])
            slots[ahead] = np.int64(hashed)  # until it is overwritten by the slot
            prefetch_near(_first_entry_of(index, capacity_log2, hashed))
        i = ahead - PREFETCH_KEYS
        if i >= 0:
            slots[i] = _find(index, capacity_log2, np.uint64(slots[i]))
            if rows:
                prefetch_bytes(rows + slots[i] * stride, stride)


@kernel("void(int64, int64, Array(uint64, 1, 'C', readonly=True), int64[::1])")
def resolve(index: Int, capacity_log2: Int, keys: U64, slots: I64) -> None:
    """Find for every key the first slot that may be its own, or a negative number: whose the row is, only the row says.

    `slots` is at least as long as `keys`.
    """
    _resolve(index, capacity_log2, keys, slots, 0, 0)


@kernel("void(int64, int64, Array(uint64, 1, 'C', readonly=True), int64[::1], int64, int64)")
def resolve_and_fetch(index: Int, capacity_log2: Int, keys: U64, slots: I64, rows: Int, stride: Int) -> None:
    """`resolve`, and fetch the row in each slot; the first one is at the address `rows`."""
    _resolve(index, capacity_log2, keys, slots, rows, stride)


@kernel("void(int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), int64[::1])")
def resolve_rows(index: Int, capacity_log2: Int, table: Int, stride: Int, keys: U64, slots: I64) -> None:
    """Find every key: its slot, or a negative number. For the writer; `slots` is as long as `keys`."""
    resolve(index, capacity_log2, keys, slots)
    rows = table + _ROWS
    for i in range(keys.size):
        if i + _PREFETCH_ROWS < keys.size:
            prefetch_near(rows + slots[i + _PREFETCH_ROWS] * stride + _ROW_KEY)
        if slots[i] >= 0 and load_u64(rows + slots[i] * stride + _ROW_KEY) != keys[i]:
            slots[i] = slot_at(search(index, capacity_log2, table, stride, keys[i]))


@inline_kernel
def insert(index: Int, capacity_log2: Int, table: Int, stride: Int, key: Int, slot: Int) -> None:
    """Enter a key, which may be there already."""
    publish(index, search(index, capacity_log2, table, stride, key), key, slot)


@kernel("void(int64, int64, int64, int64, int64, int64)")
def insert_rows(index: Int, capacity_log2: Int, table: Int, stride: Int, slot_begin: Int, slot_end: Int) -> None:
    """Enter the rows in these slots, which may be there already: how an index is built anew."""
    rows = table + _ROWS
    for ahead in range(slot_begin, slot_end + PREFETCH_KEYS):
        if ahead < slot_end:
            prefetch_write(first_entry(index, capacity_log2, load_u64(rows + ahead * stride + _ROW_KEY)))
        slot = ahead - PREFETCH_KEYS
        if slot >= slot_begin:
            row = rows + slot * stride
            if load_u32(row + _ROW_FLAGS) & _FREE == 0:
                insert(index, capacity_log2, table, stride, load_u64(row + _ROW_KEY), slot)


@kernel("void(int64, int64, int64, int64, Array(int64, 1, 'C', readonly=True))")
def insert_slots(index: Int, capacity_log2: Int, table: Int, stride: Int, slots: I64) -> None:
    """`insert_rows` for slots in no order."""
    for i in range(slots.size):
        insert(index, capacity_log2, table, stride, load_u64(table + _ROWS + slots[i] * stride + _ROW_KEY), slots[i])


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
