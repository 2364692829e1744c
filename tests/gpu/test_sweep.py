"""A sweep's bound is the last row to leave: rows of its score leave up to its hash, that one too."""

import numpy as np
import pytest

from gpu import layout, reference
from gpu.backend import Device
from gpu.evicting import EVERYTHING, Threshold
from gpu.kernels import launchers
from gpu.layout import Memory, Shape

SHAPE = Shape(2, 1, "float32")
KEYS = np.arange(30, dtype=np.uint64)
HASHES = layout.mix64(KEYS)
MIDDLE = int(np.sort(HASHES)[14])


def filled() -> Memory:
    memory = reference.new_memory(SHAPE)
    rows, outcomes = np.zeros((len(KEYS), SHAPE.row_bytes), np.uint8), np.zeros(len(KEYS), np.uint8)
    reference.insert(memory, KEYS, np.ones(len(KEYS), np.uint64), rows, None, outcomes, score=5, admit=True)
    return memory


@pytest.mark.parametrize(
    ("bound", "left"),
    [
        (Threshold(5, MIDDLE), HASHES > MIDDLE),
        (Threshold(5, MIDDLE - 1), HASHES >= MIDDLE),
        (Threshold(4, 2**64 - 1), HASHES >= 0),
        (Threshold(6, 0), HASHES < 0),
        (EVERYTHING, HASHES < 0),
    ],
)
def test_the_bound_itself_leaves(device: Device, bound: Threshold, left: np.ndarray) -> None:
    host = filled()
    memory = Memory(SHAPE, *(device.upload(array) for array in (host.digests, host.headers, host.rows, host.counters)))
    launchers.sweep(device, memory, score=bound.score, hashed=bound.hashed)
    reference.sweep(host, score=bound.score, hashed=bound.hashed)
    for name in ("digests", "headers", "rows", "counters"):
        np.testing.assert_array_equal(device.download(getattr(memory, name)), getattr(host, name))
    assert sorted(KEYS[left].tolist()) == sorted(KEYS[reference.find(host, KEYS) >= 0].tolist())
