"""The invariants of the protocol, checked on whole clusters; each returns the first violation in words, or an empty string.

Numbers are those of docs/ARCHITECTURE.md.
"""

import numpy as np

from ekko.store import Store
from p2p.stamps import WRITERS_MAX, writer_of
from sim_cluster.virtual import VirtualCluster, VirtualNode

Row = tuple[int, bytes]  # stamp, value; a tombstone has no value
Contents = dict[tuple[int, int], Row]  # (table, key) -> row


def contents(store: Store, model: str) -> Contents:
    """Every row version a store holds of a model."""
    replica = store.models[model]
    found: Contents = {}
    for selection in replica.changed_since(np.zeros((replica.shards, WRITERS_MAX), np.uint64)):
        columns = replica.read(selection.table, selection.slots)
        assert columns.stamps is not None
        for index, (key, stamp) in enumerate(zip(columns.keys.tolist(), columns.stamps.tolist(), strict=True)):
            value = columns.rows[index].tobytes() if index < len(columns.rows) else b""
            found[columns.table, key] = (stamp, value)
    return found


def check_knowledge(cluster: VirtualCluster, node: VirtualNode) -> str:
    """Invariant 3: what a vector claims is held, in that version or a newer one."""
    replica = node.store.models[cluster.model.name]
    held = contents(node.store, cluster.model.name)
    for write in cluster.history:
        shard = int(replica.shards_of(np.array([write.key], np.uint64))[0])
        claimed = int(replica.vector[shard, writer_of(write.stamp)]) >= write.stamp
        frontier = int(replica.frontier[writer_of(write.stamp)]) >= write.stamp
        stamp = held.get((cluster.model.tables[write.table].id, write.key), (0, b""))[0]
        if (claimed or frontier) and stamp < write.stamp:
            return f"{node.name} claims {write} but holds stamp {stamp}"
    return ""


def check_converged(cluster: VirtualCluster) -> str:
    """Invariant 2: at rest, all live nodes hold the newest acknowledged version of every row."""
    newest: dict[tuple[int, int], int] = {}
    for write in cluster.history:
        key = (cluster.model.tables[write.table].id, write.key)
        newest[key] = max(newest.get(key, 0), write.stamp)
    reference: tuple[str, Contents] | None = None
    for node in cluster.nodes.values():
        if node.machine is None:
            continue
        held = contents(node.store, cluster.model.name)
        for key, stamp in newest.items():
            if held.get(key, (0, b""))[0] < stamp:
                return f"{node.name} holds {held.get(key)} of {key}, newest is {stamp}"
        if reference is not None and held != reference[1]:
            different = sorted(set(held.items()) ^ set(reference[1].items()))[:2]
            return f"{node.name} and {reference[0]} differ: {different}"
        reference = (node.name, held)
    return ""


class StampWatch:
    """Invariant 1: a row's stamp never goes down on a node that keeps its memory."""

    def __init__(self) -> None:
        self._high: dict[tuple[str, int], Contents] = {}

    def check(self, cluster: VirtualCluster) -> str:
        """Compare every node with what it held at the last check."""
        for node in cluster.nodes.values():
            held = contents(node.store, cluster.model.name)
            before = self._high.get((node.name, id(node.store)), {})
            for key, (stamp, _) in before.items():
                if held.get(key, (0, b""))[0] < stamp:
                    return f"{node.name}: {key} went from {stamp} to {held.get(key)}"
            self._high[node.name, id(node.store)] = held
        return ""
