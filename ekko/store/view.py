"""A table as its readers see it: mapped read-only, looked up without locks, in any thread."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ekko.errors import StoreError
from ekko.model import CODECS, TableSpec
from ekko.store import layout
from ekko.store.counting import Count, KeyCounter, count_nothing
from ekko.store.kernels import changes, gather, pool
from ekko.store.kernels.average import add_rows
from ekko.store.kernels.quantise import FLOAT32
from ekko.store.manifest import hot_name, index_name, rows_name
from ekko.store.memory import Mapping, TmpfsMemory
from ekko.store.newest_index import NewestIndex
from ekko.store.patience import Patience
from ekko.store.table import Index, check_table_file

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

NO_STAMPS: U64 = np.empty(0, np.uint64)
NO_WEIGHTS: F32 = np.empty(0, np.float32)
ZEROS = 0  # the address that stands for a row of zeros

_ROWS_USED = layout.TABLE.offset("rows_used") // 8


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


@dataclass(frozen=True, slots=True)
class Bags:
    """Which rows are pooled, and how.

    ends: int64[bags + 1], from 0 up to the number of keys: bag b has the keys from ends[b] to before ends[b + 1].
    mode: of `ekko.store.kernels.pool`.
    weights: float32[n] for a weighted sum, else empty.
    padding: this key is left out of every bag; None: no key is.
    """

    ends: NDArray[np.int64]
    mode: int
    weights: F32
    padding: int | None


def gather_rows(source: RowSource, index: Index, keys: U64, out: F32, stamps: U64) -> None:
    """Copy and decode rows by key: absent and deleted ones are zero, with stamp 0.

    Args:
        source: the rows.
        index: the index to search.
        keys: uint64[n].
        out: float32[n, dim], written.
        stamps: uint64[n], written; or empty: not wanted.

    Raises:
        StoreError: a row stayed locked (`ekko.store.patience`); its writer was killed and has not been started again.
    """

    def copy(begin: int) -> Any:
        return gather.gather(
            source.address, source.stride, source.codec, index.address, index.capacity_log2, 0, ZEROS, keys, out, stamps, begin
        )

    _until_done(source.table, keys, copy, copy(0))


def _until_done(table: str, keys: U64, read: Callable[[int], Any], done: int) -> None:
    """Call `read(done)`, which returns how many keys are done, until all are; in between the processor is given away.

    Raises:
        StoreError: it did not get past one key.
    """
    patience = Patience()
    while done != keys.size:
        if patience.is_over(done):
            raise StoreError(
                f"row {int(keys[done])} of table {table!r} stays locked: the node that writes it was killed in mid-row; "
                "start it again, and it will repair the row"
            )
        time.sleep(0)
        done = read(done)


@dataclass(frozen=True, slots=True)
class TableFiles:
    """Where a table's files are."""

    memory: TmpfsMemory
    model_id: int
    table_id: int


class TableView:
    """One table of another process's store.

    Args:
        spec: the table.
        files: where it is.
        counted: count what is looked up (`ekko.store.counting`), if this process may.

    Raises:
        FileNotFoundError: the files are gone: the store was replaced.
        StoreError: they are damaged, or of another layout.
    """

    def __init__(self, spec: TableSpec, files: TableFiles, *, counted: bool = True) -> None:
        self.spec = spec
        self.files = files
        self._mapping = Mapping.open_to_read(files.memory.path(rows_name(files.model_id, files.table_id)))
        check_table_file(spec, self._mapping)
        self._source = RowSource.of(spec, self._mapping.address)
        self._rows = (self._source.address, self._source.stride, self._source.codec)  # as the kernels take them
        self._expires = bool(spec.ttl_s)
        self._header = self._mapping.view(layout.TABLE.offset("rows"))
        self.newest_index = NewestIndex(
            self._mapping, lambda generation: files.memory.path(index_name(files.model_id, files.table_id, generation))
        )
        hot = files.memory.path(hot_name(files.model_id, files.table_id))
        self.counter = KeyCounter(hot, spec.id, self._mapping.address, self._source.stride)
        self._count: Count = self.counter.count if counted and self.counter.on else count_nothing

    @property
    def rows_used(self) -> int:
        """Rows written so far, tombstones included."""
        return self._header[_ROWS_USED]

    def lookup(self, keys: U64, out: F32, stamps: U64, default: int = ZEROS) -> None:
        """Copy and decode rows by key. Safe in any thread; lets go of the interpreter lock while it copies.

        Args:
            keys: uint64[n].
            out: float32[n, dim], written.
            stamps: uint64[n], written, 0 for absent keys; or empty: not wanted.
            default: address of the float32[dim] that absent keys get, or `ZEROS`.

        Raises:
            StoreError: a row stayed locked (`ekko.store.patience`); its writer was killed and has not been started again.
        """
        stamp_min = self._stamp_min() if self._expires else 0
        index = self.newest_index()  # this reference keeps the mapping alive through the call
        done = gather.gather(*self._rows, index.address, index.capacity_log2, stamp_min, default, keys, out, stamps, 0)
        if done != keys.size:
            self._finish_lookup(keys, out, stamps, stamp_min, default, done)
        self._count(keys, index, None)

    def _finish_lookup(self, keys: U64, out: F32, stamps: U64, stamp_min: int, default: int, done: int) -> None:
        """The rest of a look-up that met a row being written, or an index that was replaced."""

        def copy(begin: int) -> Any:
            index = self.newest_index()
            return gather.gather(*self._rows, index.address, index.capacity_log2, stamp_min, default, keys, out, stamps, begin)

        _until_done(self.spec.name, keys, copy, done)

    def read(self, keys: U64, out: F32, stamps: U64, default: F32 | None, wait_s: float) -> int:
        """`lookup` that waits no longer than `wait_s` for rows that stay locked, and counts nothing.

        Args:
            keys: uint64[n].
            out: float32[n, dim], written.
            stamps: uint64[n], written, 0 for absent keys.
            default: float32[dim], what absent keys get; None: zeros.
            wait_s: seconds.

        Returns:
            How many keys were given the default since their row stayed locked.
        """
        stamp_min, late, done, deadline = self._stamp_min(), 0, 0, 0.0
        address = ZEROS if default is None else default.__array_interface__["data"][0]
        while True:
            index = self.newest_index()
            place = *self._rows, index.address, index.capacity_log2, stamp_min, address
            done = int(gather.gather(*place, keys, out, stamps, done))
            if done == keys.size:
                return late
            now = time.monotonic()
            deadline = deadline or now + wait_s
            if now > deadline:
                out[done] = 0 if default is None else default
                stamps[done] = 0
                late, done = late + 1, done + 1
            else:
                time.sleep(0)

    def count(self, keys: U64, padding: int | None = None) -> None:
        """Count a look-up of uint64[n] keys that was answered elsewhere, if this process may."""
        self._count(keys, self.newest_index(), padding)

    def encoded(self, keys: U64) -> tuple[NDArray[np.uint8], U64]:
        """Rows as they are stored, and not decoded: uint8[n, row_bytes] and uint64[n], 0 for keys that are absent or deleted.

        Rows that have expired are not left out. Raises as `lookup`.
        """
        # What float32 decodes to are its bits: so any row is a row of words. It lies in whole words, as rows are padded.
        words = np.empty((keys.size, -(-self.spec.row_bytes // 4)), np.float32)
        stamps = np.empty(keys.size, np.uint64)
        source = self._source

        def copy(begin: int) -> Any:
            index = self.newest_index()
            place = source.address, source.stride, FLOAT32, index.address, index.capacity_log2
            return gather.gather(*place, 0, ZEROS, keys, words, stamps, begin)

        _until_done(self.spec.name, keys, copy, copy(0))
        return np.ascontiguousarray(words.view(np.uint8)[:, : self.spec.row_bytes]), stamps

    def without_row(self, keys: U64) -> tuple[NDArray[np.uint8], U64]:
        """What has become of keys that a look-up found no row of.

        Returns:
            uint8[n]: `ABSENT`, `DELETED`, or `LIVE` of a row that has expired or has come meanwhile; and (see
            `ekko.store.kernels.changes`) uint64[n], the stamps of what is there, 0 of nothing. Raises as `lookup`.
        """
        kinds, stamps = np.empty(keys.size, np.uint8), np.empty(keys.size, np.uint64)
        source = self._source

        def look(begin: int) -> Any:
            index = self.newest_index()
            place = source.address, source.stride, index.address, index.capacity_log2
            return changes.removed(*place, keys, kinds, stamps, begin)

        _until_done(self.spec.name, keys, look, look(0))
        return kinds, stamps

    def keys_above(self, slot: int, base: U64, shards: int, whole: NDArray[np.bool_], keys: U64) -> tuple[int, int, int]:
        """Keys of the rows, tombstones too, from a slot on that a vector does not cover.

        Args:
            slot: the first one to look at.
            base: uint64[shards * WRITERS_MAX], flattened from [shards, WRITERS_MAX]; empty: all rows are above it.
            shards: of the model.
            whole: bool[shards], those of which all rows are above it.
            keys: uint64[n], written; the call ends when it is full.

        Returns:
            How many keys, the first slot that was not looked at, how many slots there are.
        """
        done = np.zeros(2, np.int64)
        count = changes.keys_above(self._source.address, self._source.stride, shards, slot, base, whole, keys, done)
        return int(count), int(done[0]), int(done[1])

    def pool(self, keys: U64, bags: Bags, out: F32, default: int = ZEROS, *, counted: bool = True) -> None:
        """Make the rows of each bag one, into out, float32[bags, dim]. Else as `lookup`; `counted`: here, and not elsewhere."""
        stamp_min = self._stamp_min()

        def pooled(begin: int) -> Any:
            index = self.newest_index()
            return pool.pool(
                *self._rows,
                index.address,
                index.capacity_log2,
                stamp_min,
                default,
                bags.mode,
                keys,
                bags.ends,
                bags.weights,
                bags.padding is not None,
                bags.padding or 0,
                out,
                begin,
            )

        _until_done(self.spec.name, keys, pooled, pooled(0))
        if counted:
            self._count(keys, self.newest_index(), bags.padding)

    def mean_row(self, rows_max: int) -> F32:
        """float32[dim]: the mean of the live rows, or of `rows_max` slots that lie evenly among all; zeros where none is live.

        A row that the writer is at is left out.
        """
        used = self.rows_used
        slots = np.arange(used) if used <= rows_max else np.linspace(0, used - 1, rows_max).astype(np.int64)
        sums = np.zeros(self.spec.dim)
        source = self._source
        count = add_rows(source.address, source.stride, source.codec, self._stamp_min(), slots, sums)
        row: F32 = (sums / max(1, count)).astype(np.float32)
        return row

    def _stamp_min(self) -> int:
        """Rows with a smaller stamp have expired."""
        return self.spec.stamp_min(int(time.time() * 1000)) if self._expires else 0
