"""Rows as they were before a step, in shared memory, so that a step of which a crash left half can be taken back.

A step is written in the node's memory row by row. Where the node is killed in the middle, part of it is there, and nobody else
has heard of it: whoever applied the push again would count some gradients twice. So before a step is published, what its rows
were is written here, and it is taken off when the step is known to be safe. What is found here at a start is published as it
was; whoever pushed has no answer yet and pushes again.

The file lies beside the node's store and is gone when that is: after a boot, or when the node drops what it holds or the model.
Then there is nothing half done either: others have the parts of a step whole, or not at all. A record names tables by their
ids, so that rows of one that was dropped since are not put into the next one of its name.
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
from numpy.typing import NDArray

from ekko.errors import StoreError
from ekko.store.manifest import kernel_boot_id, read_manifest, undo_name

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

MAGIC: Final = 0x6F646E75_6F6B6B65  # "ekkoundo"
HEAD_BYTES: Final = 64 << 10  # magic, length of what describes the record (0: there is none), and that
GROWN_BY: Final = 1 << 20
_ALIGN: Final = 64


@dataclass(frozen=True, slots=True, eq=False)
class Before:
    """Rows of one table: uint64[n] keys, float32[n, dim] rows, bool[n] which of them there were."""

    table: str
    keys: U64
    rows: F32
    there: NDArray[np.bool_]


class Undo:
    """The record of one model; used by one thread.

    Raises:
        StoreError: there is no store in `run_dir`, or no such model in it, or no room.
    """

    def __init__(self, run_dir: Path, model: str) -> None:
        manifest = read_manifest(run_dir)
        if manifest is None or manifest.boot_id != kernel_boot_id():
            raise StoreError(f"there is no store in {run_dir}: start its node")
        entry = next((one for one in manifest.models if one.name == model), None)
        if entry is None:
            raise StoreError(f"the node at {run_dir} has no model {model!r}")
        self._ids = {table.name: table.id for table in entry.tables}
        self.path = Path(manifest.memory_dir) / f"{manifest.prefix}-{undo_name(entry.bare_spec.id)}"
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._memory: mmap.mmap | None = None
        self._grow(max(os.fstat(self._descriptor).st_size, HEAD_BYTES))

    def read(self) -> list[Before]:
        """What is on record of tables that there still are; empty: nothing."""
        head = self._words()
        if int(head[0]) != MAGIC or not 0 < int(head[1]) <= HEAD_BYTES - 16:
            return []
        parts = msgpack.unpackb(bytes(self._map[16 : 16 + int(head[1])]))
        names = {number: name for name, number in self._ids.items()}
        found, at = [], HEAD_BYTES
        for table, count, dim in parts:
            keys, at = self._array(np.dtype(np.uint64), count, at)
            there, at = self._array(np.dtype(np.bool_), count, at)
            rows, at = self._array(np.dtype(np.float32), count * dim, at)
            if table in names:
                found.append(Before(names[table], keys.copy(), rows.copy().reshape(count, dim), there.copy()))
        return found

    def write(self, parts: Sequence[Before]) -> None:
        """Put these rows on record; there is nothing else.

        Raises:
            StoreError: shared memory is full.
        """
        described = msgpack.packb([(self._ids[part.table], len(part.keys), part.rows.shape[1]) for part in parts])
        if len(described) > HEAD_BYTES - 16:
            raise StoreError(f"a step of {len(parts)} tables: what it changes cannot be put on record")
        self._grow(HEAD_BYTES + sum(_padded(9 * len(p.keys)) + _padded(p.rows.nbytes) + 2 * _ALIGN for p in parts))
        self.clear()  # a crash in the middle leaves none, and not part of another one
        at = HEAD_BYTES
        for part in parts:
            for array in (part.keys, part.there, part.rows.reshape(-1)):
                room, at = self._array(array.dtype, array.size, at)
                room[...] = array
        self._map[16 : 16 + len(described)] = described
        head = self._words()
        head[0] = MAGIC
        head[1] = len(described)  # last: a record that is not whole is none

    def clear(self) -> None:
        """Take it off."""
        self._words()[1] = 0

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._memory = None
        os.close(self._descriptor)

    @property
    def _map(self) -> mmap.mmap:
        assert self._memory is not None, "only until it is closed"
        return self._memory

    def _words(self) -> U64:
        return np.frombuffer(self._map, np.uint64, 2)

    def _array(self, dtype: "np.dtype[Any]", count: int, at: int) -> tuple[NDArray[Any], int]:
        """An array in the file, and where the next one begins."""
        return np.frombuffer(self._map, dtype, count, at), at + _padded(count * dtype.itemsize)

    def _grow(self, size: int) -> None:
        size = -(-size // GROWN_BY) * GROWN_BY
        if self._memory is not None and len(self._memory) >= size:
            return
        try:
            # So that no write to the mapping finds the memory full, which would be a signal instead of an error.
            os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}: make room in shared memory") from None
        self._memory = mmap.mmap(self._descriptor, size)


def _padded(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN
