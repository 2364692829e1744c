"""Loops over the rows of a step that NumPy would need temporaries of their size for."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.compile import kernel

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Int: TypeAlias = Any

_VALUES = "Array(float32, 2, 'C', readonly=True)"
_EXPONENT = np.uint32(0x7F80_0000)


@kernel(f"void({_VALUES}, Array(int64, 1, 'C', readonly=True), float32[::1])")
def add_weights(gradients: F32, places: I64, out: F32) -> None:
    """Add the L1 norm of each row of gradients to `out[places[row]]`."""
    rows, dim = gradients.shape
    for row in range(rows):
        total = np.float32(0)
        for i in range(dim):
            total += abs(gradients[row, i])
        out[places[row]] += total


@kernel(f"void({_VALUES}, float32[::1])")
def weights_of(gradients: F32, out: F32) -> None:
    """The L1 norm of each row of gradients."""
    rows, dim = gradients.shape
    for row in range(rows):
        total = np.float32(0)
        for i in range(dim):
            total += abs(gradients[row, i])
        out[row] = total


@kernel("void(float32[:, ::1], Array(float32, 2, 'C', readonly=True), Array(int64, 1, 'C', readonly=True))")
def put_rows(rows: F32, values: F32, places: I64) -> None:
    """`rows[places] = values`."""
    for i in range(places.size):
        rows[places[i], :] = values[i, :]
