"""Each clause of R5, T5 and T6 is switched off on purpose; a scenario that passes as it is must notice."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ekko.store import Store
from ekko.store.applying import Applying
from ekko.store.collecting import WholeShards
from ekko.store.model_store import ModelStore
from p2p import collection
from p2p import messages as m
from p2p.collection import Collection
from p2p.core import Core, Keyspace
from p2p.link.links import Link
from p2p.pulling import intake, outbox, pull_answers
from p2p.pulling.outbox import Completion, Outbox
from p2p.replica import U64, RowColumns
from p2p.stamps import WRITERS_MAX
from sim_cluster.checkers import Watch, check_converged
from sim_cluster.network import NetworkOptions
from sim_cluster.snapshots import Snapshot
from sim_cluster.virtual import VirtualCluster
from tests.p2p.plants import Plant, Scenario, expect_caught
from tests.p2p.test_collection import (
    a_clock_jumps_ahead,
    collected,
    rows_of_a_retired_writer_are_deleted,
    somebody_joins_while_rows_expire,
    start,
    whole_snapshot,
)
from tests.seeds import seeds

SEEDS = 24
NODES = ("t1", "t2", "eu1", "us1")
COLLECT_MS = 500
KEYS = 24


def born_deleted_and_away(seed: int) -> None:
    """Two writers delete rows and bring them back, while links fail, nodes are away, and old snapshots are restored."""
    rng = random.Random(seed)
    options = NetworkOptions(1, 40, loss_probability=rng.choice((0.0, 0.1)), repeat_probability=0.1, reorder_probability=0.1)
    cluster = VirtualCluster(seed, options)
    cluster.collect_ms = COLLECT_MS
    for name in NODES:
        cluster.add(name, name[:2], "train" if name[0] == "t" else "serve", [] if name == "t1" else ["t1"])
    cluster.run(6_000)
    watch = Watch(cluster)
    snapshots: dict[str, Snapshot] = {}
    taking: tuple[str, Snapshot, int] | None = None
    cut: set[tuple[str, str]] = set()
    for step in range(140):
        writer = rng.choice(NODES[:2])
        if cluster.nodes[writer].machine is not None and rng.random() < 0.6:
            keys = [rng.randrange(KEYS) for _ in range(rng.randint(1, 6))]
            cluster.publish(writer, "item", keys, float(step), delete=rng.random() < 0.5)
        if step % 12 == 3:
            cluster.cut = cut
            cut = set()
            away = rng.choice(NODES)
            if rng.random() < 0.7:
                cluster.cut = {(away, other) for other in NODES} | {(other, away) for other in NODES}
        if step % 16 == 5 and taking is None:
            name = rng.choice(NODES)
            if cluster.nodes[name].machine is not None:
                taking = (name, Snapshot(cluster.nodes[name].store, cluster.models), 0)
                taking[1].take_vectors()
        elif taking is not None and step % 2:
            name, snapshot, part = taking
            if part < PARTS:
                snapshot.take_rows(part, PARTS)
                taking = (name, snapshot, part + 1)
            else:
                snapshot.take_floors()
                snapshots[name], taking = snapshot, None
        if step % 40 == 39 and snapshots:
            name = rng.choice(sorted(snapshots))
            restore(cluster, name, snapshots[name])
        for _ in range(3):
            cluster.run(rng.choice((60, 150, 400)))
            problem = watch.check()
            assert not problem, f"seed {seed}, step {step}: {problem}"
    cluster.cut = set()
    cluster.options = NetworkOptions()
    assert cluster.run_until(lambda: check_converged(cluster) == "", 60_000), f"seed {seed}: {check_converged(cluster)}"
    problem = watch.check_converged()
    assert not problem, f"seed {seed}: {problem}"


PARTS = 3


def late_rows(seed: int) -> None:
    """Versions of before a deletion come again when everybody has forgotten it."""
    cluster = start(seed)
    replica = cluster.nodes["eu1"].store.models["ctr"]
    (selection,) = replica.scan_since(np.zeros((replica.shards, WRITERS_MAX), np.uint64))
    late = replica.read(selection.table, selection.slots)
    cluster.publish("t1", "item", range(10), 0.0, delete=True)
    assert cluster.run_until(lambda: collected(cluster), 30_000)
    replica.apply([late], 0)
    cluster.run(5_000)
    problem = Watch(cluster).check_converged() or check_converged(cluster)
    assert not problem, f"seed {seed}: {problem}"


def collected_in_mid_answer(seed: int) -> None:
    """Rows are collected after they were selected for somebody who had them deleted in a former life, and has them again."""
    cluster = start(seed)
    cluster.run(3_000)
    snapshot = whole_snapshot(cluster, "us2")
    pumped: dict[int, int] = {}
    pump, collect = Outbox.pump, Collection._collect
    begun = False

    def slowly(self: Outbox, core: Core, link: Link) -> None:
        nonlocal begun
        begun = begun or link.node == "us2"
        if cluster.now_ms - pumped.get(id(self), -1_000) >= 300:
            pumped[id(self)] = cluster.now_ms
            pump(self, core, link)

    def later(self: Collection, *args: Any) -> None:
        if begun:
            collect(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collection, "_collect", later)
        patch.setattr(outbox, "CHUNK_BYTES_MAX", 32)
        cluster.publish("t1", "item", range(10), 0.0, delete=True)
        cluster.run(5_000)
        assert not collected(cluster, "us1")
        patch.setattr(Outbox, "pump", slowly)
        restore(cluster, "us2", snapshot)
        cluster.run(10_000)
    assert collected(cluster, "t1", "eu1", "us1"), f"seed {seed}: nothing was collected meanwhile"
    assert cluster.run_until(lambda: check_converged(cluster) == "", 30_000), f"seed {seed}: {check_converged(cluster)}"


def restored_from_who_was_restored(seed: int) -> None:
    """Who got whole shards answers another one who needs them."""
    cluster = start(seed)
    cluster.run(3_000)
    snapshots = {name: whole_snapshot(cluster, name) for name in ("us1", "us2")}
    cluster.publish("t1", "item", range(10), 0.0, delete=True)
    assert cluster.run_until(lambda: collected(cluster), 30_000)
    restore(cluster, "us2", snapshots["us2"])
    assert cluster.run_until(lambda: check_converged(cluster) == "", 30_000)
    cluster.cut = {pair for name in ("t1", "eu1") for pair in (("us1", name), (name, "us1"))}
    restore(cluster, "us1", snapshots["us1"])
    assert cluster.run_until(lambda: check_converged(cluster) == "", 30_000), f"seed {seed}: {check_converged(cluster)}"


def who_is_not_known_to_have_all(seed: int) -> None:
    """A life that somebody names and the coordinator has not met; and one that has not reported although its former did."""
    cluster = start(seed)
    cluster.publish("t1", "item", range(10), 0.0, delete=True)
    cluster.run(2_000)
    coordinator = cluster.nodes["eu1"].machine
    assert coordinator is not None
    collection, keyspace = coordinator._collection, coordinator._core.keyspaces[cluster.model.id]
    links = coordinator._core.links
    reports = {name: _report_of(cluster, name) for name in ("t1", "us1", "us2")}

    def conclude() -> dict[int, int]:
        collection._states.clear()
        for name, report in reports.items():
            collection.on_report(links[name], report, cluster.now())
        collection._conclude(keyspace, collection._states[cluster.model.id], cluster.now())
        return collection._states[cluster.model.id].reached

    assert conclude(), f"seed {seed}: the scenario proves nothing"
    known = reports["us1"]
    reports["us1"] = replace(known, boots=np.append(known.boots, np.uint64(77)))
    assert not conclude(), f"seed {seed}: a newcomer is not waited for"
    reports["us1"] = known
    assert conclude()
    cluster.crash("us2")
    state = collection._states[cluster.model.id]
    cluster.restart("us2")
    assert cluster.run_until(lambda: links["us2"].boot not in state.reports, 5_000, 1), f"seed {seed}: it was not noticed"
    state.reached = {}
    collection._conclude(keyspace, state, cluster.now())
    assert not state.reached, f"seed {seed}: its former life's report counts"


def _report_of(cluster: VirtualCluster, name: str) -> m.StableReport:
    machine = cluster.nodes[name].machine
    assert machine is not None
    return machine._collection._report(machine._core.keyspaces[cluster.model.id], True)


def restore(cluster: VirtualCluster, name: str, snapshot: Snapshot) -> None:
    """A node's memory is lost, and its process begins with an old one."""
    cluster.crash(name)
    node = cluster.nodes[name]
    node.store = Store.anonymous()
    snapshot.restore(node.store)
    node.losses += 1
    cluster.forget_lost()
    cluster.boot(node)


@pytest.mark.parametrize("seed", seeds(2, 4))
def test_nothing_comes_back(seed: int) -> None:
    born_deleted_and_away(seed)


@pytest.mark.parametrize(
    "scenario", [late_rows, collected_in_mid_answer, restored_from_who_was_restored, who_is_not_known_to_have_all]
)
def test_scenario(scenario: Scenario) -> None:
    scenario(1)


# --- the rules, switched off ------------------------------------------------------------------------------------------------


def members_that_are_away_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """R5: collected when those who live have it, and any writer may be behind."""
    patch.setattr(collection, "stable_until", lambda keyspace, everybody: np.full(WRITERS_MAX, 2**64 - 1, np.uint64))


def only_the_tombstones_own_writer_counts(patch: pytest.MonkeyPatch) -> None:
    """R5: the collector need not have everything of the other writers."""

    def until(keyspace: Keyspace, everybody: dict[int, int]) -> U64:
        out = np.zeros(WRITERS_MAX, np.uint64)
        for writer in {*everybody, *keyspace.knowledge.writers.tolist()}:
            out[writer] = keyspace.knowledge.frontier[writer]
        return out

    patch.setattr(collection, "stable_until", until)


def claims_are_made_to_whoever_asks(patch: pytest.MonkeyPatch) -> None:
    """R5: a sender completes a claim though its asker is below the loss floor."""
    none = lambda keyspace, base: np.zeros(keyspace.knowledge.shards, np.bool_)  # noqa: E731
    patch.setattr(pull_answers, "below_floor", none)


def collecting_leaves_no_floor(patch: pytest.MonkeyPatch) -> None:
    """R5: what was collected is not merged into the loss floor."""

    def remove(self: ModelStore, table: int, slots: np.ndarray, *, complete: bool) -> None:
        self._tables[table].remove(slots)

    patch.setattr(ModelStore, "remove", remove)


def what_did_not_come_stays(patch: pytest.MonkeyPatch) -> None:
    """R5: the receiver of a whole shard keeps what the reply does not have."""
    patch.setattr(WholeShards, "drop_absent", lambda *args: 0)


def a_snapshot_reads_the_floor_first(patch: pytest.MonkeyPatch) -> None:
    """T5: the loss floor is read before the slabs."""
    vectors = Snapshot.take_vectors

    def first(self: Snapshot) -> None:
        vectors(self)
        floors(self)

    floors = Snapshot.take_floors
    patch.setattr(Snapshot, "take_vectors", first)
    patch.setattr(Snapshot, "take_floors", lambda self: None)


def a_snapshot_reads_the_vector_last(patch: pytest.MonkeyPatch) -> None:
    """T5: the vector is read after the slabs."""
    vectors, floors = Snapshot.take_vectors, Snapshot.take_floors

    def last(self: Snapshot) -> None:
        vectors(self)
        floors(self)

    patch.setattr(Snapshot, "take_vectors", lambda self: None)
    patch.setattr(Snapshot, "take_floors", last)


def ghosts_are_let_in(patch: pytest.MonkeyPatch) -> None:
    """T6: late versions of what was collected are taken for new rows."""
    patch.setattr(Applying, "without_ghosts", lambda self, columns, stamp: (list(columns), 0))


def it_is_not_looked_again_before_the_claim(patch: pytest.MonkeyPatch) -> None:
    """R5: the floor rose while the rows were on their way, and the claim is made nevertheless."""
    patch.setattr(pull_answers.PullAnswers, "_complete", lambda *args: Completion.CLAIM)


def what_is_gone_ends_an_answer(patch: pytest.MonkeyPatch) -> None:
    """An answer of which a row was collected is not whole, so that none is while rows expire."""
    rows = outbox._next_rows

    def next_rows(stream: outbox.PullStream, keyspace: Keyspace) -> tuple[RowColumns, ...]:
        due = sum(len(selection.slots) for selection in stream.selections) - stream.row_offset
        columns = rows(stream, keyspace)
        left = sum(len(selection.slots) for selection in stream.selections) - stream.row_offset
        if sum(len(column.keys) for column in columns) != due - left:
            stream.next_chunk += 1
        return columns

    patch.setattr(outbox, "_next_rows", next_rows)


def whole_shards_come_without_a_floor(patch: pytest.MonkeyPatch) -> None:
    """R5: who got whole shards does not know what was dropped there."""

    def floor_of(keyspace: Keyspace, shards: NDArray[np.uint32]) -> m.Floor:
        return m.Floor(shards, np.empty(0, np.uint16), np.empty((len(shards), 0), np.uint64))

    patch.setattr(pull_answers, "floor_of", floor_of)


def nobody_asks_for_retired_writers(patch: pytest.MonkeyPatch) -> None:
    """R13: what a retired writer wrote is never deleted where it was restored, since vectors leave it out."""
    patch.setattr(intake, "_with_settled", lambda keyspace, writers, vector: (writers, vector))


def any_clock_is_right(patch: pytest.MonkeyPatch) -> None:
    """R14: rows expire for good by a clock that jumped."""
    patch.setattr(Collection, "_sure_unix_ms", lambda self, now: now.unix_ms)


def newcomers_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """R5: lives that others name and that have not reported."""
    report = collection._Report
    patch.setattr(collection, "_Report", lambda reached, boots: report(reached, frozenset()))


def former_lives_count(patch: pytest.MonkeyPatch) -> None:
    """R5: whoever reported once has reported."""
    holders = Collection._holders

    def reported(self: Collection, keyspace: Keyspace) -> dict[int, m.NodeId]:
        state = self._states.get(keyspace.replica.keyspace)
        return holders(self, keyspace) if state is None else dict.fromkeys(state.reports, "")

    patch.setattr(Collection, "_holders", reported)


PLANTS: list[tuple[Plant, Scenario]] = [
    (members_that_are_away_are_not_waited_for, born_deleted_and_away),
    (only_the_tombstones_own_writer_counts, born_deleted_and_away),
    (claims_are_made_to_whoever_asks, born_deleted_and_away),
    (collecting_leaves_no_floor, born_deleted_and_away),
    (what_did_not_come_stays, born_deleted_and_away),
    (a_snapshot_reads_the_floor_first, born_deleted_and_away),
    (a_snapshot_reads_the_vector_last, born_deleted_and_away),
    (ghosts_are_let_in, late_rows),
    (it_is_not_looked_again_before_the_claim, collected_in_mid_answer),
    (what_is_gone_ends_an_answer, somebody_joins_while_rows_expire),
    (whole_shards_come_without_a_floor, restored_from_who_was_restored),
    (nobody_asks_for_retired_writers, rows_of_a_retired_writer_are_deleted),
    (any_clock_is_right, a_clock_jumps_ahead),
    (newcomers_are_not_waited_for, who_is_not_known_to_have_all),
    (former_lives_count, who_is_not_known_to_have_all),
]


# Half a minute of seeds; `tests/ekko/snapshots/test_order.py` plants the same where snapshots are written.
LONG = {a_snapshot_reads_the_floor_first}


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [pytest.param(*pair, marks=pytest.mark.long if pair[0] in LONG else ()) for pair in PLANTS],
    ids=lambda item: item.__name__,
)
def test_a_planted_bug_is_caught(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, scenario, monkeypatch, SEEDS)
