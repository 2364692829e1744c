"""One model in shared memory: its tables, its vector, its writer. The `p2p.replica.Replica` of the protocol machine.

A model of several partitions has a `ekko.store.partition.Partition` for each that this node holds, and they are its replicas.
Vector rows and frontiers of the others stay zero, and no row of them is here.

Here are its tables and what is known of it. What comes in is for `ekko.store.applying`, what peers ask for `questions`, what a
restarted daemon must know of its own steps for `own_writer`, what goes for good for `collecting`.
"""

from collections.abc import Mapping as ReadOnlyMapping
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from weakref import ReferenceType, ref

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ModelError, StoreError
from ekko.health.traffic import Traffic
from ekko.model import DENSE_SPEC, DENSE_TABLE, TableSpec, TensorSpec, is_training
from ekko.store import capacity, layout
from ekko.store.applying import Applying, whole
from ekko.store.batches import BatchMarks
from ekko.store.changes import ChangeRing
from ekko.store.collecting import Sweep, WholeShards
from ekko.store.eviction import Eviction
from ekko.store.fetching import Fetching, live_rows
from ekko.store.floor import LossFloor
from ekko.store.hot import Heat
from ekko.store.kernels import index
from ekko.store.listening import Changes, Listener
from ekko.store.manifest import (
    ModelEntry,
    changes_name,
    header_name,
    heat_name,
    hot_name,
    index_name,
    rows_name,
    undo_name,
)
from ekko.store.memory import Mapping, Memory
from ekko.store.own_writer import OwnWriter
from ekko.store.questions import Questions
from ekko.store.recent import CacheStats, RecentRows
from ekko.store.table import Table
from ekko.store.view import RowSource, gather_rows
from p2p.replica import Applied, Collected, KnownSteps, Place, RowColumns, Selection, TableKeys, WriterIdentity
from p2p.stamps import WRITERS_MAX

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
_NEWEST = np.iinfo(np.uint64).max


@dataclass(frozen=True, slots=True)
class TableStats:
    """How full one table is."""

    rows: int  # live ones
    tombstones: int
    bytes: int  # of shared memory: rows, index, and what readers count
    free_bytes: int = 0  # of those, free slots, which later rows of the table get


class ModelStore:
    """Rows and knowledge of one model on this node. Use `create` or `open`; one thread writes."""

    def __init__(self, entry: ModelEntry, memory: Memory, table_bytes_max: int, header: Mapping) -> None:
        self.spec = entry.bare_spec
        self._hold = tuple(range(entry.partitions)) if entry.hold is None else tuple(entry.hold)
        self._capacity_rows = entry.capacity_rows
        self._memory = memory
        self._table_bytes_max = table_bytes_max
        self._header = header
        self._tables: dict[int, Table] = {}
        # Each batch looks at all shards of one writer: these lie together, where a row of 4,096 writers for each shard costs a
        # page and a cache line each, all in one set of the cache (107 us against 5 for 64 shards).
        self._vector = header.words(layout.MODEL.offset("vector"), WRITERS_MAX, entry.shards).T
        frontiers = layout.frontiers_offset(entry.shards, entry.partitions)
        self._frontiers = header.words(frontiers, entry.partitions, WRITERS_MAX)
        # Views of the header: making one costs more than reading it.
        self._stamp_max, self._synced_until_ms = self._word("stamp_max"), self._word("synced_until_ms")
        self._synced_until = np.zeros(entry.partitions, np.int64)  # of each partition
        self._own = OwnWriter(header, entry.shards)
        self._questions = Questions(self._tables, entry.shards, entry.partitions)
        self._applying = Applying(self, self._stamp_max)
        self._keyspace = self.spec.id  # worked out once: it is asked for some six times a step
        self._place = Place(self._keyspace)
        self.capacity: capacity.Capacity | None = None  # set by whoever knows the configuration
        self._heat: dict[str, Heat] = {}  # of each table that readers look up
        self._marks = BatchMarks(header, self._covered)
        self._floor = LossFloor(header, entry.shards, entry.partitions)
        self._arrivals: list[ReferenceType[WholeShards]] = []  # of answers that bring shards whole
        self._sweeps = [Sweep(self, partition) for partition in range(entry.partitions)]
        self.fetching = Fetching(self)
        self.tables_dropped: ReadOnlyMapping[int, str] = {}  # id -> name of the tables whose rows may come late
        self.eviction: Eviction | None = None  # what keeps rows of other nodes within the capacity
        self.listener: Listener | None = None  # is told of all that comes
        self.changes: Changes | None = None  # is told which rows are others now
        self._ring: ChangeRing | None = None  # tells it to other processes
        self._stable: dict[int, U64] = {}  # by partition: uint64[WRITERS_MAX], up to where rows could be collected last

    @classmethod
    def create(cls, entry: ModelEntry, memory: Memory, table_bytes_max: int) -> "ModelStore":
        """Make an empty model."""
        spec = entry.bare_spec
        header = memory.create(header_name(spec.id), layout.model_bytes(entry.shards, entry.partitions))
        header.ensure(layout.loss_floor_offset(entry.shards, entry.partitions))
        words = header.words(0, 4)
        words[...] = (layout.MODEL_MAGIC, layout.LAYOUT_VERSION, spec.id, entry.shards)
        model = cls(entry, memory, table_bytes_max, header)
        model._ring = ChangeRing.attach(spec.id, memory, header)
        return model

    @classmethod
    def open(cls, entry: ModelEntry, memory: Memory, table_bytes_max: int) -> "ModelStore":
        """Attach to a model that another process left, and repair what a kill broke.

        Raises:
            StoreError: a file is damaged.
            OSError: a file is missing.
        """
        spec = entry.bare_spec
        header = memory.open(header_name(spec.id))
        expected_bytes = layout.model_bytes(entry.shards, entry.partitions)
        expected = (layout.MODEL_MAGIC, layout.LAYOUT_VERSION, spec.id, entry.shards)
        if len(header) < expected_bytes or tuple(int(word) for word in header.words(0, 4)) != expected:
            raise StoreError(f"the header of model {entry.name!r} is damaged, or of another version of ekko")
        header.ensure(layout.loss_floor_offset(entry.shards, entry.partitions))
        model = cls(entry, memory, table_bytes_max, header)
        for table in entry.tables:
            model._table(table).open()
            model._attach_heat(table, entry.capacity_rows)
            if table.name != DENSE_TABLE:
                model.spec.tables[table.name] = table
        for tensor in entry.tensors:
            model.spec.tensors[tensor.name] = tensor
        model._own.merge_pending(model._vector, model._frontiers)
        model._mark_attached()
        model._cover_floor()
        # Last: what a kill kept from being noted, and what was repaired above, was not noted.
        model._ring = ChangeRing.attach(spec.id, memory, header)
        return model

    def _table(self, spec: TableSpec) -> Table:
        """A table object without memory yet, known to the model."""
        table = Table(
            spec,
            self._memory,
            rows_name(self.keyspace, spec.id),
            lambda generation: index_name(self.keyspace, spec.id, generation),
            self._header.address + layout.MODEL.offset("undo"),
            RecentRows(self.shards),
        )
        self._tables[spec.id] = table
        return table

    def _attach_heat(self, spec: TableSpec, capacity_rows: int) -> None:
        """What readers ask for in this table; of dense tensors nobody wants to know."""
        if spec.name != DENSE_TABLE:
            names = hot_name(self.keyspace, spec.id), heat_name(self.keyspace, spec.id)
            self._heat[spec.name] = Heat.attach(spec.id, names, self._memory, capacity_rows)

    @property
    def heat(self) -> ReadOnlyMapping[str, Heat]:
        """Live view: table name -> what its readers ask for. `heat[table].hotness(keys)` is what an eviction asks."""
        return MappingProxyType(self._heat)

    @property
    def requests(self) -> float:
        """Keys that readers asked for in all tables, decayed: what the model's share is taken of."""
        return sum(heat.stats().requests for heat in self._heat.values())

    def _word(self, name: str) -> U64:
        return self._header.words(layout.MODEL.offset(name))

    @property
    def header(self) -> Mapping:
        """The model's header file, mapped."""
        return self._header

    def entry(self) -> ModelEntry:
        """What the manifest says of the model."""
        tables = [table.spec for table in self._tables.values()]
        hold = None if self.holds_all else list(self._hold)
        spec, tensors = self.spec, list(self.spec.tensors.values())
        return ModelEntry(
            spec.name, spec.shards, self._capacity_rows, tables, tensors, spec.partitions, hold, spec.codec, spec.incarnation
        )

    def file_names(self, tables: Sequence[str] | None = None) -> list[str]:
        """Names of the files that it consists of, or of those of some tables."""
        names = [header_name(self.keyspace)] if tables is None else []
        names += [changes_name(self.keyspace)] if tables is None and self._ring is not None else []
        names += [undo_name(self.keyspace)] if tables is None and is_training(self.spec.name) else []
        for table in self._tables.values():
            if tables is None or table.spec.name in tables:
                names += [rows_name(self.keyspace, table.spec.id), *table.index_names()]
                if table.spec.name in self._heat:
                    names += [hot_name(self.keyspace, table.spec.id), heat_name(self.keyspace, table.spec.id)]
        return names

    def let_go(self) -> None:
        """It was dropped, and is used no more; its memory is freed by other threads."""
        for table in self._tables.values():
            table.let_go()

    def let_go_of_tables(self, names: Sequence[str]) -> None:
        """These tables were dropped; what comes late of them is no error (`tables_dropped`)."""
        for name in names:
            number = self.spec.tables.pop(name).id
            self._heat.pop(name, None)
            self.fetching.let_go(number)
            self._tables.pop(number).let_go()

    def add_table(self, spec: TableSpec, capacity_rows: int = 0) -> bool:
        """Have this table, which does not clash with any; True when it is new."""
        if spec.id in self._tables:
            return False
        try:
            self._table(spec).create(self._table_bytes_max, capacity_rows or self._capacity_rows)
            self._attach_heat(spec, capacity_rows or self._capacity_rows)
        except BaseException:
            del self._tables[spec.id]
            raise
        if spec.name != DENSE_TABLE:
            self.spec.tables[spec.name] = spec
        return True

    def add_tensor(self, spec: TensorSpec) -> bool:
        """Have this dense tensor, which does not clash with any; True when it is new."""
        if spec.name in self.spec.tensors:
            return False
        if DENSE_SPEC.id not in self._tables:
            self.add_table(DENSE_SPEC, spec.rows)
        self.spec.tensors[spec.name] = spec
        return True

    def table(self, table: int) -> Table:
        """A table by its id."""
        return self._tables[table]

    def restore(self, vector: U64, frontiers: U64, loss_floor: U64, incomplete: NDArray[np.uint8], stamp_max: int) -> None:
        """After the rows of a snapshot: what it knows of the partitions that are held here (T5).

        Args:
            vector: [WRITERS_MAX, shards].
            frontiers: [partitions, WRITERS_MAX].
            loss_floor: [WRITERS_MAX, shards].
            incomplete: a bit for each shard.
            stamp_max: of the rows.
        """
        held = np.isin(np.arange(self.shards) % self.spec.partitions, self._hold)
        dropped = np.unpackbits(incomplete, bitorder="little", count=self.shards).astype(np.bool_)
        self._floor.replace(np.where(held, loss_floor, np.uint64(0)), dropped)
        self._cover_floor()
        self._vector.T[...] = np.where(held, vector, np.uint64(0))
        self._frontiers[list(self._hold)] = frontiers[list(self._hold)]
        self._stamp_max[...] = stamp_max
        self._mark_attached()

    @property
    def table_specs(self) -> list[TableSpec]:
        """All tables, `_dense` included."""
        return [table.spec for table in self._tables.values()]

    def table_stats(self) -> dict[str, TableStats]:
        """How full each table is, `_dense` included."""
        stats = {}
        for table in self._tables.values():
            memory, free = capacity.memory_of(self, table), capacity.free_slots(table)
            live = table.rows_used - free - table.tombstones
            stats[table.spec.name] = TableStats(live, table.tombstones, memory.total, memory.free)
        return stats

    @property
    def memory_bytes(self) -> int:
        """What it takes of shared memory: header, rows, indexes, and what readers count."""
        return capacity.memory_bytes(self, self._tables)

    def limit(self, allowed: capacity.Capacity) -> None:
        """Keep it within this from now on; what it has already stays."""
        self.capacity = allowed
        self.eviction = Eviction(self)

    def begin_anew(self) -> int:
        """Claim nothing of incomplete shards, so that they are pulled as a node pulls that has just come; what is here stays.

        Before the protocol starts, and only where this node has no writer id: what a writer claims of its own steps it must not
        forget. Every other row of such a shard is a stray until somebody who has all of it says otherwise, and the loss floor
        stays: one that is too high does no harm.

        Returns:
            How many shards; 0 also where there is no room to speak of for more rows than there are (`capacity.has_spare`).
        """
        shards = np.flatnonzero(self.incomplete)
        if not shards.size or self.writer is not None or not capacity.has_spare(self, self._tables):
            return 0
        self._vector[shards] = 0
        self._frontiers[np.unique(shards % self.spec.partitions)] = 0
        self._floor.complete()  # last: a kill before leaves shards of which nothing is claimed, and that are begun anew again
        self._mark_attached()
        return int(shards.size)

    @property
    def tables_by_id(self) -> ReadOnlyMapping[int, Table]:
        """All tables, `_dense` included."""
        return self._tables

    def hotness(self, table: str, keys: U64) -> NDArray[np.float64]:
        """float64[n]: how often readers asked for each key lately; 0 where nobody counts."""
        heat = self._heat.get(table)
        return np.zeros(keys.size, np.float64) if heat is None else heat.hotness(keys)

    @property
    def vector_address(self) -> int:
        """Of uint64[4096, shards]: the vector as it lies in memory."""
        return self._header.address + layout.MODEL.offset("vector")

    @property
    def newest_row(self) -> int:
        """No row has a larger stamp."""
        return int(self._stamp_max)

    def check_step(self, columns: Sequence[RowColumns]) -> None:
        """Refuse a step of a publisher here that finds no room (`capacity_bytes`).

        Raises:
            PublishError: with the remedies. Nothing is changed.
        """
        if self.capacity is not None:
            capacity.check_step(self, self._tables, self.capacity, columns)

    def cache_stats(self) -> CacheStats:
        """What the update caches of all tables did and hold, together."""
        return sum((table.recent.stats() for table in self._tables.values()), CacheStats())

    @property
    def tables(self) -> list[Table]:
        """All tables, `_dense` included, in the order in which they came."""
        return list(self._tables.values())

    @property
    def newest_rows(self) -> U64:
        """Live uint64[WRITERS_MAX]: the newest row of each writer that came."""
        return self._marks.newest

    def remove(self, table: int, slots: I64, *, complete: bool) -> None:
        """Drop rows for good, after the loss floor says so: a kill in between leaves a floor that is too high, which is safe.

        Args:
            table: its id.
            slots: int64[n], of rows that are there, without repeats.
            complete: they are deleted or expired, or somebody else has dropped them; False: live rows go (R11).

        Raises:
            StoreError: shared memory is full; nothing changed.
        """
        held = self._tables[table]
        keys, stamps = held.heads(slots)
        self._floor.add(self.shards_of(keys), stamps, complete)
        self.fetching.note_gone(table, keys)
        for reference in self._arrivals:
            if (arrivals := reference()) is not None:
                arrivals.forget(table, slots)
        with self._marks.removing():
            held.remove(slots)
            for changes in self.told_of_changes:
                changes.note_gone(table, keys)

    @property
    def told_of_changes(self) -> list[Changes]:
        """Who is told which rows are others now."""
        return [one for one in (self.changes, self._ring) if one is not None]

    @property
    def changes_noted(self) -> tuple[int, int] | None:
        """Where the ring is that tells other processes of changes (`ChangeRing.noted`); None: there is none."""
        return None if self._ring is None else self._ring.noted

    @property
    def marks(self) -> BatchMarks:
        """What readers who want no half of anything are told."""
        return self._marks

    def lookup(self, table: str, keys: U64) -> tuple[NDArray[np.float32], U64]:
        """Rows float32[n, dim] and stamps uint64[n] by key, zero where absent, as a reader would see them.

        Raises:
            ModelError: there is no such table.
        """
        spec = DENSE_SPEC if table == DENSE_TABLE else self.spec.tables.get(table)
        if spec is None or (held := self._tables.get(spec.id)) is None:
            known = ", ".join(map(repr, self.spec.tables)) or "none"
            raise ModelError(f"model {self.spec.name!r} has no table {table!r}: it has {known}")
        out, stamps = np.empty((keys.size, held.spec.dim), np.float32), np.empty(keys.size, np.uint64)
        source = RowSource.of(held.spec, held.mapping.address)
        gather_rows(source, held.index, whole(keys), out, stamps)
        return out, stamps

    # --- partitions -------------------------------------------------------------------------------------------------

    @property
    def hold(self) -> tuple[int, ...]:
        """The partitions that this node holds, ascending."""
        return self._hold

    @property
    def holds_all(self) -> bool:
        return len(self._hold) == self.spec.partitions

    def hold_more(self, partitions: Sequence[int]) -> bool:
        """Hold these partitions, too, which begin empty; True when one of them is new."""
        before = self._hold
        self._hold = tuple(sorted({*before, *partitions}))
        return self._hold != before

    @property
    def frontiers(self) -> U64:
        """Live uint64[partitions, WRITERS_MAX]: the frontier of each partition; zero for those not held."""
        return self._frontiers

    @property
    def last_stamp(self) -> int:
        """Of this node's own newest step; 0: none yet."""
        writer = self.writer
        return 0 if writer is None else int(self._frontiers[:, writer.writer].max())

    def partition_of(self, keys: U64) -> I64:
        out = self.shards_of(keys)
        out %= self.spec.partitions
        return out

    def changed_in(self, partition: int, base: U64) -> list[Selection]:
        """`changed_since` of one partition, with the vector uint64[its shards, WRITERS_MAX] of an asker."""
        return self._questions.in_partition(partition, base, self.changed_since)

    def scan_in(self, partition: int, base: U64) -> list[Selection]:
        """`changed_in` by looking at every row."""
        return self._questions.in_partition(partition, base, self.scan_since)

    def stray_digest_in(self, partition: int) -> int:
        """`stray_digest` of one partition."""
        own = self._vector[partition :: self.spec.partitions]
        return self._questions.in_partition(partition, own, self._questions.digest_above)

    @property
    def floor(self) -> LossFloor:
        """What was dropped for good, in all partitions."""
        return self._floor

    def collect_in(self, partition: int, until: U64, unix_ms: int, rows_max: int) -> Collected:
        """`collect` of one partition."""
        self._stable[partition] = until
        return self._sweeps[partition].collect(until, unix_ms, rows_max)

    def stable_in(self, partition: int) -> U64 | None:
        """uint64[WRITERS_MAX]: up to where rows of each writer may be collected, when that was said last; None: never."""
        return self._stable.get(partition)

    def arrivals_in(self, partition: int) -> WholeShards:
        """`arrivals` of one partition."""
        arrivals = WholeShards(self, partition)
        self._arrivals = [one for one in self._arrivals if one() is not None] + [ref(arrivals)]
        return arrivals

    def set_partition_synced_until(self, partition: int, unix_ms: int) -> None:
        """Readers are told the worst of all held partitions; 0 is worst of all."""
        self._synced_until[partition] = unix_ms
        self.set_synced_until(int(self._synced_until[list(self._hold)].min()))

    # --- p2p.replica.Replica ----------------------------------------------------------------------------------------

    @property
    def keyspace(self) -> int:
        return self._keyspace

    @property
    def place(self) -> Place:
        return self._place

    @property
    def shards(self) -> int:
        return self.spec.shards

    @property
    def vector(self) -> U64:
        return self._vector

    @property
    def frontier(self) -> U64:
        assert self.spec.partitions == 1, "each partition has a frontier of its own"
        frontier: U64 = self._frontiers[0]
        return frontier

    @property
    def writer(self) -> WriterIdentity | None:
        return self._own.identity

    @property
    def pending_stamp(self) -> int:
        """Of the step of a publisher here that is being stored, or was last; 0: none yet."""
        return self._own.pending

    @property
    def stamp_max(self) -> int:
        # What was dropped here counts: a writer that begins here writes above every tombstone that was collected (R5).
        dropped = int(self._floor.columns[self._floor.writers].max(initial=np.uint64(0)))
        known = max(int(self._vector.max()), int(self._frontiers.max()), dropped)
        return max(int(self._stamp_max), known, self._own.pending)

    def set_writer(self, identity: WriterIdentity | None) -> None:
        self._own.set(identity)

    def begin_step(self, stamp: int, shards: ReadOnlyMapping[int, NDArray[np.int64]]) -> None:
        partitions = self.spec.partitions
        self.begin_write(stamp, np.concatenate([own * partitions + partition for partition, own in shards.items()]))

    def begin_write(self, stamp: int, shards: NDArray[np.int64]) -> None:
        """Record a local step as pending that touches these shards of the model."""
        self._own.begin(stamp, shards)

    def _covered(self, writers: I64) -> U64:
        """uint64[n]: everything of these writers is here up to this stamp, in every partition that is held."""
        if self.spec.partitions == 1:
            return self.frontier[writers]
        # Where nothing is held there is nothing that could lack.
        covered: U64 = self._frontiers[np.ix_(np.array(self._hold, np.int64), writers)].min(axis=0, initial=_NEWEST)
        return covered

    def _mark_attached(self) -> None:
        """Readers may have found the epoch odd since the kill; which steps are whole is looked up in the rows."""
        newest = np.zeros(WRITERS_MAX, np.uint64)
        for table in self._tables.values():
            newest = np.maximum(newest, table.recent.newest_left_out())
        self._marks.attach(newest)

    @property
    def loss_floor(self) -> U64:
        return self._floor.values

    @property
    def floor_writers(self) -> NDArray[np.uint16]:
        return self._floor.writers

    @property
    def incomplete(self) -> NDArray[np.bool_]:
        return self._floor.incomplete

    @property
    def evicts(self) -> bool:
        return self.capacity is not None and self.capacity.evict is not None

    def note_backed(self, until: U64) -> None:
        self.note_partition_backed(0, until)

    def note_partition_backed(self, partition: int, until: U64) -> None:
        """Rows go for want of room only as far as others keep them, in every partition that is here."""
        if self.eviction is not None:
            self.eviction.note_backed(partition, until, self._hold)

    @property
    def collectable(self) -> int:
        return sum(table.rows_used if table.spec.ttl_s else table.tombstones for table in self._tables.values())

    def collect(self, until: U64, unix_ms: int, rows_max: int) -> Collected:
        return self.collect_in(0, until, unix_ms, rows_max)

    def merge_floor(self, shards: NDArray[np.uint32], writers: NDArray[np.uint16], floor: U64) -> None:
        self.fetching.forget()
        self._floor.merge(shards, writers, floor)
        self._cover_floor()

    def _cover_floor(self) -> None:
        """Who lacks what was dropped lacks more than the update cache knows (R10)."""
        if len(self._floor.writers):
            for table in self._tables.values():
                table.recent.cover(self._floor.values)

    def arrivals(self) -> WholeShards:
        return self.arrivals_in(0)

    def shards_of(self, keys: U64) -> NDArray[np.int64]:
        out = np.empty(keys.size, np.int64)
        index.shards_of(whole(keys), self.spec.shards, out)
        return out

    def check(self, columns: Sequence[RowColumns], shards: NDArray[np.uint32] | None = None) -> None:
        self._applying.check(self._without_dropped(columns), shards)

    def reserve(self, columns: Sequence[RowColumns]) -> None:
        self._applying.reserve(self._without_dropped(columns))

    def apply(self, columns: Sequence[RowColumns], stamp: int) -> Applied:
        return self._applying.apply(self._without_dropped(columns), stamp)

    def _without_dropped(self, columns: Sequence[RowColumns]) -> Sequence[RowColumns]:
        """Rows of tables that were dropped come late from who has not heard of it: there is nothing to do with them, and what
        is claimed with them is no less true.
        """
        dropped = self.tables_dropped
        return [column for column in columns if column.table not in dropped] if dropped else columns

    def changed_since(self, base: U64, *, measured: bool = True) -> list[Selection]:
        return self._questions.changed_since(base, measured=measured)

    def scan_since(self, base: U64) -> list[Selection]:
        """`changed_since` by looking at every row."""
        return self._questions.scan_since(base)

    def without(self, selections: Sequence[Selection], known: KnownSteps, *, partitions: int = 1) -> list[Selection]:
        return self._questions.without(selections, known, partitions)

    def row_bytes_of(self, table: int) -> int:
        held = self._tables.get(table)
        return 0 if held is None else held.row_bytes

    def places_of(self, table: int, keys: U64) -> I64:
        held = self._tables.get(table)
        return np.full(keys.size, -1, np.int64) if held is None else held.resolve(whole(keys))

    def read(self, table: int, slots: NDArray[np.int64]) -> RowColumns:
        if table not in self._tables:  # it was dropped since they were selected
            return RowColumns(table, np.empty(0, np.uint64), np.empty((0, 0), np.uint8), np.empty(0, np.uint64))
        keys, data, stamps = self._tables[table].read(np.ascontiguousarray(slots, np.int64))
        return RowColumns(table, keys, data, stamps)

    def take_wanted(self, keys_max: int) -> tuple[TableKeys, ...]:
        return self.fetching.take_wanted(0, keys_max)

    def read_keys(self, table: int, keys: U64) -> RowColumns:
        return live_rows(self, table, keys)

    def take_back(self, columns: Sequence[RowColumns]) -> Applied:
        return self.take_back_in(0, columns)

    def take_back_in(self, partition: int, columns: Sequence[RowColumns]) -> Applied:
        """`take_back` of one partition."""
        let_in = self.fetching.admit(partition, columns)
        self._applying.reserve(let_in)
        return self._applying.write(let_in)

    def copy(self, columns: Sequence[RowColumns]) -> Applied:
        """Write rows that another store of this node has, whatever is claimed here.

        Raises:
            MemoryFullError: as `reserve`. No row is changed.
        """
        self._applying.reserve(columns)
        return self._applying.write(columns)

    def stray_digest(self) -> int:
        return self._questions.digest_above(self._vector)

    def note_coalesced(self, since: ReadOnlyMapping[int, int]) -> None:
        if self.listener is not None:
            self.listener.on_coalesced(since)

    def set_synced_until(self, unix_ms: int) -> None:
        self._marks.settle()
        self._synced_until_ms[...] = unix_ms
        if self.listener is not None:
            self.listener.on_progress(unix_ms)

    def set_traffic(self, traffic: Traffic) -> None:
        """Tell readers which requests are the online model's."""
        low, high = traffic.bounds
        # A reader between the two sees a share that neither was, for an instant; which requests are whose stays the same.
        self._word("online_from")[...], self._word("online_until")[...] = low, high

    @property
    def traffic(self) -> Traffic:
        """What readers are told."""
        return Traffic.of_bounds(int(self._word("online_from")), int(self._word("online_until")))
