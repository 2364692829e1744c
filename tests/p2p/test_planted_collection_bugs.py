"""Each clause of R5, T5 and T6 is switched off on purpose; a scenario that passes as it is must notice."""

import random

import numpy as np
import pytest

from ekko.store import Store
from ekko.store.applying import Applying
from ekko.store.collecting import WholeShards
from ekko.store.model_store import ModelStore
from p2p import collection, pull_answers
from p2p.core import Keyspace
from p2p.replica import U64
from p2p.stamps import WRITERS_MAX
from sim_cluster.checkers import Watch, check_converged
from sim_cluster.network import NetworkOptions
from sim_cluster.snapshots import Snapshot
from sim_cluster.virtual import VirtualCluster
from tests.p2p.plants import Plant, Scenario, expect_caught
from tests.p2p.test_collection import collected, start

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


def restore(cluster: VirtualCluster, name: str, snapshot: Snapshot) -> None:
    """A node's memory is lost, and its process begins with an old one."""
    cluster.crash(name)
    node = cluster.nodes[name]
    node.store = Store.anonymous()
    snapshot.restore(node.store)
    node.losses += 1
    cluster.forget_lost()
    cluster.boot(node)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_comes_back(seed: int) -> None:
    born_deleted_and_away(seed)


def test_what_comes_late_changes_nothing() -> None:
    late_rows(1)


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
        self.removals += 1
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


PLANTS: list[tuple[Plant, Scenario]] = [
    (members_that_are_away_are_not_waited_for, born_deleted_and_away),
    (only_the_tombstones_own_writer_counts, born_deleted_and_away),
    (claims_are_made_to_whoever_asks, born_deleted_and_away),
    (collecting_leaves_no_floor, born_deleted_and_away),
    (what_did_not_come_stays, born_deleted_and_away),
    (a_snapshot_reads_the_floor_first, born_deleted_and_away),
    (a_snapshot_reads_the_vector_last, born_deleted_and_away),
    (ghosts_are_let_in, late_rows),
]


@pytest.mark.parametrize(("plant", "scenario"), PLANTS, ids=lambda item: item.__name__)
def test_a_planted_bug_is_caught(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, scenario, monkeypatch, SEEDS)
