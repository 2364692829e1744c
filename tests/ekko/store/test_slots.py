"""Rows are removed, slots given out again, the index is cleaned: against a dict, and killed at every store."""

import ctypes
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.errors import StoreError
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.store import Store, layout
from ekko.store import table as table_module
from ekko.store.kernels import index, rows
from ekko.store.model_store import ModelStore
from ekko.store.table import INDEX_LOAD_MAX, Table
from p2p.replica import RowColumns
from p2p.stamps import WRITERS_MAX

DIM = 3
SPEC = ModelSpec("ctr", 4, {"item": TableSpec("item", DIM)})
# An index of 16 entries, and steps of a few rows: it is built anew all the time, and is hardly ever finished at once.
SMALL = {"INDEX_LOG2_MIN": 4, "GROWTH_ROWS_MIN": 2, "GROWTH_ROWS_PER_INSERT": 1}


@dataclass(frozen=True)
class Put:
    keys: list[int]
    live: int


@dataclass(frozen=True)
class Remove:
    keys: list[int]


@dataclass(frozen=True)
class Attach:
    """The node restarts on its memory."""


Operation = Put | Remove | Attach
KEYS = st.lists(st.integers(0, 40), unique=True, min_size=1, max_size=6)
PUTS = st.builds(Put, KEYS, st.integers(0, 12))
OPERATIONS = st.lists(PUTS | PUTS | st.builds(Remove, KEYS) | st.just(Attach()), max_size=40)


class Run:
    """A store, and what it should hold: key -> (stamp, is it live)."""

    def __init__(self) -> None:
        self.store = Store.anonymous()
        self.store.add_model(SPEC)
        self.held: dict[int, tuple[int, bool]] = {}
        self.stamp = 0
        self.lives: dict[int, int] = {}  # key -> when it came
        self.kept: dict[int, tuple[int, int]] = {}  # places as they were at any time, of which key in which life

    @property
    def model(self) -> ModelStore:
        return self.store.models["ctr"]

    @property
    def table(self) -> Table:
        return self.model._tables[table_id("item")]

    def do(self, operation: Operation) -> None:
        match operation:
            case Put(keys, live):
                self.put(keys, live)
            case Remove(keys):
                places = self.table.resolve(np.array(keys, np.uint64))
                for key in keys:
                    self.lives.pop(key, None)
                assert self.table.remove(places) == sum(self.held.pop(key, None) is not None for key in keys)
                assert self.table.remove(places) == 0, "a place is removed once"
            case Attach():
                self.store = self.store.reopened()
        check(self.model, self.held)
        self.keep()

    def put(self, keys: list[int], live: int) -> None:
        self.stamp += 1
        put(self.model, keys, live, self.stamp)
        self.lives |= {key: self.stamp for key in keys if key not in self.held}
        self.held |= {key: (self.stamp, at < live) for at, key in enumerate(keys)}

    def keep(self) -> None:
        """Places that were selected once still give their own key, or nothing (R18)."""
        columns = self.model.read(table_id("item"), np.array(list(self.kept), np.int64))
        assert sorted(columns.keys.tolist()) == sorted(key for key, life in self.kept.values() if self.lives.get(key) == life)
        for key, place in zip(self.lives, self.table.resolve(np.array(list(self.lives), np.uint64)).tolist(), strict=True):
            is_own = self.kept.setdefault(place, (key, self.lives[key])) == (key, self.lives[key])
            assert is_own, "another key, or another life of it, had the same place"


def put(model: ModelStore, keys: list[int], live: int, stamp: int) -> None:
    """Write keys; those after the first `live` are deleted."""
    values = np.full((min(live, len(keys)), DIM), stamp, np.float32)
    model.apply([RowColumns(table_id("item"), np.array(keys, np.uint64), values.view(np.uint8))], stamp)


def check(model: ModelStore, held: dict[int, tuple[int, bool]]) -> None:
    """Rows, index and counts say what the dict says."""
    table = model._tables[table_id("item")]
    keys = np.arange(60, dtype=np.uint64)
    live = {key: stamp for key, (stamp, is_live) in held.items() if is_live}
    words = table.mapping.words(layout.TABLE.offset("rows"), table.rows_used, table.stride // 8).view(np.uint32)
    assert not (words[:, 0] & 1).any(), "a row stays locked"
    places = table.scan(np.zeros(4 * WRITERS_MAX, np.uint64), 4)
    columns = model.read(table_id("item"), places)
    assert columns.stamps is not None
    everything = zip(columns.keys.tolist(), columns.stamps.tolist(), np.arange(len(places)) < len(columns.rows), strict=True)
    assert sorted((key, stamp, bool(is_live)) for key, stamp, is_live in everything) == sorted(
        (key, *version) for key, version in held.items()
    )
    assert set(np.flatnonzero(table.resolve(keys) >= 0).tolist()) == set(held)
    assert table.free == table.rows_used - len(held)
    assert table.tombstones == len(held) - len(live)
    entries = table.index.mapping.words(layout.INDEX.offset("entries"), 1 << table.index.capacity_log2)
    named = entries[entries > layout.ENTRY_REMOVED] & np.uint64(0xFFFF_FFFF)
    assert sorted(words.view(np.uint64)[named, 2].tolist()) == sorted(held), "an entry for each row, and no other"
    assert np.count_nonzero(entries == layout.ENTRY_REMOVED) <= table.index.removed
    assert np.count_nonzero(entries) <= INDEX_LOAD_MAX * len(entries)
    values, stamps = model.lookup("item", keys)
    assert {key: stamp for key, stamp in enumerate(stamps.tolist()) if stamp} == live
    assert values.tolist() == [[float(live.get(key, 0))] * DIM for key in range(60)]


def run(operations: list[Operation]) -> None:
    with patch.multiple(table_module, **SMALL):
        state = Run()
        for operation in operations:
            state.do(operation)


@given(OPERATIONS)
def test_the_store_is_a_dict(operations: list[Operation]) -> None:
    run(operations)


def unmixed(hashed: int) -> int:
    """The key of which this is the hash."""
    for factor in (index._MULTIPLIER_2, index._MULTIPLIER_1):
        hashed = (hashed ^ hashed >> 33) * pow(int(factor), -1, 1 << 64) & (1 << 64) - 1
    return hashed ^ hashed >> 33


@pytest.mark.parametrize("seed", range(3))
def test_keys_of_which_the_index_says_the_same_are_kept_apart(seed: int) -> None:
    """Some keys have one tag and one first entry, so that nothing but their rows tells them apart."""
    rng = np.random.default_rng(seed)
    twins = np.array([unmixed(number << 31 | 7) for number in range(24)], np.uint64)
    held: dict[int, int] = {}
    with patch.multiple(table_module, **SMALL):
        store = Store.anonymous()
        store.add_model(SPEC)
        for stamp in range(1, 120):
            model = store.models["ctr"]
            table = model._tables[table_id("item")]
            chosen = rng.permutation(24)[: rng.integers(1, 6)].tolist()
            if rng.random() < 0.6:
                put(model, [int(twins[number]) for number in chosen], 9, stamp)
                held |= dict.fromkeys(chosen, stamp)
            else:
                places = table.resolve(twins[chosen])
                assert (places >= 0).tolist() == [number in held for number in chosen]
                assert table.remove(places) == sum(held.pop(number, 0) > 0 for number in chosen)
            if stamp % 40 == 0:
                store = store.reopened()
                model = store.models["ctr"]
            values, stamps = model.lookup("item", twins)
            assert {number: found for number, found in enumerate(stamps.tolist()) if found} == held
            assert values[:, 0].tolist() == stamps.tolist()
            assert model.tables_by_id[table_id("item")].rows_used - model.tables_by_id[table_id("item")].free == len(held)


def test_slots_are_given_out_again_before_the_table_grows() -> None:
    with patch.multiple(table_module, **SMALL):
        state = Run()
        for turn in range(50):
            state.do(Put([turn % 60, (turn + 1) % 60], 2))
            state.do(Remove([turn % 60]))
        assert state.table.rows_used <= 3
        assert state.table.slots_reused >= 47
        assert state.table.index.capacity_log2 == 4, "an index of few keys is cleaned, and does not grow"


def test_a_table_that_is_turned_over_keeps_its_size() -> None:
    """Keys come and go, ten times as many as there are at once: rows and index stay as large as those."""
    model = Store.anonymous().add_model(SPEC)
    table = model._tables[table_id("item")]
    held = 20_000
    for begin in range(0, 10 * held, 1_000):
        keys = np.arange(begin, begin + 1_000, dtype=np.uint64)
        model.apply([RowColumns(table.spec.id, keys, np.ones((1_000, 4 * DIM), np.uint8))], 5)
        if begin >= held:
            places = table.resolve(keys - np.uint64(held))
            assert (places >= 0).all()
            assert table.remove(places) == 1_000
    assert table.rows_used <= held + 1_000
    assert table.index.capacity_log2 <= 16
    assert (table.resolve(np.arange(9 * held, 10 * held, dtype=np.uint64)) >= 0).all()
    assert (table.resolve(np.arange(9 * held, dtype=np.uint64)) < 0).all()


def walk(seed: int) -> int:
    """Rows come and go; returns at how many of 120 steps the next index was being filled."""
    rng = np.random.default_rng(seed)
    state = Run()
    filling = 0
    for _ in range(120):
        keys = np.unique(rng.integers(0, 60, 4)).tolist()
        state.do(Put(keys, 3) if rng.random() < 0.5 else Remove(keys))
        filling += state.table._is_filling
    return filling


def test_rows_come_and_go_while_the_next_index_is_filled() -> None:
    with patch.multiple(table_module, **SMALL):
        assert sum(walk(seed) for seed in range(5)) > 5


# --- killed at every store ----------------------------------------------------------------------------------------------------


class KilledError(Exception):
    """The process is gone."""


class Interpreter:
    """The writer's kernels, run by Python one store after the other, of which only so many happen."""

    def __init__(self) -> None:
        self.stores_left = 1 << 60
        self.stores = 0
        names = ("places", "index", "rows")
        fakes = {"ekko.store.kernels.atomics": self._atomics(), "ekko.store.kernels.compile": _not_compiled()}
        with patch.dict(sys.modules, fakes):
            for name in names:
                sys.modules.pop(f"ekko.store.kernels.{name}", None)
            modules = [importlib.import_module(f"ekko.store.kernels.{name}") for name in names]
        for name, genuine in (("places", sys.modules["ekko.store.kernels.places"]), ("index", index), ("rows", rows)):
            setattr(sys.modules["ekko.store.kernels"], name, genuine)  # the import of the others took their place
        self.index, self.rows = modules[1], modules[2]

    @contextmanager
    def writing(self, stores: int) -> Iterator[None]:
        """A table is written by these kernels, for so many stores."""
        self.stores_left, self.stores = stores, 0
        with (
            patch.object(table_module, "rows", self.rows),
            patch.object(table_module, "index_kernels", self.index),
            np.errstate(over="ignore"),
        ):
            yield

    def _store(self, address: int, value: Any, kind: Any) -> None:
        if self.stores_left == 0:
            raise KilledError
        self.stores_left -= 1
        self.stores += 1
        kind.from_address(int(address)).value = int(value)

    def _copy(self, target: int, source: int, count: int) -> None:
        for offset in range(0, int(count), 4):
            self._store(target + offset, ctypes.c_uint32.from_address(int(source) + offset).value, ctypes.c_uint32)

    def _atomics(self) -> ModuleType:
        module = ModuleType("atomics")
        kinds = {"u32": (ctypes.c_uint32, np.uint32), "u64": (ctypes.c_uint64, np.uint64), "i64": (ctypes.c_int64, np.int64)}
        for name, (kind, number) in kinds.items():
            load = lambda address, kind=kind, number=number: number(kind.from_address(int(address)).value)  # noqa: E731
            store = lambda address, value, kind=kind: self._store(address, value, kind)  # noqa: E731
            vars(module).update({f"load_{name}": load, f"load_acquire_{name}": load})
            vars(module).update({f"store_{name}": store, f"store_release_{name}": store})
        nothing = ("fence_acquire", "fence_release", "fence_program_order", "prefetch_bytes", "prefetch_near", "prefetch_write")
        vars(module).update({name: lambda *_: None for name in nothing}, copy_bytes=self._copy)
        return module


def _not_compiled() -> ModuleType:
    module = ModuleType("compile")
    vars(module).update(kernel=lambda *_: lambda function: function, inline_kernel=lambda function: function, Int=Any)
    return module


@pytest.fixture(scope="module")
def interpreter() -> Interpreter:
    genuine = {name: module for name, module in sys.modules.items() if name.startswith("ekko.store.kernels.")}
    made = Interpreter()
    sys.modules.update(genuine)
    return made


def _deleted(model: ModelStore) -> None:
    put(model, [3], 0, 20)


def _removed(model: ModelStore) -> None:
    table = model._tables[table_id("item")]
    table.remove(table.resolve(np.array([5, 2, 11], np.uint64)))


def _removed_and_reused(model: ModelStore) -> None:
    _removed(model)
    put(model, [30, 31, 5, 32, 33], 4, 21)


ACTIONS = [_deleted, _removed, _removed_and_reused]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
@pytest.mark.parametrize("rows_before", [12, 9], ids=["index-in-use", "next-index-begun"])
def test_a_kill_at_any_store_is_repaired(
    interpreter: Interpreter, action: Callable[[ModelStore], None], rows_before: int
) -> None:
    assert _kill_everywhere(interpreter, action, rows_before) > 15


def _kill_everywhere(interpreter: Interpreter, action: Callable[[ModelStore], None], rows_before: int) -> int:
    """Kill after every number of stores; returns how many there are."""
    stores = 0
    while True:
        with patch.multiple(table_module, **SMALL):
            store = Store.anonymous()
            model = store.add_model(SPEC, rows_before)
            put(model, list(range(rows_before + 3)), rows_before, 7)
            _remove_one(model, 4)
            before = _versions(model)
            killed = False
            with interpreter.writing(stores):
                try:
                    action(model)
                except KilledError:
                    killed = True
            resumed = store.reopened().models["ctr"]
            held = _versions(resumed)
            check(resumed, held)
            _check_versions(before, held, action)
            # And it goes on: whatever is free is taken again.
            put(resumed, list(range(40, 52)), 12, 50)
            check(resumed, held | dict.fromkeys(range(40, 52), (50, True)))
        if not killed:
            return stores
        stores += 1


def _remove_one(model: ModelStore, key: int) -> None:
    table = model._tables[table_id("item")]
    assert table.remove(table.resolve(np.array([key], np.uint64))) == 1


def _versions(model: ModelStore) -> dict[int, tuple[int, bool]]:
    """key -> (stamp, is it live), by a look at every row."""
    table = model._tables[table_id("item")]
    columns = model.read(table.spec.id, table.scan(np.zeros(4 * WRITERS_MAX, np.uint64), 4))
    assert columns.stamps is not None
    return {
        int(key): (int(stamp), at < len(columns.rows))
        for at, (key, stamp) in enumerate(zip(columns.keys, columns.stamps, strict=True))
    }


def _check_versions(before: dict[int, Any], after: dict[int, Any], action: Callable[[ModelStore], None]) -> None:
    """Each row is as it was, or as it was to become."""
    gone = set() if action is _deleted else {5, 2, 11}
    born = {30: (21, True), 31: (21, True), 5: (21, True), 32: (21, True), 33: (21, False)}
    changed = {3: (20, False)} if action is _deleted else born if action is _removed_and_reused else {}
    for key, version in after.items():
        assert version in (before.get(key), changed.get(key)), f"key {key}"
    assert set(before) - set(after) <= gone


# --- planted bugs -------------------------------------------------------------------------------------------------------------


def _without_mend(patched: pytest.MonkeyPatch, _: Interpreter) -> None:
    patched.setattr(rows, "mend", lambda *_: None)


def _without_undo(patched: pytest.MonkeyPatch, _: Interpreter) -> None:
    patched.setattr(rows, "undo", lambda *_: -1)


def _counted_never(patched: pytest.MonkeyPatch, _: Interpreter) -> None:
    genuine = rows.survey

    def survey(address: int, *rest: object) -> int:
        header = np.ctypeslib.as_array((ctypes.c_int64 * 2).from_address(address + layout.TABLE.offset("tombstones")))
        before = header.copy()
        spare = genuine(address, *rest)
        header[:] = before
        return int(spare)

    patched.setattr(rows, "survey", survey)


def _undo_saved_late(_: pytest.MonkeyPatch, interpreter: Interpreter) -> None:
    interpreter.rows._save_undo = lambda *_: None


@pytest.mark.parametrize(
    "plant", [_without_mend, _without_undo, _counted_never, _undo_saved_late], ids=lambda plant: plant.__name__.strip("_")
)
def test_a_planted_bug_in_the_repair_is_noticed(plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = {name: module for name, module in sys.modules.items() if name.startswith("ekko.store.kernels.")}
    interpreter = Interpreter()
    sys.modules.update(genuine)
    plant(monkeypatch, interpreter)
    with pytest.raises((AssertionError, StoreError)):
        _kill_everywhere(interpreter, _removed_and_reused, 12)


def _walk_until(seeds: int) -> None:
    for seed in range(seeds):
        walk(seed)


def _next_index_forgets_removals(patched: pytest.MonkeyPatch) -> None:
    genuine = rows.remove
    patched.setattr(rows, "remove", lambda *args: genuine(*args[:5], 0, 0, *args[7:]))


def _next_index_misses_reuses(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Table, "_enter", lambda *_: None)


def _epochs_stay(patched: pytest.MonkeyPatch) -> None:
    genuine = Table.places

    def places(self: Table, slots: np.ndarray) -> np.ndarray:
        return genuine(self, slots) & 0xFFFF_FFFF if (slots >= 0).all() else genuine(self, slots)

    patched.setattr(Table, "places", places)


@pytest.mark.parametrize(
    "plant",
    [_next_index_forgets_removals, _next_index_misses_reuses, _epochs_stay],
    ids=lambda plant: plant.__name__.strip("_"),
)
def test_a_planted_bug_in_the_bookkeeping_is_noticed(plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with patch.multiple(table_module, **SMALL), pytest.raises(AssertionError):
        _walk_until(20)
