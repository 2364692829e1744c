"""A round by shard versions, on the side that asks: four messages that move only what changed, of many shards at once.

The paper (Ekko, OSDI '22, sections 4.1 and 4.4.2). r asks, s answers:

1. `VersionsWanted`: which shard versions of yours have changed since the last round?
2. `VersionList`: these. r keeps a list for each neighbour, and compares it with its own versions.
3. `ShardsWanted`: the vectors of just those shards whose version at r does not cover the one at s.
4. `ShardsReply`: their rows above these vectors, streamed in chunks, then s's vectors and versions of them.

Rows are applied as they come and claim nothing. Knowledge is staged: r merges s's vectors when all chunks are here, and adopts,
picks or mints versions then (`p2p.paper.shard_versions`); until then, and if the answer breaks off, it knows what it knew
before.

Two things the lists remember beside the versions. A shard is *settled* when our vector is known to dominate the one that its
listed version names, by a cover or by a merge; it stays so, since vectors only grow, until the list says another version. And
the neighbour's frontier of the same moment: when every shard of a list is settled, all that the neighbour had then is here, so
its frontier may be merged. (No round needs to fetch all shards for it: with leaders, none does.)

With `SyncOptions.held` a round does not wait for the one before it: message 1 of the next one leaves with message 3, and waits
at s until another version changes. Its list is put aside until the rows are here. It is newer than they are; were it compared,
or its versions noted, before, what the rows bring would be taken for what it names.

A question without an answer is repeated. The side that answers is `p2p.paper.round_answers`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from p2p import messages as m
from p2p import wire
from p2p.core import Core, Keyspace
from p2p.errors import RemoteProtocolError
from p2p.link.links import Link
from p2p.paper.shard_versions import Mask, OwnVersions, covers
from p2p.pulling import full
from p2p.pulling.intake import WholeArrivals, check_rows, check_writers, observe, take_rows
from p2p.replica import U64
from p2p.stamps import check_not_ahead

# Nothing heard for so long: the question or its answer was lost. Above the round trips of this planet.
REPEAT_MS = 500
# A round without progress for so long is given up; the next one may ask somebody else.
ROUND_SILENCE_MS = 3_000
# Vectors in one question. What exceeds it waits for the next round, which finds it on the list.
VECTORS_BYTES_MAX = 4 << 20
# Lists kept, 9 bytes a shard each, of all keyspaces; without its list a neighbour is asked for all versions again.
LISTS_MAX = 256

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
    follow: bool = False  # the next one is to begin as soon as this one ends
    begun_ms: int = 0
    news: bool = False  # the list was not empty
    ahead: m.VersionsWanted | None = None  # message 1 of the round after this one, sent together with message 3
    ahead_ms: int = 0
    ahead_list: m.VersionList | None = None  # and its answer
    listed: bool = False  # message 2 came
    next_chunk: int = 0
    whole: WholeArrivals = field(default_factory=WholeArrivals)

    @property
    def asked(self) -> NDArray[np.uint32]:
        """Shards whose rows are on their way."""
        return self.question.shards if isinstance(self.question, m.ShardsWanted) else _NO_SHARDS


class Rounds:
    """The rounds of one node with its neighbours, and what these have told.

    Args:
        core: shared state.
        versions: this node's own.
    """

    def __init__(self, core: Core, versions: OwnVersions) -> None:
        self._core = core
        self._versions = versions
        self._rounds: dict[Place, _Round] = {}
        self._lists: dict[Place, _Listed] = {}  # the one used longest ago first
        self._requests = 0
        self._followed: set[int] = set()  # keyspaces of which rounds ended that others are to follow

    @property
    def lists(self) -> int:
        """Neighbours' lists kept."""
        return len(self._lists)

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped."""
        self._followed.discard(keyspace)
        for place in [place for place in self._lists if place[0] == keyspace]:
            del self._lists[place]
        for place in [place for place in self._rounds if place[0] == keyspace]:
            del self._rounds[place]

    def next_ms(self) -> int | None:
        """When the timer is wanted next."""
        if not self._rounds:
            return None
        moments = [
            min(one.deadline_ms, one.repeat_ms) if not one.next_chunk else one.deadline_ms for one in self._rounds.values()
        ]
        return min(moments, default=None)

    # --- asking

    def begin(
        self,
        keyspace: Keyspace,
        link: Link,
        wanted: Mask,
        now: m.Now,
        after: m.NodeId | None = None,
        follow: bool = False,
    ) -> bool:
        """Message 1, unless a round with this neighbour is on its way; whether it is sent.

        Args:
            keyspace: of which.
            link: to the neighbour.
            wanted: bool[shards]: which of them to pull from it.
            now: both clocks.
            after: a fresher neighbour that is asked, too; this one is to give what that one has not.
            follow: whether the next one is to begin as soon as this one ends, if the neighbour had news or let us wait.
        """
        place = keyspace.replica.keyspace, link.node
        if place in self._rounds or full.pauses(keyspace, now):
            return False
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
        self._rounds[place] = _Round(
            link.boot, wanted, question, now.monotonic_ms, deadline_ms, first, follow, begun_ms=now.monotonic_ms
        )
        self._core.counters.rounds_started += 1
        self._ask(self._rounds[place], link, now)
        return True

    def take_followed(self) -> list[int]:
        """Keyspaces of which rounds ended, since this was asked, that others are to follow."""
        followed = sorted(self._followed)
        self._followed.clear()
        return followed

    def on_list(self, link: Link, told: m.VersionList, now: m.Now) -> None:
        """Message 2 came: compare, and ask for what our versions do not cover.

        Raises:
            RemoteProtocolError: shards that do not exist, or stamps from the future.
        """
        place = told.keyspace, link.node
        found = self._rounds.get(place)
        if found is None or found.boot != link.boot:
            return
        ahead = found.ahead is not None and told.request == found.ahead.request
        if not ahead and (found.listed or told.request != found.question.request):
            return
        keyspace = self._core.keyspaces[told.keyspace]
        if len(told.shards) and int(told.shards[-1]) >= keyspace.knowledge.shards:
            raise RemoteProtocolError(f"version of shard {told.shards[-1]}, the keyspace has {keyspace.knowledge.shards}")
        check_not_ahead(int(told.frontier.max()) if told.frontier.size else 0, now.unix_ms)
        if ahead:  # it is newer than the rows that are on their way, which must not be taken for it
            found.ahead_list = told
        else:
            self._take_list(place, found, told, now)

    def _take_list(self, place: Place, found: _Round, told: m.VersionList, now: m.Now) -> None:
        """Message 2, checked: compare, also what waited for it."""
        self._lists[place].take(told)
        found.listed, found.news = True, len(told.shards) > 0
        first = self._rounds.get(found.after) if found.after is not None else None
        if first is None or first.listed:
            self._compare(place, now)
        for other in [other for other, one in self._rounds.items() if one.after == place and one.listed and not len(one.asked)]:
            self._compare(other, now)

    def _compare(self, place: Place, now: m.Now) -> None:
        """A neighbour's list is here: message 3, if it has something for us."""
        found, listed, keyspace = self._rounds[place], self._lists[place], self._core.keyspaces[place[0]]
        listed.settle(self._versions.of(keyspace).current())
        wanted = found.wanted & ~listed.settled & (listed.versions != 0)
        for (number, _), other in self._rounds.items():
            if number == place[0]:
                wanted[other.asked] = False  # on its way from somebody else
        writers = keyspace.knowledge.writers
        shards = np.flatnonzero(wanted).astype(np.uint32)[: VECTORS_BYTES_MAX // (8 * max(1, len(writers)))]
        link = self._core.links.get(place[1])
        if not len(shards) or link is None:
            self._finish(place, keyspace, now)
            return
        vectors = np.ascontiguousarray(keyspace.knowledge.vector[np.ix_(shards, writers)])
        retired = self._core.retired_digest
        found.question = m.ShardsWanted(place[0], found.question.request, shards, writers, vectors, retired)
        found.deadline_ms = now.monotonic_ms + ROUND_SILENCE_MS
        self._core.counters.shards_asked += len(shards)
        self._ask(found, link, now)
        if found.follow and self._core.options.sync.held:
            self._requests += 1
            found.ahead = m.VersionsWanted(place[0], self._requests, listed.mark, retired)
            found.ahead_ms = now.monotonic_ms
            self._core.send(link, found.ahead)

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
        try:
            if not np.array_equal(reply.shards, found.question.shards if reply.last else _NO_SHARDS):
                raise RemoteProtocolError("an answer for other shards than were asked for")
            floor = () if reply.floor is None else (reply.floor.stamps,)
            check_rows(keyspace, reply.columns, (reply.vectors, *floor), now)
            check_writers(keyspace, reply.writers)
            if not np.isin(reply.whole, found.question.shards).all():
                raise RemoteProtocolError("shards come whole that were not asked for")
            found.whole.check(keyspace.knowledge.shards, reply.whole, reply.last, reply.floor)
        except RemoteProtocolError:
            self._abandon(place, "a chunk was refused")
            raise
        if not self._core.same_writers(link.node, keyspace.replica.place.family, reply.bound.tolist(), reply.nonces.tolist()):
            self._abandon(place, "the answer knows a writer under another nonce")
            return
        found.next_chunk += 1
        found.deadline_ms = now.monotonic_ms + ROUND_SILENCE_MS
        found.whole.begin(keyspace, reply.whole)
        if take_rows(self._core, keyspace, reply.columns, now) is None:
            self._abandon(place, "there is no room for it")
            full.call_off(self._core, link, last=reply.last)
            return
        if not found.whole.note(self._core, keyspace, reply.columns, reply.floor, now):
            self._abandon(place, "there is no room for the loss floor")
            full.call_off(self._core, link, last=reply.last)
            return
        if not reply.last:
            return
        every = np.zeros((keyspace.knowledge.shards, len(reply.writers)), np.uint64)
        if found.whole.active:
            every[reply.shards] = reply.vectors
        if not found.whole.finish(self._core, keyspace, reply.writers, every, now):
            self._abandon(place, "there is no room for the loss floor")
            return
        observe(self._core, reply.vectors)
        self._merge(place, keyspace, found.question, reply)
        full.note_room(self._core, keyspace, now)
        self._finish(place, keyspace, now)

    def _merge(self, place: Place, keyspace: Keyspace, asked: m.ShardsWanted, reply: m.ShardsReply) -> None:
        """All rows of the answer are applied."""
        versions, listed, knowledge = self._versions.of(keyspace), self._lists[place], keyspace.knowledge
        base = np.zeros_like(reply.vectors)
        _, ours, theirs = np.intersect1d(asked.writers, reply.writers, assume_unique=True, return_indices=True)
        base[:, theirs] = asked.vectors[:, ours]
        versions.current()
        knowledge.learn_reply(reply.writers, base, reply.vectors, np.zeros(len(reply.writers), np.uint64), reply.shards)
        versions.merge(reply.shards, reply.versions, reply.writers, reply.vectors)
        listed.versions[reply.shards], listed.settled[reply.shards] = reply.versions, True

    def _finish(self, place: Place, keyspace: Keyspace, now: m.Now) -> None:
        """A round is over. What it brought may complete what some neighbour had."""
        ended = self._rounds.pop(place)
        if ended.ahead is not None:
            self._go_on(place, ended, ended.ahead, now)
        # One without news that came back at once would come back at once again.
        elif ended.follow and (ended.news or now.monotonic_ms - ended.begun_ms >= self._core.options.sync.interval_ms):
            self._followed.add(place[0])
        self._core.counters.rounds_completed += 1
        own = self._versions.of(keyspace).current()
        for (number, _), listed in self._lists.items():
            if number == place[0] and not listed.frontier_merged:
                listed.settle(own)
                if listed.settled.all():
                    keyspace.knowledge.learn_frontier(listed.writers, listed.frontier)
                    listed.frontier_merged = True

    def _go_on(self, place: Place, ended: _Round, ahead: m.VersionsWanted, now: m.Now) -> None:
        """The round whose first question is on its way already, or answered."""
        deadline_ms, repeat_ms = now.monotonic_ms + ROUND_SILENCE_MS, now.monotonic_ms + REPEAT_MS
        one = self._rounds[place] = _Round(
            ended.boot, ended.wanted, ahead, repeat_ms, deadline_ms, follow=True, begun_ms=ended.ahead_ms
        )
        self._core.counters.rounds_started += 1
        if ended.ahead_list is not None:
            self._take_list(place, one, ended.ahead_list, now)

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

    def abandon_answered(self, link: Link, reply: m.ShardsReply, why: str) -> None:
        """Give up the round that this is an answer in, if it is still on its way."""
        place = reply.keyspace, link.node
        if self._find(place, link, reply.request) is not None:
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
        own = self._versions.of(keyspace).current()[wanted]
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


def speaks_rounds(link: Link) -> bool:
    """Whether the neighbour's version of the protocol has these messages."""
    return wire.since(m.VersionsWanted) <= link.version
