"""Sums over events that two nodes, or two windows, can put together: how many, their total, their spread."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moments:
    """Of a sample: weights count as so many events.

    Args:
        count: of events, or of their weights.
        total: sum of the values.
        spread: sum of the squared distances from the mean.
        heaviest: the largest weight of one event.
    """

    count: float = 0.0
    total: float = 0.0
    spread: float = 0.0
    heaviest: float = 1.0

    @property
    def mean(self) -> float:
        """0 of an empty sample."""
        return self.total / self.count if self.count else 0.0

    @property
    def size(self) -> float:
        """As evidence it is worth so many events at least: as if each weighed as the heaviest (`ekko.health.sequential`)."""
        return self.count / self.heaviest

    def squares_about(self, point: float) -> float:
        """Sum of the squared distances from a point."""
        return self.spread + self.count * (self.mean - point) ** 2

    def __add__(self, other: "Moments") -> "Moments":
        """Both samples as one; the order makes no difference (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        between = self.count * other.count / count * (self.mean - other.mean) ** 2
        heaviest = max(self.heaviest, other.heaviest)
        return Moments(count, self.total + other.total, self.spread + other.spread + between, heaviest)
