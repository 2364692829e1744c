"""Hit rates are measured on the reference of the cache: the kernels hit the very same keys, whatever comes in between."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.cache_policy import Replay
from benchmarks.hit_rates.real import DeviceCache, ReferenceCache
from benchmarks.hit_rates.traces import TraceOptions, correlated, small
from gpu import layout
from gpu.backend import Device

BATCH = 8
SHARE = 0.08


@pytest.mark.parametrize(
    ("policy", "keep", "tick_batches"), [("lru", False, 1), ("lru", True, 7), ("lfu", True, 1), ("priority", True, 1)]
)
def test_a_device_hits_what_the_reference_hits(device: Device, policy: str, keep: bool, tick_batches: int) -> None:
    trace = correlated(replace(small(TraceOptions()), requests=320), 1)
    replay = Replay(trace.served, BATCH, trace.elsewhere)
    capacity = replay.capacity(SHARE)
    expected = ReferenceCache(replay.keys, capacity, policy, tick_batches)
    cache = DeviceCache(device, replay.keys, capacity, policy, tick_batches)
    hits = 0
    for begin in range(0, len(replay.served), BATCH):
        batch, others = replay.served[begin : begin + BATCH], replay.elsewhere[3 * begin : 3 * begin + BATCH]
        want = expected.look_up(batch)
        assert np.array_equal(cache.look_up(batch), want)
        hits += int(want.sum())
        for one in (expected, cache):
            one.update(np.unique(others), keep)
    stats = cache.cache.stats()
    assert stats.looked_up - stats.missed == hits > 0.25 * replay.served.size
    assert stats.size == expected.size == layout.buckets_for(capacity) * layout.BUCKET_SLOTS
    assert stats.assigned + stats.inserted + stats.replaced == expected.written
