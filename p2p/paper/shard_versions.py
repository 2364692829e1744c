"""Shard versions: one 64-bit number that stands for a shard's vector, so that equal shards are recognised without it.

The paper (Ekko, OSDI '22, section 4.4.2). A version is a count and the id of the replica that *minted* it. Versions are only
partly ordered: of one id, the larger count covers the smaller; those of different ids say nothing about each other. All that is
promised is invariant 5: a version covers another only if the vector it was given for dominates the other's. So where our
version covers a peer's there is nothing to pull; where it does not, there may be.

It holds because a version is given to one vector, by one replica, in the order in which that replica's vector grew:

- a replica mints a version for each vector that it comes to by itself: at its start, by a write, by a merge that neither side
  had before;
- it *adopts* the peer's where its merged vector is the peer's;
- where both vectors are equal already, both sides *pick* the same one of the two, the larger number. Without a rule they might
  swap versions for ever, each exchange making the next one necessary.

What the paper leaves open. Its replicas mint at every change; here a change is noticed when somebody asks, by comparing the
vector with the one that the version was given for, so that no path that moves a vector can forget to mint, and a thousand
writes between two questions make one version. And the id is of one *life* of a replica (R9): a counter that started anew under
an old id would make versions that cover, and are covered by, what other vectors had.

With push on, vectors change all the time on all nodes, and versions would almost never match: there, digests are compared.
"""

import random
from typing import Final

import numpy as np
from numpy.typing import NDArray

from p2p.core import Keyspace
from p2p.knowledge import Knowledge
from p2p.replica import U64

Mask = NDArray[np.bool_]

# The id is random: of 1,000 replicas that start 100 times each, two have one in common with a probability of one in 3,500.
# A count that is used up, after a million versions, takes another.
ID_BITS: Final = 44
COUNT_MAX: Final = (1 << 64 - ID_BITS) - 1
_ID_MASK: Final = np.uint64((1 << ID_BITS) - 1)


def make_version(count: int, minter: int) -> int:
    """Compose a version. The count is above the id, so that of one id the larger number is the later version."""
    return count << ID_BITS | minter


def split_version(version: int) -> tuple[int, int]:
    """Count and id of a version."""
    return version >> ID_BITS, version & int(_ID_MASK)


def covers(ours: U64, theirs: U64) -> Mask:
    """bool[n]: which of our versions are the same as theirs, or later ones of the same id. Both uint64[n]."""
    mask: Mask = ((ours ^ theirs) & _ID_MASK == 0) & (ours >= theirs)
    return mask


def settle(ours: U64, theirs: U64, merged_is_ours: Mask, merged_is_theirs: Mask) -> tuple[U64, Mask]:
    """The versions after a merge of vectors: adopt, pick, keep, or mint.

    Args:
        ours: uint64[n], versions before the merge.
        theirs: uint64[n], the peer's.
        merged_is_ours: bool[n]: the merged vector is what ours was before.
        merged_is_theirs: bool[n]: the merged vector is the peer's.

    Returns:
        uint64[n], the versions that stand for the merged vectors, and bool[n], where there is none yet and one is to be minted.
    """
    picked = np.where(merged_is_ours, np.maximum(ours, theirs), theirs)
    return np.where(merged_is_theirs, picked, ours), ~(merged_is_ours | merged_is_theirs)


class OwnVersions:
    """The versions of this node, keyspace by keyspace, as far as somebody has asked for them.

    Args:
        boot: nonce of this life of the node.
        rng: for their ids.
    """

    def __init__(self, boot: int, rng: random.Random) -> None:
        self.by_keyspace: dict[int, ShardVersions] = {}
        self._boot = boot
        self._rng = rng

    def of(self, keyspace: Keyspace) -> "ShardVersions":
        """Those of one keyspace."""
        number = keyspace.replica.keyspace
        if number not in self.by_keyspace:
            self.by_keyspace[number] = ShardVersions(keyspace.knowledge, self._boot, self._rng)
        return self.by_keyspace[number]


class ShardVersions:
    """The versions of one keyspace's shards on one node, and the vectors for which they were given.

    Args:
        knowledge: the keyspace's.
        boot: nonce of this life of the node.
        rng: for another id, when a count is used up.
    """

    def __init__(self, knowledge: Knowledge, boot: int, rng: random.Random) -> None:
        self._knowledge = knowledge
        self._rng = rng
        self._minter = boot & int(_ID_MASK)
        self._count = 0
        self._versions = np.zeros(knowledge.shards, np.uint64)
        self._writers = np.empty(0, np.uint16)
        self._vectors = np.empty((knowledge.shards, 0), np.uint64)  # [shards, w]: what the versions were given for
        self._changed = np.zeros(knowledge.shards, np.int64)  # by shard, the mark under which its version last changed
        self.mark = 0  # counts changes of any version in this life

    @property
    def given(self) -> tuple[U64, NDArray[np.uint16], U64]:
        """Versions uint64[shards], writers uint16[w] and the vectors uint64[shards, w] that they were given for."""
        return self._versions, self._writers, self._vectors

    def current(self) -> U64:
        """uint64[shards], a view: versions of the vectors as they are now, minted where a vector has changed."""
        before, now = self._see()
        stale = np.flatnonzero((before != now).any(axis=1) | (self._versions == 0))
        if len(stale):
            self._mint(stale)
            self._vectors = now
        return self._versions

    def changed_since(self, mark: int) -> NDArray[np.uint32]:
        """Shards whose version changed after `mark`, ascending."""
        return np.flatnonzero(self._changed > mark).astype(np.uint32)

    def merge(self, shards: NDArray[np.uint32], versions: U64, writers: NDArray[np.uint16], vectors: U64) -> None:
        """Knowledge of these shards was just merged with a peer's; `current` was called right before it.

        Args:
            shards: uint32[k].
            versions: uint64[k], the peer's.
            writers: uint16[w]; those that we do not name are retired, and we have all of them. A peer that names one may have
                less, so that its version does not stand for what we have.
            vectors: uint64[k, w], the peer's.
        """
        before, now = self._see()
        theirs = np.zeros((len(shards), now.shape[1]), np.uint64)
        named = np.isin(writers, self._writers)
        theirs[:, np.searchsorted(self._writers, writers[named])] = vectors[:, named]
        merged = now[shards]
        is_ours = (merged == before[shards]).all(axis=1)
        is_theirs = (merged == theirs).all(axis=1) & ~vectors[:, ~named].any(axis=1)
        settled, mint = settle(self._versions[shards], versions, is_ours, is_theirs)
        changed = shards[settled != self._versions[shards]]
        self._versions[shards] = settled
        before[shards] = merged
        if len(changed):
            self._note(changed)
        if mint.any():
            self._mint(shards[mint])

    def _see(self) -> tuple[U64, U64]:
        """The vectors that versions were given for, and the vectors of now: uint64[shards, w] of the same writers."""
        knowledge, writers = self._knowledge, self._knowledge.writers
        if not np.array_equal(writers, self._writers):
            gone = self._vectors[:, ~np.isin(self._writers, writers)].any(axis=1)
            if gone.any():  # a writer has left the vectors (R13): later ones do not dominate these, so they are another id's
                self._versions[gone] = 0
                self._minter, self._count = self._rng.getrandbits(ID_BITS), 0
            widened = np.zeros((knowledge.shards, len(writers)), np.uint64)
            _, new, old = np.intersect1d(writers, self._writers, assume_unique=True, return_indices=True)
            widened[:, new] = self._vectors[:, old]
            self._writers, self._vectors = writers, widened
        return self._vectors, np.ascontiguousarray(knowledge.vector[:, writers])

    def _mint(self, shards: NDArray[np.int64] | NDArray[np.uint32]) -> None:
        if self._count == COUNT_MAX:
            self._minter, self._count = self._rng.getrandbits(ID_BITS), 0
        self._count += 1
        self._versions[shards] = make_version(self._count, self._minter)
        self._note(shards)

    def _note(self, shards: NDArray[np.int64] | NDArray[np.uint32]) -> None:
        self.mark += 1
        self._changed[shards] = self.mark
