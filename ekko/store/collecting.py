"""Rows that go for good: tombstones and expired rows that are stable, and what a whole-shard answer did not bring (R5).

What may go is the protocol's to say (`p2p.collection`); here it is found, a bounded number of rows with each call, and dropped
through `ModelStore.remove`, which raises the loss floor first.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels import collect as kernels
from ekko.store.table import Table
from p2p.replica import U64, Collected, RowColumns
from p2p.stamps import AHEAD_MS_MAX, WRITERS_MAX

if TYPE_CHECKING:
    from ekko.store.model_store import ModelStore

# Rows looked at in one call: 1 or 2 ms.
LOOK_ROWS = 1 << 17


class Sweep:
    """Goes round the tables of a model, for one of its partitions."""

    def __init__(self, model: "ModelStore", partition: int) -> None:
        self._model = model
        self._partition = partition
        self._table = 0  # its place in the order of tables
        self._slot = 0

    def collect(self, until: U64, unix_ms: int, rows_max: int) -> Collected:
        """As `Replica.collect`."""
        model, looks, rows = self._model, LOOK_ROWS, 0
        until = np.ascontiguousarray(until, np.uint64)
        tables = model.tables
        while self._table < len(tables) and rows < rows_max:
            table = tables[self._table]
            # By the clock of another node a row may live for so much longer.
            expired = table.spec.stamp_min(unix_ms - AHEAD_MS_MAX)
            end = min(table.rows_used, self._slot + looks) if table.tombstones or expired else self._slot
            out = np.empty(min(rows_max - rows, max(end - self._slot, 0)), np.int64)
            count, reached = 0, end
            if out.size:
                count, reached = kernels.collectable(
                    table.mapping.address,
                    table.stride,
                    model.shards,
                    self._partition,
                    model.spec.partitions,
                    until,
                    expired,
                    self._slot,
                    end,
                    out,
                )
            looks -= reached - self._slot
            if count:
                model.remove(table.spec.id, out[:count].copy(), complete=True)
                rows += count
            self._slot = reached
            if reached < table.rows_used and (table.tombstones or expired):
                return Collected(rows, done=False)
            self._table, self._slot = self._table + 1, 0
        if self._table < len(tables):
            return Collected(rows, done=False)
        self._table = 0
        return Collected(rows, done=True)


class WholeShards:
    """`p2p.replica.Arrivals`: a bit for each slot whose row came, so that memory is bounded by an eighth of a byte a row.

    A slot that is freed meanwhile loses its bit: another key may get it.
    """

    def __init__(self, model: "ModelStore", partition: int) -> None:
        self._model = model
        self._partition = partition
        self._shards = np.zeros(model.shards, np.bool_)  # of the model
        self._bits: dict[int, NDArray[np.uint8]] = {}

    def begin(self, shards: NDArray[np.uint32]) -> None:
        partitions = self._model.spec.partitions
        self._shards[shards.astype(np.int64) * partitions + self._partition] = True

    def note(self, columns: Sequence[RowColumns]) -> None:
        for column in columns:
            if column.table in self._model.tables_dropped:
                continue
            table = self._model.table(column.table)
            bits = self._bits.get(column.table)
            size = table.rows_used + 7 >> 3
            if bits is None or len(bits) < size:
                grown = np.zeros(max(size, 2 * (0 if bits is None else len(bits))), np.uint8)
                if bits is not None:
                    grown[: len(bits)] = bits
                bits = self._bits[column.table] = grown
            kernels.mark(table.resolve(np.ascontiguousarray(column.keys)), bits)

    def forget(self, table: int, places: NDArray[np.int64]) -> None:
        """These rows of a table are removed, for whatever reason."""
        if (bits := self._bits.get(table)) is not None:
            kernels.unmark(places, bits)

    def drop_absent(self, writers: NDArray[np.uint16], vector: U64) -> int:
        model = self._model
        partitions = model.spec.partitions
        own = np.flatnonzero(self._shards)
        covered = np.zeros((model.shards, WRITERS_MAX), np.uint64)
        covered[np.ix_(own, writers)] = vector[own // partitions]
        chosen = {table.spec.id: slots for table in model.tables if (slots := self._absent_in(table, covered)).size}
        if not chosen:
            return 0
        if model.listener is not None:
            model.listener.on_rows_gone(int(covered.max()))
        # A step that only deleted shows in nothing but this, and may have touched other partitions, too.
        model.marks.expect(covered.max(axis=0))
        with model.marks.removing():
            for table, slots in chosen.items():
                model.remove(table, slots, complete=True)
        return sum(slots.size for slots in chosen.values())

    def _absent_in(self, table: Table, covered: U64) -> NDArray[np.int64]:
        """Slots of the rows that uint64[shards, WRITERS_MAX] covers and that did not come."""
        out = np.empty(table.rows_used, np.int64)
        bits = self._bits.get(table.spec.id, np.zeros(0, np.uint8))
        count = kernels.unmarked(
            table.mapping.address, table.stride, self._model.shards, covered.reshape(-1), bits, 0, table.rows_used, out
        )
        return out[:count].copy()
