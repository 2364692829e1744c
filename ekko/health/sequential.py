"""Is the online model worse than the baseline? A test that may be looked at after every window, for ever.

Each window brings two samples of one bounded quantity x, from 0 to c: of the requests that the online model answered, and
of the baseline's. Time of day, promotions and the mix of users move both, so only the difference *within* a window counts:
with m the size of the smaller sample, window w adds m (mean of online - mean of baseline) to the sum T, and m to the size
N. T / N is what the difference was, on average over the windows.

**The confidence sequence.** With any p in [0, c] that was known before the window (here the mean up to the window before), for
every l in (0, 1/c)

    exp(l (D - N delta) - psi(l) V)    psi(l) = (-log(1 - c l) - c l) / c^2    V = sum of (m / n)^2 (x - p)^2 over all x

is a supermartingale where D is the sum T and delta the true average difference (Fan, Grama and Liu 2015; Howard, Ramdas,
McAuliffe and Sekhon 2021, theorem 4, the empirical-Bernstein confidence sequence). Its variance is the one that was seen,
and nothing is assumed of the distribution but the bound. Which l is best depends on the size of the drop, so a mixture over
a grid of them is used, which is a supermartingale as well; it costs log(24), 3 nats.

**When it began.** A drop that begins today must not be averaged with a good week. So a new supermartingale begins with
every window, each with weight 1 / H, where H is the *horizon* in windows (an "e-detector" of Shin, Ramdas and Rinaldo 2024,
with prior weights); for each l the sum of all of them is one number, R := (R + 1/H) exp(...).

**Guarantee**, with `level` as given, at any number of looks: while online is not worse than the baseline by more than the
tolerance, the probability of an alarm within the first H windows is at most `level`, and within n > H windows at most
level n / H. (R + (H - t) / H is a supermartingale that begins with 1, and Ville's inequality bounds how high it ever gets.) For
quantities that are one value an event (log-loss, click rate, a user's own) this holds for any sample size, not as an
approximation. AUC is no mean of independent values: a window's AUC is taken by its linear part, the share of negatives below
each positive and the reverse (DeLong 1988), which is exact as the numbers of positives and negatives in a window grow;
`tests/ekko/health/test_sequential.py` counts false alarms for both.

**Weights.** Means are of weighted events, and a sample whose heaviest event weighs h counts as n = (sum of its weights) / h
events: then no event moves T by more than c, as the bound on l asks, and V, with h times the weighted squares, is not below
what it should be. So one event that weighs as much as all others makes a sample of one, not of a thousand, which waits for
more. It is exact while what an event is worth does not depend on its weight; `tests/ekko/health/test_unfair_reports.py` counts
alarms.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.health.moments import Moments

F64 = NDArray[np.float64]

# The l of the mixture, as parts of 1 / c: from drops of half the range down to those that take a million events to see.
GRID: Final[F64] = 0.9 * 2.0 ** (-np.arange(24) / 2)
_LOG_GRID: Final = float(np.log(len(GRID)))


@dataclass(slots=True)
class Detection:
    """Evidence that a difference fell below a bound, in windows of which one began the fall.

    Args:
        horizon: H, windows.
        scale: c, what x is at most.
        bound: online is fine as long as the average difference is not below it (a negative tolerance).
    """

    horizon: int
    scale: float
    bound: float
    _log_sums: F64 = field(default_factory=lambda: np.full(len(GRID), -np.inf))  # log R for each l
    _cusums: F64 = field(default_factory=lambda: np.zeros(len(GRID)))  # log of the best single beginning, for each l
    _begins: NDArray[np.int64] = field(default_factory=lambda: np.full(len(GRID), -1, np.int64))  # which window that is

    def add(self, window: int, size: float, total: float, variance: float) -> None:
        """One window: its number, m, m (online - baseline), and its part of V."""
        rates = GRID / self.scale
        gain = rates * (size * self.bound - total) - _psi(GRID) / self.scale**2 * variance
        self._log_sums = np.logaddexp(self._log_sums, -np.log(self.horizon)) + gain
        fresh = self._cusums <= 0
        self._begins[fresh] = window
        self._cusums = np.maximum(self._cusums, 0.0) + gain

    @property
    def log_evidence(self) -> float:
        """An alarm at `level` is this at -log(level) or above."""
        return float(np.logaddexp.reduce(self._log_sums)) - _LOG_GRID

    @property
    def began(self) -> int:
        """The window with which the fall most likely began; -1: there is none."""
        return int(self._begins[int(np.argmax(self._cusums))]) if self._cusums.max() > 0 else -1


@dataclass(slots=True)
class Stretch:
    """The average difference since some window, with a confidence sequence: at all windows at once, it holds the true one.

    Args:
        scale: c, what x is at most.
    """

    scale: float
    size: float = 0.0  # N
    total: float = 0.0  # T
    variance: float = 0.0  # V

    def add(self, size: float, total: float, variance: float) -> None:
        """One window: m, m (online - baseline), and its part of V."""
        self.size += size
        self.total += total
        self.variance += variance

    @property
    def mean(self) -> float:
        """Online minus baseline, on average; 0 before there was anything."""
        return self.total / self.size if self.size else 0.0

    def radius(self, level: float) -> float:
        """The true average is below mean + radius, and (another event) above mean - radius, each with 1 - level, always."""
        if not self.size:
            return float("inf")
        # With e the sum of T's error, exp(l e - psi V) averaged over the grid exceeds 1 / level where e is beyond this root.
        low, high = 0.0, 2 * self.scale * self.size
        penalty = _psi(GRID) / self.scale**2 * self.variance
        limit = -np.log(level) + _LOG_GRID
        for _ in range(40):  # a trillionth of the range
            middle = (low + high) / 2
            if np.logaddexp.reduce(GRID / self.scale * middle - penalty) < limit:
                low = middle
            else:
                high = middle
        return high / self.size


@dataclass(slots=True)
class Difference:
    """Turns pairs of samples into what the two above take: a window's m, its part of T and its part of V.

    Args:
        scale: c, what x is at most.
        sample_min: of each arm; smaller ones wait for the next window, so that one of ten events is not taken for a mean.
    """

    scale: float
    sample_min: float
    _before: list[Moments] = field(default_factory=lambda: [Moments(), Moments()])  # of each arm, up to the window before
    _waiting: list[Moments] = field(default_factory=lambda: [Moments(), Moments()])

    def take(self, online: Moments, baseline: Moments) -> tuple[float, float, float] | None:
        """A window's samples; None: they wait. Where one arm has none, nothing is known of the difference: it is left out."""
        if not online.count or not baseline.count:
            return None
        self._waiting = [self._waiting[0] + online, self._waiting[1] + baseline]
        if min(one.size for one in self._waiting) < self.sample_min:
            return None
        arms, self._waiting = self._waiting, [Moments(), Moments()]
        size = min(one.size for one in arms)
        variance = sum(
            (size / arm.count) ** 2 * arm.heaviest * arm.squares_about(before.mean if before.count else self.scale / 2)
            for arm, before in zip(arms, self._before, strict=True)
        )
        self._before = [before + arm for before, arm in zip(self._before, arms, strict=True)]
        return size, size * (arms[0].mean - arms[1].mean), variance


def _psi(rates: F64) -> F64:
    """Psi of l, where both are parts of what c allows."""
    return -np.log1p(-rates) - rates
