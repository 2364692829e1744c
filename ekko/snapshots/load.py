"""Loading a snapshot into a store that begins.

Rows are read straight into the slabs of a store that nobody else sees yet, checked against their checksums there, and entered
into the index while they are in the processor's cache. The full snapshot comes first, then its increments. What is loaded
becomes the node's store only when all of it was right (`Store.open(fill=)`), so a kill leaves nothing half-loaded.

Not restored is who wrote: the node takes a fresh writer id (R4), and its ledger, where there is one, knows better than any
snapshot who was expelled and who was retired (R13).
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ModelError, SnapshotError, StoreError
from ekko.model import ModelSpec, keyspace_id
from ekko.snapshots.catalog import Catalog, Entry
from ekko.snapshots.folders import Folder, Source
from ekko.snapshots.format import ModelPart, TablePart, checksum_of
from ekko.snapshots.records import load_record
from ekko.store import Store
from ekko.store.access import Access
from ekko.store.images import TableFiller, fill_table
from ekko.store.model_store import ModelStore
from ekko.store.store import MEMORY_DIR, TABLE_BYTES_MAX
from p2p.identity.ledger import NodeRecord

U64 = NDArray[np.uint64]
Mask = NDArray[np.bool_]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a snapshot must agree with, and how much of it is wanted."""

    specs: Mapping[str, ModelSpec] = field(default_factory=dict)  # of the node's configuration
    hold: Mapping[str, Sequence[int]] = field(default_factory=dict)  # partitions; models that are not named: as in the snapshot
    node: str = ""  # who wants it


@dataclass(slots=True)
class Restored:
    """What came of looking for a snapshot."""

    store: Store
    snapshot: str | None = None  # its name
    url: str = ""
    bytes: int = 0
    created_ms: int = 0
    refused: list[str] = field(default_factory=list)  # why others were not taken


def open_or_restore(
    run_dir: Path,
    folders: Iterable[Folder],
    wanted: Wanted,
    *,
    memory_dir: Path = MEMORY_DIR,
    table_bytes_max: int = TABLE_BYTES_MAX,
    access: Access | None = None,
    progress: Progress = lambda done, total: None,
    stop: threading.Event | None = None,
) -> Restored:
    """Attach to the memory that is there; else load the newest snapshot that is sound; else begin empty.

    Args:
        run_dir: of the node.
        folders: where to look, in this order.
        wanted: what the configuration says.
        memory_dir: a tmpfs.
        table_bytes_max: see `Store.open`.
        access: likewise.
        progress: told of each chunk, in bytes.
        stop: once set, `SnapshotError` is raised soon.

    Raises:
        StoreError: shared memory cannot be used.
    """
    store = Store.attach(run_dir, memory_dir=memory_dir, table_bytes_max=table_bytes_max, access=access)
    if store is not None:
        return Restored(store)
    refused: list[str] = []
    for folder in folders:
        try:
            names = Catalog(folder).names()
        except SnapshotError as error:
            refused.append(str(error))
            continue
        for name in reversed(names):
            try:
                chain = Catalog(folder).chain(name)
                loader = Loader(folder, chain, wanted, load_record(run_dir), progress, stop)

                def fill(store: Store, loader: Loader = loader) -> None:
                    loader.fill(store)
                    # Before anybody sees the rows: who wrote them must be known wherever they are.
                    loader.note_writers(load_record(run_dir))

                store = Store.open(run_dir, memory_dir=memory_dir, table_bytes_max=table_bytes_max, fill=fill, access=access)
            except (SnapshotError, ModelError) as error:
                if stop is not None and stop.is_set():
                    raise
                refused.append(f"{folder.url}/{name}: {error}")
                continue
            size = sum(entry.manifest.bytes for entry in chain)
            return Restored(store, name, folder.url, size, chain[-1].manifest.created_ms, refused)
    store = Store.open(run_dir, memory_dir=memory_dir, table_bytes_max=table_bytes_max, access=access)
    return Restored(store, refused=refused)


class Loader:
    """Loads one snapshot, with what it stands on.

    Args:
        folder: where it is.
        chain: the full one, then its increments.
        wanted: what it must agree with.
        record: the node's ledger; empty where there is none.
        progress: told of each chunk, in bytes.
        stop: once set, loading ends.

    Raises:
        SnapshotError: it is foreign, or of a life or writer that ended since.
    """

    def __init__(
        self,
        folder: Folder,
        chain: list[Entry],
        wanted: Wanted,
        record: NodeRecord | None = None,
        progress: Progress = lambda done, total: None,
        stop: threading.Event | None = None,
    ) -> None:
        self._folder = folder
        self._chain = chain
        self._wanted = wanted
        self._record = record
        self._progress = progress
        self._stop = stop
        self._done = 0
        self._total = sum(entry.manifest.bytes for entry in chain)
        if record is not None:
            _check_ledger(chain[-1], record)
        for part in chain[-1].manifest.models:
            _check_spec(part, wanted.specs.get(part.entry.name))

    def fill(self, store: Store) -> None:
        """Put everything into a store that is empty.

        Raises:
            SnapshotError: something is damaged. The store must not be used.
            StoreError: shared memory is full.
        """
        for entry in self._chain:
            self._check_sizes(entry)
        newest = self._chain[-1].manifest
        for part in newest.models:
            self._fill_model(store, part)
        store.learn_registers(newest.registers)

    def _check_sizes(self, entry: Entry) -> None:
        """Before memory is made for them: all rows that the manifest speaks of are there."""
        for part in entry.manifest.models:
            for table in part.tables:
                size = self._folder.size(f"{entry.name}/{table.file}")
                if size is not None and size != table.rows * table.stride:
                    longer = "longer" if size > table.rows * table.stride else "shorter"
                    raise SnapshotError(f"{entry.name}/{table.file} is {longer} than its manifest says")

    def note_writers(self, record: NodeRecord) -> None:
        """Remember in the ledger whose rows these are: under another nonce they would be refused, not merged (R12)."""
        newest = self._chain[-1].manifest
        record.cluster = record.cluster or int(newest.cluster, 16)
        if newest.node == self._wanted.node:  # who begins with another node's rows is no life of it, and need not end with it
            record.lives = list(dict.fromkeys([*(int(boot, 16) for boot in newest.lives), *record.lives]))
        for part in newest.models:
            for writer, nonce in part.bindings:
                record.bindings.setdefault((part.entry.bare_spec.id, writer), int(nonce, 16))
        record.save()

    def _fill_model(self, store: Store, newest: ModelPart) -> None:
        parts = [
            (entry, part)
            for entry in self._chain
            for part in entry.manifest.models
            if part.entry.generation == newest.entry.generation
        ]
        rows: dict[int, int] = {}
        for _, part in parts:
            for table in part.tables:
                rows[table.table] = rows.get(table.table, 0) + table.rows
        entry = newest.entry
        held = range(entry.partitions) if entry.hold is None else entry.hold
        hold = sorted(set(held) & set(self._wanted.hold.get(entry.name, held)))
        if not hold:
            return  # nothing of it is wanted
        if len(hold) != entry.partitions:
            entry = replace(entry, hold=hold)
        model = store.add_entry(entry, rows)
        stamp_max = 0
        for spec in entry.tables:
            images = [(of, table) for of, part in parts for table in part.tables if table.table == spec.id]
            stamp_max = max(stamp_max, self._fill_table(model, spec.id, rows.get(spec.id, 0), images, parts, hold))
        knowledge, floors = self._chain[-1].knowledge(self._folder, newest)
        floor = floors.floor
        for of, part in parts[:-1]:  # a floor never goes down; nor may it by a chain
            floor = np.maximum(floor, of.knowledge(self._folder, part)[1].floor)
        _check_retired(newest, model, knowledge.vector, self._record)
        model.restore(knowledge.vector, knowledge.frontiers, floor, floors.incomplete, stamp_max)

    def _fill_table(
        self,
        model: ModelStore,
        table_id: int,
        rows: int,
        images: list[tuple[Entry, TablePart]],
        parts: list[tuple[Entry, ModelPart]],
        hold: list[int],
    ) -> int:
        """Load a table's rows, oldest first; returns the largest stamp."""
        filler = fill_table(model, table_id, rows)
        shards = np.arange(model.shards)
        held = np.isin(shards % model.spec.partitions, hold)
        for entry, table in images:
            if table.stride != filler.stride:  # of another table that had its name
                raise SnapshotError(f"{entry.name}/{table.file} has rows of {table.stride} bytes, not {filler.stride}")
            later = [other for of, other in parts if of.name > entry.name]
            replaced = np.isin(shards, [shard for other in later for shard in other.whole])
            source = self._folder.open(f"{entry.name}/{table.file}")
            try:
                self._read_rows(source, f"{entry.name}/{table.file}", table, filler, held & ~replaced)
            finally:
                source.close()
        return filler.stamp_max

    def _read_rows(self, source: Source, file: str, table: TablePart, filler: TableFiller, wanted: Mask) -> None:
        for rows, checksum in table.chunks:
            if self._stop is not None and self._stop.is_set():
                raise SnapshotError("loading was stopped")
            room = filler.room(rows)
            if source.readinto(room) != len(room):
                raise SnapshotError(f"{file} is shorter than its manifest says")
            if checksum_of(room) != checksum:
                raise SnapshotError(f"{file} is damaged: a checksum is wrong")
            try:
                filler.settle(rows, wanted)
            except StoreError as error:
                raise SnapshotError(f"{file}: {error}") from None
            self._done += len(room)
            self._progress(self._done, self._total)


def _check_ledger(newest: Entry, record: NodeRecord) -> None:
    """Refuse what belongs to another cluster, or to a life that was expelled."""
    manifest = newest.manifest
    cluster = int(manifest.cluster, 16)
    if record.cluster and cluster != record.cluster:
        raise SnapshotError(
            f"it is of cluster {cluster:016x}, this node of {record.cluster:016x}: remove the node's run_dir to move it there"
        )
    if any(int(boot, 16) in record.expelled for boot in manifest.lives):
        raise SnapshotError("it was made by a life that was expelled since: what it holds was given up")


def _check_spec(part: ModelPart, spec: ModelSpec | None) -> None:
    """Refuse a model that contradicts the configuration."""
    entry = part.entry
    if spec is None:
        return
    for what, there, here in (
        ("shards", entry.shards, spec.shards),
        ("partitions", entry.partitions, spec.partitions),
        ("codec", entry.codec, spec.codec),
    ):
        if there != here:
            raise SnapshotError(f"model {entry.name!r} has {what} {there} in it, and {here} in the configuration")
    held = {table.name: table for table in entry.tables}
    for table in spec.tables.values():
        for what in ("dim", "ttl_s"):
            there, here = getattr(held.get(table.name, table), what), getattr(table, what)
            if there != here:
                raise SnapshotError(
                    f"table {table.name!r} of model {entry.name!r} has {what} {there} in it, and {here} in the configuration"
                )


def _check_retired(part: ModelPart, model: ModelStore, vector: U64, record: NodeRecord | None) -> None:
    """Refuse a model that holds more of a writer than was left of it when it was retired (R13)."""
    if record is None:
        return
    spec = model.spec
    nonces = {writer: int(nonce, 16) for writer, nonce in part.bindings}
    for one in record.retired.values():
        for partition in range(spec.partitions):
            if one.keyspace != keyspace_id(spec.name, partition, spec.partitions) or nonces.get(one.writer) != one.nonce:
                continue
            shards = np.arange(partition, spec.shards, spec.partitions)
            held = vector[one.writer, shards]
            for spec_ in model.table_specs:
                held = np.maximum(held, model.table(spec_.id).recent.dvv[one.writer, shards])
            if len(one.floor) == len(held) and (held > one.floor).any():
                raise SnapshotError(f"it holds more of writer {one.writer} than was left of it when it was retired")
