"""Verdicts in the virtual cluster: whoever judges, and whatever the network does, all nodes end in the same state."""

import random

import pytest

from ekko.health.verdicts import BLOCK_MS, Verdicts
from p2p import messages as m
from sim_cluster.node import VirtualNode
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import CALM, FAULTS, at_rest, form
from tests.seeds import seeds


def judge(cluster: VirtualCluster, name: str, rng: random.Random) -> None:
    """A node's detector says something of the last minutes, as it sees them."""
    node = cluster.nodes[name]
    if node.machine is None or node.paused:
        return
    now_ms = cluster.now_of(node).unix_ms
    known = node.store.facts.of(Verdicts)
    state = rng.choice(["healthy", "healthy", "uncertain", "corrupted"])
    begin_ms = now_ms - rng.randint(0, 2 * BLOCK_MS)
    new = known.note("ctr", state, begin_ms, now_ms, now_ms=now_ms, node=name, detector="test", text=state)
    told = node.store.facts.note(new)
    cluster.feed(node, node.machine, m.SchemaChanged(told))


def views(cluster: VirtualCluster) -> list[Verdicts]:
    return [node.store.facts.of(Verdicts) for node in cluster.nodes.values()]


@pytest.mark.parametrize("seed", seeds(1, 2))
def test_all_nodes_agree_after_losses_partitions_and_restarts(seed: int) -> None:
    cluster = form(seed)
    cluster.run(3_000)
    rng = random.Random(seed)
    cluster.options = FAULTS
    names = list(cluster.nodes)
    half = names[: len(names) // 2]
    cluster.cut = {(a, b) for a in names for b in names if (a in half) != (b in half)}
    for _ in range(12):
        judge(cluster, rng.choice(names), rng)
        cluster.run(rng.randint(50, 1_500))
    left, right = views(cluster)[0], views(cluster)[-1]
    assert left != right, "the split makes no difference: nothing is tested"
    cluster.crash(half[-1])
    cluster.cut = set()
    cluster.run(500)
    judge(cluster, names[0], rng)
    cluster.restart(half[-1])
    cluster.options = CALM
    cluster.run(20_000)
    at_rest(cluster)
    first, *others = views(cluster)
    assert all(other == first for other in others)
    assert first.merged(left).merged(right) is first, "nothing that was said is lost"
    assert len({node.store.facts.of(Verdicts).healthy_until("ctr") for node in cluster.nodes.values()}) == 1


def test_one_seed_gives_one_trace() -> None:
    def trace() -> str:
        cluster, rng = form(5), random.Random(5)
        for _ in range(5):
            judge(cluster, rng.choice(list(cluster.nodes)), rng)
            cluster.run(300)
        return cluster.trace

    assert trace() == trace()


def test_a_verdict_is_told_without_the_rest_of_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = form(2)
    cluster.run(10_000)
    told: list[int] = []
    transmit = cluster.post.transmit

    def note(sender: VirtualNode, address: str, envelope: m.Envelope, message: m.Message) -> bool:
        if isinstance(message, m.SchemaUpdate):
            told.append(len(message.entries))
        return transmit(sender, address, envelope, message)

    monkeypatch.setattr(cluster.post, "transmit", note)
    judge(cluster, "eu1", random.Random(0))
    entries = len(cluster.nodes["eu1"].store.schema())
    cluster.run(30)
    assert told
    assert told[0] < entries  # a heartbeat that meets another digest asks for all of it
