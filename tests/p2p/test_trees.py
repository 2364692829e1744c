"""Trees reach everyone once, cross into a region once, and are the same on every node."""

import random

from hypothesis import given
from hypothesis import strategies as st

from p2p.trees import ONE_TREE_HOLDERS_MAX, TREE_ARITY, TREES_MAX, Holder, children, hops_max, tree_count

holders = st.lists(
    st.builds(Holder, st.sampled_from(["ap", "eu", "us"]), st.integers(0, 60).map(str)),
    min_size=1,
    max_size=40,
    unique_by=lambda holder: holder.node,
)


@given(holders, st.randoms(), st.integers(0, TREES_MAX - 1))
def test_a_batch_reaches_every_holder_once_and_every_region_once(view: list[Holder], draw: random.Random, tree: int) -> None:
    origin = draw.choice(view)
    by_name = {holder.node: holder for holder in view}
    depth = {origin.node: 0}
    crossings: dict[str, int] = {}
    queue = [origin]
    while queue:
        holder = queue.pop(0)
        shuffled = draw.sample(view, len(view))
        for child in children(shuffled, holder, origin.node, tree):
            assert child not in depth, "a second copy"
            depth[child] = depth[holder.node] + 1
            queue.append(by_name[child])
            if by_name[child].region != holder.region:
                crossings[by_name[child].region] = crossings.get(by_name[child].region, 0) + 1
    assert set(depth) == set(by_name)
    assert set(crossings) == {holder.region for holder in view} - {origin.region}
    assert set(crossings.values()) <= {1}
    assert max(depth.values()) < hops_max(view)


def test_nobody_but_the_origin_has_more_children_than_the_arity() -> None:
    view = [Holder("eu", str(number)) for number in range(30)]
    assert max(len(children(view, me, "0", 0)) for me in view[1:]) == TREE_ARITY
    assert len(children(view, view[0], "0", 0)) == 1


def test_small_clusters_have_one_tree() -> None:
    view = [Holder("eu", str(number)) for number in range(ONE_TREE_HOLDERS_MAX + 1)]
    assert [tree_count(view[:-1]), tree_count(view)] == [1, TREES_MAX]


def test_trees_share_the_load() -> None:
    """Over all trees, the busiest node sends at most about three times the mean; one tree alone sends most through a few."""
    view = [Holder("eu", str(number)) for number in range(60)]
    sent = {me.node: sum(len(children(view, me, "0", tree)) for tree in range(TREES_MAX)) for me in view[1:]}
    assert sum(sent.values()) == TREES_MAX * (len(view) - 1) - TREES_MAX
    assert max(sent.values()) <= 3 * TREE_ARITY
