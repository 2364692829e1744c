"""Forwarding of fresh batches down the trees, from the publisher's step to the last leaf.

A step is stamped, stored here, joined with others where steps come fast (`p2p.pushing.groups`), cut into messages
(`p2p.pushing.cutting`), and sent to our children; a received batch is checked, forwarded, and only then applied (R17). What
finds no credit waits in order, within a bound (`p2p.pushing.waiting`); beyond it the child sees a gap and pulls. Push may lose
everything; that costs latency only (theorem T7).
"""

import itertools
from collections.abc import Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray

from p2p import messages as m
from p2p import wire
from p2p.busy.backlog import STATE_SINCE
from p2p.busy.noting import note_rows
from p2p.busy.state_mode import StateMode
from p2p.classes import significant_by_step, significant_rows
from p2p.core import FIFO, STATE, Core, Keyspace
from p2p.errors import FullError, LocalProtocolError, RemoteProtocolError, UnknownTableError
from p2p.identity.allotment import Allotment
from p2p.knowledge import Knowledge
from p2p.link import links
from p2p.link.budget import CLAIM_BYTES
from p2p.link.links import Link
from p2p.members.trees import TREES_MAX, Trees
from p2p.placement import divide
from p2p.pulling.pull_answers import PullAnswers
from p2p.pushing import groups
from p2p.pushing.adoption import Adoption
from p2p.pushing.cutting import split_step
from p2p.pushing.groups import Group, Step, join
from p2p.pushing.waiting import SHORT_BYTES_MAX, SHORT_MS_MAX, SHORT_RATED_MS_MAX, WAITING_CREDITS_MAX, WaitingBatch
from p2p.replica import RowColumns, WriterIdentity
from p2p.stamps import check_not_ahead

# An idle writer says "nothing since" this often; it bounds how stale a node must assume itself to be, and how long the loss
# of the very last batch goes unnoticed.
IDLE_BEAT_MS = 200
# A batch that would not have passed whole within so long, by the link's budget, does not pass: what matters more would wait
# behind it. It is what the delay of a significant row may grow by before it goes by priority; less would have steps of a busy
# but sufficient link leave row by row, and consistent look-ups wait for their claims (R19).
PASS_MS_MAX = 75
# Batches remembered to recognise repeats while views differ: 16 s of 1,000 batches a second.
SEEN_MAX = 16_384


class Push:
    """The pushing part of the machine."""

    def __init__(self, core: Core, allotment: Allotment, answers: PullAnswers) -> None:
        self._core = core
        self._allotment = allotment
        self.adoption = Adoption(core)
        self.state_mode = StateMode(core, answers, self._fed_in)
        self._seen: dict[tuple[int, ...], None] = {}
        self._lingering: dict[int, Keyspace] = {}  # those with steps that wait for others
        core.drop_held = self._drop_held

    @property
    def seen(self) -> int:
        """Batches remembered."""
        return len(self._seen)

    def publish(self, request: m.PublishRequested, now: m.Now) -> None:
        """Stamp, store and send one step.

        Raises:
            LocalProtocolError: this node cannot write, the family is unknown, some rows belong to a partition of it that is
                not held here, or memory has no room for all of them. Nothing happened.
        """
        core = self._core
        family = core.families.get(request.keyspace)
        if family is None:
            raise LocalProtocolError(f"keyspace {request.keyspace} does not exist on this node")
        if not request.through_fence:  # who restores a model may be whoever knows how it was
            self._allotment.check_may_write(now)
        columns = tuple(section for section in request.columns if len(section.keys))
        parts = _parts_of(family, columns)
        try:
            family[0].replica.reserve(columns)  # before there is a stamp: a step is stored whole or not at all
        except FullError as error:
            core.counters.steps_refused_full += 1
            raise LocalProtocolError(f"{error}; nothing was published") from error
        if family[0].replica.writer is None:
            _check_room(family)
            self._allotment.become_writer(family, now)
        identity = family[0].replica.writer
        assert identity is not None
        if not columns:
            core.emit(m.Published(request.request, core.last_stamp(request.keyspace, identity.writer)))
            return
        stamp = core.clock.mint(now.unix_ms, identity.writer)
        steps, written = self._store(columns, parts, stamp, identity, request.published_ns, now)
        core.counters.batches_published += 1
        if family[0].replica.place.partitions > 1:
            core.note_touched(stamp, tuple(keyspace.replica.place.partition for keyspace, _ in parts))
        if not steps[0].writer_prev:
            core.own_record()  # says from now on that we have written
        # All of the step is stored before any of it leaves, and the publisher prepares its next one meanwhile.
        core.emit(m.Published(request.request, stamp))
        for (keyspace, _), step in zip(parts, steps, strict=True):
            if not request.quiet:
                self._send_or_hold(keyspace, step, now, hold=not request.through_fence)
        options = core.options
        number, significant = parts[0][0].replica.keyspace, min(written, significant_rows(request.columns))
        core.emit(m.BatchApplied(number, options.region, stamp, request.published_ns, options.machine, written, significant))

    def _store(
        self,
        columns: tuple[RowColumns, ...],
        parts: Sequence[tuple[Keyspace, tuple[RowColumns, ...]]],
        stamp: int,
        identity: WriterIdentity,
        published_ns: int,
        now: m.Now,
    ) -> tuple[list[Step], int]:
        """Write what a step of ours changes, all of its rows at once, and note it in each keyspace that has a part of it.

        Returns:
            What to send of it in each of them, and how many rows were written.
        """
        core, writer = self._core, identity.writer
        steps: list[Step] = []
        begun: dict[int, NDArray[np.int64]] = {}
        for keyspace, part in parts:
            replica = keyspace.replica
            shard_of = [replica.shards_of(section.keys) for section in part]
            touched = begun[replica.place.partition] = _touched(replica.shards, shard_of)
            prev, writer_prev = replica.vector[touched, writer], int(replica.frontier[writer])
            steps.append(Step(identity, stamp, writer_prev, touched.astype(np.uint32), prev, part, shard_of, published_ns))
        family = parts[0][0].replica
        family.begin_step(stamp, begun)
        applied = family.apply(columns, stamp)
        for (keyspace, part), step in zip(parts, steps, strict=True):
            note_rows(core, keyspace, part, applied)
            claims = join([step]).claims
            count = len(claims.shards)
            keyspace.knowledge.learn_step(stamp, step.writer_prev, count, claims.shards, step.prev, claims.part, claims.parts)
            keyspace.last_batch_ms = now.monotonic_ms
        core.counters.rows_written += applied.written
        return steps, applied.written

    def _send_or_hold(self, keyspace: Keyspace, step: Step, now: m.Now, *, hold: bool) -> None:
        """A step that is stored leaves now, or soon, with others (`p2p.pushing.groups`); what is restored is cut for the
        links already, and waits for nothing.
        """
        core, group = self._core, keyspace.group
        if not group.admits(step):
            self._send_group(keyspace, now)
        group.add(step)
        # Whoever speaks version 1 understands single steps only.
        alone = core.membership.protocol_min(now.monotonic_ms) < wire.GROUPS_SINCE
        if not hold or alone or group.bytes >= groups.bytes_max() or self._is_due(keyspace, now):
            self._send_group(keyspace, now)
        elif len(group.steps) == 1:
            self._lingering[keyspace.replica.keyspace] = keyspace
            core.counters.groups_held += 1

    def _is_due(self, keyspace: Keyspace, now: m.Now) -> bool:
        sent_ms = keyspace.group.sent_ms
        return sent_ms is None or now.monotonic_ms - sent_ms >= self._core.options.linger_ms

    def _send_group(self, keyspace: Keyspace, now: m.Now) -> None:
        """Send the steps that are held, if there are any."""
        if not keyspace.group.steps:
            return
        core, options = self._core, self._core.options
        steps = keyspace.group.take(now.monotonic_ms)
        self._lingering.pop(keyspace.replica.keyspace, None)
        core.counters.groups_sent += 1
        trees = self._trees(keyspace, now)
        if not self._has_children(keyspace, trees):
            return  # nobody is sent it: a message of it would be made for nothing
        first, last, joined = steps[0], steps[-1], join(steps)
        batch = m.Batch(
            keyspace.replica.keyspace,
            options.node,
            options.region,
            last.identity.writer,
            last.identity.nonce,
            last.stamp,
            first.writer_prev,
            len(joined.claims.shards),
            joined.claims,
            joined.columns,
            last.published_ns,
            options.machine,
            trees=trees.count,
            steps=joined.steps,
        )
        for message in split_step(batch, joined.shard_of, wire.BATCH_BYTES_MAX):
            self._forward(keyspace, wire.seal(message), 0, trees, now)

    def _has_children(self, keyspace: Keyspace, trees: Trees) -> bool:
        """Whether a batch of ours goes to anybody, down whichever tree."""
        options = self._core.options
        if not options.sync.push:
            return False
        return any(_children(trees, keyspace, options.node, tree) for tree in range(trees.count))

    def send_held(self, now: m.Now) -> None:
        """Send every step that has waited for others as long as it may."""
        for keyspace in [keyspace for keyspace in self._lingering.values() if self._is_due(keyspace, now)]:
            self._send_group(keyspace, now)

    def send_all_held(self, now: m.Now) -> None:
        """Send now what is held."""
        for keyspace in list(self._lingering.values()):
            self._send_group(keyspace, now)

    def _drop_held(self, keyspace: Keyspace) -> None:
        """Nothing of our writer leaves any more; what was held is stored, and whoever lacks it pulls it."""
        self._lingering.pop(keyspace.replica.keyspace, None)
        keyspace.group = Group()

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped, and with it the steps that waited for others."""
        self._lingering.pop(keyspace, None)
        self.adoption.forget_keyspace(keyspace)
        self.state_mode.forget_keyspace(keyspace)

    def send_awaited(self, family: int, stamp: int, now: m.Now) -> None:
        """Somebody waits for a step: where it is held, it leaves now."""
        for keyspace in list(self._lingering.values()):
            if keyspace.replica.place.family == family and keyspace.group.steps[0].stamp <= stamp:
                self._send_group(keyspace, now)

    def next_ms(self) -> int | None:
        """When the first of the steps that wait for others must leave."""
        if not self._lingering:
            return None
        sent = [keyspace.group.sent_ms for keyspace in self._lingering.values()]
        oldest = min([moment for moment in sent if moment is not None], default=None)
        return None if oldest is None else oldest + self._core.options.linger_ms

    def beat(self, now: m.Now) -> None:
        """Let every idle writer of ours say that nothing came since, in each partition on its own."""
        for keyspace in self._core.keyspaces.values():
            identity = keyspace.replica.writer
            if identity is None or now.monotonic_ms - keyspace.last_batch_ms < IDLE_BEAT_MS:
                continue
            writer_prev = int(keyspace.replica.frontier[identity.writer])
            if not writer_prev and not self._core.last_stamp(keyspace.replica.place.family, identity.writer):
                continue  # it has not written yet: nobody waits for it
            stamp = self._core.clock.mint(now.unix_ms, identity.writer)
            none = np.empty(0, np.uint32), np.empty(0, np.uint64), np.empty(0, np.uint16), np.empty(0, np.uint16)
            keyspace.knowledge.learn_step(stamp, writer_prev, 0, *none)
            keyspace.last_batch_ms = now.monotonic_ms
            options = self._core.options
            self._send_group(keyspace, now)  # it follows what is held
            empty = m.ShardClaims(*none)
            batch = m.Batch(
                keyspace.replica.keyspace,
                options.node,
                options.region,
                identity.writer,
                identity.nonce,
                stamp,
                writer_prev,
                0,
                empty,
                (),
            )
            self._forward(keyspace, wire.seal(batch), 0, self._trees(keyspace, now), now)

    def open_links(self, now: m.Now) -> None:
        """Have links to all that we would send the next batch of a writer to: its first one should find them connected."""
        core = self._core
        for family, keyspaces in core.families.items():
            origins = [core.options.node] if core.options.role == "train" else []
            origins += core.membership.writing(family)
            for keyspace in keyspaces:
                trees = self._trees(keyspace, now)
                for origin, tree in itertools.product(origins, range(trees.count)):
                    for node in _children(trees, keyspace, origin, tree):
                        core.link(node)

    def receive(self, link: Link, envelope: m.Envelope, batch: m.Batch, now: m.Now) -> bool:
        """Check, forward, and schedule the apply of a batch (R17).

        Returns:
            False when there is nothing to apply: a repeat, or a keyspace or table not known yet.

        Raises:
            RemoteProtocolError: the batch is wrong; nothing is forwarded or applied.
        """
        core = self._core
        core.counters.batches_received += 1
        core.counters.steps_received += batch.step_count
        keyspace = core.keyspaces.get(batch.keyspace)
        if keyspace is None:
            core.counters.batches_unknown += 1
            return False
        try:
            check_batch(keyspace, batch, now)
        except UnknownTableError:
            core.counters.batches_unknown += 1
            return False
        family = keyspace.replica.place.family
        if core.writers.is_retired(family, batch.writer, batch.nonce):
            core.counters.retired_refused += 1
            return False
        fence = core.fence(family)
        if fence is not None and not fence.lets_pass(batch.writer, batch.nonce):
            core.counters.fenced_refused += 1
            return False
        if not keyspace.knowledge.has_room_for((batch.writer,)):
            core.note_no_room(keyspace, batch.writer)
            return False
        known = core.writers.nonce_of(family, batch.writer) == batch.nonce
        if not known and not core.same_writers(link.node, family, [batch.writer], [batch.nonce]):
            return False  # whoever sent it on may not know
        core.membership.note_writer(batch.origin, family, batch.writer, batch.nonce, batch.stamp)
        claims = batch.claims
        first = (int(claims.shards[0]), int(claims.part[0])) if len(claims.shards) else (-1, 0)
        seen = (batch.keyspace, batch.stamp, *first)
        if seen in self._seen:
            core.counters.batches_repeated += 1
            core.emit(m.Unwanted())
            return False
        while len(self._seen) >= SEEN_MAX:
            del self._seen[next(iter(self._seen))]
        self._seen[seen] = None
        trees = self._trees(keyspace, now)
        if envelope.hops >= trees.hops_max:
            core.counters.batches_circling += 1
        else:
            self._forward(keyspace, batch, envelope.hops + 1, trees, now)
        core.emit(m.Continue(m.BatchReady(link.boot, envelope, batch)))
        return True

    def apply(self, batch: m.Batch, peer: str) -> None:
        """Write a checked batch's rows, then merge its claims."""
        core = self._core
        keyspace = core.keyspaces[batch.keyspace]
        core.clock.observe(batch.stamp)
        applied = keyspace.replica.apply(batch.columns, batch.stamp) if batch.columns else None
        if applied is not None:
            note_rows(core, keyspace, batch.columns, applied)
        whole = learn_batch(keyspace.knowledge, batch)
        if not whole:
            keyspace.strays_possible = True
            keyspace.gap_origin = batch.origin
            waits = not keyspace.gap_peer or keyspace.knowledge.claims_wait(batch.writer, batch.claims.shards)
            if waits and not keyspace.gap_upstream:
                # The tree it came down has a hole above us, or its sender has one. A sender outside of the region is above all
                # of it; where each asked another within, they might wait for each other.
                keyspace.gap_peer, keyspace.gap_upstream = peer, self._is_upstream(peer, batch.origin)
            keyspace.gap_trees, keyspace.gap_trees_all = keyspace.gap_trees | 1 << batch.tree, (1 << batch.trees) - 1
        if applied is not None:
            core.counters.rows_written += applied.written
            core.counters.rows_stale += applied.stale
            core.counters.rows_ghosts += applied.ghosts
            self._note_applied(batch, applied.written)

    def _note_applied(self, batch: m.Batch, written: int) -> None:
        """Of each step by itself: its delay counts from its own `publish`."""
        emit, number, region = self._core.emit, batch.keyspace, batch.origin_region
        if batch.steps is None:
            significant = min(written, significant_rows(batch.columns))
            emit(m.BatchApplied(number, region, batch.stamp, batch.published_ns, batch.machine, written, significant))
            return
        steps, of_each = batch.steps, significant_by_step(batch.columns, batch.steps.stamps)
        each = zip(steps.stamps.tolist(), steps.published_ns.tolist(), steps.rows.tolist(), of_each, strict=True)
        for stamp, published_ns, rows, significant in each:
            if rows:  # it may have some on other trees only
                emit(m.BatchApplied(number, region, stamp, published_ns, batch.machine, rows, significant))

    def _is_upstream(self, peer: m.NodeId, origin: m.NodeId) -> bool:
        link = self._core.links.get(peer)
        return peer == origin or (link is not None and link.region != self._core.options.region)

    def _forward(self, keyspace: Keyspace, batch: m.Batch, hops: int, trees: Trees, now: m.Now) -> None:
        core = self._core
        if not core.options.sync.push:
            return
        one = WaitingBatch(batch, hops)
        for node in self._receivers(trees, keyspace, batch, hops, now):
            link = core.link(node)
            # Who has just come and speaks version 1 cannot read a group that was on its way: it sees a gap and pulls.
            if link is None or (batch.steps is not None and link.version < wire.GROUPS_SINCE):
                core.counters.batches_skipped += 1
                continue
            if self.state_mode.active and self.state_mode.takes(link, keyspace):
                continue  # its rows are due there once they are applied
            slow = link.passes_in_ms(batch.payload_bytes) > PASS_MS_MAX
            if slow and self._enter(link, keyspace, one, "a batch would take too long"):
                continue
            if link.waiting and link.is_late:
                self.pump(link)  # there may be room for one that would show a loss
            if not link.waiting and link.admits_batch(batch.payload_bytes):
                self._send(link, one)
            elif not self._let_wait(link, keyspace, one):
                core.counters.batches_skipped += 1
                link.traffic.batches_skipped += 1

    def _let_wait(self, link: Link, keyspace: Keyspace, one: WaitingBatch) -> bool:
        """A batch that finds no credit waits for a moment; where the moment lasts, its rows are due (`p2p.busy.backlog`)."""
        core, line = self._core, link.waiting
        knows = core.options.outbox == STATE and link.version >= STATE_SINCE
        if not knows:
            credits_max = inf if core.options.outbox == FIFO else WAITING_CREDITS_MAX
            credit = links.CREDIT_BYTES_MAX if link.bucket is None else link.credit_bytes
            return line.add(one, credits_max * credit, core.now_ms)
        short_ms = SHORT_MS_MAX + link.returns_ms if link.bucket is None else SHORT_RATED_MS_MAX
        # Where nothing says that the path is full, what is in flight may be lost: a line that waits on is sent or dropped then.
        overdue = link.is_full and line.is_overdue(core.now_ms, short_ms)
        if not overdue and line.add(one, SHORT_BYTES_MAX, core.now_ms):
            return True
        return self._enter(link, keyspace, one, "a batch found no credit")

    def _enter(self, link: Link, keyspace: Keyspace, one: WaitingBatch, why: str) -> bool:
        """Go into state mode instead of sending a batch; one that we only forward is applied after that, and due then."""
        if not self.state_mode.enter(link, keyspace, why):
            return False
        if one.hops == 0:
            self.state_mode.note(link, keyspace, one.batch)
        return True

    def pump(self, link: Link) -> None:
        """Send what waits for credit, as far as there is some."""
        while link.waiting and link.has_credit():
            self._send(link, link.waiting.take())

    def drop_waiting(self, link: Link) -> None:
        """A session ended: what waited for its credit is dropped, like what was in flight."""
        dropped = link.waiting.clear()
        self._core.counters.batches_skipped += dropped
        link.traffic.batches_skipped += dropped

    def _send(self, link: Link, one: WaitingBatch) -> None:
        batch = one.batch
        claim_bytes = CLAIM_BYTES * len(batch.claims.shards)
        self._core.emit(m.Send(link.address, link.next_envelope(batch.payload_bytes, one.hops, claim_bytes), batch))
        self._core.counters.batches_forwarded += 1
        link.traffic.rows_out += batch.row_count
        link.traffic.bytes_out += batch.payload_bytes

    def _receivers(self, trees: Trees, keyspace: Keyspace, batch: m.Batch, hops: int, now: m.Now) -> Sequence[m.NodeId]:
        """Our children, but those that the origin's children feed for it, when it is busy."""
        children = _children(trees, keyspace, batch.origin, batch.tree)
        if hops == 0:
            return self.adoption.fed_by_us(batch, children, now)
        if hops == 1:
            taken = self.adoption.taken(batch.keyspace, batch.origin, batch.tree, now.monotonic_ms)
            return (*children, *(node for node in taken if node not in children)) if taken else children
        return children

    def _fed_in(self, keyspace: Keyspace, origin: m.NodeId, tree: int) -> Sequence[m.NodeId]:
        """To whom batches of an origin go from us in a tree, as things are now."""
        core = self._core
        children = _children(core.membership.trees(core.now_ms, keyspace.replica.place), keyspace, origin, tree)
        number = keyspace.replica.keyspace
        if origin == core.options.node:
            return self.adoption.kept(number, tree, children)
        taken = self.adoption.taken(number, origin, tree, core.now_ms)
        return (*children, *(node for node in taken if node not in children)) if taken else children

    def _trees(self, keyspace: Keyspace, now: m.Now) -> Trees:
        return self._core.membership.trees(now.monotonic_ms, keyspace.replica.place)


def _children(trees: Trees, keyspace: Keyspace, origin: m.NodeId, tree: int) -> tuple[m.NodeId, ...]:
    """Where we send a batch of `origin` that goes down this tree."""
    # Partitions of a small cluster, which has one tree, differ in who leads.
    return trees.children(origin, (tree + keyspace.replica.place.partition) % TREES_MAX)


def _parts_of(family: Sequence[Keyspace], columns: tuple[RowColumns, ...]) -> list[tuple[Keyspace, tuple[RowColumns, ...]]]:
    """What a step changes in each of the keyspaces that it touches.

    Raises:
        LocalProtocolError: some of it belongs to a partition that is not held here (R22).
    """
    replica = family[0].replica
    partitions = replica.place.partitions
    if partitions == 1:
        return [(family[0], columns)]
    held = {keyspace.replica.place.partition: keyspace for keyspace in family}
    parts = divide(columns, [replica.partition_of(section.keys) for section in columns], partitions)
    missing = [partition for partition in parts if partition not in held]
    if missing:
        raise LocalProtocolError(
            f"rows of partitions {missing}, of which this node holds {sorted(held)}: a node holds what it writes; publish them "
            "at a node that holds them"
        )
    return [(held[partition], part) for partition, part in parts.items()]


def check_batch(keyspace: Keyspace, batch: m.Batch, now: m.Now) -> None:
    """Refuse a batch that does not fit this keyspace, before it is forwarded or touches anything (R14, R17).

    Raises:
        RemoteProtocolError: with what does not fit.
    """
    check_not_ahead(batch.stamp, now.unix_ms)
    replica, shards = keyspace.replica, batch.claims.shards
    if len(shards) and int(shards[-1]) >= replica.shards:
        raise RemoteProtocolError(f"claim for shard {int(shards[-1])}, the keyspace has {replica.shards}")
    if batch.origin == "" or batch.shards_touched > replica.shards:
        raise RemoteProtocolError("a batch of nobody, or of too many shards")
    replica.check(batch.columns, shards)


def learn_batch(knowledge: Knowledge, batch: m.Batch) -> bool:
    """Take the claims of a batch, whose rows are all applied.

    Returns:
        Whether all of its steps, and everything before them, is known now (`Knowledge.learn_step`).
    """
    claims, steps = batch.claims, batch.steps
    return knowledge.learn_step(
        batch.stamp,
        batch.writer_prev,
        batch.shards_touched,
        claims.shards,
        claims.prev,
        claims.part,
        claims.parts,
        claims.until,
        None if steps is None else steps.stamps,
    )


def _touched(shards: int, shard_of: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    mask = np.zeros(shards, np.bool_)
    for touched in shard_of:
        mask[touched] = True
    return np.flatnonzero(mask)


def _check_room(family: Sequence[Keyspace]) -> None:
    """Refuse to begin as one writer more where a vector has no room for one.

    Raises:
        LocalProtocolError: naming the remedies.
    """
    for keyspace in family:
        if keyspace.knowledge.room < 1:
            raise LocalProtocolError(
                f"this model has {keyspace.knowledge.shards} shards, and as many writers as fit in a message with them: expel "
                "nodes that are gone, so that their writers are retired (`ekko expel`), or begin a new model with fewer shards"
            )
