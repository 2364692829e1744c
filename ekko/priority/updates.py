"""What a formula is told of the rows of one table in one step, and the two formulas that ekko has.

A formula is a function of arrays: it takes `Updates` and returns float32[n], finite and not negative, larger for rows that
matter more. Its scale is its own: only what it says relative to the model's percentile counts. The share of the model among
what readers ask for is applied afterwards, whatever the formula.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2p.stamps import COUNTER_BITS, EPOCH_MS, WRITER_BITS

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Updates:
    """Rows of one table that are about to be stored and sent, deletes among them."""

    model: str
    table: str
    keys: U64  # uint64[n], no repeats
    significance: F32  # float32[n], relative to the model's recent mean: 1 is as much as usual
    freshness: F32  # float32[n], 0 to 1: how recently the key was created, weighted as configured
    age_s: F32  # float32[n], seconds since the key was created; infinite: not lately, or not known
    moved: F32  # float32[n], sum of the magnitudes by which its values change, relative to the model's recent mean
    drift: F32  # float32[n], the same since the row was last significant, this step included
    before: U64  # uint64[n], stamps of the versions before these; 0: there is none, or it was deleted
    unix_ms: int  # now

    @property
    def interval_s(self) -> F32:
        """float32[n]: seconds since each row's version before this one; infinite where there is none."""
        since_ms = self.unix_ms - EPOCH_MS - (self.before >> np.uint64(WRITER_BITS + COUNTER_BITS)).astype(np.int64)
        passed_s = np.maximum(since_ms, 0).astype(np.float32) / np.float32(1000)
        return np.where(self.before == 0, np.float32(np.inf), passed_s)


Formula = Callable[[Updates], F32]


def significance(updates: Updates) -> F32:
    """The paper's: p_g + p_u (section 5.2.1)."""
    return updates.significance + updates.freshness


def loss_impact(updates: Updates) -> F32:
    """What readers lose while they do not have a row: its squared drift, as Ekko's authors proposed after the paper."""
    return updates.drift * updates.drift + updates.freshness


BUILT_IN: dict[str, Formula] = {"significance": significance, "loss_impact": loss_impact}
