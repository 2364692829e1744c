"""Increments over a snapshot of a node that had dropped rows, and has them all by now (R11)."""

import numpy as np

from ekko.snapshots.write import Base, _whole
from ekko.store.images import FloorImage, KnowledgeImage
from p2p.stamps import WRITERS_MAX

SHARDS = 10


def bits(*shards: int) -> np.ndarray:
    mask = np.zeros(SHARDS, np.bool_)
    mask[list(shards)] = True
    return np.packbits(mask, bitorder="little")


def test_shards_that_became_complete_are_taken_whole() -> None:
    """Old rows came back, which lie below what the parent knew."""
    vector = np.full((WRITERS_MAX, SHARDS), 5, np.uint64)
    frontiers = np.zeros((1, WRITERS_MAX), np.uint64)
    base = Base(vector, frontiers, frozenset(), bits(1, 3, 9))
    now = KnowledgeImage(vector, frontiers), FloorImage(np.zeros_like(vector), bits(3))
    assert np.flatnonzero(_whole(base, *now)).tolist() == [1, 9]
