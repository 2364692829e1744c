"""A writer that died in mid-row leaves a slot locked, with some fields new: readers go on, and are never given that slot."""

import itertools

import numpy as np
import pytest

from gpu import layout
from gpu.backend import Device
from gpu.cache import EmbeddingCache, lookup_pooled

DIM = 5
KEYS = np.arange(20, dtype=np.uint64)
VICTIM = 7
NEWCOMER = np.uint64(1_000)
FIELDS = ("key", "stamp", "score", "digest", "row")


def row_of(keys: np.ndarray) -> np.ndarray:
    return np.repeat(keys.astype(np.float32)[:, None], DIM, axis=1)


def cache_with_a_slot_locked(device: Device, written: tuple[str, ...]) -> EmbeddingCache:
    """The victim's slot is being given to the newcomer; so far these fields are."""
    cache = EmbeddingCache(device, DIM, capacity=64)
    cache.insert(KEYS, np.ones(len(KEYS), np.uint64), row_of(KEYS).view(np.uint8))
    headers, digests, rows = (device.download(getattr(cache.memory, name)) for name in ("headers", "digests", "rows"))
    header = headers.view(layout.HEADER)[:, 0]
    slot = int(np.flatnonzero((header["key"] == VICTIM) & (header["stamp"] != 0))[0])
    header["lock"][slot] += 1
    for field, value in (("key", NEWCOMER), ("stamp", 2), ("score", 3)):
        if field in written:
            header[field][slot] = value
    if "digest" in written:
        digests[slot] = layout.digest_of(layout.mix64(np.array([NEWCOMER])))[0]
    if "row" in written:
        rows[slot, :8] = 0xFF  # half of it
    for name, array in (("headers", headers), ("digests", digests), ("rows", rows)):
        device.upload(array, getattr(cache.memory, name))
    device.synchronize()
    return cache


@pytest.mark.parametrize("written", [fields for n in range(6) for fields in itertools.combinations(FIELDS, n)], ids="-".join)
def test_readers_go_on_beside_a_dead_writer(device: Device, written: tuple[str, ...]) -> None:
    cache = cache_with_a_slot_locked(device, written)
    keys = np.append(KEYS, NEWCOMER)
    there = (keys != VICTIM) & (keys != NEWCOMER)
    asked = device.upload(keys)

    found = cache.lookup(asked)
    np.testing.assert_array_equal(device.download(found.stamps), there.astype(np.uint64))
    np.testing.assert_array_equal(device.download(found.rows), row_of(keys) * there[:, None])
    assert found.missed_indices().tolist() == np.flatnonzero(~there).tolist()

    bags = lookup_pooled([(cache, asked, device.upload(np.arange(len(keys) + 1)), None)])[0]
    np.testing.assert_array_equal(device.download(bags.rows), row_of(keys) * there[:, None])
    assert bags.missed_indices().tolist() == np.flatnonzero(~there).tolist()

    exported = np.concatenate([batch.keys for batch in cache.export()])
    assert sorted(exported.tolist()) == keys[there].tolist()
