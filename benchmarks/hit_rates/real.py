"""The cache of a device in a replay: by its exact semantics in NumPy, or as it is on a device or on the host twin.

Rows have one number each: what is measured is which keys are there.
"""

import numpy as np
from numpy.typing import NDArray

from gpu import layout, reference
from gpu.backend import Device
from gpu.batches import newest_by_bucket
from gpu.cache import EmbeddingCache
from gpu.evicting import policy_of

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]
DIM, CODEC = 1, "float32"


class ReferenceCache:
    """`gpu.reference` under a policy, as `gpu.cache.EmbeddingCache` drives the kernels.

    Args:
        keys: uint64[n]: the key of each dense number.
        capacity: in rows; buckets hold 32, so that it is rounded up to them.
        policy: of `gpu.evicting`.
        tick_batches: look-ups that count as one moment.
        decay_batches: look-ups until uses count half (lfu); 0: never.
    """

    def __init__(self, keys: Ids, capacity: int, policy: str, tick_batches: int = 1, decay_batches: int = 0) -> None:
        self._keys = keys.astype(np.uint64)
        self._memory = reference.new_memory(layout.Shape(layout.buckets_for(capacity), DIM, CODEC))
        self._policy = policy_of(policy)
        self._tick_batches, self._decay_batches = tick_batches, decay_batches
        self._batches = 0
        self._stamp = 0

    @property
    def written(self) -> int:
        """Rows that were written so far, by updates and for misses."""
        first = layout.OUTCOME_FIRST
        wrote = (layout.ASSIGNED, layout.INSERTED, layout.REPLACED)
        return int(sum(self._memory.counters[first + outcome] for outcome in wrote))

    @property
    def size(self) -> int:
        """Rows that are there."""
        return int(self._memory.counters[layout.SIZE])

    def look_up(self, batch: Ids) -> Flags:
        """bool[requests, tables]: which keys were there; those that were not are inserted afterwards."""
        self._batches += 1
        if self._decay_batches and self._batches % self._decay_batches == 0:
            reference.decay(self._memory)
        keys = self._keys[batch.ravel()]
        rows, stamps = np.empty((keys.size, DIM), np.float32), np.empty(keys.size, np.uint64)
        missed, count = np.empty(keys.size, np.int64), np.zeros(1, np.uint64)
        reference.lookup(self._memory, keys, rows, stamps, missed, count, policy=self._policy.number, tick=self._tick)
        self._insert(np.unique(keys[missed[: int(count[0])]]))
        hit: Flags = (stamps != 0).reshape(batch.shape)
        return hit

    def update(self, numbers: Ids, keep: bool) -> None:
        """New rows of these distinct keys: assigned where they are there, or also inserted where they are not."""
        keys = self._keys[numbers]
        if keep:
            self._insert(keys)
        else:
            stamps, rows, outcomes = self._columns(keys)
            reference.apply(self._memory, keys, stamps, rows, outcomes)

    @property
    def _tick(self) -> int:
        return self._batches // self._tick_batches

    def _columns(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint8], NDArray[np.uint8]]:
        self._stamp += 1
        rows = np.zeros((keys.size, self._memory.shape.row_bytes), np.uint8)
        return np.full(keys.size, self._stamp, np.uint64), rows, np.empty(keys.size, np.uint8)

    def _insert(self, keys: NDArray[np.uint64]) -> None:
        keys = keys[newest_by_bucket(keys, keys)]  # as the cache sorts them
        stamps, rows, outcomes = self._columns(keys)
        score = self._policy.first_score(self._tick)
        reference.insert(self._memory, keys, stamps, rows, None, outcomes, score=score, admit=self._policy.admits)


class DeviceCache:
    """`EmbeddingCache` itself; arguments as of `ReferenceCache`, and the device."""

    def __init__(self, device: Device, keys: Ids, capacity: int, policy: str, tick_batches: int = 1) -> None:
        self._keys = keys.astype(np.uint64)
        self._batches = self._stamp = 0
        self._device = device
        self.cache = EmbeddingCache(
            device, DIM, CODEC, capacity, policy, clock=lambda: self._batches // tick_batches, decay_s=1e9
        )

    def look_up(self, batch: Ids) -> Flags:
        """As `ReferenceCache.look_up`."""
        self._batches += 1
        keys = self._keys[batch.ravel()]
        hit: Flags = self._device.download(self.cache.lookup(self._device.upload(keys)).stamps) != 0
        self._insert(np.unique(keys[~hit]))
        return hit.reshape(batch.shape)

    def update(self, numbers: Ids, keep: bool) -> None:
        """As `ReferenceCache.update`."""
        if keep:
            self._insert(self._keys[numbers])
        else:
            self.cache.apply(*self._columns(self._keys[numbers]))

    def _columns(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint8]]:
        self._stamp += 1
        return keys, np.full(keys.size, self._stamp, np.uint64), np.zeros((keys.size, self.cache.shape.row_bytes), np.uint8)

    def _insert(self, keys: NDArray[np.uint64]) -> None:
        if keys.size:
            self.cache.insert(*self._columns(keys))
