"""Many nodes in virtual time: the daemon's own machine and the real store, on a network made of a seed.

Messages are encoded and decoded on their way, so the codec is exercised too; receivers of one message share the work and what
came of it. Time is a number that jumps to the next event; one seed gives one trace, whatever `PYTHONHASHSEED`.

Work takes no time, unless the cluster has a cost model (`CpuModel`): then a node does one thing after the other, what comes
meanwhile waits, and what an event sets off leaves when the work is done. Those accounts are exact; the machine's clock, as in
the daemon, ticks in milliseconds.
"""

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import xxhash

from ekko.codec import encode
from ekko.model import SHARDS_MAX, ModelSpec, TableSpec
from ekko.store import Store
from p2p import messages as m
from p2p import wire
from p2p.core import EXPEL_AFTER_MS
from p2p.errors import RemoteProtocolError
from p2p.ledger import Ledger
from p2p.machine import Machine, MachineOptions
from p2p.replica import Host, RowColumns
from p2p.stamps import AHEAD_MS_MAX, EPOCH_MS, WRITERS_MAX
from p2p.sync import PUSH, SyncOptions
from p2p.versions import PROTOCOL_VERSION
from sim_cluster.kills import Fuse, KilledError, lay
from sim_cluster.network import LinkOptions, Network, NetworkOptions, pair_of

__all__ = ["LinkOptions", "NetworkOptions", "VirtualCluster", "VirtualNode", "Write", "address_of", "name_of", "pair_of"]

# A run that handles more events than this at one virtual instant circles.
EVENTS_PER_INSTANT_MAX = 1_000_000
# Rows for which a table has room at first: few, so that growing is exercised too.
CAPACITY_ROWS = 64
# Batches whose frames are kept for their next receivers: one waits a hop until it is forwarded. Dropping costs speed.
SHARED_MAX = 256
_CARRIES_ROWS = (m.Batch, m.PullReply, m.ShardsReply)
# Every so many batches and pull chunks, the receiver's state is compared before and after when it refuses one (invariant 8).
AUDIT_EVERY = 16
# What waits for a busy node, before more is lost as at a socket that nobody reads.
WAITING_MAX = 1 << 16

MachineFactory = Callable[[MachineOptions, Host, Ledger, random.Random], Machine]


class CpuModel(Protocol):
    """What work costs. One event is handled at a time, between `begin` and the last effect."""

    def host(self, node: str, store: Store) -> Host:
        """The node's store, as its machine sees it; what is asked of it is charged to the event at hand."""

    def begin(self, node: str, start_ms: float) -> None:
        """A node whose CPU is free begins to work at this moment."""

    def handling(self, event: m.Event) -> None:
        """Charge for an event, besides what it asks of the store."""

    def sending(self, node: str, message: m.Message) -> None:
        """Charge for a message on its way out."""

    @property
    def ends_ms(self) -> float:
        """When the work so far will be done."""

    def bytes_of(self, message: m.Message, frames: Sequence[bytes]) -> float:
        """What a message is to count as on the links."""


@dataclass(slots=True)
class MemoryLedger:
    """A ledger that survives a crash of its node, in memory."""

    record: bytes | None = None
    fuse: Fuse | None = None  # of the process that writes it

    def load(self) -> bytes | None:
        return self.record

    def save(self, record: bytes) -> None:
        if self.fuse is not None:
            self.fuse.burn()
        self.record = record


@dataclass(slots=True, eq=False)
class VirtualNode:
    """One node: its machine and what outlives it."""

    name: str
    region: str
    role: str
    seeds: tuple[str, ...]
    model: ModelSpec
    hold: Mapping[str, Sequence[int]] = field(default_factory=dict)  # partitions of a model; models not named: all of them
    protocol_version: int = PROTOCOL_VERSION  # of its next life
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    store: Store = field(default_factory=Store.anonymous)
    machine: Machine | None = None
    replies: dict[int, m.Reply] = field(default_factory=dict)
    notes: list[m.Note] = field(default_factory=list)  # what a person must see
    rejected: list[str] = field(default_factory=list)
    fatal: str = ""
    clock_ms: int = 0  # how far its wall clock is ahead of the cluster's
    paused: bool = False
    held: list[Callable[[], None]] = field(default_factory=list)  # what happened to it while it was paused
    busy_until_ms: float = 0.0  # with a cost model: when its CPU is free
    waiting: deque[m.Event] = field(default_factory=deque)  # events that came while it was busy
    waiting_local: deque[m.Event] = field(default_factory=deque)  # of its own machine's processes; they go first
    queued: list[Callable[[], None]] = field(default_factory=list)  # in its peers' sockets, while it is down
    fuse: Fuse | None = None  # of a process that is to be killed in the middle of something
    lives: int = 0  # how many processes it has had
    losses: int = 0  # how often it lost its memory


@dataclass(frozen=True, slots=True)
class Write:
    """One acknowledged update, for the checkers."""

    table: str
    key: int
    stamp: int
    deleted: bool
    value: float = 0.0
    model: str = ""


@dataclass(slots=True)
class Meter:
    """What batches cost and how long they took; filled when a cluster has one."""

    published_ms: dict[int, int] = field(default_factory=dict)  # stamp -> when
    delays_ms: list[int] = field(default_factory=list)  # of every batch applied at another node
    copies: int = 0  # batches with rows that were received, repeats included
    rows: int = 0  # received in batches and in answers to pulls, repeats included
    # (region, stamp, shard, part) -> times; shards of different keyspaces are different shards
    into_region: dict[tuple[str, int, int, int], int] = field(default_factory=dict)
    entries: dict[tuple[str, int], list[str]] = field(default_factory=dict)  # (region, shard) -> nodes at which it came in
    bytes_into: dict[str, int] = field(default_factory=dict)  # payload of batches that crossed into a region
    bytes_sent: dict[str, int] = field(default_factory=dict)  # payload of batches and answers sent, by node
    bytes_all: float = 0.0  # of all messages sent, encoded
    hops_max: int = 0


@dataclass(slots=True, eq=False)
class _Shared:
    """A message on its way to one or more receivers: encoded once, decoded once."""

    message: m.Message  # kept, so that its id stays its own
    envelope: m.Envelope
    frames: list[bytes]
    size: float
    digest: int
    decoded: m.Message | None = None


# What is due is an object without a reference to itself, which a closure that may wait again would have: the queue holds a
# hundred thousand of them, and the collector of cycles would look at all of them over and over.
@dataclass(slots=True, eq=False)
class _Delivery:
    """A message that arrives."""

    cluster: "VirtualCluster"
    sender: VirtualNode
    target: VirtualNode
    envelope: m.Envelope
    shared: _Shared
    machine: Machine | None  # the process it was sent to; None: it waits for the next one
    sending: Machine | None  # the process that sent it
    corrupt: bool

    def __call__(self) -> None:
        self.cluster.deliver(self)


@dataclass(slots=True, eq=False)
class _Timer:
    """A node's timer that fires."""

    cluster: "VirtualCluster"
    node: VirtualNode
    machine: Machine
    deadline_ms: int

    def __call__(self) -> None:
        self.cluster.fire(self)


class VirtualCluster:
    """Nodes, a network between them, and the history of what was acknowledged.

    Args:
        seed: everything random derives from it.
        options: the network's faults.
        model: the model that all nodes carry.
        more_models: others that they carry too.
        sync: by which protocol they keep equal.
        cpu: what work costs; None: nothing.
        make_machine: what runs on the nodes.
        capacity_rows: of each table, at first; a small one has tables grow under way.
    """

    def __init__(
        self,
        seed: int,
        options: NetworkOptions | None = None,
        model: ModelSpec | None = None,
        more_models: Sequence[ModelSpec] = (),
        sync: SyncOptions = PUSH,
        cpu: CpuModel | None = None,
        make_machine: MachineFactory = Machine,
        capacity_rows: int = CAPACITY_ROWS,
    ) -> None:
        self.seed = seed
        self._capacity_rows = capacity_rows
        self.cpu = cpu
        self.options = options or NetworkOptions()
        self.sync = sync
        self.model = model or ModelSpec("ctr", 8, {"item": TableSpec("item", 4), "user": TableSpec("user", 2)})
        self.models = {spec.name: spec for spec in (self.model, *more_models)}
        self.now_ms = 0
        self.nodes: dict[str, VirtualNode] = {}
        self.history: list[Write] = []
        self.delivered = 0
        self.violations: list[str] = []  # of what is checked on the way (invariant 8)
        self.meter: Meter | None = None
        self.cut: set[tuple[str, str]] = set()  # one-way: nothing passes from the first to the second
        self._make_machine = make_machine
        self._rng = random.Random(seed)
        self.network = Network(self._rng)
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._submitted = 0
        self._requests = 0
        self._audited = 0
        self.expel_after_ms = EXPEL_AFTER_MS  # of nodes that are started from now on
        self._clocks_apart = False  # so far that some refuse what others write
        self._timer_ms: dict[str, int] = {}
        self._shared: dict[tuple[int, int], _Shared] = {}  # batches, by id of the message and protocol version
        self._shared_now: dict[tuple[int, int], _Shared] = {}  # other messages of the event at hand
        self._trace = hashlib.sha256()

    @property
    def trace(self) -> str:
        """Hash of everything delivered so far."""
        return self._trace.hexdigest()

    @property
    def drained_ms(self) -> int:
        """When everything that is on its way now will have come."""
        return self.network.latest_ms

    # --- nodes

    def add(
        self,
        name: str,
        region: str,
        role: str = "serve",
        seeds: Sequence[str] = (),
        protocol_version: int = PROTOCOL_VERSION,
        store: Store | None = None,
        hold: Mapping[str, Sequence[int]] | None = None,
    ) -> VirtualNode:
        """Start a node; `seeds` are names of nodes, `store` is what it finds in its memory, `hold` its partitions of models."""
        addresses = tuple(address_of(seed) for seed in seeds)
        node = VirtualNode(name, region, role, addresses, self.model, hold or {}, protocol_version)
        node.store = store or node.store
        self.nodes[name] = node
        self._boot(node)
        return node

    def crash(self, name: str) -> None:
        """Kill a node's process; its memory stays for `restart`."""
        node = self.nodes[name]
        node.machine = None
        node.paused = False
        node.fuse = node.ledger.fuse = None
        node.held.clear()
        node.waiting.clear()
        node.waiting_local.clear()
        node.busy_until_ms = 0.0
        self._timer_ms.pop(name, None)

    def kill_within(self, name: str, steps: int) -> None:
        """Kill a node's process after so many steps (`sim_cluster.kills`), in the middle of whatever it does then."""
        node = self.nodes[name]
        node.fuse = node.ledger.fuse = Fuse(steps)
        lay(node.fuse, node.store)

    def leave(self, name: str) -> None:
        """Stop a node's process as SIGTERM does: it says goodbye first."""
        node = self.nodes[name]
        if node.machine is not None:
            self._feed(node, node.machine, m.Leaving())
        self.crash(name)

    def restart(self, name: str, keep_state: bool = True) -> None:
        """Start a killed node again, with its memory or, as after a reboot, without; its disk (ledger) stays.

        It holds what its `hold` says by now.
        """
        node = self.nodes[name]
        before = node.store
        node.store = before.reopened().narrowed(node.hold) if keep_state else Store.anonymous()
        if not keep_state or any(model.hold != before.models[name].hold for name, model in node.store.models.items()):
            node.losses += 1
            # What only this node held is gone; no protocol can promise it (R21: memory, not disk).
            held = [self._stamps_held(other) for other in self.nodes.values()]
            self.history = [w for w in self.history if any(one.get(self._key_of(w), 0) >= w.stamp for one in held)]
        self._boot(node)

    def pause(self, name: str) -> None:
        """SIGSTOP: nothing happens on the node until `resume`; what comes for it is held back."""
        self.nodes[name].paused = True

    def resume(self, name: str) -> None:
        """SIGCONT: what was held back happens now, in its order."""
        node = self.nodes[name]
        node.paused = False
        held, node.held = node.held, []
        for action in held:
            self._at(self.now_ms, action)

    def shift_clock(self, name: str, by_ms: int) -> None:
        """Move a node's wall clock; its monotonic one goes on."""
        self.nodes[name].clock_ms += by_ms
        clocks = [node.clock_ms for node in self.nodes.values()]
        self._clocks_apart = max(clocks) - min(clocks) >= AHEAD_MS_MAX

    def _key_of(self, write: Write) -> tuple[str, int, int]:
        model = write.model or self.model.name
        return model, self.models[model].tables[write.table].id, write.key

    @staticmethod
    def _stamps_held(node: VirtualNode) -> dict[tuple[str, int, int], int]:
        """(model, table, key) -> stamp of every row version a node holds, tombstones too."""
        held: dict[tuple[str, int, int], int] = {}
        for name, replica in node.store.models.items():
            for selection in replica.scan_since(np.zeros((replica.shards, WRITERS_MAX), np.uint64)):
                columns = replica.read(selection.table, selection.slots)
                assert columns.stamps is not None
                keys = ((name, columns.table, key) for key in columns.keys.tolist())
                held.update(zip(keys, columns.stamps.tolist(), strict=True))
        return held

    def _boot(self, node: VirtualNode) -> None:
        for model in (node.model, *(spec for spec in self.models.values() if spec is not self.model)):
            node.store.add_model(model, capacity_rows=self._capacity_rows, hold=node.hold.get(model.name))
        options = MachineOptions(
            node.name,
            self._rng.getrandbits(64) | 1,
            self.now_of(node).unix_ms,
            node.region,
            node.role,
            node.seeds,
            protocol_version=node.protocol_version,
            expel_after_ms=self.expel_after_ms,
            sync=self.sync,
        )
        node.lives += 1
        host = node.store if self.cpu is None else self.cpu.host(node.name, node.store)
        node.machine = self._make_machine(options, host, node.ledger, random.Random(self._rng.random()))
        self._timer_ms.pop(node.name, None)
        self._feed(node, node.machine, m.Started(address_of(node.name)))
        queued, node.queued = node.queued, []
        for deliver in queued:
            self._at(self.now_ms + 1, deliver)

    # --- local requests

    def publish(
        self, name: str, table: str, keys: Sequence[int], value: float = 0.0, delete: bool = False, model: str = ""
    ) -> int:
        """Publish one step of one table through a node.

        Every row is filled with `value`. Returns the stamp; 0 when the node refused.
        """
        keyspace = self.models[model or self.model.name]
        spec = keyspace.tables[table]
        unique = np.array(sorted(set(keys)), np.uint64)
        live = 0 if delete else len(unique)
        rows = encode(spec.codec, np.full((live, spec.dim), value, np.float32))
        reply = self.request(name, lambda number: m.PublishRequested(number, keyspace.id, (RowColumns(spec.id, unique, rows),)))
        if not isinstance(reply, m.Published):
            return 0
        self.history += [Write(table, key, reply.stamp, delete, value, keyspace.name) for key in unique.tolist()]
        return reply.stamp

    def request(self, name: str, make: Callable[[int], m.Event]) -> m.Reply | None:
        """Feed a local request now; its reply, if it came at once (later ones come to `VirtualNode.replies`)."""
        return self.nodes[name].replies.get(self.ask(name, make))

    def ask(self, name: str, make: Callable[[int], m.Event]) -> int:
        """Feed a local request now; its number."""
        node = self.nodes[name]
        assert node.machine is not None, f"{name} is down"
        self._requests += 1
        number = self._requests
        self._feed(node, node.machine, make(number))
        return number

    # --- time

    def run(self, duration_ms: int) -> None:
        """Advance virtual time."""
        end_ms = self.now_ms + duration_ms
        handled = 0
        while self._queue and self._queue[0][0] <= end_ms:
            at_ms, _, action = heapq.heappop(self._queue)
            handled = handled + 1 if at_ms == self.now_ms else 0
            assert handled < EVENTS_PER_INSTANT_MAX, f"seed {self.seed}: time stands still at {self.now_ms} ms"
            self.now_ms = at_ms
            action()
        self.now_ms = end_ms

    def run_until(self, condition: Callable[[], bool], limit_ms: int = 60_000, step_ms: int = 50) -> bool:
        """Advance until `condition` holds; False when it does not within the limit."""
        end_ms = self.now_ms + limit_ms
        while not condition():
            if self.now_ms >= end_ms:
                return False
            self.run(step_ms)
        return True

    def now(self) -> m.Now:
        """Both clocks; the virtual epoch is an arbitrary moment after the stamps' own."""
        return m.Now(self.now_ms, EPOCH_MS + 1_000_000 + self.now_ms)

    def now_of(self, node: VirtualNode) -> m.Now:
        """Both clocks as a node reads them."""
        return m.Now(self.now_ms, EPOCH_MS + 1_000_000 + self.now_ms + node.clock_ms)

    def _at(self, at_ms: int, action: Callable[[], None]) -> None:
        self._submitted += 1
        heapq.heappush(self._queue, (at_ms, self._submitted, action))

    # --- effects

    def _feed(self, node: VirtualNode, machine: Machine, event: m.Event) -> None:
        """Handle one event and carry out its effects, as the runtime does; later, when the node's CPU is busy."""
        if self.cpu is None:
            self._carry_out(node, machine, event)
            return
        local = isinstance(event, m.PublishRequested | m.WaitRequested)
        line = node.waiting_local if local else node.waiting
        if len(line) >= WAITING_MAX:
            return
        idle = not node.waiting and not node.waiting_local
        line.append(event)
        if idle:
            self._work_off(node, machine)

    def _work_off(self, node: VirtualNode, machine: Machine) -> None:
        """Handle what waits, as far as the CPU comes within this millisecond."""
        if node.machine is not machine:
            return
        if node.paused:
            node.held.append(lambda: self._work_off(node, machine))
            return
        while (node.waiting or node.waiting_local) and node.busy_until_ms < self.now_ms + 1:
            assert self.cpu is not None
            self.cpu.begin(node.name, max(float(self.now_ms), node.busy_until_ms))
            # It leaves the line only when it is done: what it sets off on its own node waits behind it.
            line = node.waiting_local or node.waiting
            self._carry_out(node, machine, line[0])
            node.busy_until_ms = self.cpu.ends_ms
            if line:
                line.popleft()
        if node.waiting or node.waiting_local:
            self._at(int(node.busy_until_ms), lambda: self._work_off(node, machine))

    def _carry_out(self, node: VirtualNode, machine: Machine, event: m.Event) -> None:
        """Handle one event and carry out its effects, as the runtime does; or be killed in the middle of it."""
        try:
            self._carry_out_all(node, machine, event)
        except KilledError:
            self.crash(node.name)
            return
        finally:
            self._shared_now.clear()
        self._arm(node, machine)

    def _carry_out_all(self, node: VirtualNode, machine: Machine, event: m.Event) -> None:
        pending = [event]
        while pending:
            for effect in self._handle(node, machine, pending.pop(0)):
                if node.fuse is not None:
                    node.fuse.burn()
                match effect:
                    case m.Send(address, envelope, message):
                        if self.cpu is not None:
                            self.cpu.sending(node.name, message)
                        if not self._transmit(node, address, envelope, message):
                            pending.append(m.SendFailed(address, envelope))
                    case m.Continue(after):
                        pending.append(after)
                    case m.Published() | m.Refused() | m.WaitEnded() | m.Expelled():
                        node.replies[effect.request] = effect
                        if isinstance(effect, m.Published) and self.meter is not None:
                            self.meter.published_ms[effect.stamp] = self.now_ms
                    case m.Note():
                        if effect.alarm:
                            node.notes.append(effect)
                    case m.Fatal(reason):
                        node.fatal = reason
                        node.machine = None
                    case m.StartOver(reason):
                        node.notes.append(m.Note("started_over", (("reason", reason), ("rows_lost", effect.rows_lost))))
                        self.crash(node.name)
                        self.restart(node.name, keep_state=False)
                        return
                    case m.BatchApplied():
                        self._measure_applied(effect)
                    case m.Dial() | m.Forget():
                        pass

    def _handle(self, node: VirtualNode, machine: Machine, event: m.Event) -> list[m.Effect]:
        """The machine's effects; a message that it refuses must not have changed anything."""
        if self.cpu is not None:
            self.cpu.handling(event)
        before = self._fingerprint(node) if self._is_audited(event) else None
        try:
            return machine.handle(event, self.now_of(node))
        except RemoteProtocolError as error:
            node.rejected.append(str(error))
            if before is not None and before != self._fingerprint(node):
                self.violations.append(f"{node.name} refused a message and was changed by it: {error}")
            return []

    def _is_audited(self, event: m.Event) -> bool:
        """Some batches and chunks are; all of them where clocks are so far apart that many will be refused."""
        if not isinstance(event, m.MessageReceived) or not isinstance(event.message, _CARRIES_ROWS):
            return False
        self._audited += 1
        return self._clocks_apart or self._audited % AUDIT_EVERY == 0

    @staticmethod
    def _fingerprint(node: VirtualNode) -> list[tuple[int, int, int]]:
        """Rows and knowledge, which a refused message may not change (invariant 8)."""
        replicas = node.store.models.values()
        return [(r.stamp_max, int(r.vector.sum()), int(r.frontiers.sum())) for r in replicas]

    def _arm(self, node: VirtualNode, machine: Machine) -> None:
        """Have the timer fire at the machine's deadline; one that is set for an earlier moment asks again then."""
        deadline_ms = max(machine.deadline_ms, self.now_ms + 1)
        armed_ms = self._timer_ms.get(node.name)
        if armed_ms is not None and armed_ms <= deadline_ms:
            return
        self._timer_ms[node.name] = deadline_ms
        self._at(deadline_ms, _Timer(self, node, machine, deadline_ms))

    def fire(self, timer: "_Timer") -> None:
        """A node's timer comes."""
        node, machine = timer.node, timer.machine
        if node.machine is not machine or self._timer_ms.get(node.name) != timer.deadline_ms:
            return
        if node.paused:
            node.held.append(timer)
            return
        del self._timer_ms[node.name]
        if machine.deadline_ms <= self.now_ms:
            self._feed(node, machine, m.TimerFired())
        else:
            self._arm(node, machine)

    def _share(self, envelope: m.Envelope, message: m.Message) -> _Shared:
        """The message's frames, made once for all of its receivers; a forwarded batch is the very message that was decoded."""
        kept = self._shared if isinstance(message, m.Batch) else self._shared_now
        shared = kept.get((id(message), envelope.version))
        if shared is None:
            frames = [bytes(frame) for frame in wire.encode(envelope, message)]
            digest = xxhash.xxh3_64()
            for frame in frames[1:]:
                digest.update(frame)
            size = sum(map(len, frames)) if self.cpu is None else self.cpu.bytes_of(message, frames)
            shared = _Shared(message, envelope, frames, size, digest.intdigest())
            self._remember(message, shared)
        return shared

    def _remember(self, message: m.Message, shared: _Shared) -> None:
        kept = self._shared if isinstance(message, m.Batch) else self._shared_now
        while len(kept) >= SHARED_MAX:
            del kept[next(iter(kept))]
        kept[id(message), shared.envelope.version] = shared

    def _transmit(self, sender: VirtualNode, address: str, envelope: m.Envelope, message: m.Message) -> bool:
        target = self.nodes.get(name_of(address))
        if target is None or (target.machine is None and not self._outlives()):
            return False
        link, regions = (sender.name, target.name), (sender.region, target.region)
        if link in self.cut:
            return True  # lost on the way, which the sender cannot know
        shared = self._share(envelope, message)
        leaves_ms = self.now_ms if self.cpu is None else self.cpu.ends_ms
        arrivals = self.network.arrivals(self.options, link, regions, shared.size, leaves_ms)
        if arrivals is None:
            return False
        if self.meter is not None:
            self.meter.bytes_all += shared.size
            if isinstance(message, _CARRIES_ROWS):
                self._measure_sent(self.meter, sender, message)
        for arrival_ms in arrivals:
            self._schedule(arrival_ms, sender, target, envelope, shared)
        return True

    def _outlives(self) -> bool:
        """Whether a message outlives the process that it was meant for, in its sender's socket, and reaches the next one."""
        chance = self.options.afterlife_probability
        return chance > 0 and self._rng.random() < chance

    def _schedule(
        self, arrival_ms: int, sender: VirtualNode, target: VirtualNode, envelope: m.Envelope, shared: _Shared
    ) -> None:
        chance = self.options.corrupt_probability
        corrupt = chance > 0 and self._rng.random() < chance
        self._at(arrival_ms, _Delivery(self, sender, target, envelope, shared, target.machine, sender.machine, corrupt))

    def deliver(self, delivery: "_Delivery") -> None:
        """A message arrives, or waits for who is to get it."""
        sender, target, envelope, shared = delivery.sender, delivery.target, delivery.envelope, delivery.shared
        if delivery.machine is None and sender.machine is not delivery.sending:
            return  # so is the process in whose socket it was
        if target.machine is not delivery.machine:  # the process it was sent to is gone
            if delivery.machine is not None and not self._outlives():
                return
            delivery.machine = target.machine
        if delivery.machine is None:
            target.queued.append(delivery)
            return
        if target.paused:
            target.held.append(delivery)
            return
        self.delivered += 1
        place = f"{self.now_ms} {sender.name} {target.name} {envelope.session} {envelope.sequence} {shared.digest:x}\n"
        self._trace.update(place.encode())
        if delivery.corrupt:
            self._deliver_corrupt(target, shared)
            return
        if self.meter is not None and isinstance(shared.message, _CARRIES_ROWS):
            self._measure_received(self.meter, sender, target, envelope, shared.message)
        try:
            message = self._decode(shared)
        except RemoteProtocolError as error:
            target.rejected.append(str(error))
            return
        self._feed(target, delivery.machine, m.MessageReceived(envelope, message))

    def _decode(self, shared: _Shared) -> m.Message:
        if shared.decoded is None:
            envelope, shared.decoded = wire.decode([memoryview(frame) for frame in shared.frames])
            assert envelope == shared.envelope, "an envelope changed on its way"
            if isinstance(shared.decoded, m.Batch):  # its receivers forward it as it is
                self._remember(shared.decoded, _Shared(shared.decoded, envelope, shared.frames, shared.size, shared.digest))
                self._shared[id(shared.decoded), envelope.version].decoded = shared.decoded
        return shared.decoded

    def _deliver_corrupt(self, target: VirtualNode, shared: _Shared) -> None:
        frames = [bytearray(frame) for frame in shared.frames]
        frame = self._rng.choice([frame for frame in frames[1:] if frame])
        place = self._rng.randrange(8 * len(frame))
        frame[place // 8] ^= 1 << place % 8
        try:
            wire.decode([memoryview(frame) for frame in frames])
        except RemoteProtocolError as error:
            target.rejected.append(str(error))
            return
        self.violations.append(f"{target.name} took a corrupt message")

    def _measure_applied(self, applied: m.BatchApplied) -> None:
        published_ms = self.meter.published_ms.get(applied.stamp, self.now_ms) if self.meter is not None else self.now_ms
        if self.meter is not None and published_ms < self.now_ms:  # at its origin it is applied when it is published
            self.meter.delays_ms.append(self.now_ms - published_ms)

    @staticmethod
    def _measure_sent(meter: Meter, sender: VirtualNode, batch: m.Batch | m.PullReply | m.ShardsReply) -> None:
        payload = sum(section.payload_bytes for section in batch.columns)
        meter.bytes_sent[sender.name] = meter.bytes_sent.get(sender.name, 0) + payload

    @staticmethod
    def _measure_received(
        meter: Meter,
        sender: VirtualNode,
        target: VirtualNode,
        envelope: m.Envelope,
        batch: m.Batch | m.PullReply | m.ShardsReply,
    ) -> None:
        meter.rows += sum(len(section.keys) for section in batch.columns)
        if not batch.columns or isinstance(batch, m.PullReply | m.ShardsReply):
            return
        meter.copies += 1
        meter.hops_max = max(meter.hops_max, envelope.hops + 1)
        if sender.region != target.region:
            first = batch.keyspace * SHARDS_MAX
            place = (target.region, batch.stamp, first + int(batch.claims.shards[0]), int(batch.claims.part[0]))
            meter.into_region[place] = meter.into_region.get(place, 0) + 1
            for shard in batch.claims.shards.tolist():
                nodes = meter.entries.setdefault((target.region, first + shard), [])
                if target.name not in nodes:
                    nodes.append(target.name)
            payload = sum(section.payload_bytes for section in batch.columns)
            meter.bytes_into[target.region] = meter.bytes_into.get(target.region, 0) + payload


def address_of(name: str) -> str:
    """The virtual address of a node."""
    return f"virtual://{name}"


def name_of(address: str) -> str:
    """The node behind a virtual address."""
    return address.removeprefix("virtual://")
