"""LFU counts uses: a rank that is full stays full, so that no row is thrown away for being the hottest."""

import numpy as np
import pytest

from gpu import layout, reference
from gpu.backend import Device
from gpu.evicting import policy_of
from gpu.kernels import launchers
from gpu.layout import RANK_SHIFT, USES_MAX, Memory, Shape

SHAPE = Shape(1, 4, "float32")
LFU = policy_of("lfu")
ROUND = 40  # keys of a look-up


def filled(ranks: np.ndarray) -> Memory:
    """One bucket; key i has rank i of these."""
    memory, keys = reference.new_memory(SHAPE), np.arange(len(ranks), dtype=np.uint64)
    rows, outcomes = np.zeros((len(keys), SHAPE.row_bytes), np.uint8), np.zeros(len(keys), np.uint8)
    scores = ranks.astype(np.uint64) << np.uint64(RANK_SHIFT)
    reference.insert(memory, keys, np.ones(len(keys), np.uint64), rows, scores, outcomes, score=0, admit=False)
    return memory


def ranks_of(headers: np.ndarray) -> list[int]:
    view = headers.view(layout.HEADER)[:, 0]
    return (view["score"][np.argsort(view["key"])] >> np.uint64(RANK_SHIFT)).tolist()


START = np.array([0, 7, USES_MAX - ROUND - 1, USES_MAX - ROUND, USES_MAX - 3, USES_MAX, USES_MAX + 5, 2**32 - 1] * 4, np.int64)
EXPECTED = [int(max(rank, min(rank + ROUND, USES_MAX))) for rank in START]


def test_ranks_fill_up_in_the_reference() -> None:
    memory = filled(START)
    keys = np.tile(np.arange(32, dtype=np.uint64), ROUND)
    out = (
        np.empty((len(keys), 4), np.float32),
        np.empty(len(keys), np.uint64),
        np.empty(len(keys), np.int64),
        np.zeros(1, np.uint64),
    )
    reference.lookup(memory, keys, *out, policy=LFU.number, tick=1)
    assert ranks_of(memory.headers) == EXPECTED


def test_ranks_fill_up_on_a_device(device: Device) -> None:
    host = filled(START)
    memory = Memory(SHAPE, *(device.upload(array) for array in (host.digests, host.headers, host.rows, host.counters)))
    keys = device.upload(np.tile(np.arange(32, dtype=np.uint64), ROUND))
    out = device.empty((len(keys), 4), np.float32), device.empty(len(keys), np.uint64), device.empty(len(keys), np.int64)
    launchers.lookup(device, memory, keys, *out, device.zeros(1, np.uint64), policy=LFU.number, tick=1)
    found = ranks_of(device.download(memory.headers))
    # Lanes that run at once may each add their one to a rank that is nearly full: at most as many as keys were asked for.
    for rank, start, expected in zip(found, START.tolist(), EXPECTED, strict=True):
        assert expected <= rank <= max(start, USES_MAX + ROUND)
    assert [
        rank for rank, start in zip(found, START.tolist(), strict=True) if start < USES_MAX - ROUND or start >= USES_MAX
    ] == [
        expected
        for expected, start in zip(EXPECTED, START.tolist(), strict=True)
        if start < USES_MAX - ROUND or start >= USES_MAX
    ]


@pytest.mark.parametrize("rank", [USES_MAX, 2**32 - 1])
def test_the_hottest_row_is_not_the_first_to_leave(rank: int) -> None:
    memory = filled(np.array([rank, *range(1, 32)]))
    for _ in range(3):
        one = np.zeros(1, np.uint64)
        out = np.empty((1, 4), np.float32), np.empty(1, np.uint64), np.empty(1, np.int64), np.zeros(1, np.uint64)
        reference.lookup(memory, one, *out, policy=LFU.number, tick=1)
    newcomer, outcomes = np.array([99], np.uint64), np.zeros(1, np.uint8)
    rows = np.zeros((1, SHAPE.row_bytes), np.uint8)
    reference.insert(memory, newcomer, np.ones(1, np.uint64), rows, None, outcomes, score=LFU.first_score(1), admit=True)
    assert outcomes[0] == layout.REPLACED
    assert reference.find(memory, np.array([0, 1, 99], np.uint64)).tolist()[0] >= 0
