"""Writing a snapshot of a store that goes on changing.

The order is the theorem (T5): of each model the vector first, then the rows, then the loss floor. A row that is written or
removed meanwhile is newer than the vector, or covered by the floor; whoever restores the snapshot pulls it again. Which tables
there are is looked up after the vector, too: it covers rows of a table that came just before.

An increment leaves out what its parent has. A row that was dropped since then must not come back from the parent: shards whose
floor is above the parent's vector, or whose vector went down, are in the increment as a whole. In a shard where that happened
while we read, the increment claims no more than its parent did.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

import numpy as np
from numpy.typing import NDArray

from ekko.errors import SnapshotError
from ekko.generations import Generation
from ekko.model import TableSpec
from ekko.snapshots.catalog import Catalog, Entry
from ekko.snapshots.folders import MANIFEST, Folder
from ekko.snapshots.format import (
    CHUNK_BYTES,
    ModelPart,
    SnapshotManifest,
    TablePart,
    checksum_of,
    encode_knowledge,
    encode_manifest,
)
from ekko.snapshots.records import load_record
from ekko.store import layout
from ekko.store.images import FloorImage, KnowledgeImage, ModelImage, StoreImage, changed_shards
from ekko.store.manifest import ModelEntry
from p2p.identity.ledger import NodeRecord

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]
Mask = NDArray[np.bool_]
# Of a core. Some 0.5 to 0.75 s of processor time go into a GB, so that it takes 2 to 3 s, or as long as the disk does.
SHARE = 0.25
REST_S_MIN = 0.001
REST_S_MAX = 0.05

Progress = Callable[[int, int], None]  # (bytes done, bytes that were looked at in all, about)


@dataclass(frozen=True, slots=True)
class Base:
    """What the parent of an increment knew of a model."""

    vector: U64  # [WRITERS_MAX, shards]
    frontiers: U64
    tables: frozenset[int]
    incomplete: U8  # a bit for each shard


class Pace:
    """A share of a core at most.

    Rows come through the same memory, and the same caches, as the daemon's, and what is written to a disk takes the kernel as
    long again. A snapshot has time; what waits for a disk anyway loses none.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._begin = time.monotonic()
        self._used = time.thread_time()

    def keep(self) -> None:
        """Rest for as long as was taken too much."""
        ahead = (time.thread_time() - self._used) / self._share - (time.monotonic() - self._begin)
        if ahead > REST_S_MIN:
            time.sleep(ahead)
        elif ahead < -REST_S_MAX:  # what was not taken is not kept for later
            self._begin, self._used = time.monotonic(), time.thread_time()


class TryAgainError(SnapshotError):
    """The store changed in a way that this one cannot follow, or it has nothing to stand on: a full one may succeed."""


class SnapshotWriter:
    """Writes snapshots of the store in `run_dir` to a folder.

    Args:
        run_dir: of the node; its daemon may run.
        folder: where to.
        node: its id, for people.
        progress: told of each chunk.
        share: of a core that may be taken.
    """

    def __init__(
        self,
        run_dir: Path,
        folder: Folder,
        node: str,
        progress: Progress = lambda done, total: None,
        share: float = SHARE,
    ) -> None:
        self._run_dir = run_dir
        self._folder = folder
        self._node = node
        self._progress = progress
        self._share = share
        self._pace = Pace(share)
        self._buffer: U8 = np.empty(0, np.uint8)
        self._done = self._total = 0

    def write(self, parent: Entry | None = None) -> SnapshotManifest:
        """Write one: a full one, or an increment over `parent`. What fails leaves nothing behind.

        Raises:
            TryAgainError: try again.
            SnapshotError: the folder fails.
            StoreError: there is no store, or a row of it stays locked.
        """
        name = Catalog(self._folder).next_name(time.time_ns() // 1_000_000, token_hex(4))
        try:
            return self._write(name, StoreImage(self._run_dir), parent)
        except BaseException as error:
            with suppress(SnapshotError):  # a disk that is full has other users
                self._folder.remove(name)
            if isinstance(error, FileNotFoundError):
                raise TryAgainError(f"the store in {self._run_dir} was replaced while it was read: try again") from None
            raise

    def _write(self, name: str, store: StoreImage, parent: Entry | None) -> SnapshotManifest:
        before = load_record(self._run_dir)
        entries = store.manifest.models
        bases = {} if parent is None else self._bases(parent, store.manifest.prefix)
        self._done, self._pace = 0, Pace(self._share)
        self._total = sum(store.model(entry).rows_bytes for entry in entries)
        parts = []
        for number, entry in enumerate(entries):
            part = self._write_model(f"{name}/{number}", store, entry, bases.get(entry.generation))
            parts += [] if part is None else [part]
        if store.retired:
            raise TryAgainError(f"the store in {self._run_dir} was replaced while it was read: try again")
        record = load_record(self._run_dir)
        _check_bindings(before, record)
        manifest = SnapshotManifest(
            name,
            int(name[:13]),
            self._node,
            f"{record.cluster:x}",
            store.manifest.prefix,
            [f"{boot:x}" for boot in record.lives],
            None if parent is None else parent.name,
            None if parent is None else parent.checksum,
            parts,
            store.now().registers,
        )
        self._check_files(manifest)
        self._folder.put(f"{name}/{MANIFEST}", encode_manifest(manifest))
        return manifest

    def _check_files(self, manifest: SnapshotManifest) -> None:
        """Refuse to make a snapshot of files that somebody else removed.

        Raises:
            SnapshotError: one is missing, or has another length.
        """
        for part in manifest.models:
            sizes = {table.file: table.rows * table.stride for table in part.tables}
            for file in (*sizes, part.knowledge):
                size = self._folder.size(f"{manifest.name}/{file}")
                if size is not None and size != sizes.get(file, size):
                    raise SnapshotError(
                        f"{self._folder.url}/{manifest.name}/{file} is not as it was written: does another node write there?"
                    )

    def _bases(self, parent: Entry, store: str) -> dict[Generation, Base]:
        """What the parent knew, by model.

        Raises:
            TryAgainError: it is of another memory, or damaged.
        """
        if parent.manifest.store != store:
            raise TryAgainError(f"snapshot {parent.name} is of another memory: an increment over it would miss rows")
        bases = {}
        for part in parent.manifest.models:
            try:
                knowledge, floors = parent.knowledge(self._folder, part)
            except SnapshotError as error:
                raise TryAgainError(str(error)) from None
            tables = frozenset(table.table for table in part.tables)
            bases[part.entry.generation] = Base(knowledge.vector, knowledge.frontiers, tables, floors.incomplete)
        return bases

    def _write_model(self, path: str, store: StoreImage, entry: ModelEntry, base: Base | None) -> ModelPart | None:
        """Write one model; None when it was dropped meanwhile."""
        try:
            # The order of what follows is T5.
            model = store.model(entry)
            knowledge = model.knowledge()
            now = store.entry_now(entry)
            return None if now is None else self._write_known(path, model, now, base, knowledge)
        except FileNotFoundError:
            if store.entry_now(entry) is not None:
                raise
            return None

    def _write_known(
        self, path: str, model: ModelImage, entry: ModelEntry, base: Base | None, knowledge: KnowledgeImage
    ) -> ModelPart:
        whole = np.zeros(entry.shards, np.bool_) if base is None else _whole(base, knowledge, model.floors())
        tables = [self._write_table(path, model, spec, base, whole) for spec in entry.tables]
        floors = model.floors()
        knowledge = _held_back(model, base, knowledge, floors, whole)
        data = encode_knowledge(knowledge, floors)
        file = f"{path.rsplit('/', 1)[-1]}.knowledge"
        self._put_data(f"{path}.knowledge", data)
        # After the rows: who wrote any of them, one that the vector does not know yet too, is bound by now.
        bound = load_record(self._run_dir).bindings
        bindings = [(writer, f"{nonce:x}") for (family, writer), nonce in sorted(bound.items()) if family == model.id]
        return ModelPart(entry, bindings, np.flatnonzero(whole).tolist(), file, checksum_of(data), tables)

    def _put_data(self, path: str, data: bytes) -> None:
        sink = self._folder.create(path)
        sink.write(memoryview(data))
        sink.close()

    def _write_table(self, path: str, model: ModelImage, spec: TableSpec, base: Base | None, whole: Mask) -> TablePart:
        stride = layout.row_stride(spec.row_bytes)
        file = f"{path.rsplit('/', 1)[-1]}-{spec.id:08x}.rows"
        part = TablePart(spec.id, file, stride)
        size = max(stride, CHUNK_BYTES // stride * stride)
        if self._buffer.size < size:
            self._buffer = np.empty(size, np.uint8)
        above = base.vector.T if base is not None and spec.id in base.tables else None
        sink = self._folder.create(f"{path}-{spec.id:08x}.rows")
        try:
            for chunk in model.rows(spec, self._buffer[:size], above, whole):
                part.chunks.append((chunk.size // stride, checksum_of(chunk.data)))
                sink.write(chunk.data)
                self._done += chunk.size
                self._progress(self._done, max(self._total, self._done))
                self._pace.keep()
        except BaseException:
            sink.abandon()
            raise
        sink.close()
        return part


def _whole(base: Base, knowledge: KnowledgeImage, floors: FloorImage) -> Mask:
    """bool[shards]: in which the parent may have rows that were dropped since, or lack older ones that came back (R11)."""
    return changed_shards(base.vector, base.incomplete, knowledge, floors)


def _held_back(
    model: ModelImage, base: Base | None, knowledge: KnowledgeImage, floors: FloorImage, whole: Mask
) -> KnowledgeImage:
    """The knowledge that may be claimed after the rows were read.

    Raises:
        TryAgainError: the vector went down meanwhile: the shard was begun anew.
    """
    now = model.knowledge()
    if (now.vector < knowledge.vector).any():
        raise TryAgainError(f"model {model.entry.name!r} let go of a writer while it was read: try again")
    if base is None:
        return knowledge
    late = (floors.floor > base.vector).any(axis=0) & ~whole
    if not late.any():
        return knowledge
    vector = np.where(late, np.minimum(knowledge.vector, base.vector), knowledge.vector)
    partitions = np.unique(np.flatnonzero(late) % model.entry.partitions)
    frontiers = knowledge.frontiers.copy()
    frontiers[partitions] = np.minimum(frontiers[partitions], base.frontiers[partitions])
    return KnowledgeImage(vector, frontiers)


def _check_bindings(before: NodeRecord, after: NodeRecord) -> None:
    """Refuse a snapshot during which a writer id changed hands.

    Raises:
        TryAgainError: one did.
    """
    for key, nonce in before.bindings.items():
        if after.bindings.get(key, nonce) != nonce:
            raise TryAgainError("a writer id changed hands while the store was read: try again")
