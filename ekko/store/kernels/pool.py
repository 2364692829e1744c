"""Kernels of readers: the rows of each bag made one while they are read, without a copy of them in between.

A bag's sum is held twice: each row is added to one half and the result written into the other, and only when the row's lock
says that it was whole do the halves change places. So a torn row never gets into a sum, and nothing is written that an ordinary
accumulation would not write too.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import (
    add_line,
    copy_bytes,
    fence_acquire,
    float_of,
    floats_at,
    load_acquire_u32,
    load_u32,
    load_u64,
    prefetch_bytes,
    uints8_at,
    uints16_at,
    zero_bytes,
)
from ekko.store.kernels.compile import Int, inline_kernel, kernel
from ekko.store.kernels.parts import fetch_first, part_keys, resolve_part
from ekko.store.kernels.quantise import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    bfloat_value,
    half_value,
    int8_value,
)
from ekko.store.kernels.whole_row import (
    ABSENT,
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

# How the rows of a bag become one.
SUM, MEAN, MAX, WEIGHTED_SUM = 0, 1, 2, 3

_ROWS = layout.TABLE.offset("rows")
_LEAST = np.float32(-np.inf)


@inline_kernel
def _joined(mode: Int, before: Any, value: Any, weight: Any) -> Any:
    if mode == MAX:
        return value if value > before else before  # Python's max would ask about NaN, which no row has
    if mode == WEIGHTED_SUM:
        return np.float32(before + weight * value)
    return np.float32(before + value)


@inline_kernel
def _join(codec: Int, mode: Int, data: Int, dim: Int, weight: Any, before: Int, after: Int) -> None:
    """float32[dim] at `after`: what was `before`, and the encoded row at `data`."""
    old, new = floats_at(before, dim), floats_at(after, dim)
    if codec == FLOAT32 and dim & 15 == 0 and mode != MAX and mode != WEIGHTED_SUM:
        for offset in range(0, 4 * dim, 64):
            add_line(after + offset, before + offset, data + offset)
    elif codec == FLOAT32:
        values = floats_at(data, dim)
        for j in range(dim):
            new[j] = _joined(mode, old[j], values[j], weight)
    elif codec == INT8:
        codes, scale = uints8_at(data + 4, dim), float_of(load_u32(data))
        for j in range(dim):
            new[j] = _joined(mode, old[j], int8_value(codes[j], scale), weight)
    else:
        halves = uints16_at(data, dim)
        for j in range(dim):
            value = half_value(halves[j]) if codec == FLOAT16 else bfloat_value(halves[j])
            new[j] = _joined(mode, old[j], value, weight)


@inline_kernel
def _open_bag(mode: Int, sums: Int, dim: Int, begun: Int, target: Int) -> None:
    """Begin a bag, or go on with one whose rows so far were put at `target`."""
    if begun:
        copy_bytes(sums, target, 4 * dim)
    elif mode == MAX:
        values = floats_at(sums, dim)
        for j in range(dim):
            values[j] = _LEAST
    else:
        zero_bytes(sums, 4 * dim)


@inline_kernel
def _close_bag(mode: Int, sums: Int, dim: Int, rows: Int, target: Int) -> None:
    """Put the result of a bag of so many rows where it belongs."""
    if rows == 0:
        zero_bytes(target, 4 * dim)
    elif mode == MEAN:
        values, out, divisor = floats_at(sums, dim), floats_at(target, dim), np.float32(rows)
        for j in range(dim):
            out[j] = values[j] / divisor
    else:
        copy_bytes(target, sums, 4 * dim)


@inline_kernel
def _rows_of(keys: U64, begin: Int, end: Int, padded: Int, padding: Int) -> Int:
    """How many of keys[begin:end] stand for rows, and are not padding."""
    rows = end - begin
    if padded:
        for i in range(begin, end):
            rows -= keys[i] == padding
    return rows


@inline_kernel
def _pool_part(
    codec: Int,
    mode: Int,
    base: Int,
    stride: Int,
    dim: Int,
    index: Int,
    capacity_log2: Int,
    stamp_min: Int,
    default: Int,
    keys: U64,
    weights: F32,
    padded: Int,
    padding: Int,
    ends: I64,
    bag: Int,
    begin: Int,
    count: Int,
    slots: I64,
    scratch: Int,
    out: Int,
) -> Int:
    """Pool keys[begin : begin + count], which were found in slots[:count]; the first belongs to `bag`.

    A bag that is not at its end is left in its place as it is so far. Returns how many are done: fewer when a row was busy.
    """
    row_bytes = 4 * dim
    sums, single = scratch, scratch + 2 * row_bytes
    both = sums + sums + row_bytes  # the address of one half is this minus that of the other
    weight = np.float32(1)
    _open_bag(mode, sums, dim, begin > ends[bag], out + bag * row_bytes)
    ahead = fetch_first(base, stride, count, slots)
    done = count
    for i in range(count):
        if i + ahead < count:
            prefetch_bytes(base + slots[i + ahead] * stride, stride)
        key = keys[begin + i]
        if not (padded and key == padding):
            if mode == WEIGHTED_SUM:
                weight = weights[begin + i]
            found = ABSENT
            if slots[i] >= 0:
                row = base + slots[i] * stride
                lock = load_acquire_u32(row + LOCK)
                flags = load_u32(row + FLAGS)
                stamp = load_u64(row + STAMP)
                held = load_u64(row + KEY)
                _join(codec, mode, row + DATA, dim, weight, sums, both - sums)
                fence_acquire()
                found = FOUND
                odd = (load_u32(row + LOCK) ^ lock) | (lock & 1) | (flags & GONE)
                if np.uint64(odd) | (held ^ key) | np.uint64(stamp < stamp_min):  # one branch, hardly ever taken
                    found = read_by_key(base, stride, codec, dim, index, capacity_log2, key, stamp_min, single, 0)
                    if found == BUSY:
                        done = i
                        break
                    if found == FOUND:
                        _join(FLOAT32, mode, single, dim, weight, sums, both - sums)
            if found == ABSENT:
                put_default(default, dim, single)
                _join(FLOAT32, mode, single, dim, weight, sums, both - sums)
            sums = both - sums
        while bag + 1 < ends.size and ends[bag + 1] == begin + i + 1:
            _close_bag(mode, sums, dim, _rows_of(keys, ends[bag], ends[bag + 1], padded, padding), out + bag * row_bytes)
            bag += 1
            _open_bag(mode, sums, dim, False, out)
    if bag + 1 < ends.size and begin + done > ends[bag]:
        copy_bytes(out + bag * row_bytes, sums, row_bytes)
    return done


def _pooler(codec: int) -> Any:
    """`_pool_part` for one codec, which is a constant in its loops; see `gather._copier`."""

    @kernel(
        "int64(int64, int64, int64, int64, int64, int64, uint64, int64, Array(uint64, 1, 'C', readonly=True), "
        "Array(float32, 1, 'C', readonly=True), boolean, uint64, Array(int64, 1, 'C', readonly=True), int64, int64, int64, "
        "int64[::1], int64, int64)"
    )
    def pool_part(
        mode: Int,
        base: Int,
        stride: Int,
        dim: Int,
        index: Int,
        log2: Int,
        stamp_min: Int,
        default: Int,
        keys: U64,
        weights: F32,
        padded: Int,
        padding: Int,
        ends: I64,
        bag: Int,
        begin: Int,
        count: Int,
        slots: I64,
        scratch: Int,
        out: Int,
    ) -> Int:
        rows = (base, stride, dim, index, log2, stamp_min, default)
        bags = (keys, weights, padded, padding, ends, bag, begin, count, slots, scratch, out)
        # So that the mode is a constant in the loops, too.
        if mode == MAX:
            return _pool_part(codec, MAX, *(rows + bags))
        if mode == WEIGHTED_SUM:
            return _pool_part(codec, WEIGHTED_SUM, *(rows + bags))
        return _pool_part(codec, mode, *(rows + bags))

    return pool_part


_pool_float32, _pool_float16, _pool_bfloat16, _pool_int8 = (_pooler(codec) for codec in (FLOAT32, FLOAT16, BFLOAT16, INT8))


@kernel(
    "int64(int64, int64, int64, int64, int64, uint64, int64, int64, Array(uint64, 1, 'C', readonly=True), "
    "Array(int64, 1, 'C', readonly=True), Array(float32, 1, 'C', readonly=True), boolean, uint64, float32[:, ::1], int64)"
)
def pool(
    table: Int,
    stride: Int,
    codec: Int,
    index: Int,
    capacity_log2: Int,
    stamp_min: Int,
    default: Int,
    mode: Int,
    keys: U64,
    ends: I64,
    weights: F32,
    padded: Int,
    padding: Int,
    out: F32,
    begin: Int,
) -> Int:
    """Make the rows of each bag one, into out, float32[bags, dim]: bag b has keys[ends[b] : ends[b + 1]]; no row: zeros.

    `ends`, int64[bags + 1], goes up from 0 to the number of keys. `weights`, float32[n], is for `WEIGHTED_SUM`. If `padded`,
    keys equal to `padding` are left out. What absent keys are, and what is returned, as in `gather.gather`; when it is called
    again with `begin`, `out` has to be as it was left.
    """
    part_max = part_keys(stride)
    slots = np.empty(min(keys.size, part_max), np.int64)
    bags, dim = out.shape
    scratch = np.empty(3 * dim, np.float32)
    single = np.int64(scratch.ctypes.data)
    base, target = table + _ROWS, np.int64(out.ctypes.data)
    bag = np.int64(0)
    while bag < bags and ends[bag + 1] == 0:
        zero_bytes(target + bag * 4 * dim, 4 * dim)
        bag += 1
    for part in range(begin, keys.size, part_max):
        count = min(part_max, keys.size - part)
        resolve_part(index, capacity_log2, keys[part : part + count], slots, base, stride)
        while ends[bag + 1] <= part:
            bag += 1
        # fmt: off
        if codec == FLOAT32:
            done = _pool_float32(
                mode, base, stride, dim, index, capacity_log2, stamp_min, default, keys, weights, padded, padding, ends, bag,
                part, count, slots, single, target,
            )
        elif codec == FLOAT16:
            done = _pool_float16(
                mode, base, stride, dim, index, capacity_log2, stamp_min, default, keys, weights, padded, padding, ends, bag,
                part, count, slots, single, target,
            )
        elif codec == BFLOAT16:
            done = _pool_bfloat16(
                mode, base, stride, dim, index, capacity_log2, stamp_min, default, keys, weights, padded, padding, ends, bag,
                part, count, slots, single, target,
            )
        else:
            done = _pool_int8(
                mode, base, stride, dim, index, capacity_log2, stamp_min, default, keys, weights, padded, padding, ends, bag,
                part, count, slots, single, target,
            )
        # fmt: on
        if done < count:
            return part + done
    return keys.size
