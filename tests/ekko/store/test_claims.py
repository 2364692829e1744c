"""The compiled loops over claims say what the plain ones say, and do what they do: on sound batches and on junk."""

import random

import numpy as np
import pytest

from ekko.store.kernels import claims
from p2p import loops

SHARDS = 8
STAMP = 1_000
HUGE = (1 << 64) - 1
ROUNDS = 4_000


class Claims:
    """Claims of a sound batch."""

    def __init__(self, rng: random.Random) -> None:
        chosen = sorted(rng.sample(range(SHARDS), rng.randint(1, SHARDS)))
        self.stamp, self.trees = STAMP, 1
        self.shards = np.array(chosen, np.uint32)
        self.prev = np.array([rng.randrange(STAMP) for _ in chosen], np.uint64)
        self.part = np.zeros(len(chosen), np.uint16)
        self.parts = np.ones(len(chosen), np.uint16)

    def spoil(self, rng: random.Random) -> None:
        """Change something; often it is sound still."""
        at = rng.randrange(len(self.shards))
        match rng.randrange(7):
            case 0:
                self.shards[at] = rng.choice([0, SHARDS - 1, SHARDS, 0xFFFF_FFFF])
            case 1:
                self.prev[at] = rng.choice([0, STAMP - 1, STAMP, HUGE])
            case 2:
                self.part[at] = rng.choice([0, 1, 0xFFFF])
            case 3:
                self.parts[at] = rng.choice([0, 1, 2, 0xFFFF])
            case 4:
                self.stamp = rng.choice([0, 1, STAMP, HUGE])
            case 5:
                self.trees = rng.randint(1, 4)
                self.shards = np.array([shard - shard % self.trees for shard in self.shards.tolist()], np.uint32)
            case 6:
                self.trees = rng.randint(1, 4)


def drawn(seed: int) -> list[Claims]:
    rng = random.Random(seed)
    batches = []
    for _ in range(ROUNDS):
        batch = Claims(rng)
        for _ in range(rng.randrange(4)):
            batch.spoil(rng)
        batches.append(batch)
    return batches


def test_both_find_the_same_fault() -> None:
    found = set()
    for batch in drawn(1):
        arguments = (batch.shards, batch.prev, batch.part, batch.parts, batch.stamp, batch.trees, SHARDS)
        expected = loops.claims_fault(*arguments)
        assert claims.claims_fault(*arguments) == expected
        found.add(expected)
    assert found == {loops.SOUND, loops.SEVERAL_TREES, loops.NOT_ASCENDING, loops.CONTRADICTION}


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("stride", [1, 3])
def test_both_merge_all_or_nothing(stride: int, group: bool) -> None:
    """In a column by itself, and in one of a partition, whose shards lie apart; each claim up to the same stamp, or its own."""
    rng = random.Random(stride)
    merged_ever = set()
    for batch in drawn(2):
        if batch.shards.max() >= SHARDS or len(np.unique(batch.shards)) < len(batch.shards):
            continue  # refused before
        wide = np.array([rng.choice([0, 5, STAMP - 1, STAMP, STAMP + 1, HUGE]) for _ in range(SHARDS * stride)], np.uint64)
        if rng.random() < 0.5:
            wide[::stride][batch.shards] = np.maximum(wide[::stride][batch.shards], batch.prev)
        other, before = wide.copy(), wide.copy()
        until = [rng.randint(1, STAMP) for _ in range(len(batch.shards) if group else 0)]
        arguments = batch.shards, batch.prev, batch.parts, batch.stamp, np.array(until, np.uint64)
        merged = loops.merge_all(wide[::stride], *arguments)
        assert claims.merge_all(other[::stride], *arguments) == merged
        if merged and group:
            expected = np.maximum(before[::stride][batch.shards], np.array(until, np.uint64))
            assert np.array_equal(wide[::stride][batch.shards], expected)
        assert np.array_equal(other, wide)
        assert merged or np.array_equal(wide, before)
        merged_ever.add(merged)
    assert merged_ever == {True, False}


def test_a_host_of_the_store_uses_the_compiled_ones() -> None:
    assert loops.used is claims.COMPILED


@pytest.mark.parametrize("shards", [64, 65, 200])
def test_bits_are_set_as_numpy_packs_them(shards: int) -> None:
    rng = np.random.default_rng(shards)
    for _ in range(50):
        chosen = np.flatnonzero(rng.random(shards) < 0.3)
        mask = np.zeros((shards + 63) // 64 * 64, np.uint8)
        mask[chosen] = 1
        words = rng.integers(0, HUGE, len(mask) // 64, np.uint64)
        claims.set_bits(words, chosen)
        assert np.array_equal(words, np.packbits(mask, bitorder="little").view(np.uint64))
