"""Scenarios of models that come and go and of aliases that are switched, with every fault at once; at the end all agree."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ekko.codec import encode
from ekko.generations import Generation
from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p.machine import Machine
from p2p.paper.sync import PUSH, SyncOptions
from p2p.replica import RowColumns
from sim_cluster.checkers import contents
from sim_cluster.node import VirtualNode
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import CALM, FAULTS, at_rest, form

OLD = ModelSpec("gen-1", 8, {"item": TableSpec("item", 4)})
NEW = ModelSpec("gen-2", 4, {"item": TableSpec("item", 2), "user": TableSpec("user", 3)}, partitions=2)


def told(cluster: VirtualCluster, name: str) -> None:
    """A node's schema was changed by its own operator or publisher."""
    node = cluster.nodes[name]
    assert node.machine is not None
    cluster.feed(node, node.machine, m.SchemaChanged())


def add(cluster: VirtualCluster, name: str, spec: ModelSpec) -> ModelSpec:
    """A publisher brings a model, as the incarnation that its name has by now."""
    store = cluster.nodes[name].store
    current = store.current(spec)
    store.add_model(current, asked=False)
    told(cluster, name)
    return current


def publish(cluster: VirtualCluster, name: str, model: str, keys: list[int], value: float) -> int:
    """A step of table `item`; 0 when it was refused."""
    held = cluster.nodes[name].store.models.get(model)
    if held is None:
        return 0
    spec, family = held.spec.tables["item"], held.spec.id
    rows = encode(spec.codec, np.full((len(keys), spec.dim), value, np.float32))
    columns = (RowColumns(spec.id, np.array(keys, np.uint64), rows),)
    reply = cluster.request(name, lambda number: m.PublishRequested(number, family, columns))
    return reply.stamp if isinstance(reply, m.Published) else 0


def drop(cluster: VirtualCluster, name: str, model: str) -> None:
    """An operator drops a model at a node that has it."""
    node = cluster.nodes[name]
    if model in node.store.models:
        node.store.drop_model(model, cluster.now_of(node).unix_ms)
        told(cluster, name)


def switch(cluster: VirtualCluster, name: str, alias: str, model: str | None) -> None:
    """An operator switches an alias at a node that has the model."""
    node = cluster.nodes[name]
    target = None if model is None else node.store.generation(model)
    if model is not None and target is None:
        return
    registers, now_ms = node.store.registers, cluster.now_of(node).unix_ms
    node.store.set_alias(registers.switched(alias, target, node.store.generation(alias), now_ms, cluster.now_ms))
    told(cluster, name)


def running(cluster: VirtualCluster) -> Iterator[tuple[VirtualNode, Machine]]:
    for node in cluster.nodes.values():
        assert node.machine is not None, f"seed {cluster.seed}: {node.name} is down: {node.fatal}"
        yield node, node.machine


def disagreement(cluster: VirtualCluster) -> str:
    """What nodes know differently of models, aliases and drops; empty: nothing."""
    schemas = {node.name: [(e.keyspace, e.name, e.body) for e in node.store.schema()] for node in cluster.nodes.values()}
    first, *others = schemas.items()
    for name, schema in others:
        if schema != first[1]:
            return f"{first[0]} and {name} differ in {sorted(set(schema) ^ set(first[1]))}"
    for node, machine in running(cluster):
        if left := sorted(kept_of(machine) - set(node.store.replicas)):
            return f"{node.name} keeps something of keyspaces {left}, which are gone"
        if set(machine._core.keyspaces) != set(node.store.replicas):
            return f"{node.name} replicates other keyspaces than it holds"
    return ""


def kept_of(machine: Machine) -> set[int]:
    """Every keyspace of which some part of a machine keeps something that is to go with it."""
    core, pull, push = machine._core, machine._pull, machine._push
    parts: list[Any] = [
        core.keyspaces,
        push._lingering,
        *(link.allowance._selections for link in core.links.values()),
        pull._asked,
        *(outbox.streams for outbox in pull.outboxes.values()),
        pull.answers._bases,
        pull.answers._held,
        *pull.answers._begun.values(),
        pull.round_answers._bases,
        pull.versions.by_keyspace,
        machine._schedule._freshest,
        machine._schedule._brought,
        pull.rounds._followed,
        [one.batch.keyspace for link in core.links.values() for one in link.waiting.batches],
        [question.keyspace for question, _ in machine._reach.questions.values()],
        [q.keyspace.replica.keyspace for wait in machine._reach.waits for q in wait.questions.values()],
        [key[2] for key in pull._seen],
        [key[1] for key in pull._pulled_ms],
        [key[0] for key in pull.rounds._lists],
        [key[0] for key in pull.rounds._rounds],
        [key[0] for key in pull.round_answers._held],
        [key[0] for key in push.adoption._given],
        [key[0] for key in push.adoption._told_ms],
        [key[0] for key in push.adoption._taken],
        [key[0] for key in machine._retirement._reports],
    ]
    return {number for part in parts for number in part}


def agree(cluster: VirtualCluster, limit_ms: int = 60_000) -> None:
    """Faults end; after a while nodes know the same, and hold the same of every model."""
    cluster.options = CALM
    cluster.cut.clear()
    found = cluster.run_until(lambda: not disagreement(cluster), limit_ms, 500)
    assert found, f"seed {cluster.seed}: {disagreement(cluster)}"
    at_rest(cluster, limit_ms)

    def equal() -> bool:
        models = next(iter(cluster.nodes.values())).store.models
        held = [{name: contents(node.store, name) for name in models} for node in cluster.nodes.values()]
        return all(one == held[0] for one in held)

    assert cluster.run_until(equal, limit_ms, 500), f"seed {cluster.seed}: rows differ"
    assert not disagreement(cluster)  # what came late meanwhile has changed nothing
    for node, machine in running(cluster):
        blamed = [reason for reason in node.rejected if "has no table with id" not in reason]  # whose schema comes later
        assert not blamed, f"seed {cluster.seed}: {node.name} blames a peer: {blamed}"
        assert machine.peers_known == len(cluster.nodes) - 1


def come_and_go(seed: int, sync: SyncOptions = PUSH) -> None:
    """Two generations are published, dropped, published anew under the same name; aliases are switched on any side; nodes are
    cut off, killed, started again with and without their memory, and messages are lost, repeated and late.
    """
    cluster = form(seed, FAULTS, sync=sync)
    cluster.run(5_000)
    names = list(cluster.nodes)
    rng = cluster._rng
    down: dict[str, int] = {}
    for step in range(120):
        up = [name for name in names if cluster.nodes[name].machine is not None]
        who, model = rng.choice(up), rng.choice([OLD, NEW])
        if cluster.nodes["t1"].machine is not None:
            if step % 9 == 0:
                add(cluster, "t1", model)
            for spec in (OLD, NEW):
                publish(cluster, "t1", spec.name, [(step * 5 + offset) % 60 for offset in range(1 + step % 7)], float(step))
            cluster.publish("t1", "item", [step % 30, 40 + step % 9], float(step))
        if step % 10 == 4:
            switch(cluster, who, rng.choice(["ctr", "gen-1"]), rng.choice([OLD.name, NEW.name, None]))
        if step % 14 == 11:
            drop(cluster, who, model.name)
        if step % 16 == 5:
            others = [name for name in names if name != who]
            cut = {pair for other in others for pair in ((who, other), (other, who))}
            cluster.cut |= cut
        if step % 16 == 13:
            cluster.cut.clear()
        if step % 12 == 7 and len(down) < 2:
            victim = rng.choice(names)
            if victim not in down and cluster.nodes[victim].machine is not None:
                cluster.crash(victim)
                down[victim] = step + 6
        for victim in [victim for victim, until in down.items() if until <= step]:
            del down[victim]
            cluster.restart(victim, keep_state=step % 5 != 0 or victim == "t1")
        cluster.run(rng.choice([20, 60, 150]))
    for victim in down:
        cluster.restart(victim)
    agree(cluster)


def away_while_it_was_dropped(seed: int) -> None:
    """Who was away brings nothing back; nor does what it had said and comes late, also to a model that has the name by then."""
    cluster = form(seed)
    cluster.run(5_000)
    add(cluster, "t1", OLD)
    cluster.run(1_000)
    for step in range(5):
        assert publish(cluster, "t1", "gen-1", [step, step + 10, step + 20], 1.0)
    cluster.run(2_000)
    cluster.crash("us3")
    drop(cluster, "eu1", "gen-1")
    cluster.run(seed % 700)  # before, or after, all have heard
    again = add(cluster, "eu1", OLD)
    assert again.incarnation == 1
    assert again.id != OLD.id
    cluster.run(500)
    cluster.restart("us3")
    agree(cluster)
    for node in cluster.nodes.values():
        assert node.store.generation("gen-1") == Generation("gen-1", 1)
        assert contents(node.store, "gen-1") == {}, f"seed {seed}: {node.name} holds rows of the one that was dropped"


def dropped_in_the_middle_of_a_pull(seed: int) -> None:
    """A node that has lost its memory pulls a model that is dropped meanwhile, at the answering side or at its own."""
    cluster = form(seed)
    cluster.run(5_000)
    add(cluster, "t1", OLD)
    cluster.run(1_000)
    for step in range(20):
        publish(cluster, "t1", "gen-1", list(range(step * 50, step * 50 + 50)), 1.0)
        cluster.run(10)
    cluster.run(2_000)
    cluster.crash("us3")
    cluster.restart("us3", keep_state=False)
    cluster.run(10 + seed % 60)
    drop(cluster, "us3" if seed % 2 and "gen-1" in cluster.nodes["us3"].store.models else "t1", "gen-1")
    agree(cluster)
    assert all("gen-1" not in node.store.models for node in cluster.nodes.values())


def both_sides_of_a_split(seed: int) -> None:
    """One side drops a model, the other switches an alias to it; two sides switch one alias to different models."""
    cluster = form(seed)
    cluster.run(5_000)
    for spec in (OLD, NEW):
        add(cluster, "t1", spec)
        cluster.run(500)
        publish(cluster, "t1", spec.name, [1, 2, 3], 1.0)
    switch(cluster, "t1", "ctr", "gen-1")
    cluster.run(2_000)
    inside = ["eu1", "eu2"]
    outside = [name for name in cluster.nodes if name not in inside]
    cluster.cut |= {pair for a in inside for b in outside for pair in ((a, b), (b, a))}
    cluster.run(500)
    switch(cluster, "eu1", "ctr", "gen-2")
    switch(cluster, "us1", "ctr", None)
    switch(cluster, "us1", "cvr", "gen-1")
    switch(cluster, "eu2", "cvr", "gen-2")
    switch(cluster, "eu2", "cvr", "gen-1")
    drop(cluster, "us2", "gen-2")
    cluster.run(1_000 + seed)
    agree(cluster)
    resolved = {tuple(node.store.registers.resolve(name) for name in ("ctr", "cvr")) for node in cluster.nodes.values()}
    assert len(resolved) == 1, f"seed {seed}: {resolved}"
    assert Generation("gen-2") not in next(iter(resolved)), f"seed {seed}: an alias stands for what was dropped"


TABLES = ModelSpec("gen-1", 8, {"item": TableSpec("item", 4), "user": TableSpec("user", 2)})


def publish_both(cluster: VirtualCluster, name: str, keys: list[int]) -> int:
    """A step of tables `item` and, where it is there, `user`, whose rows say which incarnation of it was meant."""
    model = cluster.nodes[name].store.models["gen-1"]
    columns = []
    for spec in model.spec.tables.values():
        rows = encode(spec.codec, np.full((len(keys), spec.dim), 1.0 + spec.incarnation, np.float32))
        columns.append(RowColumns(spec.id, np.array(keys, np.uint64), rows))
    reply = cluster.request(name, lambda number: m.PublishRequested(number, model.spec.id, tuple(columns)))
    return reply.stamp if isinstance(reply, m.Published) else 0


def drop_table(cluster: VirtualCluster, name: str) -> None:
    """An operator drops table `user` at a node that has it."""
    node = cluster.nodes[name]
    if "user" in node.store.models["gen-1"].spec.tables:
        node.store.drop_table("gen-1", "user", cluster.now_of(node).unix_ms)
        told(cluster, name)


def live_rows(node: VirtualNode, model: str, table: TableSpec) -> Iterator[tuple[int, int, list[float]]]:
    """Stamp, key and values of every live row of a table."""
    held = node.store.models[model].table(table.id)
    keys, data, stamps = held.read(held.scan(np.zeros(TABLES.shards * 4_096, np.uint64), TABLES.shards))
    for stamp, key, row in zip(stamps, keys, data, strict=False):
        yield int(stamp), int(key), row.view(np.float32).tolist()


def tables_come_and_go(seed: int) -> None:
    """Two trainers write two tables in steps of both; one of them is dropped at any node, and begun again by a trainer, while
    nodes are cut off, killed, and come back with or without their memory. Of each step the rows of the other table stay.
    """
    cluster = form(seed, FAULTS)
    cluster.add("t2", "eu", "train", ["t1"])
    cluster.run(6_000)
    add(cluster, "t1", TABLES)
    cluster.run(3_000)
    names, rng = list(cluster.nodes), cluster._rng
    written: dict[int, float] = {}
    for step in range(70):
        for trainer in ("t1", "t2"):
            key = step * 2 + (trainer == "t2")
            if cluster.nodes[trainer].machine is not None and publish_both(cluster, trainer, [key, key % 20]):
                written |= {key: 1.0, key % 20: 1.0}
        up = [name for name in names if cluster.nodes[name].machine is not None]
        if step % 10 == 3:
            drop_table(cluster, rng.choice(up))
        if step % 10 == 7 and "user" not in cluster.nodes["t1"].store.models["gen-1"].spec.tables:
            add(cluster, "t1", TABLES)
        if step % 14 == 5:
            who = rng.choice(names)
            cluster.cut = {pair for other in names if other != who for pair in ((who, other), (other, who))}
        if step % 14 == 11:
            cluster.cut.clear()
        if step % 20 == 9:
            cluster.crash("us3")
            cluster.run(100)
            cluster.restart("us3", keep_state=seed % 2 == 0)
        cluster.run(rng.choice([20, 60, 150]))
    agree(cluster)
    drop_table(cluster, "us1")
    cluster.run(1_000)
    last = add(cluster, "t1", TABLES).tables["user"]
    cluster.run(1_000)
    assert publish_both(cluster, "t2", [500, 501])
    agree(cluster)
    keys = np.array(sorted(written), np.uint64)
    for node in cluster.nodes.values():
        model = node.store.models["gen-1"]
        assert (model.lookup("item", keys)[0] == 1.0).all(), f"seed {seed}: {node.name} lacks rows of the table that stays"
        here = {key: row[0] for _, key, row in live_rows(node, "gen-1", last)}
        wanted = dict.fromkeys((500, 501), 1.0 + last.incarnation)
        assert here == wanted, f"seed {seed}: {node.name} has {here} in a table that was begun again"
