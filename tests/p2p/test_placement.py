"""Who holds what, and what follows: trees, waits and knowledge among the holders of a partition (R21, R22)."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.store.questions import Questions
from p2p import messages as m
from p2p import reach
from p2p.members import membership
from p2p.members.gossip import Gossip
from p2p.members.trees import TREES_MAX, Holder, Trees
from p2p.placement import divide, holdings_of, holds, may_hold
from p2p.pulling import pull
from p2p.pushing import push
from p2p.replica import Place, RowColumns
from p2p.stamps import WRITERS_MAX
from p2p.versions import first_record_version
from sim_cluster.virtual import VirtualCluster
from tests.p2p import divided
from tests.p2p.plants import Plant, Scenario, expect_caught
from tests.seeds import seeds

SEEDS = 6
SCENARIOS = (
    divided.nothing_goes_wrong,
    divided.waits_go_by_the_holders,
    divided.chaos,
    divided.the_only_other_holder_is_no_neighbour,
    divided.a_partition_is_held_more_often,
)


# --- who holds what ---------------------------------------------------------------------------------------------------------


def record(*held: m.Holding, told: int = 2, protocol: int = 2) -> m.MemberRecord:
    version = first_record_version(protocol)
    return m.MemberRecord("eu1", 5, 1, "eu", "serve", "virtual://eu1", 1, version=version, holds=held, told=told)


def test_everybody_holds_a_family_that_is_not_divided() -> None:
    assert holds(record(), Place(7))


def test_a_record_says_what_is_held_of_a_family_that_is() -> None:
    places = [Place(7, partition, 4) for partition in (3, 1)] + [Place(8), Place(9, 0, 2)]
    told = record(*holdings_of(places))
    assert told.holds == (m.Holding(7, 4, (1, 3)), m.Holding(9, 2, (0,)))
    assert [holds(told, Place(7, partition, 4)) for partition in range(4)] == [False, True, False, True]
    assert not holds(told, Place(7, 1, 2)), "divided otherwise, its partition 1 is another one"
    assert not holds(told, Place(6, 0, 2)), "who says nothing holds nothing"


def test_what_was_not_told_is_not_known() -> None:
    """A hello, and nodes of version 1, leave it out: a wait must not take that for `no`."""
    place = Place(7, 1, 4)
    assert may_hold(record(told=1), place)
    assert not may_hold(record(), place)
    assert not may_hold(record(told=1, protocol=1), place), "version 1 knows no partitions"


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40),
    st.booleans(),
)
def test_a_step_is_divided_without_loss_and_in_order(rows: list[tuple[int, bool]], weighted: bool) -> None:
    live = [belongs for belongs, alive in rows if alive]
    belongs = np.array(live + [belongs for belongs, alive in rows if not alive], np.int64)
    keys = np.arange(len(rows), dtype=np.uint64)
    values = keys[: len(live)].astype(np.uint8).reshape(-1, 1)
    section = RowColumns(3, keys, values, None, keys.astype(np.uint8) if weighted else None)
    parts = divide([section], [belongs], 5)
    assert list(parts) == sorted(set(belongs.tolist()))
    assert sorted(key for part in parts.values() for one in part for key in one.keys.tolist()) == keys.tolist()
    for partition, (one,) in parts.items():
        assert (belongs[one.keys.astype(np.int64)] == partition).all()
        assert one.keys.tolist() == sorted(one.keys.tolist())
        assert one.rows[:, 0].tolist() == [key for key in one.keys.tolist() if key < len(live)]
        assert (one.priority is not None) == weighted
        assert one.priority is None or (one.priority == one.keys).all()


def test_rows_that_lie_by_partition_are_not_copied() -> None:
    keys = np.arange(6, dtype=np.uint64)
    section = RowColumns(3, keys, keys[:5].astype(np.uint8).reshape(-1, 1), None, keys.astype(np.uint8))
    parts = divide([section], [np.array([0, 0, 2, 2, 2, 4])], 5)
    assert {partition: one.keys.tolist() for partition, (one,) in parts.items()} == {0: [0, 1], 2: [2, 3, 4], 4: [5]}
    assert all(np.shares_memory(one.keys, keys) for (one,) in parts.values())
    assert np.shares_memory(parts[2][0].rows, section.rows)
    assert len(parts[4][0].rows) == 0, "a tombstone has no row"


@pytest.mark.parametrize("seed", [2, 3, 8])  # where somebody learned of somebody by a hello alone
def test_what_a_hello_leaves_out_is_told_later(seed: int) -> None:
    divided.news_is_lost_while_nodes_meet(seed)


# --- leaves -----------------------------------------------------------------------------------------------------------------

nodes = st.lists(
    st.builds(Holder, st.sampled_from(["ap", "eu", "us"]), st.integers(0, 60).map(str)),
    min_size=1,
    max_size=30,
    unique_by=lambda holder: holder.node,
)


@given(nodes, st.randoms(), st.integers(0, TREES_MAX - 1), st.integers(0, 12))
def test_leaves_are_reached_once_and_are_nobodys_parent(view: list[Holder], draw: random.Random, tree: int, count: int) -> None:
    origin, *rest = view
    leaves = rest[:count]
    holders = [origin, *rest[count:]]
    by_name = {holder.node: holder for holder in view}
    depth, queue = {origin.node: 0}, [origin]
    while queue:
        parent = queue.pop(0)
        for child in Trees(parent, draw.sample(holders, len(holders)), leaves=leaves).children(origin.node, tree):
            assert child not in depth, "a second copy"
            assert parent not in leaves, "a leaf forwards"
            depth[child] = depth[parent.node] + 1
            queue.append(by_name[child])
            crossed = by_name[child].region != parent.region
            assert not crossed or parent == origin, "somebody else crosses into a region"
    assert set(depth) == set(by_name)
    assert max(depth.values()) < Trees(origin, holders, leaves=leaves).hops_max


def test_a_region_of_leaves_has_no_leader() -> None:
    view, leaves = [Holder("eu", "a"), Holder("eu", "b")], [Holder("us", "w1"), Holder("us", "w2")]
    assert Trees(view[0], view, leaves=leaves).children("a", 0) == ("b", "w1", "w2")
    assert Trees(leaves[0], view, leaves=leaves).children("a", 0) == ()


def test_leaves_of_a_region_are_shared_out() -> None:
    view = [Holder("eu", name) for name in "abcdef"]
    leaves = [Holder("eu", f"w{number}") for number in range(10)]
    counts = [len(set(Trees(me, view, leaves=leaves).children("a", 0)) & {leaf.node for leaf in leaves}) for me in view[1:]]
    assert max(counts) - min(counts) <= 1


def test_baseline_and_witness_are_leaves() -> None:
    own = m.MemberRecord("a", 1, 1, "eu", "train", "virtual://a", 1)
    register = membership.Membership(own)
    for number, role in enumerate(("serve", "baseline", "witness")):
        register.learn(m.MemberRecord(role, 10 + number, 1, "eu", role, f"virtual://{role}", 1, version=own.version), 0)
    assert [holder.node for holder in register.holders(0)] == ["a", "serve"]
    assert register.trees(0).children("a", 0) == ("serve",)
    serving = membership.Membership(m.MemberRecord("serve", 10, 1, "eu", "serve", "virtual://serve", 1))
    for other in (own, *(register.members[role].record for role in ("baseline", "witness"))):
        serving.learn(other, 0)
    assert serving.trees(0).children("a", 0) == ("baseline", "witness")


# --- writing ----------------------------------------------------------------------------------------------------------------


def test_a_node_holds_what_it_writes() -> None:
    """R22: a step of which some rows belong elsewhere is refused, all of it."""
    cluster = VirtualCluster(1, model=divided.SPEC)
    cluster.add("t1", "home", "train", hold={"ctr": [0, 2]})
    cluster.run(1_000)
    replies = cluster.nodes["t1"].replies
    assert not cluster.publish("t1", "item", range(100), 1.0)
    (refused,) = replies.values()
    assert isinstance(refused, m.Refused)
    assert "rows of partitions [1], of which this node holds [0, 2]" in refused.reason
    assert cluster.nodes["t1"].store.models["ctr"].stamp_max == 0, "some of it was written"
    assert cluster.publish("t1", "item", divided.keys_in(cluster, 2), 1.0)


def test_two_writers_hold_different_partitions() -> None:
    """What one of them writes says nothing of how fresh the other's partition is."""
    cluster = VirtualCluster(3, model=divided.SPEC)
    cluster.add("t1", "home", "train", hold={"ctr": [0, 1]})
    cluster.add("t2", "home", "train", seeds=["t1"], hold={"ctr": [1, 2]})
    cluster.add("eu1", "eu", seeds=["t1"], hold={"ctr": [0]})
    cluster.run(15_000)  # of partition 2 nobody else holds anything
    for name, partition in (("t1", 0), ("t2", 2)):  # a writer id takes a moment to get
        keys = divided.keys_in(cluster, partition)
        assert cluster.run_until(lambda: bool(cluster.publish(name, "item", keys, 0.5)), 20_000)  # noqa: B023
    for step in range(20):
        assert cluster.publish("t1", "item", divided.keys_in(cluster, 0), float(step))
        assert cluster.publish("t2", "item", divided.keys_in(cluster, step % 2 + 1), float(step))
        cluster.run(200)
    divided.at_rest(cluster, 2_000)
    machine = cluster.nodes["eu1"].machine
    assert machine is not None
    (keyspace,) = machine.status(cluster.now()).keyspaces
    assert len(keyspace.writers) == 1, "a writer that cannot write here would leave it stale for ever"
    assert cluster.now().unix_ms - keyspace.synced_until_ms < 1_000


def test_a_partition_that_nobody_else_alive_holds_is_served_after_a_while() -> None:
    cluster = VirtualCluster(2, model=divided.SPEC)
    cluster.add("t1", "home", "train", hold={"ctr": [0, 1]})
    alone = cluster.add("eu1", "eu", seeds=["t1"], hold={"ctr": [1, 2]})
    cluster.run(5_000)
    assert alone.machine is not None
    assert [keyspace.synced for keyspace in alone.machine.status(cluster.now()).keyspaces] == [True, False]
    cluster.run(10_000)
    assert alone.machine.status(cluster.now()).synced
    assert [note.name for note in alone.notes if note.alarm] == ["partition_alone"]


# --- whole clusters, as they are and with one rule switched off -------------------------------------------------------------


def trees_are_over_all_nodes(patch: pytest.MonkeyPatch) -> None:
    """R22: whoever lives is in the tree, whether it holds the partition or not."""
    original = membership.Membership.trees
    patch.setattr(membership.Membership, "trees", lambda self, now_ms, _place=None: original(self, now_ms))


def a_wait_counts_everybody(patch: pytest.MonkeyPatch) -> None:
    """R21: who does not hold the partition is waited for, too."""
    patch.setattr(reach, "may_hold", lambda _record, _place: True)


def a_wait_counts_holders_of_the_first_partition(patch: pytest.MonkeyPatch) -> None:
    """R21: of the partitions that a step touches, the last is forgotten."""
    original = reach.Reach.holders

    def holders(self: Any, scope: Any, keyspace: Any, now: Any) -> Any:
        place = keyspace.replica.place
        return ({}, {}) if place.partition == 0 else original(self, scope, keyspace, now)

    patch.setattr(reach.Reach, "holders", holders)


def one_partition_moves_the_frontier_of_all(patch: pytest.MonkeyPatch) -> None:
    """Who has all of a step in one partition believes to have it in the others that it holds."""
    original = push.Push.apply

    def apply(self: Any, batch: m.Batch, peer: str) -> None:
        original(self, batch, peer)
        own = self._core.keyspaces[batch.keyspace]
        for other in self._core.families[own.replica.place.family]:
            frontier = other.knowledge.frontier
            frontier[batch.writer] = max(int(frontier[batch.writer]), int(own.knowledge.frontier[batch.writer]))

    patch.setattr(push.Push, "apply", apply)


def a_claim_is_whole_without_all_of_its_shards(patch: pytest.MonkeyPatch) -> None:
    """A message of a step says that the step touches no more shards than the message does."""
    original = push.split_step

    def split(batch: m.Batch, *rest: Any) -> Any:
        for message in original(batch, *rest):
            object.__setattr__(message, "shards_touched", len(message.claims.shards))
            yield message

    patch.setattr(push, "split_step", split)


def an_answer_has_rows_of_all_partitions(patch: pytest.MonkeyPatch) -> None:
    """A pull selects what the asker lacks of the whole model."""

    def ask(self: Questions, partition: int, base: Any, question: Any) -> Any:
        whole = np.zeros((self._shards, WRITERS_MAX), np.uint64)
        whole[partition :: self._partitions] = base
        return question(whole)

    patch.setattr(Questions, "in_partition", ask)


def holders_do_not_look_for_each_other(patch: pytest.MonkeyPatch) -> None:
    """Only gossip fingers are compared, which may all hold other partitions."""
    patch.setattr(Gossip, "_partners", lambda *_args: [])


def a_new_partition_counts_as_caught_up(patch: pytest.MonkeyPatch) -> None:
    """A node that has just come to hold a partition says that it is ready."""

    def born(self: Any, now: Any) -> None:
        for keyspace in self._core.keyspaces.values():
            keyspace.synced = True

    patch.setattr(pull.Pull, "check_gaps", born)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("seed", seeds(1, 2))
def test_divided_clusters(scenario: Scenario, seed: int) -> None:
    scenario(seed)


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (trees_are_over_all_nodes, divided.nothing_goes_wrong),
        (a_wait_counts_everybody, divided.waits_go_by_the_holders),
        (a_wait_counts_holders_of_the_first_partition, divided.waits_go_by_the_holders),
        (one_partition_moves_the_frontier_of_all, divided.chaos),
        (a_claim_is_whole_without_all_of_its_shards, divided.chaos),
        pytest.param(an_answer_has_rows_of_all_partitions, divided.chaos, marks=pytest.mark.long),
        (holders_do_not_look_for_each_other, divided.the_only_other_holder_is_no_neighbour),
        (a_new_partition_counts_as_caught_up, divided.a_partition_is_held_more_often),
    ],
    ids=lambda function: function.__name__,
)
def test_the_simulator_catches(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, scenario, monkeypatch, SEEDS)
