"""What is left of the events of one arm in one window: sums that other nodes' can be added to, and no event.

Predictions go into bins (`ekko.health.ranks`), of which the AUC is. Everything else is exact. On the wire a sample is 40 bytes
and its bins, some hundred bytes of a window of some thousand events.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ConfigError, ModelError
from ekko.health.moments import Moments
from ekko.health.ranks import I64, WEIGHT_SUM_MAX, Ranks, ranks_of

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

# Of log-loss: what a wrong prediction can cost is bounded, as the test needs it to be; -log(1e-4) is 9.2.
PREDICTION_MIN: Final = 1e-4
LOSS_MAX: Final = float(-np.log(PREDICTION_MIN))
ENTRY_POINTS: Final = "ekko.health.metrics"

# Importance weights; one event may count as so many, and as so few.
WEIGHT_MAX: Final = 1_000.0
WEIGHT_MIN: Final = 1e-6
FIELDS: Final = 10  # of a sample on the wire, before its bins

# Prediction, label, weight, float32[n] each -> the values of the user's metric, float[n] within [0, 1], more is better.
OwnMetric = Callable[[F32, F32, F32], NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One arm in one window, or in many. Weights count as so many events, but in `events`."""

    events: float = 0.0
    predicted: float = 0.0  # sum of the predictions
    clicks: float = 0.0  # sum of the labels
    heaviest: float = 1.0  # largest weight of one event
    ranks: Ranks = field(default_factory=Ranks)
    loss: Moments = field(default_factory=Moments)  # log-loss of each event
    own: Moments = field(default_factory=Moments)  # the user's own metric of each event

    def __add__(self, other: "Sample") -> "Sample":
        if not self.events or not other.events:
            return self if self.events else other
        sums = self.events + other.events, self.predicted + other.predicted, self.clicks + other.clicks
        ranks, heaviest = self.ranks + other.ranks, max(self.heaviest, other.heaviest)
        return Sample(*sums, heaviest, ranks, self.loss + other.loss, self.own + other.own)

    @property
    def auc(self) -> Moments:
        """Over all pairs of a click and another event."""
        return self.ranks.auc(self.heaviest)

    @property
    def ctr(self) -> Moments:
        """Of the labels."""
        weight = self.loss.count
        spread = max(0.0, self.clicks * (1 - self.clicks / weight)) if weight else 0.0
        return Moments(weight, self.clicks, spread, self.heaviest)

    @property
    def calibration(self) -> float | None:
        """Predicted clicks for each that came; None: none came."""
        return self.predicted / self.clicks if self.clicks else None

    def quality(self, metric: str) -> tuple[Moments, float]:
        """The values by which a metric is compared, of which more is better, and their range."""
        if metric == "log_loss":
            count, heaviest = self.loss.count, self.heaviest
            return Moments(count, count * LOSS_MAX - self.loss.total, self.loss.spread, heaviest), LOSS_MAX
        return {"auc": self.auc, "ctr": self.ctr, "own": self.own}[metric], 1.0

    def figures(self) -> dict[str, float | None]:
        """For people and dashboards; None where there were too few events to say."""
        means = {"auc": self.auc, "log_loss": self.loss, "ctr": self.ctr, "own": self.own}
        figures = {name: one.mean if one.count else None for name, one in means.items()}
        return {"events": self.events, **figures, "calibration": self.calibration}

    def to_bytes(self) -> bytes:
        """For other nodes; empty of an empty one."""
        if not self.events:
            return b""
        parts = [(one.count, one.total, one.spread) for one in (self.loss, self.own)]
        sums = [self.events, self.predicted, self.clicks, self.heaviest, *(value for part in parts for value in part)]
        return np.array(sums, np.float32).tobytes() + self.ranks.to_bytes()

    @staticmethod
    def from_bytes(packed: bytes) -> "Sample":
        """What `to_bytes` made.

        Raises:
            ValueError: no sample has such sums.
        """
        if not packed:
            return Sample()
        array = np.frombuffer(packed, np.float32, FIELDS)
        values = [float(value) for value in array]
        events, predicted, clicks, heaviest = values[:4]
        if not bool(((array >= 0) & (array <= WEIGHT_SUM_MAX)).all()) or not events:
            raise ValueError("sums that no events have")
        if not WEIGHT_MIN / 2 <= heaviest <= 2 * WEIGHT_MAX:
            raise ValueError("a weight that no event may have")
        loss, own = (Moments(values[at], values[at + 1], values[at + 2], heaviest) for at in (4, 7))
        for one, value_max in ((loss, LOSS_MAX), (own, 1.0)):
            # What float32 rounds off is less than a thousandth.
            if one.total > 1.001 * value_max * one.count or one.spread > 1.001 * value_max**2 * one.count:
                raise ValueError("a mean that no values have")
        return Sample(events, predicted, clicks, heaviest, Ranks.from_bytes(packed[4 * FIELDS :]), loss, own)


def sample_of(prediction: F32, label: F32, weight: F32 | None = None, own: F64 | None = None) -> Sample:
    """Of events, as `samples_of`; all weigh 1 where nothing is said."""
    return samples_of(prediction, label, np.ones(len(prediction), np.float32) if weight is None else weight, own)[0]


def samples_of(
    prediction: F32, label: F32, weight: F32, own: F64 | None, group: I64 | None = None, groups: int = 1
) -> list[Sample]:
    """Of each group of events.

    Args:
        prediction: float32[n], from 0 to 1.
        label: the same.
        weight: float32[n].
        own: float64[n], of the user's metric.
        group: int64[n], from 0 to `groups` - 1; none of them is empty. None: all are in one.
        groups: how many there are.
    """
    group = np.zeros(len(prediction), np.int64) if group is None else group
    p: F64 = np.clip(prediction.astype(np.float64), PREDICTION_MIN, 1 - PREDICTION_MIN)
    clicked = label.astype(np.float64)
    loss: F64 = -(clicked * np.log(p) + (1 - clicked) * np.log1p(-p))
    heaviest = np.zeros(groups, np.float32)
    np.maximum.at(heaviest, group, weight)
    events = np.bincount(group, minlength=groups)
    predicted, clicks = (np.bincount(group, one * weight.astype(np.float64), groups) for one in (prediction, label))
    ranks = ranks_of(prediction, label, weight, group, groups)
    losses = _moments(loss, weight, heaviest, group)
    owns = [Moments()] * groups if own is None else _moments(own, weight, heaviest, group)
    return [
        Sample(float(events[n]), float(predicted[n]), float(clicks[n]), float(heaviest[n]), ranks[n], losses[n], owns[n])
        for n in range(groups)
    ]


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
    columns = [one.view() for one in (prediction, label, weight)]
    for column in columns:
        column.flags.writeable = False  # what it changed would be what is counted
    try:
        values = np.array(metric(*columns), np.float64)
    except Exception as error:  # noqa: BLE001 - a user's function can fail in any way
        raise ModelError(f"health.own_metric failed: {error!r}") from None
    if values.shape != prediction.shape or not bool(((values >= 0) & (values <= 1)).all()):
        raise ModelError(
            f"health.own_metric returned {values.dtype}{list(values.shape)}: expected a number from 0 to 1 for each"
        )
    return values


def _moments(values: F64, weight: F32, heaviest: F32, group: I64) -> list[Moments]:
    """Of each group; none is empty."""
    weights = weight.astype(np.float64)
    count, total = (np.bincount(group, one, len(heaviest)) for one in (weights, values * weights))
    spread = np.bincount(group, weights * (values - (total / count)[group]) ** 2, len(heaviest))
    return [Moments(*map(float, one)) for one in zip(count, total, spread, heaviest, strict=True)]
