"""What was deleted is forgotten for good once everybody knows of it, and nothing ever comes back (R5, T6, invariant 8)."""

from unittest import mock

import numpy as np
import pytest

from ekko.store import Store
from p2p.collection import Collection
from p2p.replica import RowColumns
from p2p.stamps import WRITERS_MAX
from p2p.sync import PRESETS, PUSH, SyncOptions
from sim_cluster.checkers import Watch, check_converged, contents
from sim_cluster.snapshots import Snapshot
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import at_rest

COLLECT_MS = 1_000
NODES = ("t1", "eu1", "us1", "us2")


def start(seed: int = 1, sync: SyncOptions = PUSH, nodes: tuple[str, ...] = NODES) -> VirtualCluster:
    """A cluster that collects soon, and has written."""
    cluster = VirtualCluster(seed, sync=sync)
    cluster.collect_ms = COLLECT_MS
    for name in nodes:
        cluster.add(name, name[:2], "train" if name[0] == "t" else "serve", [] if name == "t1" else ["t1"])
    cluster.run(5_000)
    cluster.publish("t1", "item", range(20), 1.0)
    at_rest(cluster)
    return cluster


def tombstones(cluster: VirtualCluster, name: str) -> int:
    """How many deleted rows a node keeps."""
    return sum(not value for _, value in contents(cluster.nodes[name].store, "ctr").values())


def collected(cluster: VirtualCluster, *names: str) -> bool:
    """Whether these nodes, or all, have forgotten all that was deleted."""
    return not any(tombstones(cluster, name) for name in names or cluster.nodes)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_deleted_is_forgotten_by_all(preset: str) -> None:
    cluster = start(sync=PRESETS[preset])
    watch = Watch(cluster)
    cluster.publish("t1", "item", range(10), 0.0, delete=True)
    at_rest(cluster)
    assert watch.check() == ""
    assert tombstones(cluster, "eu1") == 10
    assert cluster.run_until(lambda: collected(cluster), 30_000), "tombstones stay"
    assert watch.check_converged() == check_converged(cluster) == ""
    assert all(len(contents(node.store, "ctr")) == 10 for node in cluster.nodes.values())
    cluster.publish("t1", "item", range(5), 2.0)  # born again
    at_rest(cluster)
    assert watch.check_converged() == ""


def test_who_is_away_is_waited_for_and_then_expelled() -> None:
    cluster = start()
    cluster.run(3_000)
    cluster.crash("us2")
    cluster.publish("t1", "item", range(10), 0.0, delete=True)
    cluster.run(30_000)
    assert tombstones(cluster, "eu1") == 10, "it was not waited for"
    cluster.restart("us2")
    assert cluster.run_until(lambda: collected(cluster), 30_000)


@pytest.mark.parametrize("preset", PRESETS)
def test_who_comes_back_with_an_old_state_gets_whole_shards(preset: str) -> None:
    """Its memory is as it was before the deletion, as after a restore; the others have forgotten it."""
    cluster = start(sync=PRESETS[preset])
    cluster.run(3_000)
    snapshot = whole_snapshot(cluster, "us2")
    cluster.publish("t1", "item", range(10), 0.0, delete=True)
    assert cluster.run_until(lambda: collected(cluster), 30_000)
    cluster.publish("t1", "item", range(3), 2.0)
    restore(cluster, "us2", snapshot)
    assert len(contents(cluster.nodes["us2"].store, "ctr")) == 20, "it has what was deleted"
    watch = Watch(cluster)
    at_rest(cluster)
    assert watch.check_converged() == ""
    assert len(contents(cluster.nodes["us2"].store, "ctr")) == 13
    machine = cluster.nodes["us2"].machine
    assert machine is not None
    assert machine.counters.rows_dropped in (7, 10), "three of them may have been born again before"
    cluster.run(10_000)
    assert check_converged(cluster) == ""


def whole_snapshot(cluster: VirtualCluster, name: str) -> Snapshot:
    """What a node holds at this moment."""
    snapshot = Snapshot(cluster.nodes[name].store, cluster.models)
    snapshot.take_vectors()
    snapshot.take_rows(0, 1)
    snapshot.take_floors()
    return snapshot


def restore(cluster: VirtualCluster, name: str, snapshot: Snapshot) -> None:
    """A node's memory is lost, and its process begins with an old one."""
    cluster.crash(name)
    node = cluster.nodes[name]
    node.store = Store.anonymous()
    snapshot.restore(node.store)
    node.losses += 1
    cluster.boot(node)


def test_a_late_version_of_what_was_forgotten_is_a_ghost() -> None:
    cluster = start()
    replica = cluster.nodes["eu1"].store.models["ctr"]
    table = cluster.model.tables["item"].id
    (selection,) = replica.scan_since(np.zeros((replica.shards, WRITERS_MAX), np.uint64))
    late = replica.read(selection.table, selection.slots)
    cluster.publish("t1", "item", range(10), 0.0, delete=True)
    assert cluster.run_until(lambda: collected(cluster), 30_000)
    applied = replica.apply([late], 0)
    assert (applied.ghosts, applied.written, applied.stale) == (10, 0, 10)
    assert check_converged(cluster) == ""
    own = RowColumns(table, late.keys[:1], late.rows[:1])
    assert replica.apply([own], int(late.stamps.max())).ghosts == int(late.keys[0] < 10)


def test_an_idle_cluster_without_tombstones_says_nothing_of_it() -> None:
    cluster = start()
    said = []
    wrapped = Collection.on_ask
    with mock.patch.object(Collection, "on_ask", lambda *args: said.append(args) or wrapped(*args)):
        cluster.run(20_000)
        assert not said
        cluster.publish("t1", "item", [1], 0.0, delete=True)
        cluster.run(20_000)
        asked = len(said)
        assert asked
        assert collected(cluster)
        cluster.run(20_000)
        assert len(said) == asked


def test_a_writer_that_lost_its_memory_holds_nothing_up() -> None:
    """Its former id writes no more, also not that nothing came since: it is retired by the node whose it was."""
    cluster = start()
    cluster.run(3_000)
    cluster.crash("t1")
    cluster.restart("t1", keep_state=False)
    cluster.run(8_000)
    assert cluster.publish("t1", "item", range(10), 0.0, delete=True)
    assert cluster.run_until(lambda: collected(cluster), 60_000)
    assert check_converged(cluster) == ""
