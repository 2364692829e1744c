"""How nodes get to know each other: hellos, refusals, records that travel, schema, and the end of a life.

A newcomer says hello to a seed and is checked once, by whoever answers; from then on its record travels, and everybody in the
register is somebody that one of us has checked. So two members need no handshake of their own: a link between them is opened
by whoever needs it first (`Core.link`), and at the other end by what comes over it. A node that is addressed by someone it
has never heard of says hello.
"""

from dataclasses import dataclass

from p2p import messages as m
from p2p.core import Core
from p2p.errors import BlamelessError, RemoteProtocolError, SchemaClashError
from p2p.identity.ledger import Peer
from p2p.identity.retirement import Retirement
from p2p.identity.writers import WriterConflictError
from p2p.link.links import Link
from p2p.members import membership, trees
from p2p.members.membership import HEARTBEAT_MS, contradicts
from p2p.members.suspicion import AHEAD_MAX
from p2p.placement import holds
from p2p.pulling.pull import Pull
from p2p.replica import SchemaEntry
from p2p.sizes import fitting
from p2p.versions import FIRST_VERSION, agree, describe, lowest_spoken

# What all nodes must agree on for the trees to be equal on all of them.
CONSTANTS = (trees.TREE_ARITY, trees.TREES_MAX, trees.ONE_TREE_HOLDERS_MAX)
# A node without seeds calls the peers of its former life this long before it goes on alone: all of them may be gone for good.
ALONE_MS = 10_000
# What a node says of a schema entry that is newer than itself, in every version.
NOT_UNDERSTOOD = "cannot be understood"
# One of those that nobody here has heard for long is called at every so many of our heartbeats: in 30 s.
CALL_MISSING_BEATS = 60
# A later life of our id that is told of, called with each beat, and has not answered for so long, is none.
OTHER_LIFE_MS = membership.SILENCE_MS_MAX
# How far a life that others tell of may begin in the future by our clock. Clocks differ, and one may be set back between two
# lives; what nobody believes leaves room for a later one.
LIFE_AHEAD_MS_MAX = 24 * 3_600_000
# Whom to call at once, while nobody has answered; there may be a thousand peers of a former life.
CONTACTS_MAX = 16
# Strangers that are answered in the time of one beat; the others beat again.
ANSWERS_MAX = 64


@dataclass(frozen=True, slots=True)
class _OtherLife:
    """A later life of our id that members tell of."""

    boot: int
    address: str
    boot_ms: int  # the latest beginning that was told
    since_ms: int  # monotonic: since when it might have answered


class Introductions:
    """The part of the machine that lets others in."""

    def __init__(self, core: Core, pull: Pull, retirement: Retirement) -> None:
        self._retirement = retirement
        self._core = core
        self._pull = pull
        self.introduced = False  # somebody of the cluster has answered us
        self._other_life: _OtherLife | None = None
        self._face_ms = 0  # monotonic; when the next thing may be done about it
        self._called = ""  # the address of who was called last, although it is no member
        self._answers = 0  # to strangers, in the beat that began at
        self._answers_ms = -HEARTBEAT_MS
        self._admitted: dict[m.NodeId, None] = {}  # by us, just now: they know only who was here before them

    # --- hello

    def on_hello(self, envelope: m.Envelope, hello: m.Hello, now: m.Now) -> None:
        """A node wants to be known, or answers our own hello.

        Raises:
            RemoteProtocolError: it makes no sense; nothing is changed.
        """
        core, member = self._core, hello.member
        if envelope.sender_boot != member.boot or member.left or not member.node or not member.address:
            raise RemoteProtocolError("hello of somebody else, or of nobody")
        if envelope.receiver_boot not in (0, core.options.boot):
            core.counters.strangers += 1  # an answer to a former life of ours
            return
        if member.boot == core.options.boot:
            core.emit(m.Forget(member.address))  # a seed that is ourselves
            return
        if core.membership.succeeded(member, now.monotonic_ms):
            core.counters.strangers += 1
            return
        if member.boot in core.record.expelled:
            core.counters.strangers += 1
            self._retirement.tell_stranger(member.address, member.boot, now)
            return
        if self._alone_in_another(hello):
            core.emit(
                m.Fatal(
                    f"this node founded cluster {core.writers.cluster:016x}, and {member.node!r} calls it from cluster "
                    f"{hello.cluster:016x}, which has {len(hello.members) + 1} nodes: a node without seeds and without its "
                    "run_dir begins a cluster of its own. Remove its run_dir, give it seeds, start it again, and publish again "
                    "what was published here since"
                )
            )
            return
        try:
            self._admit(hello, now)
        except RemoteProtocolError as error:
            refusal = m.Envelope(core.options.boot, member.boot)
            core.emit(m.Send(member.address, refusal, m.Refusal(f"{core.options.node}: {error}")))
            core.counters.peers_refused += 1
            core.note("peer_refused", alarm=True, peer=member.node, address=member.address, reason=str(error))
            return
        self.introduced = True
        link = self._link_to(member)
        self.learn((member, *hello.members), now, member.node)
        if hello.answer_wanted and link.allowance.admits_answer("hello", now.monotonic_ms):
            self._admitted[member.node] = None
            self.say_hello(member.address, member.boot, answer_wanted=False, now=now)
            if core.retired_digest and link.version >= 2:
                self._retirement.tell_all(link.address, link.envelope())
        known = core.membership.members[member.node].record if member.node in core.membership.members else member
        if known.boot != member.boot:  # its clock is behind that of its last life, which it does not remember
            core.send(link, m.MemberNews((known,)))
        for keyspace in core.keyspaces.values():
            if not keyspace.synced and member.role in membership.HOLDER_ROLES and holds(member, keyspace.replica.place):
                self._pull.ask(keyspace, link, now, "joining")

    def _admit(self, hello: m.Hello, now: m.Now) -> None:
        """Check everything about a newcomer, then adopt its schema.

        Raises:
            RemoteProtocolError: why it may not join; nothing is changed.
        """
        core, member = self._core, hello.member
        self._check_version(hello, now)
        if hello.constants != CONSTANTS:
            raise RemoteProtocolError(f"tree constants {hello.constants}, this cluster has {CONSTANTS}")
        other = core.membership.conflicts(member, now.monotonic_ms)
        if other is not None:
            raise RemoteProtocolError(
                f"node id {member.node!r} is in use by a live node at {other.address}: give the newcomer another id, "
                "or stop the other one first"
            )
        if not core.membership.has_room(member.node):
            raise RemoteProtocolError(f"this node knows {len(core.membership.members)} members already, and keeps no more")
        core.writers.check_cluster(hello.cluster)
        for writer in member.writers:
            core.writers.check(writer.keyspace, writer.writer, writer.nonce)
        self.adopt_schema(hello.schema, None, now)  # all of it or nothing; the last that can be refused
        core.writers.adopt_cluster(hello.cluster)

    def _alone_in_another(self, hello: m.Hello) -> bool:
        """Whether our cluster consists of us, and a caller who is not alone belongs to another: ours was founded by mistake."""
        core = self._core
        alone = not self.introduced and not core.record.peers
        return (
            alone
            and bool(hello.members)
            and 0 not in (hello.cluster, core.writers.cluster)
            and (hello.cluster != core.writers.cluster)
        )

    def _check_version(self, hello: m.Hello, now: m.Now) -> None:
        """Refuse a newcomer that somebody here could not talk to.

        Raises:
            RemoteProtocolError: its protocol version is too old for the schema, or not next to ours or a live member's.
        """
        core, theirs = self._core, hello.member.protocol
        ours = core.options.protocol_version
        if agree(ours, theirs) is None or hello.protocol_version != lowest_spoken(theirs):
            core.counters.versions_refused += 1
            raise RemoteProtocolError(f"the peer has {describe(theirs)}, this node {describe(ours)}: upgrade the older first")
        if theirs < 2 and core.retired_digest:
            core.counters.versions_refused += 1
            raise RemoteProtocolError(
                f"the peer has {describe(theirs)}, and cannot be told of the nodes and writers that this cluster has expelled: "
                "upgrade it first"
            )
        needs = max(core.host.schema(), key=lambda entry: entry.since, default=None)
        if needs is not None and theirs < needs.since:
            core.counters.versions_refused += 1
            raise RemoteProtocolError(
                f"the peer has {describe(theirs)}, and the cluster's schema needs version {needs.since}: upgrade the peer first"
            )
        if core.membership.agree_with(theirs, now.monotonic_ms):
            return  # as a rule; in a start of many, to look at everybody for each of them would take longer than all else
        for record in core.membership.live(now.monotonic_ms):
            if record.node != hello.member.node and agree(record.protocol, theirs) is None:
                core.counters.versions_refused += 1
                raise RemoteProtocolError(
                    f"the peer has {describe(theirs)}, node {record.node!r} of the cluster {describe(record.protocol)}: "
                    "upgrade the older first"
                )

    def take_admitted(self) -> list[m.NodeId]:
        """Whom we admitted since the last call."""
        admitted, self._admitted = list(self._admitted), {}
        return admitted

    def on_refusal(self, envelope: m.Envelope, refusal: m.Refusal, proven: m.NodeId | None) -> None:
        """Somebody does not let us in."""
        if envelope.receiver_boot != self._core.options.boot:
            self._core.counters.strangers += 1  # an answer to a former life of ours, or to nobody
            return
        other, node = self._other_life, self._core.options.node
        if other is not None and envelope.sender_boot == other.boot and proven in (None, node):
            self._core.emit(
                m.Fatal(
                    f"another process with node id {node!r} was started later, at {other.address}; the cluster follows it: "
                    "what this one acknowledged since they were apart is on its machine alone. Give one of them another id"
                )
            )
            return
        # Once somebody has let us in, a refusal is one peer's opinion; before that, going on alone would be worse.
        # A node that has begun a cluster of its own asked nobody: it would lose what was published here.
        if self.introduced or self._core.first:
            self._core.note("refused_by_peer", alarm=True, reason=refusal.reason)
        else:
            self._core.emit(m.Fatal(f"refused by the cluster: {self._explained(refusal.reason)}"))

    def _explained(self, reason: str) -> str:
        """A refusal, with what its sender could not know: our schema entries are right, so who cannot understand one is older
        than it.
        """
        needs = max((entry.since for entry in self._core.host.schema()), default=FIRST_VERSION)
        if needs == FIRST_VERSION or NOT_UNDERSTOOD not in reason:
            return reason
        refuser = reason.partition(":")[0]
        return (
            f"{refuser}: the cluster has protocol versions below {needs}, and this node's schema needs version {needs}: "
            f"upgrade all nodes of the cluster first ({reason.partition(': ')[2]})"
        )

    def answer_stranger(self, member: m.MemberRecord, now: m.Now) -> None:
        """Somebody whom we do not know beats: introduce ourselves, to so many a beat, since anybody may name any address."""
        if now.monotonic_ms - self._answers_ms >= HEARTBEAT_MS:
            self._answers_ms, self._answers = now.monotonic_ms, 0
        self._answers += 1
        if self._answers <= ANSWERS_MAX:
            self.say_hello(member.address, member.boot, answer_wanted=True, now=now)

    def say_hello(self, address: str, boot: int, answer_wanted: bool, now: m.Now) -> None:
        """Introduce ourselves, with as much of the register as one message carries; the digests bring the rest."""
        core = self._core
        members = core.membership.records(now.monotonic_ms, core.rng)
        members = members[: fitting(members)]
        hello = m.Hello(
            lowest_spoken(core.options.protocol_version),
            core.writers.cluster,
            CONSTANTS,
            core.own_record(),
            tuple(core.newest(core.membership.counted(record)) for record in members),
            tuple(core.host.schema()),
            answer_wanted,
        )
        core.emit(m.Send(address, m.Envelope(core.options.boot, boot), hello))

    # --- whom to call when nobody is known

    def contacts(self) -> list[str]:
        """Whom to call as long as nobody answers: seeds, and the peers of our former life."""
        remembered = [peer.address for peer in self._core.record.peers.values()]
        own = self._core.membership.own.address
        return [address for address in dict.fromkeys([*self._core.options.seeds, *remembered]) if address != own]

    def call_contacts(self, now: m.Now) -> None:
        """Say hello to those who may know the cluster, unless we know it; in the end go on alone."""
        core = self._core
        if not self.introduced or not core.membership.live_count(now.monotonic_ms):
            addresses = self.contacts()
            if len(addresses) > CONTACTS_MAX:
                addresses = core.rng.sample(addresses, CONTACTS_MAX)
            for address in addresses:
                self.say_hello(address, 0, answer_wanted=True, now=now)
        seedless = all(seed == core.membership.own.address for seed in core.options.seeds)
        if seedless and not (self.introduced or core.first) and now.monotonic_ms - core.started_ms >= ALONE_MS:
            core.note("alone", alarm=True, unanswered=tuple(core.record.peers))
            self.be_first()

    def call_missing(self, now: m.Now) -> None:
        """Now and then say hello to one who may be on the other side of a long partition, and is not in the register.

        Peers that were forgotten or not met in this life, and seeds under whose address we know nobody. Both sides have
        forgotten each other by then, so somebody has to call; one answer joins the registers.
        """
        core = self._core
        if (core.membership.own.heartbeat + core.options.boot) % CALL_MISSING_BEATS:
            return
        members = core.membership.members
        known = {core.membership.own.address, *(member.record.address for member in members.values())}
        remembered = (peer.address for node, peer in core.record.peers.items() if node not in members)
        missing = [address for address in dict.fromkeys([*core.options.seeds, *remembered]) if address not in known]
        if self._called and self._called not in known:
            core.emit(m.Forget(self._called))  # no connection to each of those that never answer
        self._called = core.rng.choice(missing) if missing else ""
        if self._called:
            self.say_hello(self._called, 0, answer_wanted=True, now=now)

    def be_first(self) -> None:
        """There is nobody to catch up with."""
        self._core.first = True
        for keyspace in self._core.keyspaces.values():
            keyspace.synced = True

    # --- records

    def node_of(self, boot: int) -> m.NodeId | None:
        """Whose life this is, or was before it was expelled; None where nobody has told."""
        expulsion = self._core.record.expelled.get(boot)
        return self._core.membership.node_of(boot) if expulsion is None else expulsion.node

    def learn(
        self, records: tuple[m.MemberRecord, ...], now: m.Now, source: m.NodeId = "", columns: m.RecordColumns | None = None
    ) -> None:
        """Merge what a peer, `source`, tells of members; its own record comes first, if at all.

        A record that contradicts a writer's binding is ignored alone. Bindings are learned from whom they bind, and from what
        it wrote; those that others tell of may be invented, and no batch of the true writer would be taken any more.
        """
        core = self._core
        lie = None
        if records and records[0].node == source:
            lie = core.membership.note_direct(records[0], now.monotonic_ms)
        for record in core.membership.sift(records, now.monotonic_ms, columns):
            if record.node == core.options.node:
                self._note_own(record, now)
                continue
            direct = record.node == source
            if self._is_anothers(record, direct) or (not direct and record.boot_ms > self._latest_life_ms(now)):
                continue
            if not core.membership.has_room(record.node):
                core.counters.peers_refused += 1
                continue
            if record.boot in core.record.expelled:
                continue
            if agree(core.options.protocol_version, record.protocol) is None:
                core.counters.versions_refused += 1  # whoever let it in speaks with it; we do not
                continue
            try:
                for writer in record.writers:
                    core.writers.check(writer.keyspace, writer.writer, writer.nonce)
                bindings: dict[int, list[tuple[int, int]]] = {}
                for writer in record.writers if direct else ():
                    if writer.keyspace in core.families:  # what a peer can make us remember has a bound
                        bindings.setdefault(writer.keyspace, []).append((writer.writer, writer.nonce))
                for family, known_writers in bindings.items():
                    core.writers.learn(family, known_writers)
            except WriterConflictError as error:  # its record alone is ignored: gossip of the others must go on
                core.note_conflict(record.node, error)
                continue
            known = core.membership.members.get(record.node)
            before = None if known is None else known.record
            if not core.membership.learn(record, now.monotonic_ms, direct):
                if before is not None and record.boot == before.boot and record.version - before.version > AHEAD_MAX:
                    self.answer_stranger(before, now)  # a lie, or many of them that were refuted: it tells us itself
                continue
            self._mend_link(record)
            if record.left:
                core.record.part(record.node)
                core.note("member_left", node=record.node)
            elif before is None or before.boot != record.boot or before.left:
                core.note("member_seen", node=record.node, region=record.region, role=record.role, address=record.address)
                core.record.meet(Peer(record.node, record.region, record.role, record.address))
                self._end_former_life(record)
        link = core.link(source) if lie is not None else None
        if link is not None and lie is not None and link.version >= 2:
            core.send(link, m.MemberNews((lie,)))  # it refutes that

    def _mend_link(self, record: m.MemberRecord) -> None:
        """Where a member listens, and what it speaks, never changes in a life; but a link may have been opened to a lie."""
        core = self._core
        link = core.links.get(record.node)
        version = core.version_with(record)
        if link is None or link.boot != record.boot or (link.address, link.version) == (record.address, version):
            return
        if link.address != record.address:
            core.emit(m.Forget(link.address))
            core.emit(m.Dial(record.address))
            core.record.meet(Peer(record.node, record.region, record.role, record.address))
        link.address, link.version, link.region = record.address, version, record.region
        link.restart_session()  # what went elsewhere is lost
        self._pull.answers.drop_streams(link.node)

    def _is_anothers(self, record: m.MemberRecord, direct: bool) -> bool:
        """Whether the life is another member's, as far as we know: one that was only told of yields to one that speaks."""
        core, register = self._core, self._core.membership
        known = register.members.get(record.node)
        other = None if known is not None and known.record.boot == record.boot else register.owner_of(record.boot)
        if other is None:
            return False
        if not direct or register.suspicion.ever_direct(register.members[other].slot):
            return True
        link, own = core.links.get(other), core.links.get(record.node)
        if link is not None:
            self.drop_link(link)
        if own is not None:
            core.by_boot[own.boot] = own
        register.forget(other)
        return False

    def _latest_life_ms(self, now: m.Now) -> int:
        """Unix time up to which others may say that a life began: so much later that the true one can be later still."""
        error_ms, _ = self._core.membership.suspicion.clock_error_ms(now.unix_ms, now.monotonic_ms)
        return now.unix_ms + max(0, -error_ms) + LIFE_AHEAD_MS_MAX

    def _note_own(self, record: m.MemberRecord, now: m.Now) -> None:
        """A member tells of us. What we did not say must not stick: our own word has to win (decision 0026)."""
        core = self._core
        own = core.own_record()
        if own.left:
            return
        if record.boot != own.boot:
            if (record.boot_ms, record.boot) > (own.boot_ms, own.boot):
                self._note_other_life(record, now)
            return
        core.membership.overtake(record.heartbeat)
        if contradicts(record, own) and core.membership.refute(record.version):
            core.counters.refuted += 1
            core.note("refuted", version=record.version, left=record.left)

    def _note_other_life(self, record: m.MemberRecord, now: m.Now) -> None:
        """Another process with our id that was started while we were cut off, or none: nobody knows but itself, so we call it.

        If it answers, the others follow it, so nobody takes what we acknowledge: `on_refusal` ends us. Else ours is the later
        life. What may not answer is our own address, whoever left, and a former life of ours after a step of the clock.
        """
        own, before = self._core.membership.own, self._other_life
        if record.boot_ms > self._latest_life_ms(now):
            return  # others do not believe it either
        nobody = record.left or record.address == own.address or record.boot in self._core.record.lives
        since_ms = now.monotonic_ms if before is None else before.since_ms
        boot_ms = record.boot_ms if before is None else max(record.boot_ms, before.boot_ms)
        self._other_life = _OtherLife(record.boot, record.address, boot_ms, since_ms - OTHER_LIFE_MS if nobody else since_ms)
        self.face_other_life(now)

    def face_other_life(self, now: m.Now) -> None:
        """Call a later life of our id, or begin ours after it; called when we are told, and with each beat."""
        core, other = self._core, self._other_life
        if other is None or now.monotonic_ms < self._face_ms:
            return
        self._face_ms = now.monotonic_ms + HEARTBEAT_MS  # it is written down
        if now.monotonic_ms - other.since_ms < OTHER_LIFE_MS:
            self.say_hello(other.address, 0, answer_wanted=True, now=now)
            return
        self._other_life = None
        if all(member.record.address != other.address for member in core.membership.members.values()):
            core.emit(m.Forget(other.address))  # no connection to where nobody answers
        core.membership.outlive(other.boot_ms)
        core.record.boot_ms = core.membership.own.boot_ms  # also our next life has to be later
        core.record.save()
        core.counters.refuted += 1
        core.note("life_refuted", alarm=True, boot=other.boot, address=other.address)

    def _end_former_life(self, record: m.MemberRecord) -> None:
        link = self._core.links.get(record.node)
        if link is not None and link.boot != record.boot:
            self.drop_link(link)
            if link.address != record.address:
                self._core.emit(m.Forget(link.address))

    def _link_to(self, member: m.MemberRecord) -> Link:
        link = self._core.links.get(member.node)
        if link is not None and link.boot == member.boot:
            return link
        self._end_former_life(member)
        return self._core.open_link(member)

    def drop_link(self, link: Link) -> None:
        """Forget a peer's life, and what was meant for it."""
        self._pull.forget(link.node)
        self._core.drop_link(link)

    # --- schema

    def adopt_schema(self, entries: tuple[SchemaEntry, ...], link: Link | None, now: m.Now) -> None:
        """Take over what is new, and pass it on.

        Raises:
            RemoteProtocolError: it contradicts ours; nothing is changed.
        """
        core = self._core
        try:
            new = core.host.adopt(entries)
        except SchemaClashError as error:
            core.note("schema_clash", alarm=True, reason=str(error))
            raise
        except BlamelessError:
            core.counters.schemas_refused += 1
            raise
        if new:
            core.refresh_keyspaces()
            self.spread_schema(entries, link, now)

    def spread_schema(self, entries: tuple[SchemaEntry, ...], source: Link | None, now: m.Now) -> None:
        """Tell neighbours; who is missed asks, since heartbeats carry a digest."""
        for other in self._core.neighbours(now):
            if other is not source:
                self._core.send(other, m.SchemaUpdate(entries))
