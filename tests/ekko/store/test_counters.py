"""The compiled loop over heartbeat counters takes what the plain one takes, to the last bit of every mean."""

import numpy as np
import pytest

from ekko.store.kernels import counters
from p2p import loops
from p2p.members.suspicion import AHEAD_MAX, RHYTHM

SLOTS = 40


def members(rng: np.random.Generator) -> list[np.ndarray]:
    """What is known of each slot, in the order of the arguments."""
    return [
        rng.integers(0, 50, SLOTS, np.uint64),
        rng.random(SLOTS) < 0.1,
        rng.random(SLOTS) < 0.01,
        rng.integers(0, 60, SLOTS, np.int32) * (rng.random(SLOTS) < 0.9).astype(np.int32),
        rng.uniform(500, 6_000, SLOTS),
        rng.integers(0, 10_000, SLOTS),
        rng.integers(0, 9, SLOTS, np.int32),
    ]


@pytest.mark.parametrize("count", [0, 1, 7, SLOTS])
def test_both_take_the_same(count: int) -> None:
    rng = np.random.default_rng(count)
    answers = set()
    for _ in range(400):
        plain = members(rng)
        compiled = [column.copy() for column in plain]
        before = [column.copy() for column in plain]
        slots = rng.permutation(SLOTS)[:count]
        slots[rng.random(count) < 0.1] = -1  # lives that are not known
        beats = rng.integers(0, 60, count, np.uint64)
        beats[rng.random(count) < 0.1] += np.uint64(AHEAD_MAX)  # some of which are lies
        taken = loops.hear(slots, beats, 10_000, RHYTHM, *plain)
        assert counters.hear(slots, beats, 10_000, RHYTHM, *compiled) == taken
        assert all(np.array_equal(one, other) for one, other in zip(plain, compiled, strict=True))
        assert taken or all(np.array_equal(one, other) for one, other in zip(plain, before, strict=True))
        answers.add(taken)
    assert answers == ({True, False} if count else {True})
