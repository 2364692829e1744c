"""What is usual: the mean of a model's recent significances, which makes models of any gradient scale comparable."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.weighing import sum_of

F32 = NDArray[np.float32]

# A value counts as at most so many times the mean before it: one exploding gradient must not make all others look like nothing.
OUTLIER: Final = 100.0


class RecentMean:
    """Of numbers from 0; what came a half-life ago counts half. None came yet: 0.

    Args:
        half_life_s: of what was seen.
    """

    def __init__(self, half_life_s: float) -> None:
        self._half_life_ms = half_life_s * 1000
        self._sum = 0.0
        self._count = 0.0
        self._seen_ms = 0

    @property
    def value(self) -> float:
        """The mean; 0 where nothing was seen, or nothing but zeros."""
        return self._sum / self._count if self._count else 0.0

    def add(self, values: F32, now_ms: int) -> None:
        """Take float32[n], finite and not negative, into account; `now_ms` of a monotonic clock."""
        if not values.size:
            return
        before = self.value
        largest = np.float32(min(OUTLIER * before, 3e38) if before else np.inf)
        fading = 0.5 ** (max(0, now_ms - self._seen_ms) / self._half_life_ms)
        self._sum = self._sum * fading + sum_of(values, largest)
        self._count = self._count * fading + values.size
        self._seen_ms = now_ms

    def relative(self, values: F32) -> F32:
        """float32[n]: of how many means each value is; all zeros where the mean is."""
        return values / np.float32(self.value) if self.value else np.zeros_like(values)
