"""A place: which slot, and which of its lives. What is kept of a row for later names a place, not a slot.

A slot that was freed is given to another key, and its epoch, in the row's flags, grows by one (R18). A place is
slot | epoch << 32 in an int64, so whoever comes back with an old one is noticed. Nobody outside the store takes a place apart.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import load_u32
from ekko.store.kernels.compile import Int, inline_kernel, kernel

# 4,294,967,296 rows: with the smallest ones 128 GiB a table.
SLOTS_MAX = 1 << 32
PLACE_BITS = 48

_SLOT_MASK = SLOTS_MAX - 1
_SLOT_BITS = 32
_EPOCH_SHIFT = layout.SLOT_EPOCH_SHIFT
_EPOCH_OR_FREE = 0xFFFF << _EPOCH_SHIFT | layout.FLAG_FREE
_ROWS = layout.TABLE.offset("rows")
_FLAGS = layout.ROW.offset("flags")


@inline_kernel
def place_of(slot: Int, flags: Int) -> Int:
    """The place of a slot whose row has these flags."""
    return slot | np.int64(flags >> _EPOCH_SHIFT) << _SLOT_BITS


@inline_kernel
def slot_of(place: Int) -> Int:
    """The slot of a place."""
    return place & _SLOT_MASK


@inline_kernel
def row_at(table: Int, stride: Int, place: Int) -> Int:
    """Address of a place's row."""
    return table + _ROWS + (place & _SLOT_MASK) * stride


@inline_kernel
def is_current(row: Int, place: Int) -> bool:
    """Whether the slot is still in the life that the place names, with a row in it."""
    return bool(np.int64(load_u32(row + _FLAGS)) & _EPOCH_OR_FREE == (place >> _SLOT_BITS & 0xFFFF) << _EPOCH_SHIFT)


@kernel("void(int64, int64, int64[::1])")
def to_places(table: Int, stride: Int, slots: NDArray[np.int64]) -> None:
    """Make each slot the place that it is now, and what is negative -1."""
    for i in range(slots.size):
        slots[i] = place_of(slots[i], load_u32(row_at(table, stride, slots[i]) + _FLAGS)) if slots[i] >= 0 else -1
