"""A node of the virtual cluster: its machine, and what outlives its process."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ekko.model import ModelSpec
from ekko.store import Store
from ekko.store.capacity import Capacity
from p2p import messages as m
from p2p.machine import Machine
from p2p.versions import PROTOCOL_VERSION
from sim_cluster.kills import Fuse


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
    capacity: Capacity | None = None  # of each of its models, from its next life on
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    store: Store = field(default_factory=Store.anonymous)
    machine: Machine | None = None
    replies: dict[int, m.Reply] = field(default_factory=dict)
    notes: list[m.Note] = field(default_factory=list)  # what a person must see
    rejected: list[str] = field(default_factory=list)
    fatal: str = ""
    clock_ms: int = 0  # how far its wall clock is ahead of the cluster's
    timer_ms: int | None = None  # when its timer fires
    paused: bool = False
    held: list[Callable[[], None]] = field(default_factory=list)  # what happened to it while it was paused
    busy_until_ms: float = 0.0  # with a cost model: when its CPU is free
    waiting: deque[m.Event] = field(default_factory=deque)  # events that came while it was busy
    waiting_local: deque[m.Event] = field(default_factory=deque)  # of its own machine's processes; they go first
    queued: list[Callable[[], None]] = field(default_factory=list)  # in its peers' sockets, while it is down
    fuse: Fuse | None = None  # of a process that is to be killed in the middle of something
    lives: int = 0  # how many processes it has had
    losses: int = 0  # how often it lost its memory
    begun_anew: int = 0  # how often it stopped to claim shards of which it had dropped rows (`ModelStore.begin_anew`)

    @property
    def beginnings(self) -> int:
        """It changes where the node may have less than before."""
        return self.losses + self.begun_anew

    def die(self) -> None:
        """The process ends, and with it all that waited for it."""
        self.machine = None
        self.paused = False
        self.fuse = self.ledger.fuse = None
        self.held.clear()
        self.waiting.clear()
        self.waiting_local.clear()
        self.busy_until_ms = 0.0
        self.timer_ms = None


def address_of(name: str) -> str:
    """The virtual address of a node."""
    return f"virtual://{name}"


def name_of(address: str) -> str:
    """The node behind a virtual address."""
    return address.removeprefix("virtual://")
