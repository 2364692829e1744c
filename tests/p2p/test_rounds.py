"""Rounds by shard versions move what changed and no more, from whom it should; and what a neighbour may do to them."""

from dataclasses import replace

import numpy as np
import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p.link.links import Link
from p2p.machine import Machine
from p2p.paper import rounds
from p2p.paper.rounds import Rounds
from p2p.paper.sync import INTERVAL_MS, LEADERS, PUSH, SHARD_VERSIONS, SyncOptions
from p2p.stamps import make_stamp
from sim_cluster.checkers import check_converged
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import CALM, REGIONS, at_rest, form

NONE = np.empty(0, np.uint32), np.empty(0, np.uint64), np.empty(0, np.uint16), np.empty(0, np.uint64)


def start(sync: SyncOptions = SHARD_VERSIONS, model: ModelSpec | None = None) -> VirtualCluster:
    """A cluster at rest, whose nodes have all picked the same versions."""
    cluster = form(1, CALM, model, sync)
    cluster.run(8_000)
    cluster.publish("t1", "item", range(60), 1.0)
    at_rest(cluster)
    cluster.run(8_000)
    return cluster


def machine_of(cluster: VirtualCluster, name: str) -> Machine:
    machine = cluster.nodes[name].machine
    assert machine is not None
    return machine


def counts(cluster: VirtualCluster, field: str) -> dict[str, int]:
    return {name: getattr(machine_of(cluster, name).counters, field) for name in cluster.nodes}


def link_of(cluster: VirtualCluster, name: str, peer: str) -> Link:
    link = machine_of(cluster, name)._core.link(peer)
    assert link is not None
    return link


def tell(cluster: VirtualCluster, name: str, sender: str, message: m.Message, session: int = 0) -> str:
    """Have `name` receive a message from `sender`; returns what it refused it for, or an empty string."""
    machine, link = machine_of(cluster, name), link_of(cluster, name, sender)
    before = len(cluster.nodes[name].rejected)
    sequence = 0
    if session:
        session, sequence = link.session_in + 1, 1
    envelope = m.Envelope(link.boot, machine._core.options.boot, session, sequence, version=link.version)
    cluster.feed(cluster.nodes[name], machine, m.MessageReceived(envelope, message))
    return " ".join(cluster.nodes[name].rejected[before:])


def asking(cluster: VirtualCluster, name: str, peer: str) -> tuple[Rounds, int]:
    """Let `name` have a round with `peer` on its way; returns its rounds and the number of the question."""
    machine = machine_of(cluster, name)
    running = machine._pull.rounds
    running._rounds.clear()
    keyspace = next(iter(machine._core.keyspaces.values()))
    machine._core.effects = []
    running.begin(keyspace, link_of(cluster, name, peer), np.ones(8, np.bool_), cluster.now())
    return running, running._requests


# --- what moves -------------------------------------------------------------------------------------------------------------


def test_one_changed_row_costs_one_shard_and_one_row_a_node() -> None:
    cluster = start()
    asked, rows, listed = (counts(cluster, field) for field in ("shards_asked", "pull_rows_received", "shards_listed"))
    cluster.publish("t1", "item", [7], 2.0)
    assert cluster.run_until(lambda: check_converged(cluster) == "", 5_000)
    cluster.run(5_000)
    for name in cluster.nodes:
        if name != "t1":
            assert counts(cluster, "pull_rows_received")[name] - rows[name] == 1
            assert counts(cluster, "shards_asked")[name] - asked[name] == 1
    # Each node tells each other node of the one shard once, at most: nothing is listed twice.
    assert sum(counts(cluster, "shards_listed").values()) - sum(listed.values()) <= 6 * 5


def test_a_quiet_cluster_asks_for_no_vectors() -> None:
    cluster = start()
    asked = counts(cluster, "shards_asked")
    cluster.run(10_000)
    assert counts(cluster, "shards_asked") == asked


def test_with_leaders_a_row_enters_a_region_once() -> None:
    rows_in = {}
    # Where questions wait, the nearest tells first, and in so small a cluster few rows cross twice even without leaders.
    for sync in (replace(SHARD_VERSIONS, follow=False, held=False), LEADERS):
        cluster = start(sync)
        before = crossed(cluster)
        for step in range(20):
            cluster.publish("t1", "item", range(step * 10, step * 10 + 10), float(step))
            cluster.run(250)
        at_rest(cluster)
        rows_in[sync.leaders] = {region: count - before[region] for region, count in crossed(cluster).items()}
    for region in ("eu", "us"):
        assert rows_in[True][region] <= 1.1 * 200
        assert rows_in[False][region] > 1.3 * 200, "else leaders save nothing, and this test shows nothing"


def crossed(cluster: VirtualCluster) -> dict[str, int]:
    """Rows that came into each region from others."""
    return {
        region: sum(
            link.traffic.rows_in
            for name in names
            for link in machine_of(cluster, name)._core.links.values()
            if link.region != region
        )
        for region, names in REGIONS.items()
    }


def test_a_question_that_is_too_large_is_asked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "VECTORS_BYTES_MAX", 24)
    cluster = start()
    cluster.publish("t1", "item", range(200), 2.0)
    at_rest(cluster)


def test_lists_are_bounded_and_a_lost_one_costs_only_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "LISTS_MAX", 2)
    cluster = start()
    for step in range(5):
        cluster.publish("t1", "item", range(step, step + 30), float(step))
        cluster.run(300)
        assert all(machine_of(cluster, name)._pull.rounds.lists <= 2 for name in cluster.nodes)
    at_rest(cluster)


def test_each_partition_has_its_own_leaders() -> None:
    cluster = start(LEADERS, ModelSpec("ctr", 8, {"item": TableSpec("item", 4), "user": TableSpec("user", 2)}, partitions=2))
    for step in range(5):
        cluster.publish("t1", "item", range(step * 20, step * 20 + 40), float(step))
        cluster.run(300)
    at_rest(cluster)


# --- neighbours -------------------------------------------------------------------------------------------------------------


def test_a_neighbour_of_version_1_is_pulled_from_by_vector() -> None:
    cluster = VirtualCluster(1, sync=SHARD_VERSIONS)
    cluster.add("t1", "train", "train")
    cluster.add("eu1", "eu", seeds=["t1"], protocol_version=1)
    cluster.add("us1", "us", seeds=["t1"])
    cluster.run(6_000)
    cluster.publish("t1", "item", range(30), 1.0)
    at_rest(cluster)
    assert not cluster.nodes["eu1"].rejected
    assert counts(cluster, "rounds_completed")["us1"] > 10
    assert counts(cluster, "rounds_completed")["eu1"] == 0


def test_a_node_with_push_answers_no_question_about_versions() -> None:
    cluster = form(1, sync=PUSH)
    cluster.run(6_000)
    assert tell(cluster, "eu1", "t1", m.VersionsWanted(cluster.model.id, 1, 0)) == ""
    wanted = m.ShardsWanted(cluster.model.id, 1, np.array([0], np.uint32), NONE[2], np.empty((1, 0), np.uint64))
    assert tell(cluster, "eu1", "t1", wanted) == ""
    assert counts(cluster, "pulls_refused")["eu1"] == 2
    assert machine_of(cluster, "eu1").shard_versions == {}


def test_a_lost_question_is_asked_again_and_a_late_answer_counts() -> None:
    cluster = start()
    running, request = asking(cluster, "eu1", "t1")
    place = cluster.model.id, "t1"
    assert running._rounds[place].question.request == request
    cluster.run(rounds.REPEAT_MS + INTERVAL_MS + 50)
    assert place not in running._rounds or running._rounds[place].question.request != request, (
        "the repeated question was answered"
    )


def test_a_round_that_gets_no_answer_is_given_up() -> None:
    cluster = start()
    cluster.cut.add(("t1", "eu1"))
    cluster.run(2 * rounds.ROUND_SILENCE_MS)
    assert counts(cluster, "rounds_abandoned")["eu1"] > 0
    cluster.cut.clear()
    cluster.publish("t1", "item", [1], 3.0)
    at_rest(cluster)


@pytest.mark.parametrize(
    ("shards", "frontier_ahead_ms", "complaint"),
    [([8], 0, "version of shard 8, the keyspace has 8"), ([], 70_000, "ahead of our clock")],
)
def test_a_list_that_cannot_be_is_refused(shards: list[int], frontier_ahead_ms: int, complaint: str) -> None:
    cluster = start()
    running, request = asking(cluster, "eu1", "t1")
    listed = running._lists[cluster.model.id, "t1"]
    before = listed.versions.copy(), listed.mark
    frontier = np.array([make_stamp(cluster.now().unix_ms + frontier_ahead_ms, 0, 0)], np.uint64)
    versions = np.ones(len(shards), np.uint64)
    told = m.VersionList(cluster.model.id, request, 99, np.array(shards, np.uint32), versions, np.zeros(1, np.uint16), frontier)
    assert complaint in tell(cluster, "eu1", "t1", told)
    assert np.array_equal(listed.versions, before[0])
    assert listed.mark == before[1]


def test_a_list_that_nobody_asked_for_means_nothing() -> None:
    cluster = start()
    running = machine_of(cluster, "eu1")._pull.rounds
    listed = running._lists[cluster.model.id, "t1"]
    before = listed.versions.copy()
    told = m.VersionList(cluster.model.id, 10**6, 99, np.array([1], np.uint32), np.ones(1, np.uint64), *NONE[2:])
    assert tell(cluster, "eu1", "t1", told) == ""
    assert np.array_equal(listed.versions, before)


@pytest.mark.parametrize(("shards", "complaint"), [([2, 3], "other shards than were asked for"), ([2], "ahead of our clock")])
def test_an_answer_that_cannot_be_is_refused_and_claims_nothing(shards: list[int], complaint: str) -> None:
    cluster = start()
    running, request = asking(cluster, "eu1", "t1")
    place = cluster.model.id, "t1"
    running._rounds[place].question = m.ShardsWanted(
        cluster.model.id, request, np.array([2], np.uint32), NONE[2], np.empty((1, 0), np.uint64)
    )
    vector = cluster.nodes["eu1"].store.models["ctr"].vector
    before = vector.copy()
    ahead = np.uint64(make_stamp(cluster.now().unix_ms + 70_000, 0, 0))
    reply = m.ShardsReply(
        cluster.model.id,
        request,
        0,
        True,
        (),
        np.array(shards, np.uint32),
        np.ones(len(shards), np.uint64),
        np.zeros(1, np.uint16),
        np.full((len(shards), 1), ahead),
    )
    assert complaint in tell(cluster, "eu1", "t1", reply, session=1)
    assert np.array_equal(vector, before)
    assert place not in running._rounds
    at_rest(cluster)


def test_a_question_for_shards_that_do_not_exist_is_refused() -> None:
    cluster = start()
    wanted = m.ShardsWanted(cluster.model.id, 1, np.array([8], np.uint32), NONE[2], np.empty((1, 0), np.uint64))
    assert "pull of shard 8, the keyspace has 8" in tell(cluster, "eu1", "t1", wanted)
    assert machine_of(cluster, "eu1")._pull.outboxes["t1"].streams == {}
