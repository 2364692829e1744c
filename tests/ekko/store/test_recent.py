"""The update cache against a full scan and a dict: the same rows, each once, whatever was applied, pruned or attached before.

The rules that this rests on are also switched off, one at a time, and the property must then fail.
"""

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ekko.model import ModelSpec, TableSpec, table_id
from ekko.store import Store, recent, table
from ekko.store.kernels import ring, rows
from ekko.store.model_store import ModelStore
from ekko.store.recent import RecentRows
from p2p.replica import RowColumns, Selection
from p2p.stamps import WRITERS_MAX, writer_of

SHARDS = 3
TABLES = {"item": 2, "user": 1}
SPEC = ModelSpec("ctr", SHARDS, {name: TableSpec(name, dim) for name, dim in TABLES.items()})
WRITERS = (0, 5, 4095)
# Windows so small that rings wrap, grow and prune within an example.
WINDOWS = {"WINDOW_MIN": 4, "WINDOW_START": 8, "WINDOW_MAX": 16, "ADAPT_REQUESTS": 3}

STAMPS = st.builds(lambda tick, writer: tick << 12 | writer, st.integers(1, 12), st.sampled_from(WRITERS))
PLACES = st.tuples(st.integers(0, SHARDS - 1), st.sampled_from(WRITERS))


@dataclass(frozen=True)
class Apply:
    table: str
    keys: list[int]
    live: int
    stamps: list[int]  # one for each key, or one for all


@dataclass(frozen=True)
class Prune:
    table: str
    keep: int


@dataclass(frozen=True)
class Remove:
    table: str
    keys: list[int]


@dataclass(frozen=True)
class Attach:
    """The node restarts on its memory."""


@dataclass(frozen=True)
class Ask:
    """Compare answers: to the vector that just dominates what is not cached, changed at some places, or to any vector."""

    near: bool
    lower: list[tuple[int, int]]  # one below, or zero
    higher: dict[tuple[int, int], int]


Operation = Apply | Remove | Prune | Attach | Ask


@st.composite
def applies(draw: st.DrawFn) -> Apply:
    keys = draw(st.lists(st.integers(0, 7), unique=True, min_size=1, max_size=6))
    stamps = draw(st.lists(STAMPS, min_size=1, max_size=1) | st.lists(STAMPS, min_size=len(keys), max_size=len(keys)))
    return Apply(draw(st.sampled_from(sorted(TABLES))), keys, draw(st.integers(0, len(keys))), stamps)


ASKS = st.builds(Ask, st.booleans(), st.lists(PLACES, max_size=2), st.dictionaries(PLACES, STAMPS, max_size=2))
OPERATIONS = st.lists(
    applies()
    | applies()
    | st.builds(Remove, st.sampled_from(sorted(TABLES)), st.lists(st.integers(0, 7), unique=True, min_size=1, max_size=3))
    | ASKS
    | ASKS
    | st.builds(Prune, st.sampled_from(sorted(TABLES)), st.integers(0, 4))
    | st.just(Attach()),
    max_size=25,
)


class Run:
    """A store and what it should hold: (table, key) -> stamp."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.store = Store.open(run_dir)
        self.store.add_model(SPEC)
        self.stamps: dict[tuple[str, int], int] = {}

    @property
    def model(self) -> ModelStore:
        return self.store.models["ctr"]

    def recent(self, name: str) -> RecentRows:
        return self.model._tables[table_id(name)].recent

    def do(self, operation: Operation) -> None:
        match operation:
            case Apply():
                self.apply(operation)
            case Remove(name, keys):
                held = self.model._tables[table_id(name)]
                places = held.resolve(np.array(keys, np.uint64))
                gone = [self.stamps.pop((name, key), 0) for key in keys]
                assert held.remove(places[places >= 0]) == np.count_nonzero(gone)
            case Prune(name, keep):
                self.recent(name).prune(keep)
                assert self.recent(name).stats().cached <= keep
            case Attach():
                self.store.close()
                self.store = Store.open(self.run_dir)
                assert self.store.resumed
            case Ask():
                self.ask(operation)

    def apply(self, operation: Apply) -> None:
        own = operation.stamps if len(operation.stamps) > 1 else operation.stamps * len(operation.keys)
        stamps = None if len(operation.stamps) == 1 else np.array(own, np.uint64)
        values = np.ones((operation.live, TABLES[operation.table]), np.float32).view(np.uint8)
        columns = RowColumns(table_id(operation.table), np.array(operation.keys, np.uint64), values, stamps)
        self.model.apply([columns], own[0])
        for key, stamp in zip(operation.keys, own, strict=True):
            at = operation.table, key
            self.stamps[at] = max(self.stamps.get(at, 0), stamp)

    def ask(self, operation: Ask) -> None:
        base = np.zeros((SHARDS, WRITERS_MAX), np.uint64)
        if operation.near:
            for name in TABLES:
                np.maximum(base, self.recent(name)._dvv.T, out=base)
        for place in operation.lower:
            base[place] -= min(base[place], np.uint64(1))
        for place, stamp in operation.higher.items():
            base[place] = max(base[place], np.uint64(stamp))
        found = self.named(self.model.changed_since(base))
        assert found == self.named(self.model.scan_since(base))
        assert found == Counter(
            (name, key)
            for (name, key), stamp in self.stamps.items()
            if stamp > int(base[int(self.model.shards_of(np.array([key], np.uint64))[0]), writer_of(stamp)])
        )
        self.model.vector[...] = base
        sums = np.zeros(2, np.uint64)
        for selection in self.model.scan_since(base):
            self.model._tables[selection.table].add_digest(selection.slots, sums)
        assert self.model.stray_digest() == int(sums[0]) | int(sums[1]) << 64

    def named(self, selections: list[Selection]) -> Counter[tuple[str, int]]:
        names = {table_id(name): name for name in TABLES}
        return Counter(
            (names[selection.table], key)
            for selection in selections
            for key in self.model.read(selection.table, selection.slots).keys.tolist()
        )


def run(operations: list[Operation]) -> None:
    with TemporaryDirectory() as directory, patch.multiple(recent, **WINDOWS):
        state = Run(Path(directory))
        try:
            for operation in operations:
                state.do(operation)
            for near in (True, False):
                state.do(Ask(near, [], {}))
        finally:
            state.store.destroy()


@given(OPERATIONS)
def test_the_cache_answers_what_a_scan_would(operations: list[Operation]) -> None:
    run(operations)


# --- planted bugs -----------------------------------------------------------------------------------------------------------


@contextmanager
def mutant(tmp_path: Path, before: str, after: str) -> Iterator[None]:
    """The kernels of the cache, compiled with one change of their source."""
    source = Path(ring.__file__).read_text()
    assert source.count(before) == 1, f"{before!r} is not what the source says: change this test with it"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    with patch("ekko.store.kernels.compile._cache_directory", lambda: None):
        spec.loader.exec_module(module)
    kernels = ("record", "prune", "compare", "select")
    with patch.multiple(ring, **{name: getattr(module, name) for name in kernels}):
        yield


@contextmanager
def no_load(_: Path) -> Iterator[None]:
    """DVV is not rebuilt on attach (R10)."""
    genuine: Callable[..., int] = rows.survey

    def survey(address: int, stride: int, shards: int, _: int, __: int, free: np.ndarray) -> int:
        elsewhere = np.zeros(WRITERS_MAX * (shards + 1) + 1, np.uint64)
        return genuine(address, stride, shards, elsewhere.ctypes.data, elsewhere[WRITERS_MAX * shards :].ctypes.data, free)

    with patch.object(rows, "survey", survey):
        yield


@contextmanager
def repeats_cached(_: Path) -> Iterator[None]:
    """A repeat of a row that is there is cached as if it were new (R10)."""
    genuine: Callable[..., int] = rows.apply

    def apply(*arguments: Any) -> int:
        done = genuine(*arguments)
        address, stride, index, capacity_log2, keys, written = (arguments[i] for i in (0, 2, 5, 6, 10, 15))
        slots = np.empty(keys.size, np.int64)
        table.index_kernels.resolve(index, capacity_log2, keys, slots)
        table.to_places(address, stride, slots)
        written[:done] = slots[:done]
        return done

    with patch.object(rows, "apply", apply):
        yield


@contextmanager
def removed_counted(path: Path) -> Iterator[None]:
    """A removed row is taken for the one that has its slot now. DVV, into which it is merged, would hide that (R5)."""
    with mutant(path, " and is_current(row, place):", ":"), patch.object(RecentRows, "remove", lambda *_: None):
        yield


BUGS = {
    "bound-off-by-one": ("known >= load_u64", "known + np.uint64(1) >= load_u64"),
    "selects-what-is-known": ("stamp > base[", "stamp >= base["),
    "left-out-not-merged": ("            merge_dvv(row_stamp, shard, shards, dvv, writers)\n", ""),
    "dropped-not-merged": ("    merge_dvv(stamp, np.int64(load_u64(entry) >> _PLACE_BITS), shards, dvv, writers)\n", ""),
    "superseded-counted": ("if load_u64(row + _STAMP) == load_u64(entry + _ENTRY_STAMP) and", "if"),
}
PLANTED = {name: lambda path, bug=bug: mutant(path, *bug) for name, bug in BUGS.items()}
PLANTED |= {"not-rebuilt-on-attach": no_load, "repeats-cached": repeats_cached, "removed-counted": removed_counted}


@pytest.mark.parametrize("bug", sorted(PLANTED))
def test_a_planted_bug_is_noticed(bug: str, tmp_path: Path) -> None:
    @settings(max_examples=600, derandomize=True, database=None, phases=[Phase.generate])
    @given(OPERATIONS)
    def check(operations: list[Operation]) -> None:
        run(operations)

    with PLANTED[bug](tmp_path), pytest.raises(AssertionError):
        check()


# --- how it behaves ---------------------------------------------------------------------------------------------------------


def step(model: ModelStore, keys: np.ndarray, stamp: int) -> np.ndarray:
    """A step of a writer; returns the vector of who has it."""
    values = np.ones((keys.size, 1), np.float32).view(np.uint8)
    model.apply([RowColumns(table_id("user"), keys, values)], stamp)
    vector = np.zeros((SHARDS, WRITERS_MAX), np.uint64)
    vector[:, writer_of(stamp)] = stamp
    return vector


def test_a_peer_that_is_a_little_behind_costs_no_scan_and_a_joining_one_does() -> None:
    model = Store.anonymous().add_model(SPEC)
    keys = np.arange(20_000, dtype=np.uint64)
    first = step(model, keys, 1 << 12)
    for tick in range(2, 8):
        step(model, keys[tick : tick + 2_000], tick << 12)
    with patch.object(table.Table, "scan", side_effect=AssertionError("a scan")):
        (selection,) = model.changed_since(first)
        assert selection.slots.size == 2_005
        model.vector[...] = first
        assert model.stray_digest() != 0
    assert model.cache_stats().hits == 2  # one for each table
    model.changed_since(np.zeros_like(first))
    stats = model.cache_stats()
    assert (stats.hits, stats.misses) == (3, 1)
    assert stats.cached <= 20_000 <= stats.cached + stats.pruned + stats.left_out


def test_the_window_follows_how_far_back_peers_look() -> None:
    model = Store.anonymous().add_model(SPEC)
    user = model._tables[table_id("user")].recent
    keys = np.arange(60_000, dtype=np.uint64)
    vector = step(model, keys, 1 << 12)
    for tick in range(2, 200):
        before, vector = vector, step(model, keys[:3_000], tick << 12)
        for _ in range(recent.ADAPT_REQUESTS // 150):
            model.changed_since(before)
    assert user.stats().window == recent.ADAPT_HEADROOM * 3_000
    assert user.stats().misses == 0

    late = vector
    for tick in range(200, 206):
        vector = step(model, keys[:3_000], tick << 12)
    model.changed_since(late)  # further back than four steps
    assert user.stats().misses == 1
    assert user.stats().window == 2 * recent.ADAPT_HEADROOM * 3_000


def test_one_late_asker_among_many_is_not_missed_again_and_again() -> None:
    model = Store.anonymous().add_model(SPEC)
    user = model._tables[table_id("user")].recent
    keys = np.arange(60_000, dtype=np.uint64)
    late = vector = step(model, keys, 1 << 12)
    for tick in range(2, 500):
        before, vector = vector, step(model, keys[:1_000], tick << 12)
        for _ in range(5):
            model.changed_since(before)
        if tick % 20 == 0:  # one in a hundred
            model.changed_since(late)
            late = vector
    assert user.stats().misses == 0
    assert user.stats().window == recent.ADAPT_HEADROOM * 20_000


def test_a_ring_stays_within_its_bounds() -> None:
    cache = RecentRows(SHARDS)
    rng = np.random.default_rng(3)
    slots = np.arange(1 << 17)
    keys = rng.integers(0, 1 << 63, slots.size).astype(np.uint64)
    none = np.empty(0, np.uint64)
    for tick in range(1, 4):
        cache.record(slots, keys, none, tick << 12, rows_used=slots.size)
        assert 0.9 * recent.WINDOW_START < cache.stats().cached <= recent.WINDOW_START
        assert cache.stats().bytes < 16 * recent.WINDOW_START + 1_000
    few = RecentRows(SHARDS)
    few.record(slots, keys, none, 1 << 12, rows_used=10)
    assert 0.9 * recent.WINDOW_MIN < few.stats().cached <= recent.WINDOW_MIN


def test_old_rows_that_come_late_do_not_push_recent_ones_out() -> None:
    """A join brings rows of all ages."""
    cache = RecentRows(SHARDS)
    slots = np.arange(recent.WINDOW_START)
    keys = slots.astype(np.uint64)
    none = np.empty(0, np.uint64)
    for tick in (100, 200):
        cache.record(slots, keys, none, tick << 12, rows_used=slots.size)
    before = cache.stats()
    cache.record(slots, keys, none, 50 << 12, rows_used=slots.size)
    after = cache.stats()
    assert (after.cached, after.pruned, after.left_out) == (before.cached, before.pruned, before.left_out + slots.size)
