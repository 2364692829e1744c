"""Trees reach everyone once, cross into a region once, are the same on every node, share the load, and change little."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.members.trees import ONE_TREE_HOLDERS_MAX, SEATS_SINCE, TREE_ARITY, TREES_MAX, Holder, Trees, line, seat_at, seats
from p2p.versions import FIRST_VERSION
from sim_cluster.meter import Meter
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster

VERSIONS = (1, SEATS_SINCE)

holders = st.lists(
    st.builds(Holder, st.sampled_from(["ap", "eu", "us"]), st.integers(0, 60).map(str)),
    min_size=1,
    max_size=40,
    unique_by=lambda holder: holder.node,
)


@given(holders, st.randoms(), st.integers(0, TREES_MAX - 1), st.sampled_from(VERSIONS))
def test_a_batch_reaches_every_holder_once_and_every_region_once(
    view: list[Holder], draw: random.Random, tree: int, version: int
) -> None:
    origin = draw.choice(view)
    by_name = {holder.node: holder for holder in view}
    depth = {origin.node: 0}
    crossings: dict[str, int] = {}
    queue = [origin]
    while queue:
        holder = queue.pop(0)
        shuffled = draw.sample(view, len(view))
        for child in Trees(holder, shuffled, version).children(origin.node, tree):
            assert child not in depth, "a second copy"
            depth[child] = depth[holder.node] + 1
            queue.append(by_name[child])
            if by_name[child].region != holder.region:
                crossings[by_name[child].region] = crossings.get(by_name[child].region, 0) + 1
    assert set(depth) == set(by_name)
    assert set(crossings) == {holder.region for holder in view} - {origin.region}
    assert set(crossings.values()) <= {1}
    assert max(depth.values()) < Trees(origin, view, version).hops_max


def test_who_is_not_in_the_view_forwards_nothing() -> None:
    view = [Holder("eu", "a"), Holder("eu", "b")]
    assert Trees(Holder("eu", "c"), view).children("a", 0) == ()
    assert Trees(Holder("us", "c"), view).children("a", 0) == ()


def test_nobody_but_the_origin_has_more_children_than_the_arity() -> None:
    view = [Holder("eu", str(number)) for number in range(30)]
    assert max(len(Trees(me, view).children("0", 0)) for me in view[1:]) == TREE_ARITY
    assert len(Trees(view[0], view).children("0", 0)) == 1


def test_small_clusters_have_one_tree() -> None:
    view = [Holder("eu", str(number)) for number in range(ONE_TREE_HOLDERS_MAX + 1)]
    assert [Trees(view[0], view[:-1]).count, Trees(view[0], view).count] == [1, TREES_MAX]


@pytest.mark.parametrize("tree", range(TREES_MAX))
def test_every_seat_has_one_place(tree: int) -> None:
    for count in range(1, 300):
        assert sorted(seat_at(place, tree, count) for place in range(count)) == list(range(count))


def copies_sent(count: int) -> list[int]:
    """How many copies each node of a region sends, if each tree carries one batch."""
    nodes = tuple(sorted(f"n{number}" for number in range(count)))
    sent = dict.fromkeys(nodes, 0)
    for tree in range(TREES_MAX):
        own = line(nodes, tree, SEATS_SINCE)
        for place in range(1, count):
            sent[own[(place - 1) // TREE_ARITY]] += 1
    return list(sent.values())


def test_trees_share_the_load() -> None:
    """In a region of whatever size nobody sends more than four copies; the mean is nearly that: all but one, in four trees."""
    for count in range(2, 260):
        sent = copies_sent(count)
        mean = TREES_MAX * (count - 1) / count
        assert sum(sent) == TREES_MAX * (count - 1)
        assert max(sent) <= TREE_ARITY
        assert max(sent) <= (1.5 if count == 3 else 1.25) * mean


def parents(nodes: tuple[str, ...]) -> dict[tuple[int, str], str]:
    lines = {tree: line(nodes, tree, SEATS_SINCE) for tree in range(TREES_MAX)}
    return {(tree, own[place]): own[(place - 1) // TREE_ARITY] for tree, own in lines.items() for place in range(1, len(own))}


def test_who_comes_or_goes_changes_few_parents() -> None:
    """About ln n seats change hands, and a seat has four children and four parents."""
    draw = random.Random(4)
    changed: list[float] = []
    for _ in range(30):
        nodes = sorted(f"{draw.getrandbits(40):x}" for _ in range(150))
        gone = draw.choice(nodes)
        fewer = [node for node in nodes if node != gone]
        moved = sum(one != other for one, other in zip(seats(tuple(nodes)), seats(tuple(fewer)), strict=False))
        assert moved <= 20
        before, after = parents(tuple(nodes)), parents(tuple(fewer))
        changed.append(sum(before[edge] != after[edge] for edge in after if edge in before) / len(after))
    assert sum(changed) / len(changed) < 0.07
    assert max(changed) < 0.2


def test_a_line_of_the_first_version_is_what_its_nodes_compute() -> None:
    """Taken from a node of version 1; a cluster that has one uses these trees."""
    nodes = tuple(f"n{number}" for number in range(8))
    assert [" ".join(line(nodes, tree, 1)) for tree in (0, 3)] == ["n1 n0 n7 n2 n4 n6 n5 n3", "n4 n1 n7 n2 n6 n3 n5 n0"]


def test_one_old_member_holds_all_to_its_trees() -> None:
    """Nobody gets a batch twice or misses one, before the last node of version 1 is upgraded and after it."""
    cluster = VirtualCluster(1, NetworkOptions())
    cluster.add("t1", "train", "train")
    for number in range(20):
        cluster.add(f"n{number}", "eu", seeds=["t1"], protocol_version=FIRST_VERSION if number == 7 else SEATS_SINCE)
    cluster.run(5_000)
    busiest = publish_and_measure(cluster)
    assert busiest > 2, "of the old trees"
    cluster.crash("n7")
    cluster.nodes["n7"].protocol_version = SEATS_SINCE
    cluster.restart("n7")
    cluster.run(5_000)
    assert publish_and_measure(cluster) < 1.5


def publish_and_measure(cluster: VirtualCluster) -> float:
    """Forty steps; each comes to each node once, by push. Returns bytes sent by the busiest, as a multiple of the mean."""
    meter = cluster.meter = Meter()
    for step in range(40):
        cluster.publish("t1", "item", range(step, step + 50), 1.0)
        cluster.run(50)
    cluster.run(500)
    assert meter.rows == 40 * 50 * 20
    sent = [meter.bytes_sent.get(f"n{number}", 0) for number in range(20)]
    return max(sent) / (sum(sent) / len(sent))
