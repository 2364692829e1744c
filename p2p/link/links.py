"""Sessions with one peer: boots, sequence numbers, acknowledgement, credit (R3).

A link is one direction each way between two lives of two nodes. What must be accounted for (batches, pull chunks) travels in
a *session* with sequence numbers 1, 2, 3 ...; the receiver acknowledges the applied prefix, and what is not yet acknowledged
counts against the sender's credit. A hole, or a new life of either side, ends the session: everything in flight is forgotten
and a new session starts from 1. What was lost is repaired by the pull, never resent here.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

from p2p.link.allowance import Allowance
from p2p.link.budget import MESSAGE_BYTES, Bucket
from p2p.link.round_trip import RoundTrip
from p2p.link.window import PIECE_BYTES_MIN, QUEUE_MS, STATE_QUEUE_MS, Moment, Window
from p2p.messages import Envelope, NodeId
from p2p.pushing.waiting import WaitingLine
from p2p.versions import FIRST_VERSION

# The most bytes that may be on their way to one peer; on a path that takes less it is less (`p2p.link.window`). 180 ms of round
# trip at 1 Gbit/s are 22 MB; what a slow reader can make us hold per link is bounded by it.
CREDIT_BYTES_MAX = 32 << 20
CREDIT_MESSAGES_MAX = 4_096
# Acknowledge after so much, a small part of the credit, so that it never runs dry. An acknowledgement costs both ends a
# message, some 150 us of processor: one for each MiB was 6 % more for batches of 260 KiB. What is less, after a while: only a
# link that carries little waits for it, so a quarter of a second does no harm, and saves half of all messages where steps come
# ten times a second.
ACK_BYTES = 2 << 20
ACK_MESSAGES = 64
ACK_DELAY_MS = 250
# Since when a message may ask for its acknowledgement at once (`Envelope.asks`); before, credit is what it always was.
ASKS_SINCE = 2
# Towards a region for which a rate is set, credit is what the rate brings in two round trips, so that what is narrower than it
# shows at once, and not when megabytes wait in sockets. So it is acknowledged sooner, after what the rate brings in so long.
# A round trip is taken for no less than twice that (`p2p.link.round_trip`), so that credit never runs dry between two of them.
RATED_ACK_MS = 20
# What can be cut leaves in pieces of what the rate brings in so long, so that what matters more waits for one at most.
PIECE_MS = 10
# Nothing acknowledged for so long by a peer that lives: what is in flight was lost, and its last message with it, so that no
# hole will ever show. Longer than one message takes at 4 Mbit/s.
ACK_SILENCE_MS = 10_000
# What a session may bring beyond what we acknowledged of it: its sender's credit, the message that overshoots it, and all of
# that twice, since a network may repeat and what was under way when a link broke may come after all.
OVERRUN_BYTES = 2 * (CREDIT_BYTES_MAX + (16 << 20))
OVERRUN_MESSAGES = 2 * (CREDIT_MESSAGES_MAX + 1)


class Arrival(Enum):
    """What a sequenced message is to its session."""

    NEXT = auto()
    REPEAT = auto()
    BROKEN = auto()


@dataclass(slots=True)
class Traffic:
    """What passed over a link, for the operator."""

    rows_out: int = 0
    bytes_out: int = 0
    rows_in: int = 0
    bytes_in: int = 0
    batches_skipped: int = 0  # not sent for want of credit, or refused by the transport
    sessions_broken: int = 0
    bytes_saved: int = 0  # rows that changed again while they were due, in backlogs that ended


@dataclass(slots=True)
class Link:
    """Both directions between us and one life of a peer."""

    node: NodeId
    boot: int
    address: str
    region: str
    own_boot: int
    version: int = FIRST_VERSION  # what both of us speak
    traffic: Traffic = field(default_factory=Traffic)
    waiting: WaitingLine = field(default_factory=WaitingLine)  # batches, until there is credit
    bucket: Bucket | None = None  # of the pair of regions; None: no rate is set for it
    round_trip: RoundTrip = field(default_factory=RoundTrip)  # only where there is a bucket
    window: Window = field(default_factory=Window)  # only where there is none
    moment: Moment = field(default_factory=Moment)
    allowance: Allowance = field(default_factory=Allowance)
    _in_state_mode: bool = False
    session_out: int = 1
    _sequence_out: int = 0
    # (sequence, bytes, when it left, whether it asks for its acknowledgement)
    _in_flight: deque[tuple[int, int, int, bool]] = field(default_factory=deque)
    bytes_in_flight: int = 0
    _was_late: bool = False  # the last acknowledgement, for the newest of what it was of
    _oldest: tuple[int, int] | None = None  # (session, sequence) of the first in flight, when we last looked
    _oldest_ms: int = 0  # and since when
    session_in: int = 0
    _sequence_in: int = 0
    _broken_in: bool = False
    _unacknowledged_bytes: int = 0
    _unacknowledged_messages: int = 0
    _unclaimed_bytes: int = 0  # that arrived in the peer's session since our last acknowledgement of it
    _unclaimed_messages: int = 0

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped: what waits for credit of it would be thrown away by the peer, too."""
        self.allowance.forget_keyspace(keyspace)
        self.waiting.drop(keyspace)

    def overruns(self, payload_bytes: int) -> bool:
        """Count a sequenced message that was just placed; whether the peer sends what no credit of ours allows."""
        self._unclaimed_bytes += payload_bytes
        self._unclaimed_messages += 1
        return self._unclaimed_bytes > OVERRUN_BYTES or self._unclaimed_messages > OVERRUN_MESSAGES

    @property
    def is_busy(self) -> bool:
        """Whether something waits for credit, or the rows of what found none are due."""
        return bool(self.waiting) or self.in_state_mode

    @property
    def in_state_mode(self) -> bool:
        """Whether it is, for some keyspace (`p2p.busy.backlog`)."""
        return self._in_state_mode

    @in_state_mode.setter
    def in_state_mode(self, entered: bool) -> None:
        self._in_state_mode = entered
        self.window.queue_ms = STATE_QUEUE_MS if entered else QUEUE_MS

    @property
    def messages_in_flight(self) -> int:
        """Messages that are not acknowledged yet."""
        return len(self._in_flight)

    def envelope(self) -> Envelope:
        """For a message outside any session."""
        return Envelope(self.own_boot, self.boot, version=self.version)

    @property
    def is_measured(self) -> bool:
        """Whether credit follows what the path takes: no rate is set, and the peer acknowledges when it is asked to."""
        return self.bucket is None and self.version >= ASKS_SINCE

    @property
    def credit_bytes(self) -> int:
        """How many bytes may be on their way."""
        if self.bucket is not None:
            return min(CREDIT_BYTES_MAX, int(self.bucket.rate * 2 * self.round_trip.ms))
        return self.window.credit(CREDIT_BYTES_MAX, trusting=not self.in_state_mode) if self.is_measured else CREDIT_BYTES_MAX

    @property
    def full_bytes(self) -> int:
        """So many bytes in flight mean a busy card: all that may ever be, or what a path that was found narrow takes."""
        return self.credit_bytes if self.is_measured and self.window.is_narrow else CREDIT_BYTES_MAX

    @property
    def rate(self) -> float | None:
        """Bytes a millisecond that are set for it, or that it was found to take; None: neither."""
        if self.bucket is not None:
            return self.bucket.rate
        return self.window.rate if self.is_measured else None

    @property
    def returns_ms(self) -> int:
        """How long it takes at least until credit that is used up comes back, where no rate is set."""
        return self.window.round_trip_ms or 0

    @property
    def is_late(self) -> bool:
        """Whether a message in flight should have been acknowledged, had the path taken what is on its way."""
        if not self._in_flight or not self.is_measured:
            return False
        target_ms, now_ms = self.window.target_ms, self.moment.ms
        return (
            self.window.waits_ms(self.session_out, now_ms) > target_ms
            or now_ms - self._in_flight[0][2] > target_ms + ACK_DELAY_MS
        )

    @property
    def is_full(self) -> bool:
        """Whether the path is known to take less than is asked of it; where no acknowledgement comes, all may be lost."""
        if not self.is_measured or self.window.is_narrow or self._was_late:
            return True
        return self.bytes_in_flight >= self.credit_bytes or len(self._in_flight) >= CREDIT_MESSAGES_MAX

    @property
    def no_credit_why(self) -> str:
        """For the operator: why nothing may go out; empty where something may."""
        if len(self._in_flight) >= CREDIT_MESSAGES_MAX:
            return "messages in flight"
        if self.bytes_in_flight >= self.credit_bytes:
            return "bytes in flight"
        if self.is_late:
            return "acknowledgement late"
        return "rate" if self.bucket is not None and self.bucket.level <= 0 else ""

    def has_credit(self) -> bool:
        """Whether one more message may go out. The last one may overshoot: messages are bounded."""
        return self._has_credit(self.credit_bytes, CREDIT_BYTES_MAX, CREDIT_MESSAGES_MAX)

    def has_credit_for_repairs(self) -> bool:
        """Whether a chunk of an answer may go out; half is left for batches, since each that finds no room is a repair more."""
        most = self.window.credit_for_repairs(CREDIT_BYTES_MAX) if self.is_measured else self.credit_bytes // 2
        return self._has_credit(most, CREDIT_BYTES_MAX // 2, CREDIT_MESSAGES_MAX // 2)

    def admits_batch(self, payload_bytes: int) -> bool:
        """Whether a batch may go out: with credit, or if it only says that its writer is idle, which makes no path slower."""
        if self.has_credit():
            return True
        return not payload_bytes and self.is_measured and len(self._in_flight) < CREDIT_MESSAGES_MAX

    def _has_credit(self, bytes_max: int, bytes_lost_max: int, messages_max: int) -> bool:
        if len(self._in_flight) >= messages_max:
            return False
        if self.bytes_in_flight >= bytes_max or self.is_late:
            # What is in flight may be lost, which only another message shows (R3): there is room for one now and then.
            silent = bool(self._in_flight) and self.window.is_silent(self.moment.ms)
            return self.is_measured and silent and self.bytes_in_flight < bytes_lost_max
        return self.bucket is None or self.bucket.has_tokens()

    def passes_in_ms(self, payload_bytes: int) -> float:
        """How long until a batch has passed whole, behind those that wait; 0 where it is not known how much passes.

        What its bucket lacks may still be on its way: a link that was idle has a full one.
        """
        rate, bucket = self.rate, self.bucket
        if rate is None:
            return 0.0
        ahead = 0.0 if bucket is None else bucket.burst - bucket.level
        return (ahead + self.waiting.bytes + payload_bytes) / rate

    def piece_bytes(self, most: int) -> int:
        """How large a message should be that may be of any size up to `most`."""
        if self.bucket is not None:
            return min(most, max(PIECE_BYTES_MIN, int(self.bucket.rate * PIECE_MS)))
        return self.window.piece_bytes(most) if self.is_measured else most

    def next_envelope(self, payload_bytes: int, hops: int = 0, claim_bytes: int = 0) -> Envelope:
        """Number the next message of the session and charge its bytes.

        Args:
            payload_bytes: keys, values and stamps.
            hops: of a batch.
            claim_bytes: what it has besides them and a header; charged to the budget of the regions only.
        """
        self._sequence_out += 1
        self.bytes_in_flight += payload_bytes
        session, sequence, asks = self.session_out, self._sequence_out, False
        if self.bucket is not None:
            self.bucket.take(payload_bytes + claim_bytes + MESSAGE_BYTES)
            self.round_trip.on_sent(session, sequence, self.bucket.at_ms)
        elif self.is_measured:
            asks = self.window.on_sent(session, sequence, payload_bytes, self.bytes_in_flight, self.moment.ms)
        self._in_flight.append((sequence, payload_bytes, self.moment.ms, asks))
        return Envelope(self.own_boot, self.boot, session, sequence, hops, self.version, asks)

    def restart_session(self) -> None:
        """Forget what is in flight and begin the next session."""
        self.session_out += 1
        self._sequence_out = 0
        self._in_flight.clear()
        self.bytes_in_flight = 0
        self.traffic.sessions_broken += 1

    def on_ack(self, session: int, sequence: int) -> bool:
        """Release credit for an applied prefix; True when it released any, of bytes or of messages (beats have no bytes).

        Acks of older sessions mean nothing, nor do those of what was never sent: they may be meant for a link that we forgot,
        or be told by somebody who would like more than the credit.
        """
        if session != self.session_out or sequence > self._sequence_out:
            return False
        newest = None
        while self._in_flight and self._in_flight[0][0] <= sequence:
            newest = self._in_flight.popleft()
            self.bytes_in_flight -= newest[1]
        if self.bucket is not None:
            self.round_trip.on_ack(session, sequence, self.bucket.at_ms)
        elif self.is_measured and newest is not None:
            # Whatever was lost before, it took no less: it came at once, or after the delay.
            taken_ms = self.moment.ms - newest[2] - (0 if newest[3] else ACK_DELAY_MS)
            self._was_late = taken_ms > self.window.target_ms
            self.window.on_ack(session, sequence, self.moment.ms, CREDIT_BYTES_MAX, late=self._was_late)
        return newest is not None

    @property
    def sequence_out(self) -> int:
        """Of the last message that was sent in this session."""
        return self._sequence_out

    @property
    def sequence_acknowledged(self) -> int:
        """Of the last one that is acknowledged."""
        return self._in_flight[0][0] - 1 if self._in_flight else self._sequence_out

    @property
    def waits_for_ack(self) -> bool:
        """Whether anything is in flight."""
        return bool(self._in_flight)

    def is_stuck(self, now_ms: int) -> bool:
        """Whether the first message in flight has waited for `ACK_SILENCE_MS`; to be asked now and then.

        At the rate of a budget, or of a narrow path, what is in flight may take longer.
        """
        oldest = (self.session_out, self._in_flight[0][0]) if self._in_flight else None
        if oldest != self._oldest:
            self._oldest, self._oldest_ms = oldest, now_ms
        silence_ms = ACK_SILENCE_MS + (0 if self.rate is None else 2 * self.bytes_in_flight / self.rate)
        return oldest is not None and now_ms - self._oldest_ms >= silence_ms

    def is_broken(self, session: int) -> bool:
        """Whether messages of this session come behind a hole, and mean nothing."""
        return self._broken_in and session == self.session_in

    def on_arrival(self, envelope: Envelope) -> Arrival:
        """Place a sequenced message; after a hole every message of that session is `BROKEN`."""
        if envelope.session > self.session_in:
            self.session_in, self._sequence_in, self._broken_in = envelope.session, 0, False
            self._unacknowledged_bytes = self._unacknowledged_messages = 0
            self._unclaimed_bytes = self._unclaimed_messages = 0
        if envelope.session < self.session_in or (envelope.sequence <= self._sequence_in and not self._broken_in):
            return Arrival.REPEAT
        if self._broken_in or envelope.sequence != self._sequence_in + 1:
            self._broken_in = True
            return Arrival.BROKEN
        self._sequence_in = envelope.sequence
        return Arrival.NEXT

    def note_applied(self, payload_bytes: int, *, asked: bool = False) -> bool:
        """A sequenced message was applied; True when an acknowledgement is due now, also because it asked for one."""
        self._unacknowledged_bytes += payload_bytes
        self._unacknowledged_messages += 1
        enough = ACK_BYTES if self.bucket is None else min(ACK_BYTES, int(self.bucket.pair_rate * RATED_ACK_MS))
        return asked or self._unacknowledged_bytes >= enough or self._unacknowledged_messages >= ACK_MESSAGES

    @property
    def ack_waits(self) -> bool:
        """Whether something applied is not acknowledged yet."""
        return self._unacknowledged_messages > 0

    def take_ack(self) -> tuple[int, int]:
        """The acknowledgement to send: (session, applied prefix)."""
        self._unacknowledged_bytes = self._unacknowledged_messages = 0
        if not self._broken_in:  # what came after a hole is acknowledged by nothing, so its sender never gets credit for it
            self._unclaimed_bytes = self._unclaimed_messages = 0
        return self.session_in, self._sequence_in
