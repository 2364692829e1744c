"""How long updates took until every replica showed them, or a newer version of their row, and how far behind it was."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.congested.load import FIRST_SIGNIFICANT

F64 = NDArray[np.float64]

BIN_MS = 1_000


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """Every update of a run, in the order of their commits."""

    committed_ms: F64  # [n]
    visible_ms: F64  # [n]; infinite where some replica never showed it
    classes: NDArray[np.uint8]  # [n]

    def p99_ms(self, begin_ms: float, end_ms: float, *, significant: bool) -> float:
        """99th percentile of the delay of updates committed then; nan without any."""
        chosen = (self.committed_ms >= begin_ms) & (self.committed_ms < end_ms)
        if significant:
            chosen &= self.classes >= FIRST_SIGNIFICANT
        delays = (self.visible_ms - self.committed_ms)[chosen]
        return float(np.percentile(delays, 99, method="higher")) if len(delays) else float("nan")

    def lag_ms(self, begin_ms: float, end_ms: float) -> tuple[F64, F64]:
        """(moments, age of the oldest update that some replica did not show then); 0 where there was none."""
        moments = np.arange(begin_ms, end_ms, BIN_MS, dtype=np.float64)
        # Running backwards: the oldest commit among those visible later than a moment.
        order = np.argsort(self.visible_ms, kind="stable")
        visible, oldest = self.visible_ms[order], np.minimum.accumulate(self.committed_ms[order][::-1])[::-1]
        first = np.searchsorted(visible, moments, side="right")
        oldest = np.append(oldest, np.inf)
        return moments, np.maximum(0.0, moments - oldest[first])

    def behind(self, now_ms: float) -> NDArray[np.int64]:
        """Which updates some replica did not show at a moment, though they were committed."""
        return np.flatnonzero((self.committed_ms <= now_ms) & (self.visible_ms > now_ms))


def is_bounded(lag_ms: F64) -> bool:
    """Whether the second half of a series is hardly higher than the first: it has found its level, and does not grow."""
    half = len(lag_ms) // 2
    return bool(lag_ms[half:].max() <= 1.25 * lag_ms[:half].max() + BIN_MS)
