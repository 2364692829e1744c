"""The reference of the kernels against dictionaries and loops: any sequence of batches, small and crowded caches."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko import codec as store_codec
from gpu import layout, reference
from gpu.batches import newest_by_bucket
from gpu.evicting import policy_of, threshold
from gpu.layout import CODECS, MODES, POLICIES, Memory, PooledJob, Shape
from tests.gpu.oracle import Entry, Oracle, random_rows

EXTREMES = [0, 1, 2**63, 2**64 - 1]
OPERATIONS = ["lookup", "pooled", "apply", "insert", "insert scored", "erase", "evict", "decay", "export"]


def histogram(memory: Memory, word: int, shift: int, prefix: int, score: int) -> np.ndarray:
    counts = np.zeros(256, np.uint64)
    reference.histogram(memory, counts, word=word, shift=shift, prefix=prefix, score=score)
    return counts


class Both:
    """The reference and the oracle, side by side."""

    def __init__(self, shape: Shape, policy: str, seed: int) -> None:
        self.shape, self.policy = shape, policy_of(policy)
        self.memory = reference.new_memory(shape)
        self.oracle = Oracle(shape, policy)
        self.rng = np.random.default_rng(seed)
        self.tick = 5
        self.keys = np.array(EXTREMES + self.rng.integers(0, 2**64, 45 * shape.buckets, np.uint64).tolist(), np.uint64)

    def run(self, operation: str, count: int) -> None:
        self.tick += int(self.rng.integers(0, 2))
        getattr(self, "_" + operation.split(" ")[0])(operation, self.rng.choice(self.keys, count))
        self.compare()

    def compare(self) -> None:
        headers = reference.headers_of(self.memory)
        live = np.flatnonzero(headers["stamp"])
        rows = self.memory.rows[:, : self.shape.row_bytes]
        there = {int(headers["key"][i]): (int(headers["stamp"][i]), int(headers["score"][i]), rows[i].tobytes()) for i in live}
        assert there == self.oracle.rows()
        assert {key: divmod(int(slot), 32) for key, slot in zip(there, live, strict=True)} == self.oracle.where
        assert (self.memory.digests[live] == layout.digest_of(layout.mix64(headers["key"][live]))).all()
        assert np.count_nonzero(self.memory.digests) == len(live) == self.memory.counters[layout.SIZE]
        assert not (headers["lock"] % 2).any()
        names = ["absent", "assigned", "kept", "inserted", "replaced", "refused", "erased", "evicted"]
        counters = self.memory.counters.tolist()
        told = dict(
            zip(names, counters[layout.OUTCOME_FIRST :], strict=False), looked_up=counters[1], missed=counters[2], crossed=0
        )
        assert told == self.oracle.counts

    def batch(self, keys: np.ndarray, rows: np.ndarray) -> tuple[list[Entry], tuple[np.ndarray, ...]]:
        stamps = self.rng.integers(1, 20, len(keys), np.uint64)
        scores = self.rng.integers(0, 4, len(keys), np.uint64) << np.uint64(32)
        entries = [
            Entry(key, stamp, score, row.tobytes())
            for key, stamp, score, row in zip(keys.tolist(), stamps.tolist(), scores.tolist(), rows, strict=True)
        ]
        order = newest_by_bucket(keys, stamps)
        return entries, (keys[order], stamps[order], rows[order], scores[order], np.full(len(order), 99, np.uint8))

    def _lookup(self, _: str, keys: np.ndarray) -> None:
        count = len(keys)
        rows, stamps = np.full((count, self.shape.dim), 7, np.float32), np.full(count, 7, np.uint64)
        missed, missed_count = np.full(count, -1, np.int64), np.zeros(1, np.uint64)
        reference.lookup(self.memory, keys, rows, stamps, missed, missed_count, policy=self.policy.number, tick=self.tick)
        expected = self.oracle.lookup(keys.tolist(), self.tick)
        np.testing.assert_array_equal(rows, expected[0])
        assert (stamps.tolist(), missed[: int(missed_count[0])].tolist()) == expected[1:]

    def _pooled(self, _: str, keys: np.ndarray) -> None:
        offsets = np.sort(np.append(self.rng.integers(0, len(keys) + 1, 6), [0, len(keys)]))
        weights = None if self.rng.random() < 0.5 else self.rng.standard_normal(len(keys)).astype(np.float32)
        mode = "sum" if weights is not None or self.rng.random() < 0.5 else "mean"
        out = np.full((7, self.shape.dim), 7, np.float32)
        missed, missed_count = np.full(len(keys), -1, np.int64), np.zeros(1, np.uint64)
        job = PooledJob(self.memory, self.policy.number, self.tick, keys, offsets, weights, out, missed, missed_count)
        reference.pooled([job], mode=MODES[mode])
        told = None if weights is None else weights.tolist()
        np.testing.assert_array_equal(out, self.oracle.pooled(keys.tolist(), offsets.tolist(), told, mode, self.tick))

    def _apply(self, _: str, keys: np.ndarray) -> None:
        entries, (keys, stamps, rows, _scores, outcomes) = self.batch(keys, random_rows(self.rng, self.shape, len(keys)))
        reference.apply(self.memory, keys, stamps, rows, outcomes)
        self.oracle.apply(entries)

    def _insert(self, operation: str, keys: np.ndarray) -> None:
        scored = operation == "insert scored"
        entries, (keys, stamps, rows, scores, outcomes) = self.batch(keys, random_rows(self.rng, self.shape, len(keys)))
        score, admit = self.policy.first_score(self.tick), self.policy.admits and not scored
        reference.insert(self.memory, keys, stamps, rows, scores if scored else None, outcomes, score=score, admit=admit)
        self.oracle.insert(entries, scored=scored, tick=self.tick)

    def _erase(self, _: str, keys: np.ndarray) -> None:
        entries, (keys, stamps, _rows, _scores, outcomes) = self.batch(keys, random_rows(self.rng, self.shape, len(keys)))
        reference.erase(self.memory, keys, stamps, outcomes)
        self.oracle.erase(entries)

    def _evict(self, _: str, keys: np.ndarray) -> None:
        size = int(self.memory.counters[layout.SIZE])
        to_rows = int(self.rng.integers(0, size + 2))
        if to_rows < size:
            limit = threshold(size - to_rows, partial(histogram, self.memory))
            reference.sweep(self.memory, score=limit.score, hashed=limit.hashed)
        self.oracle.evict(to_rows)

    def _decay(self, _: str, keys: np.ndarray) -> None:
        reference.decay(self.memory)
        self.oracle.decay()

    def _export(self, _: str, keys: np.ndarray) -> None:
        newer_than = int(self.rng.integers(0, 15))
        found: dict[int, tuple[int, int, bytes]] = {}
        for bucket in range(self.shape.buckets):
            columns = [np.zeros(32, np.uint64) for _ in range(3)]
            rows, count = np.zeros((32, self.shape.row_bytes), np.uint8), np.zeros(1, np.uint64)
            reference.export(self.memory, *columns, rows, count, first_bucket=bucket, buckets=1, newer_than=newer_than)
            told = zip(*(column.tolist() for column in columns), rows, strict=True)
            found |= {key: (stamp, score, row.tobytes()) for key, stamp, score, row in [*told][: int(count[0])]}
        assert found == self.oracle.rows(newer_than)


@pytest.mark.timeout(1_800)  # the long profile has thousands of examples
@given(
    buckets=st.integers(1, 3),
    dim=st.sampled_from([1, 3, 4, 16, 17]),
    codec=st.sampled_from([*CODECS]),
    policy=st.sampled_from([*POLICIES]),
    seed=st.integers(0, 2**32 - 1),
    operations=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 70)), max_size=12),
)
def test_any_batches_one_after_another(
    buckets: int, dim: int, codec: str, policy: str, seed: int, operations: list[tuple[str, int]]
) -> None:
    both = Both(Shape(buckets, dim, codec), policy, seed)
    both.run("insert", 60)  # from something to lose
    for operation, count in operations:
        both.run(operation, count)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("codec", CODECS)
def test_long_runs_fill_a_cache_and_go_on(codec: str, policy: str) -> None:
    both = Both(Shape(4, 5, codec), policy, 11)
    rng = np.random.default_rng(5)
    for operation in rng.choice(OPERATIONS, 60).tolist():
        both.run(operation, int(rng.integers(0, 200)))
    assert (
        min(both.oracle.counts[name] for name in ("assigned", "kept", "absent", "inserted", "replaced", "erased", "evicted"))
        > 0
    )


@pytest.mark.parametrize("codec", CODECS)
def test_rows_decode_as_the_store_decodes_them(codec: str) -> None:
    rng = np.random.default_rng(2)
    for dim in (1, 2, 3, 16, 100):
        shape = Shape(1, dim, codec)
        rows = random_rows(rng, shape, 500)
        expected = store_codec.decode(codec, rows, dim)
        padded = np.pad(rows, ((0, 0), (0, shape.stride - shape.row_bytes)))
        np.testing.assert_array_equal(reference.decode(shape, padded).view(np.uint32), expected.view(np.uint32))


def test_a_batch_keeps_one_version_of_a_key_the_newest_and_of_equals_the_last() -> None:
    keys = np.array([7, 9, 7, 9, 7, 8], np.uint64)
    stamps = np.array([3, 5, 4, 5, 2, 1], np.uint64)
    order = newest_by_bucket(keys, stamps)
    assert sorted(order.tolist()) == [2, 3, 5]
    assert np.diff(layout.bucket_of(layout.mix64(keys[order]), 2**31)).min() > 0
    assert newest_by_bucket(keys[:0], stamps[:0]).tolist() == []


def test_stamp_0_is_no_version() -> None:
    both = Both(Shape(1, 1, "float32"), "lru", 0)
    both.run("insert", 10)
    keys = np.fromiter(both.oracle.where, np.uint64)
    before = both.memory.counters.copy()
    stamps, rows, outcomes = np.zeros(len(keys), np.uint64), np.zeros((len(keys), 4), np.uint8), np.zeros(len(keys), np.uint8)
    reference.apply(both.memory, keys, stamps, rows, outcomes)
    assert not outcomes.any()
    reference.erase(both.memory, keys, stamps, outcomes)
    assert not outcomes.any()
    reference.insert(both.memory, keys + np.uint64(1), stamps, rows, None, outcomes, score=0, admit=True)
    assert (outcomes == layout.REFUSED).all()
    assert (both.memory.counters == before).all()
    both.compare()


def test_threshold_takes_exactly_so_many_whatever_the_scores() -> None:
    rng = np.random.default_rng(1)
    for scores in (rng.integers(0, 3, 300), rng.integers(0, 2**63, 300), np.full(300, 2**64 - 1, np.uint64), np.zeros(300)):
        memory = reference.new_memory(Shape(20, 1, "float32"))
        headers = reference.headers_of(memory)
        slots = rng.permutation(memory.shape.slots)[:300]
        headers["key"][slots], headers["stamp"][slots], headers["score"][slots] = rng.integers(0, 2**63, 300), 1, scores
        memory.counters[layout.SIZE] = 300

        left = 300
        for count in (1, 2, 50, 100, 146, 1):
            before = headers["score"][headers["stamp"] != 0].copy()
            limit = threshold(count, partial(histogram, memory))
            reference.sweep(memory, score=limit.score, hashed=limit.hashed)
            left -= count
            after = headers["score"][headers["stamp"] != 0]
            assert len(after) == left == memory.counters[layout.SIZE]
            assert np.sort(before)[count:].tolist() == np.sort(after).tolist()


def test_rows_that_are_used_while_the_threshold_is_searched_stay() -> None:
    rng = np.random.default_rng(8)
    for _ in range(30):
        memory = reference.new_memory(Shape(10, 1, "float32"))
        headers = reference.headers_of(memory)
        headers["key"], headers["stamp"], headers["score"] = rng.integers(0, 2**63, 320), 1, rng.integers(0, 2**12, 320)
        memory.counters[layout.SIZE] = 320

        def used_meanwhile(*bits: int, memory: Memory = memory) -> np.ndarray:
            scores = reference.headers_of(memory)["score"]
            scores[rng.random(320) < 0.1] += np.uint64(2**6)
            return histogram(memory, *bits)

        limit = threshold(100, used_meanwhile)
        reference.sweep(memory, score=limit.score, hashed=limit.hashed)
        assert 0 < np.count_nonzero(headers["stamp"] == 0) <= 100
