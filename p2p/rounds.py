"""A round by shard versions: four messages that move only what changed, of many shards at once.

The paper (Ekko, OSDI '22, sections 4.1 and 4.4.2). r asks, s answers:

1. `VersionsWanted`: which shard versions of yours have changed since the last round?
2. `VersionList`: these. r keeps a list for each neighbour, and compares it with its own versions.
3. `ShardsWanted`: the vectors of just those shards whose version at r does not cover the one at s.
4. `ShardsReply`: their rows above these vectors, streamed in chunks, then s's vectors and versions of them.

Rows are applied as they come and claim nothing. Knowledge is staged: r merges s's vectors when all chunks are here, and adopts,
picks or mints versions then (`p2p.shard_versions`); until then, and if the answer breaks off, it knows what it knew before.

Two things the lists remember beside the versions. A shard is *settled* when our vector is known to dominate the one that its
listed version names, by a cover or by a merge; it stays so, since vectors only grow, until the list says another version. And
the neighbour's frontier of the same moment: when every shard of a list is settled, all that the neighbour had then is here, so
its frontier may be merged. (No round needs to fetch all shards for it: with leaders, none does.)

A question without an answer is repeated. The neighbours' own answers are bounded by credit, like every other stream.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from p2p import messages as m
from p2p import wire
from p2p.core import Core, Keyspace
from p2p.errors import RemoteProtocolError
from p2p.intake import bindings_of, check_rows, take_rows
from p2p.links import Link
from p2p.outbox import STREAMS_MAX, Outbox, PullStream
from p2p.replica import U64, Selection
from p2p.shard_versions import Mask, ShardVersions, covers
from p2p.stamps import WRITERS_MAX, check_not_ahead

# Nothing heard for so long: the question or its answer was lost. Above the round trips of this planet.
REPEAT_MS = 500
# A round without progress for so long is given up; the next one may ask somebody else.
ROUND_SILENCE_MS = 3_000
# Vectors in one question. What exceeds it waits for the next round, which finds it on the list.
VECTORS_BYTES_MAX = 4 << 20
# Lists kept, 9 bytes a shard each, of all keyspaces; without its list a neighbour is asked for all versions again.
LISTS_MAX = 256

_ABOVE_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_NO_SHARDS = np.empty(0, np.uint32)

Place = tuple[int, m.NodeId]  # keyspace and neighbour


@dataclass(slots=True, eq=False)
class _Listed:
    """What a neighbour last said of its versions."""

    boot: int
    versions: U64  # [shards]; 0: it has not said
    settled: Mask  # [shards]: our vector dominates the one that its version names
    mark: int = 0
    writers: NDArray[np.uint16] = field(default_factory=lambda: np.empty(0, np.uint16))
    frontier: U64 = field(default_factory=lambda: np.empty(0, np.uint64))  # [w], of the moment of the last list
    frontier_merged: bool = True

    def take(self, told: m.VersionList) -> None:
        """A new list came."""
        changed = told.shards[self.versions[told.shards] != told.versions]
        self.versions[told.shards] = told.versions
        self.settled[changed] = False
        self.mark, self.writers, self.frontier = told.mark, told.writers, told.frontier
        self.frontier_merged = False

    def settle(self, own: U64) -> None:
        """Note where our versions, uint64[shards], cover the listed ones."""
        self.settled |= covers(own, self.versions) & (self.versions != 0)


@dataclass(slots=True, eq=False)
class _Round:
    """A round on its way."""

    boot: int
    wanted: Mask  # [shards]
    question: m.VersionsWanted | m.ShardsWanted
    repeat_ms: int
    deadline_ms: int
    after: Place | None = None  # a round whose list is to be compared first
    listed: bool = False  # message 2 came
    next_chunk: int = 0

    @property
    def asked(self) -> NDArray[np.uint32]:
        """Shards whose rows are on their way."""
        return self.question.shards if isinstance(self.question, m.ShardsWanted) else _NO_SHARDS


class Rounds:
    """Both sides of the four messages.

    Args:
        core: shared state.
        outboxes: by node; answers are streamed through them.
    """

    def __init__(self, core: Core, outboxes: dict[m.NodeId, Outbox]) -> None:
        self._core = core
        self._outboxes = outboxes
        self.versions: dict[int, ShardVersions] = {}  # by keyspace, as far as somebody has asked for them
        self._rounds: dict[Place, _Round] = {}
        self._lists: dict[Place, _Listed] = {}  # the one used longest ago first
        self._requests = 0
        self._bases: dict[
            int, U64
        ] = {}  # by keyspace, uint64[shards, WRITERS_MAX] of zeros, written while an answer is selected

    @property
    def lists(self) -> int:
        """Neighbours' lists kept."""
        return len(self._lists)

    def versions_of(self, keyspace: Keyspace) -> ShardVersions:
        """The versions of a keyspace's shards on this node."""
        number = keyspace.replica.keyspace
        if number not in self.versions:
            self.versions[number] = ShardVersions(keyspace.knowledge, self._core.options.boot, self._core.rng)
        return self.versions[number]

    def next_ms(self) -> int | None:
        """When the timer is wanted next."""
        moments = [
            min(one.deadline_ms, one.repeat_ms) if not one.next_chunk else one.deadline_ms for one in self._rounds.values()
        ]
        return min(moments, default=None)

    # --- asking

    def begin(self, keyspace: Keyspace, link: Link, wanted: Mask, now: m.Now, after: m.NodeId | None = None) -> None:
        """Message 1, unless a round with this neighbour is on its way.

        Args:
            keyspace: of which.
            link: to the neighbour.
            wanted: bool[shards]: which of them to pull from it.
            now: both clocks.
            after: a fresher neighbour that is asked, too; this one is to give what that one has not.
        """
        place = keyspace.replica.keyspace, link.node
        if place in self._rounds:
            return
        listed = self._lists.pop(place, None)
        if listed is None or listed.boot != link.boot:
            shards = keyspace.knowledge.shards
            listed = _Listed(link.boot, np.zeros(shards, np.uint64), np.zeros(shards, np.bool_))
        while len(self._lists) >= LISTS_MAX:
            oldest = next(iter(self._lists))
            del self._lists[oldest]
            self._rounds.pop(oldest, None)
        self._lists[place] = listed
        self._requests += 1
        question = m.VersionsWanted(place[0], self._requests, listed.mark, self._core.retired_digest)
        deadline_ms = now.monotonic_ms + ROUND_SILENCE_MS
        first = None if after is None else (place[0], after)
        self._rounds[place] = _Round(link.boot, wanted, question, now.monotonic_ms, deadline_ms, first)
        self._core.counters.rounds_started += 1
        self._ask(self._rounds[place], link, now)

    def on_list(self, link: Link, told: m.VersionList, now: m.Now) -> None:
        """Message 2 came: compare, and ask for what our versions do not cover.

        Raises:
            RemoteProtocolError: shards that do not exist, or stamps from the future.
        """
        place = told.keyspace, link.node
        found = self._find(place, link, told.request)
        if found is None or found.listed:
            return
        keyspace, listed = self._core.keyspaces[told.keyspace], self._lists[place]
        if len(told.shards) and int(told.shards[-1]) >= keyspace.knowledge.shards:
            raise RemoteProtocolError(f"version of shard {told.shards[-1]}, the keyspace has {keyspace.knowledge.shards}")
        check_not_ahead(int(told.frontier.max()) if told.frontier.size else 0, now.unix_ms)
        listed.take(told)
        found.listed = True
        first = self._rounds.get(found.after) if found.after is not None else None
        if first is None or first.listed:
            self._compare(place, now)
        for other in [other for other, one in self._rounds.items() if one.after == place and one.listed and not len(one.asked)]:
            self._compare(other, now)

    def _compare(self, place: Place, now: m.Now) -> None:
        """A neighbour's list is here: message 3, if it has something for us."""
        found, listed, keyspace = self._rounds[place], self._lists[place], self._core.keyspaces[place[0]]
        listed.settle(self.versions_of(keyspace).current())
        wanted = found.wanted & ~listed.settled & (listed.versions != 0)
        for (number, _), other in self._rounds.items():
            if number == place[0]:
                wanted[other.asked] = False  # on its way from somebody else
        writers = keyspace.knowledge.writers
        shards = np.flatnonzero(wanted).astype(np.uint32)[: VECTORS_BYTES_MAX // (8 * max(1, len(writers)))]
        link = self._core.links.get(place[1])
        if not len(shards) or link is None:
            self._finish(place, keyspace)
            return
        vectors = np.ascontiguousarray(keyspace.knowledge.vector[np.ix_(shards, writers)])
        retired = self._core.retired_digest
        found.question = m.ShardsWanted(place[0], found.question.request, shards, writers, vectors, retired)
        found.deadline_ms = now.monotonic_ms + ROUND_SILENCE_MS
        self._core.counters.shards_asked += len(shards)
        self._ask(found, link, now)

    def on_reply(self, link: Link, reply: m.ShardsReply, now: m.Now) -> None:
        """A chunk of message 4 came: apply its rows; with the last one, merge vectors and settle versions.

        Raises:
            RemoteProtocolError: not what was asked for, or stamps from the future; the round is given up.
        """
        place = reply.keyspace, link.node
        found = self._find(place, link, reply.request)
        if found is None or not isinstance(found.question, m.ShardsWanted):
            return
        if reply.chunk != found.next_chunk:
            self._abandon(place, "a chunk is missing")
            return
        keyspace = self._core.keyspaces[reply.keyspace]
        if not self._core.same_writers(link.node, keyspace.replica.place.family, reply.bound.tolist(), reply.nonces.tolist()):
            self._abandon(place, "the answer knows a writer under another nonce")
            return
        try:
            if not np.array_equal(reply.shards, found.question.shards if reply.last else _NO_SHARDS):
                raise RemoteProtocolError("an answer for other shards than were asked for")
            check_rows(keyspace, reply.columns, (reply.vectors,), now)
        except RemoteProtocolError:
            self._abandon(place, "a chunk was refused")
            raise
        found.next_chunk += 1
        found.deadline_ms = now.monotonic_ms + ROUND_SILENCE_MS
        take_rows(self._core, keyspace, reply.columns)
        if reply.last:
            self._merge(place, keyspace, found.question, reply)
            self._finish(place, keyspace)

    def _merge(self, place: Place, keyspace: Keyspace, asked: m.ShardsWanted, reply: m.ShardsReply) -> None:
        """All rows of the answer are applied."""
        versions, listed, knowledge = self.versions_of(keyspace), self._lists[place], keyspace.knowledge
        base = np.zeros_like(reply.vectors)
        _, ours, theirs = np.intersect1d(asked.writers, reply.writers, assume_unique=True, return_indices=True)
        base[:, theirs] = asked.vectors[:, ours]
        versions.current()
        knowledge.learn_reply(reply.writers, base, reply.vectors, np.zeros(len(reply.writers), np.uint64), reply.shards)
        versions.merge(reply.shards, reply.versions, reply.writers, reply.vectors)
        listed.versions[reply.shards], listed.settled[reply.shards] = reply.versions, True

    def _finish(self, place: Place, keyspace: Keyspace) -> None:
        """A round is over. What it brought may complete what some neighbour had."""
        del self._rounds[place]
        self._core.counters.rounds_completed += 1
        own = self.versions_of(keyspace).current()
        for (number, _), listed in self._lists.items():
            if number == place[0] and not listed.frontier_merged:
                listed.settle(own)
                if listed.settled.all():
                    keyspace.knowledge.learn_frontier(listed.writers, listed.frontier)
                    listed.frontier_merged = True

    def _ask(self, one: _Round, link: Link, now: m.Now) -> None:
        one.repeat_ms = now.monotonic_ms + REPEAT_MS
        self._core.send(link, one.question)

    def _find(self, place: Place, link: Link, request: int) -> _Round | None:
        found = self._rounds.get(place)
        return found if found is not None and (found.boot, found.question.request) == (link.boot, request) else None

    def on_timer(self, now: m.Now) -> None:
        """Repeat questions, give up rounds that stand still."""
        for place, one in list(self._rounds.items()):
            link = self._core.links.get(place[1])
            if now.monotonic_ms >= one.deadline_ms or link is None or link.boot != one.boot:
                self._abandon(place, "no answer")
            elif not one.next_chunk and now.monotonic_ms >= one.repeat_ms:
                if one.listed and not len(one.asked):
                    self._compare(place, now)  # whom it waited for does not answer
                else:
                    self._ask(one, link, now)

    def abandon_from(self, node: m.NodeId, why: str) -> None:
        """Give up every round with a neighbour whose session or life ended."""
        for place in [place for place in self._rounds if place[1] == node]:
            self._abandon(place, why)

    def _abandon(self, place: Place, why: str) -> None:
        del self._rounds[place]
        self._core.counters.rounds_abandoned += 1
        self._core.note("round_abandoned", keyspace=place[0], peer=place[1], why=why)

    def forget(self, node: m.NodeId) -> None:
        """A neighbour's life ended."""
        self.abandon_from(node, "the peer began a new life")
        for place in [place for place in self._lists if place[1] == node]:
            del self._lists[place]

    # --- whom to ask

    def freshness(self, keyspace: Keyspace, nodes: Sequence[m.NodeId], wanted: Mask) -> list[int]:
        """How fresh each node is, as far as its list tells; -1 for those that have none.

        Where versions are comparable, one ahead of ours counts most, one that is not behind ours counts too.
        """
        own = self.versions_of(keyspace).current()[wanted]
        scores = []
        for node in nodes:
            listed = self._lists.get((keyspace.replica.keyspace, node))
            if listed is None or not listed.mark:
                scores.append(-1)
                continue
            versions = listed.versions[wanted]
            level = covers(versions, own)
            scores.append(int(level.sum()) + len(own) * int((level & (versions != own)).sum()))
        return scores

    # --- answering

    def on_versions_wanted(self, link: Link, wanted: m.VersionsWanted) -> None:
        """Message 1 came: tell which versions changed."""
        core = self._core
        keyspace = core.keyspaces.get(wanted.keyspace)
        if keyspace is None or not core.options.sync.shard_versions:
            core.counters.pulls_refused += 1
            return
        versions = self.versions_of(keyspace)
        current = versions.current()
        # A vector never lags the frontier read with it, so who dominates the vectors holds what the frontier says.
        writers = keyspace.knowledge.writers
        shards = versions.changed_since(wanted.since)
        core.counters.shards_listed += len(shards)
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
        shards = keyspace.knowledge.shards
        if int(wanted.shards[-1]) >= shards:
            raise RemoteProtocolError(f"pull of shard {wanted.shards[-1]}, the keyspace has {shards}")
        # Versions and vectors are read before the rows are selected: what is written meanwhile may be sent, and is not claimed.
        versions = self.versions_of(keyspace).current()[wanted.shards]
        told, settled = set(wanted.writers.tolist()), keyspace.knowledge.settled
        writers = np.union1d(keyspace.knowledge.writers, [w for w in settled if w in told]).astype(np.uint16)
        vectors = np.ascontiguousarray(keyspace.knowledge.vector[np.ix_(wanted.shards, writers)])
        selections = deque(self._select(keyspace, wanted))
        outbox.streams.pop(wanted.keyspace, None)
        nothing = np.empty(0, np.uint64)
        outbox.streams[wanted.keyspace] = PullStream(
            wanted.keyspace,
            wanted.request,
            writers,
            vectors,
            nothing,
            selections,
            *bindings_of(core, keyspace),
            wanted.shards,
            versions,
        )
        core.counters.pulls_served += 1

    def _select(self, keyspace: Keyspace, wanted: m.ShardsWanted) -> list[Selection]:
        """Rows of the wanted shards above the asker's vectors: of the others we pretend that it has everything.

        Retired writers that it does not name it has all of, since we agree on what is retired (R13).
        """
        settled = keyspace.knowledge.settled
        writers = np.union1d(keyspace.knowledge.writers, list(settled)).astype(np.uint16)
        base = self._bases.get(wanted.keyspace)
        if base is None:  # one for all answers, as in `Pull`
            base = self._bases[wanted.keyspace] = np.zeros((keyspace.knowledge.shards, WRITERS_MAX), np.uint64)
        base[:, writers] = _ABOVE_ALL
        base[np.ix_(wanted.shards, writers)] = 0
        for writer, floor in settled.items():
            base[wanted.shards, writer] = floor[wanted.shards]
        base[np.ix_(wanted.shards, wanted.writers)] = wanted.vectors
        select = keyspace.replica.changed_since if self._core.options.sync.cache else keyspace.replica.scan_since
        try:
            return select(base)
        finally:
            base[:, writers] = 0
            base[:, wanted.writers] = 0


def speaks_rounds(link: Link) -> bool:
    """Whether the neighbour's version of the protocol has these messages."""
    return wire.since(m.VersionsWanted) <= link.version
