"""Partitions that last longer than anybody is kept in the register."""

import pytest

from p2p.members import membership
from p2p.members.introductions import CALL_MISSING_BEATS, Introductions
from p2p.members.membership import HEARTBEAT_MS
from sim_cluster.checkers import contents
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.retirement_chaos import isolate
from tests.p2p.test_hostile import link_of
from tests.p2p.test_machine import synced

FORGET_MS = 25_000
# Four nodes, each of which calls one of two or so in every period.
FOUND_MS = 2 * CALL_MISSING_BEATS * HEARTBEAT_MS


@pytest.fixture(autouse=True)
def forgotten_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "FORGET_MS", FORGET_MS)


def formed() -> VirtualCluster:
    """Four nodes; the first has no seeds, and is the seed of the others."""
    cluster = VirtualCluster(1)
    for name, region, role in (
        ("t1", "train", "train"),
        ("eu1", "eu", "serve"),
        ("us1", "us", "serve"),
        ("us2", "us", "serve"),
    ):
        cluster.add(name, region, role, [] if name == "t1" else ["t1"])
    assert cluster.run_until(lambda: all(synced(cluster, name) for name in cluster.nodes))
    cluster.run(2_000)
    return cluster


def alive(cluster: VirtualCluster, name: str) -> tuple[str, ...]:
    machine = cluster.nodes[name].machine
    assert machine is not None
    return machine.peers_alive(cluster.now())


def two_sides_meet() -> None:
    cluster = formed()
    sides = ("t1", "eu1"), ("us1", "us2")
    cluster.cut |= {(one, other) for one in sides[0] for other in sides[1]} | {
        (other, one) for one in sides[0] for other in sides[1]
    }
    cluster.run(FORGET_MS + 20_000)
    assert [cluster.nodes[name].machine.peers_known for name in cluster.nodes] == [1] * 4, "the scenario is too short"  # type: ignore[union-attr]
    cluster.cut.clear()
    cluster.publish("t1", "item", [1], 1.0)
    assert cluster.run_until(lambda: alive(cluster, "t1") == ("eu1", "us1", "us2"), FOUND_MS)
    assert cluster.run_until(lambda: all(len(contents(node.store, "ctr")) == 1 for node in cluster.nodes.values()), 10_000)


def test_two_sides_find_each_other() -> None:
    two_sides_meet()


def test_nobody_but_a_call_joins_two_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Introductions, "call_missing", lambda *_args: None)
    with pytest.raises(AssertionError):
        two_sides_meet()


def test_the_first_node_without_seeds_comes_back() -> None:
    cluster = formed()
    isolate(cluster, "t1")
    cluster.run(FORGET_MS + 20_000)
    cluster.cut.clear()
    assert cluster.publish("t1", "item", [1], 1.0)
    assert cluster.run_until(lambda: len(contents(cluster.nodes["us2"].store, "ctr")) == 1, 5_000), (
        "it is alone, and calls at once"
    )


def test_who_left_or_is_there_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = formed()
    cluster.leave("us2")
    cluster.run(FORGET_MS + 10_000)
    called: list[str] = []
    original = Introductions.say_hello

    def say_hello(self: Introductions, address: str, *args: object, **options: object) -> None:
        called.append(address)
        original(self, address, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Introductions, "say_hello", say_hello)
    cluster.run(FOUND_MS)
    assert called == []


def test_a_link_that_one_side_forgot_works_at_once() -> None:
    """The other side remembers its sessions, so the next one is above them (R3)."""
    cluster = formed()
    for _ in range(3):
        link_of(cluster, "t1", "us1").restart_session()
        cluster.publish("t1", "item", [1], 1.0)
        cluster.run(300)
    cluster.cut |= {("us1", "t1"), ("us1", "eu1"), ("us2", "t1"), ("us2", "eu1")}  # us1 hears t1, and t1 nothing of us1
    cluster.run(FORGET_MS + 10_000)
    assert "us1" not in cluster.nodes["t1"].machine._core.links  # type: ignore[union-attr]
    cluster.cut.clear()
    assert cluster.run_until(lambda: "us1" in alive(cluster, "t1"), FOUND_MS)
    cluster.run(1_000)
    assert link_of(cluster, "t1", "us1").session_out >= 4
    before, cluster.options = cluster.options, NetworkOptions(loss_probability=1.0)
    cluster.publish("t1", "item", [77], 7.0)
    cluster.options = before
    item = cluster.model.tables["item"].id
    assert cluster.run_until(lambda: (item, 77) in contents(cluster.nodes["us1"].store, "ctr"), 10_000)
