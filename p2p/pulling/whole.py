"""Shards that an answer must bring whole, since its asker may lack what was dropped for good (R5).

A claim says that everything up to it came. Of a tombstone that was collected nothing can come, so a claim is made only to an
asker whose vector covers the loss floor. Of any other shard all rows are sent, whatever the asker has, and what it holds beyond
these, of what the sender's vector covers, is what was deleted: it drops that, takes over the floor, and may take the claim.

What is compared is the floor at the moment of the claim, when the last row was read (R18): a stream takes its time, and rows
that it had selected may be collected before it gets to them. Then they are left out. Shards where the asker is below the floor
by then begin anew, whole; of those that come whole already, it drops whatever it holds of such a row. So an answer ends,
however much is deleted, or expires, meanwhile: each shard begins anew at most once.

The floor follows the last row, in several chunks if it is large. One that is too high does no harm, so each part is taken as
it comes.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from p2p import messages as m
from p2p.core import Keyspace
from p2p.pulling.outbox import PullStream
from p2p.replica import NO_STEPS, U64, KnownSteps, Selection

Mask = NDArray[np.bool_]

# Of a floor in one chunk, beside a vector (`p2p.knowledge.VECTOR_BYTES_MAX`) and rows: a message has 16 MiB.
FLOOR_BYTES_MAX = 2 << 20
Select = Callable[[U64], list[Selection]]


def below_floor(keyspace: Keyspace, base: U64) -> Mask:
    """bool[shards]: where a vector, uint64[shards, WRITERS_MAX], does not cover what was dropped here."""
    writers = keyspace.replica.floor_writers
    higher = keyspace.replica.loss_floor[:, writers] > base[:, writers]
    return np.asarray(higher.any(axis=1), np.bool_)


def may_answer(keyspace: Keyspace, below: Mask) -> bool:
    """Whether we hold all rows of the shards that would have to come whole (R11)."""
    return not (below & keyspace.replica.incomplete).any()


def known_elsewhere(known: KnownSteps, below: Mask) -> KnownSteps:
    """The same, but nothing is known of shards that come whole: the asker must see which rows there are."""
    if not len(known.stamps) or not below.any():
        return known
    kept = np.packbits(~below, bitorder="little")
    return KnownSteps(known.stamps, known.shards & kept) if kept.any() else NO_STEPS


def begin_whole(stream: PullStream, below: Mask, selections: Sequence[Selection]) -> None:
    """These shards come whole from the next chunk on, with these rows."""
    shards = np.flatnonzero(below).astype(np.uint32)
    stream.whole_next = np.union1d(stream.whole_next, shards).astype(np.uint32)
    stream.whole = np.union1d(stream.whole, shards).astype(np.uint32)
    stream.selections.extend(selections)


def floor_of(keyspace: Keyspace, shards: NDArray[np.uint32]) -> m.Floor:
    """What was dropped here of these shards, or of the first of them: of as many as fit into a message, at least one."""
    writers = keyspace.replica.floor_writers
    shards = shards[: max(1, FLOOR_BYTES_MAX // (4 + 8 * len(writers)))]
    return m.Floor(shards, writers, np.ascontiguousarray(keyspace.replica.loss_floor[np.ix_(shards, writers)]))
