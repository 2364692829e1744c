"""Kernels of snapshots: rows as they lie in the slab, copied out while they are written, and put back into one of nobody yet.

An image is `row_stride` bytes: a row (`ekko.store.layout.ROW`) whose lock is 0 and whose flags are those of a live row or of a
tombstone. A slot that belongs to no key has no image.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import (
    copy_bytes,
    fence_acquire,
    fence_program_order,
    load_acquire_i64,
    load_acquire_u32,
    load_i64,
    load_u32,
    load_u64,
    prefetch_write,
    store_i64,
    store_release_i64,
    store_u32,
)
from ekko.store.kernels.compile import Int, kernel
from ekko.store.kernels.index import first_entry, mix64, publish, search, slot_at
from ekko.store.kernels.ring import merge_dvv

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

# Looks at an odd lock before the processor is given away; a row takes below 1 us to write.
SPINS_MAX = 4_096
# Rows whose index entries are on their way from memory at the same time.
PREFETCH_ROWS = 16

_LOCK = layout.ROW.offset("lock")
_FLAGS = layout.ROW.offset("flags")
_STAMP = layout.ROW.offset("stamp")
_KEY = layout.ROW.offset("key")
_ROWS = layout.TABLE.offset("rows")
_ROWS_USED = layout.TABLE.offset("rows_used")
_TOMBSTONES = layout.TABLE.offset("tombstones")
_TOMBSTONE = layout.FLAG_TOMBSTONE
_FREE = layout.FLAG_FREE
_WRITER_MASK = np.uint64(4095)
_WRITER_BITS = 12


@kernel("int64(int64)")
def slots_given_out(table: Int) -> Int:
    """How many slots may hold rows. What was written before is seen by whatever looks at these rows afterwards."""
    return load_acquire_i64(table + _ROWS_USED)


@kernel("void()")
def after_vector() -> None:
    """Put between reading the vector and reading rows: the rows that it covers are seen."""
    fence_acquire()


@kernel(
    "void(int64, int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), Array(boolean, 1, 'C', readonly=True), "
    "uint8[::1], int64[::1])"
)
def copy_images(
    table: Int, stride: Int, shards: Int, begin: Int, end: Int, base: U64, whole: Mask, out: NDArray[np.uint8], done: I64
) -> None:
    """Copy the rows of slots [begin, end) into `out`, as far as there is room.

    `base`: empty, or a flattened vector: then only rows above it, and all of the shards that are `whole`.
    done = (the first slot that was not looked at, images written): the slot is `end`, or there was no room, or it stayed
    locked and the caller is to yield and call again.
    """
    rows = table + _ROWS
    target = np.int64(out.ctypes.data)
    room = out.size // stride
    count = 0
    slot = begin
    spins = 0
    while slot < end and count < room:
        row = rows + slot * stride
        lock = load_acquire_u32(row + _LOCK)
        if lock & 1:
            spins += 1
            if spins == SPINS_MAX:
                break
            fence_program_order()
            continue
        image = target + count * stride
        copy_bytes(image, row, stride)
        fence_acquire()
        if load_u32(row + _LOCK) != lock:
            continue
        spins = 0
        slot += 1
        flags = load_u32(image + _FLAGS)
        if flags & _FREE:
            continue
        if base.size:
            stamp = load_u64(image + _STAMP)
            shard = np.int64(mix64(load_u64(image + _KEY)) % np.uint64(shards))
            if not whole[shard] and stamp <= base[(shard << _WRITER_BITS) + np.int64(stamp & _WRITER_MASK)]:
                continue
        store_u32(image + _LOCK, np.uint32(0))
        store_u32(image + _FLAGS, np.uint32(flags & _TOMBSTONE))
        count += 1
    done[0] = slot
    done[1] = count


@kernel(
    "int64(int64, int64, int64, int64, int64, int64, int64, Array(boolean, 1, 'C', readonly=True), int64, int64, int64[::1])"
)
def settle_images(
    table: Int,
    stride: Int,
    begin: Int,
    end: Int,
    index: Int,
    capacity_log2: Int,
    shards: Int,
    wanted: Mask,
    dvv: Int,
    writers: Int,
    counts: I64,
) -> Int:
    """Make rows of the images in slots [begin, end) of a table that nobody else uses yet; `begin` is its `rows_used`.

    Images of shards that are not `wanted`, and versions that are not newer than what is held, are left out; the others move
    together. Stamps are merged into DVV. counts += (rows that were put in, of those over an older version); counts[2] is
    the largest stamp.

    Returns 0, or -1 when an image is none: nothing may then be used of the table.
    """
    rows = table + _ROWS
    used = begin
    tombstones = load_i64(table + _TOMBSTONES)
    for slot in range(begin, end):
        ahead = slot + PREFETCH_ROWS
        if ahead < end:
            prefetch_write(first_entry(index, capacity_log2, load_u64(rows + ahead * stride + _KEY)))
        row = rows + slot * stride
        flags = load_u32(row + _FLAGS)
        stamp = load_u64(row + _STAMP)
        key = load_u64(row + _KEY)
        if load_u32(row + _LOCK) != 0 or flags & ~np.uint32(_TOMBSTONE) or stamp == 0:
            return -1
        hashed = mix64(key)
        shard = np.int64(hashed % np.uint64(shards))
        if not wanted[shard]:
            continue
        entry = search(index, capacity_log2, table, stride, key)
        held = slot_at(entry)
        if held >= 0:
            target = rows + held * stride
            if stamp <= load_u64(target + _STAMP):
                continue
            tombstones -= np.int64(load_u32(target + _FLAGS) & _TOMBSTONE)
            counts[1] += 1
        else:
            target = rows + used * stride
            publish(index, entry, key, used)
            used += 1
        if target != row:
            copy_bytes(target, row, stride)
        tombstones += np.int64(flags & _TOMBSTONE)
        merge_dvv(stamp, shard, shards, dvv, writers)
        counts[0] += 1
        counts[2] = max(counts[2], np.int64(stamp))
    store_i64(table + _TOMBSTONES, tombstones)
    store_release_i64(table + _ROWS_USED, used)
    return 0
