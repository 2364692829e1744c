"""The loops over the claims of one batch, which every node runs for every batch, and over the counters of a heartbeat.

Written here with NumPy, they cost a call of 1 to 3 us for each line, ten times what the work takes. Who hosts the machine may
put compiled ones in their place (`install`), which give the same answers; ekko does (`ekko.store.kernels.claims`).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
U16 = NDArray[np.uint16]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

# What `claims_fault` finds.
SOUND, SEVERAL_TREES, NOT_ASCENDING, CONTRADICTION = range(4)


def claims_fault(shards: U32, prev: U64, part: U16, parts: U16, stamp: int, trees: int, shards_max: int) -> int:
    """What is wrong with the claims of a batch, of whatever origin.

    Args:
        shards: uint32[k], like the others; not empty.
        prev: the writer's stamp before, in each shard.
        part: which part of the shard's rows this is.
        parts: of how many.
        stamp: of the batch.
        trees: at least 1; all shards have to belong to the same one.
        shards_max: every shard has to be below.

    Returns:
        `SOUND`, or the first fault in the order of the constants.
    """
    if trees > 1 and (shards % trees != shards[0] % trees).any():
        return SEVERAL_TREES
    if shards[-1] >= shards_max or (shards[1:] <= shards[:-1]).any():
        return NOT_ASCENDING
    if prev.max() >= stamp or (part >= parts).any():
        return CONTRADICTION
    return SOUND


def merge_all(column: U64, shards: U32, base: U64, parts: U16, stamp: int, until: U64) -> bool:
    """Merge the claims of a batch, if each is of a whole shard and builds on what is known; else merge none.

    Args:
        column: uint64[shards of the keyspace], one writer's column of the vector, changed in place.
        shards: uint32[k], without repeats, each within the column.
        base: uint64[k].
        parts: uint16[k].
        stamp: up to which all of them claim.
        until: uint64[k], or empty: up to which each does, where that differs.

    Returns:
        Whether all were merged: `V := max(V, until)` where `V >= base`.
    """
    held = column[shards]
    if (parts != 1).any() or (held < base).any():
        return False
    column[shards] = np.maximum(held, until if len(until) else np.uint64(stamp))
    return True


class Rhythm(NamedTuple):
    """How a member's mean interval follows the gaps between its counters (`p2p.members.suspicion`)."""

    interval_ms_min: float
    interval_ms_max: float
    samples_max: int  # the mean forgets with so many
    samples_prior: int  # and begins as if there had been so many
    ahead_max: int  # a counter that is further above the last one is a lie (`p2p.members.suspicion.AHEAD_MAX`)


def hear(
    slots: I64,
    beats: U64,
    now_ms: int,
    rhythm: Rhythm,
    newest: U64,
    gone: Mask,
    suspect: Mask,
    samples: NDArray[np.int32],
    interval_ms: NDArray[np.float64],
    heard_ms: I64,
    told: NDArray[np.int32],
) -> bool:
    """Take counters that came, unless one of them is a suspect's: who returns is no matter of rhythm.

    Args:
        slots: int64[n], of members; -1: of nobody.
        beats: uint64[n], their counters.
        now_ms: monotonic.
        rhythm: how means follow.
        newest: the largest counter heard of, by slot, like all that follows; what advances is changed in place.
        gone: members that left.
        suspect: whom we suspect.
        samples: intervals seen.
        interval_ms: their mean.
        heard_ms: when the counter advanced.
        told: how often it was passed on since.

    Returns:
        False: a suspect's counter advanced, and nothing was taken.
    """
    newer = (slots >= 0) & (beats > newest[slots]) & ~gone[slots]
    newer &= (beats - newest[slots] <= rhythm.ahead_max) | (samples[slots] == 0)
    slots, beats = slots[newer], beats[newer]
    if suspect[slots].any():
        return False
    gap = np.minimum(now_ms - heard_ms[slots], rhythm.interval_ms_max)
    weight = 1.0 / np.minimum(samples[slots] + rhythm.samples_prior, rhythm.samples_max)
    mean = interval_ms[slots]
    mean += weight * (gap - mean)
    interval_ms[slots] = np.minimum(np.maximum(mean, rhythm.interval_ms_min), rhythm.interval_ms_max)
    samples[slots] += 1
    newest[slots] = beats
    heard_ms[slots] = now_ms
    told[slots] = 0
    return True


class Loops(NamedTuple):
    """One implementation of them."""

    claims_fault: Callable[[U32, U64, U16, U16, int, int, int], int]
    merge_all: Callable[[U64, U32, U64, U16, int, U64], bool]
    hear: Callable[..., bool]  # as `hear` above


PLAIN = Loops(claims_fault, merge_all, hear)
used = PLAIN


def install(loops: Loops) -> None:
    """Have this process use another implementation."""
    global used
    used = loops
