"""What users give to a publisher, checked at the call, in their own process: arrays, tables, stamps."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.codec import LIMIT_BITS, limit_of
from ekko.errors import ModelError, PublishError
from ekko.model import DENSE_TABLE, ModelSpec, TableSpec, ttl_seconds
from ekko.store.kernels.checks import all_below, all_finite
from p2p.replica import U64

Rows = NDArray[np.float32]


def _array_of(what: str, value: ArrayLike) -> NDArray[Any]:
    """A NumPy view of an array, a list or a CPU tensor of torch."""
    detach: Callable[[], Any] | None = getattr(value, "detach", None)
    if detach is not None:  # a tensor; torch itself is not needed to read it
        tensor = detach()
        if tensor.device.type != "cpu":
            raise ModelError(f"{what} are on device {tensor.device}: expected them in CPU memory; use .cpu()")
        try:
            return np.asarray(tensor.numpy())
        except TypeError:
            raise ModelError(f"{what} have dtype {tensor.dtype}, which NumPy does not know: use .float()") from None
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ModelError(f"{what} are not an array: {error}") from None


def keys_of(table: str, keys: ArrayLike) -> U64:
    """uint64[n], contiguous."""
    array = _array_of(f"keys of table {table!r}", keys)
    if array.ndim != 1:
        raise ModelError(f"keys of table {table!r} have shape {array.shape}: expected one dimension")
    if array.size == 0:
        return np.empty(0, np.uint64)
    if array.dtype.kind not in "iu":
        raise ModelError(
            f"keys of table {table!r} have dtype {array.dtype}: expected whole numbers, not negative; use .astype(np.uint64)"
        )
    if array.dtype.kind == "i" and array.min() < 0:
        raise PublishError(f"keys of table {table!r} contain {array.min()}: expected whole numbers, not negative")
    return np.ascontiguousarray(array, dtype=np.uint64)


def rows_of(table: str, keys: U64, rows: ArrayLike, dim: int, codec: str, *, what: str = "rows") -> Rows:
    """float32[n, dim], contiguous, finite, and within the codec's range; `what`: they are called, "rows" or "gradients"."""
    named = f"{what} of table {table!r}"
    array = _array_of(named, rows)
    if array.size == 0 and len(keys) == 0 and array.shape in ((0,), (0, dim)):
        return np.empty((0, dim), np.float32)
    if array.dtype != np.float32:
        raise ModelError(f"{named} have dtype {array.dtype}: expected float32; use .astype(np.float32)")
    if array.ndim != 2 or array.shape[1] != dim:
        raise ModelError(f"{named} have shape {array.shape}: expected ({len(keys)}, {dim})")
    if len(array) != len(keys):
        raise PublishError(f"table {table!r} was given {len(keys)} keys and {len(array)} {what}: expected one for each key")
    array = np.ascontiguousarray(array)
    if not all_below(array, LIMIT_BITS[codec]):
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        values, remedy = "NaN or infinity", ""
        if not len(bad):
            bad = np.flatnonzero((np.abs(array) >= limit_of(codec)).any(axis=1))
            values, remedy = f"values from {limit_of(codec):g} on, which {codec} cannot hold", ", or use codec 'bfloat16'"
        raise PublishError(
            f"{named} contain {values}: {len(bad)} of {len(array)} rows, first at index {bad[0]} (key {keys[bad[0]]}); "
            f"nothing was {'published' if what == 'rows' else 'pushed'}: drop these rows or lower the learning rate{remedy}"
        )
    return array


def significance_of(table: str, keys: U64, significance: ArrayLike) -> NDArray[np.float32]:
    """float32[n], finite, not negative."""
    array = _array_of(f"significance of table {table!r}", significance)
    if array.shape != keys.shape:
        raise PublishError(f"significance of table {table!r} has shape {array.shape}: expected {keys.shape}, one for each key")
    if array.dtype.kind not in "fiu":
        raise ModelError(f"significance of table {table!r} has dtype {array.dtype}: expected float32")
    weights = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise PublishError(
            f"significance of table {table!r} contains negative numbers, NaN or infinity: expected finite weights from 0"
        )
    return weights


def dense_of(name: str, array: ArrayLike) -> Rows:
    """float32, contiguous, finite, of any shape."""
    values = _array_of(f"values of tensor {name!r}", array)
    if values.dtype != np.float32:
        raise ModelError(
            f"tensor {name!r} has dtype {values.dtype}: only float32 is available in this version; use .astype(np.float32)"
        )
    shape = values.shape
    values = np.ascontiguousarray(values)
    if values.size and not all_finite(values.reshape(1, -1)):
        raise PublishError(f"tensor {name!r} contains NaN or infinity: nothing was published")
    return values.reshape(shape)  # ascontiguousarray makes a scalar one-dimensional


def tables_wanted(
    model: str, tables: Mapping[str, int | Mapping[str, int | str]] | None
) -> tuple[tuple[str, int, int | None], ...] | None:
    """Name, dim and ttl in seconds of each, None where nothing is said of it."""
    if tables is None:
        return None
    if DENSE_TABLE in tables:
        raise ModelError(f"table name {DENSE_TABLE!r} of model {model!r} is reserved for dense tensors: use another name")
    wanted = []
    for name, table in tables.items():
        said = table if isinstance(table, Mapping) else {"dim": table}
        if not {"dim"} <= said.keys() <= {"dim", "ttl"}:
            raise ModelError(f'table {name!r} is {table!r}: expected its dim, or {{"dim": 16, "ttl": "30d"}}')
        ttl_s = ttl_seconds(name, said["ttl"]) if "ttl" in said else None
        spec = TableSpec(name, _dim_number(name, said["dim"]))
        wanted.append((spec.name, spec.dim, ttl_s))
    return tuple(wanted)


def _dim_number(table: str, dim: object) -> int:
    if isinstance(dim, bool) or not hasattr(dim, "__index__"):
        raise ModelError(f"table {table!r} has dim {dim!r}: expected a whole number")
    return operator.index(dim)


def shards_of(model: str, shards: int | None) -> int | None:
    """The number of shards that a publisher asks for, if it does."""
    return None if shards is None else ModelSpec(model, shards).shards


def stamp_number(stamp: object) -> int:
    """A stamp as `publish` returned it; 0: nothing was published."""
    try:
        number = operator.index(stamp)  # type: ignore[arg-type]
    except TypeError:
        raise PublishError(f"stamp is {stamp!r}: expected what publish() returned") from None
    if not 0 <= number < 1 << 64:
        raise PublishError(f"stamp is {stamp!r}: expected what publish() returned")
    return number
