"""Kernels are compiled when they are first launched; that is to be before the first look-up or row, which would wait for it."""

import numpy as np

from gpu.backend import Device
from gpu.cache import EmbeddingCache
from gpu.kernels import launchers
from gpu.layout import BUCKET_SLOTS
from gpu.reading import CacheReader, lookup_pooled


def warm_reader(device: Device) -> None:
    """Launch once what readers launch.

    Raises:
        DeviceError: a kernel cannot be compiled, or run.
    """
    _look_up(EmbeddingCache(device, dim=1, capacity=BUCKET_SLOTS))


def warm_writer(device: Device) -> None:
    """Launch once what the daemon launches, and its readers on this machine, who find it compiled. Raises as `warm_reader`."""
    cache = EmbeddingCache(device, dim=1, capacity=BUCKET_SLOTS)
    keys, stamps, rows = np.ones(1, np.uint64), np.ones(1, np.uint64), np.zeros((1, 4), np.uint8)
    cache.insert(keys, stamps, rows)
    cache.apply(keys, stamps, rows)
    list(cache.export())
    cache.erase(keys, stamps)
    _look_up(cache)


def _look_up(cache: CacheReader) -> None:
    device = cache.device
    keys = device.upload(np.ones(1, np.uint64))
    found = cache.lookup(keys)
    lookup_pooled([(cache, keys, device.upload(np.array([0, 1])), None)])
    index = device.upload(np.zeros(1, np.int64))
    launchers.scatter(device, found.rows, found.stamps, index, device.empty((1, 1), np.float32), device.empty(1, np.uint64))
    device.synchronize()
