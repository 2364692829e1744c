"""An embedding cache in device memory: rows by 64-bit keys, each with the stamp of its version, read while it is written.

One process makes a cache and writes it, on one stream and from one thread; other processes of the machine open it by its handle
and look rows up (`gpu.reading`). The memory's layout, and what a score is, are told in `gpu.layout`.

    device = open_device("cuda:0")
    cache = EmbeddingCache(device, dim=64, codec="float16", capacity=1_000_000)
    cache.insert(keys, stamps, rows)            # what readers asked for and missed
    cache.apply(keys, stamps, rows)             # what changed, where it is here
    found = cache.lookup(device.upload(keys))

Writes return before the device has done what they ask, unless their line says that they synchronise.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gpu import layout
from gpu.backend import Device, Event, Stream
from gpu.batches import checked_batch
from gpu.errors import ArgumentError, DeviceMemoryError
from gpu.evicting import DECAY_S, EVERYTHING, TICK_S, policy_of, scores_of, threshold, tick_now
from gpu.kernels import launchers
from gpu.layout import Memory
from gpu.reading import CacheReader, Stats, attach, checked_shape, lookup_pooled
from gpu.staging import Staging

__all__ = ["CacheReader", "EmbeddingCache", "Stats", "lookup_pooled"]

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]

# Rows that look-ups score anew between the passes stay, so that one round may not be enough.
EVICT_ROUNDS_MAX: Final = 4


class EmbeddingCache(CacheReader):
    """Rows of one table on one device, by the process that made it."""

    def __init__(
        self,
        device: Device,
        dim: int,
        codec: str = "float32",
        capacity: int = 1 << 20,
        policy: str = "lru",
        *,
        clock: Callable[[], int] = tick_now,
        decay_s: float = DECAY_S,
    ) -> None:
        """An empty cache, its memory allocated. Synchronises the device.

        Args:
            device: where.
            dim: of the rows, 1 to 16,384.
            codec: how rows are encoded: "float32", "float16", "bfloat16" or "int8".
            capacity: rows, at least; a multiple of 32 is allocated. A key has 32 places only: of as many keys as the
                capacity, 7 in 100 find their bucket full, and at 0.8 of it 1 in 100.
            policy: which rows leave first: "lru", "lfu" or "priority".
            clock: tells the tick (`gpu.evicting.tick_now`), the same for all processes that use the cache.
            decay_s: LFU: uses count half after so many seconds.

        Raises:
            ArgumentError: a number or name is none of these.
            DeviceMemoryError: it does not fit; nothing stays allocated.
        """
        shape, chosen = checked_shape(dim, codec, capacity), policy_of(policy)
        if shape.memory_bytes > (free := device.free_bytes()):
            raise DeviceMemoryError(shape.memory_bytes, free, f"a cache of {shape.slots:,} rows")
        memory = Memory(
            shape,
            device.zeros(shape.slots, np.uint8),
            device.zeros((shape.slots, layout.HEADER_BYTES), np.uint8),
            device.zeros((shape.slots, shape.stride), np.uint8),
            device.zeros(layout.COUNTERS, np.uint64),
        )
        super().__init__(device, memory, chosen, clock)
        self._staging = Staging(device, shape)
        self._decay_ticks = max(1, round(decay_s / TICK_S))
        self._decayed = clock()
        device.synchronize()  # whatever stream comes first finds the zeros

    @staticmethod
    def attach(device: Device, handle: Mapping[str, Any], *, clock: Callable[[], int] = tick_now) -> CacheReader:
        """Open another process's cache, to look up only; see `gpu.reading.attach`."""
        return attach(device, handle, clock=clock)

    def apply(self, keys: U64, stamps: U64, rows: U8, stream: Stream | None = None) -> Event:
        """Give rows that are here their newer versions; a key that is not here stays away. Does not synchronise.

        Waits only for the launch before the last one, whose pinned memory it takes: so do `insert` and `erase`.

        Args:
            keys: uint64[n] of the host; a key may occur several times, the largest stamp wins.
            stamps: uint64[n], each at least 1.
            rows: uint8[n, row_bytes], encoded.
            stream: the writer's; None is the device's default stream.

        Returns:
            An event that is done when every look-up that starts sees the rows.

        Raises:
            ArgumentError: not NumPy arrays like these; nothing was written.
        """
        batch = checked_batch(self.shape, keys, stamps, rows, None)
        for piece in self._staging.pieces(batch, stream):
            launchers.apply(self.device, self.memory, piece.keys, piece.stamps, piece.rows, piece.outcomes, stream=stream)
        return self._passed(stream)

    def insert(self, keys: U64, stamps: U64, rows: U8, stream: Stream | None = None, *, scores: U64 | None = None) -> Event:
        """Insert rows, or give those that are here their newer versions; otherwise as `apply`.

        Where a bucket is full, the row of the lowest score leaves; if the new one scores lower still, it does not come in.

        Args:
            keys: as for `apply`, like `stamps`, `rows`, `stream`.
            stamps: see there.
            rows: see there.
            stream: see there.
            scores: uint64[n]: what to score these rows, new or not (`score`, or as `export` told them); None: new rows count
                as used once and now, or for "priority" have rank 0, and rows that are here keep their score.
        """
        batch = checked_batch(self.shape, keys, stamps, rows, scores)
        tick = self.tick()
        self._decay_if_due(tick, stream)
        for piece in self._staging.pieces(batch, stream):
            launchers.insert(
                self.device,
                self.memory,
                piece.keys,
                piece.stamps,
                piece.rows,
                piece.scores,
                piece.outcomes,
                score=self.policy.first_score(tick),
                admit=scores is None and self.policy.admits,
                stream=stream,
            )
        return self._passed(stream)

    def erase(self, keys: U64, stamps: U64, stream: Stream | None = None) -> Event:
        """Remove keys that are here with this stamp or an older one; otherwise as `apply`."""
        batch = checked_batch(self.shape, keys, stamps, None, None)
        for piece in self._staging.pieces(batch, stream):
            launchers.erase(self.device, self.memory, piece.keys, piece.stamps, piece.outcomes, stream=stream)
        return self._passed(stream)

    def evict(self, to_rows: int, stream: Stream | None = None) -> int:
        """Remove the rows of the lowest scores until so many are left; how many left. Synchronises `stream`, some times.

        Rows that look-ups use meanwhile may stay beyond that.
        """
        if to_rows < 0:
            raise ArgumentError(f"to_rows = {to_rows}: expected 0 or more")
        before = after = self._size(stream)
        for _ in range(EVICT_ROUNDS_MAX):
            if after <= to_rows:
                break
            limit = threshold(after - to_rows, lambda *bits: self._histogram(*bits, stream=stream))
            launchers.sweep(self.device, self.memory, score=limit.score, hashed=limit.hashed, stream=stream)
            after = self._size(stream)
        return before - after

    def decay(self, stream: Stream | None = None) -> None:
        """Count every row's uses half; for "lfu" inserts do it themselves when it is due. Does not synchronise."""
        launchers.decay(self.device, self.memory, stream=stream)

    def clear(self, stream: Stream | None = None) -> None:
        """Remove every row. Does not synchronise."""
        launchers.sweep(self.device, self.memory, score=EVERYTHING.score, hashed=EVERYTHING.hashed, stream=stream)

    def score(self, ranks: NDArray[np.integer]) -> U64:
        """uint64[n]: scores of these ranks, 0 to 2**32 - 1, as of now; for "priority" a larger one stays longer."""
        return scores_of(ranks, self.tick())

    def _passed(self, stream: Stream | None) -> Event:
        event = self.device.event()
        event.record(stream)
        return event

    def _decay_if_due(self, tick: int, stream: Stream | None) -> None:
        if self.policy.name == "lfu" and (tick - self._decayed) & layout.TICK_MASK >= self._decay_ticks:
            self._decayed = tick
            self.decay(stream)

    def _size(self, stream: Stream | None) -> int:
        return int(self.device.download(self.memory.counters, stream=stream)[layout.SIZE])

    def _histogram(self, word: int, shift: int, prefix: int, score: int, *, stream: Stream | None) -> U64:
        counts = self.device.zeros(256, np.uint64, stream)
        launchers.histogram(self.device, self.memory, counts, word=word, shift=shift, prefix=prefix, score=score, stream=stream)
        return self.device.download(counts, stream=stream)
