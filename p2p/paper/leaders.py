"""Who of a region pulls a shard from other regions, for all the others there.

The paper (Ekko, OSDI '22, section 4.5) has ZooKeeper elect a leader for each data centre and shard. Here every node computes
them from its view: the leader of a shard is the node with the largest hash of (node, shard) among the region's holders
(rendezvous hashing). Equal views name equal leaders, a node that goes leaves its shards to many, and while views differ a shard
has two leaders or an old one, which costs traffic and nothing else: any way of asking is correct.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from p2p.members.suspicion import mix
from p2p.messages import NodeId

# Views of late, one array of 8 bytes a shard each.
_VIEWS_KEPT = 256


def leaders_of(nodes: Sequence[NodeId], shards: int) -> NDArray[np.int64]:
    """int64[shards]: the place in `nodes` of each shard's leader; `nodes` are a region's holders, sorted, at least one."""
    return _leaders_of(tuple(nodes), shards)


@lru_cache(_VIEWS_KEPT)
def _leaders_of(nodes: tuple[NodeId, ...], shards: int) -> NDArray[np.int64]:
    hashes = np.array([xxhash.xxh64_intdigest(node.encode()) for node in nodes], np.uint64)
    weights = mix(np.repeat(hashes, shards), np.tile(np.arange(1, shards + 1, dtype=np.uint64), len(nodes)))
    leaders: NDArray[np.int64] = weights.reshape(len(nodes), shards).argmax(axis=0)
    leaders.flags.writeable = False
    return leaders
