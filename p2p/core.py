"""What the parts of the machine share: who we are, who we know, and the effects of the event at hand."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from p2p import messages as m
from p2p import wire
from p2p.busy.pairs import Feed
from p2p.identity.ledger import NodeRecord, Peer
from p2p.identity.writers import WriterBook, WriterConflictError
from p2p.knowledge import Knowledge
from p2p.link import budget
from p2p.link.links import Link
from p2p.link.window import Moment
from p2p.members.membership import SILENCE_MS_MAX, Membership
from p2p.messages.fences import LIFTED
from p2p.paper.sync import PUSH, SyncOptions
from p2p.placement import holdings_of
from p2p.pushing.groups import LINGER_MS, Group
from p2p.replica import Host, Replica, RowColumns, SchemaEntry, WriterIdentity
from p2p.stamps import StampClock, writer_of
from p2p.versions import FIRST_VERSION, PROTOCOL_VERSION, agree

# Conflicts between writers that are told apart; each is a mistake of somebody, so that many more would be told by nobody.
CONFLICTS_MAX = 1_024

# A node that is away for longer than a long night is repaired or replaced, not waited for (R13).
EXPEL_AFTER_MS = 24 * 3_600_000
# So often a coordinator asks what is stable; what is deleted is collected after two or three times as long, where all are well.
COLLECT_MS = 10_000
# Steps of ours of which we remember what they touched, for those who wait for them: 4 s of 1,000 a second.
TOUCHED_MAX = 4_096


# What becomes of batches that find no credit: their rows are kept as due (`p2p.busy.backlog`); they are not sent, and pulled;
# or they wait in order, without any bound. The last two are for comparison.
STATE, NONE, FIFO = "state", "none", "fifo"
OUTBOXES = (STATE, NONE, FIFO)


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """Who a node is. `boot` is a random 64-bit nonce of this life, `boot_ms` its start in Unix milliseconds."""

    node: str
    boot: int
    boot_ms: int
    region: str
    role: str  # "train" | "serve"
    seeds: tuple[str, ...] = ()
    machine: int = 0  # hash of the machine, sent with `published_ns`
    expel_after_ms: int = EXPEL_AFTER_MS  # of absence; 0: never
    protocol_version: int = PROTOCOL_VERSION  # an older one makes a node of before an upgrade, for tests of it
    sync: SyncOptions = PUSH  # the same on all nodes of a cluster
    collect_ms: int = COLLECT_MS  # how often it is asked what of the deleted rows may go (`p2p.collection`); 0: never
    outbox: str = STATE  # what becomes of batches that find no credit: one of `OUTBOXES`
    linger_ms: int = LINGER_MS  # how long a step may wait for others after a message of its keyspace; 0: none does
    rates: tuple[tuple[str, float], ...] = ()  # other region -> bytes a second of updates to it, of all nodes here together


@dataclass(slots=True)
class Counters:
    """What happened since the start; only ever grows."""

    batches_published: int = 0
    groups_sent: int = 0  # of steps of ours in one keyspace, those of one step included: so often something was sent
    groups_held: int = 0  # of those, which waited for further steps
    steps_received: int = 0  # in all batches received
    batches_received: int = 0
    batches_forwarded: int = 0
    batches_skipped: int = 0  # not forwarded to a child: no credit, no link, or refused by the transport
    batches_repeated: int = 0
    batches_circling: int = 0  # dropped at the hop limit
    children_handed_over: int = 0  # to one another, since a link was full
    batches_unknown: int = 0  # of a keyspace whose schema had not arrived yet, or of a partition that is not held here
    rows_written: int = 0
    rows_stale: int = 0
    gaps: int = 0
    pulls_started: int = 0
    pulls_completed: int = 0
    pulls_abandoned: int = 0
    pulls_served: int = 0
    pulls_refused: int = 0
    pull_rows_received: int = 0
    pull_rows_sent: int = 0
    rounds_started: int = 0  # by shard versions
    rounds_completed: int = 0
    rounds_abandoned: int = 0
    shards_listed: int = 0  # whose version changed, as told to others
    shards_asked: int = 0  # whose vector was sent, since our version did not cover the neighbour's
    sessions_broken: int = 0
    strangers: int = 0  # messages of another life of ours, or of a boot we were not introduced to
    credit_overruns: int = 0  # messages dropped, since their sender had no credit for them
    impostors: int = 0  # messages in the name of another node than the one whose key was proven
    waits_refused: int = 0
    peers_refused: int = 0
    versions_refused: int = 0  # peers, and records of members, of a version that we do not speak
    retired_refused: int = 0  # batches dropped, since their writer is retired
    fenced_refused: int = 0  # batches dropped, since their writer is not one that restores a fenced family
    steps_refused_fenced: int = 0  # of publishers here, since their family is fenced
    schemas_refused: int = 0  # of peers, since there is no room for what they name
    steps_refused_full: int = 0  # of publishers here, since our memory has no room (`p2p.pulling.full`)
    batches_refused_full: int = 0  # of peers
    answers_refused_full: int = 0  # to our pulls and rounds
    writers_refused: int = 0  # batches dropped, since the vector has no room for their writer
    retirements_refused: int = 0  # entries of the record of retired writers for which there was no room
    refuted: int = 0  # what was told of us, and was not so
    writer_conflicts: int = 0  # batches, pulls and records dropped, since they know a writer id under another nonce
    blocks_given: int = 0  # of writer ids
    shards_sent_whole: int = 0  # since their asker lacked what was dropped for good (R5)
    rows_ghosts: int = 0  # late versions of keys whose tombstone was collected (T6)
    rows_collected: int = 0  # tombstones and expired rows
    rows_dropped: int = 0  # which an answer did not bring, though it brought their shards whole
    pulls_redirected: int = 0  # to others, since we dropped rows that the asker may lack (R11)
    keys_wanted: int = 0  # that readers asked for, and that we had dropped (`p2p.pulling.fetching`)
    rows_fetched: int = 0  # which came back by key
    fetches_served: int = 0  # questions of others for rows by key
    fetches_refused: int = 0  # of these, since we lack rows, do not cover the asker's floor, or have no credit
    backlogs_begun: int = 0  # a link went into state mode for a keyspace
    backlogs_ended: int = 0  # batches passed through again
    backlogs_again: int = 0  # thrown away, and selected again
    backlogs_refused: int = 0  # given up: the child pulls
    backlog_claims: int = 0  # made to children
    backlog_rows_sent: int = 0
    backlog_bytes_saved: int = 0  # rows that changed again while they waited
    feeds_spoiled: int = 0  # backlogs towards us of which something could not be taken, so that their claims are not, either
    messages_unspoken: int = 0  # not sent, since the peer's version does not know them


@dataclass(slots=True, eq=False)
class Full:
    """Our memory had no room for rows of a keyspace, and we lack them (`p2p.pulling.full`). Moments are monotonic."""

    since_ms: int
    until_ms: int  # no pull before
    pause_ms: int  # after the next answer that finds no room
    told_ms: int | None = None  # when a person was told
    batch_ms: int = -1_000_000  # when a batch found no room, which was sent on before


class Noting(Protocol):
    """What wants to know of every row that comes (`p2p.busy.backlog`)."""

    def note(self, section: RowColumns, places: NDArray[np.int64], now_ms: int) -> None:
        """These rows came and were applied; `places` says where each is, -1: nowhere."""


@dataclass(slots=True, eq=False)
class Keyspace:
    """A replica and what the machine keeps beside it."""

    replica: Replica
    knowledge: Knowledge
    synced: bool  # caught up with somebody at least once in this life
    goal: dict[int, int] = field(default_factory=dict)  # writer -> stamp: how far it had come when we first compared
    alone_since_ms: int | None = None  # monotonic: since when nobody else alive holds it
    last_batch_ms: int = 0  # monotonic, of our own writer
    group: Group = field(default_factory=Group)  # steps of ours that wait to be sent together
    gap_writer: int | None = None  # whose steps were found waiting for one before them when we last looked
    gap_frontier: int = 0  # and how far it was whole then
    gap_since_ms: int = 0  # monotonic; since we asked for it last
    gap_look_ms: int | None = None  # when to look at a gap that is not the one we saw last
    gap_peer: str = ""  # who sent a batch whose claims wait
    gap_upstream: bool = False  # it is above all of our region
    gap_origin: str = ""  # and whose batch it was
    gap_tries: int = 0  # pulls that did not close it
    gap_silent: str = ""  # who left the last question unanswered
    gap_trees: int = 0  # a bit for each tree on which something came since then that waits
    gap_trees_all: int = 1  # and those of all trees
    full: Full | None = None
    stray_digest: int = 0
    stray_digest_ms: int = -1_000_000  # monotonic time of the scan that found it
    strays_possible: bool = True  # rows may be held above the vector
    live_writers: tuple[int, ...] = ()  # as `Core.live_writers` found them last
    live_writers_of: tuple[object, int] = (None, -1)  # and of what: the others' records, and our own writer
    backlogs: dict[int, Noting] = field(default_factory=dict)  # by boot of the child: links in state mode
    feeds: dict[int, Feed] = field(default_factory=dict)  # by boot of the parent: links in state mode towards us

    def fed_with(self, writer: int, now_ms: int) -> bool:
        """Whether a parent has queued for us what we lack of this writer, or some of it, so that it is not to be pulled."""
        return any(feed.holds_back(now_ms) and writer in feed.pairs.writers for feed in self.feeds.values())

    def is_fed(self, now_ms: int) -> bool:
        """Whether rows come over a link in state mode towards us, so that none are to be pulled (R16)."""
        return any(feed.holds_back(now_ms) for feed in self.feeds.values())


@dataclass(slots=True, eq=False)
class Core:
    """Shared state. `emit` collects effects; `Machine.handle` returns them."""

    options: MachineOptions
    host: Host
    record: NodeRecord
    writers: WriterBook
    rng: random.Random
    membership: Membership
    clock: StampClock = field(default_factory=StampClock)
    counters: Counters = field(default_factory=Counters)
    links: dict[str, Link] = field(default_factory=dict)  # by node id
    by_boot: dict[int, Link] = field(default_factory=dict)  # the same links
    sessions: int = 0  # the highest over a link that was forgotten
    keyspaces: dict[int, Keyspace] = field(default_factory=dict)
    touched: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by stamp: the partitions of a step of ours
    families: dict[int, list[Keyspace]] = field(default_factory=dict)  # the same keyspaces, by partition
    started_ms: int = 0  # monotonic
    moment: Moment = field(default_factory=Moment)
    source: int = 0  # the life that sent what is being handled; 0: nobody
    first: bool = False  # no seed but ourselves, and no peer of a former life: nobody to catch up with
    deaf: bool = False  # we hear nobody
    effects: list[m.Effect] = field(default_factory=list)
    retired_digest: int = 0  # over all expulsions and retirements that we know of (R13)
    schema_digest: int = 0  # over the whole schema
    budgets: budget.Budgets = field(init=False)
    let_go: Callable[[Keyspace], None] = lambda _: None  # what the parts keep of a keyspace that ended (`p2p.dropping`)
    drop_held: Callable[[Keyspace], None] = lambda _: None  # steps of ours that wait to be sent together (`p2p.pushing.push`)
    fences: dict[int, m.Fence] = field(
        default_factory=dict
    )  # by family: the one that counts, lifted or not (`p2p.identity.fence`)
    link_gone: Callable[[Link], None] = lambda _: None  # what they keep for a life of a peer that we forget
    retired_changed: Callable[[], None] = lambda: None  # what rests on who is retired begins anew (R13)
    conflicts: dict[str, None] = field(default_factory=dict)  # between writers, that were told
    incomplete: dict[tuple[int, int], None] = field(default_factory=dict)  # (boot, keyspace) of whose rows it dropped some

    def __post_init__(self) -> None:
        self.budgets = budget.initial(self.options.region, dict(self.options.rates))

    @property
    def now_ms(self) -> int:
        """Monotonic, of the event at hand."""
        return self.moment.ms

    def set_rate(self, region: str, bytes_per_s: float | None, now: m.Now) -> None:
        """Updates to another region may use so much from now on; None: no limit."""
        if self.budgets.set_rate(region, bytes_per_s, now.monotonic_ms):
            for link in self.links.values():
                if link.region == region:
                    link.bucket = self.budgets.buckets.get(region)

    def expected(self, now: m.Now) -> list[Peer]:
        """Peers of a former life that may yet answer, sorted by node; after a while they count as silent."""
        if now.monotonic_ms - self.started_ms >= SILENCE_MS_MAX:
            return []
        away = {**self.membership.members, **self.record.absent}
        return [self.record.peers[node] for node in sorted(self.record.peers) if node not in away]

    def link(self, node: str) -> Link | None:
        """The link to a member, opened now if there is none; whom the register names was checked when it joined."""
        link, member = self.links.get(node), self.membership.members.get(node)
        if link is not None or member is None or member.record.left:
            return link
        return self.open_link(member.record)

    def link_of(self, boot: int) -> Link | None:
        """The link to a life of a member, opened now if there is none."""
        link = self.by_boot.get(boot)
        if link is None and (node := self.membership.node_of(boot)) is not None:
            link = self.link(node)
        return link if link is not None and link.boot == boot else None

    def open_link(self, record: m.MemberRecord) -> Link:
        """A new link to this life of a member."""
        version = self.version_with(record)
        link = Link(record.node, record.boot, record.address, record.region, self.options.boot, version, moment=self.moment)
        link.session_out = self.sessions + 1
        link.bucket = self.budgets.buckets.get(record.region)
        self.links[record.node] = self.by_boot[record.boot] = link
        self.emit(m.Dial(record.address))
        self.note("link_opened", peer=record.node, region=record.region, address=record.address)
        return link

    def drop_link(self, link: Link) -> None:
        """Forget a link. The peer may remember it, and would take a lower session over the next one for a repeat (R3)."""
        self.sessions = max(self.sessions, link.session_out)
        self.by_boot.pop(link.boot, None)
        self.links.pop(link.node, None)
        self.link_gone(link)

    def version_with(self, record: m.MemberRecord) -> int:
        """What we speak with this member."""
        # Members of versions that we do not speak are not let into the register.
        return agree(self.options.protocol_version, record.protocol) or FIRST_VERSION

    def neighbours(self, now: m.Now) -> list[Link]:
        """Links to everybody we talk to or gossip with."""
        for node in self.membership.fingers(now.monotonic_ms):
            self.link(node)
        return list(self.links.values())

    def live_writers(self, keyspace: Keyspace, now: m.Now) -> tuple[int, ...]:
        """Ids of the writers of a keyspace that live, our own included. Asked after every batch."""
        identity = keyspace.replica.writer
        records = self.membership.live_writers(now.monotonic_ms, keyspace.replica.place)
        own = -1 if identity is None else identity.writer
        if keyspace.live_writers_of[0] is not records or keyspace.live_writers_of[1] != own:
            others = tuple(record.writer for record in records)
            keyspace.live_writers = others if identity is None else (*others, own)
            keyspace.live_writers_of = records, own
        return keyspace.live_writers

    def same_writers(self, peer: str, keyspace: int, writers: Iterable[int], nonces: Iterable[int]) -> bool:
        """Whether a peer knows these ids under the nonces that we know; if so, those that are new are learned.

        If not, nothing of it may be merged (R12). 0 stands for a nonce that the peer does not know.
        """
        told = {writer: nonce for writer, nonce in zip(writers, nonces, strict=True) if nonce}
        try:
            for writer, nonce in told.items():
                self.writers.check(keyspace, writer, nonce)
        except WriterConflictError as error:
            known = self.writers.nonce_of(keyspace, writer)
            # One of us has not heard yet that the id is another's now.
            if not self.writers.is_retired(keyspace, writer, known) and not self.writers.is_retired(keyspace, writer, nonce):
                self.note_conflict(peer, error)
            return False
        self.writers.learn(keyspace, told.items())
        return True

    def note_conflict(self, node: str, error: WriterConflictError) -> None:
        """Two nonces under one id were met: a person must know, once."""
        self.counters.writer_conflicts += 1
        reason = str(error)
        if reason not in self.conflicts and len(self.conflicts) < CONFLICTS_MAX:
            self.conflicts[reason] = None
            self.note("writer_conflict", alarm=True, node=node, reason=reason)

    def note_no_room(self, keyspace: Keyspace, writer: int) -> None:
        """A writer was met for whom the vector has no room: a person must know, once."""
        self.counters.writers_refused += 1
        reason = f"no room for another writer of keyspace {keyspace.replica.keyspace}, of {keyspace.knowledge.shards} shards"
        if reason not in self.conflicts and len(self.conflicts) < CONFLICTS_MAX:
            self.conflicts[reason] = None
            self.note("writers_full", alarm=True, keyspace=keyspace.replica.keyspace, writer=writer)

    def fence(self, family: int) -> m.Fence | None:
        """The fence that stands before a family's writers."""
        fence = self.fences.get(family)
        return fence if fence is not None and fence.stage != LIFTED else None

    def fenced(self, family: int) -> bool:
        """Whether the writers of a family are stopped, so that nothing of it but what is restored is new."""
        return self.fence(family) is not None

    def stop_writing(self, family: int) -> None:
        """From this moment on nothing leaves under the id that we have in a family. What is stored stays, and is pulled."""
        keyspaces = self.families.get(family, [])
        for keyspace in keyspaces:
            self.drop_held(keyspace)
        if keyspaces and (identity := keyspaces[0].replica.writer) is not None:
            keyspaces[0].replica.set_writer(None)
            self.note("writer_stopped", keyspace=family, writer=identity.writer)

    def own_record(self) -> m.MemberRecord:
        """What we say of ourselves."""
        writers = []
        for family, keyspaces in self.families.items():
            identity = keyspaces[0].replica.writer
            if identity is not None:
                last = self.last_stamp(family, identity.writer)
                writers.append(m.WriterRecord(family, identity.writer, identity.nonce, last))
        holds = holdings_of(keyspace.replica.place for keyspace in self.keyspaces.values())
        self.membership.restate(self.deaf, tuple(writers), holds)
        return self.membership.own

    def last_stamp(self, family: int, writer: int) -> int:
        """The newest stamp of a writer up to which some partition of the family is whole here."""
        keyspaces = self.families.get(family, [])
        return max((int(keyspace.knowledge.frontier[writer]) for keyspace in keyspaces), default=0)

    def touched_by(self, family: int, stamp: int) -> list[Keyspace]:
        """The keyspaces that a step of ours touched and that are whole up to it; empty when we never wrote it.

        Of a step that is not remembered any more (`TOUCHED_MAX`, or a former life), all that are whole up to it: too many,
        never too few.
        """
        whole = [keyspace for keyspace in self.families.get(family, []) if reached(keyspace, stamp)]
        partitions = self.touched.get(stamp)
        return whole if partitions is None else [k for k in whole if k.replica.place.partition in partitions]

    def note_touched(self, stamp: int, partitions: tuple[int, ...]) -> None:
        """Remember which partitions a step of ours touched."""
        while len(self.touched) >= TOUCHED_MAX:
            del self.touched[next(iter(self.touched))]
        self.touched[stamp] = partitions

    def newest(self, record: m.MemberRecord) -> m.MemberRecord:
        """The record of another node, with its writers as far as we know that they have come."""
        writers = []
        for writer in record.writers:
            known = self.last_stamp(writer.keyspace, writer.writer)
            writers.append(replace(writer, last_stamp=max(writer.last_stamp, known)))
        return replace(record, writers=tuple(writers)) if writers else record

    def emit(self, effect: m.Effect) -> None:
        """Add an effect of the event at hand."""
        self.effects.append(effect)

    def send(self, link: Link, message: m.Message) -> None:
        """Send outside any session: small, repeated by nature, harmless to lose.

        What the peer's version does not have is not sent to it: whatever rests on such messages must do without its answer.
        """
        if wire.since(type(message)) > link.version:
            self.counters.messages_unspoken += 1
            return
        self.emit(m.Send(link.address, link.envelope(), message))

    def note(self, name: str, alarm: bool = False, **fields: object) -> None:
        """Something for the log."""
        self.emit(m.Note(name, tuple(fields.items()), alarm))

    def refresh_keyspaces(self, born: bool = False) -> None:
        """Take up what the host's schema has gained, and let go of what it has lost.

        `born`: it was gained here and now, so that nobody can be ahead of us in it.
        """
        self.schema_digest = _digest_of(self.host.schema())
        for number in [number for number in self.keyspaces if number not in self.host.replicas]:
            self._drop_keyspace(number)
        for keyspace, replica in self.host.replicas.items():
            if keyspace not in self.keyspaces:
                knowledge = Knowledge(replica.vector, replica.frontier)
                held = self.keyspaces[keyspace] = Keyspace(replica, knowledge, synced=self.first or born)
                self.families.setdefault(replica.place.family, []).append(held)
                self.clock.observe(max(replica.stamp_max, int(replica.frontier.max())))
                if (own := replica.writer) is not None:
                    if self._is_stopped(replica.place.family, own):  # a kill came before it was given up
                        replica.set_writer(None)
                    else:
                        knowledge.note_writer(own.writer)
                if self.record.drop_floors(keyspace, knowledge.shards):
                    self.retired_digest = self.record.retired_digest()
                for retired in self.record.retired.values():
                    bound = self.writers.nonce_of(retired.family, retired.writer)
                    if retired.keyspace == keyspace and retired.stage == m.DONE and bound in (0, retired.nonce):
                        knowledge.retire(retired.writer, retired.floor)

    def _is_stopped(self, family: int, own: WriterIdentity) -> bool:
        fence = self.fence(family)
        stopped = fence is not None and not fence.lets_pass(own.writer, own.nonce)
        return stopped or self.writers.is_retired(family, own.writer, own.nonce)

    def _drop_keyspace(self, number: int) -> None:
        """It was dropped; its number is never used again, so what comes late finds nothing."""
        gone = self.keyspaces.pop(number)
        place = gone.replica.place
        family = self.families[place.family]
        family.remove(gone)
        if not family:
            del self.families[place.family]
            self.writers.forget_family(place.family)
        for link in self.links.values():
            link.forget_keyspace(number)
        self.let_go(gone)
        self.note("keyspace_dropped", keyspace=number)


def _digest_of(schema: Iterable[SchemaEntry]) -> int:
    """64 bits over it."""
    digest = xxhash.xxh3_64()
    for entry in schema:
        digest.update(f"{entry.keyspace}/{entry.name}/".encode() + entry.body)
    return int(digest.intdigest())


def reached(keyspace: Keyspace, stamp: int) -> bool:
    """Whether everything that the stamp's writer wrote to this keyspace up to it is visible here."""
    return int(keyspace.knowledge.frontier[writer_of(stamp)]) >= stamp
