"""Rows that were dropped for want of room, and that readers ask for: which they are, and how they come back (R11).

Readers count what they are asked for (0034). At each fold the daemon notes the keys that were counted here (`note_asked`), and
those that are absent in an incomplete shard wait to be asked of a node that has them (`p2p.pulling.fetching`). Of keys that
nobody has we cannot tell: they are asked for again only after `ASKED_AGAIN_S`.

What comes back is older than what our vector covers, as a ghost is (T6), and may be older than what was dropped of its shard
since. It is let in all the same, since its sender covers our loss floor as it was when we asked: no version of these keys that
went before then is newer. What of them goes after that is noted, and does not come back with this answer.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from p2p.placement import take
from p2p.replica import RowColumns, TableKeys

if TYPE_CHECKING:
    from ekko.store.model_store import ModelStore

U64 = NDArray[np.uint64]

# Of one table, that wait to be asked for; and of which it is remembered that they were.
WANTED_MAX = 4_096
ASKED_MAX = 65_536
ASKED_AGAIN_S = 60.0


class Fetching:
    """Keys of one model that are to be had from others."""

    def __init__(self, model: "ModelStore") -> None:
        self._model = model
        self._wanted: dict[int, U64] = {}  # by table
        self._asked: dict[tuple[int, int], float] = {}  # (table, key) -> when it may be asked for again; oldest first
        self._awaited: dict[int, dict[int, U64]] = {}  # by partition and table: an answer may bring these back

    def note_asked(self, table: int, keys: U64, now_s: float) -> None:
        """Readers ask for these keys of a table; `now_s`: monotonic."""
        model = self._model
        if not model.incomplete.any() or table not in model.tables_by_id:
            return
        absent = keys[model.table(table).resolve(keys) < 0]
        absent = absent[model.incomplete[model.shards_of(absent)]]
        new = [key for key in absent.tolist() if self._asked.get((table, key), 0.0) <= now_s]
        for key in new:
            self._asked.pop((table, key), None)
            self._asked[table, key] = now_s + ASKED_AGAIN_S
        while len(self._asked) > ASKED_MAX:
            del self._asked[next(iter(self._asked))]
        waiting = self._wanted.get(table, np.empty(0, np.uint64))
        self._wanted[table] = np.union1d(waiting, np.array(new, np.uint64))[:WANTED_MAX]

    def take_wanted(self, partition: int, keys_max: int) -> tuple[TableKeys, ...]:
        """As `Replica.take_wanted`."""
        model = self._model
        taken: list[TableKeys] = []
        self._awaited[partition] = {}
        for table, waiting in list(self._wanted.items()):
            here = model.partition_of(waiting) == partition
            chosen = waiting[here][: keys_max - sum([len(one.keys) for one in taken])]
            if not len(chosen):
                continue
            self._wanted[table] = np.setdiff1d(waiting, chosen)
            absent = chosen[model.table(table).resolve(chosen) < 0]
            if len(absent):
                taken.append(TableKeys(table, absent))
                self._awaited[partition][table] = absent
        return tuple(taken)

    def note_gone(self, table: int, keys: U64) -> None:
        """Rows of these keys are dropped now: an older version may not come back in their place."""
        for awaited in self._awaited.values():
            if table in awaited:
                awaited[table] = np.setdiff1d(awaited[table], keys)

    def let_go(self, table: int) -> None:
        """The table was dropped."""
        self._wanted.pop(table, None)
        for awaited in self._awaited.values():
            awaited.pop(table, None)

    def forget(self) -> None:
        """Rows are dropped of which we know no keys: what was asked for is not let in."""
        self._awaited.clear()

    def admit(self, partition: int, columns: Sequence[RowColumns]) -> list[RowColumns]:
        """What of an answer is let in: keys that are awaited still, as far as there is room, or some is made."""
        awaited, model = self._awaited.pop(partition, {}), self._model
        let_in, granted = [], dict[int, int]()
        for column in columns:
            mine = np.flatnonzero(np.isin(column.keys, awaited.get(column.table, ())))
            if model.eviction is not None and len(mine):
                keys = np.ascontiguousarray(column.keys[mine])
                room = model.eviction.make_room(model.table(column.table), keys, granted)
                mine = mine[:room]
            if len(mine):
                granted[column.table] = granted.get(column.table, 0) + len(mine)
                let_in.append(take(column, mine))
        return let_in


def live_rows(model: "ModelStore", table: int, keys: U64) -> RowColumns:
    """As `Replica.read_keys`."""
    held = model.tables_by_id.get(table)
    if held is None:
        return RowColumns(table, np.empty(0, np.uint64), np.empty((0, 1), np.uint8), np.empty(0, np.uint64))
    places = held.resolve(np.ascontiguousarray(keys))
    rows = model.read(table, places[places >= 0])
    assert rows.stamps is not None
    live = len(rows.rows)
    return RowColumns(table, rows.keys[:live], rows.rows, rows.stamps[:live])
