"""Kernels of readers: rows copied, decoded, out of memory that a writer may be writing to; `whole_row` says how they meet."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import fence_acquire, load_acquire_u32, load_u32, load_u64, prefetch_bytes, store_u64
from ekko.store.kernels.compile import Int, inline_kernel, kernel
from ekko.store.kernels.parts import fetch_first, part_keys, resolve_part
from ekko.store.kernels.quantise import BFLOAT16, FLOAT16, FLOAT32, INT8, decode_row
from ekko.store.kernels.whole_row import (
    BUSY,
    DATA,
    FLAGS,
    FOUND,
    GONE,
    KEY,
    LOCK,
    STAMP,
    put_default,
    read_by_key,
)

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

_ROWS = layout.TABLE.offset("rows")


@inline_kernel
def _copy_rows(
    codec: Int,
    base: Int,
    stride: Int,
    dim: Int,
    index: Int,
    capacity_log2: Int,
    stamp_min: Int,
    default: Int,
    keys: U64,
    begin: Int,
    count: Int,
    slots: I64,
    target: Int,
    stamp_target: Int,
) -> Int:
    """Decode the rows of keys[begin : begin + count], which were found in slots[:count], one after the other.

    Their stamps too, unless `stamp_target` is 0. Returns how many are done: fewer when a row stayed locked.
    """
    ahead = fetch_first(base, stride, count, slots)
    for i in range(count):
        if i + ahead < count:
            prefetch_bytes(base + slots[i + ahead] * stride, stride)
        key = keys[begin + i]
        if slots[i] >= 0:
            row = base + slots[i] * stride
            lock = load_acquire_u32(row + LOCK)
            flags = load_u32(row + FLAGS)
            stamp = load_u64(row + STAMP)
            held = load_u64(row + KEY)
            decode_row(codec, row + DATA, dim, target)
            fence_acquire()
            # One branch, hardly ever taken.
            odd = (load_u32(row + LOCK) ^ lock) | (lock & 1) | (flags & GONE)
            if np.uint64(odd) | (held ^ key) | np.uint64(stamp < stamp_min):
                found = read_by_key(base, stride, codec, dim, index, capacity_log2, key, stamp_min, target, stamp_target)
                if found != FOUND:
                    if found == BUSY:
                        return i
                    put_default(default, dim, target)
                    if stamp_target:
                        store_u64(stamp_target, np.uint64(0))
            elif stamp_target:
                store_u64(stamp_target, stamp)
        else:
            put_default(default, dim, target)
            if stamp_target:
                store_u64(stamp_target, np.uint64(0))
        target += 4 * dim
        if stamp_target:
            stamp_target += 8
    return count


def _copier(codec: int) -> Any:
    """`_copy_rows` for one codec, which is a constant in its loop.

    A function of its own, not a part of `gather`, where the compiler keeps too little in registers: 10 % of a look-up.
    """

    @kernel(
        "int64(int64, int64, int64, int64, int64, uint64, int64, Array(uint64, 1, 'C', readonly=True), int64, int64, "
        "int64[::1], int64, int64)"
    )
    def copy(
        base: Int,
        stride: Int,
        dim: Int,
        index: Int,
        capacity_log2: Int,
        stamp_min: Int,
        default: Int,
        keys: U64,
        begin: Int,
        count: Int,
        slots: I64,
        target: Int,
        stamps: Int,
    ) -> Int:
        return _copy_rows(
            codec, base, stride, dim, index, capacity_log2, stamp_min, default, keys, begin, count, slots, target, stamps
        )

    return copy


_copy_float32, _copy_float16, _copy_bfloat16, _copy_int8 = (_copier(codec) for codec in (FLOAT32, FLOAT16, BFLOAT16, INT8))


@kernel(
    "int64(int64, int64, int64, int64, int64, uint64, int64, Array(uint64, 1, 'C', readonly=True), float32[:, ::1], "
    "uint64[::1], int64)",
)
def gather(
    table: Int,
    stride: Int,
    codec: Int,
    index: Int,
    capacity_log2: Int,
    stamp_min: Int,
    default: Int,
    keys: U64,
    out: F32,
    stamps: U64,
    begin: Int,
) -> Int:
    """Decode the rows of keys[begin:] into `out`, and their stamps if `stamps` is not empty.

    Absent are keys that have no row, a tombstone, or a row older than `stamp_min`: their stamp is 0, their values are at the
    address `default`, zeros if that is 0. Returns how many keys are done; fewer than there are when a row was busy, and the
    caller is to yield, to see that it has the index that is in use, and to call again.
    """
    part_max = part_keys(stride)
    slots = np.empty(min(keys.size, part_max), np.int64)
    dim = out.shape[1]
    base = table + _ROWS
    target = np.int64(out.ctypes.data)
    stamp_target = np.int64(stamps.ctypes.data) if stamps.size else 0
    for part in range(begin, keys.size, part_max):
        count = min(part_max, keys.size - part)
        resolve_part(index, capacity_log2, keys[part : part + count], slots, base, stride)
        to_stamps = stamp_target + part * 8 if stamp_target else 0
        to = target + part * 4 * dim
        if codec == FLOAT32:
            done = _copy_float32(
                base, stride, dim, index, capacity_log2, stamp_min, default, keys, part, count, slots, to, to_stamps
            )
        elif codec == FLOAT16:
            done = _copy_float16(
                base, stride, dim, index, capacity_log2, stamp_min, default, keys, part, count, slots, to, to_stamps
            )
        elif codec == BFLOAT16:
            done = _copy_bfloat16(
                base, stride, dim, index, capacity_log2, stamp_min, default, keys, part, count, slots, to, to_stamps
            )
        else:
            done = _copy_int8(
                base, stride, dim, index, capacity_log2, stamp_min, default, keys, part, count, slots, to, to_stamps
            )
        if done < count:
            return part + done
    return keys.size
