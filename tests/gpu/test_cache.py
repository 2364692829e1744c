"""The cache as its users see it, on each device, against dictionaries; and what it refuses."""

import gc
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu import layout
from gpu.backend import Device
from gpu.cache import EmbeddingCache, lookup_pooled
from gpu.errors import ArgumentError, DeviceError, DeviceMemoryError
from gpu.found import MissedKeys
from gpu.layout import CODECS, POLICIES, Shape
from gpu.twin.twin import HostTwin
from tests.gpu.oracle import Entry, Oracle, random_rows

DIMS = [1, 3, 16, 64, 100, 128]
OPERATIONS = ["lookup", "pooled", "apply", "insert", "insert scored", "erase", "evict", "decay", "export"]
EXTREMES = [0, 1, 2**63, 2**64 - 1]


class Both:
    """A cache and the oracle, side by side. Batches repeat keys and come in any order."""

    def __init__(self, device: Device, shape: Shape, policy: str, seed: int, keys_per_slot: float = 1.4) -> None:
        self.device, self.shape = device, shape
        self.tick = 5
        self.cache = EmbeddingCache(device, shape.dim, shape.codec, shape.slots, policy, clock=lambda: self.tick, decay_s=1e9)
        self.oracle = Oracle(shape, policy)
        self.rng = np.random.default_rng(seed)
        count = int(keys_per_slot * shape.slots)
        self.keys = np.array(EXTREMES + self.rng.integers(0, 2**64, count, np.uint64).tolist(), np.uint64)

    def run(self, operation: str, count: int) -> None:
        self.tick += int(self.rng.integers(0, 2))
        getattr(self, "_" + operation.split(" ")[0])(operation, self.rng.choice(self.keys, count))

    def compare(self) -> None:
        assert self.exported(0) == self.oracle.rows()
        stats = self.cache.stats()
        assert {name: getattr(stats, name) for name in self.oracle.counts} == self.oracle.counts
        assert (stats.size, stats.capacity) == (len(self.oracle.where), self.shape.slots)

    def exported(self, newer_than: int) -> dict[int, tuple[int, int, bytes]]:
        found = {}
        for part in self.cache.export(newer_than, rows_max=int(self.rng.choice([32, 100, 1 << 16]))):
            assert part.scores is not None
            columns = part.keys.tolist(), part.stamps.tolist(), part.scores.tolist(), part.rows
            found |= {key: (stamp, score, row.tobytes()) for key, stamp, score, row in zip(*columns, strict=True)}
        return found

    def batch(self, keys: np.ndarray) -> tuple[list[Entry], np.ndarray, np.ndarray, np.ndarray]:
        rows = random_rows(self.rng, self.shape, len(keys))
        stamps = self.rng.integers(1, 50, len(keys), np.uint64)
        scores = self.rng.integers(0, 4, len(keys), np.uint64) << np.uint64(32)
        columns = keys.tolist(), stamps.tolist(), scores.tolist(), rows
        return [Entry(*row[:3], row[3].tobytes()) for row in zip(*columns, strict=True)], stamps, rows, scores

    def _lookup(self, _: str, keys: np.ndarray) -> None:
        found = self.cache.lookup(self.device.upload(keys))
        rows, stamps, missed = self.oracle.lookup(keys.tolist(), self.tick)
        np.testing.assert_array_equal(self.device.download(found.rows), rows)
        assert self.device.download(found.stamps).tolist() == stamps
        assert found.missed_indices().tolist() == missed

    def _pooled(self, _: str, keys: np.ndarray) -> None:
        offsets = np.sort(np.append(self.rng.integers(0, len(keys) + 1, 6), [0, len(keys)]))
        weights = None if self.rng.random() < 0.5 else self.rng.standard_normal(len(keys)).astype(np.float32)
        mode = "sum" if weights is not None or self.rng.random() < 0.5 else "mean"
        on_device = None if weights is None else self.device.upload(weights)
        [found] = lookup_pooled([(self.cache, self.device.upload(keys), self.device.upload(offsets), on_device)], mode)
        told = None if weights is None else weights.tolist()
        expected = self.oracle.pooled(keys.tolist(), offsets.tolist(), told, mode, self.tick)
        # The device may round a product and its sum once, or twice.
        tolerance = 0 if weights is None else 1e-3
        np.testing.assert_allclose(self.device.download(found.rows), expected, rtol=tolerance / 10, atol=tolerance)
        assert found.missed_indices().tolist() == [i for i, key in enumerate(keys.tolist()) if not self.oracle.get(key)]

    def _apply(self, _: str, keys: np.ndarray) -> None:
        entries, stamps, rows, _scores = self.batch(keys)
        self.cache.apply(keys, stamps, rows).synchronize()
        self.oracle.apply(entries)

    def _insert(self, operation: str, keys: np.ndarray) -> None:
        scored = operation == "insert scored"
        entries, stamps, rows, scores = self.batch(keys)
        self.cache.insert(keys, stamps, rows, scores=scores if scored else None)
        self.oracle.insert(entries, scored=scored, tick=self.tick)

    def _erase(self, _: str, keys: np.ndarray) -> None:
        entries, stamps, _rows, _scores = self.batch(keys)
        self.cache.erase(keys, stamps)
        self.oracle.erase(entries)

    def _evict(self, _: str, keys: np.ndarray) -> None:
        size = self.cache.stats().size
        to_rows = int(self.rng.integers(size // 2, size + 2))
        assert self.cache.evict(to_rows) == max(0, size - to_rows)
        self.oracle.evict(to_rows)

    def _decay(self, _: str, keys: np.ndarray) -> None:
        self.cache.decay()
        self.oracle.decay()

    def _export(self, _: str, keys: np.ndarray) -> None:
        newer_than = int(self.rng.integers(0, 40))
        assert self.exported(newer_than) == self.oracle.rows(newer_than)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", DIMS)
def test_batches_of_all_kinds(device: Device, dim: int, codec: str) -> None:
    policy = [*POLICIES][(DIMS.index(dim) + [*CODECS].index(codec)) % 3]
    both = Both(device, Shape(5, dim, codec), policy, dim)
    for operation in ["insert", *OPERATIONS, "insert", "pooled", "lookup"]:
        both.run(operation, int(both.rng.integers(1, 130)))
        both.compare()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", DIMS)
def test_a_hundred_thousand_keys_through_each_kernel(device: Device, dim: int, codec: str) -> None:
    policy = [*POLICIES][(DIMS.index(dim) + [*CODECS].index(codec)) % 3]
    both = Both(device, Shape(400, dim, codec), policy, dim)
    for _ in range(13):
        for operation in OPERATIONS:
            both.run(operation, 8_000)
        both.compare()


@pytest.mark.timeout(1_800)  # the long profile has thousands of examples
@given(
    buckets=st.integers(1, 3),
    dim=st.sampled_from([1, 3, 4, 17]),
    codec=st.sampled_from([*CODECS]),
    policy=st.sampled_from([*POLICIES]),
    seed=st.integers(0, 2**32 - 1),
    operations=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 70)), max_size=8),
)
def test_any_batches_one_after_another(
    device: Device, buckets: int, dim: int, codec: str, policy: str, seed: int, operations: list[tuple[str, int]]
) -> None:
    both = Both(device, Shape(buckets, dim, codec), policy, seed)
    for operation, count in [("insert", 60), *operations]:
        both.run(operation, count)
    both.compare()


@pytest.mark.parametrize("load", [0.5, 0.9, 1.0, 1.5])
def test_loads_to_all_of_the_capacity_and_beyond(device: Device, load: float) -> None:
    both = Both(device, Shape(40, 3, "float32"), "lru", 3, keys_per_slot=load)
    for part in np.array_split(both.keys, 5):
        entries, stamps, rows, _scores = both.batch(part)
        both.cache.insert(part, stamps, rows)
        both.oracle.insert(entries, scored=False, tick=both.tick)
        both.tick += 1
    both.compare()
    both._lookup("", both.keys)
    size = both.cache.stats().size
    assert size <= both.shape.slots
    assert size > (0.95 if load == 1.5 else 0.9 * load) * both.shape.slots


def test_a_full_cache_of_full_buckets_finds_every_key(device: Device) -> None:
    shape = Shape(8, 16, "int8")
    both = Both(device, shape, "lru", 1)
    candidates = both.rng.integers(0, 2**64, 4_000, np.uint64)
    buckets = layout.bucket_of(layout.mix64(candidates), shape.buckets)
    keys = np.concatenate([candidates[buckets == bucket][:32] for bucket in range(shape.buckets)])
    entries, stamps, rows, _scores = both.batch(keys)
    both.cache.insert(keys, stamps, rows)
    both.oracle.insert(entries, scored=False, tick=both.tick)
    both.compare()
    assert both.cache.stats().size == shape.slots
    both._lookup("", keys)
    assert both.cache.stats().missed == 0


# --- what look-ups give besides rows


def small(device: Device, policy: str = "lru", **options: Any) -> EmbeddingCache:
    cache = EmbeddingCache(device, dim=4, codec="float32", capacity=64, policy=policy, **options)
    keys = np.arange(10, dtype=np.uint64)
    cache.insert(keys, keys + np.uint64(1), rows_of(keys))
    return cache


def rows_of(keys: np.ndarray, step: float = 0) -> np.ndarray:
    return np.repeat(keys.astype(np.float32) + np.float32(step), 4).reshape(-1, 4).view(np.uint8)


def test_look_ups_fill_what_they_are_given_and_take_signed_keys(device: Device) -> None:
    cache, stream = small(device), device.stream()
    device.synchronize()
    out, stamps = device.upload(np.full((3, 4), 7, np.float32)), device.upload(np.full(3, 7, np.uint64))
    found = cache.lookup(device.upload(np.array([4, -1, 9], np.int64)), out, stamps, stream)
    stream.synchronize()
    assert found.rows is out
    assert found.stamps is stamps
    assert device.download(out).tolist() == [[4.0] * 4, [0.0] * 4, [9.0] * 4]
    assert device.download(stamps).tolist() == [5, 0, 10]
    assert found.missed_indices(stream).tolist() == [1]


def test_missed_keys_reach_pinned_memory(device: Device) -> None:
    cache, missed = small(device), MissedKeys(device, 5)
    for keys, expected in [([3, 50, 4, 60, 0], [1, 3]), ([1, 2], []), ([], []), ([99], [0])]:
        found = cache.lookup(device.upload(np.array(keys, np.uint64)))
        missed.fetch(found)
        assert missed.wait(60)
        assert missed.indices().tolist() == expected
    with pytest.raises(ArgumentError, match="a look-up of 6 keys: there is room for the misses of 5"):
        missed.fetch(cache.lookup(device.upload(np.arange(6, dtype=np.uint64))))


def test_missed_keys_of_large_look_ups(device: Device) -> None:
    cache = small(device)
    keys = np.arange((1 << 13) + 5, dtype=np.uint64)
    assert cache.lookup(device.upload(keys)).missed_indices().tolist() == [*range(10, len(keys))]
    assert cache.lookup(device.upload(keys % np.uint64(10))).missed_indices().tolist() == []


def test_several_tables_are_pooled_at_once(device: Device) -> None:
    caches = [EmbeddingCache(device, dim, "float16", 64) for dim in (3, 40, 64)]
    rng = np.random.default_rng(4)
    requests: list[Any] = []
    expected = []
    for cache in caches:
        keys = np.arange(20, dtype=np.uint64)
        values = rng.integers(-8, 8, (20, cache.shape.dim)).astype(np.float16)
        cache.insert(keys, keys + np.uint64(1), values.view(np.uint8))
        asked = rng.integers(0, 25, 12).astype(np.uint64)
        padded = np.vstack([values.astype(np.float32), np.zeros((5, cache.shape.dim), np.float32)])
        expected.append(np.array([padded[asked[:2]].sum(0), padded[asked[2:2]].sum(0), padded[asked[2:]].sum(0)]))
        requests.append((cache, device.upload(asked), device.upload(np.array([0, 2, 2, 12])), None))
    outs = [device.upload(np.full(rows.shape, 7, np.float32)) for rows in expected]
    for found, out, rows in zip(lookup_pooled(requests, outs=outs), outs, expected, strict=True):
        assert found.rows is out
        np.testing.assert_array_equal(device.download(out), rows)
    assert lookup_pooled([]) == []


def test_nothing_asked_is_nothing_done(device: Device) -> None:
    cache = small(device)
    before = cache.stats()
    none = np.empty(0, np.uint64)
    found = cache.lookup(device.upload(none))
    assert device.download(found.rows).shape == (0, 4)
    for event in (cache.apply(none, none, rows_of(none)), cache.insert(none, none, rows_of(none)), cache.erase(none, none)):
        event.synchronize()
    [found] = lookup_pooled([(cache, device.upload(none), device.upload(np.zeros(3, np.int64)), None)])
    assert not device.download(found.rows).any()
    assert cache.stats() == before


def test_a_look_up_beside_a_writer_gives_whole_rows_that_never_go_back(device: Device) -> None:
    if isinstance(device, HostTwin) and device.memory == "model":
        pytest.skip("the weak memory is for one thread: tests/gpu/test_interleavings.py")
    cache = EmbeddingCache(device, 64, "float32", 256)
    keys = np.arange(100, dtype=np.uint64)
    over, failed = threading.Event(), []

    def version(number: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.full((len(keys), 64), number, np.float32) + keys[:, None].astype(np.float32) * 1_000
        return np.full(len(keys), number, np.uint64), rows.view(np.uint8)

    def read() -> None:
        stream, before = device.stream(), np.ones(len(keys), np.uint64)
        on_device = device.upload(keys, stream=stream)
        while not over.is_set() and not failed:
            found = cache.lookup(on_device, stream=stream)
            rows, stamps = (device.download(array, stream=stream) for array in (found.rows, found.stamps))
            hit = stamps != 0
            expected = stamps.astype(np.float32) + keys.astype(np.float32) * 1_000
            if (rows[hit] != expected[hit, None]).any() or (stamps[hit] < before[hit]).any() or rows[~hit].any():
                failed.append((stamps, rows))
            before = np.maximum(before, stamps)
            seen.update(stamps.tolist())

    cache.insert(keys, *version(1)).synchronize()
    seen = set[int]()
    reader, writing = threading.Thread(target=read), device.stream()
    reader.start()
    number, deadline = 1, time.monotonic() + 120
    while (number < 200 or len(seen) < 10) and not failed and time.monotonic() < deadline:
        number += 1
        cache.apply(keys, *version(number), stream=writing)
    writing.synchronize()
    over.set()
    reader.join()
    assert not failed
    assert len(seen) >= 10


# --- bounds


def test_a_batch_of_many_pieces_is_one_batch(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.staging.STAGE_BYTES_MAX", 500)
    both = Both(device, Shape(4, 3, "int8"), "lru", 9)
    assert both.cache._staging.rows_max < 20
    for operation in ("insert", "apply", "insert scored", "lookup", "erase"):
        both.run(operation, 150)
        both.compare()


def test_lfu_counts_uses_half_when_it_is_due(device: Device) -> None:
    now = [1_000]
    cache = small(device, "lfu", clock=lambda: now[0], decay_s=1.0)
    keys = np.arange(10, dtype=np.uint64)
    for _ in range(7):
        cache.lookup(device.upload(keys))
    ranks: Callable[[], set[int]] = lambda: {int(score) >> 32 for part in cache.export() for score in part.scores}  # type: ignore[union-attr] # noqa: E731
    assert ranks() == {8}
    now[0] += 30  # half a second
    cache.insert(keys, keys + np.uint64(1), rows_of(keys))
    assert ranks() == {8}
    now[0] += 40
    cache.insert(keys, keys + np.uint64(1), rows_of(keys))
    cache.insert(keys, keys + np.uint64(1), rows_of(keys))
    assert ranks() == {4}


def test_a_priority_row_is_displaced_by_its_like_only(device: Device) -> None:
    cache = EmbeddingCache(device, 4, "float32", 32, "priority")
    keys = np.arange(32, dtype=np.uint64)
    cache.insert(keys, keys + np.uint64(1), rows_of(keys), scores=cache.score(np.full(32, 2)))
    new = np.array([100], np.uint64)
    cache.insert(new, new, rows_of(new))
    assert cache.stats().refused == 1
    cache.insert(new, new, rows_of(new), scores=cache.score(np.array([1])))
    assert cache.stats().refused == 2
    cache.insert(new, new, rows_of(new), scores=cache.score(np.array([2])))
    assert cache.stats().replaced == 1
    with pytest.raises(ArgumentError, match="a rank is not within 0 to 4294967295"):
        cache.score(np.array([-1]))


def test_a_newcomer_displaces_the_least_used_however_often_that_was(device: Device) -> None:
    both = Both(device, Shape(1, 4, "float16"), "lfu", 6, keys_per_slot=2)
    here, newcomers = np.split(both.keys, [32])
    for keys in (here, newcomers[:1], newcomers[1:2]):
        entries, stamps, rows, _scores = both.batch(keys)
        both.cache.insert(keys, stamps, rows)
        both.oracle.insert(entries, scored=False, tick=both.tick)
        for _ in range(3):
            both._lookup("", both.keys)
        both.compare()
    assert both.cache.stats().replaced == 2
    assert both.oracle.get(int(newcomers[1]))


def test_clear_leaves_nothing(device: Device) -> None:
    cache = small(device)
    cache.clear()
    assert [*cache.export()] == []
    assert (cache.stats().size, cache.stats().evicted) == (0, 10)
    assert cache.lookup(device.upload(np.arange(10, dtype=np.uint64))).missed_indices().tolist() == list(range(10))


def test_an_export_takes_little_memory_however_wide_rows_are(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(device, Shape(5, 16, "float32"), "lru", 8)
    both.run("insert", 200)
    monkeypatch.setattr("gpu.reading.EXPORT_BYTES_MAX", 2 * 32 * 64)
    assert max(len(part) for part in both.cache.export()) <= 64
    monkeypatch.setattr("gpu.reading.EXPORT_BYTES_MAX", 1)
    assert max(len(part) for part in both.cache.export()) <= 32
    both.compare()


def test_exported_rows_come_back_as_they_were(device: Device) -> None:
    both = Both(device, Shape(6, 5, "bfloat16"), "lfu", 2)
    both.run("insert", 150)
    both.run("lookup", 200)
    other = EmbeddingCache(device, 5, "bfloat16", both.shape.slots, "lfu")
    for part in both.cache.export():
        other.insert(part.keys, part.stamps, part.rows, scores=part.scores)
    both.cache = other
    assert both.exported(0) == both.oracle.rows()


# --- other processes


def test_a_handle_opens_the_same_memory(device: Device) -> None:
    if device.name != "host-twin":
        pytest.skip("CUDA opens a handle in another process only")
    cache = small(device)
    reader = EmbeddingCache.attach(device, json.loads(json.dumps(cache.handle())))
    assert (reader.shape, reader.policy) == (cache.shape, cache.policy)
    keys = np.arange(10, dtype=np.uint64)
    cache.apply(keys, keys + np.uint64(5), rows_of(keys, 0.5)).synchronize()
    found = reader.lookup(device.upload(keys))
    assert device.download(found.rows)[:, 0].tolist() == [key + 0.5 for key in range(10)]
    assert cache.stats().looked_up == 10
    assert not hasattr(reader, "apply")


def test_handles_that_are_none_are_told(device: Device) -> None:
    cache = small(device)
    handle = cache.handle()
    for key, value, message in [
        ("layout", 0, "a cache of layout 0, this version reads 1: restart the older one"),
        ("policy", "fifo", "a damaged handle of a cache: ArgumentError there is no policy 'fifo'"),
        ("dim", None, "a damaged handle of a cache: TypeError"),
        ("codec", "fp8", "a damaged handle of a cache: ArgumentError there is no codec 'fp8'"),
        ("buckets", 0, "a damaged handle of a cache: ArgumentError capacity = 0"),
        ("buckets", 3, r"a damaged handle of a cache: ArgumentError digests has shape \(64,\): expected uint8\[96\]"),
        ("dim", 5, r"a damaged handle of a cache: ArgumentError rows has shape \(64, 16\): expected uint8\[64, 32\]"),
        ("arrays", {}, "a damaged handle of a cache: KeyError"),
    ]:
        if "has shape" in message and device.name != "host-twin":
            continue  # CUDA opens a handle in another process only
        with pytest.raises(DeviceError, match=message):
            EmbeddingCache.attach(device, handle | {key: value})


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim = 0: expected 1 to 16384"),
        ({"dim": 16_385}, "dim = 16385: expected 1 to 16384"),
        ({"capacity": 0}, "capacity = 0: expected 1 to"),
        ({"codec": "fp8"}, "there is no codec 'fp8': choose one of float32, float16, bfloat16, int8"),
        ({"policy": "fifo"}, "there is no policy 'fifo': choose one of lru, lfu, priority"),
    ],
)
def test_caches_that_cannot_be(device: Device, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        EmbeddingCache(device, **({"dim": 4} | options))


def test_memory_that_is_not_there(device: Device) -> None:
    with pytest.raises(DeviceMemoryError, match=r"a cache of [0-9,]+ rows needs [0-9,]+ bytes of device memory") as caught:
        EmbeddingCache(device, dim=16_384, capacity=1 << 30)
    assert caught.value.needed > caught.value.free > 0
    assert "\n" not in str(caught.value)


def test_a_cache_that_does_not_fit_leaves_the_memory_as_it_was() -> None:
    fits = []
    for memory_bytes in range(0, 40_000, 1_000):
        twin = HostTwin(memory_bytes=memory_bytes)
        try:
            EmbeddingCache(twin, dim=16, capacity=64)  # 6,336 bytes, and what batches come through
        except DeviceMemoryError:
            fits.append(False)
        else:
            fits.append(True)
        gc.collect()
        assert twin.free_bytes() == memory_bytes
    assert fits == sorted(fits)
    assert 20 < sum(fits) < 34


U64, F32 = np.zeros(6, np.uint64), np.zeros((6, 4), np.float32)
BAD_LOOKUPS = [
    ((F32[0],), r"keys is of dtype float32: expected uint64 or int64\[n\]"),
    ((U64.reshape(2, 3),), r"keys has shape \(2, 3\): expected uint64 or int64\[n\]"),
    ((U64[::2],), "keys is not C-contiguous"),
    ((U64, F32[:5]), r"out has shape \(5, 4\): expected float32\[6, 4\]"),
    ((U64, F32.astype(np.float64)), r"out is of dtype float64: expected float32\[6, 4\]"),
    ((U64, F32.T.copy().T), "out is not C-contiguous"),
    ((U64, F32, U64[:5]), r"stamps has shape \(5,\): expected uint64\[6\]"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_LOOKUPS)
def test_look_ups_that_cannot_be(device: Device, arguments: tuple[np.ndarray, ...], message: str) -> None:
    cache = small(device)
    on_device = [strided_upload(device, array) for array in arguments]
    with pytest.raises(ArgumentError, match=message):
        cache.lookup(*on_device)
    assert cache.stats().looked_up == 0


def strided_upload(device: Device, array: np.ndarray) -> Any:
    """The array on the device, not contiguous if it is not."""
    if array.flags.c_contiguous:
        return device.upload(array)
    return device.upload(array.T.copy()).T if array.ndim == 2 else device.upload(np.repeat(array, 2))[::2]


def test_keys_that_are_no_array_of_the_device(device: Device) -> None:
    cache = small(device)
    with pytest.raises(ArgumentError, match="keys is a list: expected an array of uint64 or int64"):
        cache.lookup([1, 2])
    with pytest.raises(ArgumentError):
        cache.lookup(np.arange(4, dtype=np.uint64))  # of the host, not of the device
    assert cache.stats().looked_up == 0


def test_bags_that_cannot_be(device: Device) -> None:
    cache = small(device)
    keys, offsets, weights = (device.upload(a) for a in (U64, np.array([0, 2, 6]), np.ones(6, np.float32)))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ((cache, keys, offsets, weights), {"mode": "mean"}, "weights with mode 'mean': expected them with sums only"),
        ((cache, keys, offsets, None), {"mode": "max"}, "there is no mode 'max': choose one of sum, mean"),
        ((cache, keys, offsets[:0], None), {}, "offsets is empty"),
        ((cache, keys, keys, None), {}, r"offsets is of dtype uint64: expected int64\[n\]"),
        ((cache, keys, offsets, weights[:2]), {}, r"weights has shape \(2,\): expected float32\[6\]"),
        ((cache, keys, offsets, None), {"outs": []}, "0 outs for 1 requests"),
        ((cache, keys, offsets, None), {"outs": [weights]}, r"out has shape \(6,\): expected float32\[2, 4\]"),
    ]
    for request, options, message in cases:
        with pytest.raises(ArgumentError, match=message):
            lookup_pooled([request], **options)
    assert cache.stats().looked_up == 0


BYTES = np.zeros((6, 16), np.uint8)
BAD_WRITES = [
    ((U64.astype(np.int64), U64, BYTES), r"keys is of dtype int64: expected uint64\[n\]"),
    ((U64, U64 + np.uint64(1), BYTES[:, :15].copy()), r"rows has shape \(6, 15\): expected uint8\[6, 16\]"),
    ((U64, U64 + np.uint64(1), F32), r"rows is of dtype float32: expected uint8\[6, 16\]"),
    ((U64, U64 + np.uint64(1), np.zeros((12, 16), np.uint8)[::2]), "rows is not C-contiguous"),
    ((U64, U64[:5], BYTES), r"stamps has shape \(5,\): expected uint64\[6\]"),
    ((U64, U64, BYTES), "a stamp is 0, which marks an empty slot: stamps begin at 1"),
    (([1], U64, BYTES), "keys is a builtins.list: batches come as NumPy arrays of the host"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_WRITES)
def test_batches_that_cannot_be(device: Device, arguments: tuple[Any, ...], message: str) -> None:
    cache = small(device)
    before = cache.stats()
    for write in (cache.apply, cache.insert):
        with pytest.raises(ArgumentError, match=message):
            write(*arguments)
    if "rows" not in message:
        with pytest.raises(ArgumentError, match=message):
            cache.erase(*arguments[:2])
    assert cache.stats() == before
