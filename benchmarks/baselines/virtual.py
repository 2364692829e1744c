"""What else could carry the updates of the ablation, as machines on the same virtual network, store, codec and costs.

    primary_push  the trainer sends every step to every replica, in order, and is acknowledged: the paper's improved Adam, whose
                  broadcasts do not wait for one another. A step counts as visible where it was applied; a second round of
                  messages, which two-phase commit would need, is left out, to its advantage
    log_tree      the comparison that the paper left out: each tree of `p2p.members.trees` is a log, which every node keeps and
                  ships to its children in order
    checkpoint    the whole model to every region's leader, and from there to the others of the region; begun when the trace
                  has just ended, to its advantage: with one after the other an update would wait for half a broadcast first

Logs have no end and lose nothing: what a child has no credit for waits in its parent's log. Nothing is coalesced.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from benchmarks.wan.testbed import TRAINER, nodes
from p2p import messages as m
from p2p import wire
from p2p.identity.ledger import Ledger
from p2p.link import links
from p2p.machine import Machine, MachineOptions
from p2p.members.trees import TREES_MAX, Holder, Trees
from p2p.replica import Host, Replica, RowColumns
from p2p.stamps import WRITERS_MAX, StampClock
from sim_cluster.node import address_of

NEVER_MS = 1 << 50
# A checkpoint begins when nothing was published for so long.
QUIET_MS = 1_000
# Rows of one message of a checkpoint, and such messages on their way to one node: enough to keep every link busy.
CHUNK_ROWS = 256
CHUNKS_IN_FLIGHT = 4

_HOLDERS = [Holder(region, name) for name, region in nodes()]
_NUMBERS = {name: number for number, (name, _) in enumerate(nodes(), 1)}


@dataclass(slots=True)
class _Child:
    """One stream to one node: how much of a log it was sent, and what it has not acknowledged."""

    node: str
    next: int = 0  # of the log
    acknowledged: int = 0
    bytes_in_flight: int = 0


@dataclass(slots=True)
class _Log:
    """All that a node has had of one stream, and whom it passes it on to."""

    children: list[_Child]
    entries: list[m.Message] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


class LogMachine:
    """Ships every message to its children, in order, as their credit allows (`p2p.runtime.Handler`)."""

    def __init__(self, options: MachineOptions, host: Host, children: Sequence[Sequence[str]]) -> None:
        self.options = options
        self.deadline_ms = NEVER_MS
        self._host = host
        self._clock = StampClock()
        self._logs = [_Log([_Child(node) for node in tree]) for tree in children]
        self._effects: list[m.Effect] = []

    @property
    def replica(self) -> Replica:
        return next(iter(self._host.replicas.values()))

    def handle(self, event: m.Event, now: m.Now) -> list[m.Effect]:
        """Advance by one event."""
        self._effects = []
        match event:
            case m.PublishRequested():
                self._publish(event, now)
            case m.MessageReceived(envelope, m.Batch() as batch):
                self._append(envelope.session - 1, batch)  # first forward, then apply, as the product does
                self._effects.append(m.Continue(m.BatchReady(envelope.sender_boot, envelope, batch)))
            case m.BatchReady(_, envelope, batch):
                self.replica.apply(batch.columns, batch.stamp)
                self._acknowledge(envelope)
            case m.MessageReceived(envelope, m.Ack(session, sequence)):
                self._on_ack(session - 1, nodes()[envelope.sender_boot - 1][0], sequence)
            case _:
                self._on_other(event)
        return self._effects

    def _on_other(self, event: m.Event) -> None:
        pass

    def _publish(self, request: m.PublishRequested, now: m.Now) -> None:
        replica = self.replica
        assert replica.writer is not None
        writer = replica.writer.writer
        stamp = self._clock.mint(now.unix_ms, writer)
        replica.apply(request.columns, stamp)
        self._effects.append(m.Published(request.request, stamp))
        (section,) = request.columns
        tree_of = replica.shards_of(section.keys) % len(self._logs)
        for tree in np.unique(tree_of).tolist():
            chosen = tree_of == tree
            one, none = np.ones(1, np.uint16), np.zeros(1, np.uint16)
            claims = m.ShardClaims(np.array([tree], np.uint32), np.zeros(1, np.uint64), none, one)
            columns = (RowColumns(section.table, section.keys[chosen], section.rows[chosen]),)
            batch = m.Batch(
                replica.keyspace,
                self.options.node,
                self.options.region,
                writer,
                replica.writer.nonce,
                stamp,
                0,
                1,
                claims,
                columns,
                trees=len(self._logs),
            )
            self._append(tree, wire.seal(batch))

    def _append(self, tree: int, message: m.Batch | m.PullReply) -> None:
        log = self._logs[tree]
        log.entries.append(message)
        log.sizes.append(message.payload_bytes)
        for child in log.children:
            self._ship(tree, child)

    def _acknowledge(self, envelope: m.Envelope) -> None:
        sender = nodes()[envelope.sender_boot - 1][0]
        own = m.Envelope(_NUMBERS[self.options.node], envelope.sender_boot)
        self._effects.append(m.Send(address_of(sender), own, m.Ack(envelope.session, envelope.sequence)))

    def _on_ack(self, tree: int, node: str, sequence: int) -> None:
        log = self._logs[tree]
        child = next(child for child in log.children if child.node == node)
        while child.acknowledged < sequence:
            child.bytes_in_flight -= log.sizes[child.acknowledged]
            child.acknowledged += 1
        self._ship(tree, child)

    def _may_send(self, child: _Child) -> bool:
        return child.bytes_in_flight < links.CREDIT_BYTES_MAX

    def _ship(self, tree: int, child: _Child) -> None:
        log = self._logs[tree]
        while child.next < len(log.entries) and self._may_send(child):
            child.bytes_in_flight += log.sizes[child.next]
            message = log.entries[child.next]
            child.next += 1
            envelope = m.Envelope(_NUMBERS[self.options.node], _NUMBERS[child.node], tree + 1, child.next)
            self._effects.append(m.Send(address_of(child.node), envelope, message))


class CheckpointMachine(LogMachine):
    """Publishes to itself; when nothing more comes, ships everything it holds."""

    def _publish(self, request: m.PublishRequested, now: m.Now) -> None:
        replica = self.replica
        assert replica.writer is not None
        stamp = self._clock.mint(now.unix_ms, replica.writer.writer)
        replica.apply(request.columns, stamp)
        self._effects.append(m.Published(request.request, stamp))
        self.deadline_ms = now.monotonic_ms + QUIET_MS

    def _on_other(self, event: m.Event) -> None:
        match event:
            case m.TimerFired() if self.options.node == TRAINER:
                self.deadline_ms = NEVER_MS
                self._begin()
            case m.MessageReceived(envelope, m.PullReply() as chunk):
                self._append(envelope.session - 1, chunk)
                self.replica.apply(chunk.columns, 0)
                self._acknowledge(envelope)

    def _begin(self) -> None:
        replica = self.replica
        (everything,) = replica.scan_since(np.zeros((replica.shards, WRITERS_MAX), np.uint64))
        nothing = np.empty(0, np.uint16), np.empty((replica.shards, 0), np.uint64), np.empty(0, np.uint64)
        for number, begin in enumerate(range(0, len(everything.slots), CHUNK_ROWS)):
            columns = (replica.read(everything.table, everything.slots[begin : begin + CHUNK_ROWS]),)
            self._append(0, m.PullReply(replica.keyspace, 1, number, False, columns, *nothing))

    def _may_send(self, child: _Child) -> bool:
        return child.next - child.acknowledged < CHUNKS_IN_FLIGHT


def primary_push(options: MachineOptions, host: Host, _ledger: Ledger, _rng: random.Random) -> Machine:
    """The trainer sends to everybody."""
    everybody = [name for name, _ in nodes() if name != TRAINER]
    return _as_machine(LogMachine(options, host, [everybody if options.node == TRAINER else []]))


def log_tree(options: MachineOptions, host: Host, _ledger: Ledger, _rng: random.Random) -> Machine:
    """Each node ships to its children in the product's own trees."""
    trees = Trees(Holder(options.region, options.node), _HOLDERS)
    return _as_machine(LogMachine(options, host, [trees.children(TRAINER, tree) for tree in range(TREES_MAX)]))


def checkpoint(options: MachineOptions, host: Host, _ledger: Ledger, _rng: random.Random) -> Machine:
    """One tree."""
    trees = Trees(Holder(options.region, options.node), _HOLDERS)
    return _as_machine(CheckpointMachine(options, host, [trees.children(TRAINER, 0)]))


def _as_machine(machine: LogMachine) -> Machine:
    """All that a virtual cluster asks of a machine while it runs is `handle` and `deadline_ms`."""
    return cast(Machine, machine)
