"""One load for both engines: a cache that is 80 % full, look-ups of keys that it has, updates of half of them."""

import statistics
import threading
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import U64, distinct_keys
from benchmarks.device.static import apply_bytes, lookup_bytes
from gpu.backend import Device
from gpu.cache import EmbeddingCache

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    capacity: int
    fill: float
    batch: int  # keys of a launch
    launches: int  # of a round, between two waits
    rounds: int
    calls: int  # of which the latency is taken
    call_keys: int
    dim: int = 64

    @property
    def rows(self) -> int:
        """Keys that the cache is given."""
        return int(self.capacity * self.fill)


CUDA = Size(capacity=1 << 24, fill=0.8, batch=1 << 20, launches=20, rounds=7, calls=5_000, call_keys=4_096)
CUDA_QUICK = Size(capacity=1 << 16, fill=0.8, batch=1 << 12, launches=4, rounds=3, calls=100, call_keys=512)
TWIN = Size(capacity=1 << 15, fill=0.8, batch=1 << 12, launches=1, rounds=5, calls=200, call_keys=256)
TWIN_QUICK = Size(capacity=1 << 9, fill=0.8, batch=1 << 8, launches=1, rounds=3, calls=8, call_keys=64)


@dataclass
class Bed:
    """A cache with rows; row i of its keys is i, dim times."""

    device: Device
    cache: EmbeddingCache
    size: Size
    keys: U64
    stamp: int = 1

    @staticmethod
    def make(device: Device, size: Size) -> "Bed":
        """Fill a cache."""
        cache = EmbeddingCache(device, size.dim, "float32", size.capacity)
        keys = distinct_keys(size.rows, 7)
        bed = Bed(device, cache, size, keys)
        for begin in range(0, size.rows, size.batch):
            part = keys[begin : begin + size.batch]
            cache.insert(part, bed.stamps(len(part)), rows_of(np.arange(begin, begin + len(part)), size.dim))
        device.synchronize()
        return bed

    def stamps(self, count: int) -> U64:
        """uint64[count]: newer than all before."""
        self.stamp += 1
        return np.full(count, self.stamp, np.uint64)

    def some(self, count: int, seed: int) -> NDArray[np.int64]:
        """int64[count]: indices of keys, uniform and independent."""
        return np.random.default_rng(seed).integers(0, self.size.rows, count)


def rows_of(numbers: NDArray[np.int64], dim: int) -> U8:
    """uint8[n, 4 dim]: encoded float32 rows, each its number, dim times."""
    rows: F32 = np.repeat(numbers.astype(np.float32)[:, None], dim, axis=1)
    return rows.view(np.uint8)


def throughput(bed: Bed) -> dict[str, float]:
    """Rows a second of look-ups whose keys are on the device, and of updates whose rows are on the host."""
    size, device, cache = bed.size, bed.device, bed.cache
    chosen = [device.upload(bed.keys[bed.some(size.batch, seed)]) for seed in range(size.launches)]
    out = device.empty((size.batch, size.dim), np.float32)
    stamps = device.empty(size.batch, np.uint64)
    updates = bed.keys[:: max(1, size.rows // size.batch)][: size.batch].copy()
    rows = rows_of(np.arange(len(updates)), size.dim)
    seconds: dict[str, list[float]] = {"lookup": [], "apply": []}
    for number in range(size.rounds + 1):  # the first one warms up
        for side in seconds:
            device.synchronize()
            begin = time.perf_counter()
            for keys in chosen:
                if side == "lookup":
                    cache.lookup(keys, out, stamps)
                else:
                    cache.apply(updates, bed.stamps(len(updates)), rows)
            device.synchronize()
            if number:
                seconds[side].append(time.perf_counter() - begin)
    assert int((device.download(stamps) == 0).sum()) <= size.batch // 20  # nearly all keys found their place
    lookups = size.launches * size.batch / statistics.median(seconds["lookup"])
    applies = size.launches * len(updates) / statistics.median(seconds["apply"])
    return {
        "lookups_per_s": lookups,
        "applies_from_host_per_s": applies,
        "lookup_bytes_per_s": lookups * lookup_bytes(cache.shape),
        "apply_bytes_per_s": applies * apply_bytes(cache.shape),
    }


def latency(bed: Bed) -> dict[str, float]:
    """Milliseconds of small look-ups on a stream of their own: alone, and while another stream applies without a pause."""
    alone = _calls(bed)
    stop = threading.Event()
    applied = [0]
    writer = threading.Thread(target=_apply_until, args=(bed, stop, applied))
    begin = time.perf_counter()
    writer.start()
    try:
        beside = _calls(bed)
    finally:
        stop.set()
        writer.join()
    seconds = time.perf_counter() - begin
    p99 = [float(np.percentile(times, 99)) * 1e3 for times in (alone, beside)]
    return {
        "lookup_p50_ms": float(np.median(alone)) * 1e3,
        "lookup_p99_ms": p99[0],
        "lookup_p99_ms_applying": p99[1],
        "p99_ratio_applying": p99[1] / p99[0],
        "applied_meanwhile_per_s": applied[0] / seconds,
    }


def _calls(bed: Bed) -> list[float]:
    device, size, stream = bed.device, bed.size, bed.device.stream()
    batches = [device.upload(bed.keys[bed.some(size.call_keys, seed)]) for seed in range(16)]
    out = device.empty((size.call_keys, size.dim), np.float32)
    stamps = device.empty(size.call_keys, np.uint64)
    device.synchronize()
    times = []
    for number in range(size.calls + 10):
        begin = time.perf_counter()
        bed.cache.lookup(batches[number % 16], out, stamps, stream)
        stream.synchronize()
        if number >= 10:
            times.append(time.perf_counter() - begin)
    return times


def _apply_until(bed: Bed, stop: threading.Event, applied: list[int]) -> None:
    stream, count = bed.device.stream(), bed.size.call_keys
    updates = bed.keys[:count]
    rows = rows_of(np.arange(count), bed.size.dim)
    while not stop.is_set():
        bed.cache.apply(updates, bed.stamps(count), rows, stream)
        stream.synchronize()
        applied[0] += count


def visible(bed: Bed) -> dict[str, float]:
    """Milliseconds from the call of `apply`, with encoded rows on the host, until a look-up on another stream has the new row.

    `benchmarks.device.published` has the whole way, from `publish` on.
    """
    device, writer, reader = bed.device, bed.device.stream(), bed.device.stream()
    count = min(100, bed.size.rows)
    updates = bed.keys[:count]
    asked = device.upload(updates[-1:].copy())
    rows = rows_of(np.arange(count), bed.size.dim)
    out, seen = device.empty((1, bed.size.dim), np.float32), device.empty(1, np.uint64)
    times = []
    for _ in range(max(10, bed.size.calls // 10)):
        stamps = bed.stamps(count)
        begin = time.perf_counter()
        bed.cache.apply(updates, stamps, rows, writer)
        while True:
            bed.cache.lookup(asked, out, seen, reader)
            if int(device.download(seen, stream=reader)[0]) == bed.stamp:
                break
        times.append(time.perf_counter() - begin)
    return {
        "apply_to_visible_p50_ms": float(np.median(times)) * 1e3,
        "apply_to_visible_p99_ms": float(np.percentile(times, 99)) * 1e3,
    }
