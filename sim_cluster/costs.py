"""What work costs the nodes of a virtual cluster: a table of measured costs, and the accounts that charge by it.

A simulated model is small and stands for a large one: one of its rows for `rows_per_row` rows, one of its shards for as many
shards. So whatever is done for each row or shard costs that many times what was measured, and the links are to be that much
slower than those that they stand for, while a message stays a message. Its fixed part, and messages about members and not
about rows, therefore count on the links as a fraction of their bytes only.

A node does one thing after the other, as the daemon's one thread does. What it does for rows and shards may be spread over
several cores (shards are independent), what it does for a message is not. Not charged: the threads inside ZeroMQ, which run
beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p import messages as m
from p2p.replica import Applied, Host, Replica, RowColumns, SchemaEntry, Selection

U64 = NDArray[np.uint64]

# (node, table, keys, stamps, when): rows became visible; a single stamp counts for all keys.
Observer = Callable[[str, int, U64, U64 | int, float], None]

# Messages about members: as large for a small model as for a large one.
_ABOUT_MEMBERS = (m.Hello, m.Refusal, m.Heartbeat, m.RegisterIndex, m.MemberNews, m.Leave, m.SchemaUpdate)


@dataclass(frozen=True, slots=True)
class CostTable:
    """Nanoseconds of one core."""

    # For each message or event, whatever it holds.
    batch: float  # the machine's work on a batch: check, forward, claims
    call: float  # on any other message
    timer: float
    publish: float
    send: float  # envelope and socket, for each copy
    receive: float  # socket and decoding
    # For each row.
    apply_row: float
    check_row: float  # checksum and checks of a received batch or chunk
    encode_row: float  # header, checksum
    read_row: float
    scan_row: float  # of all rows held, when the update cache cannot answer
    walk_entry: float  # of the update cache, when it can
    select_row: float  # of the rows it answers with
    # For each shard.
    claim: float  # of a batch, at its receiver
    ask_shard: float  # vector of a pull request: copying it out
    answer_shard: float  # its use by who answers
    learn_shard: float  # merging the answer's vector
    digest_shard: float  # in each heartbeat about a model
    # For each shard of the model, in a round by shard versions (`p2p.paper.rounds`).
    begin_shard: float  # message 1 at who asks, with the choice of whom to ask
    versions_shard: float  # message 1 at who answers
    list_shard: float  # message 2
    wanted_shard: float  # message 3, besides `answer_shard`
    reply_shard: float  # message 4, the last chunk


COSTS = tuple(field.name for field in fields(CostTable))
# Paid once, whatever a message holds; everything else of the table is paid for each row or shard.
_ONCE = frozenset({"batch", "call", "timer", "publish", "send", "receive"})
_ROUND = {m.VersionsWanted: "versions_shard", m.VersionList: "list_shard", m.ShardsWanted: "wanted_shard"}


class VirtualCpus:
    """The CPUs of all nodes (`sim_cluster.turns.CpuModel`).

    Args:
        costs: measured.
        rows_per_row: how many rows one row stands for.
        cores: over which work for rows and shards is spread.
        observer: told of every row that is written, and when that is done.
    """

    def __init__(self, costs: CostTable, rows_per_row: float = 1.0, cores: int = 1, observer: Observer | None = None) -> None:
        self.rows_per_row = rows_per_row
        self.charging = True  # off while a cluster is set up
        self.busy_ms: dict[str, float] = {}  # by node
        self.spent_ms: dict[str, float] = {}  # of all nodes together, by name of the cost
        self._cost_ms = {name: getattr(costs, name) * (1.0 if name in _ONCE else rows_per_row / cores) / 1e6 for name in COSTS}
        self._observer = observer
        self._hosts: dict[str, MeteredHost] = {}
        self._node = ""
        self._ends_ms = 0.0
        self._asked = False  # the event at hand is a question about versions
        self._encoded: m.Message | None = None  # once for all of its receivers, who come one after the other

    # --- sim_cluster.turns.CpuModel

    def host(self, node: str, store: Store) -> Host:
        self._hosts[node] = MeteredHost(node, store, self)
        return self._hosts[node]

    def begin(self, node: str, start_ms: float) -> None:
        self._node, self._ends_ms = node, start_ms

    @property
    def ends_ms(self) -> float:
        return self._ends_ms

    def handling(self, event: m.Event) -> None:
        self._asked = isinstance(event, m.MessageReceived) and isinstance(event.message, m.VersionsWanted)
        match event:
            case m.MessageReceived(_, message):
                self.charge("receive")
                self._handling_message(message)
            case m.BatchReady():
                self.charge("claim", len(event.batch.claims.shards))
            case m.TimerFired():
                self.charge("timer")
            case m.PublishRequested():
                self.charge("publish")

    def _handling_message(self, message: m.Message) -> None:
        match message:
            case m.Batch():
                self.charge("batch")
                self.charge("check_row", _rows(message.columns))
            case m.PullReply():
                self.charge("call")
                self.charge("check_row", _rows(message.columns))
                self.charge("learn_shard", message.vector.size)
            case m.Heartbeat():
                self.charge("call")
                self.charge("digest_shard", sum(self._shards(summary.keyspace) for summary in message.summaries))
            case m.VersionsWanted() | m.VersionList() | m.ShardsWanted():
                self.charge("call")
                self.charge(_ROUND[type(message)], self._shards(message.keyspace))
            case m.ShardsReply():
                self.charge("call")
                self.charge("check_row", _rows(message.columns))
                self.charge("reply_shard", self._shards(message.keyspace) * message.last)
            case _:
                self.charge("call")

    def _shards(self, keyspace: int) -> int:
        replica = self._hosts[self._node].replicas.get(keyspace)
        return 0 if replica is None else replica.shards

    def sending(self, node: str, message: m.Message) -> None:
        self.charge("send")
        if message is self._encoded:
            return
        self._encoded = message
        match message:
            case m.Batch() if message.origin == node:
                self.charge("encode_row", _rows(message.columns))
                self.charge("claim", len(message.claims.shards))
            case m.PullReply() | m.ShardsReply():
                self.charge("encode_row", _rows(message.columns))
            case m.PullRequest():
                self.charge("ask_shard", message.vector.size)
            case m.VersionList() if not self._asked:  # a question that waited: looked at once more
                self.charge("versions_shard", self._shards(message.keyspace))
            case m.VersionsWanted():
                self.charge("begin_shard", self._shards(message.keyspace))

    def bytes_of(self, message: m.Message, frames: Sequence[bytes]) -> float:
        total = sum(map(len, frames))
        columns = 0 if isinstance(message, _ABOUT_MEMBERS) else min(total, _column_bytes(message))
        return columns + (total - columns) / self.rows_per_row

    # --- accounts

    def charge(self, kind: str, count: float = 1) -> None:
        """Let the node at work spend what `kind` costs, so often."""
        if not self.charging:
            return
        cost_ms = self._cost_ms[kind] * count
        self._ends_ms += cost_ms
        self.busy_ms[self._node] = self.busy_ms.get(self._node, 0.0) + cost_ms
        self.spent_ms[kind] = self.spent_ms.get(kind, 0.0) + cost_ms

    def written(self, node: str, columns: Sequence[RowColumns], stamp: int) -> None:
        """Rows were written; they are visible once the time that this takes has passed."""
        if self._observer is not None:
            for section in columns:
                stamps = stamp if section.stamps is None else section.stamps
                self._observer(node, section.table, section.keys, stamps, self._ends_ms)


class MeteredHost:
    """A node's store, which charges for what is asked of it (`p2p.replica.Host`)."""

    def __init__(self, node: str, store: Store, cpus: VirtualCpus) -> None:
        self._node = node
        self._store = store
        self._cpus = cpus
        self._metered: dict[int, MeteredReplica] = {}

    @property
    def replicas(self) -> Mapping[int, Replica]:
        for keyspace, replica in self._store.replicas.items():
            if keyspace not in self._metered:
                self._metered[keyspace] = MeteredReplica(self._node, cast(ModelStore, replica), self._cpus)
        return cast(Mapping[int, Replica], MappingProxyType(self._metered))

    def schema(self) -> list[SchemaEntry]:
        return self._store.schema()

    def adopt(self, entries: Sequence[SchemaEntry]) -> bool:
        return self._store.adopt(entries)


class MeteredReplica:
    """One model of it (`p2p.replica.Replica`); what costs nothing worth counting is passed on."""

    def __init__(self, node: str, model: ModelStore, cpus: VirtualCpus) -> None:
        self._node = node
        self._model = model
        self._cpus = cpus

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply(self, columns: Sequence[RowColumns], stamp: int) -> Applied:
        applied = self._model.apply(columns, stamp)
        self._cpus.charge("apply_row", _rows(columns))
        self._cpus.written(self._node, columns, stamp)
        return applied

    def read(self, table: int, slots: NDArray[np.int64]) -> RowColumns:
        self._cpus.charge("read_row", len(slots))
        return self._model.read(table, slots)

    def changed_since(self, base: U64) -> list[Selection]:
        misses = self._model.cache_stats().misses
        chosen = self._model.changed_since(base)
        if self._model.cache_stats().misses > misses:
            self._charge_scan()
        else:
            self._charge_walk(chosen)
        self._cpus.charge("answer_shard", self._model.shards)
        return chosen

    def scan_since(self, base: U64) -> list[Selection]:
        self._charge_scan()
        self._cpus.charge("answer_shard", self._model.shards)
        return self._model.scan_since(base)

    def stray_digest(self) -> int:
        self._charge_walk([])
        return self._model.stray_digest()

    def _charge_scan(self) -> None:
        self._cpus.charge("scan_row", sum(stats.rows + stats.tombstones for stats in self._model.table_stats().values()))

    def _charge_walk(self, chosen: Sequence[Selection]) -> None:
        self._cpus.charge("walk_entry", self._model.cache_stats().cached)
        self._cpus.charge("select_row", sum(len(selection.slots) for selection in chosen))


def _column_bytes(part: object) -> int:
    """Bytes of the arrays in a message: what grows with rows and shards."""
    if isinstance(part, np.ndarray):
        return part.nbytes
    if isinstance(part, tuple):
        return sum(_column_bytes(item) for item in part)
    if is_dataclass(part):
        return sum(_column_bytes(getattr(part, field.name)) for field in fields(part) if field.name != "body")
    return 0


def _rows(columns: Sequence[RowColumns]) -> int:
    return sum(len(section.keys) for section in columns)
