"""Kernels that weigh the rows of a step (`ekko.priority.origin`), all but the logarithm and the power, which are NumPy's.

What a row is given is to the bit what NumPy gives it with whole arrays, one operation after the other: some fifty of these
were a quarter of a training node's time. So sums are in NumPy's order, too.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.compile import Int, inline_kernel, kernel

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Float: TypeAlias = Any  # of either size: a kernel converts it

# NumPy converts so many numbers at a time, halves what it adds until so few are left, and adds these in so many lines.
_PIECE, _FEW, _LINES = 8_192, 128, 8
_DEPTH_MAX = 8  # of halves of a piece
_BLOCK = 64  # bins

_SHIFT, _FIRST, _SECOND = np.uint64(33), np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_MARK_SHIFT = np.uint64(32)


@inline_kernel
def _sum_of_few(values: F32, begin: Int, count: Int, largest: Float, lines: F64) -> float:
    total = np.float64(0)
    whole = begin
    if count >= _LINES:
        whole = begin + (count & ~(_LINES - 1))
        lines[:] = 0
        for i in range(begin, whole, _LINES):
            for line in range(_LINES):
                lines[line] += np.float64(min(values[i + line], largest))
        total = ((lines[0] + lines[1]) + (lines[2] + lines[3])) + ((lines[4] + lines[5]) + (lines[6] + lines[7]))
    for i in range(whole, begin + count):
        total += np.float64(min(values[i], largest))
    return total


@inline_kernel
def _sum_of_piece(values: F32, begin: Int, count: Int, largest: Float, lines: F64, left: F64, right: I64) -> float:
    """`left`: sums of left halves, whose right ones are still to be added: `right`, (begin, count, is the left one known)."""
    depth = 0
    while True:
        while count > _FEW:
            half = (count // 2) & ~(_LINES - 1)
            right[depth, 0], right[depth, 1], right[depth, 2] = begin + half, count - half, 0
            depth, count = depth + 1, half
        total = _sum_of_few(values, begin, count, largest, lines)
        while depth and right[depth - 1, 2]:
            depth -= 1
            total = left[depth] + total
        if not depth:
            return total
        left[depth - 1], right[depth - 1, 2] = total, 1
        begin, count = right[depth - 1, 0], right[depth - 1, 1]


@kernel("float64(Array(float32, 1, 'C', readonly=True), float32)")
def sum_of(values: F32, largest: Float) -> float:
    """`numpy.minimum(values, largest).sum(dtype=numpy.float64)`, of numbers from 0."""
    lines, left, right = np.empty(_LINES, np.float64), np.empty(_DEPTH_MAX, np.float64), np.empty((_DEPTH_MAX, 3), np.int64)
    total = np.float64(0)
    for begin in range(0, values.size, _PIECE):
        total += _sum_of_piece(values, begin, min(_PIECE, values.size - begin), largest, lines, left, right)
    return total


@inline_kernel
def _hash_of(table: Int, key: Int) -> Int:
    """The Murmur3 finaliser, as for shards."""
    hashed = key ^ table
    hashed ^= hashed >> _SHIFT
    hashed *= _FIRST
    hashed ^= hashed >> _SHIFT
    hashed *= _SECOND
    return hashed ^ (hashed >> _SHIFT)


@inline_kernel
def _mark_of(hashed: Int) -> Int:
    """32 bits of a hash; none of them is 0."""
    return np.uint32(hashed >> _MARK_SHIFT) | np.uint32(1)


@kernel("void(uint64, Array(uint64, 1, 'C', readonly=True), Array(float32, 1, 'C', readonly=True), uint32[::1], float32[::1])")
def note(table: Int, keys: U64, noted: F32, marks: U32, values: F32) -> None:
    """See `ekko.priority.memory.KeyMemory.note`. `table` has all the bits that a key is mixed with."""
    mask = np.uint64(marks.size - 1)
    for i in range(keys.size):
        hashed = _hash_of(table, keys[i])
        place = np.int64(hashed & mask)
        marks[place] = _mark_of(hashed)
        values[place] = noted[i]


@kernel("void(uint64, Array(uint64, 1, 'C', readonly=True), float32, uint32[::1], float32[::1], float32[::1])")
def recall(table: Int, keys: U64, default: Float, marks: U32, values: F32, out: F32) -> None:
    """See `ekko.priority.memory.KeyMemory.recall`; nothing was noted where there is no place."""
    mask = np.uint64(marks.size - 1)
    for i in range(keys.size):
        out[i] = default
        if marks.size:
            hashed = _hash_of(table, keys[i])
            place = np.int64(hashed & mask)
            if marks[place] == _mark_of(hashed):
                out[i] = values[place]


@kernel(
    "UniTuple(int64, 2)(Array(float32, 1, 'C', readonly=True), float32, Array(uint64, 1, 'C', readonly=True), int64, float32, "
    "float32, float32[::1], float32[::1], int64[::1], int64[::1])"
)
def weigh(
    values: F32,
    mean: Float,
    before: U64,
    live: Int,
    now_s: Float,
    half_life_s: Float,
    weights: F32,
    power: F32,
    new: I64,
    fresh: I64,
) -> tuple[int, int]:
    """How much each row of a step matters, and how fresh it is.

    Args:
        values: float32[n], from 0.
        mean: of these lately; 0: nothing, or nothing but zeros, was seen.
        before: uint64[n], 0 for rows that are not there yet.
        live: so many rows are not deletes.
        now_s: of the clock of `power`.
        half_life_s: of freshness.
        weights: comes out: float32[n], values relative to the mean.
        power: float32[n]; goes in: when each key was created; comes out: the negative ages in half-lives of the fresh rows.
        new: int64[n]; comes out: the rows that are new.
        fresh: int64[n]; comes out: the rows with an age that is not infinite, new ones among them.

    Returns:
        How many rows are new, and how many are fresh: so much of the arrays above counts.
    """
    count = many = 0
    for i in range(values.size):
        weights[i] = values[i] / mean if mean else np.float32(0)
        age_s = np.float32(np.inf)
        if i < live:
            age_s = now_s - power[i]
            if before[i] == 0 or np.isnan(age_s):
                new[count] = i
                count += 1
                age_s = np.float32(0)
        if age_s != np.inf:
            power[many] = -age_s / half_life_s
            fresh[many] = i
            many += 1
    return count, many


@kernel(
    "void(Array(float32, 1, 'C', readonly=True), Array(int64, 1, 'C', readonly=True), float32, float32, float32, float32[::1])"
)
def add_up(freshness: F32, fresh: I64, weight: Float, smallest: Float, largest: Float, weights: F32) -> None:
    """`weights` of the fresh rows get so much of their freshness, and all of float32[n] are brought within bounds."""
    for i in range(freshness.size):
        weights[fresh[i]] += weight * freshness[i]
    for i in range(weights.size):
        weights[i] = min(max(weights[i], smallest), largest)


@kernel("int64(Array(float32, 1, 'C', readonly=True), float32, float32, float32, float32, float32, uint8[::1])")
def classes_of(
    logarithms: F32, threshold: Float, per_doubling: Float, significant: Float, least: Float, most: Float, out: U8
) -> Int:
    """See `ekko.priority.origin.class_of`; returns how many are significant."""
    count = 0
    for i in range(logarithms.size):
        relative = np.rint((logarithms[i] - threshold) * per_doubling)
        one = min(max(relative + significant, least), most)
        count += one >= significant
        out[i] = np.uint8(one)
    return count


@kernel("void(Array(float32, 1, 'C', readonly=True), float32, float32, int64[::1], int64[::1])")
def count_bins(logarithms: F32, above: Float, per_doubling: Float, part: I64, total: I64) -> None:
    """One more in the bin of each, see `ekko.priority.threshold.bins_of`, in both histograms."""
    for i in range(logarithms.size):
        place: Int = min(np.int64((logarithms[i] + above) * per_doubling), part.size - 1)
        part[place] += 1
        total[place] += 1


@kernel("int64(Array(int64, 1, 'C', readonly=True), float64, float64)")
def first_above(histogram: I64, share: Float, count_min: Float) -> Int:
    """The lowest bin such that in it and above is at most this share of all, the number of bins where there is none; -1: the
    share is less than `count_min`.
    """
    count = np.float64(histogram.sum()) * share
    if count < count_min:
        return -1
    above, end = 0, histogram.size
    while end > _BLOCK:  # whole blocks, several bins at a time
        block = 0
        for place in range(end - _BLOCK, end):
            block += histogram[place]
        if above + block > count:
            break
        above, end = above + block, end - _BLOCK
    for place in range(end - 1, -1, -1):
        above += histogram[place]
        if above > count:
            return place + 1
    return 0
