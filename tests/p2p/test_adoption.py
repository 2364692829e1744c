"""A busy origin hands children over to each other; what waits for credit waits in order."""

import numpy as np
import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p.busy import state_mode
from p2p.errors import RemoteProtocolError
from p2p.link import links
from p2p.members.trees import TREE_ARITY
from p2p.pushing import adoption, push
from p2p.pushing.waiting import WAITING_MESSAGES_MAX, WaitingBatch, WaitingLine
from sim_cluster.checkers import Watch
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster

REGIONS = 12
CALM = NetworkOptions(1, 1, region_delay_ms=20)
# Eleven copies of a step are 250 kB, and ten steps a second are three times what the card carries.
CARD = NetworkOptions(1, 1, region_delay_ms=20, card_bytes_per_ms=800.0)
CREDIT = 40_000
STEPS = 40
EVERY_MS = 100


def cluster_of_regions(version: int = 2) -> VirtualCluster:
    """A trainer and one node in each of eleven other regions; those with odd numbers speak this version."""
    cluster = VirtualCluster(1, CALM, ModelSpec("ctr", 16, {"item": TableSpec("item", 32)}))
    for number in range(REGIONS):
        seeds, spoken = (["n0"] if number else []), (version if number % 2 else 2)
        cluster.add(f"n{number}", f"r{number}", "serve" if number else "train", seeds, protocol_version=spoken)
    machines = [node.machine for node in cluster.nodes.values()]
    assert cluster.run_until(lambda: all(one is not None and one.peers_known == REGIONS - 1 for one in machines))
    cluster.run(2_000)
    return cluster


def late_ms(cluster: VirtualCluster) -> int:
    """Publish faster than one card can carry to everybody; how much later than the last step everybody has all of them."""
    cluster.options = CARD
    watch = Watch(cluster)
    for step in range(STEPS):
        assert cluster.publish("n0", "item", range(step % 7, 160, 1), float(step))
        cluster.run(EVERY_MS)
        assert not watch.check()
    begin_ms = cluster.now_ms
    assert cluster.run_until(lambda: not watch.check_converged(), 60_000)
    return cluster.now_ms - begin_ms


@pytest.fixture(autouse=True)
def small_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "CREDIT_BYTES_MAX", CREDIT)
    monkeypatch.setattr(links, "ACK_BYTES", CREDIT // 8)


def test_children_of_a_busy_origin_feed_each_other() -> None:
    cluster = cluster_of_regions()
    assert late_ms(cluster) < 1_000
    trainer = cluster.nodes["n0"].machine
    assert trainer is not None
    assert trainer.counters.children_handed_over > 0
    assert trainer.counters.batches_skipped == 0


def test_without_that_they_wait_for_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "ADOPTED_MAX", 0)
    for module in (push, state_mode):
        monkeypatch.setattr(module, "STATE", "neither")  # nor are rows kept as due (`p2p.busy.backlog`)
    assert late_ms(cluster_of_regions()) > 2_000


def test_nodes_of_version_1_adopt_nobody_and_get_everything() -> None:
    cluster = cluster_of_regions(version=1)
    assert late_ms(cluster) < 60_000
    for node in cluster.nodes.values():
        assert not node.rejected
        if node.protocol_version == 1:
            assert node.machine is not None
            assert not node.machine._push.adoption.entries


def test_children_come_back_when_the_card_is_free_again() -> None:
    cluster = cluster_of_regions()
    late_ms(cluster)
    cluster.options = CALM
    trainer = cluster.nodes["n0"].machine
    assert trainer is not None
    for _ in range(40):
        assert cluster.publish("n0", "item", range(16), 1.0)
        cluster.run(500)
    assert not any(trainer._push.adoption._given.values())
    taken = [node.machine._push.adoption.entries for node in cluster.nodes.values() if node.machine is not None]
    assert sum(taken) == 0


def test_more_children_than_anybody_may_adopt_are_refused() -> None:
    cluster = cluster_of_regions()
    machine = cluster.nodes["n1"].machine
    assert machine is not None
    (link,) = [link for link in machine._core.links.values() if link.node == "n0"]
    too_many = m.Adopt(cluster.model.id, 0, tuple(f"n{number}" for number in range(TREE_ARITY + 1)))
    with pytest.raises(RemoteProtocolError, match="5 children to adopt, limit 4"):
        machine._push.adoption.on_adopt(link, too_many, cluster.now())
    assert not machine._push.adoption.entries


def test_what_an_origin_does_not_repeat_is_forgotten() -> None:
    cluster = cluster_of_regions()
    machine = cluster.nodes["n1"].machine
    assert machine is not None
    (link,) = [link for link in machine._core.links.values() if link.node == "n0"]
    keyspace = cluster.model.id
    machine._push.adoption.on_adopt(link, m.Adopt(keyspace, 2, ("n5",)), cluster.now())
    assert machine._push.adoption.taken(keyspace, "n0", 2, cluster.now().monotonic_ms) == ("n5",)
    assert machine._push.adoption.taken(keyspace, "n0", 1, cluster.now().monotonic_ms) == ()
    cluster.run(adoption.KEPT_MS)
    assert machine._push.adoption.taken(keyspace, "n0", 2, cluster.now().monotonic_ms) == ()
    assert not machine._push.adoption.entries


def batch(number: int) -> m.Batch:
    none = m.ShardClaims(np.empty(0, np.uint32), np.empty(0, np.uint64), np.empty(0, np.uint16), np.empty(0, np.uint16))
    return m.Batch(1, "n0", "r0", 1, 2, number, 0, 0, none, ())


def test_batches_wait_in_order_up_to_a_bound() -> None:
    line = WaitingLine()
    for number in range(WAITING_MESSAGES_MAX):
        assert line.add(WaitingBatch(batch(number), 0), 1, 0)
    assert not line.add(WaitingBatch(batch(9), 0), 1, 0)
    assert [line.take().batch.stamp for _ in range(3)] == [0, 1, 2]
    assert not WaitingLine().add(WaitingBatch(batch(9), 0), 0, 0)
    assert line.clear() == WAITING_MESSAGES_MAX - 3
    assert not line
