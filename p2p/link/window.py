"""How many bytes may be on their way to a peer for which no rate is set: what its path takes within a round trip and a moment.

Intuition. Whoever pours water into a funnel sees how fast it runs off, and pours no faster: what stands in the funnel delays
whatever comes behind it. Here the funnel is the path to a peer with all of its queues, our own socket's included. What stands
in them delays heartbeats, until we are taken for dead, and the rows that matter most.

    round trip   the shortest time from a message to its acknowledgement: what the path takes while its queues are empty
    target       the round trip and `QUEUE_MS`. As much may be on its way as the path takes in so long: it never runs dry, also
                 when the other end stands still for a moment, and nobody waits much longer than `QUEUE_MS` behind us

One message at a time is *timed*. If B bytes were on their way when it left, itself included, and its acknowledgement took t,
the path took B / t a millisecond, so the window should be B * target / t; where that is what is on its way already, t is the
target. So several links over one path keep `QUEUE_MS` in its queues together, and not each: all of them see the same t. An
acknowledgement within the target only makes the window larger, twice as large at most. A late one makes it fit at once, since
who is late keeps everybody waiting; but where little of the window was used there may be other reasons (a process that stood
still), and it is halved at most.

Losses are no congestion. An acknowledgement may be lost, which a later one makes good: where that is not late for the newest of
what it acknowledges, it tells nothing of how long the timed message took. Who has waited for half of the target asks again with
the next message.

Acknowledgements usually wait for more (`links.ACK_BYTES`). A message *asks* for its own at once (`Envelope.asks`), one in every
eighth of the window, and where that takes longer one in `ASK_MS`, about as often as an acknowledgement would come anyway. So a
path that is wide is not told of much more often, and one that has become narrow is noticed within the target.

Paths change. While messages as quick as the quickest come now and then, the round trip holds. When for `STRETCH_MS` none did,
either the path became longer or we never let its queues run empty: for one round trip a quarter of the window is used, and the
round trip is what comes of that, whatever it was. Where it is our own queue, that quarter finds a quarter of it, so the error
cannot grow from one time to the next.

What is not known yet: answers to pulls can wait, so they begin with little, and no join keeps anybody else waiting. Batches may
use `BATCH_BYTES_START` until the path turns out to be narrow: a burst over a long path is no congestion.

Rejected: to add up what was acknowledged a second and take the most of it (BBR): a link that carries little says nothing of its
path, and its greatest rate of late would have to be remembered beside the time in which nothing was asked of it. To wait for
lost messages, as TCP does: it loses them below us, and we would only see the queue.

Pure: times are arguments.
"""

from dataclasses import dataclass
from typing import Final

from p2p.link.round_trip import RTT_MS_ASSUMED, RTT_MS_MAX

# What may stand in the queues of a path: less, and a receiver whose event loop is busy for a moment makes the path run dry.
QUEUE_MS: Final = 250
# The same where rows go by priority: what matters most waits behind it, and its receiver acknowledges each of few messages.
STATE_QUEUE_MS: Final = 100
# What answers begin with: at 320 kbit/s half of it, which they use, takes as long as what may stand in the queues.
WINDOW_BYTES_START: Final = 32 << 10
# What batches begin with: a second of 32 Mbit/s.
BATCH_BYTES_START: Final = 4 << 20
# A few pieces of an answer; less, and each of them would be acknowledged alone.
WINDOW_BYTES_MIN: Final = 4 << 10
PIECE_BYTES_MIN: Final = 1 << 10
# A message in so many parts of the window asks for its acknowledgement; and so large are the pieces of what can be cut.
PARTS: Final = 8
ASK_MS: Final = 250
# Messages that leave within so long leave together: what credit came back for at once.
BURST_MS: Final = 20
# The window is in use where a quarter of it is: answers may have half, and are cut into pieces.
USED_SHARE: Final = 4
# So much slower than the quickest is as quick.
SLACK_MS: Final = QUEUE_MS // 4
# For so long the shortest round trip is believed without another one like it.
STRETCH_MS: Final = 10_000


@dataclass(slots=True)
class Moment:
    """Monotonic milliseconds of the event at hand, which all links of a node look at."""

    ms: int = 0


@dataclass(frozen=True, slots=True)
class _Timed:
    """A message whose acknowledgement is awaited."""

    session: int
    sequence: int
    sent_ms: int
    in_flight: int  # bytes, itself included
    probes: bool
    burst_ms: int  # when the first of those left that leave together


@dataclass(slots=True)
class Window:
    """One link's. Bytes of payload, milliseconds."""

    bytes: int = WINDOW_BYTES_START  # as measured
    is_narrow: bool = False  # acknowledgements came late while it was in use, and nothing since has shown that much fits
    round_trip_ms: int | None = None  # the shortest
    queue_ms: int = QUEUE_MS  # what may stand in the queues of the path
    is_probing: bool = False  # a quarter is used, to see whether the round trip is still so short
    _timed: _Timed | None = None
    _unasked: int = 0  # bytes since a message asked last
    _asked_ms: int = -ASK_MS  # and when that was
    _stretch_ms: int = 0  # since when we wait for one that is as quick as the quickest

    @property
    def target_ms(self) -> int:
        """How long what is on its way may take."""
        return min(RTT_MS_ASSUMED if self.round_trip_ms is None else self.round_trip_ms, RTT_MS_MAX) + self.queue_ms

    @property
    def rate(self) -> float | None:
        """Bytes a millisecond that the path takes, where it is narrow; None: more than was ever asked of it."""
        return self.bytes / self.target_ms if self.is_narrow else None

    def credit(self, most: int, *, trusting: bool) -> int:
        """Bytes that may be on their way, at most `most`; `trusting`: more than was seen to pass, unless it was seen not to."""
        size = max(self.bytes, BATCH_BYTES_START) if trusting and not self.is_narrow else self.bytes
        return min(most, self._used_now(size))

    def credit_for_repairs(self, most: int) -> int:
        """The same for answers: half, since batches go first."""
        return min(most, self._used_now(self.bytes)) // 2

    def piece_bytes(self, most: int) -> int:
        """How large a message should be that may be of any size up to `most`."""
        return min(most, max(PIECE_BYTES_MIN, self.bytes // PARTS))

    def is_silent(self, now_ms: int) -> bool:
        """Whether nothing has asked for its acknowledgement for longer than one takes."""
        return now_ms - self._asked_ms > self.target_ms

    def waits_ms(self, session: int, now_ms: int) -> int:
        """For how long a message has waited for the acknowledgement that it asked for."""
        return now_ms - self._timed.sent_ms if self._timed is not None and self._timed.session == session else 0

    def on_sent(self, session: int, sequence: int, payload_bytes: int, in_flight: int, now_ms: int) -> bool:
        """A message leaves, and is one of `in_flight` bytes that are on their way; whether it asks for its acknowledgement."""
        self._unasked += payload_bytes
        timed = self._timed
        if timed is None or timed.session != session:
            soon = self.is_probing or now_ms - self._asked_ms >= ASK_MS
        else:  # its acknowledgement, which is no more than a message, may be lost
            soon = min(now_ms - timed.sent_ms, now_ms - self._asked_ms) > self.target_ms // 2
        asks = soon or self._unasked >= self.bytes // PARTS
        if asks:
            self._unasked, self._asked_ms = 0, now_ms
            self._time(session, sequence, in_flight, now_ms)
        return asks

    def on_ack(self, session: int, sequence: int, now_ms: int, most: int, *, late: bool = True) -> None:
        """Everything of the session up to `sequence` was acknowledged; the window is never more than `most`.

        `late`: so it is also for the newest of that.
        """
        timed = self._timed
        if timed is None or timed.session != session or sequence < timed.sequence:
            return
        self._timed = None
        taken_ms = max(1, now_ms - timed.sent_ms)
        if taken_ms > self.target_ms and not late:
            return  # its own was lost, and this one is of what left later
        self._note_round_trip(timed, taken_ms, now_ms)
        self._fit(timed.in_flight, taken_ms, most)

    def _time(self, session: int, sequence: int, in_flight: int, now_ms: int) -> None:
        """Await an acknowledgement, of the last of those that leave together: behind the first there is nothing to be seen."""
        timed = self._timed
        if timed is None or timed.session != session:
            self._timed = _Timed(session, sequence, now_ms, in_flight, self.is_probing, now_ms)
        elif now_ms - timed.burst_ms <= BURST_MS and not timed.probes:
            self._timed = _Timed(session, sequence, now_ms, in_flight, False, timed.burst_ms)

    def _used_now(self, size: int) -> int:
        return size // 4 if self.is_probing else size

    def _fit(self, in_flight: int, taken_ms: int, most: int) -> None:
        """The window becomes what the path would take within the target."""
        late, in_use = taken_ms > self.target_ms, in_flight * USED_SHARE >= self.bytes
        used = min(max(self.bytes, in_flight), 2 * in_flight)  # twice, since answers have half
        fit = min(used * self.target_ms // taken_ms, 2 * max(self.bytes, in_flight))
        if not late:
            self.bytes = max(self.bytes, fit)
        elif in_use:
            self.bytes = min(self.bytes, fit)
        else:
            self.bytes = max(fit, self.bytes // 2)
        self.bytes = max(min(WINDOW_BYTES_MIN, most), min(self.bytes, most))
        if self.bytes >= min(BATCH_BYTES_START, most):
            self.is_narrow = False
        elif late and in_use:
            self.is_narrow = True

    def _note_round_trip(self, timed: _Timed, taken_ms: int, now_ms: int) -> None:
        if self.round_trip_ms is None or taken_ms < self.round_trip_ms or timed.probes:
            self.round_trip_ms, self.is_probing = taken_ms, False
        if taken_ms <= self.round_trip_ms + SLACK_MS:
            self._stretch_ms = now_ms
        elif now_ms - self._stretch_ms >= STRETCH_MS:
            self.is_probing = True
