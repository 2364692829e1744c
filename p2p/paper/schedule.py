"""Regular pulls: every interval, from whom.

This is the paper's way of moving updates, where push has no part (`p2p.paper.sync`). Three ways of choosing:

- By vector: one peer at random, everything.
- By shard versions: the *freshest* peer, as far as the neighbours' lists tell (`Rounds.freshness`), and one other, so that a
  fresher one is found and everybody is asked now and then: those of whom there is no list yet come first. The other gives what
  the freshest has not. Preferring nodes that write would halve the delay of an idle network, and make a star of a busy one: in
  the ablation everybody then waits for the writer's network card (6,900 ms instead of 860).
- With leaders (the paper, section 4.5): of a region's shards each node leads some. Those it pulls from the freshest node of the
  other regions, and from one other there; a shard that somebody else leads it pulls from its leader only. And a leader asks its
  own region, too: that is where its region's writers are.

An interval is how long who learns nothing waits. Who got something asks again at once (`SyncOptions.follow`): the one it got it
from, or the leader, or, by vector, another one at random. And a question about versions of which none is new waits where it is
(`SyncOptions.held`, `p2p.paper.round_answers`), so that an update waits for no interval at all, and an idle node asks no more
often.

The first pull of a life comes after a random part of the interval, so that nodes which start together do not all ask at the
same moment for ever after.
"""

from collections.abc import Sequence

import numpy as np

from p2p import messages as m
from p2p import placement
from p2p.core import Core, Keyspace
from p2p.members.membership import HOLDER_ROLES
from p2p.paper.leaders import leaders_of
from p2p.paper.rounds import speaks_rounds
from p2p.paper.shard_versions import Mask
from p2p.pulling.incomplete import is_incomplete
from p2p.pulling.pull import Pull

# Nodes of its own region that a node asks in one interval, in turn. A region of more spreads by way of several.
MATES_MAX = 16
# Neighbours of whom there is no list yet, that a node asks in one interval. One after the other, a node that has nothing new
# would be asked by nobody again until all of them were, and news that reach few would reach few for seconds.
UNHEARD_MAX = 16


class Schedule:
    """The part of the machine that pulls whether or not anything seems to be missing."""

    def __init__(self, core: Core, pull: Pull) -> None:
        self._core = core
        self._pull = pull
        self._due_ms: int | None = None  # monotonic; None: there are no regular pulls
        self._intervals = 0
        self._freshest: dict[int, m.NodeId] = {}  # by keyspace: who was it last time
        self._brought: set[int] = set()  # keyspaces of which a pull that is on its way has brought rows

    def start(self, now: m.Now) -> None:
        """The node is up."""
        interval_ms = self._core.options.sync.interval_ms
        if interval_ms:
            self._due_ms = now.monotonic_ms + self._core.rng.randrange(interval_ms) + 1

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped."""
        self._freshest.pop(keyspace, None)
        self._brought.discard(keyspace)

    def next_ms(self) -> int | None:
        """When the timer is wanted next."""
        return self._due_ms

    def on_timer(self, now: m.Now) -> None:
        """Pull every keyspace, when it is time."""
        core = self._core
        if self._due_ms is None or now.monotonic_ms < self._due_ms:
            return
        self._due_ms = now.monotonic_ms + core.options.sync.interval_ms
        self._intervals += 1
        for keyspace in core.keyspaces.values():
            self._pull_now(keyspace, now, explore=True)

    def on_round(self, now: m.Now) -> None:
        """Rounds may have ended: those that are to follow them begin."""
        for number in self._pull.rounds.take_followed():
            self._pull_now(self._core.keyspaces[number], now, explore=False)

    def on_pulled(self, keyspace: Keyspace, new: int, last: bool, now: m.Now) -> None:
        """A part of an answer to a pull of everything came: if it brings new rows, the next one follows it.

        Known rows do not count: strays come with every answer, and where their writer is gone they do so for ever (R8).
        """
        sync, number = self._core.options.sync, keyspace.replica.keyspace
        if sync.shard_versions or not sync.follow:
            return
        if new:
            self._brought.add(number)
        if last and number in self._brought:
            self._brought.remove(number)
            self._pull_now(keyspace, now, explore=False)

    def _pull_now(self, keyspace: Keyspace, now: m.Now, explore: bool) -> None:
        """Ask whoever is to be asked and is not being asked already; `explore`: and others, to find out who else knows."""
        core = self._core
        sources = self._sources(keyspace, now)
        if not sources:
            return
        if not core.options.sync.shard_versions:
            self._pull_all(keyspace, core.rng.choice(sources).node, now)
        elif not keyspace.synced:
            return  # it joins, by a pull of everything
        elif core.options.sync.leaders:
            self._pull_as_led(keyspace, sources, now, explore)
        else:
            self._pull_from_freshest(keyspace, sources, np.ones(keyspace.knowledge.shards, np.bool_), now, explore)

    def _sources(self, keyspace: Keyspace, now: m.Now) -> list[m.MemberRecord]:
        """Who else holds the keyspace and lives, fit to forward or not: a writer whose links come and go has rows."""
        place = keyspace.replica.place
        return [
            record
            for record in self._core.membership.live(now.monotonic_ms)
            if record.role in HOLDER_ROLES
            and placement.holds(record, place)
            and not is_incomplete(self._core, record.boot, keyspace.replica.keyspace)
        ]

    def _pull_all(self, keyspace: Keyspace, node: m.NodeId, now: m.Now) -> None:
        # One that is still on its way is waited for: `Pull` has one of each keyspace at a time.
        link = self._core.link(node)
        if link is not None:
            self._pull.ask(keyspace, link, now, "interval")

    def _pull_as_led(self, keyspace: Keyspace, sources: Sequence[m.MemberRecord], now: m.Now, explore: bool) -> None:
        options, shards = self._core.options, keyspace.knowledge.shards
        fit = self._core.membership.holders(now.monotonic_ms, keyspace.replica.place)
        number, lacking = keyspace.replica.keyspace, keyspace.replica.incomplete.any()
        leading = [
            holder.node
            for holder in fit
            if holder.region == options.region
            and not (lacking if holder.node == options.node else self._lacks(holder.node, number))
        ]
        # A region without holders that are fit to lead has no leader (R22): whoever is there sees for itself.
        leader = leaders_of(leading, shards) if leading else np.full(shards, -1)
        led = {node: leader == number for number, node in enumerate(leading)}
        own = led.get(options.node, leader < 0)
        mates = [source.node for source in sources if source.region == options.region]
        begin = self._intervals * MATES_MAX % len(mates) if len(mates) > MATES_MAX else 0
        for mate in (mates[begin:] + mates[:begin])[:MATES_MAX]:
            self._round(keyspace, mate, own | led.get(mate, leader < 0), now, follow=True)
        abroad = [source for source in sources if source.region != options.region]
        self._pull_from_freshest(keyspace, abroad, own, now, explore)

    def _lacks(self, node: m.NodeId, keyspace: int) -> bool:
        """Whether a member said that it dropped rows: nobody is led by such a one (R11)."""
        member = self._core.membership.members.get(node)
        return member is not None and is_incomplete(self._core, member.record.boot, keyspace)

    def _pull_from_freshest(
        self, keyspace: Keyspace, sources: Sequence[m.MemberRecord], wanted: Mask, now: m.Now, explore: bool
    ) -> None:
        if not sources or not wanted.any():
            return
        number, rng = keyspace.replica.keyspace, self._core.rng
        nodes = [source.node for source in sources]
        before = self._freshest.get(number)
        if before in nodes:  # of equals, who it was
            nodes.remove(before)
            nodes.insert(0, before)
        scores = self._pull.rounds.freshness(keyspace, nodes, wanted)
        freshest = nodes[scores.index(max(scores))]
        self._freshest[number] = freshest
        begun = self._round(keyspace, freshest, wanted, now, follow=True)
        if not explore:
            return
        unheard = [node for node, score in zip(nodes, scores, strict=True) if score < 0]
        for other in unheard[:UNHEARD_MAX] or [rng.choice(nodes)]:
            if other != freshest:
                self._round(keyspace, other, wanted, now, after=freshest if begun else None)

    def _round(
        self,
        keyspace: Keyspace,
        node: m.NodeId,
        wanted: Mask,
        now: m.Now,
        after: m.NodeId | None = None,
        follow: bool = False,
    ) -> bool:
        """Whether a round began now: not while one with this neighbour is on its way."""
        link = self._core.link(node)
        if link is None or not wanted.any():
            return False
        if speaks_rounds(link):
            follow = follow and self._core.options.sync.follow
            return self._pull.rounds.begin(keyspace, link, wanted, now, after, follow)
        self._pull.ask(keyspace, link, now, "interval")
        return False
