"""Models that are dropped and aliases that are switched, in the virtual cluster: in the end everybody agrees."""

import pytest

from p2p import messages as m
from p2p.paper.sync import PRESETS
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import form
from tests.p2p.generations_chaos import (
    OLD,
    add,
    agree,
    away_while_it_was_dropped,
    both_sides_of_a_split,
    come_and_go,
    drop,
    dropped_in_the_middle_of_a_pull,
    publish,
    tables_come_and_go,
)
from tests.p2p.presets import quick_first
from tests.seeds import seeds


@pytest.mark.parametrize("seed", seeds(2, 4))
def test_models_come_and_go_under_faults(seed: int) -> None:
    come_and_go(seed)


@pytest.mark.parametrize("preset", quick_first(name for name, sync in PRESETS.items() if sync.shard_versions))
def test_models_come_and_go_by_the_papers_protocol(preset: str) -> None:
    come_and_go(7, PRESETS[preset])


@pytest.mark.parametrize("seed", range(3))
def test_who_was_away_brings_nothing_back(seed: int) -> None:
    away_while_it_was_dropped(seed * 350)


@pytest.mark.parametrize("seed", range(4))
def test_a_pull_ends_with_its_model(seed: int) -> None:
    dropped_in_the_middle_of_a_pull(seed)


@pytest.mark.parametrize("seed", range(3))
def test_two_sides_of_a_split_agree_afterwards(seed: int) -> None:
    both_sides_of_a_split(seed)


@pytest.mark.parametrize("seed", seeds(1, 3))
def test_tables_come_and_go_under_faults(seed: int) -> None:
    tables_come_and_go(seed)


def test_waits_and_publishers_are_told() -> None:
    cluster = form(1)
    cluster.run(5_000)
    add(cluster, "t1", OLD)
    cluster.run(1_000)
    cluster.pause("us3")
    stamp = publish(cluster, "t1", "gen-1", [1], 1.0)
    cluster.run(100)
    wait = cluster.ask("t1", lambda number: m.WaitRequested(number, OLD.id, stamp, m.Scope.ALL, 60_000))
    caught_up = cluster.ask("eu1", lambda number: m.CaughtUpRequested(number, OLD.id, 60_000))
    cluster.run(500)
    assert wait not in cluster.nodes["t1"].replies
    drop(cluster, "eu1", "gen-1")
    cluster.run(500)
    for node, request in (("t1", wait), ("eu1", caught_up)):
        reply = cluster.nodes[node].replies[request]
        assert isinstance(reply, m.Refused)
        assert "was dropped" in reply.reason
    refused = cluster.request("t1", lambda number: m.PublishRequested(number, OLD.id, ()))
    assert isinstance(refused, m.Refused)
    cluster.resume("us3")
    agree(cluster)


def test_who_has_not_caught_up_is_named() -> None:
    cluster = form(1)
    cluster.run(5_000)
    add(cluster, "t1", OLD)
    cluster.run(1_000)
    publish(cluster, "t1", "gen-1", [1], 1.0)
    cluster.run(2_000)
    reply = cluster.ask("us1", lambda number: m.CaughtUpRequested(number, OLD.id, 1_000))
    cluster.run(500)
    ended = cluster.nodes["us1"].replies[reply]
    assert isinstance(ended, m.WaitEnded)
    assert (ended.lagging, ended.silent) == ((), ())
    cluster.cut |= {(other, "us3") for other in cluster.nodes if other != "us3"}  # it is heard, and hears nothing
    publish(cluster, "t1", "gen-1", [2], 2.0)
    cluster.run(300)
    reply = cluster.ask("us1", lambda number: m.CaughtUpRequested(number, OLD.id, 1_000))
    cluster.run(1_500)
    ended = cluster.nodes["us1"].replies[reply]
    assert isinstance(ended, m.WaitEnded)
    assert ended.lagging == ("us3",)


def published() -> VirtualCluster:
    """A cluster in which all have the model, with a row."""
    cluster = form(1)
    cluster.run(5_000)
    add(cluster, "t1", OLD)
    publish(cluster, "t1", "gen-1", [1], 1.0)
    cluster.run(2_000)
    return cluster


def asked_while_behind(cluster: VirtualCluster, node: str, timeout_ms: int) -> int:
    """Restart a node that has lost its rows, cut off from all, and ask it who has caught up."""
    cluster.crash(node)
    cluster.cut = {pair for other in cluster.nodes if other != node for pair in ((other, node), (node, other))}
    cluster.restart(node, keep_state=False)
    add(cluster, node, OLD)
    cluster.run(100)
    request = cluster.ask(node, lambda number: m.CaughtUpRequested(number, OLD.id, timeout_ms))
    cluster.run(500)
    assert request not in cluster.nodes[node].replies
    return request


def test_a_node_that_has_not_caught_up_itself_waits_until_it_has_and_names_itself() -> None:
    cluster = published()
    request = asked_while_behind(cluster, "us3", 2_000)
    cluster.run(2_000)
    ended = cluster.nodes["us3"].replies[request]
    assert isinstance(ended, m.WaitEnded)
    assert ended.lagging == ("us3",)

    request = asked_while_behind(cluster, "us3", 60_000)
    cluster.cut = set()
    cluster.run(20_000)
    ended = cluster.nodes["us3"].replies[request]
    assert isinstance(ended, m.WaitEnded)
    assert (ended.lagging, ended.silent) == ((), ())
    agree(cluster)


def test_who_waits_to_catch_up_is_told_when_the_model_is_dropped() -> None:
    cluster = published()
    request = asked_while_behind(cluster, "us3", 60_000)
    drop(cluster, "us3", "gen-1")
    cluster.run(500)
    refused = cluster.nodes["us3"].replies[request]
    assert isinstance(refused, m.Refused)
    assert "was dropped" in refused.reason
