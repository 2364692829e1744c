"""The picture of a node at one moment, drawn from its parts; what it says is in `ekko.status`."""

from dataclasses import asdict, replace

from ekko.endpoint import REQUESTS_PENDING_MAX
from ekko.model import DENSE_DIM, DENSE_TABLE
from ekko.node.parts import Parts
from ekko.priority.delays import RowDelays
from ekko.status import ModelPicture, TablePicture
from ekko.store.hot import HeatStats
from ekko.store.model_store import ModelStore
from ekko.store.recent import CacheStats
from p2p.messages import Now
from p2p.status import KeyspaceStatus, NodeStatus, QueueStatus


def model_pictures(parts: Parts, protocol: NodeStatus, now: Now, delays: RowDelays) -> tuple[ModelPicture, ...]:
    """Every model that the protocol replicates."""
    keyspaces = {keyspace.keyspace: keyspace for keyspace in protocol.keyspaces}
    served = parts.served.models
    requests = sum(model.requests for model in served.values())
    return tuple(
        replace(
            _model_picture(
                model,
                served.get(model.spec.name, model),
                [keyspaces[n] for n in model.spec.keyspaces if n in keyspaces],
                now.unix_ms,
                requests,
            ),
            keyspaces=model.spec.keyspaces,
            priority=parts.publishing.priorities.picture(model),
            delays=delays.picture(model.spec.keyspaces),
        )
        for model in parts.store.models.values()
        if keyspaces.keys() & set(model.spec.keyspaces)
    )


def _model_picture(
    model: ModelStore, served: ModelStore, parts: list[KeyspaceStatus], unix_ms: int, requests: float
) -> ModelPicture:
    """What is to be said of a model, of whose held partitions there is a status each.

    `served` is what readers see of it; `requests`: of readers to all models.
    """
    synced_until_ms = min(part.synced_until_ms for part in parts)
    dims = {table.name: table.dim for table in model.spec.tables.values()} | {DENSE_TABLE: DENSE_DIM}
    stats, heat = model.table_stats(), served.heat
    return ModelPicture(
        model.spec.name,
        model.shards,
        model.spec.partitions,
        model.hold,
        all(part.synced for part in parts),
        max(0, unix_ms - synced_until_ms) if synced_until_ms else None,
        sum(part.open_steps for part in parts),
        sum(part.steps_dropped for part in parts),
        ", ".join(dict.fromkeys(part.pulling_from for part in parts if part.pulling_from)),
        model.spec.codec,
        tuple(
            TablePicture(
                name,
                dims[name],
                stat.rows,
                stat.tombstones,
                stat.bytes,
                stat.free_bytes,
                heat[name].stats() if name in heat else HeatStats(),
            )
            for name, stat in stats.items()
        ),
        tuple(model.spec.tensors.values()),
        model.memory_bytes,
        None if model.capacity is None else model.capacity.bytes,
        served.requests / requests if requests else 0.0,
        model.spec.id,
        incomplete_shards=int(model.incomplete.sum()),
        collection_held_up_by=tuple(dict.fromkeys(node for part in parts for node in part.collection_held_up_by)),
        held_up_ms=max((part.held_up_ms for part in parts), default=0),
        full_ms=max((part.full_ms for part in parts if part.full_ms is not None), default=None),
    )


def counters(parts: Parts) -> dict[str, int]:
    """Everything that is counted in one life of the node."""
    cache = cache_stats(parts)
    evictions = [model.eviction for model in parts.store.models.values() if model.eviction is not None]
    counted = asdict(parts.machine.counters)
    counted |= {f"transport_{name}": count for name, count in asdict(parts.transport.counters).items()}
    counted |= {"local_malformed": parts.endpoint.malformed, "local_unanswerable": parts.endpoint.unanswerable}
    counted |= {"cache_hits": cache.hits, "cache_misses": cache.misses}
    counted |= {"cache_pruned": cache.pruned, "cache_left_out": cache.left_out}
    counted |= {f"compression_{name}": count for name, count in asdict(parts.runtime.outgoing.counters).items()}
    counted |= {"peers_shut_out": parts.runtime.conduct.shut_outs, "shut_out_messages": parts.runtime.conduct.dropped}
    counted |= {"publishes_refused_full": parts.publishing.refused_full}
    counted |= {"rows_evicted": sum(one.evicted for one in evictions)}
    counted |= {"rows_refused_full": sum(one.refused for one in evictions)}
    counted |= {"keys_kept": 0 if parts.keys is None else parts.keys.kept}
    return counted


def queues(parts: Parts, protocol: NodeStatus) -> tuple[QueueStatus, ...]:
    """How full everything is that has a bound."""
    cache = cache_stats(parts)
    return (
        *protocol.queues,
        QueueStatus("local_requests", parts.endpoint.pending, REQUESTS_PENDING_MAX),
        QueueStatus("update_cache", cache.cached, cache.window),
        *(() if parts.delaying is None else (parts.delaying.queue(),)),
    )


def cache_stats(parts: Parts) -> CacheStats:
    """What the update caches of all models did and hold, together."""
    return sum((model.cache_stats() for model in parts.store.models.values()), CacheStats())
