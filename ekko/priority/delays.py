"""How long rows took to get here, significant ones and ordinary ones apart, by model.

The histograms are of logarithms, as those of priorities are (`threshold`): a delay is known to 2 %.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import log2
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.priority.threshold import BINS, BINS_PER_DOUBLING, DOUBLINGS, I64, LARGEST, SMALLEST, bins_of, log2_of
from p2p.classes import SIGNIFICANT
from p2p.replica import U64
from p2p.stamps import COUNTER_BITS, EPOCH_MS, WRITER_BITS

# What is said of "lately" is of the last window, and of the one before it.
WINDOW_MS: Final = 300_000
# Keyspaces; a model has at most 64.
KEYSPACES_MAX: Final = 4_096
KINDS: Final = ("ordinary", "significant")
# float32 knows a place among the bins to 0.001: logarithms plus 64, below 128, to a few 2**-18, and 32 bins each.
# Nearer to the edge of a bin than this, float32 has the last word.
_EDGE: Final = 0.002


@dataclass(frozen=True, slots=True)
class DelaysPicture:
    """Rows of one kind in one model: how many came in this life of the node, and how late those were that came lately."""

    rows: int = 0
    p50_ms: float | None = None  # None: none came lately
    p99_ms: float | None = None


class RowDelays:
    """Of all rows that are applied here."""

    def __init__(self) -> None:
        self._all: dict[int, I64] = {}  # int64[2, BINS] by keyspace: ordinary ones, significant ones
        self._lately: dict[int, I64] = {}
        self._before: dict[int, I64] = {}
        self._begun_ms = 0

    def add(self, keyspace: int, delay_ms: float, rows: int, significant: int, now_ms: int) -> None:
        """Count rows of one step; `now_ms` of a monotonic clock."""
        place, ordinary = _bin_of(max(delay_ms, 0.0)), rows - significant
        for histogram in self._histograms(keyspace, now_ms):
            if ordinary:
                histogram[0, place] += ordinary
            if significant:
                histogram[1, place] += significant

    def add_rows(self, keyspace: int, stamps: U64, classes: NDArray[np.uint8] | None, unix_ms: int, now_ms: int) -> None:
        """Count rows by their stamps, uint64[n], and classes."""
        written_ms = (stamps >> np.uint64(WRITER_BITS + COUNTER_BITS)).astype(np.int64)
        delays_ms = np.maximum(unix_ms - EPOCH_MS - written_ms, 0).astype(np.float32)
        significant = np.zeros(stamps.size, np.bool_) if classes is None else classes >= SIGNIFICANT
        places = bins_of(log2_of(delays_ms))
        counts = np.stack([np.bincount(places[chosen], minlength=BINS) for chosen in (~significant, significant)])
        for histogram in self._histograms(keyspace, now_ms):
            histogram += counts

    def _histograms(self, keyspace: int, now_ms: int) -> Iterator[I64]:
        if now_ms - self._begun_ms >= WINDOW_MS:
            self._before = self._lately if now_ms - self._begun_ms < 2 * WINDOW_MS else {}
            self._lately, self._begun_ms = {}, now_ms
        for histograms in (self._all, self._lately):
            if keyspace not in histograms:
                if len(histograms) >= KEYSPACES_MAX:
                    return
                histograms[keyspace] = np.zeros((len(KINDS), BINS), np.int64)
            yield histograms[keyspace]

    def picture(self, keyspaces: tuple[int, ...]) -> dict[str, DelaysPicture]:
        """Of one model, by kind."""
        total = _sum(self._all, keyspaces)
        lately = _sum(self._lately, keyspaces) + _sum(self._before, keyspaces)
        return {
            kind: DelaysPicture(int(total[number].sum()), _quantile_ms(lately[number], 0.5), _quantile_ms(lately[number], 0.99))
            for number, kind in enumerate(KINDS)
        }

    def buckets(self, keyspaces: tuple[int, ...], kind: str, bounds_s: tuple[float, ...]) -> tuple[list[int], float]:
        """For a metric: rows with a delay up to each bound, all of them at the end; and the sum of delays in seconds."""
        histogram = _sum(self._all, keyspaces)[KINDS.index(kind)]
        edges_ms = _values()
        ends = np.searchsorted(edges_ms, np.array(bounds_s) * 1000)
        sums = np.concatenate([[0], np.cumsum(histogram)])
        return [*sums[ends].tolist(), int(sums[-1])], float((histogram * edges_ms).sum() / 1000)


def _bin_of(delay_ms: float) -> int:
    """`bins_of` of one delay: the same bin, at a tenth of what arrays of one number cost."""
    if SMALLEST <= delay_ms <= LARGEST:
        place = (log2(delay_ms) + DOUBLINGS) * BINS_PER_DOUBLING
        if _EDGE < place % 1 < 1 - _EDGE:
            return min(int(place), BINS - 1)
    return int(bins_of(log2_of(np.array([delay_ms], np.float32)))[0])


def _sum(histograms: dict[int, I64], keyspaces: tuple[int, ...]) -> I64:
    out = np.zeros((len(KINDS), BINS), np.int64)
    for keyspace in keyspaces:
        if keyspace in histograms:
            out += histograms[keyspace]
    return out


def _quantile_ms(histogram: I64, share: float) -> float | None:
    sums = np.cumsum(histogram)
    if not sums[-1]:
        return None
    return float(_values()[np.searchsorted(sums, share * sums[-1])])


@cache
def _values() -> NDArray[np.float64]:
    """float64[BINS]: the middle of each bin, and 0 of the first."""
    exponents = (np.arange(BINS) + 0.5) / BINS_PER_DOUBLING - DOUBLINGS
    values: NDArray[np.float64] = np.exp2(exponents)
    values[0] = 0.0
    return values
