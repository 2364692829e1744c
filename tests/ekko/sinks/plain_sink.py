"""The simplest sink that does everything right, and ways to do it wrong: each is one bug that the suite must notice."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np

from ekko.errors import SinkTakenError
from ekko.serve.sink import Batch, Removed, Sink
from ekko.serve.sink_conformance import Subject
from ekko.serve.sink_conformance.subject import F32, U64


class Bug(Enum):
    """What a sink does wrong."""

    TAKES_OLDER_ROWS = auto()
    TAKES_OLDER_DELETIONS = auto()
    COMPARES_UPPER_HALVES = auto()  # of stamps
    FORGETS_DELETIONS = auto()
    KEEPS_WHAT_IS_FORGOTTEN = auto()
    FORGETS_NEWER_ROWS = auto()
    REMEMBERS_WHAT_IT_FORGOT = auto()
    FORGETS_LAST = auto()  # what is forgotten and there again in one batch
    MIXES_TABLES = auto()
    LOSES_LARGE_KEYS = auto()
    KEEPS_DROPPED_TABLES = auto()
    HELD_TELLS_OF_DELETED = auto()
    HELD_TELLS_OLD_STAMPS = auto()
    HELD_TELLS_OF_SOME = auto()
    HAS_A_CURSOR_BEFORE = auto()
    CUTS_CURSORS = auto()
    LOSES_CURSORS = auto()  # with the process
    LETS_OLDER_FEEDS_WRITE = auto()
    LETS_OLDER_FEEDS_COMMIT = auto()
    LETS_OLDER_FEEDS_DROP = auto()
    APPLIES_LATER = auto()  # rows wait in the sink
    REFUSES_DELETIONS_OF_UNKNOWN_KEYS = auto()


@dataclass
class PlainStore:
    """What outlives its sinks: of each table key -> (stamp, row), of which the row is None once it was deleted."""

    tables: dict[str, dict[int, tuple[int, F32 | None]]] = field(default_factory=dict)
    cursor: bytes | None = None
    lives: int = 0


class PlainSink(Sink):
    def __init__(self, store: PlainStore, bug: Bug | None = None) -> None:
        self._store = store
        self._bug = bug
        self._life = 0
        self._cursor: bytes | None = None
        self._waiting: list[Batch] = []

    def open(self, model: str) -> bytes | None:
        self._store.lives += 1
        self._life = self._store.lives
        if self._bug is Bug.HAS_A_CURSOR_BEFORE and self._store.cursor is None:
            return b""
        return self._cursor if self._bug is Bug.LOSES_CURSORS else self._store.cursor

    def add_table(self, table: str, dim: int) -> None:
        self._store.tables.setdefault(table, {})

    def drop_table(self, table: str) -> None:
        self._check_life(Bug.LETS_OLDER_FEEDS_DROP)
        if self._bug is not Bug.KEEPS_DROPPED_TABLES:
            self._store.tables.pop(table, None)

    def _check_life(self, let_through: Bug) -> None:
        if self._life != self._store.lives and self._bug is not let_through:
            raise SinkTakenError("another feed writes")

    def apply(self, batch: Batch) -> None:
        self._check_life(Bug.LETS_OLDER_FEEDS_WRITE)
        if self._bug is Bug.APPLIES_LATER:
            self._waiting.append(copied(batch))
            if len(self._waiting) < 3:
                return
            batch = self._waiting.pop(0)
        bug = self._bug
        table = self._store.tables["item" if bug is Bug.MIXES_TABLES else batch.table]
        if bug is not Bug.FORGETS_LAST:
            self._forget(table, batch.forgotten)
        for key, stamp in zip(batch.deleted.keys.tolist(), batch.deleted.stamps.tolist(), strict=True):
            if bug is Bug.REFUSES_DELETIONS_OF_UNKNOWN_KEYS and key not in table:
                continue
            if self._is_newer(table, key, stamp, Bug.TAKES_OLDER_DELETIONS):
                table[key] = stamp, None
                if bug is Bug.FORGETS_DELETIONS:
                    del table[key]
        for key, stamp, row in zip(batch.keys.tolist(), batch.stamps.tolist(), batch.rows, strict=True):
            if bug is Bug.LOSES_LARGE_KEYS and key >= 1 << 63:
                continue
            if self._is_newer(table, key, stamp, Bug.TAKES_OLDER_ROWS):
                table[key] = stamp, row.copy()
        if bug is Bug.FORGETS_LAST:
            self._forget(table, batch.forgotten)

    def _is_newer(self, table: dict[int, tuple[int, Any]], key: int, stamp: int, ignored: Bug) -> bool:
        held = table.get(key, (0, None))[0]
        if self._bug is Bug.COMPARES_UPPER_HALVES:
            return stamp >> 32 > held >> 32
        return stamp > held or self._bug is ignored

    def _forget(self, table: dict[int, tuple[int, Any]], forgotten: Removed) -> None:
        bug = self._bug
        for key, stamp in zip(forgotten.keys.tolist(), forgotten.stamps.tolist(), strict=True):
            if key not in table or bug is Bug.KEEPS_WHAT_IS_FORGOTTEN:
                continue
            if table[key][0] <= stamp or bug is Bug.FORGETS_NEWER_ROWS:
                del table[key]
                if bug is Bug.REMEMBERS_WHAT_IT_FORGOT:
                    table[key] = stamp, None

    def held(self, table: str) -> Iterator[tuple[U64, U64]]:
        rows = self._store.tables.get(table, {})
        deleted_too = self._bug is Bug.HELD_TELLS_OF_DELETED
        found = [(key, stamp) for key, (stamp, row) in rows.items() if row is not None or deleted_too]
        if self._bug is Bug.HELD_TELLS_OF_SOME:
            found = found[:50]
        shift = self._bug is Bug.HELD_TELLS_OLD_STAMPS
        for begin in range(0, len(found), 7):
            keys, stamps = zip(*found[begin : begin + 7], strict=True)
            yield np.array(keys, np.uint64), np.array(stamps, np.uint64) - np.uint64(shift)

    def commit(self, cursor: bytes) -> None:
        self._check_life(Bug.LETS_OLDER_FEEDS_COMMIT)
        self._cursor = self._store.cursor = cursor[:100] if self._bug is Bug.CUTS_CURSORS else cursor


def copied(batch: Batch) -> Batch:
    return Batch(batch.table, batch.keys, batch.rows.copy(), batch.stamps, batch.deleted, batch.forgotten)


class PlainSubject(Subject):
    """Its store does not reach the processes that are forked from this one, so none is."""

    def __init__(self, bug: Bug | None = None) -> None:
        self.store = PlainStore()
        self._bug = bug

    def sink(self) -> Sink:
        return PlainSink(self.store, self._bug)

    def rows(self, table: str, keys: U64) -> F32:
        found = np.zeros((keys.size, self.tables[table]), np.float32)
        for place, key in enumerate(keys.tolist()):
            row = self.store.tables.get(table, {}).get(key, (0, None))[1]
            if row is not None:
                found[place] = row
        return found
