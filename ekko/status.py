"""One picture of a node at one moment: what `/status`, `/metrics` and `ekko status` are drawn from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ekko.companions.picture import ServerPicture, SinkPicture
from ekko.device.picture import DevicePicture
from ekko.health.service import ModelHealth
from ekko.loading import LoadPicture
from ekko.model import TensorSpec
from ekko.priority.delays import DelaysPicture
from ekko.priority.picture import PriorityPicture
from ekko.snapshots.service import SnapshotPicture
from ekko.store.hot import HeatStats
from p2p import messages as m
from p2p.status import NodeStatus, PeerStatus, QueueStatus

NOT_READ = HeatStats()


@dataclass(frozen=True, slots=True)
class TablePicture:
    """One table, `_dense` included."""

    name: str
    dim: int
    rows: int
    tombstones: int
    bytes: int  # of shared memory
    free_bytes: int = 0  # of those, free slots, which later rows of this table get
    heat: HeatStats = NOT_READ  # what readers asked for


@dataclass(frozen=True, slots=True)
class ModelPicture:
    """One model on this node."""

    name: str
    shards: int
    partitions: int
    hold: tuple[int, ...]  # those that are here
    synced: bool
    staleness_ms: int | None  # None: no live writer is known, or nothing of one has come
    open_steps: int  # steps of which a part or a predecessor is missing
    steps_dropped: int
    pulling_from: str  # node ids; empty: not pulling
    codec: str  # of its tables; `_dense` is float32
    tables: tuple[TablePicture, ...]
    tensors: tuple[TensorSpec, ...]
    bytes: int  # of shared memory, the header included
    capacity_bytes: int | None = None  # what it may take; None: no limit
    request_share: float = 0.0  # of all keys that readers of this node asked for
    family: int = 0  # the model's id
    collection_held_up_by: tuple[str, ...] = ()  # members that have not said that they know of what was deleted
    held_up_ms: int = 0  # for how long
    incomplete_shards: int = 0  # of which this node dropped live rows, for want of room
    keyspaces: tuple[int, ...] = ()
    priority: PriorityPicture | None = None  # None: nothing of it was published here in this life
    delays: Mapping[str, DelaysPicture] = field(default_factory=dict)  # of rows, by kind
    full_ms: int | None = None  # for how long rows have been lacking for which shared memory had no room; None: none are

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables)


@dataclass(frozen=True, slots=True)
class NodePicture:
    """The whole node. `counters` only ever grow; `rejected` counts dropped messages by sender."""

    version: str
    address: str
    run_dir: str
    uptime_s: float
    resumed: bool
    waiting_for: tuple[str, ...]
    protocol: NodeStatus
    models: tuple[ModelPicture, ...]
    queues: tuple[QueueStatus, ...]
    counters: Mapping[str, int]
    rejected: Mapping[str, int]
    leftover_bytes: int = 0  # of shared memory that dead nodes of this machine left behind
    snapshots: SnapshotPicture | None = None
    load: LoadPicture | None = None
    aliases: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # name -> what it stands for
    rates: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # pair of regions -> what updates may use of it
    health: tuple[ModelHealth, ...] = ()
    rollbacks: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # model -> the one that counts
    delayed: Mapping[str, Any] | None = None  # the older state of a baseline or witness
    device: DevicePicture | None = None  # rows on a GPU, or its twin
    server: ServerPicture | None = None  # the parameter server beside a training node
    sinks: tuple[SinkPicture, ...] = ()  # foreign stores that processes beside the node keep

    @property
    def ready(self) -> bool:
        return not self.waiting_for

    def to_json(self) -> dict[str, object]:
        """What GET /status answers; 64-bit ids are hexadecimal text, since JSON readers round large numbers."""
        protocol = self.protocol
        return {
            "node": {
                "id": protocol.node,
                "region": protocol.region,
                "role": protocol.role,
                "address": self.address,
                "run_dir": self.run_dir,
                "version": self.version,
                "protocol_version": protocol.protocol_version,
                "boot": f"{protocol.boot:016x}",
                "cluster": f"{protocol.cluster:016x}",
                "uptime_s": round(self.uptime_s, 3),
                "resumed": self.resumed,
            },
            "ready": self.ready,
            "waiting_for": list(self.waiting_for),
            "synced": protocol.synced,
            "members": [
                {
                    "node": protocol.node,
                    "region": protocol.region,
                    "role": protocol.role,
                    "address": self.address,
                    "alive": True,
                    "hold": {model.name: list(model.hold) for model in self.models if model.partitions > 1},
                },
                *(self._member_json(peer) for peer in protocol.peers),
            ],
            "models": {
                model.name: {
                    **_model_json(model),
                    "fence": next((_fence_json(one) for one in protocol.fences if one.family == model.family), None),
                }
                for model in self.models
            },
            "aliases": {name: dict(alias) for name, alias in self.aliases.items()},
            "delayed": None if self.delayed is None else dict(self.delayed),
            "device": None if self.device is None else self.device.to_json(),
            "server": None if self.server is None else self.server.to_json(),
            "sinks": {sink.name: sink.to_json() for sink in self.sinks},
            "rates": {pair: dict(rate) for pair, rate in self.rates.items()},
            "health": {one.model.name: one.to_json() for one in self.health},
            "rollbacks": dict(self.rollbacks),
            "peers": [{key: value for key, value in asdict(peer).items() if key != "holds"} for peer in protocol.peers],
            "queues": [asdict(queue) for queue in self.queues],
            "counters": dict(self.counters),
            "rejected": dict(self.rejected),
            "leftover_bytes": self.leftover_bytes,
            "snapshots": None if self.snapshots is None else asdict(self.snapshots),
            "load": None if self.load is None else asdict(self.load),
        }

    def _member_json(self, peer: PeerStatus) -> dict[str, object]:
        """Another node, and what it holds of models that are divided."""
        names = {model.family: model.name for model in self.models}
        return {
            "node": peer.node,
            "region": peer.region,
            "role": peer.role,
            "address": peer.address,
            "alive": peer.alive,
            "hold": {names[one.family]: list(one.held) for one in peer.holds if one.family in names},
        }


def _fence_json(fence: m.Fence) -> dict[str, object]:
    return {"epoch": fence.epoch, "stage": ("closing", "closed", "lifted")[fence.stage], "note": fence.note}


def _model_json(model: ModelPicture) -> dict[str, object]:
    return {
        "shards": model.shards,
        "partitions": model.partitions,
        "hold": list(model.hold),
        "synced": model.synced,
        "staleness_ms": model.staleness_ms,
        "open_steps": model.open_steps,
        "steps_dropped": model.steps_dropped,
        "pulling_from": model.pulling_from,
        "codec": model.codec,
        "rows": model.rows,
        "bytes": model.bytes,
        "free_bytes": sum(table.free_bytes for table in model.tables),
        "capacity_bytes": model.capacity_bytes,
        "request_share": round(model.request_share, 6),
        "collection_held_up_by": list(model.collection_held_up_by),
        "held_up_ms": model.held_up_ms,
        "incomplete_shards": model.incomplete_shards,
        "memory_full_ms": model.full_ms,
        "priority": None if model.priority is None else asdict(model.priority),
        "row_delays": {kind: asdict(one) for kind, one in model.delays.items()},
        "tables": {
            table.name: {
                "dim": table.dim,
                "rows": table.rows,
                "tombstones": table.tombstones,
                "bytes": table.bytes,
                "free_bytes": table.free_bytes,
                "reads": {
                    "lookups": table.heat.lookups,
                    "keys": table.heat.keys,
                    "absent": table.heat.misses,
                    "recent_keys": round(table.heat.requests),
                    "counted_by": table.heat.counted_by,
                    "bytes": table.heat.bytes,
                },
            }
            for table in model.tables
        },
        "tensors": {tensor.name: {"shape": list(tensor.shape), "dtype": tensor.dtype} for tensor in model.tensors},
    }
