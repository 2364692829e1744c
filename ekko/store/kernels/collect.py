"""Kernels that find rows to be dropped: what was deleted or expired long enough ago, and what an answer did not bring.

For the writer's own thread: they take no lock. A slot that is free belongs to nobody and is never found.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import load_u32, load_u64, prefetch_near
from ekko.store.kernels.compile import Int, kernel
from ekko.store.kernels.index import mix64, search, slot_at
from ekko.store.kernels.places import place_of, slot_of
from p2p.stamps import WRITERS_MAX

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

_PREFETCH_ROWS = 32
_ROWS = layout.TABLE.offset("rows")
_FLAGS = layout.ROW.offset("flags")
_STAMP = layout.ROW.offset("stamp")
_KEY = layout.ROW.offset("key")
_TOMBSTONE = layout.FLAG_TOMBSTONE
_FREE = layout.FLAG_FREE
_WRITER_MASK = np.uint64(WRITERS_MAX - 1)


@kernel(
    "UniTuple(int64, 2)(int64, int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), uint64, int64, int64, "
    "int64[::1])"
)
def collectable(
    table: Int,
    stride: Int,
    shards: Int,
    partition: Int,
    partitions: Int,
    until: U64,
    expired: Int,
    begin: Int,
    end: Int,
    out: I64,
) -> tuple[Int, Int]:
    """Places in [begin, end) of one partition's rows that are tombstones, or have a stamp below `expired`.

    Only those whose stamp is not above `until[writer]`.

    Returns:
        How many of them are in `out`, and the slot to go on at: before `end` where `out` is full.
    """
    count = 0
    rows = table + _ROWS
    for slot in range(begin, end):
        prefetch_near(rows + (slot + _PREFETCH_ROWS) * stride)
        row = rows + slot * stride
        flags = load_u32(row + _FLAGS)
        if flags & _FREE:
            continue
        stamp = load_u64(row + _STAMP)
        if (flags & _TOMBSTONE == 0 and stamp >= expired) or stamp > until[np.int64(stamp & _WRITER_MASK)]:
            continue
        shard = np.int64(mix64(load_u64(row + _KEY)) % np.uint64(shards))
        if shard % partitions != partition:
            continue
        if count == out.size:
            return count, slot
        out[count] = place_of(slot, flags)
        count += 1
    return count, end


@kernel("void(Array(int64, 1, 'C', readonly=True), uint8[::1])")
def mark(places: I64, bits: U8) -> None:
    """Set the bit of each place's slot; -1 is none."""
    for i in range(places.size):
        if places[i] >= 0:
            slot = slot_of(places[i])
            bits[slot >> 3] |= np.uint8(1 << (slot & 7))


@kernel("void(Array(int64, 1, 'C', readonly=True), uint8[::1])")
def unmark(places: I64, bits: U8) -> None:
    """Clear the bit of each place's slot; one beyond the bits has none."""
    for i in range(places.size):
        slot = slot_of(places[i])
        if (slot >> 3) < bits.size:
            bits[slot >> 3] &= np.uint8(255 ^ (1 << (slot & 7)))


@kernel("int64(int64, int64, int64, Array(uint64, 1, 'C', readonly=True), uint8[::1], int64, int64, int64[::1])")
def unmarked(table: Int, stride: Int, shards: Int, vector: U64, bits: U8, begin: Int, end: Int, out: I64) -> Int:
    """Places in [begin, end) whose slot has no bit, and whose stamp the flattened vector uint64[shards * 4096] covers."""
    count = 0
    rows = table + _ROWS
    for slot in range(begin, end):
        prefetch_near(rows + (slot + _PREFETCH_ROWS) * stride)
        if (slot >> 3) < bits.size and (bits[slot >> 3] >> (slot & 7)) & 1:
            continue
        row = rows + slot * stride
        flags = load_u32(row + _FLAGS)
        if flags & _FREE:
            continue
        stamp = load_u64(row + _STAMP)
        shard = np.int64(mix64(load_u64(row + _KEY)) % np.uint64(shards))
        if stamp <= vector[shard * WRITERS_MAX + np.int64(stamp & _WRITER_MASK)]:
            out[count] = place_of(slot, flags)
            count += 1
    return count


@kernel(
    "int64(int64, int64, int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), "
    "Array(uint64, 1, 'C', readonly=True), uint64, int64[::1])"
)
def not_ghosts(
    index: Int,
    capacity_log2: Int,
    table: Int,
    stride: Int,
    vector: Int,
    shards: Int,
    keys: U64,
    stamps: U64,
    stamp: Int,
    kept: I64,
) -> Int:
    """Which of the rows are no ghosts (T6), into `kept`; returns how many.

    A ghost is a row whose key is absent and whose stamp the vector uint64[4096, shards], at an address, covers. `stamps` is
    empty when all carry `stamp`.
    """
    count = 0
    for i in range(keys.size):
        row_stamp = stamps[i] if stamps.size else stamp
        shard = np.int64(mix64(keys[i]) % np.uint64(shards))
        covered = load_u64(vector + (np.int64(row_stamp & _WRITER_MASK) * shards + shard) * 8)
        if row_stamp <= covered and slot_at(search(index, capacity_log2, table, stride, keys[i])) < 0:
            continue
        kept[count] = i
        count += 1
    return count
