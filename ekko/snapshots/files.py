"""Files that hold a model: safetensors, `.npy`, a torch state dict; read through the page cache, never as a whole.

A safetensors file is 8 bytes of length, so much JSON {name: {dtype, shape, data_offsets}}, and the data. It is read and written
here, since a model of 100 GB must be read in slices and written as a stream; the tests compare with the library of that name.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ModelError
from ekko.model import DENSE_DIM, DENSE_ROWS_MAX, DENSE_TABLE, TableSpec, TensorSpec, check_name

HEADER_BYTES_MAX = 100 << 20  # as the library has it
SLICE_BYTES = 1 << 20  # applied in about a millisecond, so that a node's event loop is not held up
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4"}
_DTYPES |= {"I16": "<i2", "U16": "<u2", "I8": "i1", "U8": "u1", "BOOL": "?"}
KEYS_SUFFIX = ".keys"
STAMPS_SUFFIX = ".stamps"  # of an export; a load gives rows new ones


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor of a file; `part(begin, end)` reads rows of its first dimension."""

    name: str
    shape: tuple[int, ...]
    kind: str  # as NumPy has it: "f" floating point, "i" and "u" whole numbers, "b" booleans
    part: Callable[[int, int], NDArray[Any]]


def read_tensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file, by name; a `.npy` file has one, named as the file.

    Raises:
        ModelError: the file cannot be read, or is none of these kinds.
    """
    try:
        match path.suffix:
            case ".safetensors":
                return _safetensors(path)
            case ".npy":
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                return {path.stem: _of_array(path.stem, array)}
            case ".pt" | ".pth" | ".bin":
                return _torch(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError) as error:
        raise ModelError(f"{path} cannot be understood: {error}") from None
    raise ModelError(f"{path} is of no kind that is known: expected .safetensors, .npy, .pt or .pth")


def _of_array(name: str, array: NDArray[Any], *, bfloat16: bool = False) -> FileTensor:
    def part(begin: int, end: int) -> NDArray[Any]:
        piece = array if array.ndim == 0 else array[begin:end]
        return (piece.astype(np.uint32) << 16).view(np.float32) if bfloat16 else np.asarray(piece)

    return FileTensor(name, array.shape, "f" if bfloat16 else array.dtype.kind, part)


def _safetensors(path: Path) -> dict[str, FileTensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES_MAX:
            raise ValueError(f"its header says that it is {length} bytes long")
        header = json.loads(file.read(length))
    size = path.stat().st_size - 8 - length
    tensors = {}
    for name, one in header.items():
        if name == "__metadata__":
            continue
        begin, end = one["data_offsets"]
        shape, dtype = tuple(int(n) for n in one["shape"]), np.dtype(_DTYPES[one["dtype"]])
        if not 0 <= begin <= end <= size or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} lies outside the file")
        empty = end == begin
        array = np.zeros(shape, dtype) if empty else np.memmap(path, dtype, "r", 8 + length + begin, shape)
        tensors[name] = _of_array(name, array, bfloat16=one["dtype"] == "BF16")
    return tensors


def _torch(path: Path) -> dict[str, FileTensor]:
    try:
        import torch
    except ImportError:
        raise ModelError(f"{path} needs torch: pip install 'ekko-dissemination[torch]'") from None
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - junk can fail in any way; nothing of it was run
        raise ModelError(f"{path} is no state dict: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(state, dict):
        raise ModelError(f"{path} has a {type(state).__name__}, expected a state dict")
    tensors = {str(name): _of_torch(str(name), value) for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        inside = ", ".join(repr(str(name)) for name in list(state)[:10]) or "nothing"
        raise ModelError(f"{path} has no tensors: it has {inside}; save the state dict itself")
    return tensors


def _of_torch(name: str, tensor: Any) -> FileTensor:
    def part(begin: int, end: int) -> NDArray[Any]:
        piece = tensor if tensor.ndim == 0 else tensor[begin:end]
        piece = piece.detach()
        return np.asarray(piece.float().numpy() if piece.is_floating_point() else piece.numpy())

    kind = "f" if tensor.is_floating_point() else "c" if tensor.is_complex() else "i"
    return FileTensor(name, tuple(tensor.shape), kind, part)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What of a file goes where."""

    tables: Mapping[str, tuple[FileTensor, FileTensor | None]]  # table -> rows, and their keys; None: the row numbers
    dense: Mapping[str, FileTensor]

    @property
    def rows(self) -> int:
        """Rows of tables and of dense tensors."""
        dense = sum(TensorSpec(name, one.shape, "float32").rows for name, one in self.dense.items())
        return sum(rows.shape[0] for rows, _ in self.tables.values()) + dense

    def table_specs(self, codec: str) -> dict[str, TableSpec]:
        """The tables that are needed."""
        return {name: TableSpec(name, rows.shape[1], codec) for name, (rows, _) in self.tables.items()}


def read_keys(tensors: Mapping[str, FileTensor], where: str) -> FileTensor:
    """The keys of a table's rows: a tensor of the file by its name, or the only one of another file.

    Raises:
        ModelError: there are none.
    """
    if where in tensors:
        return tensors[where]
    if not Path(where).is_file():
        raise ModelError(f"keys {where!r} are neither a tensor of the file nor a file of this machine")
    others = read_tensors(Path(where))
    if len(others) != 1:
        raise ModelError(f"{where} has {len(others)} tensors: a file of keys has one")
    return next(iter(others.values()))


def plan_load(
    tensors: Mapping[str, FileTensor],
    known: Mapping[str, int],
    chosen: Mapping[str, str],
    keys: Mapping[str, FileTensor] | None = None,
) -> LoadPlan:
    """Say what goes where.

    A tensor is a table's rows if `chosen` says so, if it has the table's name, or if the file has NAME.keys beside it; a file
    with one tensor of two dimensions is a table. All others are dense.

    Args:
        tensors: of the file.
        known: the model's tables, with their dims.
        chosen: tensor -> table.
        keys: table -> the keys of its rows; "": of the only table.

    Raises:
        ModelError: it does not fit.
    """
    if missing := sorted(set(chosen) - set(tensors)):
        raise ModelError(f"the file has no tensor {missing[0]!r}: it has {', '.join(map(repr, sorted(tensors)[:20]))}")
    given = dict(keys or {})
    apart = {tensor.name for tensor in given.values() if tensors.get(tensor.name) is tensor}
    tables: dict[str, tuple[FileTensor, FileTensor | None]] = {}
    dense: dict[str, FileTensor] = {}
    rest = [tensor for name, tensor in tensors.items() if name not in apart and not _is_beside(name, tensors)]
    for tensor in rest:
        name = tensor.name
        beside = tensors.get(name + KEYS_SUFFIX)
        alone = len(rest) == 1 and len(tensor.shape) == 2
        if name not in chosen and name not in known and name not in given and beside is None and not alone:
            dense[name] = _checked_dense(tensor)
            continue
        table = chosen.get(name, name)
        _check_rows(tensor, table, known)
        if table in tables:
            raise ModelError(f"tensors {tables[table][0].name!r} and {name!r} are both to be the rows of table {table!r}")
        tables[table] = tensor, given.pop(table, beside)
    if "" in given and len(tables) == 1:
        table = next(iter(tables))
        tables[table] = tables[table][0], given.pop("")
    if given:
        have = ", ".join(map(repr, tables)) or "none"
        which = f"no table {next(iter(given))!r}" if "" not in given else "several tables, or none"
        raise ModelError(
            f"there are keys, and {which}: the tables of the file are {have}; say TABLE=KEYS, and --table for tables"
        )
    for rows, its in tables.values():
        if its is not None and (its.shape != rows.shape[:1] or its.kind not in "iu"):
            raise ModelError(
                f"tensor {its.name!r} has shape {list(its.shape)}: expected an integer for each of the {rows.shape[0]} rows of "
                f"{rows.name!r}"
            )
    return LoadPlan(tables, dense)


def _is_beside(name: str, tensors: Mapping[str, FileTensor]) -> bool:
    """Whether a tensor is keys or stamps of another one."""
    return any(name.endswith(suffix) and name.removesuffix(suffix) in tensors for suffix in (KEYS_SUFFIX, STAMPS_SUFFIX))


def _check_rows(tensor: FileTensor, table: str, known: Mapping[str, int]) -> None:
    check_name("table", table)
    if len(tensor.shape) != 2:
        shape = list(tensor.shape)
        raise ModelError(f"tensor {tensor.name!r} has shape {shape}: the rows of table {table!r} are one tensor [rows, dim]")
    _check_kind(tensor)
    if known.get(table, tensor.shape[1]) != tensor.shape[1]:
        raise ModelError(
            f"tensor {tensor.name!r} has rows of {tensor.shape[1]} values, and table {table!r} has dim {known[table]}"
        )


def _checked_dense(tensor: FileTensor) -> FileTensor:
    check_name("tensor", tensor.name)
    _check_kind(tensor)
    if TensorSpec(tensor.name, tensor.shape, "float32").rows > DENSE_ROWS_MAX:
        raise ModelError(
            f"tensor {tensor.name!r} has shape {list(tensor.shape)}, and a dense tensor at most {DENSE_ROWS_MAX * DENSE_DIM} "
            f"values: is it a table? --table {tensor.name}=TABLE"
        )
    return tensor


def _check_kind(tensor: FileTensor) -> None:
    if tensor.kind not in "fiub":
        raise ModelError(f"tensor {tensor.name!r} has values of kind {tensor.kind!r}: expected real numbers")


def slices(plan: LoadPlan) -> Iterator[tuple[str, NDArray[np.uint64], NDArray[np.float32]]]:
    """(table, keys uint64[n], rows float32[n, dim]) of about `SLICE_BYTES`, in the order of the file; `_dense` last.

    Of a key that comes twice the last row counts, wherever a slice ends: within one its other rows are left out.

    Raises:
        ModelError: a value is not finite, or a key is negative.
    """
    for table, (rows, keys) in plan.tables.items():
        step = max(1, SLICE_BYTES // (4 * rows.shape[1]))
        for begin in range(0, rows.shape[0], step):
            end = min(begin + step, rows.shape[0])
            if keys is None:
                yield table, np.arange(begin, end, dtype=np.uint64), _finite(table, rows.part(begin, end))
                continue
            numbers = keys.part(begin, end)
            if numbers.dtype.kind == "i" and numbers.size and numbers.min() < 0:
                raise ModelError(f"key {int(numbers.min())} of table {table!r} is negative")
            yield table, *_last_of_each(numbers.astype(np.uint64), _finite(table, rows.part(begin, end)))
    for name, tensor in plan.dense.items():
        numbers, begin = TensorSpec(name, tensor.shape, "float32").keys, 0
        for part in _dense_rows(name, tensor):
            yield DENSE_TABLE, numbers[begin : begin + len(part)], part
            begin += len(part)


def _last_of_each(keys: NDArray[np.uint64], rows: NDArray[np.float32]) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    unique, from_end = np.unique(keys[::-1], return_index=True)
    if unique.size == keys.size:
        return keys, rows
    kept = np.sort(keys.size - 1 - from_end)
    return keys[kept], rows[kept]


def _dense_rows(name: str, tensor: FileTensor) -> Iterator[NDArray[np.float32]]:
    """A tensor as rows of `_dense`, float32[n, DENSE_DIM], about `SLICE_BYTES` at a time; the last one is filled with zeros."""
    step, end = max(1, SLICE_BYTES // (4 * max(1, math.prod(tensor.shape[1:])))), tensor.shape[0] if tensor.shape else 1
    values, left = SLICE_BYTES // 4, np.empty(0, np.float32)
    for begin in range(0, end, step):
        left = np.concatenate((left, _finite(name, tensor.part(begin, min(begin + step, end))).reshape(-1)))
        while left.size >= values:
            yield left[:values].reshape(-1, DENSE_DIM)
            left = left[values:]
    if left.size:
        yield np.pad(left, (0, -left.size % DENSE_DIM)).reshape(-1, DENSE_DIM)


def _finite(name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(array).all():
        raise ModelError(f"{name!r} has values that are no numbers, or infinite, or too large for float32")
    return array


class SafetensorsWriter:
    """Writes a safetensors file as a stream: the header first, then each tensor's bytes in that order."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name, (dtype, shape) in tensors.items():
            begin, end = end, end + int(np.prod(shape)) * np.dtype(_DTYPES[dtype]).itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._left = end
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, data: NDArray[Any]) -> None:
        """The next bytes."""
        self._left -= data.nbytes
        self._file.write(np.ascontiguousarray(data).data)

    def close(self) -> None:
        """The file is whole."""
        assert self._left == 0, "all tensors were written"
        self._file.close()
