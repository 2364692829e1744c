"""Who forwards what to whom: a pure function of the membership view.

For one origin and one tree index, the live holders of every region are ordered by rendezvous hash; the first is that
region's leader. The origin sends to every region's leader, its own region's included, and the others of a region form a
tree of arity `TREE_ARITY` under their leader. So a batch crosses into a region once, and nodes with equal views agree on
the tree without a word between them. While views differ a batch may come twice or not at all: the seen-set and the pull
repair that.

The index is a function of the shard, never of the batch (R1), so that a shard's batches follow one path. With several trees,
interior nodes of one are mostly leaves of others, and every node forwards about as much as it receives. Each tree costs a
message of its own per step, which small clusters would pay for nothing: they have one tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from p2p.messages import NodeId

# Four children: a region of 85 nodes is three hops deep, and a node's uplink carries at most four copies.
TREE_ARITY = 4
# Up to so many holders one tree, beyond it several: there, no node of a tree sends more than a few copies anyway.
ONE_TREE_HOLDERS_MAX = 8
TREES_MAX = 4
# A path is at most the origin's hop and the depth of the largest region's tree; two more for views that differ (R17).
HOPS_EXTRA = 2


@dataclass(frozen=True, slots=True, order=True)
class Holder:
    """A live node that takes part in the trees."""

    region: str
    node: NodeId


def tree_count(holders: Sequence[Holder]) -> int:
    """Over how many trees an origin with this view spreads a step; the batch says it, so receivers need not agree."""
    return 1 if len(holders) <= ONE_TREE_HOLDERS_MAX else TREES_MAX


def rendezvous(node: NodeId, tree: int) -> int:
    """The weight by which holders of a region are ordered, largest first."""
    return int(xxhash.xxh64_intdigest(f"{tree}/{node}".encode()))


def order(holders: Sequence[Holder], region: str, origin: NodeId, tree: int) -> list[NodeId]:
    """The holders of one region but the origin, leader first, each before its children."""
    nodes = [holder.node for holder in holders if holder.region == region and holder.node != origin]
    return sorted(nodes, key=lambda node: (rendezvous(node, tree), node), reverse=True)


def children(holders: Sequence[Holder], me: Holder, origin: NodeId, tree: int) -> list[NodeId]:
    """Where `me` sends a batch of `origin`.

    Args:
        holders: all live holders, me included, in any order.
        me: this node.
        origin: the node whose writer made the batch.
        tree: the tree index.
    """
    if me.node == origin:
        regions = sorted({holder.region for holder in holders})
        leaders = [order(holders, region, origin, tree)[:1] for region in regions]
        return [node for leader in leaders for node in leader]
    line = order(holders, me.region, origin, tree)
    first = line.index(me.node) * TREE_ARITY + 1
    return line[first : first + TREE_ARITY]


def hops_max(holders: Sequence[Holder]) -> int:
    """The longest path a batch may take before it is dropped as circling (R17)."""
    sizes: dict[str, int] = {}
    for holder in holders:
        sizes[holder.region] = sizes.get(holder.region, 0) + 1
    depth, reach = 1, 1
    while reach < max(sizes.values(), default=1):
        reach = reach * TREE_ARITY + 1
        depth += 1
    return depth + HOPS_EXTRA
