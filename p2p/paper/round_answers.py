"""A round by shard versions, on the side that answers: which versions changed, and the rows of the shards that are wanted.

The four messages and why they are enough: `p2p.paper.rounds`. A question to which there is nothing to say is kept until there
is, for an interval at most (`SyncOptions.held`): whether a version changed is one number to compare, so that costs less than to
be asked again and again. Answers are bounded by credit, like every other stream.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.errors import RemoteProtocolError
from p2p.link.links import Link
from p2p.paper.shard_versions import OwnVersions
from p2p.pulling.intake import bindings_of
from p2p.pulling.outbox import STREAMS_MAX, Completion, Outbox, PullStream
from p2p.pulling.whole import Mask, begin_whole, below_floor, floor_of, may_answer
from p2p.replica import U64, Selection
from p2p.stamps import WRITERS_MAX

# Questions that wait at a time, of all keyspaces; those beyond are answered at once, with nothing.
HELD_MAX = 4_096

_ABOVE_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True, slots=True)
class _Held:
    """A question to which there was nothing to say."""

    link: Link
    wanted: m.VersionsWanted
    until_ms: int


class RoundAnswers:
    """Messages 1 and 3 of the rounds that neighbours begin.

    Args:
        core: shared state.
        versions: this node's own.
        outboxes: by node; answers are streamed through them.
    """

    def __init__(self, core: Core, versions: OwnVersions, outboxes: dict[m.NodeId, Outbox]) -> None:
        self._core = core
        self._versions = versions
        self._outboxes = outboxes
        # By keyspace, uint64[shards, WRITERS_MAX]: zeros, but while an answer is selected.
        self._bases: dict[int, U64] = {}
        self._held: dict[tuple[int, m.NodeId], _Held] = {}  # by keyspace and neighbour, one each

    @property
    def held(self) -> int:
        """Questions that wait until there is something to say."""
        return len(self._held)

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped."""
        self._bases.pop(keyspace, None)
        for place in [place for place in self._held if place[0] == keyspace]:
            del self._held[place]

    def next_ms(self) -> int | None:
        """When the timer is wanted next."""
        return min((one.until_ms for one in self._held.values()), default=None) if self._held else None

    def on_versions_wanted(self, link: Link, wanted: m.VersionsWanted, now: m.Now) -> None:
        """Message 1 came: tell which versions changed, once any has (`SyncOptions.held`)."""
        core = self._core
        keyspace = core.keyspaces.get(wanted.keyspace)
        if keyspace is None or not core.options.sync.shard_versions:
            core.counters.pulls_refused += 1
            return
        versions = self._versions.of(keyspace)
        versions.current()
        if core.options.sync.held and versions.mark <= wanted.since and len(self._held) < HELD_MAX:
            until_ms = now.monotonic_ms + core.options.sync.interval_ms
            self._held[wanted.keyspace, link.node] = _Held(link, wanted, until_ms)
            return
        self._list(link, keyspace, wanted)

    def on_progress(self, keyspace: Keyspace) -> None:
        """Vectors may have moved: answer the questions that wait for that."""
        number = keyspace.replica.keyspace
        waiting = [place for place in self._held if place[0] == number]
        if not waiting:
            return
        versions = self._versions.of(keyspace)
        versions.current()
        for place in waiting:
            if versions.mark > self._held[place].wanted.since:
                self._release(place)

    def on_timer(self, now: m.Now) -> None:
        """Questions have waited long enough."""
        for place in [place for place, one in self._held.items() if now.monotonic_ms >= one.until_ms]:
            self._release(place)

    def _release(self, place: tuple[int, m.NodeId]) -> None:
        one = self._held.pop(place)
        keyspace = self._core.keyspaces.get(place[0])
        if keyspace is not None and self._core.by_boot.get(one.link.boot) is one.link:
            self._list(one.link, keyspace, one.wanted)

    def _list(self, link: Link, keyspace: Keyspace, wanted: m.VersionsWanted) -> None:
        """Message 2."""
        core, versions = self._core, self._versions.of(keyspace)
        current = versions.current()
        # A vector never lags the frontier read with it, so who dominates the vectors holds what the frontier says.
        writers = keyspace.knowledge.writers
        shards = versions.changed_since(wanted.since)
        core.counters.shards_listed += len(shards)
        link.allowance.charge_shards(wanted.keyspace, len(shards))
        frontier = keyspace.knowledge.frontier[writers]
        core.send(
            link, m.VersionList(wanted.keyspace, wanted.request, versions.mark, shards, current[shards], writers, frontier)
        )

    def on_shards_wanted(self, link: Link, wanted: m.ShardsWanted) -> None:
        """Message 3 came: select what the asker lacks in these shards, and start to stream it.

        Raises:
            RemoteProtocolError: shards that do not exist.
        """
        core = self._core
        keyspace = core.keyspaces.get(wanted.keyspace)
        outbox = self._outboxes.setdefault(link.node, Outbox())
        running = outbox.streams.get(wanted.keyspace)
        if running is not None and running.shards is not None and running.request == wanted.request:
            return  # it was asked again
        if keyspace is None or not core.options.sync.shard_versions or (running is None and len(outbox.streams) >= STREAMS_MAX):
            core.counters.pulls_refused += 1
            return
        link.allowance.charge_shards(wanted.keyspace, len(wanted.shards))
        shards = keyspace.knowledge.shards
        if int(wanted.shards[-1]) >= shards:
            raise RemoteProtocolError(f"pull of shard {wanted.shards[-1]}, the keyspace has {shards}")
        # Versions and vectors are read before the rows are selected: what is written meanwhile may be sent, and is not claimed.
        versions = self._versions.of(keyspace).current()[wanted.shards]
        told, settled = set(wanted.writers.tolist()), keyspace.knowledge.settled
        writers = np.union1d(keyspace.knowledge.writers, [w for w in settled if w in told]).astype(np.uint16)
        vectors = np.ascontiguousarray(keyspace.knowledge.vector[np.ix_(wanted.shards, writers)])
        below, selections = self._select(keyspace, wanted, np.zeros(shards, np.bool_))
        if not may_answer(keyspace, below):
            core.counters.pulls_redirected += 1
            core.send(link, m.Incomplete(wanted.keyspace, wanted.request))
            return
        outbox.streams.pop(wanted.keyspace, None)
        nothing = np.empty(0, np.uint64)
        stream = outbox.streams[wanted.keyspace] = PullStream(
            wanted.keyspace,
            wanted.request,
            writers,
            vectors,
            nothing,
            deque(),
            *bindings_of(core, keyspace),
            wanted.shards,
            versions,
        )
        begin_whole(stream, below, selections)
        stream.recheck = lambda stream: self._complete(keyspace, wanted, stream)
        stream.floor = lambda shards: floor_of(keyspace, shards)
        core.counters.pulls_served += 1
        core.counters.shards_sent_whole += int(below.sum())

    def _complete(self, keyspace: Keyspace, wanted: m.ShardsWanted, stream: PullStream) -> Completion:
        """All rows of a stream are read: it may claim where the asker is not below the floor as it is now."""
        sent = np.zeros(keyspace.knowledge.shards, np.bool_)
        sent[stream.whole] = True
        below, selections = self._select(keyspace, wanted, sent, only_below=True)
        if not may_answer(keyspace, below | sent):
            return Completion.GIVE_UP
        if not below.any():
            return Completion.CLAIM
        begin_whole(stream, below, selections)
        self._core.counters.shards_sent_whole += int(below.sum())
        return Completion.GO_ON

    def _select(
        self, keyspace: Keyspace, wanted: m.ShardsWanted, sent: Mask, only_below: bool = False
    ) -> tuple[Mask, list[Selection]]:
        """Rows of the wanted shards above the asker's vectors: of the others we pretend that it has everything.

        Retired writers that it does not name it has all of, since we agree on what is retired (R13).

        Args:
            keyspace: of which.
            wanted: the question.
            sent: bool[shards]: which of them have come whole.
            only_below: leave out what the asker can be told without.

        Returns:
            Which shards must come whole, besides those, since the asker is below our loss floor; and the rows.
        """
        settled = keyspace.knowledge.settled
        writers = np.union1d(keyspace.knowledge.writers, list(settled)).astype(np.uint16)
        base = self._bases.get(wanted.keyspace)
        if base is None:  # one for all answers, as in `PullAnswers`
            base = self._bases[wanted.keyspace] = np.zeros((keyspace.knowledge.shards, WRITERS_MAX), np.uint64)
        base[:, writers] = _ABOVE_ALL
        base[np.ix_(wanted.shards, writers)] = 0
        for writer, floor in settled.items():
            base[wanted.shards, writer] = floor[wanted.shards]
        base[np.ix_(wanted.shards, wanted.writers)] = wanted.vectors
        select = keyspace.replica.changed_since if self._core.options.sync.cache else keyspace.replica.scan_since
        try:
            below = below_floor(keyspace, base) & ~sent
            base[np.ix_(below, writers)] = 0
            if only_below:
                if not below.any():
                    return below, []
                base[np.ix_(~below, writers)] = _ABOVE_ALL
            return below, select(base)
        finally:
            base[:, writers] = 0
            base[:, wanted.writers] = 0
