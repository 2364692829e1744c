"""Kernels over rows, for their one writer: apply, remove, read back, scan. Readers have `gather`.

A row is 24 bytes of header {lock, flags, stamp, key} and its encoded data (`ekko.store.layout`), at
`table + rows + slot * stride`, and never moves. There is one writer, and any number of readers, in other processes too.

Sequence lock. The writer makes the lock odd, writes, and makes it even again; a reader copies between two looks at the lock and
takes the copy only when both saw the same even number. Fences: the writer's odd number is visible before any byte of the new
row (release fence), its even number after all of them (release store); the reader's first look is an acquire load, and an
acquire fence keeps its second look behind the copy.

Free slots. A row that is removed leaves its slot free: under the lock, so that no reader takes half of what comes next for a
row; then its index entry goes. A new key takes a free slot before the table grows: under the lock, with another epoch
(`ekko.store.kernels.places`); then the index entry is published.

Killed in mid-row. Before a row is overwritten, freed, or put into a free slot, it is copied into the undo record. If the
writer dies while the lock is odd, whoever attaches next puts the image back (`undo`). Between rows the lock is even, and the
record is left alone. A new row behind all others is written whole, then counted, then published in the index. So a kill leaves
at most two rows with which the index does not agree, the one in the record and the last: `mend`.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import (
    copy_bytes,
    fence_program_order,
    fence_release,
    load_i64,
    load_u32,
    load_u64,
    prefetch_near,
    prefetch_write,
    store_i64,
    store_release_i64,
    store_release_u32,
    store_u32,
    store_u64,
)
from ekko.store.kernels.compile import Int, inline_kernel, kernel
from ekko.store.kernels.index import EMPTY, first_entry, insert, mix64, publish, removed_in, resolve, retract, search, slot_at
from ekko.store.kernels.places import is_current, place_of, row_at, slot_of
from ekko.store.kernels.ring import merge_dvv

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

# Keys are resolved in parts of this many before their rows are written; of readers, see `parts`. The scratch that holds the
# slots of a part stays in the nearest cache.
PART_KEYS = 2_048
# Rows that are on their way from memory at the same time. Measured: 8 is a few percent worse, and more is not better.
PREFETCH_ROWS = 32
# The same for rows to be written. Measured: 8 is 5 % better than 16.
PREFETCH_ROWS_TO_WRITE = 8
_LOCK = layout.ROW.offset("lock")
_FLAGS = layout.ROW.offset("flags")
_STAMP = layout.ROW.offset("stamp")
_KEY = layout.ROW.offset("key")
_DATA = layout.ROW.offset("data")
_TOMBSTONE = layout.FLAG_TOMBSTONE
_FREE = layout.FLAG_FREE
_EPOCH = np.uint32(0xFFFF << layout.SLOT_EPOCH_SHIFT)
_EPOCH_ONE = np.uint32(1 << layout.SLOT_EPOCH_SHIFT)
_ROWS = layout.TABLE.offset("rows")
_ROWS_USED = layout.TABLE.offset("rows_used")
_TOMBSTONES = layout.TABLE.offset("tombstones")
_FREE_SLOTS = layout.TABLE.offset("free")
_REUSED = layout.TABLE.offset("slots_reused")
_UNDO_SLOT = layout.UNDO.offset("slot_plus_one")
_UNDO_TABLE = layout.UNDO.offset("table")
_UNDO_ROW = layout.UNDO.offset("row")
_LINE = layout.LINE_BYTES

# Indices of what `apply` reports.
WRITTEN, INSERTED, STALE = 0, 1, 2

_WRITER_MASK = np.uint64(4095)
_WRITER_BITS = 12


@inline_kernel
def _prefetch_row_to_write(row: Int, stride: Int) -> None:
    for offset in range(0, stride, _LINE):
        prefetch_write(row + offset)


@inline_kernel
def _prefetch_to_write(base: Int, stride: Int, index: Int, capacity_log2: Int, used: Int, key: Int, slot: Int) -> None:
    """Fetch what writing a key's row will touch; a new one is taken to come soon behind all others."""
    if slot >= 0:
        _prefetch_row_to_write(base + slot * stride, stride)
    else:
        prefetch_write(first_entry(index, capacity_log2, key))
        _prefetch_row_to_write(base + (used + PREFETCH_ROWS_TO_WRITE) * stride, stride)


@inline_kernel
def _save_undo(undo: Int, table_id: Int, slot: Int, row: Int, stride: Int) -> None:
    """Keep the row as it is, so that a kill from here on can be taken back."""
    fence_program_order()  # the row before this one is finished before its image is overwritten
    copy_bytes(undo + _UNDO_ROW, row, stride)
    store_i64(undo + _UNDO_TABLE, table_id)
    store_i64(undo + _UNDO_SLOT, slot + 1)
    fence_program_order()


@inline_kernel
def _lock(row: Int) -> Int:
    """Make the row's lock odd; returns what it was."""
    lock = load_u32(row + _LOCK)
    store_u32(row + _LOCK, np.uint32(lock + 1))
    fence_release()
    fence_program_order()
    return lock


@inline_kernel
def _unlock(row: Int, lock: Int) -> None:
    store_release_u32(row + _LOCK, np.uint32(lock + 2))


@inline_kernel
def _add(word: Int, amount: Int) -> None:
    """Count in a word that nobody else writes."""
    store_i64(word, load_i64(word) + amount)


@inline_kernel
def _overwrite(table: Int, row: Int, stamp: Int, data: Int, row_bytes: Int) -> None:
    """Put a newer version into an existing row; data = 0: a tombstone."""
    flags = load_u32(row + _FLAGS)
    was_tombstone = flags & _TOMBSTONE
    lock = _lock(row)
    store_u64(row + _STAMP, stamp)
    if data == 0:
        store_u32(row + _FLAGS, np.uint32(flags | _TOMBSTONE))
        if not was_tombstone:
            _add(table + _TOMBSTONES, 1)
    else:
        copy_bytes(row + _DATA, data, row_bytes)
        if was_tombstone:
            store_u32(row + _FLAGS, np.uint32(flags ^ _TOMBSTONE))
            _add(table + _TOMBSTONES, -1)
    _unlock(row, lock)


@inline_kernel
def _fill(table: Int, row: Int, flags: Int, key: Int, stamp: Int, data: Int, row_bytes: Int) -> None:
    """Write a key's first version into a slot; `flags` hold its epoch only."""
    store_u64(row + _STAMP, stamp)
    store_u64(row + _KEY, key)
    if data == 0:
        store_u32(row + _FLAGS, np.uint32(flags | _TOMBSTONE))
        _add(table + _TOMBSTONES, 1)
    else:
        store_u32(row + _FLAGS, np.uint32(flags))
        copy_bytes(row + _DATA, data, row_bytes)


@inline_kernel
def _append(table: Int, slot: Int, row: Int, key: Int, stamp: Int, data: Int, row_bytes: Int) -> None:
    """Write a new row behind all others and count it; no reader can know it yet."""
    store_u32(row + _LOCK, np.uint32(0))
    _fill(table, row, np.uint32(0), key, stamp, data, row_bytes)
    store_release_i64(table + _ROWS_USED, slot + 1)
    fence_program_order()


@inline_kernel
def _reuse(table: Int, row: Int, key: Int, stamp: Int, data: Int, row_bytes: Int) -> None:
    """Put a key into a free slot; readers that knew the slot from before may be at it."""
    flags = np.uint32((load_u32(row + _FLAGS) & _EPOCH) + _EPOCH_ONE)
    lock = _lock(row)
    _fill(table, row, flags, key, stamp, data, row_bytes)
    _add(table + _FREE_SLOTS, -1)
    _add(table + _REUSED, 1)
    _unlock(row, lock)


@inline_kernel
def _release(table: Int, row: Int) -> None:
    """Make the row's slot free. Its key stays there, for `mend`."""
    flags = load_u32(row + _FLAGS)
    lock = _lock(row)
    store_u32(row + _FLAGS, np.uint32((flags & _EPOCH) | np.uint32(_FREE)))
    _add(table + _FREE_SLOTS, 1)
    if flags & _TOMBSTONE:
        _add(table + _TOMBSTONES, -1)
    _unlock(row, lock)


@inline_kernel
def _insert(
    table: Int,
    table_id: Int,
    stride: Int,
    row_bytes: Int,
    rows_max: Int,
    index: Int,
    entries_max: Int,
    undo: Int,
    free: Int,
    entry: Int,
    key: Int,
    stamp: Int,
    data: Int,
) -> Int:
    """Give a key a slot, and publish it at `entry`; returns its slot, or -1 when there is no room."""
    used, spare = load_i64(table + _ROWS_USED), load_i64(table + _FREE_SLOTS)
    if slot_at(entry) == EMPTY and used - spare + removed_in(index) >= entries_max:
        return np.int64(-1)
    if spare:
        slot = load_i64(free + (spare - 1) * 8)
        row = table + _ROWS + slot * stride
        _save_undo(undo, table_id, slot, row, stride)
        _reuse(table, row, key, stamp, data, row_bytes)
    elif used < rows_max:
        slot = used
        _append(table, slot, table + _ROWS + slot * stride, key, stamp, data, row_bytes)
    else:
        return np.int64(-1)
    publish(index, entry, key, slot)
    return slot


@kernel(
    "int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), "
    "Array(uint8, 2, 'C', readonly=True), Array(uint64, 1, 'C', readonly=True), uint64, int64, int64[::1], int64[::1])"
)
def apply(
    table: Int,
    table_id: Int,
    stride: Int,
    row_bytes: Int,
    rows_max: Int,
    index: Int,
    capacity_log2: Int,
    entries_max: Int,
    undo: Int,
    free: Int,
    keys: U64,
    rows: U8,
    stamps: U64,
    stamp: Int,
    begin: Int,
    written: I64,
    counts: I64,
) -> Int:
    """Write keys[begin:] whose stamp is newer than what is held; the keys after the rows are tombstones.

    `stamps` is empty when all carry `stamp`. Returns how many keys are done: fewer than there are when a key would have needed
    row `rows_max`, or one entry more than `entries_max` in the index, and the caller is to make room and call again. `free` is
    the address of the free slots, as many as the table counts; they are taken from the end. `written`, int64[keys.size], gets
    the place of each row that was written, -1 of the others that are done. `counts` is added to.
    """
    slots = np.empty(min(keys.size, PART_KEYS), np.int64)
    live = rows.shape[0]
    source = np.int64(rows.ctypes.data)
    base = table + _ROWS
    for part in range(begin, keys.size, PART_KEYS):
        end = min(part + PART_KEYS, keys.size)
        used = load_i64(table + _ROWS_USED) - part
        resolve(index, capacity_log2, keys[part:end], slots)
        for i in range(part, end):
            ahead = i + PREFETCH_ROWS_TO_WRITE
            if ahead < end:
                _prefetch_to_write(base, stride, index, capacity_log2, used + i, keys[ahead], slots[ahead - part])
            row_stamp = stamps[i] if stamps.size else stamp
            row_data = source + i * row_bytes if i < live else 0
            slot = slots[i - part]
            if slot < 0 or load_u64(base + slot * stride + _KEY) != keys[i]:
                # Again: an earlier key of this part may have been the same one, or another one may have the same tag.
                entry = search(index, capacity_log2, table, stride, keys[i])
                slot = slot_at(entry)
                if slot < 0:
                    slot = _insert(
                        table,
                        table_id,
                        stride,
                        row_bytes,
                        rows_max,
                        index,
                        entries_max,
                        undo,
                        free,
                        entry,
                        keys[i],
                        row_stamp,
                        row_data,
                    )
                    if slot < 0:
                        return i
                    written[i] = place_of(slot, load_u32(base + slot * stride + _FLAGS))
                    counts[WRITTEN] += 1
                    counts[INSERTED] += 1
                    continue
            row = base + slot * stride
            if row_stamp <= load_u64(row + _STAMP):
                counts[STALE] += 1
                written[i] = -1
                continue
            _save_undo(undo, table_id, slot, row, stride)
            _overwrite(table, row, row_stamp, row_data, row_bytes)
            written[i] = place_of(slot, load_u32(row + _FLAGS))
            counts[WRITTEN] += 1
    return keys.size


@kernel(
    "int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, Array(int64, 1, 'C', readonly=True), uint64[::1], "
    "uint64[::1])"
)
def remove(
    table: Int,
    table_id: Int,
    stride: Int,
    index: Int,
    capacity_log2: Int,
    next_index: Int,
    next_capacity_log2: Int,
    undo: Int,
    free: Int,
    places: I64,
    keys: U64,
    stamps: U64,
) -> Int:
    """Free the slots of these places; those that are not current are passed. Returns how many were.

    `next_index` is 0, or the address of the one that is being filled; `free` has room behind its end for all of them. Keys and
    stamps of the rows that went are written to `keys` and `stamps`.
    """
    count = 0
    for i in range(places.size):
        if i + 2 * PREFETCH_ROWS < places.size:
            prefetch_near(row_at(table, stride, places[i + 2 * PREFETCH_ROWS]))
        if i + PREFETCH_ROWS < places.size:
            ahead = row_at(table, stride, places[i + PREFETCH_ROWS])
            prefetch_write(first_entry(index, capacity_log2, load_u64(ahead + _KEY)))
            _prefetch_row_to_write(ahead, stride)
        slot, row = slot_of(places[i]), row_at(table, stride, places[i])
        if not is_current(row, places[i]):
            continue
        keys[count], stamps[count] = load_u64(row + _KEY), load_u64(row + _STAMP)
        _save_undo(undo, table_id, slot, row, stride)
        store_i64(free + load_i64(table + _FREE_SLOTS) * 8, slot)
        _release(table, row)
        retract(index, capacity_log2, keys[count], slot)
        if next_index:
            retract(next_index, next_capacity_log2, keys[count], slot)
        count += 1
    return count


@kernel("int64(int64, int64, int64, int64)")
def undo(table: Int, stride: Int, undo_record: Int, table_id: Int) -> Int:
    """Take back the row that a killed writer left half-written. Returns the slot in the record, -1 if it is not of this table.

    The lock moves on to the next even number: a reader that began before the kill must not find the number it began with.
    """
    slot = load_i64(undo_record + _UNDO_SLOT) - 1
    if load_i64(undo_record + _UNDO_TABLE) != table_id or slot >= load_i64(table + _ROWS_USED):
        return np.int64(-1)
    if slot >= 0:
        row = table + _ROWS + slot * stride
        lock = load_u32(row + _LOCK)
        if lock & 1:
            copy_bytes(row + _FLAGS, undo_record + _UNDO_ROW + _FLAGS, stride - _FLAGS)
            store_release_u32(row + _LOCK, np.uint32(lock + 1))
    return slot


@kernel("void(int64, int64, int64, int64, int64)")
def mend(table: Int, stride: Int, index: Int, capacity_log2: Int, slot: Int) -> None:
    """Make the index agree with a slot at which a writer may have been killed."""
    row = table + _ROWS + slot * stride
    if load_u32(row + _FLAGS) & _FREE:
        retract(index, capacity_log2, load_u64(row + _KEY), slot)
    else:
        insert(index, capacity_log2, table, stride, load_u64(row + _KEY), slot)


@kernel("int64(int64, int64, int64, int64, int64, int64[::1])")
def survey(table: Int, stride: Int, shards: Int, dvv: Int, writers: Int, free: I64) -> Int:
    """Count tombstones and free slots anew, in the table's header; the slots too, into `free` as far as it goes.

    The stamps of all rows are merged into DVV (R10): one look at each row for both.
    """
    tombstones = spare = np.int64(0)
    rows = table + _ROWS
    for slot in range(load_i64(table + _ROWS_USED)):
        row = rows + slot * stride
        prefetch_near(row + PREFETCH_ROWS * stride)
        flags = load_u32(row + _FLAGS)
        if flags & _FREE:
            if spare < free.size:
                free[spare] = slot
            spare += 1
            continue
        tombstones += flags & _TOMBSTONE != 0
        shard = np.int64(mix64(load_u64(row + _KEY)) % np.uint64(shards))
        merge_dvv(load_u64(row + _STAMP), shard, shards, dvv, writers)
    store_i64(table + _TOMBSTONES, tombstones)
    store_i64(table + _FREE_SLOTS, spare)
    return spare


@kernel("int64(int64, int64, Array(int64, 1, 'C', readonly=True), int64[::1])")
def order_live_first(table: Int, stride: Int, places: I64, ordered: I64) -> Int:
    """Sort places into `ordered`, live rows in front, tombstones at the end; returns how many are live.

    Places that are not current any more are left out: as many entries of `ordered`, between the two, become -1.
    """
    live = 0
    dead = places.size
    for i in range(places.size):
        if i + PREFETCH_ROWS < places.size:
            prefetch_near(row_at(table, stride, places[i + PREFETCH_ROWS]))
        row = row_at(table, stride, places[i])
        if not is_current(row, places[i]):
            continue
        if load_u32(row + _FLAGS) & _TOMBSTONE:
            dead -= 1
            ordered[dead] = places[i]
        else:
            ordered[live] = places[i]
            live += 1
    ordered[live:dead] = -1
    return live


@kernel("void(int64, int64, int64, Array(int64, 1, 'C', readonly=True), uint64[::1], uint8[:, ::1], uint64[::1])")
def read(table: Int, stride: Int, row_bytes: Int, places: I64, keys: U64, rows: U8, stamps: U64) -> None:
    """Copy rows by place, live ones first (len(rows) of them), all current. For the writer's own thread: takes no lock."""
    target = np.int64(rows.ctypes.data)
    for i in range(places.size):
        if i + PREFETCH_ROWS < places.size:
            ahead = row_at(table, stride, places[i + PREFETCH_ROWS])
            for offset in range(0, stride, _LINE):
                prefetch_near(ahead + offset)
        row = row_at(table, stride, places[i])
        keys[i] = load_u64(row + _KEY)
        stamps[i] = load_u64(row + _STAMP)
        if i < rows.shape[0]:
            copy_bytes(target + i * row_bytes, row + _DATA, row_bytes)


@inline_kernel
def _above(row: Int, base_vector: U64, shards: Int) -> bool:
    """Is the row newer than what the vector uint64[shards * 4096] says of its shard and writer?"""
    stamp = load_u64(row + _STAMP)
    shard = np.int64(mix64(load_u64(row + _KEY)) % np.uint64(shards))
    return bool(stamp > base_vector[(shard << _WRITER_BITS) + np.int64(stamp & _WRITER_MASK)])


@kernel("int64(int64, int64, Array(uint64, 1, 'C', readonly=True), int64, int64, int64, int64[::1])")
def changed_since(table: Int, stride: Int, base_vector: U64, shards: Int, begin: Int, end: Int, out: I64) -> Int:
    """Places of the rows in slots [begin, end) above the flattened vector, into `out`; returns how many."""
    count = 0
    rows = table + _ROWS
    for slot in range(begin, end):
        row = rows + slot * stride
        prefetch_near(row + PREFETCH_ROWS * stride)
        flags = load_u32(row + _FLAGS)
        if flags & _FREE == 0 and _above(row, base_vector, shards):
            out[count] = place_of(slot, flags)
            count += 1
    return count


@kernel(
    "int64(int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), Array(uint8, 2, 'C', readonly=True), "
    "Array(int64, 1, 'C', readonly=True), int64[::1])"
)
def without(table: Int, stride: Int, shards: Int, partitions: Int, known: U64, bits: U8, places: I64, out: I64) -> Int:
    """Those places, into `out`, whose row is of no known step, or in no shard for which its bit is set; returns how many.

    `known` ascends; bits of shards of a partition, which are every so many of the model's. See `p2p.replica.KnownSteps`.
    """
    count = 0
    for i in range(places.size):
        row = row_at(table, stride, places[i])
        stamp = load_u64(row + _STAMP)
        low, high = 0, known.size
        while low < high:
            middle = (low + high) >> 1
            if known[middle] < stamp:
                low = middle + 1
            else:
                high = middle
        is_known = False
        if low < known.size and known[low] == stamp:
            shard = np.int64(mix64(load_u64(row + _KEY)) % np.uint64(shards)) // partitions
            is_known = (bits[low, shard >> 3] >> (shard & 7)) & 1 != 0
        if not is_known:
            out[count] = places[i]
            count += 1
    return count


_SALT_LOW = np.uint64(0x9E3779B97F4A7C15)
_SALT_HIGH = np.uint64(0xC2B2AE3D27D4EB4F)


@kernel("void(int64, int64, uint64, Array(int64, 1, 'C', readonly=True), uint64[::1])")
def digest(table: Int, stride: Int, table_id: Int, places: I64, sums: U64) -> None:
    """Add two independent 64-bit hashes of (table, key, stamp) of each place, all current, to `sums`: equal in any order."""
    for i in range(places.size):
        row = row_at(table, stride, places[i])
        key = mix64(load_u64(row + _KEY) ^ mix64(table_id))
        stamp = load_u64(row + _STAMP)
        sums[0] += mix64(key ^ mix64(stamp + _SALT_LOW))
        sums[1] += mix64(key + mix64(stamp ^ _SALT_HIGH))
