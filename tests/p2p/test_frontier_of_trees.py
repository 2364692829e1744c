"""Several trees in state mode: a child's frontier moves with what its parents claim, each of its own trees (decision 0042)."""

import numpy as np
import pytest

from p2p.busy.backlog import Backlog, Cycle
from p2p.busy.pairs import Pairs
from p2p.knowledge import Knowledge
from p2p.stamps import WRITERS_MAX
from sim_cluster.checkers import Watch
from sim_cluster.network import LinkOptions, NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.backlog_chaos import fill, in_state_mode, little_credit, settle
from tests.p2p.plants import Plant, expect_caught

W = 5
BEHIND_MS_MAX = 2_500


def knows(shards: int = 8) -> Knowledge:
    return Knowledge(np.zeros((shards, WRITERS_MAX), np.uint64), np.zeros(WRITERS_MAX, np.uint64))


def later(knowledge: Knowledge, stamp: int, least: dict[int, int]) -> int:
    """The frontier after somebody told its own, with its vector."""
    shards, stamps = np.array(sorted(least), np.uint32), np.array([least[shard] for shard in sorted(least)], np.uint64)
    knowledge.learn_frontier_later(W, stamp, shards, stamps)
    return int(knowledge.frontier[W])


def reach(knowledge: Knowledge, shard: int, stamp: int) -> int:
    """The frontier after a claim of one shard."""
    one = np.array([[stamp]], np.uint64)
    knowledge.learn_reply(np.array([W], np.uint16), np.zeros_like(one), one, one[0] * 0, np.array([shard], np.uint32))
    return int(knowledge.frontier[W])


def test_a_frontier_waits_for_the_vector_that_it_was_of() -> None:
    knowledge = knows()
    assert later(knowledge, 100, {1: 90, 2: 100}) == 0
    assert reach(knowledge, 1, 95) == 0
    assert reach(knowledge, 2, 99) == 0
    assert reach(knowledge, 2, 100) == 100
    assert later(knowledge, 90, {1: 80}) == 100, "an older one takes nothing back"
    assert later(knowledge, 120, {}) == 120, "where one parent sends all of it there is nothing to wait for"


def test_of_those_that_wait_the_oldest_and_the_newest_are_kept() -> None:
    knowledge = knows()
    for stamp in (100, 110, 120, 130):
        assert later(knowledge, stamp, {1: stamp}) == 0
    assert reach(knowledge, 1, 125) == 100, "of 110 and 120 nothing is known any more"
    assert later(knowledge, 140, {1: 140}) == 100
    assert reach(knowledge, 1, 140) == 140
    assert not knowledge._later


def test_a_step_may_be_what_a_frontier_waits_for() -> None:
    knowledge = knows()
    stamp, one = (7 << 12) | W, np.array([1], np.uint16)
    assert later(knowledge, stamp, {3: stamp}) == 0
    knowledge.learn_step(stamp, 5, 2, np.array([3], np.uint32), np.zeros(1, np.uint64), one * 0, one)
    assert int(knowledge.frontier[W]) == stamp


def test_steps_above_a_frontier_that_waited_follow_it() -> None:
    knowledge = knows()
    first, second, one = (7 << 12) | W, (8 << 12) | W, np.array([1], np.uint16)
    assert not knowledge.learn_step(second, first, 1, np.array([3], np.uint32), np.zeros(1, np.uint64), one * 0, one)
    assert later(knowledge, first, {1: first}) == 0
    assert reach(knowledge, 1, first) == second


def test_the_rest_of_a_vector_is_what_others_send() -> None:
    vector, grid = np.arange(1, 9, dtype=np.uint64).reshape(4, 2), np.zeros((4, 2), np.bool_)
    grid[0], grid[2, 0] = True, True
    cycle = Cycle(np.array([W, W + 1], np.uint16), vector, grid, np.zeros(2, np.uint64))
    shards, rest = cycle.rest()
    assert (shards.tolist(), rest.tolist()) == ([1, 2, 3], [[3, 4], [0, 6], [7, 8]])
    assert cycle.until.tolist() == [[1, 2], [0, 0], [5, 0], [0, 0]]


def fed_by_several(seed: int) -> None:
    """The way into a region is narrow, and each of its nodes is the leader of one tree: none has all of it from one parent."""
    with little_credit(1_500, one_tree=1):
        cluster = VirtualCluster(seed, NetworkOptions(1, 5))
        cluster.add("t1", "home", "train")
        for name in ("eu1", "eu2", "eu3", "eu4"):
            cluster.add(name, "eu", seeds=["t1"])
        cluster.run(5_000)
        assert cluster.publish("t1", "item", [0], -1.0)
        cluster.run(1_000)
        watch, trainer = Watch(cluster), cluster.nodes["t1"]
        cluster.options = NetworkOptions(1, 5, links={"eu/home": LinkOptions(10, 5.0)})
        written: list[tuple[int, int]] = []
        late_ms, split = 0, False
        for step in range(125):
            fill(cluster, 2, keys=150)
            problem = watch.check() if step % 3 == 0 else ""
            assert not problem, f"seed {seed}, step {step}: {problem}"
            stamps = trainer.store.models["ctr"].frontier
            writer = int(stamps.argmax())
            written.append((cluster.now_ms, int(stamps[writer])))
            if step < 40:
                continue
            split = split or _is_split(cluster)
            for name in ("eu1", "eu2", "eu3", "eu4"):
                reached = int(cluster.nodes[name].store.models["ctr"].frontier[writer])
                lacking = [at_ms for at_ms, stamp in written if stamp > reached]
                late_ms = max(late_ms, cluster.now_ms - lacking[0] if lacking else 0)
        assert in_state_mode(cluster), f"seed {seed}: no link is in state mode"
        assert split, f"seed {seed}: some parent sends all trees, so the scenario proves nothing"
        assert late_ms < BEHIND_MS_MAX, f"seed {seed}: a frontier is {late_ms} ms behind while everything comes"
        settle(cluster, watch)


def _is_split(cluster: VirtualCluster) -> bool:
    """Whether all nodes of the region are in state mode, none for all trees of anybody."""
    found: list[Pairs] = []
    for name in ("eu1", "eu2", "eu3", "eu4"):
        machine = cluster.nodes[name].machine
        assert machine is not None
        (keyspace,) = machine._core.keyspaces.values()
        if not keyspace.feeds:
            return False
        found += [feed.pairs for feed in keyspace.feeds.values()]
    return all(bits != pairs.all_trees for pairs in found for _, bits in pairs.served)


def test_a_frontier_follows_what_several_parents_claim() -> None:
    fed_by_several(0)


# --- planted bugs


def only_who_sends_all_trees_tells_a_frontier(patch: pytest.MonkeyPatch) -> None:
    """What `wait` and `staleness_ms` rest on stands still, since no parent sends all trees."""
    patch.setattr(Backlog, "tells_rest", lambda self, now_ms: False)


def a_frontier_waits_for_nothing(patch: pytest.MonkeyPatch) -> None:
    """A frontier is taken with the claim of some trees."""
    later = Knowledge.learn_frontier_later

    def at_once(self: Knowledge, writer: int, stamp: int, shards: np.ndarray, least: np.ndarray) -> None:
        later(self, writer, stamp, shards[:0], least[:0])

    patch.setattr(Knowledge, "learn_frontier_later", at_once)


@pytest.mark.parametrize("plant", [only_who_sends_all_trees_tells_a_frontier, a_frontier_waits_for_nothing])
def test_a_planted_bug_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, fed_by_several, monkeypatch, 1)
