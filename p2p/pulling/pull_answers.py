"""A pull by version vector, on the side that answers: every row above the asker's vector, and ours last.

Why that is enough, and when a pull is due: `p2p.pulling.pull`. Answers are bounded by credit (`p2p.pulling.outbox`), like every
other stream.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.errors import RemoteProtocolError
from p2p.link.links import Link
from p2p.pulling.intake import bindings_of
from p2p.pulling.outbox import STREAMS_MAX, Completion, Outbox, PullStream
from p2p.pulling.whole import Mask, begin_whole, below_floor, floor_of, known_elsewhere, may_answer
from p2p.replica import U64, Selection
from p2p.stamps import WRITERS_MAX

# Who asks us for what we lack ourselves waits for so long, well below `PULL_SILENCE_MS`: an answer would be what came after the
# gap, which it has as well, and not what is missing. Then it is answered all the same.
HELD_MS_MAX = 1_000
HELD_MAX = 256
# Since when a reply can say that it brings shards whole; who cannot understand it is not answered where that is needed.
WHOLE_SINCE = 2

ABOVE_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True, slots=True)
class _Held:
    """A question that waits, since we lack what it is about."""

    request: m.PullRequest
    until_ms: int


class PullAnswers:
    """Answers to the pulls of others.

    Args:
        core: shared state.
        outboxes: by node; answers are streamed through them.
    """

    def __init__(self, core: Core, outboxes: dict[m.NodeId, Outbox]) -> None:
        self._core = core
        self._outboxes = outboxes
        self._bases: dict[int, U64] = {}  # by keyspace: zeros, but while an asker's vector is compared
        self._begun: dict[m.NodeId, dict[int, tuple[int, int]]] = {}  # asker -> keyspace -> its boot and question, of the last
        self._held: dict[int, dict[int, _Held]] = {}  # by keyspace and the asker's boot: they wait until our gap is closed

    @property
    def held(self) -> int:
        """Questions that wait until a gap of ours is closed, of the keyspace with most."""
        return max(map(len, self._held.values()), default=0)

    def drop_streams(self, node: m.NodeId) -> None:
        """What is on its way to a peer will not be whole: it asks again, and is answered again."""
        self._begun.pop(node, None)
        outbox = self._outboxes.get(node)
        if outbox is not None:
            outbox.streams.clear()

    def forget(self, node: m.NodeId) -> None:
        """A peer's life ended."""
        self._begun.pop(node, None)
        self._outboxes.pop(node, None)

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped."""
        self._bases.pop(keyspace, None)
        self._held.pop(keyspace, None)
        for begun in self._begun.values():
            begun.pop(keyspace, None)

    def next_ms(self) -> int | None:
        """When somebody has waited long enough."""
        if not self._held:  # as a rule; asked after every event
            return None
        return min([one.until_ms for held in self._held.values() for one in held.values()], default=None)

    def on_progress(self, keyspace: Keyspace, now: m.Now) -> None:
        """Our frontiers may have moved: who waited for that is answered."""
        held = self._held.get(keyspace.replica.keyspace)
        if not held:
            return
        for boot, one in list(held.items()):
            if now.monotonic_ms < one.until_ms and self._lacks_the_same(keyspace, one.request):
                continue
            del held[boot]
            link = self._core.by_boot.get(boot)
            # What both sides know of retirements may have changed since they were compared.
            if link is not None and one.request.retired_digest == self._core.retired_digest:
                self.on_request(link, one.request, now, waited=True)
                if link.node in self._outboxes:
                    self._outboxes[link.node].pump(self._core, link)

    @staticmethod
    def _lacks_the_same(keyspace: Keyspace, request: m.PullRequest) -> bool:
        """Whether we wait for steps, too, and are no farther than the asker: all that we could send is what came after them.

        Only where we ask above our region; else two who ask each other would wait for nothing.
        """
        knowledge = keyspace.knowledge
        if not knowledge.open_steps or not keyspace.gap_upstream:
            return False
        told = np.zeros(len(knowledge.frontier), np.uint64)
        told[request.writers] = request.frontier
        return bool((knowledge.frontier <= told).all())

    def on_request(self, link: Link, request: m.PullRequest, now: m.Now, waited: bool = False) -> None:
        """Select what the asker lacks and start to stream it.

        Raises:
            RemoteProtocolError: the vector is not one of this keyspace.
        """
        core = self._core
        keyspace = core.keyspaces.get(request.keyspace)
        begun = self._begun.setdefault(link.node, {})
        boot, answered = begun.get(request.keyspace, (0, 0))
        if boot == link.boot and request.request <= answered:
            return  # asked again, and the answer is on its way; or an older one, which came late
        outbox = self._outboxes.setdefault(link.node, Outbox())
        if keyspace is None or (len(outbox.streams) >= STREAMS_MAX and request.keyspace not in outbox.streams):
            core.counters.pulls_refused += 1
            return
        self._check_shards(keyspace, request)
        if not self._same_writers(link, keyspace, request):
            return
        if not waited and self._lacks_the_same(keyspace, request) and self._hold(link, request, now):
            return
        stream = self._stream(link, keyspace, request)
        if stream is None:
            return
        outbox.streams.pop(request.keyspace, None)
        outbox.streams[request.keyspace] = stream
        begun[request.keyspace] = link.boot, request.request
        core.counters.pulls_served += 1

    def _hold(self, link: Link, request: m.PullRequest, now: m.Now) -> bool:
        """Keep a question until there is more to say; False where there are too many of them, and it is answered now."""
        held = self._held.setdefault(request.keyspace, {})
        before = held.get(link.boot)
        if before is None and len(held) >= HELD_MAX:
            return False
        if before is None or before.request.request < request.request:
            held[link.boot] = _Held(request, now.monotonic_ms + HELD_MS_MAX)
        elif before.request.request == request.request:
            held[link.boot] = _Held(request, before.until_ms)
        return True

    def _stream(self, link: Link, keyspace: Keyspace, request: m.PullRequest) -> PullStream | None:
        """What the asker lacks, selected to be sent; None when we cannot claim anything to it."""
        core = self._core
        told, settled = set(request.writers.tolist()), keyspace.knowledge.settled
        writers = np.union1d(keyspace.knowledge.writers, [w for w in settled if w in told]).astype(np.uint16)
        # Read before the rows are selected: what is written meanwhile may be sent, and is not claimed.
        vector = np.ascontiguousarray(keyspace.knowledge.vector[:, writers])
        frontier = keyspace.knowledge.frontier[writers]
        with self._base_of(keyspace, request) as base:
            below = below_floor(keyspace, base)
            if below.any() and not may_answer(keyspace, below):
                core.counters.pulls_redirected += 1
                core.send(link, m.Incomplete(request.keyspace, request.request))
                return None
            if below.any() and link.version < WHOLE_SINCE:
                core.counters.pulls_refused += 1
                return None
            base[below] = 0
            selections = self._select(keyspace, base)
        # The newest version of a row is of such a step: the asker has it, or one that is newer still (T1).
        known = known_elsewhere(request.known, below)
        if len(known.stamps):
            selections = keyspace.replica.without(selections, known)
        stream = PullStream(request.keyspace, request.request, writers, vector, frontier, deque(), *bindings_of(core, keyspace))
        begin_whole(stream, below, selections)
        stream.recheck = lambda stream: self._complete(keyspace, request, stream)
        stream.floor = lambda shards: floor_of(keyspace, shards)
        core.counters.shards_sent_whole += int(below.sum())
        return stream

    def lacking(
        self, link: Link, keyspace: Keyspace, request: m.PullRequest, shards: Mask | None
    ) -> tuple[Mask, list[Selection]] | None:
        """What an asker lacks of some shards (None: of all), whoever wrote it; None when it cannot be told.

        Returns:
            The shards, bool[shards], that could only come whole; without any, the rows above the asker's vector.

        Raises:
            RemoteProtocolError: the vector is not one of this keyspace.
        """
        self._check_shards(keyspace, request)
        if not self._same_writers(link, keyspace, request):
            return None
        wanted = np.ones(request.shards, np.bool_) if shards is None else shards
        with self._base_of(keyspace, request) as base:
            below = below_floor(keyspace, base) & wanted
            if below.any():
                return below, []
            base[~wanted] = ABOVE_ALL
            try:
                selections = self._select(keyspace, base)
            finally:
                base[~wanted] = 0
        return below, keyspace.replica.without(selections, request.known) if len(request.known.stamps) else selections

    def _check_shards(self, keyspace: Keyspace, request: m.PullRequest) -> None:
        if request.shards != keyspace.knowledge.shards:
            raise RemoteProtocolError(f"pull of {request.shards} shards, the keyspace has {keyspace.knowledge.shards}")

    def _same_writers(self, link: Link, keyspace: Keyspace, request: m.PullRequest) -> bool:
        told = request.writers.tolist(), request.nonces.tolist()
        if len(request.nonces) and not self._core.same_writers(link.node, keyspace.replica.place.family, *told):
            self._core.counters.pulls_refused += 1
            return False
        return True

    @contextmanager
    def _base_of(self, keyspace: Keyspace, request: m.PullRequest) -> Iterator[U64]:
        """The asker's vector, uint64[shards, WRITERS_MAX], for a moment."""
        # One for all requests: a fresh one costs 6 us a shard, since 32 KiB of it are made and thrown away, 0.1 us of it used.
        base = self._bases.get(request.keyspace)
        if base is None:
            base = self._bases[request.keyspace] = np.zeros((request.shards, WRITERS_MAX), np.uint64)
        base[:, request.writers] = request.vector
        # Who agrees with us on what is retired leaves out what it has all of.
        told, settled = set(request.writers.tolist()), keyspace.knowledge.settled
        reached = [writer for writer in settled if writer not in told]
        for writer in reached:
            base[:, writer] = settled[writer]
        try:
            yield base
        finally:
            base[:, request.writers] = 0
            base[:, reached] = 0

    def _select(self, keyspace: Keyspace, base: U64) -> list[Selection]:
        cached = self._core.options.sync.cache
        return keyspace.replica.changed_since(base) if cached else keyspace.replica.scan_since(base)

    def _complete(self, keyspace: Keyspace, request: m.PullRequest, stream: PullStream) -> Completion:
        """All rows of a stream are read: it may claim where the asker is not below the floor as it is now."""
        with self._base_of(keyspace, request) as base:
            below = below_floor(keyspace, base)
            below[stream.whole] = True
            if not may_answer(keyspace, below):  # of those that came whole, too: rows may have gone before they were read
                return Completion.GIVE_UP
            below[stream.whole] = False
            if not below.any():
                return Completion.CLAIM
            base[~below] = ABOVE_ALL
            base[below] = 0
            try:
                begin_whole(stream, below, self._select(keyspace, base))
            finally:
                base[...] = 0
        self._core.counters.shards_sent_whole += int(below.sum())
        return Completion.GO_ON
