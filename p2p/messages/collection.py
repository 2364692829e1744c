"""How it is learned what may be dropped for good (`p2p.collection`), since protocol version 2."""

import numpy as np
from numpy.typing import NDArray

from p2p.replica import U64
from p2p.values import dataclass


# How it is learned what may be dropped for good (`p2p.collection`), since protocol version 2.
@dataclass(frozen=True, slots=True)
class StableAsk:
    """Report how far you have everything: some holder keeps tombstones."""

    keyspace: int


@dataclass(frozen=True, slots=True, eq=False)
class StableReport:
    """So far the sender's life has everything of each writer that it knows of, in all shards."""

    keyspace: int
    waiting: bool  # it keeps rows that might be dropped
    writers: NDArray[np.uint16]  # [w], ascending
    reached: U64  # [w]; 0: nothing yet
    boots: U64  # [b]: lives of holders that the sender knows of, away ones included


@dataclass(frozen=True, slots=True, eq=False)
class Stable:
    """Every member that is not expelled has everything of each writer up to here; writers that somebody knows of are named."""

    keyspace: int
    writers: NDArray[np.uint16]  # [w], ascending; none while somebody has not reported
    reached: U64  # [w]
    held_up_by: tuple[str, ...]  # who has not
