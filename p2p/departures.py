"""What leaves over links: sent while there is room, and dropped when a session ends.

A link has room again when something is acknowledged, or when the budget between two regions is refilled; then what waits for it
goes out: batches and rows that are due, before and after answers that are due by themselves.
"""

from p2p import messages as m
from p2p.busy.state_mode import StateMode
from p2p.core import Core
from p2p.link.links import Link
from p2p.pulling.pull import Pull
from p2p.pushing.push import Push


class Departures:
    """The sending end of all sessions.

    Args:
        core: shared state.
        push: batches that wait.
        state_mode: backlogs.
        pull: answers that stream.
    """

    def __init__(self, core: Core, push: Push, state_mode: StateMode, pull: Pull) -> None:
        self._core = core
        self._push = push
        self._state_mode = state_mode
        self._pull = pull
        self._turns: dict[str, int] = {}  # by region: whose turn it is when its bucket is refilled

    # --- sending

    def pump(self, link: Link) -> None:
        """Send what there is room for."""
        outbox = self._pull.outboxes.get(link.node)
        if outbox is not None and outbox.is_due(link):
            outbox.pump(self._core, link)
        self._push.pump(link)
        if outbox is not None:
            outbox.pump(self._core, link)
            if not outbox.streams:  # only those that stream are looked at again and again
                del self._pull.outboxes[link.node]

    def pump_streams(self) -> None:
        """The same to everybody to whom answers stream."""
        for node in list(self._pull.outboxes):
            if node in self._core.links:
                self.pump(self._core.links[node])

    def pump_refilled(self) -> None:
        """Send what found no tokens, where there are some again."""
        for bucket in self._core.budgets.take_refilled():
            self.pump_region(bucket.region)

    def pump_region(self, region: str) -> None:
        """All links to a region, the one that was first last time at the end now, so that none has all the tokens."""
        links_there = [link for link in self._core.links.values() if link.region == region]
        turn = self._turns[region] = (self._turns.get(region, 0) + 1) % max(1, len(links_there))
        for link in (*links_there[turn:], *links_there[:turn]):
            self.pump(link)

    def streams_wait(self) -> bool:
        """Whether an answer could go on streaming now."""
        links = self._core.links
        return any(
            box.streams and node in links and links[node].has_credit_for_repairs() for node, box in self._pull.outboxes.items()
        )

    # --- what the peer or the transport says of it

    def on_ack(self, link: Link, ack: m.Ack) -> None:
        """Some of it is applied."""
        if link.on_ack(ack.session, ack.sequence):
            self.pump(link)

    def on_session_broken(self, link: Link, session: int) -> None:
        """The peer met a hole."""
        if session == link.session_out:
            link.restart_session()
            self._drop_streams(link)

    def on_send_failed(self, envelope: m.Envelope) -> None:
        """The transport did not take a message: the receiver would see a hole. What was in flight is repaired by its pull."""
        link = self._core.by_boot.get(envelope.receiver_boot)
        if envelope.session and link is not None and envelope.session == link.session_out:
            link.restart_session()
            link.traffic.batches_skipped += 1
            self._core.counters.batches_skipped += 1
            self._drop_streams(link)

    def on_sent_smaller(self, boot: int, bytes_saved: int) -> None:
        """A message took less than was charged for it."""
        link = self._core.by_boot.get(boot)
        if link is not None and link.bucket is not None:
            link.bucket.give_back(bytes_saved)

    def free_stuck_links(self, now: m.Now) -> None:
        """Begin anew where nothing was acknowledged for long; keep nothing for who is silent."""
        core = self._core
        for link in core.links.values():
            # Most links carry heartbeats alone; whether their peers live need not be asked.
            if not link.waits_for_ack:
                continue
            if not core.membership.alive(link.node, now.monotonic_ms):
                self._state_mode.drop(link.boot)
                self._push.drop_waiting(link)  # it may be gone for good; if it comes back, it pulls
                continue
            if link.is_stuck(now.monotonic_ms):
                core.note("session_stuck", peer=link.node, bytes_in_flight=link.bytes_in_flight)
                link.restart_session()
                self._drop_streams(link)
            elif link.waiting:  # there may be room for one that would show a loss
                self._push.pump(link)

    def _drop_streams(self, link: Link) -> None:
        """A stream with a hole is worthless: its asker gives it up too, and asks again."""
        self._push.drop_waiting(link)
        self._state_mode.on_session_ended(link)
        self._pull.answers.drop_streams(link.node)
