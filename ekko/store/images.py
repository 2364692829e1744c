"""Rows as they lie in the slab, in and out of a store: what snapshots are made of (`ekko.snapshots`).

Out: any process maps a store read-only, as a reader does, and copies rows while the daemon writes them. In: a store that was
begun and is not published yet takes images as they are, straight into its slabs; nobody can see it half full.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ekko.errors import StoreError
from ekko.model import SHARDS_MAX, TableSpec
from ekko.store import layout
from ekko.store.kernels import images
from ekko.store.manifest import CONTROL_NAME, Manifest, ModelEntry, header_name, kernel_boot_id, read_manifest, rows_name
from ekko.store.memory import Mapping, TmpfsMemory
from ekko.store.model_store import ModelStore
from ekko.store.patience import Patience
from ekko.store.table import Table, check_table_file
from p2p.stamps import WRITERS_MAX

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_NO_BASE: U64 = np.empty(0, np.uint64)
_ROWS = layout.TABLE.offset("rows")
_GENERATION = layout.CONTROL.offset("manifest_generation") // 8


@dataclass(frozen=True, slots=True, eq=False)
class KnowledgeImage:
    """What a model knows besides its rows. All stamps are uint64."""

    vector: U64  # [WRITERS_MAX, shards], as it lies in memory
    frontiers: U64  # [partitions, WRITERS_MAX]


@dataclass(frozen=True, slots=True, eq=False)
class FloorImage:
    """What was dropped from a model: its loss floor, and where live rows are among that."""

    floor: U64  # [WRITERS_MAX, shards]
    incomplete: U8  # [SHARDS_MAX // 8], a bit for each shard


def changed_shards(vector: U64, incomplete: U8, knowledge: KnowledgeImage, floors: FloorImage) -> Mask:
    """bool[shards]: in which rows may have been dropped since, or older ones may have come back (R11).

    Args:
        vector: uint64[WRITERS_MAX, shards], as it was then.
        incomplete: as it was then (`FloorImage`).
        knowledge: as it is now.
        floors: likewise, read after it.
    """
    dropped = (floors.floor > vector) | (knowledge.vector < vector)
    completed = np.unpackbits(incomplete & ~floors.incomplete, bitorder="little", count=dropped.shape[1])
    return np.asarray(dropped.any(axis=0) | completed.astype(np.bool_))


class StoreImage:
    """A store of another process, mapped so that writing to it is impossible.

    Raises:
        StoreError: there is none in `run_dir`, or it is of another layout or kernel boot.
        FileNotFoundError: it was replaced just now.
    """

    def __init__(self, run_dir: Path) -> None:
        manifest = read_manifest(run_dir)
        if manifest is None or manifest.boot_id != kernel_boot_id() or manifest.layout_version != layout.LAYOUT_VERSION:
            raise StoreError(f"there is no store of this version of ekko in {run_dir}: start its node")
        self._run_dir = run_dir
        self.manifest: Manifest = manifest
        self._memory = TmpfsMemory(Path(manifest.memory_dir), manifest.prefix)
        self._control = Mapping.open_to_read(self._memory.path(CONTROL_NAME)).view(layout.CONTROL_BYTES)

    @property
    def retired(self) -> bool:
        """Whether another store has taken its place."""
        return self._control[layout.CONTROL.offset("retired") // 8] != 0

    @property
    def generation(self) -> int:
        """Another number than before: there is a new manifest."""
        return self._control[_GENERATION]

    @property
    def memory(self) -> TmpfsMemory:
        """Where its files are."""
        return self._memory

    def model(self, entry: ModelEntry) -> "ModelImage":
        """One of its models. Raises FileNotFoundError when it was dropped."""
        return ModelImage(entry, self._memory)

    def now(self) -> Manifest:
        """What the manifest says by now. Raises FileNotFoundError when it is another store's."""
        manifest = read_manifest(self._run_dir)
        if manifest is None or manifest.prefix != self.manifest.prefix:
            raise FileNotFoundError(self._run_dir)
        return manifest

    def entry_now(self, entry: ModelEntry) -> ModelEntry | None:
        """What it says of this model: all tables of which a row was written before. None: it was dropped."""
        return next((one for one in self.now().models if one.generation == entry.generation), None)


class ModelImage:
    """One model of such a store. Read knowledge, then rows, then floors (T5)."""

    def __init__(self, entry: ModelEntry, memory: TmpfsMemory) -> None:
        self.entry = entry
        self._memory = memory
        self.id = entry.bare_spec.id
        self._header = Mapping.open_to_read(memory.path(header_name(self.id)))

    def knowledge(self) -> KnowledgeImage:
        """Frontiers and vector. Rows that are read afterwards hold what they cover, or newer versions."""
        entry = self.entry
        frontiers = self._header.words(layout.frontiers_offset(entry.shards, entry.partitions), entry.partitions, WRITERS_MAX)
        # The frontiers first: what they say is in the vector by then, too.
        frontiers = frontiers.copy()
        images.after_vector()
        vector = self._header.words(layout.MODEL.offset("vector"), WRITERS_MAX, entry.shards).copy()
        images.after_vector()
        return KnowledgeImage(vector, frontiers)

    def floors(self) -> FloorImage:
        """The loss floor, which covers whatever was dropped before."""
        images.after_vector()
        if not int(self._header.words(layout.MODEL.offset("floor_used"))):
            # Nothing ever was. Its pages are not there yet; looking at them would make some, or kill us where there is no room.
            return FloorImage(np.zeros((WRITERS_MAX, self.entry.shards), np.uint64), np.zeros(SHARDS_MAX // 8, np.uint8))
        floor = self._header.words(
            layout.loss_floor_offset(self.entry.shards, self.entry.partitions), WRITERS_MAX, self.entry.shards
        )
        begin = layout.incomplete_offset(self.entry.shards, self.entry.partitions)
        bits = self._header.words(begin, SHARDS_MAX // 64).copy()
        return FloorImage(floor.copy(), bits.view(np.uint8))

    @property
    def rows_bytes(self) -> int:
        """Bytes of the rows in use, about."""
        total = 0
        for spec in self.entry.tables:
            header = Mapping.open_to_read(self._memory.path(rows_name(self.id, spec.id))).view(layout.PAGE_BYTES)
            total += header[layout.TABLE.offset("rows_used") // 8] * layout.row_stride(spec.row_bytes)
        return total

    def rows(self, spec: TableSpec, buffer: U8, base: U64 | None = None, whole: Mask | None = None) -> Iterator[U8]:
        """Images of a table's rows, in parts that fill `buffer`, which is used again for each.

        Args:
            spec: the table.
            buffer: uint8[n], room for at least one row.
            base: uint64[shards, WRITERS_MAX]; only rows above it. None: all.
            whole: bool[shards]: shards of which all rows are wanted nevertheless.

        Raises:
            StoreError: a row stays locked: the daemon was killed in mid-row.
        """
        mapping = Mapping.open_to_read(self._memory.path(rows_name(self.id, spec.id)))
        check_table_file(spec, mapping)
        stride = layout.row_stride(spec.row_bytes)
        flat = _NO_BASE if base is None else np.ascontiguousarray(base).reshape(-1)
        mask = np.zeros(self.entry.shards, np.bool_) if whole is None else whole
        done = np.zeros(2, np.int64)
        slot, filled, patience = 0, 0, Patience()
        end = images.slots_given_out(mapping.address)
        while slot < end:
            room = buffer[filled * stride :]
            images.copy_images(mapping.address, stride, self.entry.shards, slot, end, flat, mask, room, done)
            slot = int(done[0])
            filled += int(done[1])
            if (filled + 1) * stride > buffer.size:
                yield buffer[: filled * stride]
                filled = 0
            elif slot < end:
                if patience.is_over(slot):
                    raise StoreError(
                        f"slot {slot} of table {spec.name!r} stays locked: its node was killed in mid-row; start it again"
                    )
                time.sleep(0)
        if filled:
            yield buffer[: filled * stride]


class TableFiller:
    """Takes images into an empty table of a store that nobody else uses yet.

    Args:
        table: empty.
        shards: of the model.
        rows: how many images will come at most: the index is made for them.
    """

    def __init__(self, table: Table, shards: int, rows: int) -> None:
        self._table = table
        self._shards = shards
        self._counts = np.zeros(3, np.int64)
        table.reserve(rows)

    @property
    def stamp_max(self) -> int:
        """The largest stamp that came."""
        return int(self._counts[2])

    @property
    def stride(self) -> int:
        """Bytes of an image."""
        return self._table.stride

    def room(self, rows: int) -> memoryview:
        """Where the next so many images are to be read to.

        Raises:
            StoreError: shared memory is full.
        """
        table = self._table
        begin = _ROWS + table.rows_used * table.stride
        table.mapping.ensure(begin + rows * table.stride)
        return table.mapping.bytes(begin, rows * table.stride)

    def settle(self, rows: int, wanted: Mask) -> None:
        """Make rows of the images that were read to `room(rows)`; those of shards that are not wanted are left out.

        Raises:
            StoreError: they are no images. The store must not be used.
        """
        if not self._table.settle(rows, self._shards, wanted, self._counts):
            raise StoreError("what was read are no rows")


def fill_table(model: ModelStore, table_id: int, rows: int) -> TableFiller:
    """See `TableFiller`."""
    table = model.table(table_id)
    assert table.rows_used == 0, "only an empty table is filled"
    return TableFiller(table, model.shards, rows)
