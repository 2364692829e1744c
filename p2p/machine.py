"""One node's protocol, as a machine without I/O: `handle(event, now) -> effects`.

The daemon, the virtual-time simulator and the tests drive this same class. It composes the parts: `membership` (who is
there), `introductions` and `gossip` (how it comes to know), `push` (fresh batches down the trees), `pull` (repair), `reach`
(waits), `writers` (who may write), over `links` (sessions with one peer), at whose ends are `arrivals` and `departures`. This
file owns what binds them, and the one timer.

A message of a peer can raise only `RemoteProtocolError`, before anything of it took effect on rows or knowledge.
"""

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import assert_never

from p2p import messages as m
from p2p import status
from p2p.arrivals import Arrivals
from p2p.busy.feeds import Feeds
from p2p.ceilings import Ceilings
from p2p.collection import Collection
from p2p.core import Core, Counters, Keyspace, MachineOptions
from p2p.departures import Departures
from p2p.dropping import Dropping
from p2p.errors import AheadError, FencedError, FullError, LocalProtocolError, NotYetError, RemoteProtocolError
from p2p.identity.allotment import Allotment
from p2p.identity.fence import Fencing
from p2p.identity.ledger import Ledger, NodeRecord
from p2p.identity.retirement import Retirement
from p2p.identity.writers import WriterBook
from p2p.link.allowance import ROUND_MS, SELECTION_MS
from p2p.link.links import Arrival, Link
from p2p.link.sharing import Sharing
from p2p.lives import NodeLife, lives_of
from p2p.members.gossip import CLOCK_ERROR_MS_MAX, Gossip
from p2p.members.introductions import Introductions
from p2p.members.membership import Membership
from p2p.members.senders import Senders
from p2p.paper.schedule import Schedule
from p2p.paper.shard_versions import ShardVersions
from p2p.pulling import full, incomplete
from p2p.pulling.fetching import Fetching
from p2p.pulling.pull import Pull
from p2p.pushing import push
from p2p.pushing.push import Push
from p2p.reach import Reach
from p2p.replica import Host, SchemaEntry
from p2p.stamps import StampClock
from p2p.status import NodeStatus
from p2p.versions import describe, first_record_version, lowest_spoken

# A step of a node that has no writer id yet waits for so long; an answer takes a round trip, the next candidate a second.
IDS_WAIT_MS = 5_000
STEPS_WAITING_MAX = 256

__all__ = ["Machine", "MachineOptions", "NodeStatus"]


class Machine:
    """The protocol of one node.

    Args:
        options: who we are.
        host: the rows.
        ledger: what must survive the machine: granted writer ids and the cluster nonce.
        rng: the only source of randomness.

    Raises:
        LocalProtocolError: what the host or the ledger has cannot be worked with.
    """

    def __init__(self, options: MachineOptions, host: Host, ledger: Ledger, rng: random.Random) -> None:
        record = NodeRecord.load(ledger)
        empty = all(replica.stamp_max == 0 and replica.writer is None for replica in host.replicas.values())
        boot_ms = record.begin_life(options.boot, options.boot_ms, empty)
        version = first_record_version(options.protocol_version)
        own = m.MemberRecord(options.node, options.boot, boot_ms, options.region, options.role, "", 0, version=version)
        self._core = Core(options, host, record, WriterBook(record, rng), rng, Membership(own), StampClock())
        self._core.first = not options.seeds and not record.peers
        self._core.clock.observe(record.clock_floor)
        self._core.retired_digest = record.retired_digest()
        self._allotment = Allotment(self._core)
        self._pull = Pull(self._core)
        self._push = Push(self._core, self._allotment, self._pull.answers)
        self._state_mode = self._push.state_mode
        self._feeds = Feeds(self._core, self._pull)
        self._schedule = Schedule(self._core, self._pull)
        self._reach = Reach(self._core)
        self._ceilings = Ceilings(self._core, self._pull, self._reach)
        self._retirement = Retirement(self._core, self._pull)
        self._fencing = Fencing(self._core, self._allotment, self._retirement)
        self._collection = Collection(self._core)
        self._fetching = Fetching(self._core)
        self._sharing = Sharing(self._core)
        self._dropping = Dropping(
            self._core,
            self._push,
            self._pull,
            self._schedule,
            self._reach,
            self._retirement,
            self._collection,
            self._fetching,
        )
        self._introductions = Introductions(self._core, self._pull, self._retirement)
        self._senders = Senders(self._core, self._introductions, self._retirement)
        self._arrivals = Arrivals(self._core, self._pull, self._feeds)
        self._departures = Departures(self._core, self._push, self._state_mode, self._pull)
        self._gossip = Gossip(self._core, self._pull, self._introductions, self._retirement)
        self._core.link_gone, self._core.retired_changed = self._on_link_gone, self._on_retired_changed
        self._started = False
        self._steps: deque[tuple[m.PublishRequested, int]] = deque()  # that wait for a writer id, and until when
        self._handled_ms = 0  # monotonic time of the last event
        self._deadline_ms = 0
        self._others_ms = 0  # the same, but for steps that wait to be sent: those come due often, and nothing else with them
        self._planned = True  # `_deadline_ms` accounts for the last event
        self._core.refresh_keyspaces()
        for number, keyspace in self._core.keyspaces.items():
            if keyspace.knowledge.room < 0:
                raise LocalProtocolError(
                    f"keyspace {number} has {keyspace.knowledge.shards} shards and too many writers for them: its vector fits "
                    "in no message. Remove the shared memory (the node pulls it again), or begin a new model with fewer shards"
                )

    @property
    def counters(self) -> Counters:
        """What happened so far."""
        return self._core.counters

    @property
    def deadline_ms(self) -> int:
        """Monotonic time at which `TimerFired` is due; worked out when asked for, once for many messages that came together."""
        if not self._planned:
            self._plan(self._handled_ms)
            self._planned = True
        return self._deadline_ms

    @property
    def ids_wanted(self) -> str:
        """Why this training node has no writer id to use; empty when it has, or does not need one."""
        return self._allotment.reason

    @property
    def shard_versions(self) -> Mapping[int, ShardVersions]:
        """Keyspace -> versions of its shards, where the node is asked for them; for the checkers."""
        return self._pull.versions.by_keyspace

    @property
    def peers_known(self) -> int:
        """How many other nodes are in the register."""
        return len(self._core.membership.members)

    def protocol_min(self, now: m.Now) -> int:
        """The oldest protocol version that a member here speaks."""
        return self._core.membership.protocol_min(now.monotonic_ms)

    def protocol_min_known(self) -> int:
        """The same, of all who have not left, the silent ones included."""
        return self._core.membership.protocol_min_known()

    def peers_alive(self, now: m.Now) -> tuple[m.NodeId, ...]:
        """The other nodes that are there, as far as this one can tell, sorted."""
        return self._core.membership.live_nodes(now.monotonic_ms)

    def clock_agrees(self, now: m.Now) -> bool:
        """Whether our clock is near the median of what others told us lately; so it is when nobody told us (R14)."""
        error_ms, _ = self._core.membership.suspicion.clock_error_ms(now.unix_ms, now.monotonic_ms)
        return abs(error_ms) < CLOCK_ERROR_MS_MAX

    def silence_max(self, now: m.Now) -> float:
        """The longest silence of a live peer, as a fraction of that at which it is suspected; 0 without one."""
        return self._core.membership.suspicion.silence_max(now.monotonic_ms)

    def fence_of(self, family: int) -> m.Fence | None:
        """The last fence of a family, lifted or not."""
        return self._core.fences.get(family)

    def fences_of(self, family: int) -> tuple[m.Fence, ...]:
        """The fences of a family that are remembered, by epoch, the last one last."""
        return tuple(
            sorted((one for one in self._core.record.fences.values() if one.family == family), key=lambda one: one.epoch)
        )

    def restored_spans(self, family: int, since: int) -> list[tuple[int, int, int]]:
        """See `Fencing.restored_spans`."""
        return self._fencing.restored_spans(family, since)

    @property
    def own_life(self) -> m.MemberRecord:
        """What we say of ourselves."""
        return self._core.membership.own

    def lives_of(self, family: int, now: m.Now) -> tuple[NodeLife, ...]:
        """See `p2p.lives`."""
        return lives_of(self._core, family, now)

    @property
    def links_open(self) -> int:
        """With how many peers we have exchanged anything."""
        return len(self._core.links)

    def region_of(self, address: str) -> str | None:
        """The region of the member that peers dial at `address`, when we know it."""
        for member in self._core.membership.members.values():
            if member.record.address == address:
                return member.record.region
        return None

    def writers_of(self, node: m.NodeId, family: int) -> tuple[int, ...]:
        """The ids under which a node writes to a family, as far as is known here, ascending."""
        core = self._core
        member, absent = core.membership.members.get(node), core.record.absent.get(node)
        records = [core.own_record()] if node == core.options.node else [member.record] if member is not None else []
        told = [one for record in records for one in record.writers] + list(() if absent is None else absent.writers)
        return tuple(sorted({one.writer for one in told if one.keyspace == family}))

    def handle(self, event: m.Event, now: m.Now) -> list[m.Effect]:
        """Advance by one event.

        Returns:
            Effects to carry out, in order.

        Raises:
            RemoteProtocolError: from `MessageReceived` only: the peer's message is wrong and changed nothing.
            LocalProtocolError: from a local request that was wrong and changed nothing.
        """
        self._core.effects = []
        self._core.moment.ms, self._core.source = now.monotonic_ms, 0
        if self._started:
            self._gossip.note_late(now.monotonic_ms - max(self._deadline_ms, self._handled_ms))
        self._handled_ms = now.monotonic_ms
        if not self._planned:
            self._others_ms = 0  # unknown
        self._planned = False
        self._core.budgets.advance(now.monotonic_ms)
        self._dispatch(event, now)
        if self._state_mode.active:  # rows may have become due, or knowledge may have moved
            self._state_mode.pump_all()
        return self._core.effects

    def _dispatch(self, event: m.Event, now: m.Now) -> None:
        match event:
            case m.MessageReceived(envelope, message, proven):
                try:
                    self._on_message(envelope, message, proven, now)
                except AheadError as error:
                    if self._gossip.clock_agrees(now):  # else it may be ours that is wrong, and nobody's fault
                        raise RemoteProtocolError(str(error)) from error
                    raise
            case m.BatchReady(sender_boot, envelope, batch):
                self._on_batch_ready(sender_boot, envelope, batch, now)
            case m.TimerFired():
                self._push.send_held(now)
                self._departures.pump_refilled()
                if now.monotonic_ms >= self._others_ms:
                    self._on_timer(now)
            case m.PublishRequested():
                self._steps.append((event, now.monotonic_ms + IDS_WAIT_MS))
                self._publish_waiting(now)
            case m.WaitRequested():
                self._push.send_awaited(event.keyspace, event.stamp, now)
                self._answer(event.request, lambda: self._reach.wait(event, now))
            case m.CaughtUpRequested():
                self._push.send_all_held(now)
                self._answer(event.request, lambda: self._reach.wait_caught_up(event, now))
            case m.AboveRequested():
                self._answer(event.request, lambda: self._ceilings.begin(event, now))
            case m.ExpelRequested():
                self._answer(event.request, lambda: self._retirement.expel(event, now))
            case m.FenceRequested():
                self._answer(event.request, lambda: self._fencing.request(event, now))
            case m.LiftRequested():
                self._answer(event.request, lambda: self._fencing.lift(event, now))
            case m.SendFailed(_, envelope):
                self._departures.on_send_failed(envelope)
            case m.SchemaChanged(entries):
                self._on_schema_changed(entries, now)
            case m.RateChanged(region, bytes_per_s):
                self._core.set_rate(region, bytes_per_s, now)
                self._departures.pump_region(region)
            case m.SentSmaller(boot, bytes_saved):
                self._departures.on_sent_smaller(boot, bytes_saved)
            case m.Started(address):
                self._on_started(address, now)
            case m.Leaving():
                self._on_leaving(now)
            case _:
                assert_never(event)

    def _publish_waiting(self, now: m.Now) -> None:
        """Publish steps in their order; those that wait for a writer id do so for a while, and none overtakes another."""
        while self._steps:
            event, until_ms = self._steps[0]
            try:
                self._on_publish(event, now)
            except NotYetError as error:
                if now.monotonic_ms < until_ms and len(self._steps) <= STEPS_WAITING_MAX:
                    return
                self._core.emit(m.Refused(event.request, str(error)))
            except LocalProtocolError as error:
                fenced = error.epoch if isinstance(error, FencedError) else 0
                self._core.emit(m.Refused(event.request, str(error), fenced))
            self._steps.popleft()

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
        self._gossip.beat_ms = core.started_ms = now.monotonic_ms
        self._schedule.start(now)
        if not self._introductions.contacts():
            self._introductions.be_first()
        self._retirement.start(now)

    def _on_publish(self, event: m.PublishRequested, now: m.Now) -> None:
        self._gossip.check_clock(now)
        self._fencing.check_step(event, now)
        self._push.publish(event, now)
        for keyspace in self._core.families[event.keyspace]:
            self._progress(keyspace, now)

    def _on_schema_changed(self, entries: tuple[SchemaEntry, ...] | None, now: m.Now) -> None:
        self._core.refresh_keyspaces(born=self._introductions.introduced)
        self._introductions.spread_schema(tuple(self._core.host.schema()) if entries is None else entries, None, now)

    def _on_leaving(self, now: m.Now) -> None:
        core = self._core
        self._push.send_all_held(now)
        last = core.own_record()
        core.membership.own = replace(last, left=True)  # whatever we are told of us by now, we say no more
        for link in core.neighbours(now):
            core.send(link, m.Leave(core.options.node, last.version))

    # --- messages

    def _on_message(self, envelope: m.Envelope, message: m.Message, proven: m.NodeId | None, now: m.Now) -> None:
        core = self._core
        if isinstance(message, m.Hello):
            self._introductions.on_hello(envelope, message, now)
            return
        link = self._senders.link_of(envelope, message, proven)
        if isinstance(message, m.Refusal):
            self._introductions.on_refusal(envelope, message, proven)
            return
        spoken = core.options.protocol_version
        if not lowest_spoken(spoken) <= envelope.version <= spoken:
            raise RemoteProtocolError(f"a message in protocol version {envelope.version}, this node speaks {describe(spoken)}")
        if link is None or envelope.receiver_boot != core.options.boot:
            self._senders.on_stranger(envelope, message, now)
            return
        self._gossip.note_heard()
        self._on_peer(link, envelope, message, now)

    def _on_peer(self, link: Link, envelope: m.Envelope, message: m.Message, now: m.Now) -> None:
        """One case a kind of message; what takes more than a few lines has a method of its own."""
        self._core.source = link.boot
        match message:
            case m.Batch():
                self._on_batch(link, envelope, message, now)
            case m.PullReply() | m.ShardsReply():
                self._on_pull_reply(link, envelope, message, now)
            case m.KeysFound():
                self._on_found(link, envelope, message, now)
            case m.StateChunk():
                self._on_state_chunk(link, envelope, message, now)
            case m.Backlogged():
                feed = self._feeds.on_notice(link, message, now)
                if feed is not None:
                    self._state_mode.pass_on(self._core.keyspaces[message.keyspace], feed.pairs)
            case m.PullRequest() | m.VersionsWanted() | m.ShardsWanted() | m.KeysWanted():
                self._on_question(link, message, now)
            case m.Ack():
                self._departures.on_ack(link, message)
            case m.SessionBroken(session):
                self._departures.on_session_broken(link, session)
            case m.Retirements():
                self._retirement.on_retirements(message, link, now)
            case m.RetireReport():
                self._retirement.on_report(link, message, now)
            case m.FenceReport():
                self._fencing.on_report(link, message, now)
            case m.Heartbeat():
                self._gossip.on_heartbeat(link, message, now)
            case m.SchemaUpdate(entries):
                self._introductions.adopt_schema(entries, link, now)
            case m.Leave(_, version):
                self._on_leave(link, version, now)
            case m.BlockRequest():
                self._allotment.on_request(link, message, now)
            case m.BlockGrant():
                self._allotment.on_grant(link, message, now)
                self._publish_waiting(now)
            case m.RegisterIndex():
                self._gossip.on_index(link, message, now)
            case m.MemberNews(members):
                self._introductions.learn(members, now, link.node, message.columns)
            case m.ReachQuery():
                self._reach.on_query(link, message, now)
            case m.Reached(query):
                self._reach.on_reached(link, query, now)
            case m.CeilingAsk():
                self._ceilings.on_ask(link, message, now)
            case m.CeilingTold():
                self._ceilings.on_told(link, message, now)
            case m.VersionList():
                self._pull.rounds.on_list(link, message, now)
                self._progress_of(message.keyspace, now)
                self._schedule.on_round(now)
            case m.Adopt():
                self._push.adoption.on_adopt(link, message, now)
            case m.Wants():
                self._sharing.on_wants(link, message, now)
            case m.StableAsk():
                self._collection.on_ask(link, message)
            case m.StableReport():
                self._collection.on_report(link, message, now)
            case m.Stable():
                self._collection.on_stable(link, message, now)
            case m.Incomplete():
                self._pull.on_incomplete(link, message, now)
            case m.Hello() | m.Refusal():
                raise AssertionError("these are said without a link")
            case _:
                assert_never(message)

    def _on_question(
        self, link: Link, asked: m.PullRequest | m.VersionsWanted | m.ShardsWanted | m.KeysWanted, now: m.Now
    ) -> None:
        """Somebody wants what we hold; answered only while both agree on who is retired (R13)."""
        if not self._retirement.compare(link, asked.retired_digest, now):
            self._core.counters.pulls_refused += 1
            return
        cost_ms = SELECTION_MS if isinstance(asked, m.PullRequest) else ROUND_MS
        held = asked.keyspace in self._core.keyspaces
        if held and not link.allowance.admits_selection(asked.keyspace, now.monotonic_ms, cost_ms):
            self._core.counters.pulls_refused += 1
            return
        match asked:
            case m.PullRequest(backlog=True):
                self._state_mode.on_vector(link, asked)
            case m.PullRequest():
                self._pull.answers.on_request(link, asked, now)
                self._departures.pump(link)
            case m.VersionsWanted():
                self._pull.round_answers.on_versions_wanted(link, asked, now)
            case m.ShardsWanted():
                self._pull.round_answers.on_shards_wanted(link, asked)
                self._departures.pump(link)
            case m.KeysWanted():
                self._fetching.on_wanted(link, asked)

    def _on_leave(self, link: Link, version: int, now: m.Now) -> None:
        member = self._core.membership.members.get(link.node)
        if member is not None and member.record.boot == link.boot:  # gossip of its next life may have come first
            farewell = replace(member.record, left=True, version=max(version, member.record.version))
            self._introductions.learn((farewell,), now, link.node)

    def _on_batch(self, link: Link, envelope: m.Envelope, batch: m.Batch, now: m.Now) -> None:
        arrival = self._arrivals.take(link, envelope, batch)
        # After a hole, and as a repeat, a batch is as good as ever: its claims carry their own base.
        try:
            pending = self._push.receive(link, envelope, batch, now)
        except RemoteProtocolError:
            self._arrivals.refused(link, arrival, batch)
            raise
        if not pending and arrival is Arrival.NEXT:
            self._arrivals.applied(link, envelope, batch)

    def _on_batch_ready(self, sender_boot: int, envelope: m.Envelope, batch: m.Batch, now: m.Now) -> None:
        self._core.source = sender_boot
        link = self._core.by_boot.get(sender_boot)
        keyspace = self._core.keyspaces.get(batch.keyspace)
        if keyspace is not None:  # else it was dropped meanwhile
            reached = int(keyspace.knowledge.frontier[batch.writer])
            taken = full.reserve_batch(self._core, keyspace, batch, now)  # else it is lacking, and will be pulled
            if taken:
                try:
                    self._push.apply(batch, link.node if link is not None else "")
                except FullError as error:  # in a model that evicts it is not known before; what is written claims nothing
                    full.note_refused_batch(self._core, keyspace, error, now)
                    taken = False
            if not taken:
                self._feeds.spoil_keyspace(keyspace)
            if int(keyspace.knowledge.frontier[batch.writer]) != reached:
                self._progress(keyspace, now)
        # Behind a hole there is nothing to acknowledge; a prefix told again so late would look like a path that became slow.
        if link is not None and envelope.session == link.session_in and not link.is_broken(envelope.session):
            self._arrivals.applied(link, envelope, batch)

    def _on_pull_reply(self, link: Link, envelope: m.Envelope, reply: m.PullReply | m.ShardsReply, now: m.Now) -> None:
        arrival = self._arrivals.take(link, envelope, reply)
        if arrival is Arrival.BROKEN:
            self._pull.abandon_answered(link, reply, "a chunk came behind a hole")
        if arrival is not Arrival.NEXT:
            return
        try:
            new = 0
            if isinstance(reply, m.PullReply):
                new = self._pull.on_reply(link, reply, now)
            else:
                self._pull.rounds.on_reply(link, reply, now)
        except RemoteProtocolError:
            self._arrivals.refused(link, arrival, reply)
            raise
        self._arrivals.applied(link, envelope, reply)
        if reply.last:
            self._progress_of(reply.keyspace, now)
            self._retirement.on_pulled(reply.keyspace, now)
        if isinstance(reply, m.ShardsReply):
            self._schedule.on_round(now)
        elif reply.keyspace in self._core.keyspaces:
            self._schedule.on_pulled(self._core.keyspaces[reply.keyspace], new, reply.last, now)

    def _on_found(self, link: Link, envelope: m.Envelope, found: m.KeysFound, now: m.Now) -> None:
        arrival = self._arrivals.take(link, envelope, found)
        if arrival is not Arrival.NEXT:
            return
        try:
            self._fetching.on_found(link, found, now)
        except RemoteProtocolError:
            self._arrivals.refused(link, arrival, found)
            raise
        self._arrivals.applied(link, envelope, found)

    def _on_state_chunk(self, link: Link, envelope: m.Envelope, chunk: m.StateChunk, now: m.Now) -> None:
        arrival = self._arrivals.take(link, envelope, chunk)
        if arrival is not Arrival.NEXT:
            return
        try:
            claimed = self._feeds.take(link, chunk, now)
        except RemoteProtocolError:
            self._arrivals.refused(link, arrival, chunk)
            raise
        self._arrivals.applied_at_once(link, chunk)
        if claimed:
            self._progress_of(chunk.keyspace, now)

    # --- the timer

    def _on_timer(self, now: m.Now) -> None:
        core = self._core
        if self._started:
            if now.monotonic_ms >= self._gossip.beat_ms:
                self._departures.free_stuck_links(now)
                self._push.open_links(now)
                self._allotment.on_beat(now)
                self._retirement.on_timer(now)
                self._fencing.on_timer(now)
                self._collection.on_beat(now)
                incomplete.note_backing(core, self._pull.kept_by, now)
                self._fetching.on_beat(now)
                self._publish_waiting(now)
            self._gossip.on_timer(now)
        self._push.beat(now)
        for keyspace in core.keyspaces.values():
            self._progress(keyspace, now)
        self._pull.check_gaps(now)
        self._pull.rounds.on_timer(now)
        self._pull.round_answers.on_timer(now)
        self._schedule.on_timer(now)
        self._schedule.on_round(now)
        self._reach.on_timer(now)
        self._ceilings.on_timer(now)
        self._sharing.on_timer(now)
        self._feeds.on_timer(now)
        self._state_mode.on_timer()
        self._arrivals.on_timer(now)
        self._departures.pump_streams()

    def _plan(self, now_ms: int) -> None:
        """When the timer is wanted next. Each part of it is an absolute moment: events must not push it away."""
        core = self._core
        parts = self._pull.next_ms(now_ms), self._reach.next_ms(), self._schedule.next_ms(), self._sharing.next_ms()
        rounds = self._pull.rounds.next_ms(), self._pull.round_answers.next_ms()
        backlogs = self._state_mode.next_ms(), self._feeds.next_ms(), self._ceilings.next_ms()
        wanted = [moment for moment in (self._arrivals.next_ms(now_ms), *parts, *rounds, *backlogs) if moment is not None]
        wanted.append(self._gossip.next_ms(now_ms))
        written = [keyspace.last_batch_ms for keyspace in core.keyspaces.values() if keyspace.last_batch_ms]  # by our writer
        if written:
            wanted.append(min(written) + push.IDLE_BEAT_MS)
        if self._departures.streams_wait():
            wanted.append(now_ms)
        self._others_ms = min(wanted)
        soon = [moment for moment in (self._push.next_ms(), core.budgets.next_ms()) if moment is not None]
        self._deadline_ms = min([self._others_ms, *soon])

    # --- what several events share

    def _progress(self, keyspace: Keyspace, now: m.Now) -> None:
        """A frontier may have moved: tell readers how fresh they are, and peers who wait."""
        if coalesced := keyspace.knowledge.take_coalesced():
            keyspace.replica.note_coalesced(coalesced)
        keyspace.replica.set_synced_until(status.synced_until(self._core, keyspace, now))
        self._reach.on_progress(keyspace)
        self._state_mode.on_progress(keyspace)
        self._pull.answers.on_progress(keyspace, now)
        self._pull.round_answers.on_progress(keyspace)

    def _progress_of(self, number: int, now: m.Now) -> None:
        keyspace = self._core.keyspaces.get(number)
        if keyspace is not None:
            self._progress(keyspace, now)

    def _on_link_gone(self, link: Link) -> None:
        self._state_mode.drop(link.boot)
        self._feeds.forget(link.boot)

    def _on_retired_changed(self) -> None:
        self._feeds.spoil_all()
        self._state_mode.select_again("what is retired has changed")

    # --- for the operator

    def status(self, now: m.Now) -> NodeStatus:
        """A picture of now."""
        wanted = self._allotment.reason
        return status.of_node(
            self._core, self._push, self._pull, self._reach, self._collection, self._introductions.introduced, wanted, now
        )
