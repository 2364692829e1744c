"""The kernel of readers that want to know what a table's rows are like on average."""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import fence_acquire, floats_at, load_acquire_u32, load_u32, load_u64, prefetch_bytes
from ekko.store.kernels.compile import Int, kernel
from ekko.store.kernels.quantise import decode_row
from ekko.store.kernels.rows import PREFETCH_ROWS
from ekko.store.kernels.whole_row import DATA, FLAGS, GONE, LOCK, STAMP

_ROWS = layout.TABLE.offset("rows")


@kernel("int64(int64, int64, int64, uint64, Array(int64, 1, 'C', readonly=True), float64[::1])")
def add_rows(table: Int, stride: Int, codec: Int, stamp_min: Int, slots: NDArray[np.int64], sums: NDArray[np.float64]) -> Int:
    """Add the live rows of these slots to `sums`, float64[dim], and return how many they are; busy ones are left out."""
    dim = sums.size
    values = np.empty(dim, np.float32)
    target = np.int64(values.ctypes.data)
    count = 0
    for i in range(slots.size):
        if i + PREFETCH_ROWS < slots.size:
            prefetch_bytes(table + _ROWS + slots[i + PREFETCH_ROWS] * stride, stride)
        row = table + _ROWS + slots[i] * stride
        lock = load_acquire_u32(row + LOCK)
        gone = load_u32(row + FLAGS) & GONE
        old = load_u64(row + STAMP) < stamp_min
        decode_row(codec, row + DATA, dim, target)
        fence_acquire()
        if load_u32(row + LOCK) == lock and lock & 1 == 0 and not gone and not old:
            whole = floats_at(target, dim)
            for j in range(dim):
                sums[j] += whole[j]
            count += 1
    return count
