"""The kernel that says how far rows move: what is about to be written, beside what is stored (`ekko.priority`)."""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import load_u32, load_u64, prefetch_near, sum_of_magnitudes
from ekko.store.kernels.compile import Int, inline_kernel, kernel
from ekko.store.kernels.index import resolve_rows
from ekko.store.kernels.quantise import FLOAT32, decode_row
from ekko.store.kernels.rows import PREFETCH_ROWS

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

_ROWS = layout.TABLE.offset("rows")
_FLAGS = layout.ROW.offset("flags")
_STAMP = layout.ROW.offset("stamp")
_DATA = layout.ROW.offset("data")
_GONE = layout.FLAG_TOMBSTONE | layout.FLAG_FREE
_LINE = layout.LINE_BYTES


@inline_kernel
def _values(codec: Int, data: Int, dim: Int, scratch: Int) -> Int:
    """Address of the float32[dim] that an encoded row means: its own, or the scratch that it is decoded into."""
    if codec == FLOAT32:
        return data
    decode_row(codec, data, dim, scratch)
    return scratch


@kernel(
    "void(int64, int64, int64, int64, int64, int64, Array(uint64, 1, 'C', readonly=True), Array(uint8, 2, 'C', readonly=True), "
    "float32[::1], uint64[::1])"
)
def movement(
    index: Int, capacity_log2: Int, table: Int, stride: Int, codec: Int, dim: Int, keys: U64, data: U8, moved: F32, before: U64
) -> None:
    """How far each key's row is from what is stored of it, as sum of magnitudes; what is absent or deleted counts as zeros.

    For the writer's own thread: takes no lock. The first keys have rows in `data`, uint8[live, row_bytes]; those behind them
    are to be deleted. Comes out: `moved`, float32[n]; `before`, uint64[n], the stamps of what is stored, 0 for nothing.
    """
    live, row_bytes = data.shape
    slots = np.empty(keys.size, np.int64)
    resolve_rows(index, capacity_log2, table, stride, keys, slots)
    new_scratch, old_scratch, zeros = np.empty(dim, np.float32), np.empty(dim, np.float32), np.zeros(dim, np.float32)
    new_at, old_at, zeros_at = np.int64(new_scratch.ctypes.data), np.int64(old_scratch.ctypes.data), np.int64(zeros.ctypes.data)
    source = np.int64(data.ctypes.data)
    for i in range(keys.size):
        if i + PREFETCH_ROWS < keys.size and slots[i + PREFETCH_ROWS] >= 0:
            ahead = table + _ROWS + slots[i + PREFETCH_ROWS] * stride
            for offset in range(0, stride, _LINE):
                prefetch_near(ahead + offset)
        row = table + _ROWS + slots[i] * stride
        here = slots[i] >= 0 and not load_u32(row + _FLAGS) & _GONE
        before[i] = load_u64(row + _STAMP) if here else np.uint64(0)
        old = _values(codec, row + _DATA, dim, old_at) if here else zeros_at
        new = _values(codec, source + i * row_bytes, dim, new_at) if i < live else zeros_at
        moved[i] = sum_of_magnitudes(new, old, dim)
