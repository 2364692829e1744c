"""The kernel of feature admission (`ekko.train.admission`): how often keys were touched, in two count-min sketches."""

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.compile import Int, kernel
from ekko.store.kernels.index import mix64

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

ROWS = 4

_ONE = np.uint64(1)


@kernel("int64(Array(uint64, 1, 'C', readonly=True), int64, uint8[:, ::1], uint8[:, ::1], int64[::1], boolean[::1])")
def touch(keys: U64, needed: Int, young: U8, old: U8, room: I64, admitted: Mask) -> Int:
    """Touch each key of uint64[n] once, and say which have been touched `needed` times by now.

    Counters of uint8[ROWS, width], of which the width is a power of two, go up to `needed`. `room`, int64[1], is how many
    counters of the first row of `young` may still become more than 0; returns how many keys are done before there is none.
    """
    shift = np.uint64(64)
    width = young.shape[1]
    while width > 1:
        shift -= _ONE
        width >>= 1
    cells = np.empty(ROWS, np.int64)
    for i in range(keys.size):
        if room[0] <= 0:
            return i
        first = mix64(keys[i])
        step = mix64(first) | _ONE
        least, before = needed, needed
        for row in range(ROWS):
            cells[row] = np.int64((first + np.uint64(row) * step) >> shift)
            least = min(least, np.int64(young[row, cells[row]]))
            before = min(before, np.int64(old[row, cells[row]]))
        room[0] -= young[0, cells[0]] == 0
        reached = least + before + 1 >= needed
        admitted[i] = reached
        # Conservative: only the least counters grow. What is admitted is known to the young generation at once, and stays so.
        target = needed if reached else least + 1
        for row in range(ROWS):
            if young[row, cells[row]] < target:
                young[row, cells[row]] = target
    return keys.size
