"""One partition of a model, as the protocol machine replicates it: a `p2p.replica.Replica` over a part of a `ModelStore`.

partition = shard mod partitions. The model's tables, writer and clock are shared by all of its partitions; vector, frontier and
what a peer may ask for are the partition's own. Shards are numbered within it: shard s of the model is shard
`s // partitions` of partition `s mod partitions`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ekko.model import keyspace_id
from ekko.store.collecting import WholeShards
from ekko.store.model_store import ModelStore
from p2p.replica import U64, Applied, Collected, KnownSteps, Place, Replica, RowColumns, Selection, TableKeys, WriterIdentity

# Rows in one step of a copy; what it takes in memory besides the two models.
COPIED_AT_ONCE = 1 << 16


def replicas_of(model: ModelStore) -> list[Replica]:
    """What the protocol machine replicates of a model: the model itself, or each partition of it that is held."""
    return [model] if model.spec.partitions == 1 else [Partition(model, partition) for partition in model.hold]


def copy_held(model: ModelStore, twin: ModelStore) -> None:
    """Fill an empty model with what another one holds of the partitions that both hold.

    Raises:
        StoreError: shared memory is full.
    """
    for spec in model.table_specs:
        twin.add_table(spec)
    for tensor in model.spec.tensors.values():
        twin.add_tensor(tensor)
    for selection in model.scan_since(np.zeros(model.vector.shape, np.uint64)):
        for begin in range(0, len(selection.slots), COPIED_AT_ONCE):
            rows = model.read(selection.table, selection.slots[begin : begin + COPIED_AT_ONCE])
            kept = np.isin(model.partition_of(rows.keys), twin.hold)
            assert rows.stamps is not None
            twin.apply([RowColumns(rows.table, rows.keys[kept], rows.rows[kept[: len(rows.rows)]], rows.stamps[kept])], 0)
    for partition in twin.hold:  # after the rows, as always (R4)
        twin.vector[partition :: twin.spec.partitions] = model.vector[partition :: twin.spec.partitions]
        twin.frontiers[partition] = model.frontiers[partition]
        twin.floor.take_over(model.floor, slice(partition, None, twin.spec.partitions))
    # Who holds less than it did cannot tell any more what it wrote there: it takes a fresh writer id, as after a loss (R4).
    if model.writer is not None and twin.hold == model.hold:
        twin.set_writer(model.writer)


class Partition:
    """A held partition of a model of several."""

    def __init__(self, model: ModelStore, partition: int) -> None:
        spec = model.spec
        self._model = model
        self._place = Place(spec.id, partition, spec.partitions)
        self._keyspace = keyspace_id(spec.label, partition, spec.partitions)
        self._vector: U64 = model.vector[partition :: spec.partitions]
        self._frontier: U64 = model.frontiers[partition]

    @property
    def keyspace(self) -> int:
        return self._keyspace

    @property
    def place(self) -> Place:
        return self._place

    @property
    def shards(self) -> int:
        return int(self._vector.shape[0])

    @property
    def vector(self) -> U64:
        return self._vector

    @property
    def frontier(self) -> U64:
        return self._frontier

    @property
    def writer(self) -> WriterIdentity | None:
        return self._model.writer

    @property
    def stamp_max(self) -> int:
        return self._model.stamp_max

    def set_writer(self, identity: WriterIdentity | None) -> None:
        self._model.set_writer(identity)

    def begin_step(self, stamp: int, shards: Mapping[int, NDArray[np.int64]]) -> None:
        self._model.begin_step(stamp, shards)

    @property
    def loss_floor(self) -> U64:
        floor: U64 = self._model.loss_floor[self._place.partition :: self._place.partitions]
        return floor

    @property
    def floor_writers(self) -> NDArray[np.uint16]:
        return self._model.floor_writers

    @property
    def incomplete(self) -> NDArray[np.bool_]:
        return self._model.incomplete[self._place.partition :: self._place.partitions]

    @property
    def evicts(self) -> bool:
        return self._model.evicts

    def note_backed(self, until: U64) -> None:
        self._model.note_partition_backed(self._place.partition, until)

    @property
    def collectable(self) -> int:
        return self._model.collectable

    def collect(self, until: U64, unix_ms: int, rows_max: int) -> Collected:
        return self._model.collect_in(self._place.partition, until, unix_ms, rows_max)

    def merge_floor(self, shards: NDArray[np.uint32], writers: NDArray[np.uint16], floor: U64) -> None:
        self._model.merge_floor(shards * np.uint32(self._place.partitions) + np.uint32(self._place.partition), writers, floor)

    def arrivals(self) -> WholeShards:
        return self._model.arrivals_in(self._place.partition)

    def shards_of(self, keys: U64) -> NDArray[np.int64]:
        return self._model.shards_of(keys) // self._place.partitions

    def partition_of(self, keys: U64) -> NDArray[np.int64]:
        return self._model.partition_of(keys)

    def check(self, columns: Sequence[RowColumns], shards: NDArray[np.uint32] | None = None) -> None:
        own = np.arange(self.shards, dtype=np.uint32) if shards is None else shards
        self._model.check(columns, own * np.uint32(self._place.partitions) + np.uint32(self._place.partition))

    def reserve(self, columns: Sequence[RowColumns]) -> None:
        self._model.reserve(columns)

    def apply(self, columns: Sequence[RowColumns], stamp: int) -> Applied:
        return self._model.apply(columns, stamp)

    def changed_since(self, base: U64) -> list[Selection]:
        return self._model.changed_in(self._place.partition, base)

    def scan_since(self, base: U64) -> list[Selection]:
        return self._model.scan_in(self._place.partition, base)

    def without(self, selections: Sequence[Selection], known: KnownSteps) -> list[Selection]:
        return self._model.without(selections, known, partitions=self._place.partitions)

    def row_bytes_of(self, table: int) -> int:
        return self._model.row_bytes_of(table)

    def places_of(self, table: int, keys: U64) -> NDArray[np.int64]:
        return self._model.places_of(table, keys)

    def read(self, table: int, slots: NDArray[np.int64]) -> RowColumns:
        return self._model.read(table, slots)

    def take_wanted(self, keys_max: int) -> tuple[TableKeys, ...]:
        return self._model.fetching.take_wanted(self._place.partition, keys_max)

    def read_keys(self, table: int, keys: U64) -> RowColumns:
        return self._model.read_keys(table, keys)

    def take_back(self, columns: Sequence[RowColumns]) -> Applied:
        return self._model.take_back_in(self._place.partition, columns)

    def stray_digest(self) -> int:
        return self._model.stray_digest_in(self._place.partition)

    def note_coalesced(self, since: Mapping[int, int]) -> None:
        self._model.note_coalesced(since)

    def set_synced_until(self, unix_ms: int) -> None:
        self._model.set_partition_synced_until(self._place.partition, unix_ms)
