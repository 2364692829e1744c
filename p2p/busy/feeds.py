"""Rows that come in order of priority, over a link in state mode towards us: the receiver's side of `p2p.busy.backlog`.

We are told of it, and tell our vector, in a question of the pull; chunks follow, whose rows are applied and claim nothing, and
now and then a claim. It is taken only as the next message of an unbroken session in which every chunk since our question was
taken: if one was refused, found no room, or lay behind a hole, the claim would speak of rows that are not here. Then we ask
anew. Where there is no room, that is after a pause; until then what comes is taken for keys that are here, which needs none.

What is queued for us is not pulled (R16); for how long, the notices say, which are repeated. A parent that is gone, or gives
up, is silent, and pulls heal what is left as ever.
"""

import numpy as np

from p2p import messages as m
from p2p.busy.backlog import KEPT_MS
from p2p.busy.pairs import Feed, pairs_of
from p2p.core import Core, Keyspace
from p2p.errors import BlamelessError, RemoteProtocolError
from p2p.link.links import Link
from p2p.pulling import full
from p2p.pulling.intake import check_rows, check_writers, observe, take_rows
from p2p.pulling.pull import Pull

# A keyspace has a parent in each tree, and a few more while views differ.
FEEDS_MAX = 64
# Who has sent a batch on and has no room for it tells its vector after so long, so that the batch has arrived before: what came
# from us is not due to us (`p2p.busy.noting`). Longer than a batch waits for credit.
SENT_ON_MS = 1_000
# A question that brought no chunk is asked again, under its number, with the next notice after so long.
ASK_MS = 300


class Feeds:
    """All links that are in state mode towards us.

    Args:
        core: shared state.
        pull: asks.
    """

    def __init__(self, core: Core, pull: Pull) -> None:
        self._core = core
        self._pull = pull
        self._fed = 0  # feeds of all keyspaces, at least

    def on_notice(self, link: Link, told: m.Backlogged, now: m.Now) -> Feed | None:
        """A parent says that it has queued rows for us, or that it has not any more; returns the former.

        Raises:
            BlamelessError: more parents than anybody has.
        """
        keyspace = self._core.keyspaces.get(told.keyspace)
        if keyspace is None:
            return None
        if not told.on:
            self._end(keyspace, link.boot)
            return None
        feed = keyspace.feeds.get(link.boot)
        if feed is None and len(keyspace.feeds) >= FEEDS_MAX:
            raise BlamelessError(f"more than {FEEDS_MAX} parents in state mode")  # who came first may be who lies
        pairs = pairs_of(told.trees, list(zip(told.writers.tolist(), told.served.tolist(), strict=True)))
        until_ms = now.monotonic_ms + KEPT_MS
        if feed is None:
            feed = keyspace.feeds[link.boot] = Feed(link.node, pairs, told.number, until_ms, now.monotonic_ms)
            self._fed += 1
        elif feed.number != told.number:
            feed.request, feed.roomless, feed.flows, feed.asked_ms = 0, 0, False, -ASK_MS
        feed.pairs, feed.number, feed.until_ms, feed.retired_digest = pairs, told.number, until_ms, told.retired_digest
        wanted = not self._waits_for_room(keyspace, now) and not feed.flows and now.monotonic_ms - feed.asked_ms >= ASK_MS
        # Our vector may be megabytes: who makes us tell it pays as for a selection, or small notices would cost us large ones.
        if wanted and link.allowance.admits_selection(told.keyspace, now.monotonic_ms):
            feed.request, feed.roomless = self._pull.tell_vector(keyspace, link, feed.request), 0
            feed.asked_ms = now.monotonic_ms
        return feed

    @staticmethod
    def _waits_for_room(keyspace: Keyspace, now: m.Now) -> bool:
        sent_on = keyspace.full is not None and now.monotonic_ms - keyspace.full.batch_ms < SENT_ON_MS
        return sent_on or full.pauses(keyspace, now)

    def take(self, link: Link, chunk: m.StateChunk, now: m.Now) -> bool:
        """Apply a chunk, which is the next message of its session; with a claim, merge that (T1).

        Returns:
            Whether a claim was merged.

        Raises:
            RemoteProtocolError: rows that do not fit, or stamps from the future; what follows of this backlog is not taken.
        """
        core, keyspace = self._core, self._core.keyspaces.get(chunk.keyspace)
        feed = None if keyspace is None else keyspace.feeds.get(link.boot)
        if keyspace is None or feed is None or not self._expects(keyspace, feed, chunk, now):
            return False
        try:
            self._check(keyspace, chunk, now)
        except RemoteProtocolError:
            self.spoil(link)
            raise
        # Of pairs of which the notice did not tell, which may be late, nothing is known here of who sends them (R1).
        if not feed.pairs.cover(chunk.shards, chunk.writers, chunk.until) or not core.same_writers(
            link.node, keyspace.replica.place.family, chunk.bound.tolist(), chunk.nonces.tolist()
        ):
            self.spoil(link)
            return False
        feed.until_ms = now.monotonic_ms + KEPT_MS
        answers = chunk.request != 0 and chunk.request == feed.request
        feed.flows = feed.flows or answers
        columns = chunk.columns if answers or not chunk.request else full.held(keyspace, chunk.columns)
        written = take_rows(core, keyspace, columns, now)
        if written is None:
            self.spoil(link)
            answers, feed.roomless = False, chunk.request
            columns = full.held(keyspace, columns)
            written = take_rows(core, keyspace, columns, now)
        core.emit(m.RowsApplied(chunk.keyspace, columns))
        if written or (chunk.until > keyspace.knowledge.vector[np.ix_(chunk.shards, chunk.writers)]).any():
            feed.moved_ms = now.monotonic_ms
        claims = chunk.claims and answers
        if claims:
            observe(core, chunk.until, chunk.frontier)
            base = np.zeros_like(chunk.until)  # it is of what we told, and of what was claimed since
            knowledge = keyspace.knowledge
            knowledge.learn_reply(chunk.writers, base, chunk.until, np.zeros_like(chunk.frontier), chunk.shards)
            for column, writer in enumerate(chunk.writers.tolist()):
                knowledge.learn_frontier_later(writer, int(chunk.frontier[column]), chunk.rest_shards, chunk.rest[:, column])
        if chunk.ends:
            self._end(keyspace, link.boot)
        return claims

    def _expects(self, keyspace: Keyspace, feed: Feed, chunk: m.StateChunk, now: m.Now) -> bool:
        """Whether a chunk answers our question, or has rows that go ahead of it, which any time is right for (T3).

        A question carries what we know of retirements (R13), and is forgotten when that changes; rows that go ahead of it are
        taken while the sender knew the same when it said that they would come. So is what goes on coming for a question after
        something found no room.
        """
        if chunk.request:
            return chunk.request in (feed.request, feed.roomless)
        return feed.retired_digest == self._core.retired_digest and not full.pauses(keyspace, now)

    def _check(self, keyspace: Keyspace, chunk: m.StateChunk, now: m.Now) -> None:
        if not chunk.request and (chunk.claims or chunk.ends):
            raise RemoteProtocolError("a claim that answers no question: only rows may come ahead of one")
        for shards in (chunk.shards, chunk.rest_shards):
            if len(shards) and int(shards[-1]) >= keyspace.knowledge.shards:
                raise RemoteProtocolError(f"claim for shard {int(shards[-1])}, the keyspace has {keyspace.knowledge.shards}")
        check_rows(keyspace, chunk.columns, (chunk.until, chunk.frontier, chunk.rest), now)
        check_writers(keyspace, chunk.writers)

    def spoil(self, link: Link) -> None:
        """Something of what this parent sends is lost, or was not taken: no claim of it counts until it selects again."""
        for keyspace in self._core.keyspaces.values():
            self._spoil(keyspace.feeds.get(link.boot))

    def spoil_keyspace(self, keyspace: Keyspace) -> None:
        """A batch that we have sent on found no room here: who has it from us takes it that we have it."""
        for feed in keyspace.feeds.values():
            self._spoil(feed)

    def spoil_all(self) -> None:
        """What is retired has changed (R13)."""
        for keyspace in self._core.keyspaces.values():
            for feed in keyspace.feeds.values():
                self._spoil(feed)

    def _spoil(self, feed: Feed | None) -> None:
        if feed is None:
            return
        feed.roomless = 0
        if feed.request:
            feed.request, feed.flows = 0, False
            self._core.counters.feeds_spoiled += 1

    def forget(self, boot: int) -> None:
        """A parent's life ended."""
        for keyspace in self._core.keyspaces.values():
            self._end(keyspace, boot)

    def _end(self, keyspace: Keyspace, boot: int) -> None:
        if keyspace.feeds.pop(boot, None) is None:
            return
        self._fed -= 1

    def on_timer(self, now: m.Now) -> None:
        """Who has not told us again for too long is not in state mode any more."""
        if not self._fed:
            return
        for keyspace in self._core.keyspaces.values():
            for boot in [boot for boot, feed in keyspace.feeds.items() if feed.until_ms <= now.monotonic_ms]:
                self._end(keyspace, boot)

    def next_ms(self) -> int | None:
        """When the first of them counts no more."""
        if not self._fed:  # as a rule; asked after every event
            return None
        return min([feed.until_ms for one in self._core.keyspaces.values() for feed in one.feeds.values()], default=None)
