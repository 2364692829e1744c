"""Files that hold a model: safetensors, `.npy`, a torch state dict; read through the page cache, never as a whole.

A safetensors file is 8 bytes of length, so much JSON {name: {dtype, shape, data_offsets}}, and the data. It is read and written
here, since a model of 100 GB must be read in slices and written as a stream; the tests compare with the library of that name.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ModelError
from ekko.model import DENSE_DIM, DENSE_TABLE, TableSpec, TensorSpec, check_name

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
    integer: bool
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
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be understood: {error}") from None
    raise ModelError(f"{path} is of no kind that is known: expected .safetensors, .npy, .pt or .pth")


def _of_array(name: str, array: NDArray[Any], *, bfloat16: bool = False) -> FileTensor:
    def part(begin: int, end: int) -> NDArray[Any]:
        piece = array if array.ndim == 0 else array[begin:end]
        return (piece.astype(np.uint32) << 16).view(np.float32) if bfloat16 else np.asarray(piece)

    return FileTensor(name, array.shape, array.dtype.kind in "iu" and not bfloat16, part)


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
        if not 0 <= begin <= end <= size or end - begin != int(np.prod(shape)) * dtype.itemsize:
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
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 - junk can fail in any way; nothing of it was run
        raise ModelError(f"{path} is no state dict: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(state, dict):
        raise ModelError(f"{path} has a {type(state).__name__}, expected a state dict")
    return {name: _of_torch(name, value) for name, value in state.items() if isinstance(value, torch.Tensor)}


def _of_torch(name: str, tensor: Any) -> FileTensor:
    def part(begin: int, end: int) -> NDArray[Any]:
        piece = tensor if tensor.ndim == 0 else tensor[begin:end]
        piece = piece.detach()
        return np.asarray(piece.float().numpy() if piece.is_floating_point() else piece.numpy())

    return FileTensor(name, tuple(tensor.shape), not tensor.is_floating_point(), part)


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


def plan_load(tensors: Mapping[str, FileTensor], known: Mapping[str, int], chosen: Mapping[str, str]) -> LoadPlan:
    """Say what goes where.

    A tensor is a table's rows if `chosen` says so, if it has the table's name, or if the file has NAME.keys beside it; a file
    with one tensor of two dimensions is a table. All others are dense.

    Args:
        tensors: of the file.
        known: the model's tables, with their dims.
        chosen: tensor -> table.

    Raises:
        ModelError: it does not fit.
    """
    if missing := sorted(set(chosen) - set(tensors)):
        raise ModelError(f"the file has no tensor {missing[0]!r}: it has {', '.join(map(repr, sorted(tensors)[:20]))}")
    tables: dict[str, tuple[FileTensor, FileTensor | None]] = {}
    dense: dict[str, FileTensor] = {}
    for name, tensor in tensors.items():
        if any(name.endswith(suffix) and name.removesuffix(suffix) in tensors for suffix in (KEYS_SUFFIX, STAMPS_SUFFIX)):
            continue
        keys = tensors.get(name + KEYS_SUFFIX)
        if name not in chosen and name not in known and keys is None and not (len(tensors) == 1 and len(tensor.shape) == 2):
            dense[name] = tensor
            continue
        table = chosen.get(name, name)
        check_name("table", table)
        if len(tensor.shape) != 2 or table in tables:
            shape = list(tensor.shape)
            raise ModelError(f"tensor {name!r} has shape {shape}: the rows of table {table!r} are one tensor [rows, dim]")
        if known.get(table, tensor.shape[1]) != tensor.shape[1]:
            raise ModelError(
                f"tensor {name!r} has rows of {tensor.shape[1]} values, and table {table!r} has dim {known[table]}"
            )
        if keys is not None and (keys.shape != tensor.shape[:1] or not keys.integer):
            raise ModelError(f"tensor {keys.name!r} has shape {list(keys.shape)}: expected an integer for each row of {name!r}")
        tables[table] = tensor, keys
    return LoadPlan(tables, dense)


def slices(plan: LoadPlan) -> Iterator[tuple[str, NDArray[np.uint64], NDArray[np.float32]]]:
    """(table, keys uint64[n], rows float32[n, dim]) of about `SLICE_BYTES`, in the order of the file; `_dense` last.

    Raises:
        ModelError: a value is not finite, or a key is negative.
    """
    for table, (rows, keys) in plan.tables.items():
        step = max(1, SLICE_BYTES // (4 * rows.shape[1]))
        for begin in range(0, rows.shape[0], step):
            end = min(begin + step, rows.shape[0])
            numbers = np.arange(begin, end) if keys is None else keys.part(begin, end)
            if numbers.dtype.kind == "i" and numbers.size and numbers.min() < 0:
                raise ModelError(f"key {int(numbers.min())} of table {table!r} is negative")
            yield table, numbers.astype(np.uint64), _finite(table, rows.part(begin, end))
    for name, tensor in plan.dense.items():
        spec = TensorSpec(name, tensor.shape, "float32")
        whole = np.zeros((spec.rows, DENSE_DIM), np.float32)
        values = _finite(name, tensor.part(0, tensor.shape[0] if tensor.shape else 1)).reshape(-1)
        whole.reshape(-1)[: values.size] = values
        step = SLICE_BYTES // (4 * DENSE_DIM)
        for begin in range(0, spec.rows, step):
            yield DENSE_TABLE, spec.keys[begin : begin + step], whole[begin : begin + step]


def _finite(name: str, values: NDArray[Any]) -> NDArray[np.float32]:
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
