"""How the predictions of clicks and of other events lie: what an AUC is made of, in sums that nodes and windows can add.

An AUC is of pairs, so that of several nodes is no mean of theirs: where users of one node click more often than those of
another, most pairs are of two nodes. So what a node tells of a window is how many of its events were predicted how, in 512 bins
of 1/16 in log-odds; ties within a bin count half. A window of a few thousand events takes 300 bytes.
"""

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.health.moments import Moments

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

BINS: Final = 512
# Beyond these a prediction counts as this one: 16 natural units of log-odds, nine in ten million.
_ODDS_MAX: Final = 16.0
# Where the bins that are not empty begin, how many there are up to the last of them, and what one is counted in.
_HEAD: Final = struct.Struct("<HHf")
# Counts up to it are exact on the wire, as float16; larger ones are known to 0.05 %.
_EXACT_MAX: Final = 2_048
WEIGHT_SUM_MAX: Final = 1e12


@dataclass(frozen=True, slots=True)
class Ranks:
    """Weights of events by label and prediction. 8 KiB.

    Args:
        counts: float64[2, BINS] as bytes, other events first and then clicks; empty: of no events.
    """

    counts: bytes = b""

    def __add__(self, other: "Ranks") -> "Ranks":
        if not self.counts or not other.counts:
            return self if self.counts else other
        return Ranks((np.frombuffer(self.counts) + np.frombuffer(other.counts)).tobytes())

    def auc(self, heaviest: float) -> Moments:
        """The share of other events below a click, over all pairs, with the spread of its linear part (DeLong 1988).

        It counts as so many events as there are of the rarer label, since as many are all that a window says of an AUC: of a
        thousand clicks and one other event all pairs share that one.
        """
        if not self.counts:
            return Moments()
        negative, positive = np.frombuffer(self.counts).reshape(2, BINS)
        negatives, positives = float(negative.sum()), float(positive.sum())
        if not negatives or not positives:
            return Moments()
        above = (np.cumsum(negative) - negative / 2) / negatives  # of a click in this bin: the share of others below it
        below = 1 - (np.cumsum(positive) - positive / 2) / positives  # of another event: the share of clicks above it
        auc, count = float((positive * above).sum()) / positives, min(positives, negatives)
        spread = (count / positives) ** 2 * float((positive * (above - auc) ** 2).sum())
        spread += (count / negatives) ** 2 * float((negative * (below - auc) ** 2).sum())
        return Moments(count, count * auc, spread, heaviest)

    def to_bytes(self) -> bytes:
        """For other nodes: the bins that are not empty, of each label."""
        if not self.counts:
            return b""
        return b"".join(_packed(row) for row in np.frombuffer(self.counts).reshape(2, BINS))

    @staticmethod
    def from_bytes(packed: bytes) -> "Ranks":
        """What `to_bytes` made, to 0.05 %.

        Raises:
            ValueError: it did not make this.
        """
        if not packed:
            return Ranks()
        rows, rest = np.zeros((2, BINS)), packed
        for row in rows:
            first, length, scale = _HEAD.unpack_from(rest)
            counts = np.frombuffer(rest, np.float16, length, _HEAD.size).astype(np.float64) * scale
            if first + length > BINS or not bool(((counts >= 0) & (counts <= WEIGHT_SUM_MAX)).all()):
                raise ValueError("counts that no events have")
            row[first : first + length] = counts
            rest = rest[_HEAD.size + 2 * length :]
        if rest:
            raise ValueError(f"{len(rest)} bytes too many")
        return Ranks(rows.tobytes())


def ranks_of(prediction: F32, label: F32, weight: F32, group: I64, groups: int) -> list[Ranks]:
    """Of each group of events; columns [n], `group` from 0 to `groups` - 1. A label of 0.5 or more is a click."""
    p = np.clip(prediction.astype(np.float64), 1e-9, 1 - 1e-9)
    odds = np.clip(np.log(p) - np.log1p(-p), -_ODDS_MAX, _ODDS_MAX)
    bins = np.minimum(((odds + _ODDS_MAX) * (BINS / (2 * _ODDS_MAX))).astype(np.int64), BINS - 1)
    counts = np.bincount(bins + BINS * ((label >= 0.5) + 2 * group), weight, 2 * BINS * groups)
    return [Ranks(row.tobytes()) for row in counts.reshape(groups, 2 * BINS)]


def _packed(row: F64) -> bytes:
    filled = np.flatnonzero(row)
    if not filled.size:
        return _HEAD.pack(0, 0, 1.0)
    first, stop = int(filled[0]), int(filled[-1]) + 1
    most, least = float(row.max()), float(row[filled].min())
    # Whole numbers stay what they are; weights far from 1 are counted in what float16 has digits for.
    scale = np.float32(1.0 if least > 0.01 and most <= _EXACT_MAX else most / _EXACT_MAX)
    return _HEAD.pack(first, stop - first, scale) + (row[first:stop] / scale).astype(np.float16).tobytes()
