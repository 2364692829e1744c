"""What users pass to a reader, checked and made what the kernels take."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.errors import ModelError
from ekko.store.kernels import pool
from ekko.store.view import NO_WEIGHTS, Bags

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]

# Comparing with a type makes one of these each time.
_FLOAT32, _UINT64 = np.dtype(np.float32), np.dtype(np.uint64)

MODES = {"sum": pool.SUM, "mean": pool.MEAN, "max": pool.MAX}


def as_keys(keys: ArrayLike) -> U64:
    """Any array of integers >= 0 as uint64, C-contiguous and aligned.

    Raises:
        ModelError: they are not integers >= 0.
    """
    array = np.asarray(keys)
    if array.dtype == _UINT64:
        return array if array.flags.carray else np.require(array, None, ["C", "A"])
    if array.size == 0:
        return np.empty(array.shape, np.uint64)
    if array.dtype.kind not in "iu":
        raise ModelError(f"keys are {array.dtype}: expected integers")
    if array.dtype.kind == "i" and array.min() < 0:
        raise ModelError(f"key {int(array.min())} is negative: expected integers from 0 to 2**64 - 1")
    return np.ascontiguousarray(array, np.uint64)


def output(out: F32 | None, shape: tuple[int, ...]) -> F32:
    """`out`, or a new array.

    Raises:
        ModelError: `out` is not a writable, C-contiguous float32 of this shape.
    """
    if out is None:
        return np.empty(shape, np.float32)
    flags = out.flags
    if out.dtype != _FLOAT32 or out.shape != shape or not flags.c_contiguous or not flags.writeable:
        raise ModelError(f"out is {out.dtype}{list(out.shape)}: expected a writable, C-contiguous float32{list(shape)}")
    return out


def as_bags(
    keys: U64,
    offsets: ArrayLike | None,
    mode: str,
    weights: ArrayLike | None,
    include_last_offset: bool,
    padding_key: int | None,
) -> Bags:
    """How keys of shape [n] with offsets, or [bags, length] without, are pooled; as `torch.nn.functional.embedding_bag`.

    Raises:
        ModelError: naming what does not fit.
    """
    if mode not in MODES:
        raise ModelError(f"mode is {mode!r}: expected 'sum', 'mean' or 'max'")
    if padding_key is not None and not 0 <= padding_key < 1 << 64:
        raise ModelError(f"padding_key is {padding_key}: expected an integer from 0 to 2**64 - 1")
    ends = _ends(keys, offsets, include_last_offset)
    if weights is None:
        return Bags(ends, MODES[mode], NO_WEIGHTS, padding_key)
    if mode != "sum":
        raise ModelError(f"weights were given with mode {mode!r}: only 'sum' has weights")
    factors = np.ascontiguousarray(weights, np.float32)
    if factors.shape != keys.shape:
        raise ModelError(f"weights are {list(factors.shape)} and keys {list(keys.shape)}: expected one weight for each key")
    return Bags(ends, pool.WEIGHTED_SUM, factors.reshape(-1), padding_key)


def _ends(keys: U64, offsets: ArrayLike | None, include_last_offset: bool) -> NDArray[np.int64]:
    """int64[bags + 1]: where each bag begins, and the number of keys."""
    if offsets is None:
        if keys.ndim != 2:
            raise ModelError(f"keys are {list(keys.shape)} and there are no offsets: expected [bags, length], or offsets")
        if include_last_offset:
            raise ModelError("include_last_offset was asked for without offsets")
        bags, length = keys.shape
        return np.arange(0, bags * length + 1, length) if length else np.zeros(bags + 1, np.int64)
    if keys.ndim != 1:
        raise ModelError(f"keys are {list(keys.shape)} and there are offsets: expected keys of one dimension")
    begins = np.asarray(offsets)
    if begins.ndim != 1 or (begins.dtype.kind not in "iu" and begins.size):
        raise ModelError(f"offsets are {begins.dtype}{list(begins.shape)}: expected integers of one dimension")
    if include_last_offset:
        if begins.size == 0 or begins[-1] != keys.size:
            raise ModelError(f"the last of the offsets is to be the number of keys, {keys.size}, as include_last_offset says")
        ends = np.ascontiguousarray(begins, np.int64)
    else:
        ends = np.empty(begins.size + 1, np.int64)
        ends[:-1] = begins
        ends[-1] = keys.size
    if ends[0] != 0:
        first = "there are none" if ends.size == 1 else f"the first is {ends[0]}"
        raise ModelError(f"offsets have to begin with 0: {first}, and there are {keys.size} keys")
    if (ends[1:] < ends[:-1]).any():
        raise ModelError(f"offsets have to ascend from 0 to at most the number of keys, {keys.size}")
    return ends


def as_row(table: str, row: ArrayLike) -> F32:
    """A row that a user gave for absent keys: float32[dim], a copy.

    Raises:
        ModelError: it is no row of finite numbers.
    """
    values = np.array(row)
    if values.ndim != 1 or values.dtype.kind not in "fiu" or not np.isfinite(values.astype(np.float32)).all():
        raise ModelError(
            f"the default of table {table!r} is {values.dtype}{list(values.shape)}: expected 'zeros', 'mean', or a row of "
            "finite numbers"
        )
    return np.ascontiguousarray(values, np.float32)
