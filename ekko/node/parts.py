"""What one life of a node is made of, and how it is put together: who knows whom."""

import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from ekko.config import NodeConfig
from ekko.delayed.store import DelayedStore
from ekko.endpoint import LocalEndpoint
from ekko.errors import EkkoError, StoreError
from ekko.file_ledger import FileLedger
from ekko.health.service import Health
from ekko.local import Failed
from ekko.metrics import Metrics
from ekko.node.budgets import NodeRates
from ekko.node.delaying import Delaying
from ekko.node.effects import Effects
from ekko.node.fences import Fences
from ekko.node.pairs import Pairs
from ekko.node.publishing import Publishing
from ekko.node.restored import RestoredRows
from ekko.node.rollbacks import NodeRollbacks
from ekko.node.whereabouts import Whereabouts
from ekko.operations import Operations
from ekko.priority.origin import Priorities
from ekko.priority.shares import Shares
from ekko.rates import Rates
from ekko.rollback.past import DelayedPast
from ekko.security import NodeKeys
from ekko.store import Store
from ekko.store.manifest import kernel_boot_id
from p2p import messages as m
from p2p.errors import LocalProtocolError
from p2p.link.compression import Mode
from p2p.machine import Machine, MachineOptions
from p2p.runtime import Runtime, no_delay, read_clock
from p2p.transport.zmq import ZmqTransport

# What operators, and facts that a node has to tell, ask of the protocol; and publishers beside them.
Operation = m.CaughtUpRequested | m.SchemaChanged | m.RateChanged | m.FenceRequested | m.LiftRequested
LocalEvent = Operation | m.PublishRequested | m.WaitRequested | m.AboveRequested | m.ExpelRequested
Submit = Callable[[LocalEvent], Failed | None]


@dataclass(frozen=True, slots=True)
class Parts:
    """All made at once, from an open store."""

    store: Store
    machine: Machine
    transport: ZmqTransport
    runtime: Runtime
    keys: NodeKeys | None
    endpoint: LocalEndpoint
    publishing: Publishing
    operations: Operations
    fences: Fences
    rates: NodeRates
    effects: Effects
    health: Health
    shares: Shares
    delaying: Delaying | None  # of a baseline or witness
    rollbacks: NodeRollbacks

    @property
    def served(self) -> Store:
        """What readers of this node see."""
        return self.store if self.delaying is None else self.delaying.served

    def close(self) -> None:
        """Let go of memory and files; they stay."""
        self.operations.close()
        self.rates.close()
        if self.delaying is not None:
            self.delaying.delayed.close()
        self.store.close()

    def destroy(self) -> None:
        """Remove all that this node holds."""
        self.operations.close()
        self.rates.close()
        if self.delaying is not None:
            self.delaying.delayed.destroy()
        self.store.destroy()


def make_parts(
    config: NodeConfig,
    store: Store,
    delayed: DelayedStore | None,
    boot: int,
    boot_ms: int,
    metrics: Metrics,
    submit: Submit,
) -> Parts:
    """Put a node together; nothing listens yet.

    Args:
        config: of the node.
        store: open, with all that the configuration names.
        delayed: the older state beside it, if there is to be one.
        boot: a number for this life.
        boot_ms: when it began, Unix milliseconds.
        metrics: which hear of applied batches.
        submit: hands an event to the runtime that is made here; returns why it failed.

    Raises:
        StoreError: the node's ledger cannot be read.
        ConfigError: a detector or metric that the configuration names is not there.
    """
    node = config.node
    machine = _make_machine(config, store, boot, boot_ms)
    where = Whereabouts(config, machine)
    keys = None
    if (security := config.security) is not None:
        keys = NodeKeys(node.id, security.key_file, security.allow, where.node_at)
    transport = ZmqTransport(node.peers, advertise=node.advertise, keys=keys)

    def submit_operation(event: Operation) -> None:
        failed = submit(event)
        if failed is not None:
            raise EkkoError(failed.reason)

    shares = Shares(node.id, store, lambda entries: submit_operation(m.SchemaChanged(entries)))
    settings = {name: model.priority.settings for name, model in config.models.items()}
    priorities = Priorities(store.models, settings, shares.share_of)
    restored = RestoredRows(machine.fences_of, machine.restored_spans)
    publishing = Publishing(node, store, submit, lambda: machine.protocol_min(read_clock()), restored, priorities)
    fences = Fences(store, machine.fence_of, submit_operation)
    operations = Operations(node.id, store, submit_operation, machine.protocol_min_known)
    rates = NodeRates(node.region, config.rates(), store, submit_operation, machine.protocol_min_known)
    health = _make_health(config, store, machine, submit_operation)
    publishing.on_report = health.report
    endpoint = LocalEndpoint(node.local, publishing)
    pairs = Pairs(publishing.publish, publishing.wait_everywhere, endpoint.answer)
    publishing.on_pair = pairs.begin
    past = DelayedPast(delayed) if delayed is not None and node.role == "witness" else None
    rollbacks = NodeRollbacks(config, store, machine, submit, past)
    effects = Effects(store, metrics, endpoint, publishing, operations, rollbacks.on_reply, fences, pairs)
    runtime = Runtime(
        machine,
        transport,
        on_effect=effects.carry_out,
        delay_s=where.delay_s if config.links else no_delay,  # asked at each send
        compression=Mode(node.compression),
        crosses=where.crosses,
    )
    delaying = None
    if delayed is not None:
        delaying = Delaying(node, delayed, rollbacks.coordinator.cut_held, lambda: machine.clock_agrees(read_clock()))
    served = rates, effects, health, shares, delaying, rollbacks
    return Parts(store, machine, transport, runtime, keys, endpoint, publishing, operations, fences, *served)


def _make_health(config: NodeConfig, store: Store, machine: Machine, submit: Callable[[m.SchemaChanged], None]) -> Health:
    return Health(
        config.node.id,
        config.health,
        store,
        lambda entries: submit(m.SchemaChanged(entries)),
        machine.protocol_min_known,
        peers=lambda: machine.peers_alive(read_clock()),
        clock_agrees=lambda: machine.clock_agrees(read_clock()),
    )


def _make_machine(config: NodeConfig, store: Store, boot: int, boot_ms: int) -> Machine:
    node = config.node
    options = MachineOptions(
        node.id,
        boot,
        boot_ms,
        node.region,
        node.role,
        tuple(node.seeds),
        machine_hash(),
        expel_after_ms=int(node.expel_after_s * 1000),
        rates=tuple(store.facts.of(Rates).of_region(node.region, config.rates()).items()),
    )
    try:
        return Machine(options, store, FileLedger(node.run_dir), random.Random(secrets.randbits(64)))
    except LocalProtocolError as error:
        raise StoreError(f"{node.run_dir}: {error}") from None


def machine_hash() -> int:
    """Names this machine since its boot: whose monotonic clock a time is of."""
    return int(xxhash.xxh64_intdigest(kernel_boot_id().encode()))
