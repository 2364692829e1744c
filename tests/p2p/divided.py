"""Scenarios of clusters whose nodes hold some partitions each; every one raises AssertionError on the first violation."""

from collections.abc import Mapping, Sequence
from unittest import mock

import numpy as np

from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p import wire
from p2p.pulling import outbox
from sim_cluster.checkers import Watch, check_converged, check_knowledge
from sim_cluster.meter import Meter
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import CALM, FAULTS, disturb

PARTITIONS = 3
SPEC = ModelSpec("ctr", 9, {"item": TableSpec("item", 4), "user": TableSpec("user", 2)}, partitions=PARTITIONS)
# node -> (region, what it holds). No region but the trainer's holds partition 2 twice, and `ap` does not hold it at all.
NODES: Mapping[str, tuple[str, Sequence[int]]] = {
    "t1": ("home", (0, 1, 2)),
    "eu1": ("eu", (0, 1)),
    "eu2": ("eu", (1, 2)),
    "eu3": ("eu", (0,)),
    "us1": ("us", (0, 2)),
    "us2": ("us", (0, 1)),
    "ap1": ("ap", (0, 1)),
}


def form(seed: int, options: NetworkOptions = CALM) -> VirtualCluster:
    """Start the nodes; they have yet to meet."""
    cluster = VirtualCluster(seed, options, SPEC)
    for name, (region, hold) in NODES.items():
        role, seeds = ("train", []) if name == "t1" else ("serve", ["t1"])
        cluster.add(name, region, role, seeds, hold={"ctr": hold})
    return cluster


def keys_in(cluster: VirtualCluster, partition: int, count: int = 12) -> list[int]:
    """Some keys of a partition."""
    keys = np.arange(400, dtype=np.uint64)
    belongs = next(iter(cluster.nodes.values())).store.models["ctr"].partition_of(keys)
    return [int(key) for key in keys[belongs == partition][:count]]


def at_rest(cluster: VirtualCluster, limit_ms: int = 60_000) -> None:
    """Wait until nothing differs any more among the holders of each partition, then check what everybody claims."""
    assert cluster.run_until(lambda: check_converged(cluster) == "", limit_ms), check_converged(cluster)
    for node in cluster.nodes.values():
        assert check_knowledge(cluster, node) == "", f"seed {cluster.seed}, {cluster.now_ms} ms"


def nothing_goes_wrong(seed: int) -> None:
    """Each row of a batch goes once to each holder of its partition, once into a region, and to nobody else (R22)."""
    cluster = form(seed, NetworkOptions(region_delay_ms=30))
    cluster.run(5_000)
    meter = cluster.meter = Meter()
    before = {name: node.machine.counters.pulls_started for name, node in cluster.nodes.items() if node.machine}
    for step in range(20):
        assert cluster.publish("t1", "item", range(step, step + 30), float(step))
        cluster.run(100)
    cluster.run(1_000)
    at_rest(cluster, 0)
    twice = [place for place, times in meter.into_region.items() if times > 1]
    assert not twice, f"seed {seed}: entered a region twice: {twice[:3]}"
    for name, node in cluster.nodes.items():
        assert node.machine is not None
        counters = node.machine.counters
        assert counters.batches_unknown == 0, f"seed {seed}: {name} was sent what it does not hold"
        assert counters.batches_repeated == 0, f"seed {seed}: batches came twice to {name}"
        assert counters.pulls_started == before[name], f"seed {seed}: {name} had to pull"
        (keyspace, *_) = node.machine.status(cluster.now()).keyspaces
        age_ms = cluster.now().unix_ms - keyspace.synced_until_ms
        assert age_ms < 1_000, f"seed {seed}: {name} believes that it is {age_ms} ms behind"


def news_is_lost_while_nodes_meet(seed: int) -> None:
    """A hello does not say what a node holds: whom the news after it did not reach has to hear of it all the same (R22)."""
    cluster = form(seed, NetworkOptions(loss_probability=0.7))
    cluster.run(4_000)
    cluster.options = CALM
    cluster.run(20_000)
    for name, node in cluster.nodes.items():
        assert node.machine is not None
        peers = node.machine.status(cluster.now()).peers
        told = {peer.node: next((one.held for one in peer.holds), None) for peer in peers}
        assert told == {other: held for other, (_, held) in NODES.items() if other != name}, f"seed {seed}: {name} knows {told}"


def waits_go_by_the_holders(seed: int) -> None:
    """R21: a wait ends when all live holders of what its step touched have it: not before, and whatever others do."""
    cluster = form(seed)
    cluster.run(5_000)

    def wait(stamp: int) -> int:
        return cluster.ask("t1", lambda number: m.WaitRequested(number, SPEC.id, stamp, m.Scope.ALL, 3_000))

    replies = cluster.nodes["t1"].replies
    cluster.pause("eu3")  # holds partition 0 alone
    elsewhere = wait(cluster.publish("t1", "item", keys_in(cluster, 1) + keys_in(cluster, 2), 1.0))
    cluster.run(1_000)
    assert replies.get(elsewhere) == m.WaitEnded(elsewhere, ()), f"seed {seed}: {replies.get(elsewhere)}"
    there = wait(cluster.publish("t1", "item", keys_in(cluster, 0), 2.0))
    cluster.run(1_000)
    assert there not in replies, f"seed {seed}: a wait did not count a holder"
    cluster.resume("eu3")
    cluster.run(1_500)
    assert replies.get(there) == m.WaitEnded(there, ()), f"seed {seed}: {replies.get(there)}"


def chaos(seed: int) -> None:
    """Loss, repeats, reordering, crashes with and without memory, while messages are cut small."""
    with mock.patch.object(wire, "BATCH_BYTES_MAX", 150), mock.patch.object(outbox, "CHUNK_BYTES_MAX", 300):
        cluster = form(seed, FAULTS)
        watch = Watch(cluster)
        cluster.run(3_000)
        for step in range(60):
            if cluster.nodes["t1"].machine is not None:
                keys = [(step * 7 + offset) % 80 for offset in range(1 + step * 5 % 37)]  # also several messages a partition
                cluster.publish("t1", "item" if step % 3 else "user", keys, float(step), delete=step % 11 == 0)
            disturb(cluster, step, seed)
            if step == 35:
                cluster.crash("eu2")
                cluster.restart("eu2", keep_state=seed % 3 == 0)
            cluster.run(60)
            problem = watch.check()
            assert problem == "", f"seed {seed}, {cluster.now_ms} ms: {problem}"
        cluster.options = CALM
        at_rest(cluster)
        assert watch.check_converged() == ""


def the_only_other_holder_is_no_neighbour(seed: int) -> None:
    """Of many nodes two hold a partition. One lacks what its writer, now gone, told the other: they must find each other."""
    cluster = VirtualCluster(seed, CALM, ModelSpec("ctr", 40, {"item": TableSpec("item", 4)}, partitions=20))
    cluster.add("t1", "home", "train")
    for number in range(40):
        cluster.add(f"n{number}", "eu" if number % 2 else "us", seeds=["t1"], hold={"ctr": [number // 2]})
    cluster.run(5_000)
    for partition in range(20):
        cluster.cut.add(("t1", f"n{2 * partition}"))
    assert cluster.publish("t1", "item", range(300), 1.0)
    cluster.run(100)
    cluster.crash("t1")
    cluster.run(30_000)
    del cluster.nodes["t1"]
    assert check_converged(cluster) == "", f"seed {seed}: {check_converged(cluster)}"


def a_partition_is_held_more_often(seed: int) -> None:
    """A node that holds more after a restart has it when it says so, and takes part from then on."""
    cluster = form(seed)
    cluster.run(5_000)
    assert cluster.publish("t1", "item", range(100), 1.0)
    cluster.run(500)
    cluster.crash("eu3")
    cluster.nodes["eu3"].hold = {"ctr": (0, 2)}
    cluster.restart("eu3")
    machine = cluster.nodes["eu3"].machine
    assert machine is not None
    assert not machine.status(cluster.now()).synced
    assert cluster.run_until(lambda: machine.status(cluster.now()).synced, 10_000)
    assert check_converged(cluster) == "", f"seed {seed}: {check_converged(cluster)}"
    cluster.run(2_000)
    assert cluster.publish("t1", "item", range(50, 150), 2.0)
    cluster.run(300)
    at_rest(cluster, 0)
