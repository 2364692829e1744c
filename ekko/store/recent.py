"""The update cache of one table: which rows changed lately, so that finding them costs what changed and not what there is.

Two parts, in the memory of this process (rebuilt when a store is attached):

- A ring of changes, oldest first: (slot, shard, stamp) of each row version that was written here.
- DVV, the dominator version vector of the paper (Ekko, OSDI '22, section 4.4.1): per writer and shard, a stamp that no row
  which is missing from the ring exceeds.

An asker whose vector dominates DVV lacks no row outside the ring (theorem T4): its answer is a walk along the ring. Anybody else
costs a scan of the table. A row that changed again has a younger entry further on, and its older entries no longer carry the
row's stamp: since stamps of a row only grow, and no two versions of it share one, exactly one entry of a row counts.

The ring is pruned from its old end. What leaves it is merged into DVV, and raises a threshold of its writer below which rows are
not worth caching: a writer's clock decides only about that writer's rows (R14). How much to keep is counted in changes, not in
milliseconds, so no clock is needed: some times as far back as askers lately had to look, and twice as much after misses.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ekko.model import SHARDS_MAX
from ekko.store import layout
from ekko.store.atomics import load_u64, prefetch_near
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
# After so many answers the window is chosen anew, as this many times the furthest that any of them had to look back.
ADAPT_REQUESTS = 32
ADAPT_HEADROOM = 4

_PLACE_BITS = 48  # of slot in an entry's first word; the shard is above it
_PLACE_MASK = (1 << _PLACE_BITS) - 1
assert SHARDS_MAX <= 1 << 64 - _PLACE_BITS
_WRITER_MASK = np.uint64(WRITERS_MAX - 1)
_ROWS = layout.TABLE.offset("rows")
_STAMP = layout.ROW.offset("stamp")
_KEY = layout.ROW.offset("key")
_PREFETCH_ROWS = 32

# Words of a cache's state: changes ever recorded and ever dropped; writers in DVV; rows left out at once; how far the last
# answer looked back.
_HEAD, _TAIL, _WRITERS, _LEFT_OUT, _DEPTH = range(5)
# What `_compare` says of an asker's vector.
_KNOWS_NOTHING, _BEHIND, _DOMINATES = range(3)


@inline_kernel
def _merge(stamp: Int, shard: Int, shards: Int, dvv: U64, writers: I64, state: I64) -> None:
    """A row with this stamp is not in the ring."""
    writer = np.int64(stamp & _WRITER_MASK)
    place = writer * shards + shard
    if stamp > dvv[place]:
        if dvv[place] == 0:  # perhaps the first of its writer
            listed = False
            for i in range(state[_WRITERS]):
                listed |= writers[i] == writer
            if not listed:
                writers[state[_WRITERS]] = writer
                state[_WRITERS] += 1
        dvv[place] = stamp


@inline_kernel
def _drop_oldest(ring: U64, shards: Int, dvv: U64, thresholds: U64, writers: I64, state: I64) -> None:
    """Drop the oldest entry. Its row may have a younger one; DVV is a bound, and may be too high."""
    at = state[_TAIL] & (ring.shape[0] - 1)
    stamp = ring[at, 1]
    _merge(stamp, np.int64(ring[at, 0] >> np.uint64(_PLACE_BITS)), shards, dvv, writers, state)
    writer = np.int64(stamp & _WRITER_MASK)
    thresholds[writer] = max(thresholds[writer], stamp)
    state[_TAIL] += 1


@kernel("void(int64, uint64[:, ::1], int64, uint64[::1], uint64[::1], int64[::1], int64[::1])")
def _prune(keep: Int, ring: U64, shards: Int, dvv: U64, thresholds: U64, writers: I64, state: I64) -> None:
    """Drop the oldest entries until `keep` are left."""
    while state[_HEAD] - state[_TAIL] > keep:
        _drop_oldest(ring, shards, dvv, thresholds, writers, state)


@kernel(
    "void(int64[::1], Array(uint64, 1, 'C', readonly=True), Array(uint64, 1, 'C', readonly=True), uint64, int64, "
    "uint64[:, ::1], int64, uint64[::1], uint64[::1], int64[::1], int64[::1])"
)
def _record(
    slots: I64,
    keys: U64,
    stamps: U64,
    stamp: Int,
    room: Int,
    ring: U64,
    shards: Int,
    dvv: U64,
    thresholds: U64,
    writers: I64,
    state: I64,
) -> None:
    """Enter the rows just written (slot >= 0); `stamps` is empty when all carry `stamp`."""
    for i in range(slots.size):
        if slots[i] < 0:
            continue
        shard = np.int64(mix64(keys[i]) % np.uint64(shards))
        row_stamp = stamps[i] if stamps.size else stamp
        writer = np.int64(row_stamp & _WRITER_MASK)
        if row_stamp > thresholds[writer]:
            while state[_HEAD] - state[_TAIL] >= room:
                _drop_oldest(ring, shards, dvv, thresholds, writers, state)
        if row_stamp > thresholds[writer]:
            at = state[_HEAD] & (ring.shape[0] - 1)
            ring[at, 0] = np.uint64(slots[i]) | np.uint64(shard) << np.uint64(_PLACE_BITS)
            ring[at, 1] = row_stamp
            state[_HEAD] += 1
        else:
            _merge(row_stamp, shard, shards, dvv, writers, state)
            state[_LEFT_OUT] += 1


@kernel("void(int64, int64, int64, int64, uint64[::1], int64[::1], int64[::1])")
def _load(table: Int, stride: Int, rows_used: Int, shards: Int, dvv: U64, writers: I64, state: I64) -> None:
    """Merge the stamps of all rows."""
    rows = table + _ROWS
    for slot in range(rows_used):
        row = rows + slot * stride
        prefetch_near(row + _PREFETCH_ROWS * stride)
        shard = np.int64(mix64(load_u64(row + _KEY)) % np.uint64(shards))
        _merge(load_u64(row + _STAMP), shard, shards, dvv, writers, state)


@kernel("int64(Array(uint64, 1, 'C', readonly=True), int64, uint64[::1], int64[::1], int64[::1])")
def _compare(base: U64, shards: Int, dvv: U64, writers: I64, state: I64) -> Int:
    """Does the flattened vector uint64[shards * 4096] dominate DVV? Else: does it know anything of DVV's writers?"""
    dominates = True
    knows = False
    for i in range(state[_WRITERS]):
        writer = writers[i]
        for shard in range(shards):
            known = base[shard * WRITERS_MAX + writer]
            dominates &= known >= dvv[writer * shards + shard]
            knows |= known != 0
    if dominates:
        return _DOMINATES
    return _BEHIND if knows else _KNOWS_NOTHING


@kernel(
    "int64(int64, int64, Array(uint64, 1, 'C', readonly=True), uint64[:, ::1], int64[::1], int64[::1])",
)
def _select(table: Int, stride: Int, base: U64, ring: U64, state: I64, out: I64) -> Int:
    """Slots of the rows in the ring above the flattened vector, into `out`; returns how many."""
    mask = ring.shape[0] - 1
    candidates = 0
    for entry in range(state[_TAIL], state[_HEAD]):
        stamp = ring[entry & mask, 1]
        shard = np.int64(ring[entry & mask, 0] >> np.uint64(_PLACE_BITS))
        # Written whether it counts or not: the loop has no branch to mispredict.
        out[candidates] = entry
        candidates += stamp > base[shard * WRITERS_MAX + np.int64(stamp & _WRITER_MASK)]
    rows = table + _ROWS
    count = 0
    state[_DEPTH] = 0
    for i in range(candidates):
        if i + _PREFETCH_ROWS < candidates:
            ahead = np.int64(ring[out[i + _PREFETCH_ROWS] & mask, 0] & np.uint64(_PLACE_MASK))
            prefetch_near(rows + ahead * stride)
        entry = out[i]
        slot = np.int64(ring[entry & mask, 0] & np.uint64(_PLACE_MASK))
        if load_u64(rows + slot * stride + _STAMP) == ring[entry & mask, 1]:
            if count == 0:
                state[_DEPTH] = state[_HEAD] - entry
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
        self._ring = np.zeros((min(WINDOW_MIN, WINDOW_START), 2), np.uint64)
        # Sparse where nothing was written: a writer's shards lie together.
        self._dvv = np.zeros(WRITERS_MAX * shards, np.uint64)
        self._thresholds = np.zeros(WRITERS_MAX, np.uint64)
        self._writers = np.zeros(WRITERS_MAX, np.int64)
        self._state = np.zeros(5, np.int64)
        self._window = WINDOW_START
        self._hits = self._misses = 0
        self._answers = self._deepest = 0  # since the window was chosen

    def stats(self) -> CacheStats:
        """Counters and sizes."""
        head, tail, writers, left_out, _ = self._state.tolist()
        size = self._ring.nbytes + writers * (8 * self._shards + 16)
        return CacheStats(self._hits, self._misses, tail, left_out, head - tail, self._window, size)

    def load(self, table: int, stride: int, rows_used: int) -> None:
        """After attaching: nothing is cached, so DVV is the componentwise maximum of the stored stamps (R10)."""
        _load(table, stride, rows_used, self._shards, self._dvv, self._writers, self._state)

    def record(self, slots: I64, keys: U64, stamps: U64, stamp: int, rows_used: int) -> None:
        """Note what an apply has written.

        Args:
            slots: int64[n], -1 for a row that was not written.
            keys: uint64[n].
            stamps: uint64[n], or empty when all rows carry `stamp`.
            stamp: the stamp of all rows.
            rows_used: of the table; a ring longer than the table has rows would be slower than a scan.
        """
        held = int(self._state[_HEAD] - self._state[_TAIL])
        room = min(self._window, max(WINDOW_MIN, rows_used))
        if held + slots.size > self._ring.shape[0] < room:
            self._grow(min(held + slots.size, room))
        room = min(room, self._ring.shape[0])
        _record(
            slots,
            keys,
            stamps,
            stamp,
            room,
            self._ring,
            self._shards,
            self._dvv,
            self._thresholds,
            self._writers,
            self._state,
        )

    def _grow(self, entries: int) -> None:
        """Make the ring hold so many entries; its length is a power of two."""
        larger = np.zeros((1 << (entries - 1).bit_length(), 2), np.uint64)
        held = np.arange(int(self._state[_TAIL]), int(self._state[_HEAD]))
        larger[held & len(larger) - 1] = self._ring[held & len(self._ring) - 1]
        self._ring = larger

    def prune(self, keep: int) -> None:
        """Keep at most so many of the youngest entries."""
        _prune(keep, self._ring, self._shards, self._dvv, self._thresholds, self._writers, self._state)

    def select(self, base: U64, table: int, stride: int, *, measured: bool = True) -> I64 | None:
        """Slots of all rows of the table above the flattened vector, in no particular order; None when only a scan can tell.

        `measured`: count it, and let it have a say in how much is kept.
        """
        known = _compare(base, self._shards, self._dvv, self._writers, self._state)
        if known != _DOMINATES:
            self._misses += measured
            if measured and known == _BEHIND:  # who joins and knows nothing needs a scan whatever the window is
                self._choose_window(2 * self._window)
            return None
        out = np.empty(int(self._state[_HEAD] - self._state[_TAIL]) + 1, np.int64)
        count = _select(table, stride, base, self._ring, self._state, out)
        if measured:
            self._hits += 1
            self._answers += 1
            self._deepest = max(self._deepest, int(self._state[_DEPTH]))
            if self._answers >= ADAPT_REQUESTS:
                self._choose_window(max(ADAPT_HEADROOM * self._deepest, self._window // 2))
        return out[:count].copy()

    def _choose_window(self, entries: int) -> None:
        self._window = min(max(entries, WINDOW_MIN), WINDOW_MAX)
        self._answers = self._deepest = 0
