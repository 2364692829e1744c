"""Kernels of readers: rows copied, decoded, out of memory that a writer may be writing to. `rows` says how the two meet."""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import (
    fence_acquire,
    fence_program_order,
    load_acquire_u32,
    load_u32,
    load_u64,
    prefetch_near,
    store_u64,
    zero_bytes,
)
from ekko.store.kernels.compile import Int, inline_kernel, kernel
from ekko.store.kernels.index import resolve
from ekko.store.kernels.quantise import BFLOAT16, FLOAT16, FLOAT32, INT8, decode_row
from ekko.store.kernels.rows import PART_KEYS, PREFETCH_ROWS

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

# Looks at an odd lock before the reader gives its processor away: far longer than a row takes to write (below 1 us).
SPINS_MAX = 4096

_LOCK = layout.ROW.offset("lock")
_FLAGS = layout.ROW.offset("flags")
_STAMP = layout.ROW.offset("stamp")
_DATA = layout.ROW.offset("data")
_TOMBSTONE = layout.FLAG_TOMBSTONE
_ROWS = layout.TABLE.offset("rows")
_LINE = layout.LINE_BYTES


@inline_kernel
def _prefetch_row(row: Int, stride: Int) -> None:
    for offset in range(0, stride, _LINE):
        prefetch_near(row + offset)


@kernel("int64(int64, int64, int64, int64, int64)")
def _copy_contended(row: Int, codec: Int, dim: Int, target: Int, stamp_target: Int) -> Int:
    """Copy one row that is a tombstone, or that the writer is at; 0 when its lock stayed odd."""
    for _ in range(SPINS_MAX):
        lock = load_acquire_u32(row + _LOCK)
        if lock & 1:
            fence_program_order()
            continue
        deleted = load_u32(row + _FLAGS) & _TOMBSTONE
        stamp = load_u64(row + _STAMP)
        decode_row(codec, row + _DATA, dim, target)
        fence_acquire()
        if load_u32(row + _LOCK) != lock:
            continue
        if deleted:
            zero_bytes(target, 4 * dim)
        if stamp_target:
            store_u64(stamp_target, np.uint64(0) if deleted else stamp)
        return 1
    return 0


@inline_kernel
def _copy_rows(codec: Int, base: Int, stride: Int, dim: Int, slots: I64, count: Int, target: Int, stamp_target: Int) -> Int:
    """Decode the rows of slots[:count], zeros for -1, one after the other; their stamps too, unless `stamp_target` is 0.

    Returns how many are done: fewer when a row stayed locked.
    """
    for i in range(count):
        if i + PREFETCH_ROWS < count:
            _prefetch_row(base + slots[i + PREFETCH_ROWS] * stride, stride)  # of an absent key: harmless, whatever is there
        if slots[i] >= 0:
            row = base + slots[i] * stride
            lock = load_acquire_u32(row + _LOCK)
            deleted = load_u32(row + _FLAGS) & _TOMBSTONE
            stamp = load_u64(row + _STAMP)
            decode_row(codec, row + _DATA, dim, target)
            fence_acquire()
            if (load_u32(row + _LOCK) ^ lock) | (lock & 1) | deleted:  # one branch, hardly ever taken
                if not _copy_contended(row, codec, dim, target, stamp_target):
                    return i
            elif stamp_target:
                store_u64(stamp_target, stamp)
        else:
            zero_bytes(target, 4 * dim)
            if stamp_target:
                store_u64(stamp_target, np.uint64(0))
        target += 4 * dim
        if stamp_target:
            stamp_target += 8
    return count


# One function a codec, so that the codec is a constant in the loop; and none of it inside `gather`, where the compiler keeps
# too little in registers: that cost 10 % of a look-up.
_COPY_SIGNATURE = "int64(int64, int64, int64, int64[::1], int64, int64, int64)"


@kernel(_COPY_SIGNATURE)
def _copy_float32(base: Int, stride: Int, dim: Int, slots: I64, count: Int, target: Int, stamp_target: Int) -> Int:
    return _copy_rows(FLOAT32, base, stride, dim, slots, count, target, stamp_target)


@kernel(_COPY_SIGNATURE)
def _copy_float16(base: Int, stride: Int, dim: Int, slots: I64, count: Int, target: Int, stamp_target: Int) -> Int:
    return _copy_rows(FLOAT16, base, stride, dim, slots, count, target, stamp_target)


@kernel(_COPY_SIGNATURE)
def _copy_bfloat16(base: Int, stride: Int, dim: Int, slots: I64, count: Int, target: Int, stamp_target: Int) -> Int:
    return _copy_rows(BFLOAT16, base, stride, dim, slots, count, target, stamp_target)


@kernel(_COPY_SIGNATURE)
def _copy_int8(base: Int, stride: Int, dim: Int, slots: I64, count: Int, target: Int, stamp_target: Int) -> Int:
    return _copy_rows(INT8, base, stride, dim, slots, count, target, stamp_target)


@kernel(
    "int64(int64, int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), float32[:, ::1], uint64[::1], int64)",
)
def gather(
    table: Int, stride: Int, codec: Int, index: Int, capacity_log2: Int, keys: U64, out: F32, stamps: U64, begin: Int
) -> Int:
    """Decode the rows of keys[begin:] into `out`, and their stamps if `stamps` is not empty; absent and deleted ones are zero.

    Returns how many keys are done; fewer than there are when a row stayed locked, and the caller is to yield and call again.
    """
    slots = np.empty(min(keys.size, PART_KEYS), np.int64)
    dim = out.shape[1]
    target = np.int64(out.ctypes.data)
    stamp_target = np.int64(stamps.ctypes.data) if stamps.size else 0
    for part in range(begin, keys.size, PART_KEYS):
        count = min(PART_KEYS, keys.size - part)
        resolve(index, capacity_log2, keys[part : part + count], slots)
        part_stamps = stamp_target + part * 8 if stamp_target else 0
        base, part_target = table + _ROWS, target + part * 4 * dim
        if codec == FLOAT32:
            done = _copy_float32(base, stride, dim, slots, count, part_target, part_stamps)
        elif codec == FLOAT16:
            done = _copy_float16(base, stride, dim, slots, count, part_target, part_stamps)
        elif codec == BFLOAT16:
            done = _copy_bfloat16(base, stride, dim, slots, count, part_target, part_stamps)
        else:
            done = _copy_int8(base, stride, dim, slots, count, part_target, part_stamps)
        if done < count:
            return part + done
    return keys.size
