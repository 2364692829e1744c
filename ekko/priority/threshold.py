"""The k-th percentile of a model's priorities over the last minute: what is above it is significant.

The sketch is a histogram of logarithms (DDSketch, which the paper uses too): 32 bins are a factor of two, so a value is known
to 2 %, a quarter of a class, at any percentile. Sketches of quantiles by rank, as KLL, are known to 1 % of all rows, however
large the values there are: at the 99th percentile that is nothing. Two histograms merge by adding them up, so a window is a few
of them, and several nodes' would be one more sum.

Equal values. Where many rows share the value at the percentile (constant gradients, rows that do not move), more than 1 - k of
them would be significant. Then the threshold is just above that value: among equals nothing stands out.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels import weighing
from p2p.classes import PER_DOUBLING

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

BINS_PER_DOUBLING: Final = 32
# Values from 2**-64 to 2**64; smaller ones, and 0, count as the one, and larger ones as the other.
DOUBLINGS: Final = 64
BINS: Final = 2 * DOUBLINGS * BINS_PER_DOUBLING
# A window is so many histograms, of which the oldest is forgotten as a new one begins.
PARTS: Final = 6
# With fewer rows in the window than would have so many significant ones, the threshold stays what it was.
SIGNIFICANT_MIN: Final = 2.0
# Small steps are counted together: a histogram costs as much for 500 rows as for one.
COUNTED_TOGETHER: Final = 512
COUNTED_AFTER_MS: Final = 100

SMALLEST: Final = np.float32(2.0**-DOUBLINGS)
LARGEST: Final = np.float32(2.0**DOUBLINGS)
_ABOVE, _BINS_PER_DOUBLING = np.float32(DOUBLINGS), np.float32(BINS_PER_DOUBLING)


class Percentile:
    """Of what one model publishes here. 230 KiB.

    Args:
        k: percent of the rows that are below the threshold, above 0 and below 100.
        window_s: what was published in the last so many seconds counts.
    """

    def __init__(self, k: float, window_s: float) -> None:
        assert 0 < k < 100, k
        assert window_s > 0, window_s
        self._above = 1 - k / 100  # share of rows above the threshold
        self._part_ms = max(1, round(window_s * 1000 / PARTS))
        self._parts = np.zeros((PARTS, BINS), np.int64)
        self._total = np.zeros(BINS, np.int64)  # of all parts
        self._part = 0
        self._begun_ms: int | None = None
        self._waiting: list[F32] = []
        self._waiting_rows = 0
        self._counted_ms = 0
        self.threshold: float | None = None  # its binary logarithm; None: too few rows were seen so far

    @property
    def histogram(self) -> I64:
        """int64[BINS]: rows of the window by priority; those of several nodes or models may be added up."""
        return self._total.copy()

    def add(self, logarithms: F32, now_ms: int) -> None:
        """Count float32[n] from `log2_of`, published at `now_ms` of a monotonic clock."""
        self._waiting.append(logarithms)
        self._waiting_rows += logarithms.size
        early = self.threshold is None or now_ms - self._counted_ms >= COUNTED_AFTER_MS
        if early or self._waiting_rows >= COUNTED_TOGETHER:
            self._count(now_ms)

    def _count(self, now_ms: int) -> None:
        self._forget(now_ms)
        values = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        weighing.count_bins(values, _ABOVE, _BINS_PER_DOUBLING, self._parts[self._part], self._total)
        self._waiting, self._waiting_rows, self._counted_ms = [], 0, now_ms
        found = threshold_of(self._total, self._above)
        self.threshold = self.threshold if found is None else found

    def _forget(self, now_ms: int) -> None:
        """Begin a new part where it is time; after a pause all of them may be too old."""
        if self._begun_ms is None:
            self._begun_ms = now_ms
        steps = (now_ms - self._begun_ms) // self._part_ms
        for _ in range(min(steps, PARTS)):
            self._part = (self._part + 1) % PARTS
            self._total -= self._parts[self._part]
            self._parts[self._part] = 0
        self._begun_ms += steps * self._part_ms


def log2_of(values: F32) -> F32:
    """float32[n]: binary logarithms of numbers from 0; those of 0 and of the smallest are one, those of the largest another."""
    return np.log2(np.minimum(np.maximum(values, SMALLEST), LARGEST))  # np.clip takes three times as long for a few rows


def bins_of(logarithms: F32) -> I64:
    """int64[n], the bins of what `log2_of` gives."""
    return np.minimum(((logarithms + DOUBLINGS) * BINS_PER_DOUBLING).astype(np.int64), BINS - 1)


def threshold_of(histogram: I64, above: float) -> float | None:
    """The logarithm of the p_k of which the class formula makes just the rows significant that are among the share `above` of
    all.

    None: the histogram has too few rows to say.
    """
    first = int(weighing.first_above(histogram, above, SIGNIFICANT_MIN))
    if first < 0:
        return None
    # A class is rounded: what is half a class below p_k is significant, too. So p_k is half a class above the bin's lower edge.
    return first / BINS_PER_DOUBLING - DOUBLINGS + 1 / (2 * PER_DOUBLING)
