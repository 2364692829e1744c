"""Caches that may keep any rows: what a policy could do if buckets were no limit.

They work batch by batch as the cache on a device does: a batch is looked up, its hits are counted, then what it missed is
inserted. So the difference to that cache is its buckets alone. A key's score decides, the lowest goes first:

    lru      the batch in which the key was last used
    lfu      how often it was used since it came; a tie goes to the older use
    evlfu    EVStore's: the most keys that any request with this key hit (ASPLOS 2023). While nearly all rows have the best
             score, three in ten of those are forgotten, oldest first, as there
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]
AGED_AT, AGED_SHARE = 0.95, 0.3  # EVStore's aging
EARLIER = 1 << 40  # scores are in units of it, so that a tie goes to the older use


@dataclass(slots=True)
class Tally:
    """Hits, by key and by request."""

    keys: int = 0
    hits: int = 0
    requests: int = 0
    whole: int = 0

    def add(self, hit: Flags) -> None:
        """Count a batch, bool[requests, tables]."""
        self.keys += hit.size
        self.hits += int(hit.sum())
        self.requests += len(hit)
        self.whole += int(hit.all(axis=1).sum())

    @property
    def hit_rate(self) -> float:
        """Of keys."""
        return self.hits / max(1, self.keys)

    @property
    def whole_rate(self) -> float:
        """Of requests all of whose keys hit."""
        return self.whole / max(1, self.requests)


class IdealCache:
    """A fully associative cache of `capacity` of the rows [0, rows), by dense number instead of by key."""

    def __init__(self, rows: int, capacity: int, policy: str) -> None:
        self.capacity = capacity
        self.held = np.zeros(rows, np.bool_)
        self._score = np.zeros(rows, np.int64)
        self._policy = policy
        self._tick = 0

    def look_up(self, batch: Ids) -> Flags:
        """bool[requests, tables] of int64[requests, tables]: what is here; then what was missed is inserted."""
        self._tick += 1
        hit = self.held[batch]
        worth = self._worth(batch, hit)
        self._score[batch[hit]] = worth[hit]  # every occurrence of a key has the same worth
        self._insert(batch[~hit], worth[~hit])
        return hit

    def update(self, numbers: Ids, keep: bool) -> None:
        """New rows of these keys: those that are absent are inserted if `keep`."""
        absent = np.unique(numbers[~self.held[numbers]])
        if keep and absent.size:
            first = EARLIER if self._policy == "lfu" else 0
            self._insert(absent, np.full(absent.size, first + self._tick, np.int64))

    def _worth(self, batch: Ids, hit: Flags) -> Ids:
        """int64[requests, tables]: the score of each key after this batch."""
        if self._policy == "lru":
            return np.full(batch.shape, self._tick, np.int64)
        if self._policy == "lfu":
            distinct, inverse, uses = np.unique(batch, return_inverse=True, return_counts=True)
            before = np.where(self.held[distinct], self._score[distinct] // EARLIER, 0)
            worth: Ids = ((before + uses) * EARLIER + self._tick)[inverse].reshape(batch.shape)
            return worth
        return self._worth_together(batch, hit)

    def _worth_together(self, batch: Ids, hit: Flags) -> Ids:
        distinct, inverse = np.unique(batch, return_inverse=True)
        best = np.zeros(distinct.size, np.int64)
        agreed = np.broadcast_to(hit.sum(axis=1, dtype=np.int64)[:, None], batch.shape)
        np.maximum.at(best, inverse.ravel(), agreed.ravel())
        before = np.where(self.held[distinct], self._score[distinct], 0)
        # A key keeps its place in the order unless it rises.
        worth: Ids = np.where(best > before // EARLIER, best * EARLIER + self._tick, before)
        worth = np.where(self.held[distinct], worth, best * EARLIER + self._tick)
        return worth[inverse].reshape(batch.shape)

    def _insert(self, keys: Ids, worth: Ids) -> None:
        keys, first = np.unique(keys, return_index=True)
        worth = worth[first]
        if keys.size > self.capacity:  # cannot be at the sizes measured; a cache smaller than a batch keeps its best
            best = np.argsort(-worth, kind="stable")[: self.capacity]
            keys, worth = keys[best], worth[best]
        here = np.flatnonzero(self.held)
        surplus = here.size + keys.size - self.capacity
        if surplus > 0:
            leaving = here[np.argpartition(self._score[here], surplus - 1)[:surplus]]
            self.held[leaving] = False
        self.held[keys] = True
        self._score[keys] = worth
        if self._policy == "evlfu":
            self._age()

    def _age(self) -> None:
        here = np.flatnonzero(self.held)
        top = here[self._score[here] // EARLIER == self._score[here].max() // EARLIER]
        if top.size >= AGED_AT * self.capacity:
            oldest = np.argsort(self._score[top], kind="stable")[: int(AGED_SHARE * self.capacity)]
            self.held[top[oldest]] = False
