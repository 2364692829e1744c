"""Who is there: a first membership over heartbeats that all nodes exchange.

Think of a class register that everyone carries around. Each node counts its own heartbeat up and sends its register to
everyone else; a larger count than the one we have means that the node was alive a moment ago, whoever told us. A node whose
count stood still for `SILENCE_MS_MAX` is out of the trees, though we go on calling it, and is back with its next heartbeat.

A life of a node is named by a random *boot* nonce, and lives are ordered by `boot_ms`. A second life under one id while the
first still answers is a configuration error of the operator, and the newcomer is the one who is refused.
"""

from dataclasses import dataclass, field, replace

from p2p.errors import RemoteProtocolError
from p2p.messages import MemberRecord, NodeId, WriterRecord
from p2p.trees import Holder

# Heartbeats go to every member each interval. A fixed time-out suffices for a handful of nodes on good links: ten missed
# beats, well above the pauses of a loaded machine.
HEARTBEAT_MS = 500
SILENCE_MS_MAX = 5_000
# A member that has been silent this long is no longer called; it has to call us.
FORGET_MS = 600_000
MEMBERS_MAX = 4_096
# Of one member: it writes with one id a keyspace. A record with more could not be sent on.
WRITER_RECORDS_MAX = 4_096
# Roles whose nodes hold rows and forward batches.
HOLDER_ROLES = ("train", "serve")


@dataclass(slots=True)
class Member:
    """What we know of another node, and since when."""

    record: MemberRecord
    heard_ms: int  # monotonic time at which its heartbeat last advanced


@dataclass(slots=True)
class Membership:
    """The register of one node.

    Args:
        own: our record as it was at start; `beat` counts its heartbeat up.
    """

    own: MemberRecord
    members: dict[NodeId, Member] = field(default_factory=dict)
    _holders: tuple[Holder, ...] | None = None
    _holders_until_ms: int = 0

    def beat(self) -> MemberRecord:
        """Count our own heartbeat up, and return the record that says so."""
        self.own = replace(self.own, heartbeat=self.own.heartbeat + 1)
        return self.own

    def records(self, now_ms: int) -> tuple[MemberRecord, ...]:
        """Every other node worth telling about: alive, or gone on purpose and lately."""
        return tuple(m.record for m in self.members.values() if now_ms - m.heard_ms < SILENCE_MS_MAX)

    def alive(self, node: NodeId, now_ms: int) -> bool:
        """Whether `node` belongs into the trees now."""
        member = self.members.get(node)
        return member is not None and not member.record.left and now_ms - member.heard_ms < SILENCE_MS_MAX

    def live(self, now_ms: int) -> list[MemberRecord]:
        """Records of the live members, ourselves left out, sorted by node id."""
        return [self.members[node].record for node in sorted(self.members) if self.alive(node, now_ms)]

    def holders(self, now_ms: int) -> tuple[Holder, ...]:
        """The live holders, ourselves included; what the trees are computed from."""
        if self._holders is None or now_ms >= self._holders_until_ms:
            live = [record for record in (self.own, *self.live(now_ms)) if record.role in HOLDER_ROLES]
            self._holders = tuple(sorted(Holder(record.region, record.node) for record in live))
            # The set can only shrink by somebody's silence, so it holds until the first silence could complete.
            heard = [m.heard_ms for m in self.members.values() if now_ms - m.heard_ms < SILENCE_MS_MAX]
            self._holders_until_ms = min(heard, default=now_ms) + SILENCE_MS_MAX
        return self._holders

    def has_room(self, node: NodeId) -> bool:
        """Whether a record of `node` can be kept."""
        return node in self.members or len(self.members) < MEMBERS_MAX

    def succeeded(self, record: MemberRecord, now_ms: int) -> bool:
        """Whether a later life of this record's node is known and alive: what comes of the former one comes late."""
        known = self.members.get(record.node)
        if known is None or (record.boot_ms, record.boot) >= (known.record.boot_ms, known.record.boot):
            return False
        return self.alive(record.node, now_ms)

    def learn(self, record: MemberRecord, now_ms: int) -> bool:
        """Merge one record, ours or of another node, from wherever.

        Returns:
            True when the node is new to us, is in a new life, or has left: something others may want to know.

        Raises:
            RemoteProtocolError: there are too many members.
        """
        if record.node == self.own.node:
            return False
        known = self.members.get(record.node)
        if known is None:
            if not self.has_room(record.node):
                raise RemoteProtocolError(f"more than {MEMBERS_MAX} members")
            self.members[record.node] = Member(record, now_ms)
            self._holders = None
            return True
        old = known.record
        if (record.boot_ms, record.boot) != (old.boot_ms, old.boot):
            if (record.boot_ms, record.boot) < (old.boot_ms, old.boot):
                return False
        elif record.heartbeat <= old.heartbeat and record.left == old.left:
            return False
        elif old.left:
            return False  # a life that has left does not come back; a late heartbeat of it changes nothing
        changed = record.boot != old.boot or record.left != old.left or record.role != old.role
        if changed or now_ms - known.heard_ms >= SILENCE_MS_MAX:
            self._holders = None
        known.record, known.heard_ms = record, now_ms
        return changed

    def note_writer(self, node: NodeId, writer: WriterRecord) -> None:
        """A batch came from a writer of `node`: sooner news than the heartbeat that will say so."""
        member = self.members.get(node)
        if member is None or len(member.record.writers) >= WRITER_RECORDS_MAX:
            return
        if any((w.keyspace, w.writer) == (writer.keyspace, writer.writer) for w in member.record.writers):
            return
        member.record = replace(member.record, writers=(*member.record.writers, writer))

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
        gone = [m.record for m in self.members.values() if now_ms - m.heard_ms >= FORGET_MS]
        for record in gone:
            del self.members[record.node]
        return gone
