"""Who forwards what to whom: a pure function of the membership view.

For one origin and one tree, the live holders of every region stand in a line; the first is that region's leader. The origin
sends to every region's leader, its own region's included, and the others of a region form a tree of arity `TREE_ARITY` under
their leader, as in a heap: the children of place p are the places 4p+1 to 4p+4. So a batch crosses into a region once, and
nodes with equal views agree on the tree without a word between them. While views differ a batch may come twice or not at all:
the seen-set and the pull repair that.

The tree is a function of the shard, never of the batch (R1), so that a shard's batches follow one path. Each tree costs a
message of its own per step, which small clusters would pay for nothing: they have one.

The line. Think of a hall with numbered seats. Seats are filled from the first: of those who still stand, the one with the
largest hash of (node, seat) takes it. Who comes late takes a seat from somebody, who takes a later one from somebody else, and
so on: about ln n nodes change their seat, the others stay (`seats`). Four seats are a row, and a row has one seat for each of
the four trees: in tree t the seat t of a row is *inside* and forwards, the three others are leaves. Inside seats take the first
places of the line, row by row; a leaf is a child of its own row's inside seat until a later row's inside seat needs its place,
which sends the leaf to the first child of that place (`seat_at`). So everybody is inside one tree and a leaf in three, sends
about as many bytes as it receives, and a node that comes or goes changes the parents of a few.

Rejected: a line per tree, ordered by rendezvous hash (what version 1 does, below): a node may be inside several trees, the
busiest sends three to four times the mean, and one more node shifts half of the line. And one line rotated by a quarter for
each tree: balanced as well, but it shifts with every newcomer.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import xxhash

from p2p.messages import NodeId

# Four children: a region of 85 nodes is three hops deep, and a node's uplink carries at most four copies.
TREE_ARITY = 4
# Up to so many holders one tree, beyond it several: there, no node of a tree sends more than a few copies anyway.
ONE_TREE_HOLDERS_MAX = 8
# As many as the arity: a quarter of a tree's nodes are inside, so in four trees everybody is inside once.
TREES_MAX = 4
# A path is at most the origin's hop and the depth of the largest region's tree; two more for views that differ (R17).
HOPS_EXTRA = 2
# The protocol version since which lines are made of seats. All nodes of a view must agree on it, so one older member holds
# everybody back.
SEATS_SINCE = 2
# Lines of views and regions of late; what is forgotten is computed again.
_LINES_KEPT = 1_024
# Of how many pairs of origin and tree the children are kept; origins are named by peers, so they have a bound.
_CHILDREN_KEPT = 4_096


class Holder(NamedTuple):
    """A live node that takes part in the trees. A tuple, since each change of view sorts all of them."""

    region: str
    node: NodeId


class Trees:
    """One node's part in the trees of one view.

    Args:
        me: this node.
        holders: all live holders, `me` included or not, in any order.
        version: the protocol version that all of them speak.
        leaves: nodes that are sent everything and forward nothing, so they are in no line (R22).
    """

    def __init__(
        self, me: Holder, holders: Sequence[Holder], version: int = SEATS_SINCE, leaves: Sequence[Holder] = ()
    ) -> None:
        nodes: dict[str, list[NodeId]] = {}
        for holder in sorted(holders):
            nodes.setdefault(holder.region, []).append(holder.node)
        self._me = me
        self._version = version
        self._regions = {region: tuple(members) for region, members in nodes.items()}  # sorted
        self._leaves = sorted(leaves)
        self._children: dict[tuple[NodeId, int], tuple[NodeId, ...]] = {}
        # Over how many trees an origin with this view spreads a step; the batch says it, so receivers need not agree.
        self.count = 1 if len(holders) <= ONE_TREE_HOLDERS_MAX else TREES_MAX
        # The longest path a batch may take before it is dropped as circling (R17).
        self.hops_max = _depth(max(map(len, self._regions.values()), default=1)) + bool(leaves) + HOPS_EXTRA

    def children(self, origin: NodeId, tree: int) -> tuple[NodeId, ...]:
        """Where we send a batch of `origin`; nowhere, when we take no part ourselves."""
        known = self._children.get((origin, tree))
        if known is None:
            while len(self._children) >= _CHILDREN_KEPT:
                del self._children[next(iter(self._children))]
            known = self._children[origin, tree] = self._find_children(origin, tree)
        return known

    def line(self, region: str, origin: NodeId, tree: int) -> tuple[NodeId, ...]:
        """The holders of one region but the origin: leader first, each before its children."""
        nodes = self._regions.get(region, ())
        if origin in nodes:
            nodes = tuple(node for node in nodes if node != origin)
        return line(nodes, tree, self._version)

    def _find_children(self, origin: NodeId, tree: int) -> tuple[NodeId, ...]:
        leaves = tuple(leaf.node for leaf in self._leaves if self._parent_of(leaf, origin, tree) == self._me.node)
        if self._me.node == origin:
            return (*(node for region in self._regions for node in self.line(region, origin, tree)[:1]), *leaves)
        if self._me.node not in self._regions.get(self._me.region, ()):
            return ()
        own = self.line(self._me.region, origin, tree)
        first = own.index(self._me.node) * TREE_ARITY + 1
        return (*own[first : first + TREE_ARITY], *leaves)

    def _parent_of(self, leaf: Holder, origin: NodeId, tree: int) -> NodeId:
        """Who sends to a leaf: its region's last in line, who have no children of their own; without any, the origin."""
        line = self.line(leaf.region, origin, tree)
        number = sum(other.region == leaf.region and other.node < leaf.node for other in self._leaves)
        return line[-1 - number % len(line)] if line else origin


@lru_cache(_LINES_KEPT)
def line(nodes: tuple[NodeId, ...], tree: int, version: int) -> tuple[NodeId, ...]:
    """The nodes of a region (sorted, the origin left out) in the order of their places in a tree."""
    if version < SEATS_SINCE:
        return tuple(sorted(nodes, key=lambda node: (xxhash.xxh64_intdigest(f"{tree}/{node}".encode()), node), reverse=True))
    seated = seats(nodes)
    return tuple(seated[seat_at(place, tree, len(nodes))] for place in range(len(nodes)))


@lru_cache(_LINES_KEPT)
def seats(nodes: tuple[NodeId, ...]) -> tuple[NodeId, ...]:
    """Who sits where: for each seat the node with the largest hash among those without one. n^2 / 2 hashes, as vectors."""
    standing = np.array([xxhash.xxh64_intdigest(node.encode()) for node in nodes], np.uint64)
    numbers = np.arange(len(nodes))
    chosen: list[NodeId] = []
    for seat in range(len(nodes)):
        count = len(nodes) - seat
        best = int(_weights(standing[:count], seat).argmax())
        chosen.append(nodes[numbers[best]])
        standing[best], numbers[best] = standing[count - 1], numbers[count - 1]
    return tuple(chosen)


def _weights(nodes: np.ndarray[tuple[int], np.dtype[np.uint64]], seat: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """uint64[n]: the hash of each node and a seat (both mixed before, and once more together)."""
    value = nodes ^ np.uint64(xxhash.xxh64_intdigest(seat.to_bytes(4, "little")))
    value *= np.uint64(0xFF51AFD7ED558CCD)
    value ^= value >> np.uint64(33)
    value *= np.uint64(0xC4CEB9FE1A85EC53)
    return value


def seat_at(place: int, tree: int, count: int) -> int:
    """Which seat has this place in the line of a tree.

    Args:
        place: 0 is the leader's.
        tree: 0 to `TREES_MAX` - 1.
        count: how many sit in the region.
    """
    inside = place * TREES_MAX < count
    while not inside and place % TREE_ARITY == 0:
        place //= TREE_ARITY  # the leaf was here before, until an inside seat needed its place
    row, leaf = (place, 0) if inside else divmod(place, TREE_ARITY)
    width = min(TREES_MAX, count - row * TREES_MAX)  # the last row may not be full: there, trees take inside seats in turn
    return row * TREES_MAX + (tree + leaf) % width


def _depth(count: int) -> int:
    """Places on the longest path of a tree of so many nodes."""
    depth, reach = 1, 1
    while reach < count:
        reach = reach * TREE_ARITY + 1
        depth += 1
    return depth
