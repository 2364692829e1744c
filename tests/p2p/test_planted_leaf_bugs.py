"""R22: baselines and witnesses are leaves. Each clause is switched off, and what is checked at every step must notice."""

from collections.abc import Callable

import pytest

from p2p import collection
from p2p import messages as m
from p2p.members import leaves
from p2p.members.membership import HOLDER_ROLES, LEAF_ROLES, Membership
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import at_rest, check_claims
from tests.p2p.plants import expect_caught
from tests.seeds import seeds

FAULTS = NetworkOptions(1, 30, 40, loss_probability=0.05, repeat_probability=0.05, reorder_probability=0.1)
# Names that come before those of all others: whoever is first by name leads.
SERVED_MAX = 1
LEAVES = ("a-witness", "a-baseline")


def form(seed: int) -> VirtualCluster:
    """Two regions with holders and leaves, one with leaves only, and more than eight holders in all: four trees."""
    cluster = VirtualCluster(seed)
    cluster.collect_ms = 500
    cluster.add("t1", "home", "train")
    for region in ("home", "eu"):
        for number in range(4):
            cluster.add(f"{region}{number}", region, seeds=["t1"])
    cluster.add("a-witness", "eu", "witness", ["t1"])
    cluster.add("a-baseline", "lone", "baseline", ["t1"])
    assert cluster.run_until(lambda: all(synced(cluster, name) for name in cluster.nodes))
    return cluster


def synced(cluster: VirtualCluster, name: str) -> bool:
    machine = cluster.nodes[name].machine
    return machine is not None and machine.status(cluster.now()).synced


def check_leaves(cluster: VirtualCluster) -> None:
    """No leaf forwards, leads, or answers questions for rows."""
    for name in LEAVES:
        machine = cluster.nodes[name].machine
        if machine is None:
            continue
        core = machine._core
        trees = core.membership.trees(cluster.now_ms)
        origins = [origin for origin in cluster.nodes if origin not in LEAVES]
        children = {child for origin in origins for tree in range(trees.count) for child in trees.children(origin, tree)}
        assert not children, f"{name} forwards to {sorted(children)}"
        assert not core.counters.batches_forwarded, f"{name} forwarded a batch"
        for region in ("home", "eu", "lone"):
            lines = {node for tree in range(trees.count) for node in trees.line(region, "t1", tree)}
            assert not lines & set(LEAVES), f"{name} sees a leaf in the line of {region}"
        # Under faults it may seem for a moment that nobody else has something.
        assert core.counters.pulls_served <= SERVED_MAX, f"{name} was pulled from"
        for keyspace in core.keyspaces.values():
            assert machine._collection._coordinator(keyspace, cluster.now()) not in (None, *LEAVES), f"{name} coordinates"


def leaves_do_nothing_for_others(seed: int) -> None:
    """Writing and deleting under faults, a node that restarts empty, one that is expelled for its absence."""
    cluster = form(seed)
    for node in cluster.nodes.values():
        assert node.machine is not None
    cluster.options = FAULTS
    for step in range(24):
        cluster.publish("t1", "item", [step % 10, step], float(step), delete=step % 5 == 0)
        if step == 8:
            cluster.crash("eu1")
        if step == 12:
            cluster.restart("eu1", keep_state=False)
        cluster.run(150)
        check_leaves(cluster)
    cluster.options = NetworkOptions()
    at_rest(cluster)
    check_leaves(cluster)
    check_claims(cluster)
    stamp = cluster.publish("t1", "item", [1], 5.0, delete=True)
    cluster.crash("a-witness")  # `wait` does not count it, and tombstones wait for it
    waited = wait_all(cluster, stamp)
    assert waited == ((), ()), f"a wait ended with {waited}"
    cluster.run(6_000)
    held = [node.store.models["ctr"].table_stats()["item"].tombstones for node in cluster.nodes.values()]
    assert min(held) > 0, "a tombstone went, and a witness does not know it"
    cluster.restart("a-witness")
    assert cluster.run_until(lambda: not tombstones(cluster), 30_000), f"tombstones stay: {tombstones(cluster)}"


def tombstones(cluster: VirtualCluster) -> int:
    return sum(node.store.models["ctr"].table_stats()["item"].tombstones for node in cluster.nodes.values())


def wait_all(cluster: VirtualCluster, stamp: int) -> tuple[object, ...]:
    keyspace = cluster.model.id
    request = cluster.ask("t1", lambda number: m.WaitRequested(number, keyspace, stamp, m.Scope.ALL, 3_000))
    cluster.run(3_200)
    reply = cluster.nodes["t1"].replies[request]
    assert isinstance(reply, m.WaitEnded)
    return reply.lagging, reply.silent


def what_only_a_leaf_has_is_not_lost(seed: int) -> None:
    """A training node reached nobody but the witness before it died."""
    cluster = form(seed)
    cluster.cut = {("t1", name) for name in cluster.nodes if name not in ("t1", "a-witness")}
    cluster.options = NetworkOptions()
    cluster.publish("t1", "item", [3], 3.0)
    cluster.run(1_000)
    witness = cluster.nodes["a-witness"].store.models["ctr"]
    if not int(witness.newest_rows.max()):
        machine = cluster.nodes["a-witness"].machine
        assert machine is not None
        assert cluster.run_until(lambda: int(witness.newest_rows.max()) > 0, 10_000), "the witness did not get it either"
    cluster.crash("t1")
    cluster.cut = set()
    holders = [name for name in cluster.nodes if name not in ("t1", *LEAVES)]

    def everywhere() -> bool:
        return all(int(cluster.nodes[name].store.models["ctr"].newest_rows.max()) > 0 for name in holders)

    assert cluster.run_until(everywhere, 20_000), "what only the witness had is lost"


def a_region_of_leaves_follows(seed: int) -> None:
    """Where no holder is, a leaf gets its batches from the origin, and a newcomer whose only seed is a leaf catches up."""
    cluster = form(seed)
    cluster.publish("t1", "item", range(5), 1.0)
    newcomer = cluster.add("b-late", "lone", seeds=["a-baseline"])
    assert cluster.run_until(lambda: synced(cluster, "b-late"))
    at_rest(cluster)
    check_leaves(cluster)
    assert newcomer.machine is not None
    assert newcomer.machine.counters.pulls_completed > 0


@pytest.mark.parametrize("seed", seeds(1, 2))
def test_leaves_do_nothing_for_others(seed: int) -> None:
    leaves_do_nothing_for_others(seed)


def test_what_only_a_leaf_has_is_not_lost() -> None:
    what_only_a_leaf_has_is_not_lost(0)


def test_a_region_of_leaves_follows() -> None:
    a_region_of_leaves_follows(0)


Plant = Callable[[pytest.MonkeyPatch], None]


def a_witness_becomes_leader(patch: pytest.MonkeyPatch) -> None:
    """All roles are in the lines of trees."""
    in_trees = Membership._in_trees

    def all_roles(self, now_ms, place, roles):  # type: ignore[no-untyped-def]
        return in_trees(self, now_ms, place, (*HOLDER_ROLES, *LEAF_ROLES) if roles == HOLDER_ROLES else ())

    patch.setattr(Membership, "_in_trees", all_roles)


def whoever_is_first_by_name_coordinates(patch: pytest.MonkeyPatch) -> None:
    """A node that comes before all holders takes itself for the coordinator."""

    def coordinator(self, keyspace, now):  # type: ignore[no-untyped-def]
        holders = self._core.membership.holders(now.monotonic_ms, keyspace.replica.place)
        first = min((holder.node for holder in holders), default=self._core.options.node)
        return None if first >= self._core.options.node else first

    patch.setattr(collection.Collection, "_coordinator", coordinator)


def leaves_are_pulled_from(patch: pytest.MonkeyPatch) -> None:
    """Whoever says that it has more is asked."""
    patch.setattr(leaves, "is_leaf", lambda core, node: False)


def leaves_are_never_asked(patch: pytest.MonkeyPatch) -> None:
    """Not even for what nobody else has."""
    patch.setattr(leaves.LeafNews, "may_ask", lambda self, keyspace, link, *_: not leaves.is_leaf(self._core, link.node))


def leaves_are_waited_for(patch: pytest.MonkeyPatch) -> None:
    """`wait` counts all roles."""
    patch.setattr("p2p.reach.HOLDER_ROLES", (*HOLDER_ROLES, *LEAF_ROLES))


def collection_forgets_leaves(patch: pytest.MonkeyPatch) -> None:
    """Only holders are asked how far they are."""
    holders = collection.Collection._holders

    def without(self, keyspace):  # type: ignore[no-untyped-def]
        members = self._core.membership.members
        known = holders(self, keyspace)
        return {boot: node for boot, node in known.items() if node not in members or members[node].record.role in HOLDER_ROLES}

    patch.setattr(collection.Collection, "_holders", without)


@pytest.mark.parametrize(
    "plant",
    [
        a_witness_becomes_leader,
        whoever_is_first_by_name_coordinates,
        leaves_are_pulled_from,
        leaves_are_waited_for,
        collection_forgets_leaves,
    ],
)
def test_planted_bug(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, leaves_do_nothing_for_others, monkeypatch, seeds=4)


def test_planted_bug_leaves_are_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(leaves_are_never_asked, what_only_a_leaf_has_is_not_lost, monkeypatch, seeds=1)
