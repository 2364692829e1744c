"""Which (shard, writer) pairs a node sends to a child: those for which it is the child's parent (R1).

The tree index is a function of the shard, so a writer's pairs are said in trees: a bit for each. All of them make up what a
claim of a backlog may cover, and for all shards that occur in one of them every changed row is due, whoever wrote it (R2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Whose rows are not pulled since they are queued (R16) has to bring some, or knowledge, at least once in so long: longer than a
# narrow link that carries many keyspaces takes to come round to one. Else who says for ever that it has rows for us, or is
# stuck, would keep us from those of everybody.
STALLED_MS = 30_000


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

    def cover(self, shards: NDArray[np.uint32], writers: NDArray[np.uint16], until: NDArray[np.uint64]) -> bool:
        """Whether a claim, uint64[k, w] of these shards and writers, 0 where nothing is claimed, is of these pairs alone."""
        bits = dict(self.served)
        of_writer = np.array([bits.get(writer, 0) for writer in writers.tolist()], np.uint8)
        of_shard = np.uint8(1) << (shards % self.trees).astype(np.uint8)
        return not ((until != 0) & ((of_shard[:, None] & of_writer[None, :]) == 0)).any()

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
    moved_ms: int  # when it brought something that was new here, or began
    retired_digest: int = 0  # over all that the sender knows of retirements
    request: int = 0  # the question in which we told our vector last; 0: none that counts
    roomless: int = 0  # a question that does not count any more, since something that answered it found no room
    asked_ms: int = -1_000_000  # when our vector was told
    flows: bool = False  # chunks that answer it have come

    def holds_back(self, now_ms: int) -> bool:
        """Whether what it has queued is not to be pulled: it is told of, and some of it comes."""
        return self.until_ms > now_ms and now_ms - self.moved_ms < STALLED_MS
