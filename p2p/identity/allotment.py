"""Getting writer ids: the founder, and blocks that travel from who has some to who needs some (R12).

Every training node wants a block, and so do two *stewards* in each region, so that a region that is cut off, or outlives the
founder, can still add writers. Whoever wants one asks the training nodes and the stewards in turn. A node that is asked
records the gift in its ledger and then answers; asked again under the same holder nonce it gives the same blocks, so a lost
answer costs nothing, and a crash between record and answer at most a block that its asker never comes back for. A side of a
split in which nobody has a block to spare cannot add writers; its training nodes are not ready, and say why.

A steward is given half of what its giver has, a training node a single small block. So most ids soon are with serving nodes.
Training nodes may have no disk and lose what they hold at each deployment, the founder too: that is little.

Who founds: the training node that came first of those that have not left, with its first step, where no cluster exists. Where
another may have done so without its knowledge it asks first: in a cluster of version 1, which may have been founded anew, and
after a training node that has left, since that one may have founded in its last moment.

The clock of a new writer starts above all that whoever gave it ids had seen (R5): the answer carries that, and it is durable.

Rejected: one id for each request, which makes every loss of memory a question to others; and an election among nodes, whose
loser would have used its ids already.
"""

from collections.abc import Sequence
from functools import lru_cache

import xxhash

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.errors import LocalProtocolError, NotYetError
from p2p.link.links import Link
from p2p.members.membership import HEARTBEAT_MS, MEMBERS_MAX
from p2p.members.trees import Holder
from p2p.replica import WriterIdentity
from p2p.stamps import check_not_ahead

# In each region; one of them may be the node that is lost.
STEWARDS = 2
# An answer is one message and one save of a ledger away.
ANSWER_MS = 1_000
# When everybody has said no, the next round.
ROUND_MS = 5_000


class Allotment:
    """The part of the machine that gets writer ids, and gives them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._needed = False  # somebody wanted to publish
        self._asked: tuple[int, int] | None = None  # the life that we asked, and until when we wait for it
        self._refused: dict[int, None] = {}  # lives that said no in this round
        self._round_ms = 0  # when the next round may begin
        # Lives that said that they do not know of blocks, since no training node came before us.
        self._unfounded: dict[int, None] = {}
        self._reason = ""
        self._holders: tuple[Holder, ...] = ()
        self._stewards: tuple[m.NodeId, ...] = ()

    # --- writing

    def check_may_write(self, now: m.Now) -> None:
        """Refuse to write where another should.

        Raises:
            LocalProtocolError: this is no training node; or, with nodes of version 1, which have no blocks, another one writes.
        """
        core = self._core
        options = core.options
        if options.role != "train":
            raise LocalProtocolError(
                f"node {options.node!r} has role {options.role!r} and refuses to publish: publish to a node with role 'train'"
            )
        if core.membership.protocol_min(now.monotonic_ms) < 2 and (first := self._first_trainer(now)) is not None:
            raise LocalProtocolError(
                f"node {first!r} is the training node of this cluster, which can have only one while some of its nodes speak "
                "protocol version 1: publish to it, stop it first, or upgrade all nodes"
            )

    def _first_trainer(self, now: m.Now, among: Sequence[m.MemberRecord] | None = None) -> m.NodeId | None:
        """The training node that comes before us: who writes already, then who has lived longest; None when it is us.

        Among the live ones, or these.

        Of several, all nodes name the same one, and one that comes back does not stop the one that took over.
        """
        core = self._core
        writes = any(keyspace.replica.writer is not None for keyspace in core.keyspaces.values())
        own = (not writes, core.membership.own.boot_ms, core.options.node)
        members = core.membership.live(now.monotonic_ms) if among is None else among
        trainers = [record for record in members if record.role == "train"]
        ranks = [(not record.writers, record.boot_ms, record.node) for record in trainers]
        return min(ranks)[2] if ranks and min(ranks) < own else None

    def become_writer(self, family: Sequence[Keyspace], now: m.Now) -> None:
        """Bind this node to a writer id in a family of keyspaces.

        Raises:
            NotYetError: it has not caught up with the family, or has no id and is asking for one; the reason says what to do.
        """
        core = self._core
        if not all(keyspace.synced for keyspace in family):
            raise NotYetError(
                f"node {core.options.node!r} has not caught up with its cluster yet, and does not know which writer ids "
                "are taken: publish when it is ready"
            )
        in_blocks = core.membership.protocol_min(now.monotonic_ms) >= 2
        if in_blocks and not core.writers.founded and self._may_found(now):
            core.writers.found()
            core.note("cluster_founded", cluster=f"{core.writers.cluster:016x}")
        number = family[0].replica.place.family
        seen = {writer for keyspace in family for writer in keyspace.knowledge.writers.tolist()}
        seen |= core.membership.writer_ids(number)
        if (in_blocks and not core.writers.founded) or (core.writers.founded and core.writers.free_id([number], seen) is None):
            self._needed = True
            self._ask(now)
            first = None if core.writers.founded else self._follows(now)
            silent = first is not None and not core.membership.alive(first, now.monotonic_ms)
            waits = f"node {first!r}, which is silent, may have founded the cluster: bring it back, or expel it"
            reason = self.reason or (waits if silent else "it is asking for one")
            raise NotYetError(f"node {core.options.node!r} has no writer id: {reason}: publish again in a moment")
        writer, nonce = core.writers.grant(number, seen)
        for keyspace in family:
            keyspace.knowledge.note_writer(writer)  # before anybody hears of it (R5)
        family[0].replica.set_writer(WriterIdentity(writer, nonce))
        core.note("writer_granted", keyspace=number, writer=writer)

    def _may_found(self, now: m.Now) -> bool:
        core = self._core
        if self._follows(now) is not None or any(peer.role == "train" for peer in core.expected(now)):
            return False
        if not core.writers.cluster and not self._outlived(now):
            return True
        # Only the answers of others tell that nobody has founded it.
        return all(record.boot in self._unfounded for record in self._candidates(now))

    def _follows(self, now: m.Now) -> m.NodeId | None:
        """The training node that is to found rather than we, or None; it may do so any time, so older answers tell nothing.

        One that is silent counts, too: it may be on the other side of a split, and clusters of two founders cannot be joined.
        """
        known = [member.record for member in self._core.membership.members.values() if not member.record.left]
        first = self._first_trainer(now, None if self._core.writers.cluster else known)
        if first is not None:
            self._unfounded.clear()
        return first

    def _outlived(self, now: m.Now) -> bool:
        """Whether there was a training node that is gone."""
        members = self._core.membership.members.values()
        trainers = {member.record.node for member in members if member.record.role == "train"}
        return not trainers <= {record.node for record in self._core.membership.live(now.monotonic_ms)}

    # --- asking

    @property
    def reason(self) -> str:
        """Why this training node has no writer id to use; empty while it has, or needs none yet."""
        core = self._core
        if core.options.role != "train" or not core.writers.founded:
            return ""
        idle = any(keyspace.replica.writer is None for keyspace in core.keyspaces.values())
        if not (idle or not core.keyspaces) or core.writers.free_id(core.families) is not None:
            return ""
        return self._reason or "it is asking for a block of writer ids"

    def on_beat(self, now: m.Now) -> None:
        """Ask on, when ids are wanted; called at every heartbeat."""
        if self._asked is not None and now.monotonic_ms >= self._asked[1]:
            self._refused[self._asked[0]] = None
            self._asked = None
        if not self._core.writers.founded and self._core.options.role == "train":
            self._follows(now)
        if self._asked is None and self._wants(now):
            self._ask(now)

    def _wants(self, now: m.Now) -> bool:
        core = self._core
        book = core.writers
        if core.options.role == "train":
            wants = book.free_id(core.families) is None if book.founded else self._needed
        else:
            wants = book.founded and not book.blocks and core.options.node in self._stewards_of(now)
        return wants and core.membership.protocol_min(now.monotonic_ms) >= 2

    def _ask(self, now: m.Now) -> None:
        core = self._core
        if self._asked is not None or now.monotonic_ms < self._round_ms:
            return
        for record in self._candidates(now):
            link = None if record.boot in self._refused else core.link(record.node)
            if link is not None:
                self._asked = (record.boot, now.monotonic_ms + ANSWER_MS)
                core.send(link, m.BlockRequest(core.writers.cluster, core.writers.holder, tuple(sorted(core.writers.blocks))))
                return
        if not self._refused:
            self._reason = "nobody who could have a block of writer ids is in sight: publish when this node sees its cluster"
        self._refused.clear()
        # Who is to found the cluster may only lack what its own keyspaces lack yet.
        self._round_ms = now.monotonic_ms + (ROUND_MS if core.writers.founded else HEARTBEAT_MS)

    def _candidates(self, now: m.Now) -> list[m.MemberRecord]:
        """Whom to ask: training nodes, then the stewards of our region, then those of others."""
        core = self._core
        live = {record.node: record for record in core.membership.live(now.monotonic_ms)}
        trainers = [record for record in live.values() if record.role == "train"]
        stewards = [live[node] for node in self._stewards_of(now) if node in live]
        stewards.sort(key=lambda record: record.region != core.options.region)
        return list({record.node: record for record in (*trainers, *stewards)}.values())

    def _stewards_of(self, now: m.Now) -> tuple[m.NodeId, ...]:
        holders = self._core.membership.holders(now.monotonic_ms)
        if holders is not self._holders:
            regions: dict[str, list[tuple[int, m.NodeId]]] = {}
            for holder in holders:
                regions.setdefault(holder.region, []).append((_rank_of(holder.node), holder.node))
            self._stewards = tuple(node for ranks in regions.values() for _, node in sorted(ranks)[:STEWARDS])
            self._holders = holders
        return self._stewards

    def on_grant(self, link: Link, grant: m.BlockGrant, now: m.Now) -> None:
        """An answer.

        Raises:
            RemoteProtocolError: it is of another cluster, or names a time in the future; nothing is changed.
        """
        core = self._core
        if grant.holder != core.writers.holder:
            core.counters.strangers += 1  # meant for a node that had our address, and another record
            return
        check_not_ahead(grant.clock_floor, now.unix_ms)
        core.writers.adopt_cluster(grant.cluster)
        if self._asked is not None and self._asked[0] == link.boot:
            self._asked = None
        if grant.founded:
            core.writers.note_founded()
        else:
            self._unfounded[link.boot] = None
        if grant.blocks:
            core.writers.take(grant.blocks, grant.clock_floor)
            core.clock.observe(grant.clock_floor)
            core.note("writer_ids_received", peer=link.node, blocks=len(grant.blocks))
            self._needed, self._reason = False, ""
            self._refused.clear()
            return
        self._refused[link.boot] = None
        self._reason = (
            "no node that can be reached has a block of writer ids to spare: bring back the side of the cluster that has, "
            "or expel writers that are gone for good"
        )
        if self._wants(now):
            self._ask(now)

    # --- answering

    def on_request(self, link: Link, request: m.BlockRequest, now: m.Now) -> None:
        """Somebody wants ids.

        Raises:
            RemoteProtocolError: it is of another cluster.
        """
        core = self._core
        book = core.writers
        book.adopt_cluster(request.cluster)
        synced = all(keyspace.synced for keyspace in core.keyspaces.values())
        if not book.founded and core.options.role == "train" and synced and self._may_found(now):
            book.found()
            core.note("cluster_founded", cluster=f"{book.cluster:016x}")
        self._needed = self._needed or not book.founded  # in a cluster of version 1, ask until we may found it anew
        member = core.membership.members.get(link.node)
        steward = member is not None and member.record.role != "train"
        blocks = book.give(request.holder, request.held, steward) if book.founded else ()
        if blocks:
            core.counters.blocks_given += len(blocks)
            core.note("writer_ids_given", peer=link.node, blocks=len(blocks), left=len(book.blocks))
        core.send(link, m.BlockGrant(book.cluster, request.holder, blocks, core.clock.last, book.founded))


@lru_cache(MEMBERS_MAX)  # asked of everybody with each change of view
def _rank_of(node: m.NodeId) -> int:
    """The smallest of a region are its stewards."""
    return int(xxhash.xxh64_intdigest(f"steward/{node}".encode()))
