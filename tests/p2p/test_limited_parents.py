"""A parent that drops rows for want of memory, while its link to a child is in state mode (T2, R5, R11)."""

from unittest import mock

import numpy as np
import pytest

from ekko.store import eviction
from ekko.store.capacity import Capacity
from p2p.busy.backlog import Backlog, Known
from p2p.busy.state_mode import StateMode
from sim_cluster.checkers import Watch, contents
from sim_cluster.network import LinkOptions, NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.backlog_chaos import backlog_of, fill, little_credit, pair
from tests.p2p.plants import Plant, expect_caught

HELD = 60
NARROW = NetworkOptions(1, 5, links={"eu/eu": LinkOptions(10, 4.0)})


def through_a_limited_node(seed: int) -> None:
    """While a backlog is open, rows come for which the parent has no room: it claims nothing of them, and who lacks them pulls.

    It knows of them all, so what it dropped is in its vector and its loss floor, and was never due.
    """
    with little_credit(1_500), mock.patch.object(eviction, "QUIET_MS", 500):
        cluster, parent, child = _three(seed)
        model = cluster.nodes[parent].store.models["ctr"]
        model.limit(Capacity(model.memory_bytes, "least_recently_updated"))
        cluster.run(2_000)
        watch = Watch(cluster)
        cluster.options = NARROW
        assert _overload(cluster, parent, child), f"seed {seed}: the link is not in state mode"
        for step in range(40):
            cluster.publish("t1", "item", [1_000 + step * 4 + number for number in range(4)], float(step))
            cluster.run(40)
            problem = watch.check()
            assert not problem, f"seed {seed}, step {step}: {problem}"
        assert model.eviction is not None
        assert model.eviction.evicted + model.eviction.refused > 50, f"seed {seed}: nothing was dropped"
        cluster.options = NetworkOptions(1, 5)
        cluster.run(15_000)
        problem = watch.check()
        assert not problem, f"seed {seed}: {problem}"
        assert contents(cluster.nodes[child].store, "ctr") == contents(cluster.nodes["t1"].store, "ctr")


def _three(seed: int) -> tuple[VirtualCluster, str, str]:
    """A trainer, a node that it sends to, and one to which that sends."""
    cluster = VirtualCluster(seed, NetworkOptions(1, 5))
    cluster.add("t1", "home", "train")
    for name in ("eu1", "eu2"):
        cluster.add(name, "eu", seeds=["t1"])
    cluster.run(5_000)
    assert cluster.publish("t1", "item", range(HELD), -1.0)
    cluster.run(2_000)
    machine = cluster.nodes["eu1"].machine
    assert machine is not None
    (keyspace,) = machine._core.keyspaces.values()
    parent, child = machine._core.membership.trees(machine._core.now_ms, keyspace.replica.place).line("eu", "t1", 0)
    return cluster, parent, child


def _told(cluster: VirtualCluster, parent: str, child: str) -> bool:
    """Whether the child has told its vector to a backlog."""
    backlog = backlog_of(cluster, parent, child)
    return backlog is not None and backlog.request > 0


def _overload(cluster: VirtualCluster, parent: str, child: str) -> bool:
    """Rows that are held everywhere change faster than the link carries them, until the backlog is open."""
    for _ in range(60):
        fill(cluster, 2, keys=HELD)
        if _told(cluster, parent, child):
            return True
    return False


def test_nothing_is_claimed_of_what_a_parent_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    below, again = 0, list[str]()
    is_below, begin_again = Backlog.is_below_floor, StateMode._again

    def counted(self: Backlog) -> bool:
        nonlocal below
        found = is_below(self)
        below += found
        return found

    def noted(self: StateMode, backlog: Backlog, why: str) -> None:
        again.append(why)
        begin_again(self, backlog, why)

    monkeypatch.setattr(Backlog, "is_below_floor", counted)
    monkeypatch.setattr(StateMode, "_again", noted)
    through_a_limited_node(0)
    assert below, "no claim was ever held back: the scenario proves nothing"
    assert again, "who is below the floor is not asked anew"


def test_who_tells_a_retired_writer_has_no_more_of_it_than_it_tells() -> None:
    """Who agrees with us on a retirement and has all of the writer leaves it out; a newcomer tells how little it has (R13)."""
    with little_credit(1_500):
        cluster = pair(1)
        fill(cluster, 60, keys=100)
        backlog, model = backlog_of(cluster, "t1", "eu1"), cluster.nodes["t1"].store.models["ctr"]
        assert backlog is not None
        retired, ends = 900, np.full(model.shards, 7 << 12 | 900, np.uint64)
        backlog.keyspace.knowledge.retire(retired, ends)
        shards = np.array([0], np.int64)
        model.floor.add(shards, ends[shards], complete=True)
        told, nothing = backlog.keyspace.knowledge.writers, np.zeros((model.shards, 1), np.uint64)
        told = told[told != retired]
        everything = np.full((model.shards, len(told)), np.iinfo(np.uint64).max, np.uint64)
        backlog.known = Known(told, everything)
        assert not backlog.is_below_floor(), "it has all of it, and tells no more of that"
        backlog.known = Known(np.append(told, np.uint16(retired)), np.hstack([everything, nothing]))
        assert backlog.is_below_floor(), "it lacks what was dropped"


# --- planted bugs


def the_floor_does_not_matter(patch: pytest.MonkeyPatch) -> None:
    """T2: a claim is made though the child does not cover the loss floor."""
    patch.setattr(Backlog, "is_below_floor", lambda self: False)


def the_floor_of_the_moment_of_the_answer_counts(patch: pytest.MonkeyPatch) -> None:
    """R5: what was dropped since the child told its vector is not looked at."""
    is_below, found = Backlog.is_below_floor, dict[tuple[int, int], bool]()

    def once(self: Backlog) -> bool:
        return found.setdefault((id(self), self.request), is_below(self))

    patch.setattr(Backlog, "is_below_floor", once)


@pytest.mark.parametrize("plant", [the_floor_does_not_matter, the_floor_of_the_moment_of_the_answer_counts])
def test_a_planted_bug_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, through_a_limited_node, monkeypatch, 3)
