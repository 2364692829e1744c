"""Rounds that follow each other, and questions that wait at who has nothing new: sooner than an interval, and no dearer."""

from dataclasses import replace
from statistics import median

import numpy as np
import pytest

from p2p import messages as m
from p2p.paper import round_answers
from p2p.paper.sync import CACHE, INTERVAL_MS, LEADERS, SHARD_VERSIONS, VECTOR, SyncOptions
from p2p.replica import RowColumns
from sim_cluster.checkers import check_converged
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import at_rest
from tests.p2p.test_rounds import counts, link_of, machine_of, start, tell


def fixed(sync: SyncOptions) -> SyncOptions:
    """The same with one round in each interval."""
    return replace(sync, follow=False, held=False)


def typical_ms(cluster: VirtualCluster, steps: int = 7) -> float:
    """How long a step takes to be everywhere, the median of some; they come at odd moments of the interval."""
    took = []
    for step in range(steps):
        begin_ms = cluster.now_ms
        assert cluster.publish("t1", "item", range(step, step + 5), float(step))
        assert cluster.run_until(lambda: check_converged(cluster) == "", 5_000, 5)
        took.append(cluster.now_ms - begin_ms)
        cluster.run(INTERVAL_MS + 37)
    return median(took)


@pytest.mark.parametrize("sync", [SHARD_VERSIONS, LEADERS], ids=["shard_versions", "leaders"])
def test_a_step_waits_for_no_interval(sync: SyncOptions) -> None:
    assert typical_ms(start(sync)) < INTERVAL_MS / 3
    assert typical_ms(start(fixed(sync))) > INTERVAL_MS / 2, "else nothing waits for intervals, and this test shows nothing"


@pytest.mark.parametrize("sync", [SHARD_VERSIONS, LEADERS], ids=["shard_versions", "leaders"])
def test_an_idle_cluster_asks_no_more_than_once_an_interval(sync: SyncOptions) -> None:
    asked = {}
    for options in (sync, replace(sync, held=False), fixed(sync)):
        cluster = start(options)
        before = sum(counts(cluster, "rounds_started").values())
        cluster.run(20 * INTERVAL_MS)
        asked[options] = sum(counts(cluster, "rounds_started").values()) - before
    assert asked[sync] <= asked[fixed(sync)]
    # And who is answered at once, with nothing, does not ask again at once.
    assert asked[replace(sync, held=False)] <= asked[fixed(sync)]


def test_a_question_waits_until_there_is_something_to_say_or_an_interval_is_over() -> None:
    cluster = start()
    machine, link = machine_of(cluster, "t1"), link_of(cluster, "t1", "eu1")
    answers = machine._pull.round_answers
    mark = machine._pull.versions.by_keyspace[cluster.model.id].mark
    cluster.cut = {(name, "t1") for name in cluster.nodes}  # it hears nobody else
    cluster.run(2 * INTERVAL_MS)
    assert answers.held == 0
    begin_ms = cluster.now_ms
    assert tell(cluster, "t1", "eu1", m.VersionsWanted(cluster.model.id, 77, mark)) == ""
    assert answers.held == 1
    cluster.run(INTERVAL_MS - 1)
    assert answers.held == 1
    cluster.run(1)
    assert answers.held == 0
    assert tell(cluster, "t1", "eu1", m.VersionsWanted(cluster.model.id, 78, mark)) == ""
    listed = machine.counters.shards_listed
    assert cluster.publish("t1", "item", [3], 4.0)
    assert answers.held == 0
    assert machine.counters.shards_listed == listed + 1
    assert cluster.now_ms == begin_ms + INTERVAL_MS
    # One that is for a life of the asker that is over is dropped.
    after = machine._pull.versions.by_keyspace[cluster.model.id].mark
    assert tell(cluster, "t1", "eu1", m.VersionsWanted(cluster.model.id, 79, after)) == ""
    machine._core.by_boot.pop(link.boot)
    listed = machine.counters.shards_listed
    assert cluster.publish("t1", "item", [3], 5.0)
    assert answers.held == 0
    assert machine.counters.shards_listed == listed


def test_questions_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_answers, "HELD_MAX", 1)
    cluster = start()
    for step in range(20):
        assert cluster.publish("t1", "item", range(step, step + 5), float(step))
        cluster.run(60)
        assert all(machine_of(cluster, name)._pull.round_answers.held <= 1 for name in cluster.nodes)
    at_rest(cluster)


def test_pulls_by_vector_follow_each_other_while_they_bring_something() -> None:
    asked = {}
    for options in (VECTOR, fixed(VECTOR)):
        cluster = start(options)
        before = sum(counts(cluster, "pulls_started").values())
        for step in range(100):
            assert cluster.publish("t1", "item", range(step, step + 5), float(step))
            cluster.run(20)
        busy = sum(counts(cluster, "pulls_started").values()) - before
        at_rest(cluster)
        cluster.run(5_000)
        idle = sum(counts(cluster, "pulls_started").values())
        cluster.run(2_000)
        asked[options.follow] = busy, sum(counts(cluster, "pulls_started").values()) - idle
    assert asked[True][0] > 1.3 * asked[False][0]
    assert asked[True][1] <= 1.1 * asked[False][1], "who got nothing asks again at once"


def test_questions_are_held_only_where_rounds_follow() -> None:
    with pytest.raises(ValueError, match="follow"):
        SyncOptions(push=False, shard_versions=True, interval_ms=200, held=True)


@pytest.mark.parametrize("sync", [VECTOR, CACHE], ids=["vector", "cache"])
def test_strays_that_stay_are_no_news(sync: SyncOptions) -> None:
    """A writer that died in mid-answer leaves rows above everybody's vector: they come with every answer (R8)."""
    cluster = start(sync)
    stamp = cluster.publish("t1", "item", [1], 1.0)
    cluster.run(1_000)
    cluster.crash("t1")
    table = cluster.model.tables["item"]
    row = RowColumns(table.id, np.array([1], np.uint64), np.ones((1, table.dim), np.float32).view(np.uint8))
    replicas = [machine_of(cluster, name) for name in cluster.nodes if name != "t1"]
    for machine in replicas:
        (keyspace,) = machine._core.keyspaces.values()
        keyspace.replica.apply([row], stamp + (1 << 12))
    cluster.run(10_000)  # until nobody asks the dead one any more
    before = sum(machine.counters.pulls_started for machine in replicas)
    cluster.run(20 * INTERVAL_MS)
    assert sum(machine.counters.pulls_started for machine in replicas) - before <= 21 * len(replicas)
    assert all(machine.counters.pull_rows_received for machine in replicas)
