"""One node's protocol, as a machine without I/O: `handle(event, now) -> effects`.

The daemon, the virtual-time simulator and the tests drive this same class. It composes the parts: `membership` (who is
there), `push` (fresh batches down the trees), `pull` (repair), `reach` (waits), `writers` (who may write), over `links`
(sessions with one peer). This file owns what binds them: introductions, heartbeats, and the one timer.

A message of a peer can raise only `RemoteProtocolError`, before anything of it took effect on rows or knowledge.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

import xxhash

from p2p import links, membership, push, status, trees
from p2p import messages as m
from p2p.core import Core, Counters, Keyspace, MachineOptions
from p2p.errors import LocalProtocolError, RemoteProtocolError, SchemaClashError
from p2p.ledger import Ledger, NodeRecord, Peer
from p2p.links import Arrival, Link
from p2p.membership import HEARTBEAT_MS, Membership
from p2p.pull import Pull
from p2p.push import Push
from p2p.reach import Reach
from p2p.replica import Host, SchemaEntry
from p2p.stamps import StampClock
from p2p.status import NodeStatus
from p2p.writers import WriterBook

__all__ = ["Machine", "MachineOptions", "NodeStatus"]

# A member that left on purpose is called at every so many of our heartbeats.
CALL_LEFT_BEATS = 4
# A node without seeds calls the peers of its former life this long before it goes on alone: all of them may be gone for good.
ALONE_MS = 10_000
# What all nodes must agree on for the trees to be equal on all of them.
CONSTANTS = (trees.TREE_ARITY, trees.TREES_MAX, trees.ONE_TREE_HOLDERS_MAX)


class Machine:
    """The protocol of one node.

    Args:
        options: who we are.
        host: the rows.
        ledger: what must survive the machine: granted writer ids and the cluster nonce.
        rng: the only source of randomness.
    """

    def __init__(self, options: MachineOptions, host: Host, ledger: Ledger, rng: random.Random) -> None:
        record = NodeRecord.load(ledger)
        boot_ms = record.begin_life(options.boot_ms)
        own = m.MemberRecord(options.node, options.boot, boot_ms, options.region, options.role, "", 0)
        self._core = Core(options, host, record, WriterBook(record, rng), rng, Membership(own), StampClock())
        self._core.first = not options.seeds and not record.peers
        self._push = Push(self._core)
        self._pull = Pull(self._core)
        self._reach = Reach(self._core)
        self._by_boot: dict[int, Link] = {}
        self._soon_ms: int | None = None  # when an acknowledgement or a gap wants the timer
        self._introduced = False  # somebody of the cluster has answered us
        self._started = False
        self._heartbeat_ms = 0  # monotonic time of the next one
        self.deadline_ms = 0
        self._core.refresh_keyspaces()

    @property
    def counters(self) -> Counters:
        """What happened so far."""
        return self._core.counters

    def region_of(self, address: str) -> str | None:
        """The region of the member that peers dial at `address`, when we know it."""
        for member in self._core.membership.members.values():
            if member.record.address == address:
                return member.record.region
        return None

    def handle(self, event: m.Event, now: m.Now) -> list[m.Effect]:
        """Advance by one event.

        Returns:
            Effects to carry out, in order.

        Raises:
            RemoteProtocolError: from `MessageReceived` only: the peer's message is wrong and changed nothing.
            LocalProtocolError: from a local request that was wrong and changed nothing.
        """
        self._core.effects = []
        try:
            self._dispatch(event, now)
        finally:
            self._plan(now)
        return self._core.effects

    def _dispatch(self, event: m.Event, now: m.Now) -> None:
        match event:
            case m.MessageReceived(envelope, message):
                self._on_message(envelope, message, now)
            case m.BatchReady(sender_boot, envelope, batch):
                self._on_batch_ready(sender_boot, envelope, batch, now)
            case m.TimerFired():
                self._on_timer(now)
            case m.PublishRequested():
                self._answer(event.request, lambda: self._on_publish(event, now))
            case m.WaitRequested():
                self._answer(event.request, lambda: self._reach.wait(event, now))
            case m.SendFailed(address, envelope):
                self._on_send_failed(address, envelope)
            case m.SchemaChanged():
                self._on_schema_changed()
            case m.Started(address):
                self._on_started(address, now)
            case m.Leaving():
                self._on_leaving()
            case _:
                assert_never(event)

    def _answer(self, request: int, serve: Callable[[], None]) -> None:
        """A local request that cannot be served is answered, not raised: its asker is another process."""
        try:
            serve()
        except LocalProtocolError as error:
            self._core.emit(m.Refused(request, str(error)))

    # --- local events

    def _on_started(self, address: str, now: m.Now) -> None:
        core = self._core
        core.membership.own = replace(core.membership.own, address=address)
        self._started = True
        self._heartbeat_ms = core.started_ms = now.monotonic_ms
        if not self._contacts():
            self._be_first()

    def _contacts(self) -> list[str]:
        """Whom to call as long as nobody answers: seeds, and the peers of our former life."""
        remembered = [peer.address for peer in self._core.record.peers.values()]
        own = self._core.membership.own.address
        return [address for address in dict.fromkeys([*self._core.options.seeds, *remembered]) if address != own]

    def _be_first(self) -> None:
        self._core.first = True
        for keyspace in self._core.keyspaces.values():
            keyspace.synced = True

    def _on_publish(self, event: m.PublishRequested, now: m.Now) -> None:
        self._push.publish(event, now)
        self._progress(self._core.keyspaces[event.keyspace], now)

    def _on_schema_changed(self) -> None:
        self._core.refresh_keyspaces(born=self._introduced)
        update = m.SchemaUpdate(tuple(self._core.host.schema()))
        for link in self._core.links.values():
            self._core.send(link, update)

    def _on_leaving(self) -> None:
        core = self._core
        for link in core.links.values():
            core.send(link, m.Leave(core.options.node))

    def _on_send_failed(self, address: str, envelope: m.Envelope) -> None:
        if not envelope.session:
            return
        link = self._by_boot.get(envelope.receiver_boot)
        if link is not None and envelope.session == link.session_out:
            # The receiver would see a hole; begin anew. What was in flight is repaired by its pull.
            link.restart_session()
            link.traffic.batches_skipped += 1
            self._core.counters.batches_skipped += 1
            self._drop_streams(link)

    # --- messages

    def _on_message(self, envelope: m.Envelope, message: m.Message, now: m.Now) -> None:
        core = self._core
        if isinstance(message, m.Hello):
            self._on_hello(envelope, message, now)
            return
        if isinstance(message, m.Refusal):
            self._on_refusal(envelope, message)
            return
        link = self._by_boot.get(envelope.sender_boot)
        if link is None or envelope.receiver_boot != core.options.boot:
            core.counters.strangers += 1
            if isinstance(message, m.Heartbeat) and message.member.boot == envelope.sender_boot:
                self._say_hello(message.member.address, envelope.sender_boot, answer_wanted=True, now=now)
            return
        match message:
            case m.Batch():
                self._on_batch(link, envelope, message, now)
            case m.PullReply():
                self._on_pull_reply(link, envelope, message, now)
            case m.Ack(session, sequence):
                if link.on_ack(session, sequence):
                    self._pump(link)
            case m.SessionBroken(session):
                if session == link.session_out:
                    link.restart_session()
                    self._drop_streams(link)
            case m.PullRequest():
                self._pull.on_request(link, message)
                self._pump(link)
            case m.Heartbeat():
                self._on_heartbeat(link, message, now)
            case m.SchemaUpdate(entries):
                self._adopt_schema(entries, link)
            case m.Leave():
                member = core.membership.members.get(link.node)
                if member is not None and member.record.boot == link.boot:  # gossip of its next life may have come first
                    core.membership.learn(replace(member.record, left=True), now.monotonic_ms)
                    core.record.part(link.node)
                    core.note("member_left", node=link.node)
            case m.ReachQuery():
                self._reach.on_query(link, message, now)
            case m.Reached(query):
                self._reach.on_reached(link, query, now)
            case _:
                assert_never(message)

    def _on_batch(self, link: Link, envelope: m.Envelope, batch: m.Batch, now: m.Now) -> None:
        payload = sum(section.payload_bytes for section in batch.columns)
        arrival = self._arrive(link, envelope, payload)
        # After a hole, and as a repeat, a batch is as good as ever: its claims carry their own base.
        link.traffic.rows_in += sum(len(section.keys) for section in batch.columns)
        link.traffic.bytes_in += payload
        try:
            pending = self._push.receive(link, envelope, batch, now)
        except RemoteProtocolError:
            self._refused(link, arrival, payload)
            raise
        if not pending and arrival is Arrival.NEXT:
            self._applied(link, payload)

    def _on_batch_ready(self, sender_boot: int, envelope: m.Envelope, batch: m.Batch, now: m.Now) -> None:
        link = self._by_boot.get(sender_boot)
        self._push.apply(batch, link.node if link is not None else "")
        self._progress(self._core.keyspaces[batch.keyspace], now)
        if link is not None and envelope.session == link.session_in:
            self._applied(link, sum(section.payload_bytes for section in batch.columns))

    def _on_pull_reply(self, link: Link, envelope: m.Envelope, reply: m.PullReply, now: m.Now) -> None:
        payload = sum(section.payload_bytes for section in reply.columns)
        arrival = self._arrive(link, envelope, payload)
        link.traffic.rows_in += sum(len(section.keys) for section in reply.columns)
        link.traffic.bytes_in += payload
        if arrival is not Arrival.NEXT:
            return
        try:
            self._pull.on_reply(link, reply, now)
        except RemoteProtocolError:
            self._refused(link, arrival, payload)
            raise
        self._applied(link, payload)
        keyspace = self._core.keyspaces.get(reply.keyspace)
        if keyspace is not None and reply.last:
            self._progress(keyspace, now)

    def _arrive(self, link: Link, envelope: m.Envelope, payload: int) -> Arrival:
        if envelope.session == 0:
            raise RemoteProtocolError("a batch or pull chunk outside any session")
        arrival = link.on_arrival(envelope)
        if arrival is Arrival.BROKEN:
            self._core.counters.sessions_broken += 1
            self._pull.abandon_from(link.node, "the session has a hole")
            self._core.send(link, m.SessionBroken(envelope.session))
        return arrival

    def _applied(self, link: Link, payload: int) -> None:
        if link.note_applied(payload):
            self._core.send(link, m.Ack(*link.take_ack()))

    @staticmethod
    def _refused(link: Link, arrival: Arrival, payload: int) -> None:
        """What was refused is not on its way any more: its credit goes back, or the link would dry up.

        With the timer, since a message that is refused has no effects of its own.
        """
        if arrival is Arrival.NEXT:
            link.note_applied(payload)

    def _on_heartbeat(self, link: Link, beat: m.Heartbeat, now: m.Now) -> None:
        if beat.member.boot != link.boot or beat.member.node != link.node:
            raise RemoteProtocolError(f"heartbeat of {beat.member.node!r} over the link of {link.node!r}")
        self._learn_members((beat.member, *beat.members), now)
        if beat.schema_digest != self._schema_digest():
            self._core.send(link, m.SchemaUpdate(tuple(self._core.host.schema())))
        for summary in beat.summaries:
            self._pull.on_summary(link, summary, now)

    # --- introductions

    def _on_hello(self, envelope: m.Envelope, hello: m.Hello, now: m.Now) -> None:
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
        try:
            self._admit(hello, now)
        except RemoteProtocolError as error:
            refusal = m.Envelope(core.options.boot, member.boot)
            core.emit(m.Send(member.address, refusal, m.Refusal(f"{core.options.node}: {error}")))
            core.counters.peers_refused += 1
            core.note("peer_refused", alarm=True, peer=member.node, address=member.address, reason=str(error))
            return
        self._introduced = True
        link = self._link_to(member)
        self._learn_members((member, *hello.members), now)
        if hello.answer_wanted:
            self._say_hello(member.address, member.boot, answer_wanted=False, now=now)
        for keyspace in core.keyspaces.values():
            if not keyspace.synced and member.role in membership.HOLDER_ROLES:
                self._pull.ask(keyspace, link, now, "joining")

    def _admit(self, hello: m.Hello, now: m.Now) -> None:
        """Check everything about a newcomer, then adopt its schema.

        Raises:
            RemoteProtocolError: why it may not join; nothing is changed.
        """
        core, member = self._core, hello.member
        if hello.protocol_version != m.PROTOCOL_VERSION:
            raise RemoteProtocolError(f"protocol version {hello.protocol_version}, this node speaks {m.PROTOCOL_VERSION}")
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
        self._adopt_schema(hello.schema, None)  # all of it or nothing; the last that can be refused
        core.writers.adopt_cluster(hello.cluster)

    def _on_refusal(self, envelope: m.Envelope, refusal: m.Refusal) -> None:
        if envelope.receiver_boot != self._core.options.boot:
            self._core.counters.strangers += 1  # an answer to a former life of ours, or to nobody
            return
        # Once somebody has let us in, a refusal is one peer's opinion; before that, going on alone would be worse.
        if self._introduced:
            self._core.note("refused_by_peer", alarm=True, reason=refusal.reason)
        else:
            self._core.emit(m.Fatal(f"refused by the cluster: {refusal.reason}"))

    def _link_to(self, member: m.MemberRecord) -> Link:
        core = self._core
        link = core.links.get(member.node)
        if link is not None and link.boot == member.boot:
            return link
        if link is not None:
            self._drop_link(link)
            if link.address != member.address:
                core.emit(m.Forget(link.address))
        link = Link(member.node, member.boot, member.address, member.region, core.options.boot)
        core.links[member.node] = self._by_boot[member.boot] = link
        core.record.meet(Peer(member.node, member.region, member.role, member.address))
        core.note("link_opened", peer=member.node, region=member.region, address=member.address)
        return link

    def _drop_link(self, link: Link) -> None:
        self._pull.forget(link.node)
        self._by_boot.pop(link.boot, None)
        self._core.links.pop(link.node, None)

    def _learn_members(self, records: tuple[m.MemberRecord, ...], now: m.Now) -> None:
        core = self._core
        for record in records:
            if record.node != core.options.node and not core.membership.has_room(record.node):
                core.counters.peers_refused += 1
                continue
            try:
                for writer in record.writers:
                    core.writers.check(writer.keyspace, writer.writer, writer.nonce)
                for writer in record.writers:
                    if writer.keyspace in core.keyspaces:  # what a peer can make us remember has a bound
                        core.writers.learn(writer.keyspace, writer.writer, writer.nonce)
            except RemoteProtocolError as error:  # its record alone is ignored: gossip of the others must go on
                core.note("writer_conflict", alarm=True, node=record.node, reason=str(error))
                continue
            if core.membership.learn(record, now.monotonic_ms) and not record.left:
                core.note("member_seen", node=record.node, region=record.region, role=record.role, address=record.address)
            known = core.links.get(record.node)
            stranger = record.node != core.options.node and (known is None or known.boot != record.boot)
            if stranger and not record.left and core.membership.members[record.node].record.boot == record.boot:
                self._say_hello(record.address, 0, answer_wanted=True, now=now)

    def _say_hello(self, address: str, boot: int, answer_wanted: bool, now: m.Now) -> None:
        core = self._core
        hello = m.Hello(
            m.PROTOCOL_VERSION,
            core.writers.cluster,
            CONSTANTS,
            self._own_record(),
            core.membership.records(now.monotonic_ms),
            tuple(core.host.schema()),
            answer_wanted,
        )
        core.emit(m.Send(address, m.Envelope(core.options.boot, boot), hello))

    def _adopt_schema(self, entries: tuple[SchemaEntry, ...], link: Link | None) -> None:
        core = self._core
        try:
            new = core.host.adopt(entries)
        except SchemaClashError as error:
            core.note("schema_clash", alarm=True, reason=str(error))
            raise
        if new:
            core.refresh_keyspaces()
            for other in core.links.values():
                if other is not link:
                    core.send(other, m.SchemaUpdate(entries))

    def _schema_digest(self) -> int:
        digest = xxhash.xxh3_64()
        for entry in self._core.host.schema():
            digest.update(f"{entry.keyspace}/{entry.name}/".encode() + entry.body)
        return int(digest.intdigest())

    # --- the timer

    def _on_timer(self, now: m.Now) -> None:
        core = self._core
        self._soon_ms = None
        if self._started and now.monotonic_ms >= self._heartbeat_ms:
            self._heartbeat_ms = now.monotonic_ms + HEARTBEAT_MS
            self._beat(now)
        self._push.beat(now)
        for keyspace in core.keyspaces.values():
            self._progress(keyspace, now)
        self._pull.check_gaps(now)
        self._reach.on_timer(now)
        for link in list(core.links.values()):
            if link.ack_waits:
                core.send(link, m.Ack(*link.take_ack()))
            self._pump(link)

    def _beat(self, now: m.Now) -> None:
        core = self._core
        for record in core.membership.expire(now.monotonic_ms):
            link = core.links.get(record.node)
            if link is not None:
                self._drop_link(link)
            core.record.part(record.node)
            core.emit(m.Forget(record.address))
        for link in core.links.values():
            if core.membership.alive(link.node, now.monotonic_ms) and link.is_stuck(now.monotonic_ms):
                core.note("session_stuck", peer=link.node, bytes_in_flight=link.bytes_in_flight)
                link.restart_session()
                self._drop_streams(link)
        core.membership.beat()
        beat = m.Heartbeat(
            self._own_record(),
            core.membership.records(now.monotonic_ms),
            self._schema_digest(),
            now.unix_ms,
            tuple(self._summary(keyspace, now) for keyspace in core.keyspaces.values()),
        )
        for node, member in core.membership.members.items():
            link = core.links.get(node)
            if member.record.left:
                # It may come back without knowing anybody: the first node of a cluster has no seeds.
                if core.membership.own.heartbeat % CALL_LEFT_BEATS == 0:
                    self._say_hello(member.record.address, 0, answer_wanted=True, now=now)
            elif link is not None and link.boot == member.record.boot:
                core.send(link, beat)
            else:
                self._say_hello(member.record.address, 0, answer_wanted=True, now=now)
        if not self._introduced or not core.membership.live(now.monotonic_ms):
            for address in self._contacts():
                self._say_hello(address, 0, answer_wanted=True, now=now)
        seedless = all(seed == core.membership.own.address for seed in core.options.seeds)
        if seedless and not (self._introduced or core.first) and now.monotonic_ms - core.started_ms >= ALONE_MS:
            core.note("alone", alarm=True, unanswered=tuple(core.record.peers))
            self._be_first()

    def _summary(self, keyspace: Keyspace, now: m.Now) -> m.KeyspaceSummary:
        vector, strays = self._pull.digests(keyspace, now)
        writers = keyspace.knowledge.writers.tolist()
        frontier = tuple((w, int(keyspace.knowledge.frontier[w])) for w in writers if keyspace.knowledge.frontier[w])
        return m.KeyspaceSummary(keyspace.replica.keyspace, vector, strays, frontier)

    def _own_record(self) -> m.MemberRecord:
        return replace(self._core.membership.own, writers=self._own_writers())

    def _own_writers(self) -> tuple[m.WriterRecord, ...]:
        found = []
        for number, keyspace in self._core.keyspaces.items():
            identity = keyspace.replica.writer
            if identity is not None:
                last = int(keyspace.knowledge.frontier[identity.writer])
                found.append(m.WriterRecord(number, identity.writer, identity.nonce, last))
        return tuple(found)

    def _plan(self, now: m.Now) -> None:
        """When the timer is wanted next. Each part of it is an absolute moment: events must not push it away."""
        core = self._core
        waiting = any(link.ack_waits for link in core.links.values())
        waiting = waiting or any(keyspace.knowledge.open_steps for keyspace in core.keyspaces.values())
        if not waiting:
            self._soon_ms = None
        elif self._soon_ms is None:
            self._soon_ms = now.monotonic_ms + links.ACK_DELAY_MS
        wanted = [self._heartbeat_ms, self._soon_ms, self._reach.next_ms()]
        wanted += [
            keyspace.last_batch_ms + push.IDLE_BEAT_MS
            for keyspace in core.keyspaces.values()
            if keyspace.last_batch_ms  # our writer has written
        ]
        if any(
            node in core.links and core.links[node].has_credit() for node, box in self._pull.outboxes.items() if box.streams
        ):
            wanted.append(now.monotonic_ms)
        self.deadline_ms = min(moment for moment in wanted if moment is not None)

    # --- what several events share

    def _progress(self, keyspace: Keyspace, now: m.Now) -> None:
        """A frontier may have moved: tell readers how fresh they are, and peers who wait."""
        keyspace.replica.set_synced_until(status.synced_until(self._core, keyspace, self._own_record(), now))
        self._reach.on_progress(keyspace)

    def _pump(self, link: Link) -> None:
        outbox = self._pull.outboxes.get(link.node)
        if outbox is not None:
            outbox.pump(self._core, link)

    def _drop_streams(self, link: Link) -> None:
        """A stream with a hole is worthless: its asker gives it up too, and asks again."""
        outbox = self._pull.outboxes.get(link.node)
        if outbox is not None:
            outbox.streams.clear()

    # --- for the operator

    def status(self, now: m.Now) -> NodeStatus:
        """A picture of now."""
        return status.of_node(self._core, self._push, self._pull, self._reach, self._own_record(), self._introduced, now)
