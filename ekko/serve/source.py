"""What a feed reads: one model in a node's shared memory, mapped as a reader maps it, and which of its rows changed."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ModelError, StoreError
from ekko.model import DENSE_SPEC, DENSE_TABLE, TableSpec, TensorSpec
from ekko.serve.consistency import between_batches
from ekko.serve.cursor import Known, Place
from ekko.serve.sink import Batch, Removed
from ekko.serve.tensor import Tensor
from ekko.store import layout
from ekko.store.changes import ChangesView
from ekko.store.images import KnowledgeImage, StoreImage, changed_shards
from ekko.store.kernels.changes import DELETED, LIVE
from ekko.store.manifest import ModelEntry, changes_name, header_name
from ekko.store.memory import Mapping
from ekko.store.view import TableFiles, TableView

U64 = NDArray[np.uint64]
Mask = NDArray[np.bool_]

# How often it is looked whether the ring's file is still the one that is mapped, seconds.
RING_LOOK_S: Final = 1.0

_NO_STAMPS: U64 = np.empty(0, np.uint64)
_STAMP_MAX = layout.MODEL.offset("stamp_max") // 8
_SYNCED_UNTIL = layout.MODEL.offset("synced_until_ms") // 8
_UNSETTLED = layout.MODEL.offset("unsettled") // 8


class Source:
    """One model of the store that is in a `run_dir` now.

    Args:
        run_dir: the node's.
        model: its name.
        tables: those that are fed; None: all.

    Raises:
        StoreError: there is no store, or it cannot be read by this version.
        FileNotFoundError: it was replaced just now, or does not have the model yet.
        ModelError: the model was dropped, or the name is an alias.
    """

    def __init__(self, run_dir: Path, model: str, tables: Sequence[str] | None = None) -> None:
        self.model = model
        self._chosen = None if tables is None else frozenset(tables)
        self._store = StoreImage(run_dir)
        self._generation = self._store.generation
        registers = self._store.now().registers
        if (target := registers.resolve(model)) is not None:
            raise ModelError(f"{model!r} is an alias, of model {target.name!r} now: a sink is of one model; name that one")
        entry = next((one for one in self._store.now().models if one.name == model), None)
        if entry is None:
            if model in registers.dropped:
                raise ModelError(f"model {model!r} was dropped on the node at {run_dir}")
            raise FileNotFoundError(f"the node at {run_dir} does not have model {model!r} yet")
        self.id = entry.bare_spec.id
        self._entry = entry
        self._image = self._store.model(entry)
        header = Mapping.open_to_read(self._store.memory.path(header_name(self.id)))
        self._header_address, self._header = header.address, header.view(layout.PAGE_BYTES)
        self.tables: dict[int, TableView] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self._map(entry)
        self._ring: ChangesView | None = None
        self._ring_looked_s = 0.0
        self._open_ring()

    # --- what there is

    def _map(self, entry: ModelEntry) -> None:
        chosen = self._chosen
        specs = [spec for spec in entry.tables if chosen is None or spec.name in chosen or spec.name == DENSE_TABLE]
        files = {spec.id: TableFiles(self._store.memory, self.id, spec.id) for spec in specs}
        held = self.tables
        self.tables = {
            spec.id: held[spec.id] if spec.id in held else TableView(spec, files[spec.id], counted=False) for spec in specs
        }
        self.tensors = {spec.name: spec for spec in entry.tensors}
        self._entry = entry

    @property
    def retired(self) -> bool:
        """Whether another store has taken this one's place, so that another `Source` is to be made."""
        return self._store.retired

    def refresh(self) -> bool:
        """See which tables there are by now; False: nothing is new.

        Raises:
            FileNotFoundError: the store was replaced, or the model dropped.
        """
        generation = self._store.generation
        if generation == self._generation:
            return False
        entry = self._store.entry_now(self._entry)
        if entry is None:
            raise FileNotFoundError(self.model)
        self._map(entry)
        self._generation = generation
        return True

    @property
    def specs(self) -> dict[str, TableSpec]:
        """Name -> table, `_dense` left out."""
        return {view.spec.name: view.spec for view in self.tables.values() if view.spec.name != DENSE_TABLE}

    @property
    def shards(self) -> int:
        """Of the model."""
        return self._entry.shards

    @property
    def stamp_max(self) -> int:
        """No row has a larger stamp."""
        return self._header[_STAMP_MAX]

    def synced_since(self, unix_ms: int) -> bool:
        """Whether the node has everything that was published up to this moment, so that what it lacks is not to come."""
        return self._header[_SYNCED_UNTIL] >= unix_ms and not self._header[_UNSETTLED]

    # --- which rows changed

    def _open_ring(self) -> None:
        path = self._store.memory.path(changes_name(self.id))
        self._ring_looked_s = time.monotonic()
        try:
            if self._ring is None or not self._ring.is_of(path):
                self._ring = ChangesView(Mapping.open_to_read(path))
        except FileNotFoundError:
            self._ring = None
            self._store.now()  # its memory may have been taken away without a word: then this is told, and there is another one

    @property
    def capacity(self) -> int:
        """Entries that the ring holds."""
        return 0 if self._ring is None else self._ring.capacity

    def place(self) -> Place:
        """Where the ring is now. Raises FileNotFoundError: the store was replaced."""
        if time.monotonic() - self._ring_looked_s > RING_LOOK_S:
            self._open_ring()
        ring, store = self._ring, self._store.manifest.prefix
        return Place(store, self.id) if ring is None else Place(store, self.id, ring.breaks, ring.head)

    def changes(self, position: int, out: U64) -> int | None:
        """As `ChangesView.read`."""
        return None if self._ring is None else self._ring.read(position, out)

    def known(self) -> Known:
        """What the node knows; rows that are read and changes that are asked for afterwards have all that it covers."""
        vector = self._image.knowledge().vector
        return Known(vector, self._image.floors().incomplete)

    def whole_since(self, known: Known, now: Known) -> Mask:
        """bool[shards]: in which rows may have gone since, or may have come back in a version that is known.

        A floor does not tell of a row that was evicted, which is older than what it says already; only that there were such.
        """
        floors = self._image.floors()
        changed = changed_shards(known.vector, known.incomplete, KnowledgeImage(now.vector, _NO_STAMPS), floors)
        evicted = np.unpackbits(floors.incomplete, bitorder="little", count=self.shards)
        return np.asarray(changed | evicted.astype(np.bool_))

    @property
    def expires(self) -> bool:
        """Whether rows go without a trace of when: those that have expired."""
        return any(view.spec.ttl_s for view in self.tables.values())

    # --- rows

    def read(self, table: int, keys: U64, came_back: U64) -> Batch:
        """What became of some keys.

        Args:
            table: the table's id.
            keys: uint64[n], each once.
            came_back: those of them that were dropped since they were read last, and may be here in an older version.

        Raises:
            StoreError: a row stays locked: its node was killed in mid-row.
        """
        view = self.tables[table]
        newest = self.stamp_max  # before the rows: what is absent went at or before it
        rows, stamps = np.empty((keys.size, view.spec.dim), np.float32), np.empty(keys.size, np.uint64)
        view.lookup(keys, rows, stamps)
        live = stamps != 0
        if live.all():
            return Batch(view.spec.name, keys, rows, stamps, forgotten=_forgotten(came_back, newest))
        missing = keys[~live]
        kinds, there = view.without_row(missing)
        # A live row has expired, or has come since: then it is noted, and read again.
        expired = (kinds == LIVE) & (there < view.spec.stamp_min(int(time.time() * 1000)))
        deleted = kinds == DELETED
        gone = missing[~deleted & ((kinds != LIVE) | expired)]
        return Batch(
            view.spec.name,
            keys[live],
            rows[live],
            stamps[live],
            Removed(missing[deleted], there[deleted]),
            _forgotten(np.union1d(gone, came_back), newest),
        )

    def tensor(self, name: str) -> Tensor | None:
        """A dense tensor, of one version if the node lets it be read between two batches; None: there is none."""
        view, spec = self.tables.get(DENSE_SPEC.id), self.tensors.get(name)
        if view is None or spec is None:
            return None
        tensor = Tensor(spec)
        try:
            between_batches(self.model, self._header_address, lambda: tensor.read(view))
        except StoreError:  # batches follow each other: what is written now is noted, and read again
            tensor.read(view)
        return tensor


def _forgotten(keys: U64, stamp: int) -> Removed:
    return Removed(keys, np.full(keys.size, stamp, np.uint64))
