"""Batches that wait for credit on one link, in order, for a moment.

A link whose credit is used up for a moment, as while a busy origin hands children over (`p2p.pushing.adoption`), would
otherwise lose a batch, and with it what every node below has of all later ones. Batches are shared between links, so many that
wait cost little more than one. When there are too many, or the first has waited too long, the link goes into state mode
(`p2p.busy.backlog`), where rows are due instead. Where it cannot, since the peer speaks version 1, the line is longer, and what
finds no room is not sent; the child sees a gap and pulls.
"""

from collections import deque
from dataclasses import dataclass, field
from math import inf

from p2p import messages as m

# Bytes, as a multiple of a link's credit. A new writer fills the links for a second before enough children are handed over.
WAITING_CREDITS_MAX = 4
WAITING_MESSAGES_MAX = 4_096
# Before state mode it is short: what waits here is sent in order, whatever matters more, and whole, whatever changed since.
SHORT_BYTES_MAX = 8 << 20
SHORT_MS_MAX = 150
# Where a rate is set it is known when there will be credit: nothing is gained by waiting longer.
SHORT_RATED_MS_MAX = 50


@dataclass(frozen=True, slots=True, eq=False)
class WaitingBatch:
    """One of them, on its way to one child."""

    batch: m.Batch
    hops: int


@dataclass(slots=True, eq=False)
class WaitingLine:
    """All of them, of one link."""

    batches: deque[WaitingBatch] = field(default_factory=deque)
    bytes: int = 0
    since_ms: int = 0  # when the line was empty last

    def __len__(self) -> int:
        return len(self.batches)

    def is_overdue(self, now_ms: int, ms_max: int) -> bool:
        """Whether there has been no credit for all for so long."""
        return bool(self.batches) and now_ms - self.since_ms >= ms_max

    def add(self, one: WaitingBatch, bytes_max: float, now_ms: int) -> bool:
        """Let one more wait; False when there is no room. The last one may overshoot; without a bound there is always room."""
        if not self.batches:
            self.since_ms = now_ms
        if self.bytes >= bytes_max or (len(self.batches) >= WAITING_MESSAGES_MAX and bytes_max < inf):
            return False
        self.batches.append(one)
        self.bytes += one.batch.payload_bytes
        return True

    def take(self) -> WaitingBatch:
        """The first."""
        one = self.batches.popleft()
        self.bytes -= one.batch.payload_bytes
        return one

    def drop(self, keyspace: int) -> None:
        """Drop what is of this keyspace."""
        self.batches = deque(one for one in self.batches if one.batch.keyspace != keyspace)
        self.bytes = sum(one.batch.payload_bytes for one in self.batches)

    def clear(self) -> int:
        """Drop all; how many there were."""
        dropped = len(self.batches)
        self.batches.clear()
        self.bytes = 0
        return dropped
