"""A past that remembers every version of a small model, in plain Python: what a rollback is compared with."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ekko.generations import Generation
from ekko.rollback.diff import stamp_until
from ekko.rollback.past import ChangedKeys, Under, Versions
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns
from p2p.stamps import WRITER_MASK

U64 = NDArray[np.uint64]
PIECE = 7  # keys


class Remembered:
    """Every version that was written, and which moments are marks (`ekko.rollback.past.Past`)."""

    def __init__(self, model: ModelStore) -> None:
        self.model = model
        self.versions: dict[tuple[int, int], list[tuple[int, bytes]]] = {}  # (table, key) -> (stamp, row); no row: a tombstone
        self.marks: list[int] = []
        self.first_ms = 0

    def write(self, table: str, keys: list[int], value: float | None, stamp: int) -> None:
        """A step, in the model and in memory; no value: a deletion."""
        spec = self.model.spec.tables[table]
        live = len(keys) if value is not None else 0
        rows = np.full((live, spec.dim), value or 0, np.float32).view(np.uint8)
        self.model.apply([RowColumns(spec.id, np.array(keys, np.uint64), rows)], stamp)
        for key in keys:
            held = rows[0].tobytes() if live else b""
            self.versions.setdefault((spec.id, key), []).append((stamp, held))

    def newest(self, table: int, key: int, cut_ms: int) -> tuple[int, bytes]:
        """The version at a cut."""
        until = stamp_until(cut_ms)
        return max((one for one in self.versions.get((table, key), []) if one[0] <= until), default=(0, b""))

    def range(self, model: Generation) -> tuple[int, int] | None:
        return (self.first_ms, self.marks[-1]) if self.marks else None

    def mark(self, model: Generation, until_ms: int) -> int | None:
        return max((mark for mark in self.marks if self.first_ms <= mark <= until_ms), default=None)

    def changed_since(self, model: Generation, cut_ms: int) -> Iterator[ChangedKeys | None]:
        until = stamp_until(cut_ms)
        for table in self.model.tables:
            keys = sorted(
                key
                for (one, key), versions in self.versions.items()
                if one == table.spec.id and any(stamp > until for stamp, _ in versions)
            )
            for begin in range(0, len(keys), PIECE):
                yield ChangedKeys(table.spec.id, np.array(keys[begin : begin + PIECE], np.uint64))
                yield None

    def at(self, model: Generation, cut_ms: int, table: int, keys: U64) -> Versions:
        return self._versions(table, [self.newest(table, key, cut_ms) for key in keys.tolist()])

    def _versions(self, table: int, found: list[tuple[int, bytes]]) -> Versions:
        width = self.model.tables_by_id[table].spec.row_bytes
        rows = np.zeros((len(found), width), np.uint8)
        for index, (_, row) in enumerate(found):
            if row:
                rows[index] = np.frombuffer(row, np.uint8)
        live = np.array([bool(row) for _, row in found])
        return Versions(live, np.array([stamp for stamp, _ in found], np.uint64), rows)

    def under(self, model: Generation, cut_ms: int, table: int, keys: U64, writers: tuple[int, ...]) -> Under:
        until, held, newest = stamp_until(cut_ms), [], []
        for key in keys.tolist():
            versions = self.versions.get((table, key), [])
            counting = [one for one in versions if one[0] <= until or one[0] & WRITER_MASK not in writers]
            held.append(max((stamp for stamp, _ in versions), default=0))
            newest.append(max(counting, default=(0, b"")))
        stamps = np.array([stamp for stamp, _ in newest], np.uint64)
        found = self._versions(table, newest)
        return Under(found, np.array(held, np.uint64), stamps > np.uint64(until), np.zeros(len(keys), np.bool_))

    def at_risk(self, model: Generation, cut_ms: int, wanted_ms: int) -> Iterator[tuple[int, U64, U64]]:
        first, last = stamp_until(cut_ms), stamp_until(wanted_ms)
        for (table, key), versions in sorted(self.versions.items()):
            between = [stamp for stamp, _ in versions if first < stamp <= last]
            if between:
                yield table, np.array([key], np.uint64), np.array([max(between)], np.uint64)
