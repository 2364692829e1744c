"""Many nodes in virtual time: the daemon's own machine and the real store, on a network made of a seed.

Time is a number that jumps to the next event; one seed gives one trace, whatever `PYTHONHASHSEED`. Here nodes come, go and
handle their events; `timeline` says what is next, `post` carries messages.

Work takes no time, unless the cluster has a cost model (`sim_cluster.turns.CpuModel`): then a node does one thing after the
other, what comes meanwhile waits, and what an event sets off leaves when the work is done. Those accounts are exact; the
machine's clock, as in the daemon, ticks in milliseconds.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ekko.codec import encode
from ekko.model import ModelSpec, TableSpec
from ekko.store import Store
from ekko.store.capacity import Capacity
from p2p import messages as m
from p2p.core import COLLECT_MS, EXPEL_AFTER_MS
from p2p.errors import RemoteProtocolError
from p2p.identity.ledger import Ledger
from p2p.machine import Machine, MachineOptions
from p2p.paper.sync import PUSH, SyncOptions
from p2p.replica import Host, RowColumns
from p2p.stamps import AHEAD_MS_MAX, EPOCH_MS
from p2p.versions import PROTOCOL_VERSION
from sim_cluster.audit import Audit, fingerprint
from sim_cluster.history import Write, still_held
from sim_cluster.kills import Fuse, KilledError, lay
from sim_cluster.meter import Meter
from sim_cluster.network import NetworkOptions, pair_of, rates_of
from sim_cluster.node import VirtualNode, address_of
from sim_cluster.post import Post
from sim_cluster.timeline import Timeline
from sim_cluster.turns import CpuModel, Turns

# Rows for which a table has room at first: few, so that growing is exercised too.
CAPACITY_ROWS = 64

MachineFactory = Callable[[MachineOptions, Host, Ledger, random.Random], Machine]


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
        self.timeline = Timeline()
        self.nodes: dict[str, VirtualNode] = {}
        self.history: list[Write] = []
        self._unanswered: dict[int, list[Write]] = {}  # by request: steps that their nodes have not answered yet
        self.violations: list[str] = []  # of what is checked on the way (invariant 8)
        self.meter: Meter | None = None
        self.cut: set[tuple[str, str]] = set()  # one-way: nothing passes from the first to the second
        self._make_machine = make_machine
        self._rng = random.Random(seed)
        self.post = Post(self, self._rng)
        self._turns = None if cpu is None else Turns(cpu, self.timeline, self._carry_out)
        self._audit = Audit(self.nodes)
        self._requests = 0
        self._now = m.Now(0, EPOCH_MS + 1_000_000)
        self.ahead_ms = 0  # how far ahead any wall clock has ever been
        self.collect_ms = COLLECT_MS  # of nodes that are started from now on; so is
        self.rates: dict[str, float] = {}  # by `pair_of(region, region)`: bytes a second that updates may use (`set_rate`)
        self.expel_after_ms = EXPEL_AFTER_MS  # of nodes that are started from now on
        self._expelled: dict[str, int] = {}  # by node: how often it had lost its memory when it was expelled

    @property
    def trace(self) -> str:
        """Hash of everything delivered so far."""
        return self.post.trace

    @property
    def delivered(self) -> int:
        """Messages that arrived so far."""
        return self.post.delivered

    @property
    def drained_ms(self) -> int:
        """When everything that is on its way now will have come."""
        return self.post.network.latest_ms

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
        capacity: Capacity | None = None,
    ) -> VirtualNode:
        """Start a node.

        `seeds` are names of nodes, `store` is what it finds in its memory, `hold` its partitions of models, `capacity` what
        each of these may take.
        """
        addresses = tuple(address_of(seed) for seed in seeds)
        node = VirtualNode(name, region, role, addresses, self.model, hold or {}, protocol_version)
        node.store, node.capacity = store or node.store, capacity
        self.nodes[name] = node
        self.boot(node)
        return node

    def crash(self, name: str) -> None:
        """Kill a node's process; its memory stays for `restart`."""
        self.nodes[name].die()

    def kill_within(self, name: str, steps: int) -> None:
        """Kill a node's process after so many steps (`sim_cluster.kills`), in the middle of whatever it does then."""
        node = self.nodes[name]
        node.fuse = node.ledger.fuse = Fuse(steps)
        lay(node.fuse, node.store)

    def leave(self, name: str) -> None:
        """Stop a node's process as SIGTERM does: it says goodbye first."""
        node = self.nodes[name]
        if node.machine is not None:
            self.feed(node, node.machine, m.Leaving())
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
            self.forget_lost()
        self.boot(node)

    def forget_lost(self) -> None:
        """What only a node held that lost its memory is gone; no protocol can promise it (R21: memory, not disk)."""
        members = [node for node in self.nodes.values() if self._expelled.get(node.name) != node.losses]
        self.history = still_held(self.history, [node.store for node in members], self.models)

    def note_expelled(self, name: str) -> None:
        """A node was expelled: what only its memory holds is given up, now and until it has started over (R13)."""
        self._expelled[name] = self.nodes[name].losses
        self.forget_lost()

    def pause(self, name: str) -> None:
        """SIGSTOP: nothing happens on the node until `resume`; what comes for it is held back."""
        self.nodes[name].paused = True

    def resume(self, name: str) -> None:
        """SIGCONT: what was held back happens now, in its order."""
        node = self.nodes[name]
        node.paused = False
        held, node.held = node.held, []
        for action in held:
            self.timeline.at(self.now_ms, action)

    def shift_clock(self, name: str, by_ms: int) -> None:
        """Move a node's wall clock; its monotonic one goes on."""
        self.nodes[name].clock_ms += by_ms
        clocks = [node.clock_ms for node in self.nodes.values()]
        self.ahead_ms = max(self.ahead_ms, *clocks)
        self._audit.thorough = max(clocks) - min(clocks) >= AHEAD_MS_MAX

    def boot(self, node: VirtualNode) -> None:
        """Start a process on a node, which attaches to the memory that it finds."""
        for model in (node.model, *(spec for spec in self.models.values() if spec is not self.model)):
            node.store.add_model(model, capacity_rows=self._capacity_rows, hold=node.hold.get(model.name))
            if node.capacity is not None:
                node.store.limit(model.name, node.capacity)
            node.begun_anew += bool(node.store.models[model.name].begin_anew())
        options = MachineOptions(
            node.name,
            self._rng.getrandbits(64) | 1,
            self.now_of(node).unix_ms,
            node.region,
            node.role,
            node.seeds,
            protocol_version=node.protocol_version,
            expel_after_ms=self.expel_after_ms,
            collect_ms=self.collect_ms,
            sync=self.sync,
            rates=rates_of(self.rates, node.region),
        )
        node.lives += 1
        host = node.store if self.cpu is None else self.cpu.host(node.name, node.store)
        node.machine = self._make_machine(options, host, node.ledger, random.Random(self._rng.random()))
        node.timer_ms = None
        self.feed(node, node.machine, m.Started(address_of(node.name)))
        queued, node.queued = node.queued, []
        for deliver in queued:
            self.timeline.at(self.now_ms + 1, deliver)

    def set_rate(self, one: str, other: str, bytes_per_s: float | None) -> None:
        """Let updates between two regions use so much from now on, each way, as the operator does; None: no limit."""
        self.rates.pop(pair_of(one, other), None)
        if bytes_per_s is not None:
            self.rates[pair_of(one, other)] = bytes_per_s
        for node in self.nodes.values():
            if node.region in (one, other) and node.machine is not None:
                region = other if node.region == one else one
                self.feed(node, node.machine, m.RateChanged(region, bytes_per_s))

    # --- local requests

    def publish(
        self, name: str, table: str, keys: Sequence[int], value: float = 0.0, delete: bool = False, model: str = ""
    ) -> int:
        """Publish one step of one table through a node.

        Every row is filled with `value`. Returns the stamp; 0 when the node refused, or answers later, as while it has no id.
        """
        keyspace = self.models[model or self.model.name]
        spec = keyspace.tables[table]
        unique = np.array(sorted(set(keys)), np.uint64)
        live = 0 if delete else len(unique)
        rows = encode(spec.codec, np.full((live, spec.dim), value, np.float32))
        request = self.ask(name, lambda number: m.PublishRequested(number, keyspace.id, (RowColumns(spec.id, unique, rows),)))
        reply = self.nodes[name].replies.get(request)
        writes = [Write(table, key, 0, delete, value, keyspace.name) for key in unique.tolist()]
        if reply is None:
            self._unanswered[request] = writes
        if not isinstance(reply, m.Published):
            return 0
        self._acknowledge(writes, reply.stamp)
        return reply.stamp

    def _acknowledge(self, writes: list[Write], stamp: int) -> None:
        self.history += [replace(write, stamp=stamp) for write in writes]

    def request(self, name: str, make: Callable[[int], m.Event]) -> m.Reply | None:
        """Feed a local request now; its reply, if it came at once (later ones come to `VirtualNode.replies`)."""
        return self.nodes[name].replies.get(self.ask(name, make))

    def ask(self, name: str, make: Callable[[int], m.Event]) -> int:
        """Feed a local request now; its number."""
        node = self.nodes[name]
        assert node.machine is not None, f"{name} is down"
        self._requests += 1
        number = self._requests
        self.feed(node, node.machine, make(number))
        return number

    # --- time

    @property
    def now_ms(self) -> int:
        """Virtual time."""
        return self.timeline.now_ms

    def run(self, duration_ms: int) -> None:
        """Advance virtual time."""
        self.timeline.run(duration_ms)

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
        now_ms = self.timeline.now_ms
        if self._now.monotonic_ms != now_ms:  # many events share a millisecond
            self._now = m.Now(now_ms, EPOCH_MS + 1_000_000 + now_ms)
        return self._now

    def now_of(self, node: VirtualNode) -> m.Now:
        """Both clocks as a node reads them."""
        now = self.now()
        return m.Now(now.monotonic_ms, now.unix_ms + node.clock_ms) if node.clock_ms else now

    # --- effects

    def feed(self, node: VirtualNode, machine: Machine, event: m.Event) -> None:
        """Handle one event and carry out its effects, as the runtime does; later, when the node's CPU is busy."""
        if self._turns is None:
            self._carry_out(node, machine, event)
        else:
            self._turns.take(node, machine, event)

    def _carry_out(self, node: VirtualNode, machine: Machine, event: m.Event) -> None:
        """Handle one event and carry out its effects, as the runtime does; or be killed in the middle of it."""
        try:
            self._carry_out_all(node, machine, event)
        except KilledError:
            self.crash(node.name)
            # The checkers see the memory as the next process will: a row that is half-written is for no one.
            node.store = node.store.reopened()
            return
        finally:
            self.post.end_event()
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
                        if not self.post.transmit(node, address, envelope, message):
                            pending.append(m.SendFailed(address, envelope))
                    case m.Continue(after):
                        pending.append(after)
                    case (
                        m.Published()
                        | m.Refused()
                        | m.WaitEnded()
                        | m.AboveTold()
                        | m.Expelled()
                        | m.Fenced()
                        | m.FenceWaits()
                        | m.Lifted()
                    ):
                        node.replies[effect.request] = effect
                        late = self._unanswered.pop(effect.request, [])
                        if isinstance(effect, m.Published):
                            self._acknowledge(late, effect.stamp)
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
                        if self.meter is not None:
                            self.meter.note_applied(effect.stamp, self.now_ms)
                    case m.Dial() | m.Forget():
                        pass

    def _handle(self, node: VirtualNode, machine: Machine, event: m.Event) -> list[m.Effect]:
        """The machine's effects; a message that it refuses must not have changed anything."""
        if self.cpu is not None:
            self.cpu.handling(event)
        before = self._audit.before(node, event)
        try:
            return machine.handle(event, self.now_of(node))
        except RemoteProtocolError as error:
            node.rejected.append(str(error))
            if before is not None and before != fingerprint(node):
                self.violations.append(f"{node.name} refused a message and was changed by it: {error}")
            return []

    def _arm(self, node: VirtualNode, machine: Machine) -> None:
        """Have the timer fire at the machine's deadline; one that is set for an earlier moment asks again then."""
        deadline_ms = max(machine.deadline_ms, self.timeline.now_ms + 1)
        if node.timer_ms is not None and node.timer_ms <= deadline_ms:
            return
        node.timer_ms = deadline_ms
        self.timeline.at(deadline_ms, _Timer(self, node, machine, deadline_ms))

    def fire(self, timer: "_Timer") -> None:
        """A node's timer comes."""
        node, machine = timer.node, timer.machine
        if node.machine is not machine or node.timer_ms != timer.deadline_ms:
            return
        if node.paused:
            node.held.append(timer)
            return
        node.timer_ms = None
        if machine.deadline_ms <= self.now_ms:
            self.feed(node, machine, m.TimerFired())
        else:
            self._arm(node, machine)
