"""Kernels of what a trainer has still to publish (`ekko.torch.due`): which rows of a table, and how much each matters.

A row's entry in `weights`, float32[rows], is how far it moved since it was published last, or negative: nothing is due of it.
`blocks`, uint8[ceil(rows / BLOCK_ROWS)], says which runs of rows have any that are due, so that few of many are found without a
look at all. Two words of all rows would be no faster: memory is what a large table runs out of first.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.compile import Int, inline_kernel, kernel

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

BLOCK_ROWS = 128  # half a KiB of weights
NOT_DUE = np.float32(-1)

_SHIFT = 7
_FEW = 64  # entries that are sorted without more memory
_WEIGHT_MAX = np.float32(3e38)  # what is larger, or not a number, is refused with its row, or is one that matters most


@inline_kernel
def _add(weights: F32, blocks: U8, row: Int, weight: Int) -> Int:
    """Add to a row's entry; 1 where it was not due before."""
    before = weights[row]
    weight = np.float32(weight)
    total = weight if before < 0 else before + weight
    weights[row] = total if total < _WEIGHT_MAX else _WEIGHT_MAX
    blocks[row >> _SHIFT] = 1
    return 1 if before < 0 else 0


@inline_kernel
def _sorted(ids: I64, order: I64) -> Int:
    """Write into `order` where the entries of int64[n] are in ascending order, equal ones as they come; returns n."""
    if ids.size > _FEW:
        order[: ids.size] = np.argsort(ids, kind="mergesort")
        return ids.size
    for i in range(ids.size):
        j = i
        while j > 0 and ids[order[j - 1]] > ids[i]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i
    return ids.size


@kernel(
    "int64(Array(int64, 1, 'C', readonly=True), Array(float32, 2, 'C', readonly=True), Array(int64, 1, 'C', readonly=True), "
    "boolean, float32[::1], uint8[::1])"
)
def add_gradients(ids: I64, values: F32, ends: I64, zeros: Int, weights: F32, blocks: U8) -> Int:
    """Add the L1 norms of sparse gradients: rows `values`, float32[n, dim], of the table's rows `ids`, int64[n].

    They are those of several steps, one after the other; `ends` says where each step's end. Of a step the entries of one row
    are summed first, as an optimizer does. Rows whose gradient is zero count only where `zeros` says so; where it is the sum of
    entries that are not zero it counts, too: SGD adds them one by one, and each addition rounds. An id out of range is skipped.
    Returns how many rows became due.
    """
    dim = values.shape[1]
    total = np.empty(dim, np.float32)
    order = np.empty(_FEW, np.int64)
    added = 0
    begin = 0
    for step in range(ends.size):
        end = ends[step]
        if end - begin > order.size:
            order = np.empty(end - begin, np.int64)
        count = _sorted(ids[begin:end], order)
        i = 0
        while i < count:
            first = begin + order[i]
            row = ids[first]
            i += 1
            norm = np.float32(0)
            moved = False
            if i == count or ids[begin + order[i]] != row:
                for j in range(dim):
                    norm += abs(values[first, j])
            else:
                for j in range(dim):
                    total[j] = values[first, j]
                    moved |= total[j] != 0
                while i < count and ids[begin + order[i]] == row:
                    other = begin + order[i]
                    for j in range(dim):
                        total[j] += values[other, j]
                        moved |= values[other, j] != 0
                    i += 1
                for j in range(dim):
                    norm += abs(total[j])
            if 0 <= row < weights.size and (zeros or moved or norm != 0):
                added += _add(weights, blocks, row, norm)
        begin = end
    return added


@kernel("int64(Array(float32, 1, 'C', readonly=True), float32[::1], uint8[::1])")
def add_norms(norms: F32, weights: F32, blocks: U8) -> Int:
    """Add one norm for each row of the table, float32[rows]; those of zero do not count. Returns how many rows became due."""
    added = 0
    for row in range(norms.size):
        if norms[row] != 0:
            added += _add(weights, blocks, row, norms[row])
    return added


@kernel("int64(Array(int64, 1, 'C', readonly=True), Array(float32, 1, 'C', readonly=True), float32[::1], uint8[::1])")
def add_rows(ids: I64, more: F32, weights: F32, blocks: U8) -> Int:
    """Add `more`, float32[n], to the rows `ids`, int64[n]; an id out of range is skipped. Returns how many became due."""
    added = 0
    for i in range(ids.size):
        if 0 <= ids[i] < weights.size:
            added += _add(weights, blocks, ids[i], more[i])
    return added


@kernel("int64(Array(int64, 1, 'C', readonly=True), float32[::1])")
def drop_rows(ids: I64, weights: F32) -> Int:
    """Nothing is due of these rows any more, int64[n]. Returns how many were."""
    dropped = 0
    for i in range(ids.size):
        if 0 <= ids[i] < weights.size and weights[ids[i]] >= 0:
            weights[ids[i]] = NOT_DUE
            dropped += 1
    return dropped


@kernel("int64(float32[::1], uint8[::1], int64[::1], int64[::1], float32[::1])")
def take_rows(weights: F32, blocks: U8, place: I64, ids: I64, taken: F32) -> Int:
    """Take as many due rows as `ids`, int64[n], has room for: ascending from block place[0] on, and on from the first.

    They are not due any more; what they weighed is in `taken`, float32[n]. `place` moves to where the next call is to begin, so
    that of many rows none waits for ever. Returns how many.
    """
    count = 0
    size = blocks.size
    first = place[0] if place[0] < size else 0
    for step in range(size):
        block = first + step if first + step < size else first + step - size
        if blocks[block] == 0:
            continue
        for row in range(block << _SHIFT, min((block + 1) << _SHIFT, weights.size)):
            if weights[row] < 0:
                continue
            if count == ids.size:
                place[0] = block
                return count
            ids[count] = row
            taken[count] = weights[row]
            weights[row] = NOT_DUE
            count += 1
        blocks[block] = 0
    place[0] = 0
    return count


@kernel("void(Array(float32, 2, 'C', readonly=True), Array(int64, 1, 'C', readonly=True), float32[:, ::1])")
def copy_rows(table: F32, ids: I64, out: F32) -> None:
    """Copy the rows `ids`, int64[n], all in range, into float32[n, dim]."""
    for i in range(ids.size):
        row = ids[i]
        for j in range(out.shape[1]):
            out[i, j] = table[row, j]


@kernel(
    "int64(Array(uint32, 2, 'C', readonly=True), Array(uint32, 2, 'C', readonly=True), int64, int64, float32[::1], uint8[::1])"
)
def add_changed(table: NDArray[np.uint32], known: NDArray[np.uint32], begin: Int, end: Int, weights: F32, blocks: U8) -> Int:
    """The rows from `begin` to before `end` of which a bit differs between two tables become due. Returns how many did."""
    added = 0
    for row in range(begin, end):
        differs = np.uint32(0)
        for j in range(table.shape[1]):
            differs |= table[row, j] ^ known[row, j]
        if differs != 0 and weights[row] < 0:
            added += _add(weights, blocks, row, np.float32(0))
    return added
