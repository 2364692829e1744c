"""How rows are weighed, with NumPy's operations on whole arrays: what the compiled way must give to the bit."""

from dataclasses import dataclass, field
from math import log2

import numpy as np
from numpy.typing import NDArray

from ekko.priority.mean import OUTLIER
from ekko.priority.memory import PLACES_LOG2
from ekko.priority.origin import SHARE_MIN
from ekko.priority.settings import PrioritySettings
from ekko.priority.threshold import BINS, BINS_PER_DOUBLING, DOUBLINGS, PARTS, SIGNIFICANT_MIN, bins_of, log2_of
from ekko.store.table import Table
from p2p import classes
from p2p.replica import RowColumns

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]


@dataclass
class PlainMean:
    half_life_s: float
    sum: float = 0.0
    count: float = 0.0
    seen_ms: int = 0

    def relative(self, values: F32, now_ms: int) -> F32:
        if not values.size:
            return values
        capped, before = values, self.sum / self.count if self.count else 0.0
        if before:
            capped = np.minimum(values, np.float32(min(OUTLIER * before, 3e38)))
        fading = 0.5 ** ((now_ms - self.seen_ms) / (self.half_life_s * 1000))
        self.sum = self.sum * fading + float(capped.sum(dtype=np.float64))
        self.count, self.seen_ms = self.count * fading + values.size, now_ms
        return values / np.float32(self.sum / self.count) if self.sum else np.zeros_like(values)


class PlainMemory:
    def __init__(self) -> None:
        self.marks, self.values = np.zeros(1 << PLACES_LOG2, np.uint32), np.zeros(1 << PLACES_LOG2, np.float32)

    def note(self, table: int, keys: U64, values: F32) -> None:
        places, marks = places_of(table, keys)
        self.marks[places] = marks
        self.values[places] = values

    def recall(self, table: int, keys: U64) -> F32:
        places, marks = places_of(table, keys)
        return np.where(self.marks[places] == marks, self.values[places], np.float32(-np.inf))


def places_of(table: int, keys: U64) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    hashed = keys ^ np.uint64(table << 32 | 0x9E3779B9)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashed ^= hashed >> np.uint64(33)
        hashed *= np.uint64(factor)
    hashed ^= hashed >> np.uint64(33)
    places = (hashed & np.uint64((1 << PLACES_LOG2) - 1)).astype(np.int64)
    return places, (hashed >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def threshold_of(histogram: NDArray[np.int64], above: float) -> float | None:
    total = int(histogram.sum())
    if total * above < SIGNIFICANT_MIN:
        return None
    tails = np.cumsum(histogram[::-1])[::-1]
    first = int(np.argmax(tails <= total * above)) if tails[-1] <= total * above else BINS
    return first / BINS_PER_DOUBLING - DOUBLINGS + 1 / (2 * classes.PER_DOUBLING)


def class_of(logarithms: F32, threshold: float | None) -> NDArray[np.uint8]:
    if threshold is None:
        return np.full(logarithms.size, classes.NOT_KNOWN, np.uint8)
    relative = np.rint((logarithms - np.float32(threshold)) * classes.PER_DOUBLING) + np.float32(classes.SIGNIFICANT)
    return np.minimum(np.maximum(relative, np.float32(classes.LEAST)), np.float32(classes.MOST)).astype(np.uint8)


@dataclass
class PlainPriority:
    """Of one table, with the formula `significance`."""

    table: Table
    settings: PrioritySettings
    means: dict[str, PlainMean] = field(default_factory=dict)
    created: PlainMemory = field(default_factory=PlainMemory)
    parts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((PARTS, BINS), np.int64))
    begun_ms: int = 0
    part_ms: int = 0
    threshold: float | None = None

    def classify(self, section: RowColumns, said: F32 | None, now_ms: int, share: float) -> NDArray[np.uint8]:
        moved, before = self.table.movement(section.keys, section.rows)
        if said is not None and not np.isnan(said).any():  # rows that are deleted are there: nobody looked at what they are
            before = self.table.present(section.keys).astype(np.uint64)
        weights = self._significance(moved, said, now_ms) + self._freshness(section, before, now_ms)
        logarithms = log2_of(weights)
        self._count(logarithms, now_ms)
        return class_of(logarithms, None if self.threshold is None else self.threshold - log2(max(share, SHARE_MIN)))

    def _relative(self, kind: str, values: F32, now_ms: int) -> F32:
        return self.means.setdefault(kind, PlainMean(self.settings.window_s)).relative(values, now_ms)

    def _significance(self, moved: F32, said: F32 | None, now_ms: int) -> F32:
        if said is not None and not np.isnan(said).any():
            return self._relative("said", said, now_ms)
        out = self._relative("moved", np.fmin(moved, np.float32(3e38)), now_ms)
        if said is not None:
            out, known = out.copy(), ~np.isnan(said)
            out[known] = self._relative("said", said[known], now_ms)
        return out

    def _freshness(self, section: RowColumns, before: U64, now_ms: int) -> F32:
        keys, live, settings = section.keys, len(section.rows), self.settings
        self.begun_ms = self.begun_ms or now_ms
        now_s = (now_ms - self.begun_ms) / 1000
        age_s = np.float32(now_s) - self.created.recall(section.table, keys)
        new = np.flatnonzero((before[:live] == 0) | np.isnan(age_s[:live]))
        self.created.note(section.table, keys[new], np.full(new.size, now_s, np.float32))
        self.created.note(section.table, keys[live:], np.full(keys.size - live, np.nan, np.float32))
        age_s[new], age_s[live:] = 0, np.inf
        return np.float32(settings.fresh_weight) * np.exp2(-age_s / np.float32(settings.fresh_half_life_s))

    def _count(self, logarithms: F32, now_ms: int) -> None:
        """Without the wait for more of small steps: steps of less are not for this."""
        part = max(1, round(self.settings.window_s * 1000 / PARTS))
        self.part_ms = self.part_ms or now_ms
        while now_ms - self.part_ms >= part:
            self.parts = np.concatenate([self.parts[1:], np.zeros((1, BINS), np.int64)])
            self.part_ms += part
        self.parts[-1] += np.bincount(bins_of(logarithms), minlength=BINS)
        found = threshold_of(self.parts.sum(axis=0), 1 - self.settings.k / 100)
        self.threshold = self.threshold if found is None else found
