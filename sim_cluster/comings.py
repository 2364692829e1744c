"""Models that come and go in a swarm, and aliases that are switched: a fault that is none, at any node and any moment.

Beside the models of the scenario, whose rows the checkers follow, there are some that live for a while. Of these it is checked
that in the end all nodes have the same of them, that aliases stand for the same everywhere, and that nothing came back.
"""

import numpy as np

from ekko.codec import encode
from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p.replica import RowColumns
from p2p.versions import FIRST_VERSION
from sim_cluster.node import VirtualNode
from sim_cluster.virtual import VirtualCluster

# Few, so that names are used again, and again.
NAMES = 2
ALIAS = "serving"
ROWS = 40


def understood(cluster: VirtualCluster) -> bool:
    """Whether no node speaks version 1, which knows neither drops nor aliases: operators upgrade first."""
    return all(node.protocol_version > FIRST_VERSION for node in cluster.nodes.values())


def begin(cluster: VirtualCluster, node: VirtualNode, amount: int) -> None:
    """A model is begun at a node, or what there is of the name is gone on with; it is written, and an alias switched to it."""
    # Of the same name, all have the same schema: two publishers that begin one differently on two sides of a split are a clash,
    # which a person has to settle.
    name = _name_of(amount)
    store = node.store
    spec = store.current(ModelSpec(name, 4, {"item": TableSpec("item", 2)}))
    store.add_model(spec, asked=False)
    _tell(cluster, node)
    if node.role == "train" and node.machine is not None:
        keys = np.arange(amount % ROWS + 1, dtype=np.uint64)
        rows = encode("float32", np.full((len(keys), 2), float(amount), np.float32))
        columns = (RowColumns(spec.tables["item"].id, keys, rows),)
        cluster.ask(node.name, lambda number: m.PublishRequested(number, spec.id, columns))
    if amount // NAMES % 2 and node.machine is not None:
        _switch(cluster, node, name, amount)


def end(cluster: VirtualCluster, amount: int) -> None:
    """Somebody who has the model drops it; nobody may have it any more, or nobody be there."""
    name = _name_of(amount)
    for node in cluster.nodes.values():
        if node.machine is None or node.paused or name not in node.store.models or not understood(cluster):
            continue
        if amount % 3 == 0:
            _switch(cluster, node, None, amount)
        if node.machine is not None:
            node.store.drop_model(name, cluster.now_of(node).unix_ms)
            _tell(cluster, node)
        return


def disagreement(cluster: VirtualCluster) -> str:
    """What nodes that run know differently of models, aliases and drops; empty: nothing."""
    live = [node for node in cluster.nodes.values() if node.machine is not None]
    for node in live:
        if node.store.schema() != live[0].store.schema():
            differ = set(node.store.schema()) ^ set(live[0].store.schema())
            return f"{node.name} and {live[0].name} know different things of {sorted(entry.name for entry in differ)}"
    return ""


def _name_of(amount: int) -> str:
    return f"passing-{amount % NAMES}"


def _switch(cluster: VirtualCluster, node: VirtualNode, name: str | None, amount: int) -> None:
    target = None if name is None else node.store.generation(name)
    now_ms = cluster.now_of(node).unix_ms
    node.store.set_alias(node.store.registers.switched(ALIAS, target, node.store.generation(ALIAS), now_ms, amount))
    _tell(cluster, node)


def _tell(cluster: VirtualCluster, node: VirtualNode) -> None:
    """The node says what it has now. A kill that waits for it may strike meanwhile: afterwards it may have no machine."""
    if node.machine is not None:
        cluster.feed(node, node.machine, m.SchemaChanged())
