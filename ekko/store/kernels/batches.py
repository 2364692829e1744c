"""Kernels of the two words that tell readers where one batch ends and the next begins. `ekko.store.batches` has the rules."""

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.atomics import (
    fence_acquire,
    fence_program_order,
    fence_release,
    load_i64,
    store_i64,
    store_release_i64,
)
from ekko.store.kernels.compile import Int, kernel
from p2p.stamps import WRITERS_MAX

U64 = NDArray[np.uint64]

_WRITER_MASK = np.uint64(WRITERS_MAX - 1)


@kernel("void(int64, int64, int64)")
def begin(epoch: Int, unsettled: Int, bits: Int) -> None:
    """A batch begins: both words say so before any of its rows can be seen."""
    store_i64(unsettled, load_i64(unsettled) | bits)
    store_i64(epoch, load_i64(epoch) | 1)
    fence_release()
    fence_program_order()


@kernel("void(int64)")
def end(epoch: Int) -> None:
    """It is applied. The epoch moves on to an even number, from an even one too: a writer may have died in between."""
    store_release_i64(epoch, (load_i64(epoch) | 1) + 1)


@kernel("boolean(int64, int64)")
def unchanged(address: Int, value: Int) -> bool:
    """A reader's second look at a word: False if what it has read since the first may be of another time."""
    fence_acquire()
    return bool(load_i64(address) == value)


@kernel("boolean(Array(uint64, 1, 'C', readonly=True), uint64[::1])")
def note_newest(stamps: U64, newest: U64) -> bool:
    """Raise newest[writer] to the largest of its stamps; True if one of the writers had none."""
    new = False
    for i in range(stamps.size):
        writer = np.int64(stamps[i] & _WRITER_MASK)
        new |= newest[writer] == 0
        newest[writer] = max(newest[writer], stamps[i])
    return new
