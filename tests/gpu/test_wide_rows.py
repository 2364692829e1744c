"""Rows of more chunks than a warp has lanes, and of just so many: looked up, pooled, exported."""

from itertools import pairwise

import numpy as np
import pytest

from ekko.codec import encode, rounded
from gpu.backend import Device
from gpu.cache import EmbeddingCache, lookup_pooled

KEYS = np.arange(40, dtype=np.uint64) * np.uint64(2**60 + 1)
OFFSETS = np.array([0, 3, 3, 20, 40], np.int64)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize(
    ("dim", "codec"), [(128, "float32"), (129, "float32"), (300, "float16"), (257, "bfloat16"), (508, "int8"), (1_021, "int8")]
)
def test_rows_of_any_width_are_pooled(device: Device, dim: int, codec: str, mode: str) -> None:
    values = np.random.default_rng(dim).standard_normal((len(KEYS), dim), dtype=np.float32)
    rows = rounded(codec, values)
    cache = EmbeddingCache(device, dim, codec, capacity=256)
    here = np.arange(len(KEYS)) % 5 != 0  # every fifth is missed
    cache.insert(KEYS[here], np.ones(here.sum(), np.uint64), encode(codec, values)[here])

    found = cache.lookup(device.upload(KEYS))
    np.testing.assert_array_equal(device.download(found.rows), rows * here[:, None])

    bags = lookup_pooled([(cache, device.upload(KEYS), device.upload(OFFSETS), None)], mode)[0]
    expected = np.zeros((len(OFFSETS) - 1, dim), np.float32)
    for bag, (first, end) in enumerate(pairwise(OFFSETS)):
        for i in range(first, end):
            expected[bag] += rows[i] * here[i]
        if mode == "mean":
            expected[bag] /= np.float32(max(1, end - first))
    np.testing.assert_array_equal(device.download(bags.rows), expected)
    np.testing.assert_array_equal(bags.missed_indices(), np.flatnonzero(~here))

    exported = next(cache.export())
    order = np.argsort(exported.keys)
    np.testing.assert_array_equal(exported.rows[order], encode(codec, values)[here][np.argsort(KEYS[here])])
