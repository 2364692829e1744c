"""Is a stamp visible at the others (`p2p.reach`)?"""

from p2p.values import dataclass


@dataclass(frozen=True, slots=True)
class ReachQuery:
    """Tell me when everything that the stamp's writer wrote up to `stamp` is visible at your node."""

    keyspace: int
    query: int
    stamp: int


@dataclass(frozen=True, slots=True)
class Reached:
    """It does now, in this boot."""

    query: int
