"""Batches of writes: what the kernels may rely on, made true on the host before a launch.

A batch that goes to a device holds each key once, with its newest version, and is sorted by bucket: several groups of lanes
then write without ever meeting in a slot, and insert lets one group have a bucket, whose evictions are thus in order.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpu.errors import ArgumentError
from gpu.layout import Shape, mix64

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to write; host arrays. `keys`, `stamps` uint64[n]; `rows` uint8[n, row_bytes]; `scores` uint64[n] or None."""

    keys: U64
    stamps: U64
    rows: U8
    scores: U64 | None

    def __len__(self) -> int:
        return len(self.keys)


def newest_by_bucket(keys: U64, stamps: U64) -> I64:
    """int64[m]: which versions to write, one a key, in the order of their buckets.

    The largest stamp wins, and of equal ones the last. The order is that of the keys' hashes, as that of the buckets is, too.
    """
    hashed = mix64(keys)
    order: I64 = np.argsort(hashed, kind="stable")
    ordered = hashed[order]
    if not (ordered[1:] == ordered[:-1]).any():
        return order
    order = np.lexsort((stamps, hashed))
    ordered = hashed[order]
    last: I64 = order[np.append(ordered[1:] != ordered[:-1], True)]
    return last


def checked_batch(shape: Shape, keys: U64, stamps: U64, rows: U8 | None, scores: U64 | None) -> Batch:
    """A caller's batch, one version a key, sorted.

    Args:
        shape: of the cache that it is for.
        keys: uint64[n].
        stamps: uint64[n], none of them 0.
        rows: uint8[n, row_bytes], or None when rows are removed.
        scores: uint64[n] or None.

    Raises:
        ArgumentError: one of them is something else, or not C-contiguous.
    """
    check_host_array("keys", keys, np.uint64, (None,))
    check_host_array("stamps", stamps, np.uint64, (len(keys),))
    if not stamps.all():
        raise ArgumentError("a stamp is 0, which marks an empty slot: stamps begin at 1")
    order = newest_by_bucket(keys, stamps)
    if rows is None:
        chosen = np.empty((len(order), 0), np.uint8)
    else:
        check_host_array("rows", rows, np.uint8, (len(keys), shape.row_bytes))
        chosen = rows[order]
    if scores is not None:
        check_host_array("scores", scores, np.uint64, (len(keys),))
        scores = scores[order]
    return Batch(keys[order], stamps[order], chosen, scores)


def check_host_array(name: str, array: object, dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
    """Refuse what is no C-contiguous NumPy array of this dtype and shape; None stands for any length."""
    if not isinstance(array, np.ndarray):
        raise ArgumentError(
            f"{name} is a {type(array).__module__}.{type(array).__name__}: batches come as NumPy arrays of the host"
        )
    check_array(name, array, (dtype,), shape)


def check_array(name: str, array: object, dtypes: tuple[type[np.generic], ...], shape: tuple[int | None, ...]) -> None:
    """Refuse an array of any device that is not C-contiguous, or not of one of these dtypes and this shape."""
    dtype, has, flags = getattr(array, "dtype", None), getattr(array, "shape", None), getattr(array, "flags", None)
    if dtype is None or has is None or flags is None:
        raise ArgumentError(f"{name} is a {type(array).__name__}: expected an array of {_described(dtypes, shape)}")
    if dtype not in dtypes:
        raise ArgumentError(f"{name} is of dtype {dtype}: expected {_described(dtypes, shape)}")
    if has != shape and not _fits(has, shape):
        raise ArgumentError(f"{name} has shape {tuple(has)}: expected {_described(dtypes, shape)}")
    if not flags.c_contiguous:
        raise ArgumentError(f"{name} is not C-contiguous: make it so before, a copy here would be a hidden one")


def _fits(has: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(has) == len(shape) and all(size in (None, length) for size, length in zip(shape, has, strict=True))


def _described(dtypes: tuple[type[np.generic], ...], shape: tuple[int | None, ...]) -> str:
    sizes = ", ".join("n" if size is None else str(size) for size in shape)
    return f"{' or '.join(np.dtype(dtype).name for dtype in dtypes)}[{sizes}]"
