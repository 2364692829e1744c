"""The update cache of one table: which rows changed lately, so that finding them costs what changed and not what there is.

Two parts, in the memory of this process (rebuilt when a store is attached):

- A ring of changes, oldest first: (place, shard, stamp) of each row version that was written here.
- DVV, the dominator version vector of the paper (Ekko, OSDI '22, section 4.4.1): per writer and shard, a stamp that no row
  which is missing from the ring exceeds.

An asker whose vector dominates DVV lacks no row outside the ring (theorem T4): its answer is a walk along the ring. Anyone else
costs a scan of the table. A row that changed again has a younger entry further on, and its older entries no longer carry the
row's stamp: since stamps of a row only grow, and no two versions of it share one, exactly one entry of a row counts. A row that
was removed has none: its slot is free, or of another epoch. What was removed is merged into DVV (R5): who dominates it cannot
lack a removed tombstone.

The ring is pruned from its old end. What leaves it is merged into DVV, and raises a threshold of its writer, below which rows
are not worth caching: a writer's clock decides only about that writer's rows (R14). How much to keep is counted in changes:
that needs no clock. It is some times as far back as askers lately had to look, and twice as much after misses.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels import ring
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
        self.shards = shards
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
        self._window_min = WINDOW_MIN
        self._hits = self._misses = 0
        self._answers = self._deepest = 0  # since the window was chosen

    @property
    def dvv_addresses(self) -> tuple[int, int]:
        """Where DVV is and the list of its writers, for kernels that merge into it: after attaching, of all rows (R10)."""
        return self._bound[1], self._bound[2]

    @property
    def dvv(self) -> U64:
        """Live uint64[WRITERS_MAX, shards]."""
        return self._dvv

    def stats(self) -> CacheStats:
        """Counters and sizes."""
        head, tail, left_out, _ = self._state.tolist()
        size = self._ring.nbytes + int(self._writers[0]) * (8 * self.shards + 16)
        return CacheStats(self._hits, self._misses, tail, left_out, head - tail, self._window, size)

    def newest_left_out(self) -> U64:
        """uint64[WRITERS_MAX]: a stamp that no row of the writer outside the ring exceeds; right after attaching, no row."""
        newest = np.zeros(WRITERS_MAX, np.uint64)
        for writer in self._writers[1 : 1 + int(self._writers[0])].tolist():
            newest[writer] = self._dvv[writer].max()
        return newest

    def cover(self, floor: U64) -> None:
        """Merge a loss floor, uint64[shards, WRITERS_MAX], into DVV: after attaching, what was removed before (R10)."""
        ring.merge_bounds(floor, *self._bound)

    def remove(self, keys: U64, stamps: U64) -> None:
        """Note that rows with these keys and stamps were removed."""
        ring.merge_rows(keys, stamps, *self._bound)

    def record(self, places: I64, keys: U64, stamps: U64, stamp: int, rows_used: int) -> None:
        """Note what an apply has written.

        Args:
            places: int64[n], -1 for a row that was not written.
            keys: uint64[n].
            stamps: uint64[n], or empty when all rows carry `stamp`.
            stamp: the stamp of all rows.
            rows_used: of the table; a ring longer than the table has rows would be slower than a scan.
        """
        room = min(self._window, max(WINDOW_MIN, rows_used))
        if len(self._ring) < room:
            wanted = int(self._state[ring.HEAD] - self._state[ring.TAIL]) + places.size
            if wanted > len(self._ring):
                self._grow(min(wanted, room))
        room = min(room, len(self._ring))
        ring.record(places, keys, stamps, stamp, room, *self._entries, *self._pruning, self._state)

    def _grow(self, entries: int) -> None:
        """Make the ring hold so many entries."""
        larger = np.zeros((1 << (entries - 1).bit_length(), 2), np.uint64)
        held = np.arange(int(self._state[ring.TAIL]), int(self._state[ring.HEAD]))
        larger[held & len(larger) - 1] = self._ring[held & len(self._ring) - 1]
        self._ring = larger
        self._entries = (larger.ctypes.data, len(larger) - 1)

    def prune(self, keep: int) -> None:
        """Keep at most so many of the youngest entries."""
        ring.prune(keep, *self._entries, *self._pruning, self._state)

    def select(self, base: U64, table: int, stride: int, *, measured: bool = True) -> I64 | None:
        """Places of all rows of the table above the flattened vector, in no particular order; None when only a scan can tell.

        `measured`: count it, and let it have a say in how much is kept.
        """
        known = ring.compare(base, *self._bound)
        if known != ring.DOMINATES:
            self._misses += measured
            if measured and known == ring.BEHIND:  # who joins and knows nothing needs a scan whatever the window is
                self._choose_window(2 * self._window)
            return None
        out = np.empty(int(self._state[ring.HEAD] - self._state[ring.TAIL]) + 1, np.int64)
        count = ring.select(table, stride, base, *self._entries, self._state, out)
        if measured:
            self._hits += 1
            self._answers += 1
            self._deepest = max(self._deepest, int(self._state[ring.DEPTH]))
            if self._answers >= ADAPT_REQUESTS:
                self._choose_window(ADAPT_HEADROOM * self._deepest)
        return out[:count].copy()

    def keep(self, entries: int) -> None:
        """Keep so many from now on at least, whoever asks."""
        self._window_min = min(entries, WINDOW_MAX)
        self._window = max(self._window, self._window_min)

    def _choose_window(self, entries: int) -> None:
        self._window = min(max(entries, self._window_min), WINDOW_MAX)
        self.prune(self._window)
        self._answers = self._deepest = 0
