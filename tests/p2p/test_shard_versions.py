"""Shard versions as numbers: invariant 12 under any sequence of writes, merges and new lives, and the rules one by one."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from p2p.knowledge import Knowledge
from p2p.paper import shard_versions
from p2p.paper.leaders import leaders_of
from p2p.paper.shard_versions import ID_BITS, ShardVersions, covers, make_version, settle, split_version
from p2p.stamps import WRITERS_MAX

SHARDS = 2
REPLICAS = 3
EVERY = np.arange(SHARDS, dtype=np.uint32)


class Replica:
    """Knowledge and versions of one node, whose lives have different ids."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.lives = 0
        self.ticks = 0
        self.begin(keep_state=False)

    def begin(self, keep_state: bool) -> None:
        self.lives += 1
        if not keep_state:
            self.writer = self.number * 100 + self.lives
            self.knowledge = Knowledge(np.zeros((SHARDS, WRITERS_MAX), np.uint64), np.zeros(WRITERS_MAX, np.uint64))
        else:
            self.knowledge = Knowledge(self.knowledge.vector, self.knowledge.frontier)
        self.versions = ShardVersions(self.knowledge, self.number * 1_000 + self.lives, random.Random(1))

    def write(self, shards: list[int]) -> None:
        self.ticks += 1
        touched = np.array(sorted(shards), np.uint32)
        frontier = int(self.knowledge.frontier[self.writer])
        prev = self.knowledge.vector[touched, self.writer].copy()
        one = np.ones(len(touched), np.uint16)
        stamp = (self.ticks << 12) | self.writer
        self.knowledge.learn_step(stamp, frontier, len(touched), touched, prev, one - 1, one)

    def pull(self, other: "Replica") -> None:
        """A round in which nothing happens between the question and the end of the answer."""
        theirs, writers = other.versions.current(), other.knowledge.writers
        ours = self.versions.current()
        asked = EVERY[~covers(ours, theirs)]
        vectors = np.ascontiguousarray(other.knowledge.vector[np.ix_(asked, writers)])
        base = self.knowledge.vector[np.ix_(asked, writers)]
        versions = theirs[asked].copy()
        self.knowledge.learn_reply(writers, base, vectors, np.zeros(len(writers), np.uint64), asked)
        self.versions.merge(asked, versions, writers, vectors)

    @property
    def vectors(self) -> np.ndarray:
        return self.knowledge.vector.copy()


WRITES = st.tuples(st.just("write"), st.integers(0, REPLICAS - 1), st.sets(st.integers(0, SHARDS - 1), min_size=1))
PULLS = st.tuples(st.just("pull"), st.integers(0, REPLICAS - 1), st.integers(0, REPLICAS - 1))
LIVES = st.tuples(st.just("begin"), st.integers(0, REPLICAS - 1), st.booleans())
OPERATIONS = st.lists(WRITES | PULLS | PULLS | LIVES, max_size=30)


def run(operations: list[tuple]) -> None:
    """Every (version, vector) ever had is compared with every other."""
    replicas = [Replica(number) for number in range(REPLICAS)]
    seen: dict[int, list[tuple[int, np.ndarray]]] = {shard: [] for shard in range(SHARDS)}
    for kind, number, what in operations:
        replica = replicas[number]
        match kind:
            case "write":
                replica.write(list(what))
            case "pull":
                replica.pull(replicas[what])
            case _:
                replica.begin(what)
        current, vectors = replica.versions.current().copy(), replica.vectors
        for shard in range(SHARDS):
            for version, vector in seen[shard]:
                if covers(current[shard], np.uint64(version)):
                    assert (vectors[shard] >= vector).all(), "covers what it does not dominate"
                if covers(np.uint64(version), current[shard]):
                    assert (vector >= vectors[shard]).all(), "is covered by what does not dominate it"
            seen[shard].append((int(current[shard]), vectors[shard]))
    for replica in replicas * REPLICAS:
        for other in replicas:
            replica.pull(other)
    assert all(np.array_equal(replica.vectors, replicas[0].vectors) for replica in replicas), "pulls alone do not converge"


@settings(max_examples=60)
@given(OPERATIONS)
def test_a_version_covers_another_only_if_its_vector_dominates(operations: list[tuple]) -> None:
    run(operations)


def adopts_what_is_not_equal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shard_versions, "settle", lambda ours, theirs, _is_ours, _is_theirs: (theirs, np.zeros(len(ours), np.bool_)))


def keeps_its_version_across_a_merge(patch: pytest.MonkeyPatch) -> None:
    def settled(ours: np.ndarray, theirs: np.ndarray, is_ours: np.ndarray, is_theirs: np.ndarray) -> tuple:
        return settle(ours, theirs, is_ours, is_theirs)[0], np.zeros(len(ours), np.bool_)

    patch.setattr(shard_versions, "settle", settled)


def counts_from_one_in_every_life(patch: pytest.MonkeyPatch) -> None:
    original = ShardVersions.__init__
    patch.setattr(ShardVersions, "__init__", lambda self, known, boot, rng: original(self, known, boot // 1_000, rng))


def does_not_mint_at_a_write(patch: pytest.MonkeyPatch) -> None:
    def current(self: ShardVersions) -> np.ndarray:
        before, now = self._see()
        new = np.flatnonzero(self._versions == 0)
        if len(new):
            self._mint(new)
        before[...] = now
        return self._versions

    patch.setattr(ShardVersions, "current", current)


def covers_whatever_counts_more(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "covers", lambda ours, theirs: ours >= theirs)


@pytest.mark.parametrize(
    "plant",
    [
        adopts_what_is_not_equal,
        keeps_its_version_across_a_merge,
        counts_from_one_in_every_life,
        does_not_mint_at_a_write,
        covers_whatever_counts_more,
    ],
    ids=lambda function: function.__name__,
)
def test_a_planted_bug_is_noticed(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    @settings(max_examples=300, derandomize=True, database=None, phases=[Phase.generate], report_multiple_bugs=False)
    @given(OPERATIONS)
    def check(operations: list[tuple]) -> None:
        run(operations)

    with pytest.raises(AssertionError):
        check()


def test_adopt_pick_keep_mint() -> None:
    ours, theirs = np.full(4, 5, np.uint64), np.full(4, 9, np.uint64)
    is_ours, is_theirs = np.array([True, True, False, False]), np.array([True, False, True, False])
    versions, mint = settle(ours, theirs, is_ours, is_theirs)
    assert versions[:3].tolist() == [9, 5, 9], "pick the larger, keep, adopt"
    assert mint.tolist() == [False, False, False, True]
    picked, _ = settle(theirs, ours, is_ours, is_theirs)
    assert picked[0] == 9, "both sides pick the same"


def test_only_versions_of_one_id_are_comparable() -> None:
    one, later, other = (np.array([make_version(count, minter)], np.uint64) for count, minter in ((3, 7), (4, 7), (9, 8)))
    assert covers(later, one)[0]
    assert covers(one, one)[0]
    assert not covers(one, later)[0]
    assert not covers(other, one)[0]
    assert not covers(one, other)[0]
    assert split_version(int(later[0])) == (4, 7)


def test_a_count_that_is_used_up_takes_another_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_versions, "COUNT_MAX", 2)
    replica = Replica(1)
    seen = []
    for _ in range(5):
        replica.write([0, 1])
        seen.append(split_version(int(replica.versions.current()[0])))
    assert [count for count, _ in seen] == [1, 2, 1, 2, 1]
    assert len({minter for _, minter in seen}) == 3
    assert all(minter < 1 << ID_BITS for _, minter in seen)


def test_a_version_is_minted_only_when_somebody_asks_and_something_changed() -> None:
    replica = Replica(1)
    mark = (replica.versions.current(), replica.versions.mark)[1]
    for _ in range(100):
        replica.write([1])
    replica.versions.current()
    assert replica.versions.mark == mark + 1
    assert replica.versions.changed_since(mark).tolist() == [1]
    replica.versions.current()
    assert replica.versions.mark == mark + 1


def test_leaders_are_a_function_of_the_view_and_move_little() -> None:
    nodes = [f"eu-{number}" for number in range(6)]
    before = leaders_of(nodes, 600)
    counts = np.bincount(before, minlength=6)
    assert counts.min() > 60, "each leads about as much"
    gone = leaders_of(nodes[:-1], 600)
    stayed = before != 5
    assert np.array_equal(gone[stayed], before[stayed]), "only the shards of who left have another leader"
    assert leaders_of(["a"], 3).tolist() == [0, 0, 0]
