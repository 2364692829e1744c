"""What must hold of a fenced model (`p2p.identity.fence`), on whole clusters, at every moment from when somebody says that it
is closed.

Above what is left of the stopped writers there is nothing anywhere but what was restored; and as long as nothing was, all nodes
that know of the fence hold the same.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.codec import encode
from ekko.model import ModelSpec
from p2p import messages as m
from p2p.identity.ledger import NodeRecord
from p2p.messages.fences import CLOSED, LIFTED
from p2p.replica import RowColumns
from p2p.stamps import WRITERS_MAX, writer_of
from sim_cluster.checkers import contents
from sim_cluster.history import Write
from sim_cluster.node import VirtualNode
from sim_cluster.virtual import VirtualCluster

U64 = NDArray[np.uint64]


# A node that is to be killed in the middle of a fence does so many things at most before.
STEPS_MAX = 60


def begin(cluster: VirtualCluster, node: VirtualNode, amount: int) -> None:
    """A model is fenced at a node, which may be killed while it brings that about."""
    model = _model_of(cluster, amount)
    cluster.ask(node.name, lambda number: m.FenceRequested(number, model.id, note="a swarm"))
    if amount % 2 and node.fuse is None and node.machine is not None:
        cluster.kill_within(node.name, 1 + amount % STEPS_MAX)


def go_on(cluster: VirtualCluster, amount: int) -> None:
    """Somebody who knows that the fence is closed writes some rows back."""
    model = _model_of(cluster, amount)
    for node in cluster.nodes.values():
        fence = None if node.machine is None or node.paused else node.machine.fence_of(model.id)
        if fence is None or fence.stage != CLOSED or node.role != "train":
            continue
        table = model.tables["item"]
        keys = np.arange(amount % 7, dtype=np.uint64)
        rows = encode(table.codec, np.full((len(keys), table.dim), -float(fence.epoch), np.float32))
        columns, epoch = (RowColumns(table.id, keys, rows),), fence.epoch
        request = cluster.ask(node.name, lambda n: m.PublishRequested(n, model.id, columns, through_fence=epoch))  # noqa: B023
        reply = node.replies.get(request)
        if isinstance(reply, m.Published):
            cluster.history += [Write("item", key, reply.stamp, False, -float(epoch), model.name) for key in keys.tolist()]
        return


def end(cluster: VirtualCluster) -> None:
    """Whoever knows of a fence that stands lifts it."""
    for node in cluster.nodes.values():
        for model in cluster.models.values():
            fence = None if node.machine is None or node.paused else node.machine.fence_of(model.id)
            if fence is not None and fence.stage != LIFTED:
                family, epoch = model.id, fence.epoch
                cluster.ask(node.name, lambda number: m.LiftRequested(number, family, epoch))  # noqa: B023


def _model_of(cluster: VirtualCluster, amount: int) -> ModelSpec:
    return list(cluster.models.values())[amount % len(cluster.models)]


def check_fences(cluster: VirtualCluster) -> str:
    """The first violation in words, or an empty string."""
    records = {node.name: NodeRecord.load(node.ledger) for node in cluster.nodes.values() if node.machine is not None}
    for name, model in cluster.models.items():
        fences = [fence for record in records.values() if (fence := record.fence(model.id)) is not None]
        last = max(fences, key=lambda fence: (fence.epoch, fence.stage), default=None)
        if last is None or last.stage != CLOSED:
            continue  # none, or it is closing, or some write again
        restorers = {(one.writer, one.nonce, one.since) for one in (*last.restorers, *(r for f in fences for r in f.restorers))}
        knowing = [
            cluster.nodes[node]
            for node, record in records.items()
            if (fence := record.fence(model.id)) is not None and fence.epoch == last.epoch
        ]
        floors = _floors(cluster, name, records)
        for node in knowing:
            if problem := _above(cluster, node, name, floors, {(writer, since) for writer, _, since in restorers}):
                return problem
        if problem := _written(cluster, name, last, {writer for writer, _, _ in restorers}):
            return problem
        if not restorers and (problem := _different(cluster, knowing, name)):
            return problem
    return ""


def _floors(cluster: VirtualCluster, name: str, records: dict[str, NodeRecord]) -> dict[tuple[int, int], U64]:
    """(keyspace, writer) -> uint64[shards of the keyspace]: the most that was left of anybody who wrote under this id."""
    floors: dict[tuple[int, int], U64] = {}
    for record in records.values():
        for one in record.retired.values():
            if one.family == cluster.models[name].id and len(one.floor):
                known = floors.get((one.keyspace, one.writer))
                floors[one.keyspace, one.writer] = one.floor if known is None else np.maximum(known, one.floor)
    return floors


def _above(
    cluster: VirtualCluster,
    node: VirtualNode,
    name: str,
    floors: dict[tuple[int, int], U64],
    restorers: set[tuple[int, int]],
) -> str:
    for replica in node.store.replicas.values():
        if replica.place.family != cluster.models[name].id:
            continue
        for selection in replica.scan_since(np.zeros((replica.shards, WRITERS_MAX), np.uint64)):
            rows = replica.read(selection.table, selection.slots)
            assert rows.stamps is not None
            shards = replica.shards_of(rows.keys).tolist()
            for key, stamp, shard in zip(rows.keys.tolist(), rows.stamps.tolist(), shards, strict=True):
                floor = floors.get((replica.keyspace, writer_of(stamp)))
                left = 0 if floor is None else int(floor[shard])
                if stamp > left and not any(writer == writer_of(stamp) and stamp > since for writer, since in restorers):
                    return f"{node.name} holds {stamp} of key {key}, and {left} was left of its writer behind the fence"
    return ""


def _written(cluster: VirtualCluster, name: str, fence: m.Fence, restorers: set[int]) -> str:
    for write in cluster.history:
        if write.model == name and write.stamp > fence.stamp and writer_of(write.stamp) not in restorers:
            return f"a step was stored behind the fence of epoch {fence.epoch}: {write}"
    return ""


def _caught_up(cluster: VirtualCluster, node: VirtualNode) -> bool:
    return node.machine is not None and node.machine.status(cluster.now_of(node)).synced


def _different(cluster: VirtualCluster, nodes: list[VirtualNode], name: str) -> str:
    """Between nodes that hold the same partitions; tombstones may be gone at some."""
    held = [
        (node, node.store.models[name].hold, {key: row for key, row in contents(node.store, name).items() if row[1]})
        for node in nodes
        if name in node.store.models and not node.store.models[name].incomplete.any() and _caught_up(cluster, node)
    ]
    for node, hold, rows in held:
        for other, its_hold, its_rows in held:
            if hold == its_hold and rows != its_rows:
                different = sorted(set(rows.items()) ^ set(its_rows.items()))[:2]
                return f"{node.name} and {other.name} differ behind the fence: {different}"
    return ""


def lifted_everywhere(cluster: VirtualCluster) -> str:
    """Who still knows of a fence that stands, or that others do not know; empty: nobody."""
    known: dict[tuple[int, int], m.Fence] | None = None
    for node in cluster.nodes.values():
        fences = NodeRecord.load(node.ledger).fences
        for model in cluster.models.values():
            last = max((one for one in fences.values() if one.family == model.id), key=lambda one: one.epoch, default=None)
            if last is not None and last.stage != LIFTED:
                return f"{node.name} takes {model.name} for fenced"
        if known is not None and known != fences:
            return f"{node.name} knows of other fences than others do"
        known = fences
    return ""
