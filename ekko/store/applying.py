"""Rows that come, from publishers here and from other nodes: are they what their tables hold, is there room, and in they go.

They merge by the larger stamp (T1, `ekko.store.kernels.rows`). Before that two kinds are left out: late versions of keys that
were deleted and forgotten (T6), and what a full model has no room for (`ekko.store.eviction`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ekko.model import DENSE_SPEC
from ekko.store import capacity
from ekko.store.kernels import collect, index, rows
from p2p.errors import RemoteProtocolError, UnknownTableError
from p2p.placement import take
from p2p.replica import U64, Applied, RowColumns

if TYPE_CHECKING:
    from ekko.store.model_store import ModelStore

I64 = NDArray[np.int64]

_NO_STAMPS: U64 = np.empty(0, np.uint64)


class Applying:
    """Into one model. `check` before `reserve`, and that before `apply`.

    Args:
        model: whose rows.
        stamp_max: live, of its newest row.
    """

    def __init__(self, model: "ModelStore", stamp_max: U64) -> None:
        self._model = model
        self._tables = model.tables_by_id
        self._stamp_max = stamp_max

    def check(self, columns: Sequence[RowColumns], shards: NDArray[np.uint32] | None) -> None:
        """As `Replica.check`."""
        model = self._model
        some = None if shards is None or len(shards) == model.shards else shards
        for column in columns:
            table = self._tables.get(column.table)
            if table is None:
                raise UnknownTableError(f"model {model.spec.name!r} has no table with id {column.table}")
            shape = column.rows.shape
            if len(shape) != 2 or column.rows.dtype != np.uint8 or (shape[0] and shape[1] != table.row_bytes):
                raise RemoteProtocolError(
                    f"rows of table {table.spec.name!r} are {column.rows.dtype}{shape}, not {table.spec.row_bytes} bytes"
                )
            if column.keys.ndim != 1 or column.keys.dtype != np.uint64 or shape[0] > column.keys.size:
                raise RemoteProtocolError(
                    f"table {table.spec.name!r}: {shape[0]} rows and keys {column.keys.dtype}{column.keys.shape}"
                )
            if column.stamps is not None and (column.stamps.dtype != np.uint64 or column.stamps.shape != column.keys.shape):
                raise RemoteProtocolError(f"table {table.spec.name!r}: stamps do not match the keys")
            if some is not None and not index.all_in_shards(whole(column.keys), model.shards, some):
                raise RemoteProtocolError(f"a row of table {table.spec.name!r} lies outside the shards that it came as")

    def reserve(self, columns: Sequence[RowColumns]) -> None:
        """As `Replica.reserve`."""
        keys: dict[int, list[U64]] = {}
        for column in columns:
            if column.keys.size:
                keys.setdefault(column.table, []).append(column.keys)
        for table, parts in keys.items():
            # Beyond its capacity rows are dropped, or others make room for them.
            limited = self._model.capacity is not None and table != DENSE_SPEC.id
            new_max = max(0, capacity.room_for(self._model, self._tables, table, {})) if limited else None
            self._tables[table].have_room(whole(parts[0]) if len(parts) == 1 else np.concatenate(parts), new_max)

    def apply(self, columns: Sequence[RowColumns], stamp: int) -> Applied:
        """As `Replica.apply`."""
        model, ghosts = self._model, 0
        if len(model.floor_writers):  # else nothing was ever dropped here, and no key is absent that should not be
            columns, ghosts = self.without_ghosts(columns, stamp)
        # A step of a publisher here was looked at as a whole, and nothing of it may be dropped.
        if model.eviction is not None and not (stamp and stamp == model.pending_stamp):
            columns = model.eviction.admit(columns, stamp)
        return self.write(columns, stamp, ghosts)

    def write(self, columns: Sequence[RowColumns], stamp: int = 0, ghosts: int = 0) -> Applied:
        """`apply` of rows of which none is to be left out."""
        model, counts = self._model, np.zeros(3, np.int64)
        columns = [column for column in columns if column.keys.size]
        if columns:
            if model.listener is not None:
                model.listener.on_rows(columns, stamp)
            model.marks.begin(columns, stamp)
            try:
                for column in columns:
                    self._apply(column, stamp, counts)
            finally:
                for changes in model.told_of_changes:
                    for column in columns:
                        changes.note(column.table, column.keys)
                model.marks.end()
        return Applied(int(counts[rows.WRITTEN]), int(counts[rows.INSERTED]), int(counts[rows.STALE]), ghosts)

    def without_ghosts(self, columns: Sequence[RowColumns], stamp: int) -> tuple[list[RowColumns], int]:
        """The rows whose key is present, or whose stamp is above the vector (T6); and how many others there are."""
        model = self._model
        left, ghosts = [], 0
        for column in columns:
            table = self._tables[column.table]
            stamps = _NO_STAMPS if column.stamps is None else whole(column.stamps)
            kept = np.empty(column.keys.size, np.int64)
            keys = whole(column.keys)
            count = collect.not_ghosts(
                table.index.address,
                table.index.capacity_log2,
                table.mapping.address,
                table.stride,
                model.vector_address,
                model.shards,
                keys,
                stamps,
                stamp,
                kept,
            )
            ghosts += column.keys.size - count
            left.append(column if count == column.keys.size else take(column, kept[:count]))
        return left, ghosts

    def _apply(self, column: RowColumns, stamp: int, counts: I64) -> None:
        newest = stamp if column.stamps is None else int(column.stamps.max())
        if newest > int(self._stamp_max):
            self._stamp_max[...] = newest
        stamps = None if column.stamps is None else whole(column.stamps)
        data = column.rows if column.rows.flags.c_contiguous else np.ascontiguousarray(column.rows)
        self._tables[column.table].apply(whole(column.keys), data, stamps, stamp, counts)


def whole(column: U64) -> U64:
    """The column as the kernels want it: contiguous and aligned; copied only when it is not."""
    if column.flags.c_contiguous and column.flags.aligned:
        return column
    return np.require(column, np.uint64, ["C", "A"])
