"""The update cache of one table: which rows changed lately, so that finding them costs what changed and not what there is.

Two parts, in the memory of this process (rebuilt when a store is attached):

- A ring of changes, oldest first: (slot, shard, stamp) of each row version that was written here.
- DVV, the dominator version vector of the paper (Ekko, OSDI '22, section 4.4.1): per writer and shard, a stamp that no row
  which is missing from the ring exceeds.

An asker whose vector dominates DVV lacks no row outside the ring (theorem T4): its answer is a walk along the ring. Anyone else
costs a scan of the table. A row that changed again has a younger entry further on, and its older entries no longer carry the
row's stamp: since stamps of a row only grow, and no two versions of it share one, exactly one entry of a row counts.

The ring is pruned from its old end. What leaves it is merged into DVV, and raises a threshold of its writer, below which rows
are not worth caching: a writer's clock decides only about that writer's rows (R14). How much to keep is counted in changes:
that needs no clock. It is some times as far back as askers lately had to look, and twice as much after misses.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ekko.model import SHARDS_MAX
from ekko.store import layout
from ekko.store.atomics import load_i64, load_u64, prefetch_near, store_i64, store_u64
from ekko.store.compile import Int, inline_kernel, kernel
from ekko.store.index import mix64
from p2p.stamps import WRITERS_MAX

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

# Changes that a ring keeps, 16 bytes each. The smallest is walked in a few microseconds, less than asking for an answer costs;
# the largest (16 MiB) in a millisecond or two, and holds a second of the fastest stream of rows.
WINDOW_MIN = 1 << 12
WINDOW_START = 1 << 16
WINDOW_MAX = 1 << 20
# A ring begins this long and doubles: a simulation has thousands of tables of a few rows.
RING_START = 1 << 8
# After so many answers the window is chosen anew, as this many times the furthest that any of them had to look back. A scan
# costs as much as a thousand answers from the ring, so one asker in a thousand that is late decides: were the window to follow
# the quick ones only, each late one would cost a scan, and by that make others late.
ADAPT_REQUESTS = 1 << 10
ADAPT_HEADROOM = 4

_ENTRY_BYTES = 16
_ENTRY_STAMP = 8
_PLACE_BITS = np.uint64(48)  # of slot in an entry's first word; the shard is above it
_SLOT_MASK = np.uint64((1 << 48) - 1)
assert SHARDS_MAX <= 1 << 64 - 48
_NONE = np.uint64(0)  # below every stamp
# Above every stamp: what is asked with for shards that are not wanted.
ABOVE_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_WRITER_MASK = np.uint64(WRITERS_MAX - 1)
_ROWS = layout.TABLE.offset("rows")
_STAMP = layout.ROW.offset("stamp")
_KEY = layout.ROW.offset("key")
_PREFETCH_ROWS = 32

# Words of a cache's state: changes ever recorded, ever dropped, and left out at once; how far back the last answer looked.
_HEAD, _TAIL, _LEFT_OUT, _DEPTH = range(4)
# What `_compare` says of an asker's vector.
_KNOWS_NOTHING, _BEHIND, _DOMINATES = range(3)

# The kernels get addresses, as those over rows do: an array handed to a helper costs its reference count, an atomic operation,
# each time (measured: 200 ns a row). What is at them:
#   ring        {slot | shard << 48, stamp} for each entry; the length is a power of two
#   dvv         uint64[4096, shards], by writer
#   thresholds  uint64[4096], by writer
#   writers     int64: how many writers DVV has; then their ids


@inline_kernel
def _list_writer(writers: Int, writer: Int) -> None:
    count = load_i64(writers)
    for i in range(1, count + 1):
        if load_i64(writers + 8 * i) == writer:
            return
    store_i64(writers + 8 * (count + 1), writer)
    store_i64(writers, count + 1)


@inline_kernel
def _merge(stamp: Int, shard: Int, shards: Int, dvv: Int, writers: Int) -> None:
    """A row with this stamp is not in the ring."""
    writer = np.int64(stamp & _WRITER_MASK)
    place = dvv + (writer * shards + shard) * 8
    bound = load_u64(place)
    if stamp > bound:
        if bound == _NONE:
            _list_writer(writers, writer)
        store_u64(place, stamp)


@inline_kernel
def _drop(entry: Int, shards: Int, dvv: Int, thresholds: Int, writers: Int) -> None:
    """Leave an entry to DVV. Its row may have a younger one: DVV is a bound, and may be too high."""
    stamp = load_u64(entry + _ENTRY_STAMP)
    _merge(stamp, np.int64(load_u64(entry) >> _PLACE_BITS), shards, dvv, writers)
    threshold = thresholds + np.int64(stamp & _WRITER_MASK) * 8
    store_u64(threshold, max(load_u64(threshold), stamp))


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64[::1])")
def _prune(keep: Int, ring: Int, mask: Int, shards: Int, dvv: Int, thresholds: Int, writers: Int, state: I64) -> None:
    """Drop the oldest entries until `keep` are left."""
    tail = max(state[_TAIL], state[_HEAD] - keep)
    for entry in range(state[_TAIL], tail):
        _drop(ring + (entry & mask) * _ENTRY_BYTES, shards, dvv, thresholds, writers)
    state[_TAIL] = tail


@kernel(
    "void(int64[::1], Array(uint64, 1, 'C', readonly=True), Array(uint64, 1, 'C', readonly=True), uint64, int64, int64, int64, "
    "int64, int64, int64, int64, int64[::1])"
)
def _record(
    slots: I64,
    keys: U64,
    stamps: U64,
    stamp: Int,
    room: Int,
    ring: Int,
    mask: Int,
    shards: Int,
    dvv: Int,
    thresholds: Int,
    writers: Int,
    state: I64,
) -> None:
    """Enter the rows just written (slot >= 0); `stamps` is empty when all carry `stamp`."""
    head, tail, left_out = state[_HEAD], state[_TAIL], 0
    for i in range(slots.size):
        if slots[i] < 0:
            continue
        shard = np.int64(mix64(keys[i]) % np.uint64(shards))
        row_stamp = stamps[i] if stamps.size else stamp
        threshold = thresholds + np.int64(row_stamp & _WRITER_MASK) * 8
        if row_stamp > load_u64(threshold):
            while head - tail >= room:
                _drop(ring + (tail & mask) * _ENTRY_BYTES, shards, dvv, thresholds, writers)
                tail += 1
        if row_stamp > load_u64(threshold):  # again: what was dropped may have been younger
            entry = ring + (head & mask) * _ENTRY_BYTES
            store_u64(entry, np.uint64(slots[i]) | np.uint64(shard) << _PLACE_BITS)
            store_u64(entry + _ENTRY_STAMP, row_stamp)
            head += 1
        else:
            _merge(row_stamp, shard, shards, dvv, writers)
            left_out += 1
    state[_HEAD], state[_TAIL] = head, tail
    state[_LEFT_OUT] += left_out


@kernel("void(int64, int64, int64, int64, int64, int64)")
def _load(table: Int, stride: Int, rows_used: Int, shards: Int, dvv: Int, writers: Int) -> None:
    """Merge the stamps of all rows."""
    rows = table + _ROWS
    for slot in range(rows_used):
        row = rows + slot * stride
        prefetch_near(row + _PREFETCH_ROWS * stride)
        shard = np.int64(mix64(load_u64(row + _KEY)) % np.uint64(shards))
        _merge(load_u64(row + _STAMP), shard, shards, dvv, writers)


@kernel("int64(Array(uint64, 1, 'C', readonly=True), int64, int64, int64)")
def _compare(base: U64, shards: Int, dvv: Int, writers: Int) -> Int:
    """Does the flattened vector uint64[shards * 4096] dominate DVV? Else: does it know anything of DVV's writers?"""
    dominates = True
    knows = False
    for i in range(1, load_i64(writers) + 1):
        writer = load_i64(writers + 8 * i)
        for shard in range(shards):
            known = base[shard * WRITERS_MAX + writer]
            dominates &= known >= load_u64(dvv + (writer * shards + shard) * 8)
            knows |= known != _NONE and known != ABOVE_ALL
    if dominates:
        return _DOMINATES
    return _BEHIND if knows else _KNOWS_NOTHING


@kernel("int64(int64, int64, Array(uint64, 1, 'C', readonly=True), int64, int64, int64[::1], int64[::1])")
def _select(table: Int, stride: Int, base: U64, ring: Int, mask: Int, state: I64, out: I64) -> Int:
    """Slots of the rows in the ring above the flattened vector, into `out`; returns how many."""
    head = state[_HEAD]
    candidates = 0
    for entry in range(state[_TAIL], head):
        stamp = load_u64(ring + (entry & mask) * _ENTRY_BYTES + _ENTRY_STAMP)
        shard = np.int64(load_u64(ring + (entry & mask) * _ENTRY_BYTES) >> _PLACE_BITS)
        # Written whether it counts or not: the loop has no branch to mispredict.
        out[candidates] = entry
        candidates += stamp > base[shard * WRITERS_MAX + np.int64(stamp & _WRITER_MASK)]
    rows = table + _ROWS
    count = 0
    # Entries of rows that changed again since count too: had the oldest been dropped, DVV would be above this vector.
    state[_DEPTH] = head - out[0] if candidates else 0
    for i in range(candidates):
        if i + _PREFETCH_ROWS < candidates:
            ahead = np.int64(load_u64(ring + (out[i + _PREFETCH_ROWS] & mask) * _ENTRY_BYTES) & _SLOT_MASK)
            prefetch_near(rows + ahead * stride)
        entry = ring + (out[i] & mask) * _ENTRY_BYTES
        slot = np.int64(load_u64(entry) & _SLOT_MASK)
        if load_u64(rows + slot * stride + _STAMP) == load_u64(entry + _ENTRY_STAMP):
            out[count] = slot
            count += 1
    return count


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What an update cache did and holds; the first four only grow."""

    hits: int = 0  # questions answered without a scan
    misses: int = 0  # answered by a scan
    pruned: int = 0  # entries dropped
    left_out: int = 0  # rows that were too old to be cached when they came
    cached: int = 0  # entries now
    window: int = 0  # entries that are kept at most
    bytes: int = 0

    def __add__(self, other: "CacheStats") -> "CacheStats":
        return CacheStats(
            self.hits + other.hits,
            self.misses + other.misses,
            self.pruned + other.pruned,
            self.left_out + other.left_out,
            self.cached + other.cached,
            self.window + other.window,
            self.bytes + other.bytes,
        )


class RecentRows:
    """The update cache of one table. For the writing thread.

    Args:
        shards: of the model.
    """

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self._ring = np.zeros((min(RING_START, WINDOW_MIN), 2), np.uint64)
        # Sparse where nothing was written: a writer's shards lie together.
        self._dvv = np.zeros((WRITERS_MAX, shards), np.uint64)
        self._thresholds = np.zeros(WRITERS_MAX, np.uint64)
        self._writers = np.zeros(1 + WRITERS_MAX, np.int64)
        # What the kernels get of these: addresses and numbers.
        self._bound = (shards, self._dvv.ctypes.data, self._writers.ctypes.data)
        self._pruning = (shards, self._dvv.ctypes.data, self._thresholds.ctypes.data, self._writers.ctypes.data)
        self._entries = (self._ring.ctypes.data, len(self._ring) - 1)
        self._state = np.zeros(4, np.int64)
        self._window = WINDOW_START
        self._hits = self._misses = 0
        self._answers = self._deepest = 0  # since the window was chosen

    def stats(self) -> CacheStats:
        """Counters and sizes."""
        head, tail, left_out, _ = self._state.tolist()
        size = self._ring.nbytes + int(self._writers[0]) * (8 * self._shards + 16)
        return CacheStats(self._hits, self._misses, tail, left_out, head - tail, self._window, size)

    def load(self, table: int, stride: int, rows_used: int) -> None:
        """After attaching: nothing is cached, so DVV is the componentwise maximum of the stored stamps (R10)."""
        _load(table, stride, rows_used, *self._bound)

    def record(self, slots: I64, keys: U64, stamps: U64, stamp: int, rows_used: int) -> None:
        """Note what an apply has written.

        Args:
            slots: int64[n], -1 for a row that was not written.
            keys: uint64[n].
            stamps: uint64[n], or empty when all rows carry `stamp`.
            stamp: the stamp of all rows.
            rows_used: of the table; a ring longer than the table has rows would be slower than a scan.
        """
        room = min(self._window, max(WINDOW_MIN, rows_used))
        if len(self._ring) < room:
            wanted = int(self._state[_HEAD] - self._state[_TAIL]) + slots.size
            if wanted > len(self._ring):
                self._grow(min(wanted, room))
        room = min(room, len(self._ring))
        _record(slots, keys, stamps, stamp, room, *self._entries, *self._pruning, self._state)

    def _grow(self, entries: int) -> None:
        """Make the ring hold so many entries."""
        larger = np.zeros((1 << (entries - 1).bit_length(), 2), np.uint64)
        held = np.arange(int(self._state[_TAIL]), int(self._state[_HEAD]))
        larger[held & len(larger) - 1] = self._ring[held & len(self._ring) - 1]
        self._ring = larger
        self._entries = (larger.ctypes.data, len(larger) - 1)

    def prune(self, keep: int) -> None:
        """Keep at most so many of the youngest entries."""
        _prune(keep, *self._entries, *self._pruning, self._state)

    def select(self, base: U64, table: int, stride: int, *, measured: bool = True) -> I64 | None:
        """Slots of all rows of the table above the flattened vector, in no particular order; None when only a scan can tell.

        `measured`: count it, and let it have a say in how much is kept.
        """
        known = _compare(base, *self._bound)
        if known != _DOMINATES:
            self._misses += measured
            if measured and known == _BEHIND:  # who joins and knows nothing needs a scan whatever the window is
                self._choose_window(2 * self._window)
            return None
        out = np.empty(int(self._state[_HEAD] - self._state[_TAIL]) + 1, np.int64)
        count = _select(table, stride, base, *self._entries, self._state, out)
        if measured:
            self._hits += 1
            self._answers += 1
            self._deepest = max(self._deepest, int(self._state[_DEPTH]))
            if self._answers >= ADAPT_REQUESTS:
                self._choose_window(ADAPT_HEADROOM * self._deepest)
        return out[:count].copy()

    def _choose_window(self, entries: int) -> None:
        self._window = min(max(entries, WINDOW_MIN), WINDOW_MAX)
        self.prune(self._window)
        self._answers = self._deepest = 0
