"""A table as its readers see it: mapped read-only, looked up without locks, in any thread."""

import threading
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ekko.errors import StoreError
from ekko.model import CODECS, TableSpec
from ekko.store import layout
from ekko.store.kernels import gather
from ekko.store.manifest import index_name, rows_name
from ekko.store.memory import Mapping, TmpfsMemory
from ekko.store.table import Index, check_table_file, open_index

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

# A row takes well below a microsecond to write. Locked for this long, its writer is dead or stopped.
ROW_DEADLINE_S = 1.0
# The index may be replaced again between a look at its generation and opening the file; a writer cannot do that often in a row.
REOPEN_ATTEMPTS_MAX = 100

NO_STAMPS: U64 = np.empty(0, np.uint64)

_ROWS_USED = layout.TABLE.offset("rows_used") // 8
_GENERATION = layout.TABLE.offset("index_generation") // 8


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where the rows of a table are mapped, how long they are, and how they are encoded."""

    table: str
    address: int
    stride: int
    codec: int

    @staticmethod
    def of(spec: TableSpec, address: int) -> "RowSource":
        """The rows of a table that is mapped at `address`."""
        return RowSource(spec.name, address, layout.row_stride(spec.row_bytes), CODECS[spec.codec].number)


def gather_rows(source: RowSource, index: Index, keys: U64, out: F32, stamps: U64) -> None:
    """Copy and decode rows by key: absent and deleted ones are zero, with stamp 0.

    Args:
        source: the rows.
        index: the index to search.
        keys: uint64[n].
        out: float32[n, dim], written.
        stamps: uint64[n], written; or empty: not wanted.

    Raises:
        StoreError: a row stayed locked for `ROW_DEADLINE_S`; its writer was killed and has not been started again.
    """
    done = gather.gather(source.address, source.stride, source.codec, index.address, index.capacity_log2, keys, out, stamps, 0)
    stuck, deadline = -1, 0.0
    while done != keys.size:
        now = time.monotonic()
        if done != stuck:
            stuck, deadline = done, now + ROW_DEADLINE_S
        elif now > deadline:
            raise StoreError(
                f"row {int(keys[done])} of table {source.table!r} has been locked for {ROW_DEADLINE_S} s: the node that writes "
                "it was killed in mid-row; start it again, and it will repair the row"
            )
        time.sleep(0)
        done = gather.gather(
            source.address, source.stride, source.codec, index.address, index.capacity_log2, keys, out, stamps, done
        )


@dataclass(frozen=True, slots=True)
class TableFiles:
    """Where a table's files are."""

    memory: TmpfsMemory
    model_id: int
    table_id: int


class TableView:
    """One table of another process's store.

    Raises:
        FileNotFoundError: the files are gone: the store was replaced.
        StoreError: they are damaged, or of another layout.
    """

    def __init__(self, spec: TableSpec, files: TableFiles) -> None:
        self.spec = spec
        self.files = files
        self._mapping = Mapping.open_to_read(files.memory.path(rows_name(files.model_id, files.table_id)))
        check_table_file(spec, self._mapping)
        self._source = RowSource.of(spec, self._mapping.address)
        # A memoryview reads a word in 40 ns; the order of memory accesses comes from the kernels.
        self._header = self._mapping.view(layout.TABLE.offset("rows"))
        self._reopening = threading.Lock()
        self._index = self._open_index()

    @property
    def rows_used(self) -> int:
        """Rows written so far, tombstones included."""
        return self._header[_ROWS_USED]

    def lookup(self, keys: U64, out: F32, stamps: U64) -> None:
        """See `gather_rows`. Safe in any thread; lets go of the interpreter lock while it copies."""
        index = self._index  # this reference keeps the mapping alive through the call
        if self._header[_GENERATION] != index.generation:
            index = self._reopen_index()
        gather_rows(self._source, index, keys, out, stamps)

    def _reopen_index(self) -> Index:
        with self._reopening:
            if self._header[_GENERATION] != self._index.generation:
                self._index = self._open_index()
            return self._index

    def _open_index(self) -> Index:
        for _ in range(REOPEN_ATTEMPTS_MAX):
            generation = self._header[_GENERATION]
            name = index_name(self.files.model_id, self.files.table_id, generation)
            try:
                mapping = Mapping.open_to_read(self.files.memory.path(name))
            except FileNotFoundError:
                if generation != self._header[_GENERATION]:
                    continue  # the writer has replaced it meanwhile
                raise
            return open_index(mapping, generation)
        raise StoreError(f"the index of table {self.spec.name!r} is replaced faster than it can be opened")
