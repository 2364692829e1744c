"""Many nodes in virtual time: the daemon's own machine and the real store, on a network made of a seed.

Every message is encoded and decoded on its way, so the codec is exercised too. Time is a number that jumps to the next event;
one seed gives one trace, whatever `PYTHONHASHSEED`.
"""

import hashlib
import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ekko.model import ModelSpec, TableSpec
from ekko.store import Store
from p2p import messages as m
from p2p import wire
from p2p.errors import RemoteProtocolError
from p2p.machine import Machine, MachineOptions
from p2p.replica import RowColumns
from p2p.stamps import EPOCH_MS, WRITERS_MAX, writer_of
from p2p.transport import Buffer

# A run that handles more events than this at one virtual instant circles.
EVENTS_PER_INSTANT_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """Faults to inject; probabilities are per message."""

    delay_ms_min: int = 1
    delay_ms_max: int = 5
    region_delay_ms: int = 0  # on top, between regions
    loss_probability: float = 0.0
    repeat_probability: float = 0.0
    reorder_probability: float = 0.0  # the message may overtake, or be overtaken by, others of its link


@dataclass(slots=True)
class MemoryLedger:
    """A ledger that survives a crash of its node, in memory."""

    record: bytes | None = None

    def load(self) -> bytes | None:
        return self.record

    def save(self, record: bytes) -> None:
        self.record = record


@dataclass(slots=True, eq=False)
class VirtualNode:
    """One node: its machine and what outlives it."""

    name: str
    region: str
    role: str
    seeds: tuple[str, ...]
    model: ModelSpec
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    store: Store = field(default_factory=Store.anonymous)
    machine: Machine | None = None
    replies: dict[int, m.Reply] = field(default_factory=dict)
    notes: list[m.Note] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    fatal: str = ""


@dataclass(frozen=True, slots=True)
class Write:
    """One acknowledged update, for the checkers."""

    table: str
    key: int
    stamp: int
    deleted: bool


class VirtualCluster:
    """Nodes, a network between them, and the history of what was acknowledged.

    Args:
        seed: everything random derives from it.
        options: the network's faults.
        model: the one model that all nodes carry.
    """

    def __init__(self, seed: int, options: NetworkOptions | None = None, model: ModelSpec | None = None) -> None:
        self.seed = seed
        self.options = options or NetworkOptions()
        self.model = model or ModelSpec("ctr", 8, {"item": TableSpec("item", 4), "user": TableSpec("user", 2)})
        self.now_ms = 0
        self.nodes: dict[str, VirtualNode] = {}
        self.history: list[Write] = []
        self.delivered = 0
        self.cut: set[tuple[str, str]] = set()  # one-way: nothing passes from the first to the second
        self._rng = random.Random(seed)
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._submitted = 0
        self._requests = 0
        self._last_arrival: dict[tuple[str, str], int] = {}
        self._timer_ms: dict[str, int] = {}
        self._trace = hashlib.sha256()

    @property
    def trace(self) -> str:
        """Hash of everything delivered so far."""
        return self._trace.hexdigest()

    # --- nodes

    def add(self, name: str, region: str, role: str = "serve", seeds: Sequence[str] = ()) -> VirtualNode:
        """Start a node; `seeds` are names of nodes."""
        node = VirtualNode(name, region, role, tuple(address_of(seed) for seed in seeds), self.model)
        self.nodes[name] = node
        self._boot(node)
        return node

    def crash(self, name: str) -> None:
        """Kill a node's process; its memory stays for `restart`."""
        self.nodes[name].machine = None

    def restart(self, name: str, keep_state: bool = True) -> None:
        """Start a killed node again, with its memory or, as after a reboot, without; its disk (ledger) stays."""
        node = self.nodes[name]
        if not keep_state:
            node.store = Store.anonymous()
            # What only this node held is gone; no protocol can promise it (R21: memory, not disk).
            self.history = [write for write in self.history if any(self._holds(other, write) for other in self.nodes.values())]
        self._boot(node)

    def _holds(self, node: VirtualNode, write: Write) -> bool:
        replica = node.store.models.get(self.model.name)
        if replica is None:
            return False
        base = np.zeros((replica.shards, WRITERS_MAX), np.uint64)
        base[:, writer_of(write.stamp)] = np.uint64(write.stamp - 1)
        table = self.model.tables[write.table].id
        chosen = [s for s in replica.changed_since(base) if s.table == table]
        columns = [replica.read(table, selection.slots) for selection in chosen]
        return any(write.key in held.keys.tolist() for held in columns)

    def _boot(self, node: VirtualNode) -> None:
        node.store.add_model(node.model, capacity_rows=64)
        options = MachineOptions(
            node.name, self._rng.getrandbits(64) | 1, self.now().unix_ms, node.region, node.role, node.seeds
        )
        node.machine = Machine(options, node.store, node.ledger, random.Random(self._rng.random()))
        self._feed(node, node.machine, m.Started(address_of(node.name)))

    # --- local requests

    def publish(self, name: str, table: str, keys: Sequence[int], value: float = 0.0, delete: bool = False) -> int:
        """Publish one step of one table through a node.

        Every row is filled with `value`. Returns the stamp; 0 when the node refused.
        """
        spec = self.model.tables[table]
        unique = np.array(sorted(set(keys)), np.uint64)
        live = 0 if delete else len(unique)
        rows = np.full((live, spec.dim), value, np.float32).view(np.uint8)
        reply = self.request(
            name, lambda number: m.PublishRequested(number, self.model.id, (RowColumns(spec.id, unique, rows),))
        )
        if not isinstance(reply, m.Published):
            return 0
        self.history += [Write(table, key, reply.stamp, delete) for key in unique.tolist()]
        return reply.stamp

    def request(self, name: str, make: Callable[[int], m.Event]) -> m.Reply | None:
        """Feed a local request now; its reply, if it came at once (later ones come to `VirtualNode.replies`)."""
        node = self.nodes[name]
        assert node.machine is not None, f"{name} is down"
        self._requests += 1
        self._feed(node, node.machine, make(self._requests))
        return node.replies.get(self._requests)

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

    def _at(self, at_ms: int, action: Callable[[], None]) -> None:
        self._submitted += 1
        heapq.heappush(self._queue, (at_ms, self._submitted, action))

    # --- effects

    def _feed(self, node: VirtualNode, machine: Machine, event: m.Event) -> None:
        """Handle one event and carry out its effects, as the runtime does."""
        pending = [event]
        while pending:
            try:
                effects = machine.handle(pending.pop(0), self.now())
            except RemoteProtocolError as error:
                node.rejected.append(str(error))
                effects = []
            for effect in effects:
                match effect:
                    case m.Send(address, envelope, message):
                        if not self._transmit(node, address, wire.encode(envelope, message)):
                            pending.append(m.SendFailed(address, envelope))
                    case m.Continue(after):
                        pending.append(after)
                    case m.Published() | m.Refused() | m.WaitEnded():
                        node.replies[effect.request] = effect
                    case m.Note():
                        node.notes.append(effect)
                    case m.Fatal(reason):
                        node.fatal = reason
                        node.machine = None
                    case m.Forget() | m.BatchApplied():
                        pass
        self._arm(node, machine)

    def _arm(self, node: VirtualNode, machine: Machine) -> None:
        deadline_ms = max(machine.deadline_ms, self.now_ms + 1)
        if self._timer_ms.get(node.name, -1) == deadline_ms:
            return
        self._timer_ms[node.name] = deadline_ms

        def fire() -> None:
            if node.machine is machine and self._timer_ms.get(node.name) == deadline_ms:
                del self._timer_ms[node.name]
                self._feed(node, machine, m.TimerFired())

        self._at(deadline_ms, fire)

    def _transmit(self, sender: VirtualNode, address: str, frames: Sequence[Buffer]) -> bool:
        target = self.nodes.get(name_of(address))
        if target is None or target.machine is None:
            return False
        if (sender.name, target.name) in self.cut or self._rng.random() < self.options.loss_probability:
            return True  # lost on the way, which the sender cannot know
        copies = 1 + (self._rng.random() < self.options.repeat_probability)
        body = [bytes(frame) for frame in frames]
        for _ in range(copies):
            self._schedule(sender, target, target.machine, body)
        return True

    def _schedule(self, sender: VirtualNode, target: VirtualNode, machine: Machine, body: list[bytes]) -> None:
        options = self.options
        delay_ms = self._rng.randint(options.delay_ms_min, options.delay_ms_max)
        if sender.region != target.region:
            delay_ms += options.region_delay_ms
        link = (sender.name, target.name)
        arrival_ms = self.now_ms + delay_ms
        if self._rng.random() >= options.reorder_probability:
            arrival_ms = self._last_arrival[link] = max(arrival_ms, self._last_arrival.get(link, 0))

        def deliver() -> None:
            if target.machine is not machine:
                return  # the process it was sent to is gone
            self.delivered += 1
            digest = hashlib.sha256(b"".join(body)).hexdigest()[:16]
            self._trace.update(f"{self.now_ms} {sender.name} {target.name} {digest}\n".encode())
            try:
                envelope, message = wire.decode([memoryview(frame) for frame in body])
            except RemoteProtocolError as error:
                target.rejected.append(str(error))
                return
            self._feed(target, machine, m.MessageReceived(envelope, message))

        self._at(arrival_ms, deliver)


def address_of(name: str) -> str:
    """The virtual address of a node."""
    return f"virtual://{name}"


def name_of(address: str) -> str:
    """The node behind a virtual address."""
    return address.removeprefix("virtual://")
