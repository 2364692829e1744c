"""Which (shard, writer) pairs a node sends to a child: those for which it is the child's parent (R1).

The tree index is a function of the shard, so a writer's pairs are said in trees: a bit for each. All of them make up what a
claim of a backlog may cover, and for all shards that occur in one of them every changed row is due, whoever wrote it (R2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Pairs:
    """What one child gets from us of one keyspace."""

    trees: int  # how many there are
    served: tuple[tuple[int, int], ...]  # (writer, a bit for each tree), ascending, none without a tree

    @property
    def writers(self) -> NDArray[np.uint16]:
        """uint16[w]"""
        return np.array([writer for writer, _ in self.served], np.uint16)

    @property
    def bits(self) -> NDArray[np.uint8]:
        """uint8[w]: the trees of each writer."""
        return np.array([bits for _, bits in self.served], np.uint8)

    @property
    def all_trees(self) -> int:
        """The bits of all trees."""
        return (1 << self.trees) - 1

    def grid(self, shards: int) -> NDArray[np.bool_]:
        """bool[shards, w]: which pairs they are."""
        of_shard = np.uint8(1) << (np.arange(shards, dtype=np.uint32) % self.trees).astype(np.uint8)
        grid: NDArray[np.bool_] = (of_shard[:, None] & self.bits[None, :]) != 0
        return grid

    def overlap(self, other: "Pairs") -> bool:
        """Whether some pair is of both."""
        theirs = dict(other.served)
        if self.trees != other.trees:
            return any(writer in theirs for writer, _ in self.served)
        return any(bits & theirs.get(writer, 0) for writer, bits in self.served)


def pairs_of(trees: int, served: Sequence[tuple[int, int]]) -> Pairs:
    """Without those writers of whom nothing is sent; of each writer once."""
    bits: dict[int, int] = {}
    for writer, mask in served:
        bits[writer] = bits.get(writer, 0) | mask
    return Pairs(trees, tuple(sorted((writer, mask) for writer, mask in bits.items() if mask)))


@dataclass(slots=True)
class Feed:
    """A link in state mode towards us, as its sender's notices tell."""

    node: str
    pairs: Pairs
    number: int  # of the sender's backlog
    until_ms: int  # monotonic; unless we are told again
    retired_digest: int = 0  # over all that the sender knows of retirements
    request: int = 0  # the question in which we told our vector last; 0: none that counts
    asked_ms: int = -1_000_000  # when it was asked
    flows: bool = False  # chunks that answer it have come
