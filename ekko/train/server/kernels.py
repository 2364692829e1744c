"""Loops over the rows of a step that NumPy would need temporaries of their size for."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.compile import inline_kernel, kernel
from ekko.store.kernels.index import mix64

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
Int: TypeAlias = Any

_VALUES = "Array(float32, 2, 'C', readonly=True)"
_KEYS = "Array(uint64, 1, 'C', readonly=True)"
_PLACES = "Array(int64, 1, 'C', readonly=True)"
# A row is added up in so many sums at once, which become vector instructions; one sum would wait for itself at each value.
_LINES = 16


@inline_kernel
def _norm(values: F32, lines: F32) -> Any:
    """The L1 norm of a row."""
    whole = values.size // _LINES * _LINES
    lines[:] = np.float32(0)
    for i in range(0, whole, _LINES):
        for line in range(_LINES):
            lines[line] += abs(values[i + line])
    for i in range(whole, values.size):
        lines[i - whole] += abs(values[i])
    total = np.float32(0)
    for line in range(_LINES):
        total += lines[line]
    return total


@kernel(f"void({_VALUES}, {_PLACES}, float32[::1])")
def add_weights(gradients: F32, places: I64, out: F32) -> None:
    """Add the L1 norm of each row of gradients to `out[places[row]]`."""
    lines = np.empty(_LINES, np.float32)
    for row in range(len(gradients)):
        out[places[row]] += _norm(gradients[row], lines)


@kernel(f"void({_VALUES}, float32[::1])")
def weights_of(gradients: F32, out: F32) -> None:
    """The L1 norm of each row of gradients."""
    lines = np.empty(_LINES, np.float32)
    for row in range(len(gradients)):
        out[row] = _norm(gradients[row], lines)


@kernel(f"void(float32[:, ::1], {_VALUES}, {_PLACES})")
def put_rows(rows: F32, values: F32, places: I64) -> None:
    """`rows[places] = values`."""
    for i in range(places.size):
        rows[places[i], :] = values[i, :]


@kernel(f"void({_VALUES}, {_PLACES}, float32[:, ::1])")
def take_rows(rows: F32, places: I64, out: F32) -> None:
    """`out = rows[places]`."""
    for i in range(places.size):
        out[i, :] = rows[places[i], :]


@kernel(f"int64({_KEYS}, int64[::1], uint64[::1], int64[::1])")
def _find_places(keys: U64, table: I64, distinct: U64, places: I64) -> int:
    mask = table.size - 1
    count = 0
    for i in range(keys.size):
        position = np.int64(mix64(keys[i])) & mask
        while table[position] != 0 and distinct[table[position] - 1] != keys[i]:
            position = (position + 1) & mask
        if table[position] == 0:
            distinct[count] = keys[i]
            count += 1
            table[position] = count
        places[i] = table[position] - 1
    return count


def find_places(keys: U64) -> tuple[U64, I64]:
    """The keys of uint64[n] without repeats, in the order in which they come first; and int64[n], where each is there."""
    table = np.zeros(1 << max(1, (2 * keys.size - 1).bit_length() if keys.size else 1), np.int64)
    distinct, places = np.empty(keys.size, np.uint64), np.empty(keys.size, np.int64)
    count = _find_places(keys, table, distinct, places)
    return distinct[:count], places


@kernel(f"boolean({_KEYS}, int64[::1])")
def _are_distinct(keys: U64, table: I64) -> bool:
    mask = table.size - 1
    for i in range(keys.size):
        position = np.int64(mix64(keys[i])) & mask
        while table[position] != 0:
            if keys[table[position] - 1] == keys[i]:
                return False
            position = (position + 1) & mask
        table[position] = i + 1
    return True


def are_distinct(keys: U64) -> bool:
    """Whether no key of uint64[n] comes twice."""
    table = np.zeros(1 << max(1, (2 * keys.size - 1).bit_length() if keys.size else 1), np.int64)
    return bool(_are_distinct(keys, table))


@kernel(f"void({_PLACES}, Array(float32, 1, 'C', readonly=True), float32[::1])")
def add_at(places: I64, values: F32, out: F32) -> None:
    """Add each value to `out[places[i]]`."""
    for i in range(places.size):
        out[places[i]] += values[i]
