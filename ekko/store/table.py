"""One table's memory as its only writer sees it: rows, index, and how both grow.

Growth copies no row. The rows file is mapped at its final length and given pages as rows come. The index is built anew beside
the one in use, a few thousand rows with each apply, so that no single call pays for it; when the new one holds every row, the
generation word in the table's header switches readers over. It is twice as large, or, when much of the old one is entries that
were removed, as large as that.

What is kept of rows for later is where they are: a place (`ekko.store.kernels.places`), which notices when its slot was freed.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ekko.errors import MemoryFullError, StoreError
from ekko.model import CODECS, TableSpec
from ekko.store import layout
from ekko.store.kernels import images, rows
from ekko.store.kernels import index as index_kernels
from ekko.store.kernels.atomics import publish_word, watch_word
from ekko.store.kernels.movement import movement
from ekko.store.kernels.places import SLOTS_MAX, to_places
from ekko.store.memory import Mapping, Memory
from ekko.store.recent import RecentRows
from ekko.store.slices import THREAD_BYTES_MIN, let_go

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

# Pages are asked for in steps: as many bytes as there are already, between these. Zeroing 1 MiB takes well below a millisecond.
EXTENT_BYTES_MIN = 1 << 16
EXTENT_BYTES_MAX = 1 << 20

INDEX_LOG2_MIN = 8
# Work on a larger index begins at the first load and must be done at the second. At most 75 % of the places taken keeps the
# mean search of a present key below 2.5 places, and of an absent one below 9, which lie in two cache lines (Knuth, volume 3,
# 6.4). A lower load buys little: the smaller index misses the processor's translation caches less often.
INDEX_LOAD_BEGIN = 0.60
INDEX_LOAD_MAX = 0.75
# Up to this load of keys alone, the next index is as large as this one: cleaning then makes room for a quarter of the load at
# which it is due, and costs three rows moved for each that comes.
INDEX_LOAD_CLEAN = 0.45
# Work per apply while the index grows, in proportion to the rows inserted, so that it is done before the load limit: the pages
# of the larger index (16 bytes per old place) are there after 1/16 of the old capacity came in, and at 10 rows moved per row
# inserted, the 0.66 held by then are moved while 0.074 comes in: 0.60 + 0.063 + 0.074 < 0.75.
GROWTH_ROWS_PER_INSERT = 10
GROWTH_ROWS_MIN = 8_192
GROWTH_BYTES_PER_INSERT = 256
GROWTH_BYTES_MIN = 1 << 20
# So long a file of an index is kept after it was replaced: longer than readers that are at work, so that none has to free it.
KEEP_S = 1.0

_NO_STAMPS: U64 = np.empty(0, np.uint64)
_ROWS = layout.TABLE.offset("rows")


def index_log2_for(rows_count: int) -> int:
    """The smallest index that takes this many rows without growing."""
    log2 = INDEX_LOG2_MIN
    while rows_count > INDEX_LOAD_BEGIN * (1 << log2):
        log2 += 1
    return log2


@dataclass(slots=True)
class Index:
    """One generation of the index."""

    generation: int
    capacity_log2: int
    mapping: Mapping
    address: int = field(init=False)
    rows_max: int = field(init=False)  # how many rows it takes
    _removed: U64 = field(init=False, repr=False)  # a live view: making one costs more than reading it

    def __post_init__(self) -> None:
        self.address = self.mapping.address
        self.rows_max = int(INDEX_LOAD_MAX * (1 << self.capacity_log2))
        self._removed = self.mapping.words(layout.INDEX.offset("removed"))

    @property
    def removed(self) -> int:
        """Entries that are taken by no key."""
        return int(self._removed)


def open_index(mapping: Mapping, generation: int) -> Index:
    """Understand a mapped index file.

    Raises:
        StoreError: it is not an index of this layout.
    """
    words = mapping.words(0, 4)
    capacity_log2 = int(words[layout.INDEX.offset("capacity_log2") // 8])
    if (
        int(words[0]) != layout.INDEX_MAGIC
        or int(words[1]) != layout.LAYOUT_VERSION
        or int(words[2]) != generation
        or len(mapping) < layout.index_bytes(capacity_log2)
    ):
        raise StoreError("an index file is damaged, or of another version of ekko")
    return Index(generation, capacity_log2, mapping)


def check_table_file(spec: TableSpec, mapping: Mapping) -> None:
    """Refuse a mapped rows file that is not of this table and layout.

    Raises:
        StoreError: it is not.
    """
    stride = layout.row_stride(spec.row_bytes)
    expected = (layout.TABLE_MAGIC, layout.LAYOUT_VERSION, spec.id, spec.row_bytes, stride, CODECS[spec.codec].number)
    if tuple(int(word) for word in mapping.words(0, len(expected))) != expected:
        raise StoreError(f"the rows file of table {spec.name!r} is damaged, or of another version of ekko")


class Table:
    """Rows and index of one table. One thread of one process writes.

    Args:
        spec: what a row is.
        memory: where the files are.
        rows_name: name of the rows file.
        index_name: name of the index file of a generation.
        undo: address of the undo record.
        recent: its update cache, empty.
    """

    def __init__(
        self,
        spec: TableSpec,
        memory: Memory,
        rows_name: str,
        index_name: Callable[[int], str],
        undo: int,
        recent: RecentRows,
    ) -> None:
        self.spec = spec
        self.recent = recent
        self.row_bytes = spec.row_bytes
        self.stride = layout.row_stride(spec.row_bytes)
        self._id = spec.id
        self._memory = memory
        self._rows_name = rows_name
        self._index_name = index_name
        self._undo = undo
        self._next: Index | None = None
        self._next_ensured = 0
        self._next_rows = 0
        self._full_at = -1  # slots in use when there was no memory for more
        self._free = np.empty(0, np.int64)  # slots; those that the header counts are at the beginning

    def create(self, bytes_max: int, capacity_rows: int) -> None:
        """Make the files."""
        self._attach(self._memory.create(self._rows_name, bytes_max))
        self.mapping.ensure(layout.PAGE_BYTES)
        self._word("magic")[...] = layout.TABLE_MAGIC
        self._word("layout_version")[...] = layout.LAYOUT_VERSION
        self._word("table")[...] = self.spec.id
        self._word("row_bytes")[...] = self.spec.row_bytes
        self._word("row_stride")[...] = self.stride
        self._word("codec")[...] = CODECS[self.spec.codec].number
        self.index = self._create_index(1, index_log2_for(capacity_rows))
        self.index.mapping.ensure(len(self.index.mapping))
        publish_word(self._generation_address, 1)

    def open(self) -> None:
        """Attach to existing files; repair what a killed writer left.

        Raises:
            StoreError: the files are damaged or do not fit the table.
        """
        self._attach(self._memory.open(self._rows_name))
        check_table_file(self.spec, self.mapping)
        generation = watch_word(self._generation_address)
        publish_word(self._ahead_address, generation)  # the next index of a writer that was killed goes with it
        self.index = open_index(self._memory.open(self._index_name(generation)), generation)
        # Asking for pages that are there took longest of all in a restart (0.13 s for 1 GB).
        self.index.mapping.find(len(self.index.mapping))
        self.mapping.find(_ROWS + self.rows_used * self.stride)
        self._mend()

    def _attach(self, mapping: Mapping) -> None:
        self.mapping = mapping
        self._rows_used = self._word("rows_used")
        self._tombstones = self._word("tombstones")
        self._free_slots = self._word("free")
        self._generation_address = mapping.address + layout.TABLE.offset("index_generation")
        self._ahead_address = mapping.address + layout.TABLE.offset("index_ahead")

    def _word(self, name: str) -> U64:
        return self.mapping.words(layout.TABLE.offset(name))

    def _mend(self) -> None:
        """Repair what a writer was at when it was killed: a row, and what index, counts and DVV say of it."""
        address, index = self.mapping.address, self.index
        for slot in (rows.undo(address, self.stride, self._undo, self._id), self.rows_used - 1):
            if slot >= 0:
                rows.mend(address, self.stride, index.address, index.capacity_log2, slot)
        free = np.empty(self.free + 1, np.int64)  # it was killed at one slot
        if rows.survey(address, self.stride, self.recent.shards, *self.recent.dvv_addresses, free) > free.size:
            raise StoreError(f"the rows file of table {self.spec.name!r} is damaged: it has more free slots than it says")
        self._free = free

    @property
    def rows_used(self) -> int:
        """Slots given out so far, those of tombstones and those that are free by now included."""
        return int(self._rows_used)

    @property
    def free(self) -> int:
        """Slots that are free."""
        return int(self._free_slots)

    @property
    def slots_reused(self) -> int:
        """How often a free slot was given to a key."""
        return int(self._word("slots_reused"))

    @property
    def tombstones(self) -> int:
        """Rows that are deleted."""
        return int(self._tombstones)

    @property
    def memory_bytes(self) -> int:
        """Bytes of rows and index in use."""
        return self.rows_used * self.stride + layout.index_bytes(self.index.capacity_log2)

    def resolve(self, keys: U64) -> I64:
        """int64[n]: the place of each key, -1 where it is absent."""
        return self.places(self._slots_of(keys))

    def _slots_of(self, keys: U64) -> I64:
        slots = np.empty(keys.size, np.int64)
        index, mapping = self.index, self.mapping
        index_kernels.resolve_rows(index.address, index.capacity_log2, mapping.address, self.stride, keys, slots)
        return slots

    def places(self, slots: I64) -> I64:
        """The places that these slots are now, in the same array; -1 for what is negative."""
        to_places(self.mapping.address, self.stride, slots)
        return slots

    def apply(self, keys: U64, data: U8, stamps: U64 | None, stamp: int, counts: I64) -> None:
        """Write what is newer than what is held; `counts` (written, inserted, stale) is added to.

        Raises:
            MemoryFullError: shared memory is full; not after `have_room` for these keys. Rows before that point are written,
                each whole.
        """
        inserted_before = int(counts[rows.INSERTED])
        stamps = _NO_STAMPS if stamps is None else stamps
        written = np.empty(keys.size, np.int64)
        done = 0
        while True:
            begin, free = done, self.free
            done = rows.apply(
                self.mapping.address,
                self._id,
                self.stride,
                self.row_bytes,
                self._rows_max,
                self.index.address,
                self.index.capacity_log2,
                self.index.rows_max,
                self._undo,
                self._free.ctypes.data,
                keys,
                data,
                stamps,
                stamp,
                begin,
                written,
                counts,
            )
            if free and self._is_filling:
                self._enter(self._free[self.free : free])
            if begin == 0 and done == keys.size:  # as a rule
                self.recent.record(written, keys, stamps, stamp, self.rows_used)
                break
            self.recent.record(written[begin:done], keys[begin:done], stamps[begin:done], stamp, self.rows_used)
            if done == keys.size:
                break
            self._make_room()
        inserted = int(counts[rows.INSERTED]) - inserted_before
        if inserted:
            with suppress(MemoryFullError):  # all rows are stored; a full memory counts when the next index is needed
                self._grow_index(inserted)

    def present(self, keys: U64) -> NDArray[np.bool_]:
        """bool[n]: whether there is a version of each key, if only that it is deleted."""
        return self._slots_of(keys) >= 0

    def movement(self, keys: U64, data: U8) -> tuple[NDArray[np.float32], U64]:
        """How far rows are from what is stored, before they are applied.

        Args:
            keys: uint64[n].
            data: uint8[live, row_bytes], of the first keys; the others are to be deleted.

        Returns:
            float32[n], the sum of the magnitudes of the differences, absent rows being zeros; uint64[n], the stamps of what is
            stored, 0 where the key is absent or deleted.
        """
        moved, before = np.empty(keys.size, np.float32), np.empty(keys.size, np.uint64)
        codec, dim = CODECS[self.spec.codec].number, self.spec.dim
        index, mapping = self.index, self.mapping
        data = data if len(data) else np.empty((0, self.spec.row_bytes), np.uint8)
        place = (index.address, index.capacity_log2, mapping.address, self.stride)
        movement(*place, codec, dim, keys, data, moved, before)
        return moved, before

    def remove(self, places: I64) -> int:
        """Forget the rows at these places, and free their slots; returns how many there were.

        Places that are not current any more, and -1, are passed. Nothing is left of the rows here: whoever removes has merged
        their stamps into the loss floor before (R5, R11).
        """
        places = np.ascontiguousarray(places[places >= 0], np.int64)
        keys, stamps = np.empty(places.size, np.uint64), np.empty(places.size, np.uint64)
        if self._free.size < self.free + places.size:
            self._free = np.concatenate((self._free[: self.free], np.empty(self.free + places.size, np.int64)))
        filled = self._next if self._is_filling else None
        count: int = rows.remove(
            self.mapping.address,
            self._id,
            self.stride,
            self.index.address,
            self.index.capacity_log2,
            0 if filled is None else filled.address,
            0 if filled is None else filled.capacity_log2,
            self._undo,
            self._free.ctypes.data,
            places,
            keys,
            stamps,
        )
        self.recent.remove(keys[:count], stamps[:count])
        return count

    @property
    def _rows_max(self) -> int:
        return min(max(0, (self.mapping.ensured - _ROWS) // self.stride), SLOTS_MAX)

    @property
    def _taken(self) -> int:
        """Entries of the index that are not empty."""
        return self.rows_used - self.free + self.index.removed

    @property
    def _is_filling(self) -> bool:
        """Whether the next index has entries already."""
        return self._next is not None and self._next_rows > 0

    def _enter(self, slots: I64) -> None:
        """Enter rows into the next index that came to slots which it is past."""
        assert self._next is not None
        index_kernels.insert_slots(self._next.address, self._next.capacity_log2, self.mapping.address, self.stride, slots)

    def _make_room(self) -> None:
        """The next row does not fit: give the rows file more pages, or finish the next index now."""
        used = self.rows_used
        if used >= self._rows_max and not self.free:
            if used == SLOTS_MAX:
                raise self._no_slots()
            self._ensure_rows(1)
        if self._taken >= self.index.rows_max:
            self._enlarge_index(1)

    def have_room(self, keys: U64, new_max: int | None = None) -> None:
        """Have memory for all of these keys, of which at most `new_max` new ones will be kept: `apply` finds room for them.

        Raises:
            MemoryFullError: there is none. The rows are as they were; room that was made stays, for later rows.
        """
        most = keys.size if new_max is None else min(keys.size, new_max)
        if self._has_room(most) or (new_max is None and self._has_pages_for(most)):  # even if all are new: as a rule
            return
        new = int(np.count_nonzero(self._slots_of(keys) < 0))
        new = new if new_max is None else min(new, new_max)
        if self._has_room(new):
            return
        if self.rows_used + new - self.free > SLOTS_MAX:
            raise self._no_slots()
        try:
            self._enlarge_index(new)
        except MemoryFullError:
            if self._next is not None:  # what there is of it is memory that others can use
                publish_word(self._ahead_address, self.index.generation)
                self._memory.remove(self._index_name(self._next.generation))
                self._next = None
            raise
        if self._rows_max < self.rows_used + new - self.free:
            self._ensure_rows(new - self.free)

    def _has_room(self, new: int) -> bool:
        """Whether so many more keys fit into the pages and the index that there are."""
        return self.rows_used + new - self.free <= self._rows_max and self._taken + new <= self.index.rows_max

    def _has_pages_for(self, new: int) -> bool:
        """Have pages for so few keys whether or not they are new, once, where the index takes them: looking keys up to see
        that none is would cost each step of a table that does not grow any more what these pages cost once.
        """
        missing, used = new - self.free, self.rows_used
        if missing * self.stride > EXTENT_BYTES_MAX or self._taken + new > self.index.rows_max or used == self._full_at:
            return False
        try:
            self._ensure_rows(missing)
        except MemoryFullError:  # not asked again before the table has grown
            self._full_at = used
            return False
        return self._has_room(new)

    def _no_slots(self) -> MemoryFullError:
        return MemoryFullError(f"table {self.spec.name!r} has {SLOTS_MAX} rows, and there is no room for more in one table")

    def _ensure_rows(self, more: int) -> None:
        """Have pages for so many rows behind the last one, and for a few more while there is memory."""
        used = self.rows_used * self.stride
        needed, extent = more * self.stride, min(max(used, EXTENT_BYTES_MIN), EXTENT_BYTES_MAX)
        if needed < extent:
            with suppress(MemoryFullError):
                self.mapping.ensure(_ROWS + used + extent)
        self.mapping.ensure(_ROWS + used + needed)

    def _enlarge_index(self, new: int) -> None:
        """Have an index that takes so many more keys, now."""
        while self._taken + new > self.index.rows_max:
            if self._next is None:
                self._begin_index(new)
            while self._next is not None:
                self._grow_index(self.rows_used)

    def _create_index(self, generation: int, capacity_log2: int) -> Index:
        name = self._index_name(generation)
        mapping = self._memory.create(name, layout.index_bytes(capacity_log2))
        mapping.ensure(layout.PAGE_BYTES)
        words = mapping.words(0, 4)
        words[...] = (layout.INDEX_MAGIC, layout.LAYOUT_VERSION, generation, capacity_log2)
        return Index(generation, capacity_log2, mapping)

    def _begin_index(self, new: int = 0) -> None:
        keys = self.rows_used - self.free
        crowded = keys > INDEX_LOAD_CLEAN * (1 << self.index.capacity_log2)
        capacity_log2 = max(self.index.capacity_log2 + crowded, index_log2_for(keys + new))
        self._next = self._create_index(self.index.generation + 1, capacity_log2)
        self._next_ensured = layout.PAGE_BYTES
        self._next_rows = 0

    def _grow_index(self, inserted: int) -> None:
        """Do a step of the work on the next index, if there is any: first its pages, then its entries, then the switch."""
        if self._next is None:
            if self._taken < INDEX_LOAD_BEGIN * (1 << self.index.capacity_log2):
                return
            self._begin_index()
        following = self._next
        assert following is not None
        if self._next_ensured < len(following.mapping):
            step = max(GROWTH_BYTES_MIN, GROWTH_BYTES_PER_INSERT * inserted)
            following.mapping.ensure(min(self._next_ensured + step, len(following.mapping)))
            self._next_ensured = min(self._next_ensured + step, len(following.mapping))
            if self._next_ensured == len(following.mapping) >= THREAD_BYTES_MIN:
                publish_word(self._ahead_address, following.generation)
            return
        end = min(self._next_rows + max(GROWTH_ROWS_MIN, GROWTH_ROWS_PER_INSERT * inserted), self.rows_used)
        index_kernels.insert_rows(
            following.address, following.capacity_log2, self.mapping.address, self.stride, self._next_rows, end
        )
        self._next_rows = end
        if end == self.rows_used:
            self._switch_index(following)

    def _switch_index(self, following: Index) -> None:
        """From here on readers use this index; those that have the old one mapped lose nothing by finishing with it."""
        old = self.index
        self.index, self._next = following, None
        publish_word(self._generation_address, following.generation)
        self._memory.remove(self._index_name(old.generation))
        if old.mapping.is_file:  # a simulated node has no threads
            let_go(old.mapping, KEEP_S)

    def index_names(self) -> list[str]:
        """Names of the files of its index, and of the next one."""
        indexes = [self.index] if self._next is None else [self.index, self._next]
        return [self._index_name(index.generation) for index in indexes]

    def let_go(self) -> None:
        """It was dropped: freeing many gigabytes takes seconds, and is left to other threads."""
        for mapping in (self.mapping, self.index.mapping, *(() if self._next is None else (self._next.mapping,))):
            if mapping.is_file:  # a simulated node has no threads
                let_go(mapping, KEEP_S)

    def reserve(self, rows_count: int) -> None:
        """Have an index that takes so many rows, in a table that is empty."""
        if index_log2_for(rows_count) > self.index.capacity_log2:
            larger = self._create_index(self.index.generation + 1, index_log2_for(rows_count))
            larger.mapping.ensure(len(larger.mapping))
            self._switch_index(larger)

    def settle(self, count: int, shards: int, wanted: NDArray[np.bool_], counts: I64) -> bool:
        """Make rows of images that lie behind the last row; see `ekko.store.images`. False: they are none."""
        begin = self.rows_used
        place = self.mapping.address, self.stride, begin, begin + count, self.index.address, self.index.capacity_log2
        done = images.settle_images(*place, shards, wanted, *self.recent.dvv_addresses, counts)
        return bool(done == 0)

    def read(self, places: I64) -> tuple[U64, U8, U64]:
        """Keys, encoded rows of the live ones, and stamps; live ones first. Places that are not current are left out."""
        ordered = np.empty(places.size, np.int64)
        live = rows.order_live_first(self.mapping.address, self.stride, places, ordered)
        if ordered.size and ordered.min() < 0:
            ordered = ordered[ordered >= 0]
        keys, stamps = np.empty(ordered.size, np.uint64), np.empty(ordered.size, np.uint64)
        data = np.empty((live, self.spec.row_bytes), np.uint8)
        rows.read(self.mapping.address, self.stride, self.spec.row_bytes, ordered, keys, data, stamps)
        return keys, data, stamps

    def heads(self, slots: I64) -> tuple[U64, U64]:
        """Keys and stamps of rows, by slot."""
        keys, stamps = np.empty(slots.size, np.uint64), np.empty(slots.size, np.uint64)
        rows.read(self.mapping.address, self.stride, self.spec.row_bytes, slots, keys, np.empty((0, 0), np.uint8), stamps)
        return keys, stamps

    def changed_since(self, base: U64, shards: int, *, measured: bool = True) -> I64:
        """Places of all rows above the flattened vector, in no particular order: from the update cache, or by a scan.

        `measured`: a peer asks, and the cache is to learn how far back peers look.
        """
        recent = self.recent.select(base, self.mapping.address, self.stride, measured=measured)
        return self.scan(base, shards) if recent is None else recent

    def cached_since(self, base: U64) -> I64 | None:
        """`changed_since` where the update cache tells it, not measured; None: only a scan does."""
        return self.recent.select(base, self.mapping.address, self.stride, measured=False)

    def scan(self, base: U64, shards: int, begin: int = 0, end: int | None = None) -> I64:
        """`changed_since` by looking at every row, or at those of the slots from `begin` to `end`."""
        end = self.rows_used if end is None else min(end, self.rows_used)
        out = np.empty(end - begin, np.int64)
        count = rows.changed_since(self.mapping.address, self.stride, base, shards, begin, end, out)
        return out[:count].copy()

    def without(self, places: I64, known: U64, bits: U8, shards: int, partitions: int) -> I64:
        """Those of the places whose rows are not of known steps; of a partition, whose bits are one for each of its shards."""
        out = np.empty(places.size, np.int64)
        count = rows.without(self.mapping.address, self.stride, shards, partitions, known, bits, places, out)
        return out[:count].copy()

    def add_digest(self, places: I64, sums: U64) -> None:
        """Add the digest of these rows to `sums`, uint64[2]."""
        rows.digest(self.mapping.address, self.stride, self.spec.id, places, sums)
