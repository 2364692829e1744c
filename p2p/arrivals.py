"""What comes in sessions: placed, counted, and acknowledged once it is applied (R3).

Every message with rows passes `take` first. What it brought is then applied by its part, and `applied` says so to its sender,
at once or together with what comes next; what a part refuses is not on its way any more either.
"""

from p2p import messages as m
from p2p.busy.feeds import Feeds
from p2p.core import Core
from p2p.errors import RemoteProtocolError
from p2p.link import links
from p2p.link.links import Arrival, Link
from p2p.pulling.pull import Pull


class Arrivals:
    """The receiving end of all sessions.

    Args:
        core: shared state.
        pull: gives up answers that lie behind a hole.
        feeds: the same for rows of backlogs.
    """

    def __init__(self, core: Core, pull: Pull, feeds: Feeds) -> None:
        self._core = core
        self._pull = pull
        self._feeds = feeds
        self._owed: dict[int, Link] = {}  # by boot: links on which something applied is not acknowledged yet
        self._ack_ms: int | None = None  # when those want the timer

    def take(self, link: Link, envelope: m.Envelope, rows: m.Rows) -> Arrival:
        """What a message is to its session. After a hole, and as a repeat, only a batch is worth anything.

        Raises:
            RemoteProtocolError: it belongs to no session, or to one that brings more than its credit.
        """
        if envelope.session == 0:
            raise RemoteProtocolError("a batch or pull chunk outside any session")
        begins, was_broken = envelope.session > link.session_in, link.is_broken(envelope.session)
        arrival = link.on_arrival(envelope)
        if link.overruns(rows.payload_bytes):
            self._core.counters.credit_overruns += 1
            raise RemoteProtocolError(f"session {envelope.session} brings more than its credit, and goes on unacknowledged")
        if begins:  # with credit of its own, so that credit bounds no sessions
            self._core.emit(m.Unwanted())
        if arrival is Arrival.BROKEN:
            self._core.counters.sessions_broken += 1
            if not was_broken:  # what was asked since then is answered in the next session
                self._pull.abandon_from(link.node, "the session has a hole")
                self._feeds.spoil(link)
            self._core.send(link, m.SessionBroken(envelope.session))
        link.traffic.rows_in += rows.row_count
        link.traffic.bytes_in += rows.payload_bytes
        return arrival

    def applied(self, link: Link, envelope: m.Envelope, rows: m.Rows) -> None:
        """The next message of its session was applied."""
        if link.note_applied(rows.payload_bytes, asked=envelope.asks):
            self._core.send(link, m.Ack(*link.take_ack()))
        else:
            self._owed[link.boot] = link

    def applied_at_once(self, link: Link, rows: m.Rows) -> None:
        """The same, for a sender that has nothing but acknowledgements to go by."""
        link.note_applied(rows.payload_bytes)
        self._core.send(link, m.Ack(*link.take_ack()))

    def refused(self, link: Link, arrival: Arrival, rows: m.Rows) -> None:
        """What was refused is not on its way any more: its credit goes back, or the link would dry up.

        With the timer, since a message that is refused has no effects of its own.
        """
        if arrival is Arrival.NEXT:
            link.note_applied(rows.payload_bytes)
            self._owed[link.boot] = link

    def on_timer(self, now: m.Now) -> None:
        """Acknowledge everything that is applied and not acknowledged yet, when it is time."""
        if self._ack_ms is None or now.monotonic_ms < self._ack_ms:
            return
        owed, self._owed, self._ack_ms = self._owed, {}, None
        for boot, link in owed.items():
            if link.ack_waits and self._core.by_boot.get(boot) is link:
                self._core.send(link, m.Ack(*link.take_ack()))

    def next_ms(self, now_ms: int) -> int | None:
        """When the timer is wanted; an absolute moment, which events do not push away."""
        if not self._owed:
            self._ack_ms = None
        elif self._ack_ms is None:
            self._ack_ms = now_ms + links.ACK_DELAY_MS
        return self._ack_ms
