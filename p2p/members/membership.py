"""Who is there: the register of members, and whom to gossip with.

Think of a class register that everyone carries around. Each node counts its own heartbeat up and passes counters on to a few
others; a larger count than the one we have means that the node was alive a moment ago, whoever told us. Who is suspected when
is decided in `p2p.members.suspicion`; a suspected node is out of the trees, is called now and then, and is back with its next
count.

A *record* says everything else of a node and travels only when it changes (its `version` grows) or when registers differ: each
heartbeat carries a digest of (life, version) over the living. One that is known by a hello alone, which leaves fields out,
counts as of the version before.

What is told need not be true, so a node that hears something of itself that it did not say raises the version of its record
above what was told, and its word wins (`refute`); its counter and the beginning of its life likewise. Hearsay counts for less
than what a node tells of itself over its own link (`direct`): see `_believes`, and decision 0026.

A life of a node is named by a random *boot* nonce, and lives are ordered by `boot_ms`. A second life under one id while the
first still answers is a configuration error of the operator, and the newcomer is the one who is refused.

Whom to gossip with. All nodes order the living by a hash into a ring, and one more ring a region; a node's *fingers* are those
1, 2, 4, 8 ... places behind it. Each beat goes to the next one of the whole ring and to a few fingers drawn from both rings. So
everybody is sent as many messages as it sends, a node talks to O(log n) others in its life, news doubles its holders with each
step, and any two neighbours, within a region and across regions, are compared within a few beats. Rejected: picks among all
members, which end in a full mesh of connections; and fingers in turn, whose regular beat left some pairs twice as long without
news of each other as others.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from p2p import placement
from p2p.errors import RemoteProtocolError
from p2p.members.suspicion import AHEAD_MAX, HEARTBEAT_MS, Suspicion, mix
from p2p.members.trees import Holder, Trees
from p2p.messages import Holding, MemberRecord, NodeId, RecordColumns, WriterRecord
from p2p.placement import HOLDS_SINCE, holds, is_short
from p2p.replica import U64, Place
from p2p.sizes import fitting
from p2p.versions import agree, changes_of, protocol_of

__all__ = ["HEARTBEAT_MS", "HOLDER_ROLES", "Member", "Membership"]

# Heartbeats a node sends each interval; half of them inside its region.
FANOUT = 4
# Heartbeat counters in one message, 12 bytes each: 100 nodes tell everybody's in each beat, which finds the dead sooner than
# telling more members could. What 1,000 nodes cannot tell in one beat they tell in the next ones.
COUNTERS_MAX = 128
# How long a peer of a former life, of which nothing is known yet, may be silent. In a small cluster a member whose counter
# stops is suspected within it, too.
SILENCE_MS_MAX = 6_000
# A member that has been silent this long is no longer called; it has to call us.
FORGET_MS = 600_000
MEMBERS_MAX = 4_096
# Of one member: it writes with one id a keyspace. A record with more could not be sent on.
WRITER_RECORDS_MAX = 4_096
# A changed record is passed on at once, and rides on one more beat; what that misses, the digests find.
NEWS_TELLS = 2
# So often may a record change for the sake of what others tell, and so far its counter rise: half of what there is.
REFUTED_CHANGES_MAX = 1 << 23
REFUTED_BEATS_MAX = 1 << 31
# Records in one message, some 100 bytes each.
RECORDS_MAX = 64
# Roles whose nodes hold rows and forward batches.
HOLDER_ROLES = ("train", "serve")
# Those that hold rows and forward nothing: what they have is meant to be behind, or to be judged (R22).
LEAF_ROLES = ("baseline", "witness")


@dataclass(slots=True)
class Member:
    """What we know of another node; its rhythm is in `Membership.suspicion`."""

    record: MemberRecord
    slot: int


@dataclass(slots=True)
class _View:
    """What follows from who is alive: begun anew when that changes, each part made when it is asked for."""

    live: tuple[NodeId, ...] | None = None
    holders: dict[Place | None, tuple[Holder, ...]] = field(default_factory=dict)  # None: of families of one partition
    trees: dict[Place | None, Trees] = field(default_factory=dict)
    partners: dict[Place, tuple[NodeId, ...]] = field(default_factory=dict)  # our fingers among those who hold the same
    writers: dict[Place, tuple[WriterRecord, ...]] = field(default_factory=dict)  # begun anew also when a record changes
    digest: int | None = None  # of the others' records
    fingers: tuple[tuple[NodeId, ...], tuple[NodeId, ...]] | None = None  # ours in our region's ring, and in everybody's
    protocol_min: int | None = None  # begun anew also when a record changes


@dataclass(slots=True)
class Membership:
    """The register of one node.

    Args:
        own: our record as it was at start; `beat` counts its heartbeat up.
    """

    own: MemberRecord
    members: dict[NodeId, Member] = field(default_factory=dict)
    suspicion: Suspicion = field(default_factory=Suspicion)
    news: bool = False  # a record has changed and has not been passed on yet
    _nodes: dict[int, NodeId] = field(default_factory=dict)  # by slot
    _writing: dict[NodeId, None] = field(default_factory=dict)  # members whose record names writers
    _view: _View = field(default_factory=_View)
    _own_digest: tuple[int, int] = (-1, 0)  # of which version of our record, and its share of `digest`

    # --- ourselves

    def beat(self) -> MemberRecord:
        """Count our own heartbeat up, and return the record that says so."""
        self.own = replace(self.own, heartbeat=self.own.heartbeat + 1)
        return self.own

    def restate(self, deaf: bool, writers: tuple[WriterRecord, ...], holds: tuple[Holding, ...] = ()) -> None:
        """Say how we are; what others must hear of makes a new version of our record."""
        before, after = ([(w.keyspace, w.writer, w.nonce, w.last_stamp > 0) for w in ws] for ws in (self.own.writers, writers))
        changed = (deaf, holds) != (self.own.deaf, self.own.holds) or before != after
        self.own = replace(self.own, deaf=deaf, writers=writers, holds=holds, version=self.own.version + changed)
        self.news = self.news or changed

    def refute(self, version: int) -> bool:
        """Something was told of us that we did not say, under this version of our record: say what is so, under the next one.

        What lies farther ahead than others believe at once is reached in steps that they can follow, one each time we hear it.

        Returns:
            False where so many were told that there would be no next one left.
        """
        reached = min(max(version, self.own.version), self.own.version + AHEAD_MAX)
        if changes_of(reached) > REFUTED_CHANGES_MAX:
            return False
        self.own = replace(self.own, version=reached + 1)
        self.news = True
        return True

    def overtake(self, heartbeat: int) -> None:
        """A counter was told that we have not reached: the others must see ours advance."""
        if 0 < heartbeat - self.own.heartbeat <= AHEAD_MAX and heartbeat < REFUTED_BEATS_MAX:
            self.own = replace(self.own, heartbeat=heartbeat + 1)

    def outlive(self, boot_ms: int) -> None:
        """A life with our id was told that there is not, or not any more, and that began then: ours is the later one."""
        self.own = replace(self.own, boot_ms=boot_ms + 1, version=self.own.version + 1)
        self.news = True

    # --- the view

    def alive(self, node: NodeId, now_ms: int) -> bool:
        """Whether `node` is there, as far as we can tell."""
        self.suspicion.assess(now_ms)
        member = self.members.get(node)
        return member is not None and bool(self.suspicion.alive[member.slot])

    def live(self, now_ms: int) -> list[MemberRecord]:
        """Records of the live members, ourselves left out, sorted by node id."""
        return [self.members[node].record for node in self.live_nodes(now_ms)]

    def live_count(self, now_ms: int) -> int:
        """How many others live."""
        return len(self.live_nodes(now_ms))

    def live_writers(self, now_ms: int, place: Place) -> tuple[WriterRecord, ...]:
        """Every writer of the family of a live member that may write at this place, since it holds it.

        The same tuple until that changes.
        """
        view = self._see(now_ms)
        known = view.writers.get(place)
        if known is None:
            alive = self.suspicion.alive
            members = [self.members[node] for node in sorted(self._writing)]
            known = view.writers[place] = tuple(
                writer
                for member in members
                if alive[member.slot] and placement.holds(member.record, place)
                for writer in member.record.writers
                if writer.keyspace == place.family
            )
        return known

    def writing(self, family: int) -> list[NodeId]:
        """Members, sorted, whose record names a writer of the family."""
        writers = ((node, self.members[node].record.writers) for node in sorted(self._writing))
        return [node for node, records in writers if any(record.keyspace == family for record in records)]

    def writer_ids(self, family: int) -> set[int]:
        """Ids of writers of the family that members name."""
        records = (record for node in self._writing for record in self.members[node].record.writers)
        return {record.writer for record in records if record.keyspace == family}

    def protocol_min(self, now_ms: int) -> int:
        """The oldest protocol version in the view, our own included: what is below it, everybody alive understands."""
        view = self._see(now_ms)
        if view.protocol_min is None:
            alive = self.suspicion.alive
            view.protocol_min = protocol_of(int(self.suspicion.version[alive].min(initial=np.uint64(self.own.version))))
        return view.protocol_min

    def agree_with(self, protocol: int, now_ms: int) -> bool:
        """Whether everybody alive can talk to who speaks this protocol version."""
        versions = self.suspicion.version[self.suspicion.alive]
        newest = protocol_of(int(versions.max(initial=np.uint64(self.own.version))))
        return all(agree(one, protocol) is not None for one in (self.protocol_min(now_ms), newest))

    def protocol_min_known(self, but: str = "") -> int:
        """The oldest protocol version of all who have not left, the silent ones included, `but` one excepted."""
        staying = [member.record for member in self.members.values() if not member.record.left and member.record.node != but]
        return min(protocol_of(record.version) for record in (self.own, *staying))

    def holders(self, now_ms: int, place: Place | None = None) -> tuple[Holder, ...]:
        """The holders of a place fit to forward, ourselves included, sorted; we are asked only for places that we hold."""
        key, view = _divided(place), self._see(now_ms)
        if key not in view.holders:
            view.holders[key] = self._in_trees(now_ms, key, HOLDER_ROLES)
        return view.holders[key]

    def trees(self, now_ms: int, place: Place | None = None) -> Trees:
        """Our part in the trees over the holders of a place (R22)."""
        key, view = _divided(place), self._see(now_ms)
        if key not in view.trees:
            me, leaves = Holder(self.own.region, self.own.node), self._in_trees(now_ms, key, LEAF_ROLES)
            view.trees[key] = Trees(me, self.holders(now_ms, key), self.protocol_min(now_ms), leaves)
        return view.trees[key]

    def _in_trees(self, now_ms: int, place: Place | None, roles: tuple[str, ...]) -> tuple[Holder, ...]:
        in_trees = self.suspicion.in_trees(now_ms)
        others = (member.record for member in self.members.values() if in_trees[member.slot])
        fit = [self.own, *(record for record in others if place is None or placement.holds(record, place))]
        return tuple(sorted(Holder(record.region, record.node) for record in fit if record.role in roles))

    def partners(self, now_ms: int, place: Place) -> tuple[NodeId, ...]:
        """Our fingers in the ring of those who hold a partition that we hold, too: our own fingers may all hold others."""
        view = self._see(now_ms)
        if place not in view.partners:
            live = [self.members[node] for node in self.live_nodes(now_ms)]
            slots = np.array([member.slot for member in live if placement.holds(member.record, place)])
            chosen = slots[fingers_of(place_of(self.own.node), self.suspicion.place[slots])] if len(slots) else slots
            view.partners[place] = tuple(self._nodes[slot] for slot in chosen.tolist())
        return view.partners[place]

    def fingers(self, now_ms: int) -> tuple[NodeId, ...]:
        """Everybody we gossip with as long as the view stays as it is."""
        near, far = self._fingers(now_ms)
        return tuple(dict.fromkeys([*near, *far]))

    def targets(self, now_ms: int, rng: random.Random) -> tuple[NodeId, ...]:
        """Whom to send a heartbeat, or news: some fingers of both rings, and always the first of the whole ring.

        That one closes the circle, so that news which everybody passes on once reaches everybody.
        """
        all_near, all_far = self._fingers(now_ms)
        near = rng.sample(all_near, min(FANOUT // 2, len(all_near)))
        far = rng.sample(all_far[1:], max(0, len(all_far) - 1))
        return tuple(dict.fromkeys([*all_far[:1], *near, *far]))[:FANOUT]

    def _see(self, now_ms: int) -> _View:
        self.suspicion.assess(now_ms)
        if self.suspicion.changed:
            self.suspicion.changed = False
            self._view = _View()
        return self._view

    def live_nodes(self, now_ms: int) -> tuple[NodeId, ...]:
        """The live members, ourselves left out, sorted."""
        view = self._see(now_ms)
        if view.live is None:
            view.live = tuple(sorted(self._nodes[slot] for slot in np.flatnonzero(self.suspicion.alive).tolist()))
        return view.live

    def _fingers(self, now_ms: int) -> tuple[tuple[NodeId, ...], tuple[NodeId, ...]]:
        view = self._see(now_ms)
        if view.fingers is None:
            suspicion, here = self.suspicion, place_of(self.own.node)
            far = np.flatnonzero(suspicion.alive)
            near = far[suspicion.near[far]]
            chosen = (slots[fingers_of(here, suspicion.place[slots])] for slots in (near, far))
            first, second = (tuple(self._nodes[slot] for slot in slots.tolist()) for slots in chosen)
            view.fingers = first, second
        return view.fingers

    def suspects(self) -> list[NodeId]:
        """Members that fell silent and did not say goodbye, sorted."""
        mask = self.suspicion.suspect & ~self.suspicion.gone & self.suspicion.used
        return sorted(self._nodes[slot] for slot in np.flatnonzero(mask).tolist())

    def left(self) -> list[NodeId]:
        """Members that said goodbye, sorted."""
        return sorted(self._nodes[slot] for slot in np.flatnonzero(self.suspicion.used & self.suspicion.gone).tolist())

    def node_of(self, boot: int) -> NodeId | None:
        """The member in this life."""
        slot = int(self.suspicion.slots_of(np.array([boot], np.uint64))[0])
        return None if slot < 0 else self._nodes[slot]

    def owner_of(self, boot: int) -> NodeId | None:
        """The same, where members come one after another: an index would be made anew for each."""
        slots = np.flatnonzero(self.suspicion.used & (self.suspicion.boot == np.uint64(boot)))
        return self._nodes[int(slots[0])] if len(slots) else None

    # --- learning

    def has_room(self, node: NodeId) -> bool:
        """Whether a record of `node` can be kept."""
        return node in self.members or len(self.members) < MEMBERS_MAX

    def succeeded(self, record: MemberRecord, now_ms: int) -> bool:
        """Whether a later life of this record's node is known and alive: what comes of the former one comes late."""
        known = self.members.get(record.node)
        if known is None or record.boot == known.record.boot or _life(record) > _life(known.record):
            return False
        return self.suspicion.ever_direct(known.slot) and self.alive(record.node, now_ms)

    def sift(self, records: Sequence[MemberRecord], now_ms: int, columns: RecordColumns | None = None) -> list[MemberRecord]:
        """Take those that only say what we know, as signs of life; returns the others, which are to be learned one by one.

        News reaches everybody several times over, so most records are of this kind.
        """
        if columns is not None:
            return self._sift_many(records, columns, now_ms)
        slots: list[int] = []
        beats: list[int] = []
        others: list[MemberRecord] = []
        for record in records:
            known = self.members.get(record.node)
            if known is None or record.writers or known.record.boot != record.boot or says_more(record, known.record):
                others.append(record)
            else:
                slots.append(known.slot)
                beats.append(record.heartbeat)
        if len(slots) == 1:
            self.suspicion.hear_one(slots[0], beats[0], now_ms)
        elif slots:
            self.suspicion.hear(np.array(slots), np.array(beats, np.uint64), now_ms)
        return others

    def _sift_many(self, records: Sequence[MemberRecord], columns: RecordColumns, now_ms: int) -> list[MemberRecord]:
        """The same with `says_more` of all of them at once."""
        suspicion = self.suspicion
        slots = suspicion.slots_of(columns.boots)
        versions = suspicion.version[slots]  # of those that are not known (-1) anything
        more = columns.versions > versions
        more |= columns.left & ~suspicion.gone[slots]
        more |= (columns.versions == versions) & (columns.told > suspicion.shape[slots])
        known = (slots >= 0) & columns.plain & ~more
        suspicion.hear(slots[known], columns.beats[known], now_ms)
        return [records[index] for index in np.flatnonzero(~known).tolist()]

    def note_direct(self, record: MemberRecord, now_ms: int) -> MemberRecord | None:
        """A member told this of itself, over its own link; to be called before the record is sifted and learned.

        Returns:
            What we were told of it that it does not say; it has to hear of that, since others may believe it, too.
        """
        known = self.members.get(record.node)
        if known is None or known.record.boot != record.boot:
            return None
        self.suspicion.hear_directly(known.slot, record.heartbeat, now_ms)
        told = known.record
        if record.left or not contradicts(told, record):
            return None
        # Of one version both cannot be true, but for a farewell, and for fields that were left out on the way.
        untrue = told.version == record.version and not told.left and record.told >= told.told
        if untrue or told.version - record.version > AHEAD_MAX:
            known.record = replace(told, version=record.version - 1)
            self.suspicion.version[known.slot] = max(record.version - 1, 0)
        return told

    def learn(self, record: MemberRecord, now_ms: int, direct: bool = False) -> bool:
        """Merge one record, ours or of another node, from wherever; `direct`: it is the node's own word.

        Returns:
            True when the node is new to us, is in a new life, has changed or has left: something others may want to know.

        Raises:
            RemoteProtocolError: there are too many members.
        """
        if record.node == self.own.node:
            return False
        known, suspicion = self.members.get(record.node), self.suspicion
        same_life = known is not None and record.boot == known.record.boot
        if known is None:
            if not self.has_room(record.node):
                raise RemoteProtocolError(f"more than {MEMBERS_MAX} members")
            slot = suspicion.take(record.boot, record.version, record.heartbeat, self._prior_ms(), now_ms)
            known = self.members[record.node] = Member(record, slot)
            self._nodes[slot] = record.node
            suspicion.place[slot] = place_of(record.node)
        elif not (direct or self._believes(known, record, now_ms)):
            return False
        elif record.boot != known.record.boot:
            # One that begins earlier is over, unless only others told of the later one.
            if _life(record) < _life(known.record) and not (direct and not suspicion.ever_direct(known.slot)):
                suspicion.news[known.slot] = NEWS_TELLS  # somebody is behind
                return False
            suspicion.renew(known.slot, record.boot, record.version, record.heartbeat, self._prior_ms(), now_ms)
        elif not self._advance(known, record, now_ms):
            return False
        if direct:
            suspicion.hear_directly(known.slot, record.heartbeat, now_ms)
        if same_life and _part_of(record) == _part_of(known.record):
            # A writer has begun, say: trees stay as they are, which for 1,000 nodes are 2 ms of work on each of them.
            self._view.digest = None
        else:
            suspicion.changed = True
        self._keep(known, record)
        suspicion.news[known.slot] = NEWS_TELLS
        self.news = True
        return True

    def _believes(self, known: Member, record: MemberRecord, now_ms: int) -> bool:
        """Whether hearsay may change what we know of a member."""
        lately = self.suspicion.heard_directly(known.slot, now_ms)
        if record.boot != known.record.boot:  # where it listens there can be no other process by now
            return not lately or known.record.left or record.address == known.record.address
        if record.address != known.record.address and self.suspicion.ever_direct(known.slot):
            return False  # a life stays where it is, and it told us where
        return record.version - known.record.version <= AHEAD_MAX and not (record.left and lately)

    def _advance(self, known: Member, record: MemberRecord, now_ms: int) -> bool:
        """The same life, perhaps later; True when its record says something new."""
        newer = says_more(record, known.record)
        if known.record.left:
            if newer:  # it says so itself, by whatever ways
                self.suspicion.come_back(known.slot, now_ms)
            else:
                return False  # a late heartbeat
        same = (record.version, record.told) == (known.record.version, known.record.told)  # a late hello takes nothing back
        if record.heartbeat > known.record.heartbeat and not newer and same:
            self._keep(known, record)  # how far its writers have come
        if record.heartbeat > int(self.suspicion.beats[known.slot]):
            self.suspicion.hear_one(known.slot, record.heartbeat, now_ms)
        return newer

    def _keep(self, known: Member, record: MemberRecord) -> None:
        slot, suspicion = known.slot, self.suspicion
        known.record = record
        self._view.writers.clear()
        self._view.protocol_min = None
        suspicion.version[slot], suspicion.gone[slot], suspicion.deaf[slot] = record.version, record.left, record.deaf
        suspicion.shape[slot] = record.told
        # To a node of version 1 nobody ever tells what a hello leaves out.
        suspicion.short[slot] = self.own.protocol >= HOLDS_SINCE and is_short(record)
        suspicion.near[slot] = record.region == self.own.region
        if record.writers:
            self._writing[record.node] = None
        else:
            self._writing.pop(record.node, None)

    def hear(self, boots: U64, counters: U64, now_ms: int) -> None:
        """Heartbeat counters came with a peer's gossip; those of lives we do not know mean nothing.

        Args:
            boots: uint64[n].
            counters: uint64[n].
            now_ms: monotonic.
        """
        self.suspicion.hear(self.suspicion.slots_of(boots), counters, now_ms)

    def _prior_ms(self) -> float:
        """How often to expect a counter of somebody new: rarely, where messages cannot carry everybody's.

        A third of what a message brings is known already: measured, 1.97 s among 1,000 nodes. A prior below that would suspect
        some hundred pairs of these for a moment when they have just met.
        """
        return HEARTBEAT_MS * (1 + 1.5 * len(self.members) / (FANOUT * COUNTERS_MAX))

    def note_writer(self, node: NodeId, family: int, writer: int, nonce: int, stamp: int) -> None:
        """A batch came from a writer of `node`: sooner news than the heartbeat that will say so."""
        member = self.members.get(node)
        if member is None:
            return
        for known in member.record.writers:  # once a batch
            if known.writer == writer and known.keyspace == family:
                return
        if len(member.record.writers) < WRITER_RECORDS_MAX:
            record = WriterRecord(family, writer, nonce, stamp)
            self._keep(member, replace(member.record, writers=(*member.record.writers, record)))

    def conflicts(self, record: MemberRecord, now_ms: int) -> MemberRecord | None:
        """The live node that already uses this record's id in another life, at another address; None when there is none.

        At the same address the old life must be over, since two processes cannot listen there.
        """
        if record.node == self.own.node:
            return self.own if record.boot != self.own.boot else None
        known = self.members.get(record.node)
        if known is None or known.record.boot == record.boot or known.record.address == record.address:
            return None
        return known.record if self.alive(record.node, now_ms) else None

    def expire(self, now_ms: int) -> list[MemberRecord]:
        """Forget members that were silent for `FORGET_MS`; returns them."""
        suspicion = self.suspicion
        slots = np.flatnonzero(suspicion.used & (now_ms - suspicion.heard_ms >= FORGET_MS)).tolist()
        gone = [self.members.pop(self._nodes.pop(slot)).record for slot in slots]
        for slot, record in zip(slots, gone, strict=True):
            suspicion.drop(slot)
            self._writing.pop(record.node, None)
        return gone

    # --- telling

    def forget(self, node: NodeId) -> None:
        """A member is none any more."""
        member = self.members.pop(node)
        del self._nodes[member.slot]
        self.suspicion.drop(member.slot)
        self._writing.pop(node, None)

    def expected_of(self, place: Place) -> list[MemberRecord]:
        """Every member that holds the keyspace at `place`, silent ones too, but for those that left; ourselves left out."""
        gone = self.suspicion.gone
        return [one.record for one in self.members.values() if not gone[one.slot] and holds(one.record, place)]

    def records(self, now_ms: int, rng: random.Random) -> tuple[MemberRecord, ...]:
        """Other nodes worth telling about: alive, or gone on purpose and lately; some, where a message does not carry all."""
        self.suspicion.assess(now_ms)
        lately = self.suspicion.gone & (now_ms - self.suspicion.heard_ms < SILENCE_MS_MAX)
        slots = np.flatnonzero(self.suspicion.used & (self.suspicion.alive | lately)).tolist()
        return self._records(slots if len(slots) <= RECORDS_MAX else rng.sample(slots, RECORDS_MAX))

    def counted(self, record: MemberRecord) -> MemberRecord:
        """A member's record with the largest heartbeat counter that we heard of: counters come more often than records."""
        return replace(record, heartbeat=int(self.suspicion.beats[self.members[record.node].slot]))

    def take_news(self) -> tuple[MemberRecord, ...]:
        """Records that changed lately and ride on this message, our own left out; `news` is clear when all went."""
        news = self.suspicion.news
        slots = np.flatnonzero(self.suspicion.used & (news > 0))
        chosen = slots[np.argsort(-news[slots], kind="stable")][:RECORDS_MAX]
        records = self._records(chosen.tolist())
        count = fitting(records)
        news[chosen[:count]] -= 1
        self.news = bool((news[slots] >= NEWS_TELLS).any())
        return records[:count]

    @property
    def quiet(self) -> bool:
        """Whether no record has changed lately."""
        return not (self.suspicion.used & (self.suspicion.news > 0)).any()

    def digest(self, now_ms: int) -> int:
        """64 bits over the lives and versions of all living, ourselves included."""
        view = self._see(now_ms)
        if view.digest is None:
            view.digest = self.suspicion.digest()
        if self._own_digest[0] != self.own.version:
            own = mix(np.array([self.own.boot], np.uint64), np.array([self.own.version], np.uint64))
            self._own_digest = self.own.version, int(own[0])
        return view.digest ^ self._own_digest[1]

    def index(self, now_ms: int) -> tuple[U64, U64]:
        """What the digest is over: boots uint64[n] and versions uint64[n], ourselves included."""
        self.suspicion.assess(now_ms)
        alive = self.suspicion.alive
        boots = np.append(self.suspicion.boot[alive], np.uint64(self.own.boot))
        return boots, np.append(self.suspicion.versions_held()[alive], np.uint64(self.own.version))

    def missing_in(self, boots: U64, versions: U64, now_ms: int) -> tuple[tuple[MemberRecord, ...], bool]:
        """Compare a peer's index with our register.

        Args:
            boots: uint64[n], the peer's.
            versions: uint64[n].
            now_ms: monotonic.

        Returns:
            Records that the peer lacks, and whether it knows something that we do not.
        """
        self.suspicion.assess(now_ms)
        suspicion = self.suspicion
        slots = suspicion.slots_of(boots)
        known = slots >= 0
        theirs = np.full(len(suspicion.used), -1, np.int64)
        theirs[slots[known]] = versions[known].astype(np.int64)
        versions_own = suspicion.versions_held().astype(np.int64)
        # What is alive here and unknown or outdated there; and what they take for alive though it has left.
        lacking = (suspicion.alive & (theirs < versions_own)) | (suspicion.used & suspicion.gone & (theirs >= 0))
        own = boots == np.uint64(self.own.boot)
        ahead = bool((~known & ~own).any()) or bool((theirs > versions_own).any())
        return self._records(np.flatnonzero(lacking).tolist()), ahead

    def _records(self, slots: Sequence[int]) -> tuple[MemberRecord, ...]:
        return tuple(self.members[self._nodes[slot]].record for slot in slots)


def _divided(place: Place | None) -> Place | None:
    """The place, where not everybody holds it; None stands for all places that everybody does."""
    return None if place is None or place.partitions == 1 else place


def _part_of(record: MemberRecord) -> tuple[object, ...]:
    """What of a record the view depends on, besides what is begun anew with each (`Membership._keep`)."""
    return record.region, record.role, record.left, record.deaf, record.holds, record.protocol


def says_more(record: MemberRecord, known: MemberRecord) -> bool:
    """Whether a record of the same life says what the known one does not.

    A farewell is the last word of its version; the next version takes it back. A node of version 1 takes nothing back.
    """
    if record.protocol < 2 and record.left != known.left:
        return record.left
    if record.version == known.version:  # the same again, but from somebody who knows of more fields; or a farewell
        return record.left > known.left or (record.left == known.left and record.told > known.told)
    return record.version > known.version


def contradicts(record: MemberRecord, own: MemberRecord) -> bool:
    """Whether a record of a life says what its own word, of this version or an earlier one, does not."""
    if record.version != own.version:
        return record.version > own.version
    told, true = (
        (one.left, one.region, one.role, one.address, one.deaf, [(w.keyspace, w.writer, w.nonce) for w in one.writers])
        for one in (record, own)
    )
    return told != true or (record.told >= HOLDS_SINCE and record.holds != own.holds)


def _life(record: MemberRecord) -> tuple[int, int]:
    """Lives of one node are ordered by this."""
    return record.boot_ms, record.boot


@lru_cache(MEMBERS_MAX)  # asked with each new life, and of ourselves with each change of view
def place_of(node: NodeId) -> int:
    """Where a node stands in the rings."""
    return int(xxhash.xxh64_intdigest(f"ring/{node}".encode()))


def fingers_of(here: int, places: U64) -> NDArray[np.int64]:
    """Which of the others stand 1, 2, 4, 8 ... places behind us in a ring.

    Args:
        here: our own place.
        places: uint64[n], those of the others, in any order.

    Returns:
        int64[log2 n + 1], indices into `places`.
    """
    line = np.argsort(places)
    first = int((places < np.uint64(here)).sum())
    behind = (first + (1 << np.arange(len(line).bit_length())) - 1) % max(1, len(line))
    chosen: NDArray[np.int64] = line[behind]
    return chosen
