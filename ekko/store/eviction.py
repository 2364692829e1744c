"""Rows of other nodes when a model is full: what is evicted for them, and what of them is dropped (R11).

Updates of rows that are held always land. For keys that are absent here there may be no room: then room is made, or they are
dropped, by `when_full`. Either way the stamps of what goes are merged into the loss floor first, and the floor is marked
incomplete there: such a node answers nobody who is below it, and the keys are to be had from another one.

*What may go.* Live rows that our vector covers and that are not of these very rows, in whichever section of a message; those
`QUIET_MS` older than the newest stamp here; and only what another live node, which drops nothing, said that it has
(`p2p.pulling.incomplete`): then nothing vanishes that nobody else has. Tombstones stay until they are stable (R5), dense
tensors for good.

*How they are chosen.* From a sample of `SAMPLE` slots for each row that must go, the one that was updated longest ago, or is
read least: the work depends on what comes, not on the size of the table. Slots are drawn by a hash of a counter, so a run
repeats.

*No older row comes in.* For an absent key of an incomplete shard, a version that is no newer than what was dropped there might
have been deleted since, and the tombstone be among what was dropped. It is dropped, too.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ekko.model import DENSE_SPEC
from ekko.store import capacity
from ekko.store.kernels import evict as kernels
from ekko.store.table import Table
from p2p.replica import RowColumns
from p2p.stamps import COUNTER_BITS, WRITER_BITS, WRITERS_MAX

if TYPE_CHECKING:
    from ekko.store.model_store import ModelStore

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

SAMPLE = 8
# Room is made for at least so many rows at once: the next ones cost a look at the index only.
BATCH_ROWS = 64
# Looks at slots in one step, about 5 ms.
LOOKS_MAX = 1 << 16
QUIET_MS = 10_000


class Eviction:
    """Keeps one model within its capacity. Called before rows of other nodes are applied.

    Args:
        model: whose rows; its `capacity` is set.
    """

    def __init__(self, model: "ModelStore") -> None:
        self._model = model
        self._looks = 0
        self.until = np.zeros(WRITERS_MAX, np.uint64)  # other live nodes keep rows of each writer up to here
        self._until: dict[int, U64] = {}  # the same, by partition
        self.evicted = 0
        self.refused = 0  # rows of other nodes that were dropped when they came

    @property
    def backed(self) -> bool:
        """Whether others keep anything of the model."""
        return bool(self.until.any())

    def note_backed(self, partition: int, until: U64, hold: Sequence[int]) -> None:
        """Others keep rows of a partition up to uint64[WRITERS_MAX]."""
        self._until[partition] = until
        nothing = np.zeros(WRITERS_MAX, np.uint64)
        self.until = np.min([self._until.get(one, nothing) for one in hold], axis=0)

    def admit(self, columns: Sequence[RowColumns], stamp: int) -> list[RowColumns]:
        """What of these rows is to be applied; the rest is in the loss floor. Makes room for it, as far as it may.

        Raises:
            StoreError: shared memory is full.
        """
        model = self._model
        allowed = model.capacity
        assert allowed is not None
        incomplete = bool(model.floor.incomplete.any())
        counts = {column.table: len(column.keys) for column in columns}
        if not incomplete and capacity.bytes_with(model, model.tables_by_id, counts) <= allowed.bytes:
            return list(columns)
        granted: dict[int, int] = {}  # new keys, by table: sections of one batch share the room
        present: dict[int, I64] = {}  # slots of those that are here, by table: of no section they make room for another
        dense = model.tables_by_id.get(DENSE_SPEC.id)
        for column in columns:
            if column.table == DENSE_SPEC.id:
                granted[column.table] = granted.get(column.table, 0) + capacity.absent_keys(dense, column)
            else:
                slots = model.table(column.table).resolve(np.require(column.keys, np.uint64, ["C", "A"]))
                known = present.get(column.table, slots[:0])
                present[column.table] = np.concatenate([known, slots[slots >= 0]])
        return [
            column if column.table == DENSE_SPEC.id else self._admit(column, stamp, incomplete, granted, present[column.table])
            for column in columns
        ]

    def _admit(self, column: RowColumns, stamp: int, incomplete: bool, granted: dict[int, int], present: I64) -> RowColumns:
        model = self._model
        table = model.table(column.table)
        keys = np.require(column.keys, np.uint64, ["C", "A"])
        absent = table.resolve(keys) < 0
        if not absent.any():
            return column
        stamps = np.full(keys.size, stamp, np.uint64) if column.stamps is None else column.stamps
        shards = model.shards_of(keys)
        dropped = np.zeros(keys.size, np.bool_)
        if incomplete:
            dropped = absent & (stamps <= self._dropped_up_to()[shards])
        wanted = int(np.count_nonzero(absent & ~dropped))
        room = capacity.room_for(model, model.tables_by_id, column.table, granted)
        if wanted > room and model.evicts and self.backed:
            newest = max(model.newest_row, int(stamps.max()))
            room += self._evict(table, wanted - room, present, newest)
        if wanted > room:
            # The newest stay.
            coming = np.flatnonzero(absent & ~dropped)
            dropped[coming[np.argsort(stamps[coming], kind="stable")[: wanted - max(0, room)]]] = True
        granted[column.table] = granted.get(column.table, 0) + int(np.count_nonzero(absent & ~dropped))
        if not dropped.any():
            return column
        model.floor.add(shards[dropped], stamps[dropped], complete=False)
        model.fetching.note_gone(column.table, keys[dropped])
        self.refused += int(np.count_nonzero(dropped))
        kept = ~dropped
        own = None if column.stamps is None else column.stamps[kept]
        return RowColumns(column.table, keys[kept], column.rows[kept[: len(column.rows)]], own)

    def make_room(self, table: Table, keys: U64, granted: Mapping[int, int]) -> int:
        """How many of the rows of these keys find room, after what may go for them has gone.

        Args:
            table: theirs.
            keys: uint64[n].
            granted: new keys that are about to come, by table.
        """
        model = self._model
        slots = table.resolve(keys)
        present = slots[slots >= 0]
        wanted = keys.size - present.size
        room = max(0, capacity.room_for(model, model.tables_by_id, table.spec.id, granted))
        if wanted > room and model.evicts and self.backed:
            room += self._evict(table, wanted - room, present, model.newest_row)
        return min(room, wanted) + present.size

    def _dropped_up_to(self) -> U64:
        """uint64[shards]: of incomplete shards the newest stamp that was dropped there, else 0."""
        floor = self._model.floor
        newest: U64 = floor.columns[floor.writers].max(axis=0)
        newest[~floor.incomplete] = 0
        return newest

    def _evict(self, table: Table, wanted: int, present: I64, now: int) -> int:
        """Make room in a table, but not at these places; returns for how many rows. `now`: the newest stamp that was seen."""
        model = self._model
        used = table.rows_used
        if used == 0:
            return 0
        wanted_now = max(wanted, min(BATCH_ROWS, used // 64))
        newest = max(0, now - (QUIET_MS << COUNTER_BITS + WRITER_BITS))
        size = min(SAMPLE * wanted_now, LOOKS_MAX)
        places, keys, stamps = np.empty(size, np.int64), np.empty(size, np.uint64), np.empty(size, np.uint64)
        count = kernels.sample(
            table.mapping.address,
            table.stride,
            used,
            model.vector_address,
            model.shards,
            newest,
            self.until,
            self._looks,
            places,
            keys,
            stamps,
        )
        self._looks += size
        chosen, first = np.unique(places[:count], return_index=True)
        other = ~np.isin(chosen, present)
        chosen, first = chosen[other], first[other]
        if model.capacity is not None and model.capacity.evict == "least_frequently_read":
            order = np.lexsort((stamps[first], model.hotness(table.spec.name, keys[first])))
        else:
            order = np.argsort(stamps[first], kind="stable")
        victims = chosen[order[:wanted_now]]
        if victims.size:
            model.remove(table.spec.id, victims, complete=False)
            self.evicted += victims.size
        return int(victims.size)
