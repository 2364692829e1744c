"""Trees reach everyone once, cross into a region once, and are the same on every node."""

import random

from hypothesis import given
from hypothesis import strategies as st

from p2p.trees import TREE_ARITY, Holder, children, hops_max

holders = st.lists(
    st.builds(Holder, st.sampled_from(["ap", "eu", "us"]), st.integers(0, 60).map(str)),
    min_size=1,
    max_size=40,
    unique_by=lambda holder: holder.node,
)


@given(holders, st.randoms())
def test_a_batch_reaches_every_holder_once_and_every_region_once(view: list[Holder], draw: random.Random) -> None:
    origin = draw.choice(view)
    by_name = {holder.node: holder for holder in view}
    depth = {origin.node: 0}
    crossings: dict[str, int] = {}
    queue = [origin]
    while queue:
        holder = queue.pop(0)
        shuffled = draw.sample(view, len(view))
        for child in children(shuffled, holder, origin.node):
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
    assert max(len(children(view, me, "0")) for me in view[1:]) == TREE_ARITY
    assert len(children(view, view[0], "0")) == 1
