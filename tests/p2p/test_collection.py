"""What was deleted is forgotten for good once everybody knows of it, and nothing ever comes back (R5, T6, invariant 8)."""

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest

from ekko.model import ModelSpec, TableSpec
from ekko.store import Store, collecting
from ekko.store.model_store import ModelStore
from p2p import messages as m
from p2p.collection import Collection
from p2p.core import Core
from p2p.errors import RemoteProtocolError
from p2p.link.links import Link
from p2p.paper.sync import PRESETS, PUSH, SyncOptions
from p2p.pulling import outbox, whole
from p2p.pulling.intake import WholeArrivals
from p2p.pulling.outbox import Outbox
from p2p.replica import RowColumns
from p2p.stamps import WRITERS_MAX
from sim_cluster.checkers import Watch, check_converged, contents
from sim_cluster.snapshots import Snapshot
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import at_rest
from tests.p2p.retirement_chaos import expel, retired_everywhere, writer_at

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


def rows_of_a_retired_writer_are_deleted(seed: int) -> None:
    """Both sides leave it out of their vectors (R13); what it wrote and others deleted does not stay where it was restored."""
    cluster = VirtualCluster(seed)
    cluster.collect_ms = COLLECT_MS
    for name in ("t1", "t2", "us1", "us2"):
        cluster.add(name, name[:2], "train" if name[0] == "t" else "serve", [] if name == "t1" else ["t1"])
    cluster.run(5_000)
    for name, keys in (("t1", range(10, 20)), ("t2", range(10))):
        cluster.publish(name, "item", keys, 1.0)
        cluster.run(2_000)
    at_rest(cluster)
    cluster.run(3_000)
    writer, nonce = writer_at(cluster, "t2")
    snapshot = whole_snapshot(cluster, "us2")
    cluster.crash("t2")
    cluster.run(12_000)
    expel(cluster, "t2", "us1")
    del cluster.nodes["t2"]
    retired_everywhere(cluster, writer, nonce)
    cluster.publish("t1", "item", range(5), 0.0, delete=True)
    assert cluster.run_until(lambda: collected(cluster), 30_000)
    restore(cluster, "us2", snapshot)
    assert len(contents(cluster.nodes["us2"].store, "ctr")) == 20, "it has what was deleted"
    at_rest(cluster)
    assert check_converged(cluster) == ""
    assert len(contents(cluster.nodes["us2"].store, "ctr")) == 15


TTL_S = 10


def mortal(seed: int) -> VirtualCluster:
    """Rows live for ten seconds, and the oldest ones are forgotten already."""
    model = ModelSpec("ctr", 8, {"item": TableSpec("item", 4, ttl_s=TTL_S), "user": TableSpec("user", 2)})
    cluster = VirtualCluster(seed, model=model)
    cluster.collect_ms = COLLECT_MS
    for name in NODES:
        cluster.add(name, name[:2], "train" if name[0] == "t" else "serve", [] if name == "t1" else ["t1"])
    cluster.run(5_000)
    for step in range(60):
        cluster.publish("t1", "item", range(20 * step, 20 * step + 20), 1.0)
        cluster.run(500)
    assert cluster.run_until(lambda: len(contents(cluster.nodes["eu1"].store, "ctr")) < 800, 60_000)
    return cluster


def somebody_joins_while_rows_expire(seed: int) -> None:
    """An answer may take longer than rows live: it ends all the same, though some go before they are read."""
    pumped: dict[int, int] = {}
    pump = Outbox.pump

    def slowly(self: Outbox, core: Core, link: Link) -> None:
        if cluster.now_ms - pumped.get(id(self), 0) >= 300:
            pumped[id(self)] = cluster.now_ms
            pump(self, core, link)

    with mock.patch.object(collecting, "AHEAD_MS_MAX", 0), mock.patch.object(outbox, "CHUNK_BYTES_MAX", 300):
        cluster = mortal(seed)
        serving = cluster.nodes["t1"].machine
        assert serving is not None
        before = serving.counters.rows_collected
        with mock.patch.object(Outbox, "pump", slowly):
            cluster.add("ap1", "ap", "serve", ["t1"])
            for step in range(20):
                cluster.publish("t1", "item", range(5_000 + step, 5_005 + step), 1.0)
                cluster.run(1_000)
        machine = cluster.nodes["ap1"].machine
        assert machine is not None
        assert serving.counters.rows_collected > before + 200, "nothing went meanwhile"
        assert machine.status(cluster.now()).synced, "it never got a whole answer"
        assert machine.counters.pulls_abandoned == 0
        at_rest(cluster)


def a_clock_jumps_ahead(seed: int) -> None:
    """It alone says that rows expired; they do not go for good."""
    cluster = mortal(seed)
    cluster.publish("t1", "user", range(5), 0.0)
    cluster.publish("t1", "item", range(10), 2.0)
    at_rest(cluster)
    held = {row for row in contents(cluster.nodes["us1"].store, "ctr").items() if row[0][1] < 10}
    assert len(held) == 15
    cluster.shift_clock("us1", 3_600_000)
    cluster.run(5_000)
    assert held <= set(contents(cluster.nodes["us1"].store, "ctr").items()), "its clock alone says that they expired"
    cluster.shift_clock("us1", -3_600_000)
    cluster.run(90_000)
    assert len(contents(cluster.nodes["us1"].store, "ctr")) == 5, "nothing expires any more"


@pytest.mark.parametrize(
    "scenario", [rows_of_a_retired_writer_are_deleted, somebody_joins_while_rows_expire, a_clock_jumps_ahead]
)
def test_scenario(scenario: Callable[[int], None]) -> None:
    scenario(1)


def test_a_floor_may_take_several_messages() -> None:
    with mock.patch.object(whole, "FLOOR_BYTES_MAX", 1):
        test_who_comes_back_with_an_old_state_gets_whole_shards("push")


def test_what_begins_anew_writes_above_all_that_was_forgotten() -> None:
    """Also where nothing but the loss floor speaks of it."""
    store = Store.anonymous()
    store.add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 4)}))
    model = store.models["ctr"]
    model.merge_floor(np.array([3], np.uint32), np.array([5], np.uint16), np.array([[4096 * 7 + 5]], np.uint64))
    assert model.stamp_max == 4096 * 7 + 5
    assert store.reopened().models["ctr"].stamp_max == 4096 * 7 + 5


def one_model(**tables: int) -> ModelStore:
    """Alone, with tables of these ttls."""
    store = Store.anonymous()
    return store.add_model(ModelSpec("ctr", 8, {name: TableSpec(name, 4, ttl_s=ttl_s) for name, ttl_s in tables.items()}))


def rows_of(model: ModelStore, table: str, keys: range, tick: int, live: bool = True) -> RowColumns:
    """With stamps of writer 5."""
    stamps = np.full(len(keys), (tick << 12) + 5, np.uint64)
    rows = np.zeros((len(keys) if live else 0, model.spec.tables[table].row_bytes), np.uint8)
    return RowColumns(model.spec.tables[table].id, np.array(keys, np.uint64), rows, stamps)


def test_a_look_that_is_full_goes_on_where_it_ended() -> None:
    """Not a table further, whose beginning would wait for another round."""
    model = one_model(item=0, user=0)
    for table in ("item", "user"):
        model.apply([rows_of(model, table, range(10), 3, live=False)], 0)
    until = np.full(WRITERS_MAX, 2**63, np.uint64)
    done = [model.collect(until, 0, 10), model.collect(until, 0, 10)]
    assert [one.rows for one in done] == [10, 10]
    assert not done[0].done


def test_a_slot_that_changes_hands_meanwhile_did_not_come() -> None:
    model = one_model(item=0)
    model.apply([rows_of(model, "item", range(10), 3)], 0)
    arrivals = model.arrivals()
    arrivals.begin(np.arange(8, dtype=np.uint32))
    arrivals.note([rows_of(model, "item", range(10), 3)])
    table = model.spec.tables["item"].id
    model.remove(table, model.table(table).resolve(np.arange(4, dtype=np.uint64)), complete=False)
    model.apply([rows_of(model, "item", range(100, 104), 3)], 0)  # in the slots of those
    everything = np.full((8, 1), (9 << 12) + 5, np.uint64)
    assert arrivals.drop_absent(np.array([5], np.uint16), everything) == 4
    left = np.concatenate(
        [model.read(one.table, one.slots).keys for one in model.scan_since(np.zeros((8, WRITERS_MAX), np.uint64))]
    )
    assert sorted(left.tolist()) == list(range(4, 10))


def floor_for(shards: list[int]) -> m.Floor:
    return m.Floor(np.array(shards, np.uint32), np.array([5], np.uint16), np.full((len(shards), 1), 4096 + 5, np.uint64))


@pytest.mark.parametrize(
    ("chunks", "complaint"),
    [
        pytest.param([([9], [], False)], "comes whole, the keyspace has 8", id="no-such-shard"),
        pytest.param([([], [1], False)], "other shards", id="nothing-came-whole"),
        pytest.param([([1, 2], [3], True)], "other shards", id="another-shard"),
        pytest.param([([1, 2], [1], True)], "other shards", id="not-of-all"),
        pytest.param([([1, 2], [1], False), ([], [1], False)], "other shards", id="twice"),
        pytest.param([([1, 2], [1], False), ([3], [2], True)], "other shards", id="too-early"),
    ],
)
def test_floors_that_contradict_the_answer_are_refused(chunks: list[tuple[list[int], list[int], bool]], complaint: str) -> None:
    cluster = start(nodes=("t1", "us1"))
    machine = cluster.nodes["us1"].machine
    assert machine is not None
    keyspace = machine._core.keyspaces[cluster.model.id]
    arrivals = WholeArrivals()
    for number, (shards, floors, last) in enumerate(chunks):
        told, floor = np.array(shards, np.uint32), floor_for(floors) if floors else None
        if number == len(chunks) - 1:
            with pytest.raises(RemoteProtocolError, match=complaint):
                arrivals.check(8, told, last, floor)
            return
        arrivals.check(8, told, last, floor)
        arrivals.begin(keyspace, told)
        assert arrivals.note(machine._core, keyspace, (), floor, cluster.now())
