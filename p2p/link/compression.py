"""When compressing pays: what a link carries a second, what a stream of messages shrinks to, what that costs, and the choice.

Pure: times are arguments. `p2p.link.wrapping` has the bytes, `p2p.link.outgoing` acts on it.

A *stream* is what goes to one peer of one keyspace: rows of one kind, which compress alike. Its first messages are compressed
as a trial. It pays when the time that the saved bytes would take on the link exceeds what compressing them here and expanding
them there takes. Where it does not pay, messages go as they are, at the cost of this one look, and one of them is tried again
after a pause that doubles each time: models change, and so do links.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

# Below it the framing eats what is saved.
WRAP_BYTES_MIN: Final = 1_024
# What a link between regions is taken to carry before it was ever busy enough to be measured: 1 Gbit/s.
RATE_ASSUMED: Final = 0.125  # bytes a nanosecond
# A link is busy, and its acknowledgements tell what it carries, while so much is under way: more than is acknowledged at once.
BUSY_BYTES: Final = 4 << 20
# Messages under way that are remembered; the credit of a link allows as many.
SENT_MAX: Final = 4_096
# Messages that are tried before the first decision.
TRIALS_MIN: Final = 3
# To save less than this is not worth the other side's trouble.
SAVED_MIN: Final = 0.03
# Expanding takes the receiver this much of the time that compressing takes the sender (`scripts/bench compression`).
EXPAND_SHARE: Final = 0.8
PAUSE_MS_MIN: Final = 1_000
PAUSE_MS_MAX: Final = 300_000
# Of what was just measured in a mean that follows the load.
NEWEST_SHARE: Final = 0.25


class Mode(Enum):
    """What the operator wants on links between regions."""

    AUTO = "auto"  # where it saves time
    ALWAYS = "always"  # wherever it saves bytes: they are paid for
    NEVER = "never"


def blend(mean: float, newest: float) -> float:
    """The mean after one more measurement."""
    return mean + NEWEST_SHARE * (newest - mean)


@dataclass(slots=True)
class LinkRate:
    """Bytes a nanosecond that a link carries, learnt from acknowledgements while it is busy."""

    rate: float = RATE_ASSUMED
    _sent: deque[tuple[int, int, int]] = field(default_factory=deque)  # (session, sequence, bytes) in flight
    _in_flight: int = 0
    _busy_since_ns: int = -1  # when the bytes counted in `_delivered` began to count; -1: not busy
    _delivered: int = 0

    def on_sent(self, session: int, sequence: int, size: int, now_ns: int) -> None:
        """A message of a session was handed to the network."""
        if self._sent and self._sent[-1][0] != session:  # what an ended session had in flight is never acknowledged
            self._sent.clear()
            self._in_flight, self._busy_since_ns = 0, -1
        if len(self._sent) >= SENT_MAX:
            self._in_flight -= self._sent.popleft()[2]
        self._sent.append((session, sequence, size))
        self._in_flight += size
        if self._in_flight < BUSY_BYTES:
            self._busy_since_ns = -1

    def on_ack(self, session: int, sequence: int, now_ns: int) -> None:
        """The peer has applied everything of a session up to `sequence`."""
        while self._sent and self._sent[0][0] == session and self._sent[0][1] <= sequence:
            size = self._sent.popleft()[2]
            self._in_flight -= size
            self._delivered += size
        if self._busy_since_ns >= 0 and self._delivered >= BUSY_BYTES:
            taken_ns = now_ns - self._busy_since_ns
            if taken_ns > 0:
                self.rate = blend(self.rate, self._delivered / taken_ns)
            self._busy_since_ns = -1
        if self._busy_since_ns < 0:  # the next measurement begins with this acknowledgement, if there is enough left
            self._delivered = 0
            self._busy_since_ns = now_ns if self._in_flight >= BUSY_BYTES else -1


@dataclass(slots=True)
class Stream:
    """What compressing gains on the messages of one keyspace to one peer."""

    saved: float = 0.0  # fraction of the bytes
    ns_per_byte: float = 0.0  # of the message as it was
    _trials: int = 0
    _retry_ms: int = 0
    _pause_ms: int = PAUSE_MS_MIN

    def pays(self, rate: float, mode: Mode) -> bool:
        """Whether compressing gains time on a link of this rate, bytes a nanosecond; or bytes, if that is wanted."""
        if self.saved < SAVED_MIN:
            return False
        return mode is Mode.ALWAYS or self.saved / rate > self.ns_per_byte * (1 + EXPAND_SHARE)

    def wants(self, rate: float, mode: Mode, now_ms: int) -> bool:
        """Whether the next message is to be compressed: because it pays, or to find out."""
        if self._trials < TRIALS_MIN:
            return True
        if self.pays(rate, mode):
            self._pause_ms = PAUSE_MS_MIN
            return True
        if now_ms < self._retry_ms:
            return False
        self._retry_ms = now_ms + self._pause_ms
        self._pause_ms = min(2 * self._pause_ms, PAUSE_MS_MAX)
        return True

    def learn(self, size: int, wrapped: int, taken_ns: int, now_ms: int) -> None:
        """One message of `size` bytes was compressed to `wrapped`, and it took so long."""
        saved, cost = 1 - wrapped / size, taken_ns / size
        if self._trials < TRIALS_MIN:  # each counts alone: the first ones find caches and tables cold
            self.saved, self.ns_per_byte = saved, cost
            self._retry_ms = now_ms + self._pause_ms
        else:
            self.saved, self.ns_per_byte = blend(self.saved, saved), blend(self.ns_per_byte, cost)
        self._trials += 1
