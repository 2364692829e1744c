"""Kernels over rows, for their one writer: apply, read back, scan. Readers have `gather`.

A row is 24 bytes of header {lock, flags, stamp, key} and its encoded data (`ekko.store.layout`), at
`table + rows + slot * stride`, and never moves. There is one writer, and any number of readers, in other processes too.

Sequence lock. The writer makes the lock odd, writes, and makes it even again; a reader copies between two looks at the lock and
takes the copy only when both saw the same even number. Fences: the writer's odd number is visible before any byte of the new
row (release fence), its even number after all of them (release store); the reader's first look is an acquire load, and an
acquire fence keeps its second look behind the copy.

Killed in mid-row. Before a row is overwritten in place, it is copied into the undo record. If the writer dies while the lock is
odd, whoever attaches next puts the image back (`undo`). Between rows the lock is even, and the record is left alone.
A new row is written whole, then counted, then published in the index; at most one row is counted but not published.
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
from ekko.store.kernels.index import first_entry, mix64, publish, resolve, search, slot_at

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

# Keys are resolved in parts of this many before their rows are copied. Two passes over a part beat one pass that does both:
# with 4 million rows, 78 ns a key against 101 with a software pipeline by key, and 155 in blocks of 32 (np.take takes 53).
# The scratch that holds the slots of a part stays in the nearest cache.
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
_ROWS = layout.TABLE.offset("rows")
_ROWS_USED = layout.TABLE.offset("rows_used")
_TOMBSTONES = layout.TABLE.offset("tombstones")
_UNDO_SLOT = layout.UNDO.offset("slot_plus_one")
_UNDO_TABLE = layout.UNDO.offset("table")
_UNDO_TOMBSTONES = layout.UNDO.offset("tombstones")
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
def _save_undo(undo: Int, table: Int, table_id: Int, slot: Int, row: Int, stride: Int) -> None:
    """Keep the row as it is, so that a kill from here on can be taken back."""
    fence_program_order()  # the row before this one is finished before its image is overwritten
    copy_bytes(undo + _UNDO_ROW, row, stride)
    store_i64(undo + _UNDO_TABLE, table_id)
    store_i64(undo + _UNDO_TOMBSTONES, load_i64(table + _TOMBSTONES))
    store_i64(undo + _UNDO_SLOT, slot + 1)
    fence_program_order()


@inline_kernel
def _overwrite(table: Int, row: Int, stamp: Int, data: Int, row_bytes: Int) -> None:
    """Put a newer version into an existing row; data = 0: a tombstone."""
    lock = load_u32(row + _LOCK)
    flags = load_u32(row + _FLAGS)
    was_tombstone = flags & _TOMBSTONE
    store_u32(row + _LOCK, np.uint32(lock + 1))
    fence_release()
    fence_program_order()
    store_u64(row + _STAMP, stamp)
    if data == 0:
        store_u32(row + _FLAGS, np.uint32(flags | _TOMBSTONE))
        if not was_tombstone:
            store_i64(table + _TOMBSTONES, load_i64(table + _TOMBSTONES) + 1)
    else:
        copy_bytes(row + _DATA, data, row_bytes)
        if was_tombstone:
            store_u32(row + _FLAGS, np.uint32(flags ^ _TOMBSTONE))
            store_i64(table + _TOMBSTONES, load_i64(table + _TOMBSTONES) - 1)
    store_release_u32(row + _LOCK, np.uint32(lock + 2))


@inline_kernel
def _append(table: Int, slot: Int, row: Int, key: Int, stamp: Int, data: Int, row_bytes: Int) -> None:
    """Write a new row whole and count it; no reader can know it yet."""
    store_u32(row + _LOCK, np.uint32(0))
    store_u64(row + _STAMP, stamp)
    store_u64(row + _KEY, key)
    if data == 0:
        store_u32(row + _FLAGS, np.uint32(_TOMBSTONE))
        store_i64(table + _TOMBSTONES, load_i64(table + _TOMBSTONES) + 1)
    else:
        store_u32(row + _FLAGS, np.uint32(0))
        copy_bytes(row + _DATA, data, row_bytes)
    store_release_i64(table + _ROWS_USED, slot + 1)
    fence_program_order()


@kernel(
    "int64(int64, int64, int64, int64, int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), "
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
    undo: Int,
    keys: U64,
    rows: U8,
    stamps: U64,
    stamp: Int,
    begin: Int,
    written: I64,
    counts: I64,
) -> Int:
    """Write keys[begin:] whose stamp is newer than what is held; the keys after the rows are tombstones.

    `stamps` is empty when all carry `stamp`. Returns how many keys are done: fewer than there are when row `rows_max` would
    have been needed, and the caller is to make room and call again. `written`, int64[keys.size], gets the slot of each row
    that was written, -1 of the others that are done. `counts` is added to.
    """
    slots = np.empty(min(keys.size, PART_KEYS), np.int64)
    live = rows.shape[0]
    source = np.int64(rows.ctypes.data)
    base = table + _ROWS
    used = load_i64(table + _ROWS_USED)
    for part in range(begin, keys.size, PART_KEYS):
        end = min(part + PART_KEYS, keys.size)
        resolve(index, capacity_log2, keys[part:end], slots)
        for i in range(part, end):
            ahead = i + PREFETCH_ROWS_TO_WRITE
            if ahead < end:
                if slots[ahead - part] >= 0:
                    _prefetch_row_to_write(base + slots[ahead - part] * stride, stride)
                else:
                    prefetch_write(first_entry(index, capacity_log2, keys[ahead]))
                    _prefetch_row_to_write(base + (used + PREFETCH_ROWS_TO_WRITE) * stride, stride)
            slot = slots[i - part]
            row_stamp = stamps[i] if stamps.size else stamp
            row_data = source + i * row_bytes if i < live else 0
            if slot < 0:
                # Again: an earlier key of this part may have been the same one, or may have taken the place.
                entry = search(index, capacity_log2, keys[i], first_entry(index, capacity_log2, keys[i]))
                slot = slot_at(entry)
                if slot < 0:
                    if used == rows_max:
                        return i
                    _append(table, used, base + used * stride, keys[i], row_stamp, row_data, row_bytes)
                    publish(entry, keys[i], used)
                    written[i] = used
                    used += 1
                    counts[WRITTEN] += 1
                    counts[INSERTED] += 1
                    continue
            row = base + slot * stride
            if row_stamp <= load_u64(row + _STAMP):
                counts[STALE] += 1
                written[i] = -1
                continue
            _save_undo(undo, table, table_id, slot, row, stride)
            _overwrite(table, row, row_stamp, row_data, row_bytes)
            written[i] = slot
            counts[WRITTEN] += 1
    return keys.size


@kernel("int64(int64, int64, int64, int64)")
def undo(table: Int, stride: Int, undo_record: Int, table_id: Int) -> Int:
    """Take back the row that a killed writer left half-written; 1 when there was one.

    The lock moves on to the next even number: a reader that began before the kill must not find the number it began with.
    """
    slot = load_i64(undo_record + _UNDO_SLOT) - 1
    if slot < 0 or load_i64(undo_record + _UNDO_TABLE) != table_id:
        return 0
    row = table + _ROWS + slot * stride
    lock = load_u32(row + _LOCK)
    if lock & 1 == 0:
        return 0
    copy_bytes(row + _FLAGS, undo_record + _UNDO_ROW + _FLAGS, stride - _FLAGS)
    store_i64(table + _TOMBSTONES, load_i64(undo_record + _UNDO_TOMBSTONES))
    store_release_u32(row + _LOCK, np.uint32(lock + 1))
    return 1


@kernel("int64(int64, int64, Array(int64, 1, 'C', readonly=True), int64[::1])")
def order_live_first(table: Int, stride: Int, slots: I64, ordered: I64) -> Int:
    """Sort slots into `ordered`, tombstones last; returns how many are live. For the writer's own thread."""
    base = table + _ROWS
    live = 0
    dead = slots.size
    for i in range(slots.size):
        if i + PREFETCH_ROWS < slots.size:
            prefetch_near(base + slots[i + PREFETCH_ROWS] * stride)
        if load_u32(base + slots[i] * stride + _FLAGS) & _TOMBSTONE:
            dead -= 1
            ordered[dead] = slots[i]
        else:
            ordered[live] = slots[i]
            live += 1
    return live


@kernel("void(int64, int64, int64, Array(int64, 1, 'C', readonly=True), uint64[::1], uint8[:, ::1], uint64[::1])")
def read(table: Int, stride: Int, row_bytes: Int, slots: I64, keys: U64, rows: U8, stamps: U64) -> None:
    """Copy rows by slot, live ones first (len(rows) of them). For the writer's own thread: takes no lock."""
    base = table + _ROWS
    target = np.int64(rows.ctypes.data)
    for i in range(slots.size):
        if i + PREFETCH_ROWS < slots.size:
            ahead = base + slots[i + PREFETCH_ROWS] * stride
            for offset in range(0, stride, _LINE):
                prefetch_near(ahead + offset)
        row = base + slots[i] * stride
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
    """Slots in [begin, end) above the flattened vector, into `out`; returns how many."""
    count = 0
    rows = table + _ROWS
    for slot in range(begin, end):
        prefetch_near(rows + (slot + PREFETCH_ROWS) * stride)
        if _above(rows + slot * stride, base_vector, shards):
            out[count] = slot
            count += 1
    return count


@kernel(
    "int64(int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), Array(uint8, 2, 'C', readonly=True), "
    "Array(int64, 1, 'C', readonly=True), int64[::1])"
)
def without(table: Int, stride: Int, shards: Int, partitions: Int, known: U64, bits: U8, slots: I64, out: I64) -> Int:
    """Those slots, into `out`, whose row is of no known step, or in no shard for which its bit is set; returns how many.

    `known` ascends; bits of shards of a partition, which are every so many of the model's. See `p2p.replica.KnownSteps`.
    """
    count = 0
    rows = table + _ROWS
    for i in range(slots.size):
        row = rows + slots[i] * stride
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
            out[count] = slots[i]
            count += 1
    return count


_SALT_LOW = np.uint64(0x9E3779B97F4A7C15)
_SALT_HIGH = np.uint64(0xC2B2AE3D27D4EB4F)


@kernel("void(int64, int64, uint64, Array(int64, 1, 'C', readonly=True), uint64[::1])")
def digest(table: Int, stride: Int, table_id: Int, slots: I64, sums: U64) -> None:
    """Add two independent 64-bit hashes of (table, key, stamp) of each slot to `sums`: equal in any order."""
    rows = table + _ROWS
    for i in range(slots.size):
        row = rows + slots[i] * stride
        key = mix64(load_u64(row + _KEY) ^ mix64(table_id))
        stamp = load_u64(row + _STAMP)
        sums[0] += mix64(key ^ mix64(stamp + _SALT_LOW))
        sums[1] += mix64(key + mix64(stamp ^ _SALT_HIGH))
