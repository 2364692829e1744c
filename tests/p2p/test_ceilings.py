"""A trainer that goes on elsewhere mints above what its dead run left anywhere, and knows whom it could not ask (R24)."""

import numpy as np
import pytest

from ekko.model import table_id
from p2p import messages as m
from p2p.ceilings import REQUESTS_MAX, Ceilings
from p2p.errors import RemoteProtocolError
from p2p.pushing.groups import LINGER_MS
from p2p.stamps import EPOCH_MS, make_stamp, unix_ms_of
from sim_cluster.checkers import contents
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import CALM, REGIONS, at_rest, form
from tests.seeds import seeds

AHEAD_MS = 20_000  # the dead run's clock, of ours


def two_trainers(seed: int = 1) -> VirtualCluster:
    cluster = form(seed)
    cluster.add("t2", "train", "train", ["t1"])
    assert cluster.run_until(lambda: all(n.machine and n.machine.status(cluster.now()).synced for n in cluster.nodes.values()))
    cluster.publish("t2", "user", [5], 0.0)  # it has a writer id
    cluster.run(500)
    return cluster


def dies_ahead_of_all_clocks(seed: int = 1) -> VirtualCluster:
    """The last step of t1 was lost on the way to most; the one after it reached eu alone, as strays."""
    cluster = two_trainers(seed)
    cluster.shift_clock("t1", AHEAD_MS)
    cluster.publish("t1", "item", [1], 1.0)
    cluster.run(500)
    cluster.options = NetworkOptions(loss_probability=1.0)
    cluster.publish("t1", "item", [1], 2.0)
    cluster.options = CALM
    cluster.cut |= {("t1", name) for name in (*REGIONS["us"], "t2")}
    cluster.run(LINGER_MS)
    cluster.publish("t1", "item", [1], 3.0)
    cluster.run(12)
    cluster.crash("t1")
    assert value(cluster, "eu1") == 3.0
    assert value(cluster, "us1") != 3.0
    assert value(cluster, "t2") != 3.0
    return cluster


def value(cluster: VirtualCluster, name: str) -> float:
    """Of item 1, as this node has it."""
    _, row = contents(cluster.nodes[name].store, "ctr").get((table_id("item"), 1), (0, b""))
    return float(np.frombuffer(row, np.float32)[0]) if row else 0.0


def above(cluster: VirtualCluster, stamp: int = 0, timeout_ms: int = 5_000, node: str = "t2") -> m.AboveTold | m.Refused:
    number = cluster.ask(node, lambda request: m.AboveRequested(request, cluster.model.id, stamp, timeout_ms))
    replies = cluster.nodes[node].replies
    assert cluster.run_until(lambda: number in replies, timeout_ms + 500)
    reply = replies[number]
    assert isinstance(reply, m.AboveTold | m.Refused)
    return reply


@pytest.mark.parametrize("seed", seeds(2, 3))
def test_who_asked_wins_over_strays_of_a_clock_that_was_ahead(seed: int) -> None:
    cluster = dies_ahead_of_all_clocks(seed)
    told = above(cluster, timeout_ms=30_000)
    assert cluster.now_ms < 10_000, "who died meanwhile is not waited for"
    assert isinstance(told, m.AboveTold)
    assert (told.heard, told.unheard, told.silent) == (("eu", "train", "us"), (), ("t1",))
    assert value(cluster, "t2") == 3.0, "what the dead run touched is here when the answer is"
    stamp = cluster.publish("t2", "item", [1], 9.0)
    assert stamp > told.stamp
    assert unix_ms_of(stamp) >= cluster.now().unix_ms + AHEAD_MS // 2
    at_rest(cluster)
    assert {value(cluster, name) for names in REGIONS.values() for name in names if name != "t1"} == {9.0}


def test_an_answer_waits_for_the_rows_behind_it() -> None:
    """Who goes on must see what its former life touched: the node that it goes on at had been cut off."""
    cluster = two_trainers()
    cluster.cut |= {(one, other) for name in cluster.nodes for one, other in ((name, "t2"), ("t2", name))}
    cluster.publish("t1", "item", [1], 3.0)
    cluster.run(500)
    cluster.crash("t1")
    cluster.run(30_000)
    assert value(cluster, "t2") == 0.0
    cluster.cut = set()
    told = above(cluster)
    assert isinstance(told, m.AboveTold)
    assert told.unheard == ()
    assert value(cluster, "t2") == 3.0


def test_who_did_not_ask_loses() -> None:
    cluster = dies_ahead_of_all_clocks()
    cluster.publish("t2", "item", [1], 9.0)
    at_rest(cluster)
    assert value(cluster, "us1") == 3.0, "the scenario leaves nothing that is above"


def test_a_region_that_is_not_heard_is_named() -> None:
    cluster = two_trainers()
    cluster.cut |= {(one, other) for name in REGIONS["us"] for one, other in ((name, "t2"), ("t2", name))}
    told = above(cluster, timeout_ms=1_000)
    assert isinstance(told, m.AboveTold)
    assert (told.heard, told.unheard, told.silent) == (("eu", "train"), ("us",), REGIONS["us"])
    cluster.cut = set()
    cluster.crash("us1")
    told = above(cluster, timeout_ms=2_000)
    assert isinstance(told, m.AboveTold)
    assert (told.unheard, told.silent) == ((), ("us1",)), "one of its holders is enough for a region"
    cluster.run(30_000)
    told = above(cluster, timeout_ms=20_000)  # a suspect now: not waited for, and named
    assert isinstance(told, m.AboveTold)
    assert (told.unheard, told.silent) == ((), ("us1",))


def test_it_mints_above_the_stamp_that_it_was_given() -> None:
    cluster = two_trainers()
    now_ms = cluster.now().unix_ms
    stamp = make_stamp(now_ms + 30_000, 3, 9)
    assert isinstance(above(cluster, stamp), m.AboveTold)
    assert cluster.publish("t2", "item", [1], 1.0) > stamp
    refused = above(cluster, make_stamp(now_ms + 90_000, 0, 9))
    assert isinstance(refused, m.Refused)
    assert "ahead of this node's clock" in refused.reason


def test_many_may_ask_at_once_and_no_more() -> None:
    cluster = two_trainers()
    cluster.pause("us1")
    numbers = [
        cluster.ask("t2", lambda request: m.AboveRequested(request, cluster.model.id, 0, 60_000)) for _ in range(REQUESTS_MAX)
    ]
    cluster.run(100)
    refused = cluster.request("t2", lambda request: m.AboveRequested(request, cluster.model.id, 0, 1_000))
    assert isinstance(refused, m.Refused)
    assert "try again later" in refused.reason
    cluster.resume("us1")
    cluster.run(1_000)
    assert all(isinstance(cluster.nodes["t2"].replies[number], m.AboveTold) for number in numbers)


def test_it_ends_with_its_model() -> None:
    cluster = two_trainers()
    cluster.pause("us1")
    number = cluster.ask("t2", lambda request: m.AboveRequested(request, cluster.model.id, 0, 60_000))
    cluster.run(300)
    machine = cluster.nodes["t2"].machine
    assert machine is not None
    machine._core.keyspaces.clear()
    machine._ceilings.on_timer(cluster.now())
    assert any(isinstance(e, m.Refused) and e.request == number and "was dropped" in e.reason for e in machine._core.effects)


def test_a_peer_cannot_drag_the_clock_nor_contradict_itself() -> None:
    cluster = two_trainers()
    cluster.pause("us1")
    cluster.ask("t2", lambda request: m.AboveRequested(request, cluster.model.id, 0, 60_000))
    cluster.run(300)
    machine = cluster.nodes["t2"].machine
    assert machine is not None
    ceilings: Ceilings = machine._ceilings
    [(query, _)] = ceilings.requests[0].questions.items()
    link = machine._core.link("us1")
    assert link is not None
    before = machine._core.clock.last
    far = make_stamp(cluster.now().unix_ms + 90_000, 0, 9)
    small = make_stamp(EPOCH_MS + 1, 0, 9)
    for told in (m.CeilingTold(query, far, 0, 0, ()), m.CeilingTold(query, small, 0, 0, ((9, small + (1 << 12)),))):
        with pytest.raises(RemoteProtocolError):
            ceilings.on_told(link, told, cluster.now())
    assert machine._core.clock.last == before
