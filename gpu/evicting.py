"""Which rows leave first: policies, what a score is, and how a cache is brought down to so many rows.

The score's layout is told in `gpu.layout`. What is compared is always the whole number: an LRU cache differs from a
priority-aware one in that all its rows have rank 0, an LFU one in that a use adds to the rank instead of renewing the tick.

A bucket that is full makes room by itself, for the row that comes. `threshold` is for the other bound, rows in all: it finds
the score up to which rows have to leave, eight bits at a time, from how often each value of these bits occurs (radix select).
A pass reads every header once: 32 bytes a slot, 0.02 ms for a million slots at 2 TB/s. Rows of equal score are told apart by
their hashes, so that exactly as many leave as shall, the same on every run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gpu.errors import ArgumentError
from gpu.layout import POLICIES, RANK_ONE, TICK_MASK, score_of

U64 = NDArray[np.uint64]

# A tick is 2**24 ns, 17 ms: 32 bits of them last 2.3 years from the machine's start, and a row that is looked up all the time
# is scored 60 times a second at most.
TICK_NS_LOG2: Final = 24
TICK_S: Final = (1 << TICK_NS_LOG2) / 1e9
# Uses count half after so long. What is popular in recommendations changes within the hour (a guess; `docs/gpu-hit-rates.md`).
DECAY_S: Final = 600.0

_DIGIT_BITS: Final = 8
_SCORE, _HASH = 0, 1
_ALL: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Policy:
    """How rows are scored."""

    name: str
    number: int
    first_rank: int  # of a row that comes without a score
    admits: bool  # such a row enters a full bucket whatever the others score

    def first_score(self, tick: int) -> int:
        """The score of a row that comes without one."""
        return score_of(self.first_rank, tick)


_POLICIES: Final = {
    # Its tick is the newest, so it would enter anyway.
    "lru": Policy("lru", POLICIES["lru"], 0, True),
    # A newcomer has one use, and a bucket of rows that all had two would never let it show that it has more.
    "lfu": Policy("lfu", POLICIES["lfu"], 1, True),
    # Rank 0 is below what anybody gave a priority: it displaces its like only.
    "priority": Policy("priority", POLICIES["priority"], 0, False),
}


@dataclass(frozen=True, slots=True)
class Threshold:
    """Rows whose (score, hash of the key) is at most this one leave."""

    score: int
    hashed: int


EVERYTHING: Final = Threshold(_ALL, _ALL)


def policy_of(name: str) -> Policy:
    """Raises `ArgumentError` when there is no such policy."""
    if name not in _POLICIES:
        raise ArgumentError(f"there is no policy {name!r}: choose one of {', '.join(_POLICIES)}")
    return _POLICIES[name]


def tick_now() -> int:
    """The tick of this moment, the same in all processes of this machine."""
    return (time.monotonic_ns() >> TICK_NS_LOG2) & TICK_MASK


def scores_of(ranks: NDArray[np.integer], tick: int) -> U64:
    """uint64[n]: scores of these ranks.

    Raises:
        ArgumentError: a rank is not within 0 to 2**32 - 1.
    """
    if len(ranks) and not 0 <= int(ranks.min()) <= int(ranks.max()) < RANK_ONE:
        raise ArgumentError(f"a rank is not within 0 to {RANK_ONE - 1}")
    return ranks.astype(np.uint64) * np.uint64(RANK_ONE) + np.uint64(tick & TICK_MASK)


def threshold(count: int, histogram: Callable[[int, int, int, int], U64]) -> Threshold:
    """The threshold at which `count` rows leave.

    Args:
        count: at least 1, and no more than there are rows.
        histogram: of (word, shift, prefix, score), as `gpu.reference.histogram` has it: uint64[256].

    Look-ups may raise scores meanwhile; then fewer leave, never more.
    """
    score, left, whole = _select(count, lambda shift, prefix: histogram(_SCORE, shift, prefix, 0))
    if whole:
        return Threshold(score, _ALL)
    hashed, _, _ = _select(left, lambda shift, prefix: histogram(_HASH, shift, prefix, score))
    return Threshold(score, hashed)


def _select(count: int, histogram: Callable[[int, int], U64]) -> tuple[int, int, bool]:
    """The `count`-th smallest value, which of its equals is meant, and whether it is the last of them.

    Where the rows up to it are those below a rounder number, this number less one is told, after fewer passes.
    """
    prefix = 0
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        up_to = np.cumsum(histogram(shift, prefix)).astype(np.int64)
        if not up_to[-1]:  # all of them were scored anew meanwhile
            return (prefix << shift + _DIGIT_BITS) - 1 if prefix else 0, 1, True
        count = min(count, int(up_to[-1]))
        digit = int(np.searchsorted(up_to, count))
        prefix = prefix << _DIGIT_BITS | digit
        if count == up_to[digit]:
            return ((prefix + 1) << shift) - 1, 1, True
        count -= int(up_to[digit - 1]) if digit else 0
    return prefix, count, False
