"""What is left of the events of one arm in one window: sums that other nodes' can be added to, and no event.

Predictions go into 1,024 bins of equal width in log-odds, 0.03 each; AUC is that of the bins, ties counted half. Everything
else is exact. A sample is 48 bytes on the wire.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ConfigError, ModelError
from ekko.health.moments import Moments

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

BINS: Final = 1_024
# Beyond these a prediction counts as this one: 16 natural units of log-odds, nine in ten million.
_ODDS_MAX: Final = 16.0
# Of log-loss: what a wrong prediction can cost is bounded, as the test needs it to be; -log(1e-4) is 9.2.
PREDICTION_MIN: Final = 1e-4
LOSS_MAX: Final = float(-np.log(PREDICTION_MIN))
ENTRY_POINTS: Final = "ekko.health.metrics"

FIELDS: Final = 12  # of a sample on the wire

# Prediction, label, weight, float32[n] each -> the values of the user's metric, float[n] within [0, 1], more is better.
OwnMetric = Callable[[F32, F32, F32], NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One arm in one window, or in many. Weights count as so many events, but in `events`."""

    events: float = 0.0
    predicted: float = 0.0  # sum of the predictions
    clicks: float = 0.0  # sum of the labels
    auc: Moments = field(default_factory=Moments)  # of the positives: which share of the negatives each is above
    loss: Moments = field(default_factory=Moments)  # log-loss of each event
    own: Moments = field(default_factory=Moments)  # the user's own metric of each event

    def __add__(self, other: "Sample") -> "Sample":
        sums = self.events + other.events, self.predicted + other.predicted, self.clicks + other.clicks
        return Sample(*sums, self.auc + other.auc, self.loss + other.loss, self.own + other.own)

    @property
    def ctr(self) -> Moments:
        """Of the labels."""
        weight = self.loss.count
        return Moments(weight, self.clicks, max(0.0, self.clicks * (1 - self.clicks / weight)) if weight else 0.0)

    @property
    def calibration(self) -> float | None:
        """Predicted clicks for each that came; None: none came."""
        return self.predicted / self.clicks if self.clicks else None

    def quality(self, metric: str) -> tuple[Moments, float]:
        """The values by which a metric is compared, of which more is better, and their range."""
        if metric == "log_loss":
            return Moments(self.loss.count, self.loss.count * LOSS_MAX - self.loss.total, self.loss.spread), LOSS_MAX
        return {"auc": self.auc, "ctr": self.ctr, "own": self.own}[metric], 1.0

    def figures(self) -> dict[str, float | None]:
        """For people and dashboards; None where there were too few events to say."""
        means = {"auc": self.auc, "log_loss": self.loss, "ctr": self.ctr, "own": self.own}
        figures = {name: one.mean if one.count else None for name, one in means.items()}
        return {"events": self.events, **figures, "calibration": self.calibration}

    def to_array(self) -> F32:
        """float32[12]."""
        parts = [(one.count, one.total, one.spread) for one in (self.auc, self.loss, self.own)]
        return np.array([self.events, self.predicted, self.clicks, *(value for part in parts for value in part)], np.float32)

    @staticmethod
    def from_array(array: F32) -> "Sample":
        """What `to_array` made.

        Raises:
            ValueError: no sample has such sums.
        """
        if array.shape != (FIELDS,) or not np.isfinite(array).all() or bool((array < 0).any()):
            raise ValueError("sums that no events have")
        values = [float(value) for value in array]
        moments = [Moments(*values[at : at + 3]) for at in (3, 6, 9)]
        for one, value_max in zip(moments, (1.0, LOSS_MAX, 1.0), strict=True):
            # What float32 rounds off is less than a thousandth.
            if one.total > 1.001 * value_max * one.count or (one.spread > 0 and not one.count):
                raise ValueError("a mean that no values have")
        return Sample(values[0], values[1], values[2], *moments)


class Tally:
    """Events of one arm in one window, as they come."""

    def __init__(self) -> None:
        self._bins = np.zeros((2, 2, BINS), np.float64)  # [weights or their squares, negative or positive, bin]
        self._sums = Sample()

    def add(self, prediction: F32, label: F32, weight: F32, own: F64 | None = None) -> None:
        """Count events: float32[n] each; predictions and labels from 0 to 1; `own`: float64[n], of the user's metric."""
        bins = _bins_of(prediction) + BINS * (label >= 0.5)
        for power, row in ((1, self._bins[0]), (2, self._bins[1])):
            row += np.bincount(bins, weight.astype(np.float64) ** power, 2 * BINS).reshape(2, BINS)
        p = np.clip(prediction.astype(np.float64), PREDICTION_MIN, 1 - PREDICTION_MIN)
        loss = -(label * np.log(p) + (1 - label) * np.log1p(-p))
        self._sums += Sample(
            float(len(prediction)),
            float((prediction * weight).sum(dtype=np.float64)),
            float((label * weight).sum(dtype=np.float64)),
            Moments(),
            _moments(loss, weight),
            Moments() if own is None else _moments(own, weight),
        )

    def sample(self) -> Sample:
        """What there is by now."""
        sums = self._sums
        return Sample(sums.events, sums.predicted, sums.clicks, _auc(self._bins), sums.loss, sums.own)


def find_metric(name: str) -> OwnMetric:
    """The user's metric of this name (entry-point group `ekko.health.metrics`).

    Raises:
        ConfigError: nobody offers it, or it cannot be loaded.
    """
    offered = {one.name: one for one in entry_points(group=ENTRY_POINTS)}
    if name not in offered:
        known = ", ".join(map(repr, offered)) or "none"
        raise ConfigError(
            f"health.own_metric: no installed package offers metric {name!r} in entry-point group {ENTRY_POINTS!r}: "
            f"there are {known}"
        )
    try:
        metric: OwnMetric = offered[name].load()
    except Exception as error:  # noqa: BLE001 - a user's module can fail in any way
        raise ConfigError(f"health.own_metric: metric {name!r} cannot be loaded: {error!r}") from None
    return metric


def own_values(metric: OwnMetric, prediction: F32, label: F32, weight: F32) -> F64:
    """float64[n], from 0 to 1: what the user's metric makes of events.

    Raises:
        ModelError: it fails, or does not return a number from 0 to 1 for each.
    """
    try:
        values = np.asarray(metric(prediction, label, weight), np.float64)
    except Exception as error:  # noqa: BLE001 - a user's function can fail in any way
        raise ModelError(f"health.own_metric failed: {error!r}") from None
    if values.shape != prediction.shape or not bool(((values >= 0) & (values <= 1)).all()):
        raise ModelError(
            f"health.own_metric returned {values.dtype}{list(values.shape)}: expected a number from 0 to 1 for each"
        )
    return values


def _bins_of(prediction: F32) -> NDArray[np.int64]:
    p = np.clip(prediction.astype(np.float64), 1e-9, 1 - 1e-9)
    odds = np.clip(np.log(p) - np.log1p(-p), -_ODDS_MAX, _ODDS_MAX)
    bins: NDArray[np.int64] = ((odds + _ODDS_MAX) * (BINS / (2 * _ODDS_MAX))).astype(np.int64)
    return np.minimum(bins, BINS - 1, dtype=np.int64)


def _moments(values: NDArray[Any], weight: F32) -> Moments:
    count = float(weight.sum(dtype=np.float64))
    total = float((values * weight).sum())
    spread = float((weight.astype(np.float64) ** 2 * (values - total / count) ** 2).sum()) if count else 0.0
    return Moments(count, total, spread)


def _auc(bins: F64) -> Moments:
    """Of the positives, with the spread that the negatives' accident adds (DeLong 1988)."""
    (negative, positive), (negative_squares, positive_squares) = bins
    negatives, positives = float(negative.sum()), float(positive.sum())
    if not negatives or not positives:
        return Moments()
    above = (np.cumsum(negative) - negative / 2) / negatives  # of a positive in this bin: the share of negatives below it
    below = 1 - (np.cumsum(positive) - positive / 2) / positives  # of a negative: the share of positives above it
    auc = float((positive * above).sum()) / positives
    spread = float((positive_squares * (above - auc) ** 2).sum())
    spread += (positives / negatives) ** 2 * float((negative_squares * (below - auc) ** 2).sum())
    return Moments(positives, positives * auc, spread)
