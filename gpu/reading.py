"""Look-ups in a cache, by the process that made it or by another one that opened its memory.

A look-up never waits for a write and gives whole rows only: the row's lock is read before and after the row, and a row that
changed meanwhile is read again, some times, and then counts as missed. A missed key is served by who has all rows, the node's
store.

Calls return before the device has done what they ask, unless their line says that they synchronise. They may come from any
thread, each with a stream of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gpu import layout
from gpu.backend import Array, Device, Stream
from gpu.batches import Batch, check_array
from gpu.errors import ArgumentError, DeviceError
from gpu.evicting import Policy, policy_of, tick_now
from gpu.found import Found
from gpu.kernels import launchers
from gpu.layout import BUCKET_SLOTS, BUCKETS_MAX, CODECS, DIM_MAX, LAYOUT_VERSION, MODES, Memory, PooledJob, Shape

# What comes to the host at once, whatever the rows' width: so much device memory an export takes.
EXPORT_ROWS_MAX: Final = 1 << 16
EXPORT_BYTES_MAX: Final = 16 << 20
_ARRAYS: Final = ("digests", "headers", "rows", "counters")


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts since the cache was made, those of all processes; `size` is now.

    Of the keys looked up, `missed` were not found, among them `crossed`, which changed at every attempt to read them. Of the
    keys written (one a key and batch): `assigned` a newer version, `kept` as new or newer, `absent`, `inserted`, `replaced`
    (inserted, another key left), `refused` (the bucket's others score higher), `erased`. `evicted` left for `evict` or `clear`.
    """

    capacity: int
    size: int
    looked_up: int
    missed: int
    crossed: int
    absent: int
    assigned: int
    kept: int
    inserted: int
    replaced: int
    refused: int
    erased: int
    evicted: int

    @property
    def hit_rate(self) -> float:
        """Share of the looked up keys that were found; 0 before the first."""
        return 1 - self.missed / self.looked_up if self.looked_up else 0.0


class CacheReader:
    """The side of a cache that looks rows up. `gpu.cache.EmbeddingCache` is one that also writes."""

    def __init__(self, device: Device, memory: Memory, policy: Policy, clock: Callable[[], int]) -> None:
        self.device = device
        self.memory = memory
        self.policy = policy
        self.tick = clock

    @property
    def shape(self) -> Shape:
        """How many rows of what kind it has room for."""
        return self.memory.shape

    def lookup(self, keys: Array, out: Array | None = None, stamps: Array | None = None, stream: Stream | None = None) -> Found:
        """Look rows up, each key as often as it stands there. Enqueued on `stream`; does not synchronise.

        Args:
            keys: uint64[n] or int64[n] on the device.
            out: float32[n, dim] on the device, to be filled; None: a new array.
            stamps: uint64[n] on the device, to be filled; None: a new array.
            stream: None is the device's default stream.

        Raises:
            ArgumentError: another device, dtype or shape, or not contiguous; nothing was launched.
            DeviceMemoryError: no room for the new arrays.
        """
        keys = _checked_keys("keys", keys)
        count = len(keys)
        out = _given_or_new(self.device, "out", out, (count, self.shape.dim), np.float32)
        stamps = _given_or_new(self.device, "stamps", stamps, (count,), np.uint64)
        found = Found(self.device, out, stamps, *_room_for_missed(self.device, count, stream))
        launchers.lookup(
            self.device,
            self.memory,
            keys,
            out,
            stamps,
            found.missed,
            found.missed_count,
            policy=self.policy.number,
            tick=self.tick(),
            stream=stream,
        )
        return found

    def stats(self, stream: Stream | None = None) -> Stats:
        """Counts as they are when `stream` has come so far. Synchronises `stream`."""
        counters = self.device.download(self.memory.counters, stream=stream).tolist()
        names = ("absent", "assigned", "kept", "inserted", "replaced", "refused", "erased")
        outcomes = dict(zip(names, counters[layout.OUTCOME_FIRST :], strict=False))
        return Stats(
            self.shape.slots,
            counters[layout.SIZE],
            counters[layout.LOOKED_UP],
            counters[layout.MISSED],
            counters[layout.CROSSED],
            evicted=counters[layout.EVICTED],
            **outcomes,
        )

    def export(self, newer_than: int = 0, *, rows_max: int = EXPORT_ROWS_MAX, stream: Stream | None = None) -> Iterator[Batch]:
        """The rows whose stamp is larger than `newer_than`, part by part, as host arrays. Synchronises `stream` at every part.

        A row that is written meanwhile, on another stream, is told in one of its versions or, rarely, not at all.

        Args:
            newer_than: 0: all rows.
            rows_max: of one part; fewer where they are wide, but at least the 32 of a bucket.
            stream: None is the device's default stream.
        """
        fitting = min(rows_max, EXPORT_BYTES_MAX // self.shape.row_bytes)
        buckets = max(1, min(fitting // BUCKET_SLOTS, self.shape.buckets))
        room = buckets * BUCKET_SLOTS
        key_column, stamp_column, score_column = (self.device.empty(room, np.uint64) for _ in range(3))
        rows = self.device.empty((room, self.shape.row_bytes), np.uint8)
        for first in range(0, self.shape.buckets, buckets):
            count = self.device.zeros(1, np.uint64, stream)
            launchers.export(
                self.device,
                self.memory,
                key_column,
                stamp_column,
                score_column,
                rows,
                count,
                first_bucket=first,
                buckets=min(buckets, self.shape.buckets - first),
                newer_than=newer_than,
                stream=stream,
            )
            if found := int(self.device.download(count, stream=stream)[0]):
                columns = key_column, stamp_column, score_column, rows
                keys, stamps, scores, encoded = (self.device.download(column[:found], stream=stream) for column in columns)
                whole = stamps != 0  # the others left while they were read
                yield Batch(keys[whole], stamps[whole], encoded[whole], scores[whole])

    def handle(self) -> dict[str, Any]:
        """What `attach` needs, JSON-able. The memory stays this process's: keep the cache while others use it."""
        arrays = {name: self.device.export(getattr(self.memory, name)) for name in _ARRAYS}
        numbers = {"buckets": self.shape.buckets, "dim": self.shape.dim, "codec": self.shape.codec, "policy": self.policy.name}
        return {"layout": LAYOUT_VERSION, **numbers, "arrays": arrays}


def attach(device: Device, handle: Mapping[str, Any], *, clock: Callable[[], int] = tick_now) -> CacheReader:
    """Open another process's cache.

    Args:
        device: the same one, opened by this process.
        handle: as `CacheReader.handle` of the process that made the cache told it.
        clock: as for `EmbeddingCache`.

    Raises:
        DeviceError: it is gone, on another device, of another layout, or the handle is damaged.
    """
    if handle.get("layout") != LAYOUT_VERSION:
        raise DeviceError(
            f"a cache of layout {handle.get('layout')!r}, this version reads {LAYOUT_VERSION}: restart the older one"
        )
    try:
        shape = checked_shape(int(handle["dim"]), handle["codec"], int(handle["buckets"]) * BUCKET_SLOTS)
        policy = policy_of(handle["policy"])
        memory = Memory(shape, *(device.open(handle["arrays"][name]) for name in _ARRAYS))
        _check_memory(memory)
    except (KeyError, TypeError, ValueError) as error:
        raise DeviceError(f"a damaged handle of a cache: {type(error).__name__} {error}") from error
    return CacheReader(device, memory, policy, clock)


def checked_shape(dim: int, codec: str, capacity: int) -> Shape:
    """The shape of a cache with room for so many rows, at least.

    Raises:
        ArgumentError: no cache can have it.
    """
    if codec not in CODECS:
        raise ArgumentError(f"there is no codec {codec!r}: choose one of {', '.join(CODECS)}")
    if not 1 <= dim <= DIM_MAX:
        raise ArgumentError(f"dim = {dim}: expected 1 to {DIM_MAX}")
    if not 1 <= capacity <= BUCKETS_MAX * BUCKET_SLOTS:
        raise ArgumentError(f"capacity = {capacity}: expected 1 to {BUCKETS_MAX * BUCKET_SLOTS} rows")
    return Shape(layout.buckets_for(capacity), dim, codec)


def _check_memory(memory: Memory) -> None:
    shape = memory.shape
    check_array("digests", memory.digests, (np.uint8,), (shape.slots,))
    check_array("headers", memory.headers, (np.uint8,), (shape.slots, layout.HEADER_BYTES))
    check_array("rows", memory.rows, (np.uint8,), (shape.slots, shape.stride))
    check_array("counters", memory.counters, (np.uint64,), (layout.COUNTERS,))


def lookup_pooled(
    requests: Sequence[tuple[CacheReader, Array, Array, Array | None]],
    mode: str = "sum",
    outs: Sequence[Array] | None = None,
    stream: Stream | None = None,
) -> list[Found]:
    """Look up bags of keys in several caches of one device in one launch. Enqueued on `stream`; does not synchronise.

    Args:
        requests: (cache, keys, offsets, weights) each. keys: uint64[n] or int64[n]; offsets: int64[bags + 1], where each bag
            begins and, last, n; weights: float32[n] or None, for sums only. All on the device. Offsets that fall or exceed n
            are the caller's error, and not found out: that would be another pass over them.
        mode: "sum", or "mean": the sum divided by how many keys the bag has, the missed ones too.
        outs: float32[bags, dim] for each request, to be filled; None: new arrays.
        stream: None is the device's default stream.

    Returns:
        One for each request; its `rows` are of bags. What was missed is left out, and told: the caller adds it, weighted or
        divided as the rest.

    Raises:
        ArgumentError: nothing was launched. DeviceMemoryError: no room for the new arrays.
    """
    if mode not in MODES:
        raise ArgumentError(f"there is no mode {mode!r}: choose one of {', '.join(MODES)}")
    if outs is not None and len(outs) != len(requests):
        raise ArgumentError(f"{len(outs)} outs for {len(requests)} requests")
    if len({id(cache.device) for cache, *_ in requests}) > 1:
        raise ArgumentError("the caches are of several devices: look up in those of one at a time")
    jobs, found = [], []
    for number, (cache, keys, offsets, weights) in enumerate(requests):
        out = None if outs is None else outs[number]
        job = _pooled_job(cache, keys, offsets, weights, out, mode, stream)
        jobs.append(job)
        found.append(Found(cache.device, job.out, None, job.missed, job.missed_count, job.buffer))
    if jobs:
        launchers.pooled(requests[0][0].device, jobs, mode=MODES[mode], stream=stream)
    return found


def _pooled_job(
    cache: CacheReader,
    keys: Array,
    offsets: Array,
    weights: Array | None,
    out: Array | None,
    mode: str,
    stream: Stream | None,
) -> PooledJob:
    keys = _checked_keys("keys", keys)
    check_array("offsets", offsets, (np.int64,), (None,))
    if not len(offsets):
        raise ArgumentError("offsets is empty: expected where each bag begins and, last, how many keys there are")
    if weights is not None:
        check_array("weights", weights, (np.float32,), (len(keys),))
        if mode != "sum":
            raise ArgumentError(f"weights with mode {mode!r}: expected them with sums only")
    out = _given_or_new(cache.device, "out", out, (len(offsets) - 1, cache.shape.dim), np.float32)
    room = _room_for_missed(cache.device, len(keys), stream)
    buffer = cache.device.empty(out.shape, np.float32) if cache.shape.chunks > launchers.WARP else None
    return PooledJob(cache.memory, cache.policy.number, cache.tick(), keys, offsets, weights, out, *room, buffer)


def _checked_keys(name: str, keys: Array) -> Array:
    check_array(name, keys, (np.uint64, np.int64), (None,))
    return keys.view(np.uint64)


def _given_or_new(device: Device, name: str, array: Array | None, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
    if array is None:
        return device.empty(shape, dtype)
    check_array(name, array, (dtype,), shape)
    return array


def _room_for_missed(device: Device, count: int, stream: Stream | None) -> tuple[Array, Array]:
    return device.empty(count, np.int64), device.zeros(1, np.uint64, stream)
