"""The traces that hit rates are measured on have what they claim, and the ideal policies are the textbook's."""

from collections import Counter, OrderedDict

import numpy as np
import pytest

from benchmarks.cache_policy import Replay
from benchmarks.hit_rates.ideal import IdealCache, Tally
from benchmarks.hit_rates.traces import (
    TABLES,
    TraceOptions,
    concentration,
    correlated,
    independent,
    ranks,
    shuffled,
    small,
)
from gpu import layout

SMALL = small(TraceOptions())
WINDOW = 160


def test_one_seed_gives_one_trace() -> None:
    first, again, other = (correlated(SMALL, seed).served for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_popularity_is_the_bounded_power_law() -> None:
    drawn = ranks(np.random.default_rng(1), 400_000, 1_000, 1.25)
    assert drawn.min() == 0
    assert drawn.max() == 999
    # P(rank < r) = (1 - (r + 1)^(1-a)) / (1 - (n + 1)^(1-a))
    for rank in (1, 10, 100):
        expected = (1 - (rank + 1) ** -0.25) / (1 - 1001**-0.25)
        assert np.mean(drawn < rank) == pytest.approx(expected, abs=0.005)


def test_the_controls_hold_the_same_ids_of_each_table_in_each_window() -> None:
    keys = correlated(SMALL, 1).served
    for control in (independent(keys, WINDOW, 2), shuffled(keys, WINDOW, 2)):
        assert not np.array_equal(control, keys)
        for begin in range(0, len(keys), WINDOW):
            window = slice(begin, begin + WINDOW)
            assert np.array_equal(np.sort(control[window], axis=0), np.sort(keys[window], axis=0))
    as_sets = [Counter(map(bytes, np.ascontiguousarray(rows))) for rows in (keys, shuffled(keys, WINDOW, 2))]
    assert as_sets[0] == as_sets[1], "whole requests stay whole"
    assert concentration(keys) == concentration(independent(keys, WINDOW, 2))


def test_tables_know_of_each_other_only_in_the_correlated_trace() -> None:
    """The id of one field of many rows tells that of another: as mutual information in bits, over that of the control."""

    def information(keys: np.ndarray) -> float:
        one, other = (np.unique(keys[:, column], return_inverse=True)[1] for column in (9, 14))
        pairs = np.unique(one * TABLES**4 + other, return_counts=True)[1] / len(keys)
        marginals = [np.bincount(column) / len(keys) for column in (one, other)]
        entropies = [-np.sum(p * np.log2(p, where=p > 0, out=np.zeros_like(p))) for p in marginals]
        return float(sum(entropies) + np.sum(pairs * np.log2(pairs)))

    keys = correlated(TraceOptions(requests=4_000, kinds=300, drift_requests=4_000, strangers=0.0), 1).served
    assert information(keys) > information(independent(keys, 4_000, 2)) + 1.0


def test_hot_ids_and_whole_requests_are_as_in_the_sample_of_real_clicks() -> None:
    """Over 7,200 requests, as the sample of Criteo's has; its figures are in docs/gpu-hit-rates.md."""
    replay = Replay(correlated(TraceOptions(requests=7_200), 1).served, batch=4)
    assert replay.distinct == pytest.approx(34_443, rel=0.05)
    assert concentration(replay.served) == pytest.approx(0.617, abs=0.02)
    for policy, whole in (("lru", 0.0094), ("lfu", 0.0196), ("evlfu", 0.0425)):
        tally = replay.run(replay.ideal(0.05, policy), warm=0.0)
        assert tally.whole_rate == pytest.approx(whole, rel=0.35), policy


def textbook(policy: str, capacity: int, keys: list[int]) -> list[bool]:
    """Hits, key by key."""
    if policy == "lru":
        held: OrderedDict[int, None] = OrderedDict()
        hits = []
        for key in keys:
            hits.append(key in held)
            held.pop(key, None)
            held[key] = None
            if len(held) > capacity:
                held.popitem(last=False)
        return hits
    uses: dict[int, tuple[int, int]] = {}
    hits = []
    for now, key in enumerate(keys):
        hits.append(key in uses)
        if key not in uses and len(uses) == capacity:
            del uses[min(uses, key=lambda held: uses[held])]
        uses[key] = (uses.get(key, (0, 0))[0] + 1, now)
    return hits


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("capacity", [1, 7, 40])
def test_key_by_key_the_ideal_caches_are_the_textbooks(policy: str, capacity: int) -> None:
    keys = ranks(np.random.default_rng(capacity), 3_000, 100, 0.7)
    cache = IdealCache(100, capacity, policy)
    hits = [bool(cache.look_up(np.array([[key]]))[0, 0]) for key in keys]
    assert hits == textbook(policy, capacity, keys.tolist())
    assert np.mean(hits) > 0.05 or capacity == 1


def test_a_batch_is_looked_up_before_what_it_missed_is_inserted() -> None:
    cache = IdealCache(10, 4, "lru")
    assert not cache.look_up(np.array([[1, 2], [1, 2]])).any()
    assert cache.look_up(np.array([[1, 2], [3, 1]])).tolist() == [[True, True], [False, True]]
    cache.update(np.array([9]), keep=True)
    assert cache.look_up(np.array([[1, 9]])).tolist() == [[True, True]]
    assert np.count_nonzero(cache.held) == 4


def test_evlfu_keeps_what_completes_requests() -> None:
    cache = IdealCache(10, 4, "evlfu")
    for _ in range(2):
        cache.look_up(np.array([[1, 2]]))  # the second time both hit: worth 2
    cache.look_up(np.array([[3, 4]]))
    cache.look_up(np.array([[5, 6]]))  # one must go for each: those of the requests that hit nothing
    assert np.flatnonzero(cache.held).tolist() == [1, 2, 5, 6]


def test_whole_requests_are_those_all_of_whose_keys_hit() -> None:
    tally = Tally()
    tally.add(np.array([[True, True], [True, False]]))
    assert (tally.hit_rate, tally.whole_rate) == (0.75, 0.5)


def by_lists(policy: str, capacity: int, keys: np.ndarray, requests: np.ndarray) -> list[bool]:
    """Hits of buckets that are lists of [key, rank, tick], batch by batch; a new row takes the first lowest one's place."""
    count = layout.buckets_for(capacity)
    hashed = layout.mix64(keys.astype(np.uint64))
    bucket_of = layout.bucket_of(hashed, count).tolist()
    buckets: list[list[list[int]]] = [[] for _ in range(count)]
    hits = []
    for tick, batch in enumerate(requests, start=1):
        found = [next((row for row in buckets[bucket_of[n]] if row[0] == n), None) for n in batch.ravel()]
        hits += [row is not None for row in found]
        for row in found:
            if row:
                row[1], row[2] = (row[1] + 1, row[2]) if policy == "lfu" else (0, tick)
        missed = {int(n) for n, row in zip(batch.ravel(), found, strict=True) if row is None}
        for n in sorted(missed, key=lambda n: int(hashed[n])):  # as `gpu.batches` sorts them
            bucket, new = buckets[bucket_of[n]], [n, int(policy == "lfu"), tick]
            if len(bucket) < layout.BUCKET_SLOTS:
                bucket.append(new)
            else:
                bucket[min(range(len(bucket)), key=lambda slot: bucket[slot][1:])] = new
    return hits


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_the_cache_in_a_replay_hits_what_buckets_of_lists_hit(policy: str) -> None:
    replay = Replay(correlated(SMALL, 1).served, batch=8)
    cache = replay.real(0.1, policy)
    requests = replay.served.reshape(-1, 8, TABLES)
    hits = [bool(hit) for batch in requests for hit in cache.look_up(batch).ravel()]
    assert hits == by_lists(policy, replay.capacity(0.1), replay.keys, requests)
    assert cache.size == layout.buckets_for(replay.capacity(0.1)) * layout.BUCKET_SLOTS, "it is full, so rows had to leave"


def test_rows_that_come_by_updates_are_assigned_or_inserted_as_told() -> None:
    replay = Replay(correlated(SMALL, 1).served, batch=8)
    cache = replay.real(0.1, "lru")
    cache.look_up(replay.served[:1])
    here, all_rows, before = np.unique(replay.served[0]), np.arange(100), cache.written
    cache.update(all_rows, keep=False)
    assert cache.written - before == np.isin(all_rows, here).sum()
    assert cache.size == here.size
    cache.update(all_rows, keep=True)
    assert cache.size > here.size
