"""Theorem T5: vector, rows, floor, in this order; each other order is planted here, and noticed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ekko.model import TableSpec, table_id
from ekko.snapshots.format import SnapshotManifest
from ekko.store import layout
from ekko.store.images import FloorImage, KnowledgeImage, ModelImage
from p2p.stamps import WRITERS_MAX
from tests.ekko.snapshots.test_snapshots import SHARDS, WRITER, Home, contents

Patch = pytest.MonkeyPatch


class Collecting(Home):
    """A node whose tombstones can be collected (R5), and what was ever written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.deleted: set[int] = set()
        self.history: dict[int, int] = {}  # key -> its newest stamp
        header = self.model._header
        header.ensure(len(header))
        self.floor = header.words(layout.loss_floor_offset(SHARDS), WRITERS_MAX, SHARDS)

    def write(self, keys: list[int], value: float | None, table: str = "item") -> int:
        stamp = super().write(keys, value, table)
        self.history |= dict.fromkeys(keys, stamp)
        return stamp

    def collect(self, key: int) -> None:
        """Let go of a tombstone: its stamp goes into the floor, then its slot is free."""
        table = self.model.table(table_id("item"))
        array = np.array([key], np.uint64)
        slot, shard = int(table.resolve(array)[0]), int(self.model.shards_of(array)[0])
        row = table.mapping.words(layout.TABLE.offset("rows") + slot * table.stride, table.stride // 8)
        assert int(row[0]) >> 32 & layout.FLAG_TOMBSTONE
        self.model._header.words(layout.MODEL.offset("floor_used"))[...] = 1
        self.floor[WRITER, shard] = max(self.floor[WRITER, shard], row[1])
        row[0] = np.uint64(int(row[0]) | layout.FLAG_FREE << 32)

    def wrongs(self) -> list[int]:
        """Keys of which the restored node says that it knows, and does not (invariant 3)."""
        held = contents(self.model)
        header = self.model._header
        floor = header.words(layout.loss_floor_offset(SHARDS), WRITERS_MAX, SHARDS)
        wrong = []
        for key, stamp in self.history.items():
            shard = int(self.model.shards_of(np.array([key], np.uint64))[0])
            if int(self.model.vector[shard, WRITER]) < stamp:
                continue  # it will be pulled
            if held.get(("item", key), (0, None))[0] < stamp and int(floor[WRITER, shard]) < stamp:
                wrong.append(key)
            if key in self.deleted and held.get(("item", key), (0, None))[1] is not None:
                wrong.append(key)
        return wrong


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Collecting]:
    home = Collecting(tmp_path)
    yield home
    home.store.destroy()


def while_rows_are_read(patch: Patch, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Have things happen before the first row is read, and after the last."""
    rows = ModelImage.rows

    def patched(self: ModelImage, spec: TableSpec, *arguments: Any) -> Iterator[Any]:
        if spec.name == "item":
            before()
        yield from rows(self, spec, *arguments)
        if spec.name == "item":
            after()

    patch.setattr(ModelImage, "rows", patched)


def vector_last(patch: Patch) -> None:
    """The vector is read when the rows are written: as a view that lives on."""

    def live(self: ModelImage) -> KnowledgeImage:
        words = self._header.words
        return KnowledgeImage(
            words(layout.MODEL.offset("vector"), WRITERS_MAX, SHARDS), words(layout.frontiers_offset(SHARDS, 1), 1, WRITERS_MAX)
        )

    patch.setattr(ModelImage, "knowledge", live)


def floor_first(patch: Patch) -> None:
    early: list[FloorImage] = []
    floors, knowledge = ModelImage.floors, ModelImage.knowledge

    def known(self: ModelImage) -> KnowledgeImage:
        early.append(floors(self))
        return knowledge(self)

    patch.setattr(ModelImage, "knowledge", known)
    patch.setattr(ModelImage, "floors", lambda _self: early[0])


def no_floor(patch: Patch) -> None:
    zero = FloorImage(np.zeros((WRITERS_MAX, SHARDS), np.uint64), np.zeros(8192, np.uint8))
    patch.setattr(ModelImage, "floors", lambda _self: zero)


def as_it_is(patch: Patch) -> None:
    pass


def busy_snapshot(home: Collecting, patch: Patch, parent: SnapshotManifest | None = None) -> None:
    """Tombstones are collected while the snapshot is read, and rows written behind it."""
    home.write(list(range(50)), 1.0)
    home.write([1, 2, 3], None)
    while_rows_are_read(patch, lambda: [home.collect(key) for key in (1, 2)], lambda: home.write([7, 100], 2.0))
    home.snapshot(parent)
    home.restore()


@pytest.mark.parametrize(
    ("plant", "found"), [(as_it_is, []), (vector_last, [7, 100]), (floor_first, [1, 2]), (no_floor, [1, 2])]
)
def test_order(home: Collecting, monkeypatch: Patch, plant: Callable[[Patch], None], found: list[int]) -> None:
    plant(monkeypatch)
    busy_snapshot(home, monkeypatch)
    assert sorted(set(home.wrongs())) == found


def nothing_is_whole(patch: Patch) -> None:
    patch.setattr("ekko.snapshots.write._whole", lambda *_: np.zeros(SHARDS, np.bool_))


def nothing_is_held_back(patch: Patch) -> None:
    patch.setattr("ekko.snapshots.write._held_back", lambda _model, _base, knowledge, *_: knowledge)


def both(patch: Patch) -> None:
    nothing_is_whole(patch)
    nothing_is_held_back(patch)


@pytest.mark.parametrize(
    ("early", "plant", "found"),
    [
        (True, as_it_is, []),
        (False, as_it_is, []),
        (True, nothing_is_whole, []),  # then nothing of those shards is claimed: right, and slow to catch up
        (True, both, [1, 2]),
        (False, nothing_is_held_back, [1, 2]),
    ],
)
def test_what_was_dropped_since_its_parent_stays_away(
    home: Collecting, monkeypatch: Patch, early: bool, plant: Callable[[Patch], None], found: list[int]
) -> None:
    """`early`: it was collected before the increment was begun, not while it was read."""
    home.write(list(range(50)), 1.0)
    parent = home.snapshot()
    home.write([1, 2, 3], None)
    home.deleted = {1, 2, 3}

    def collect() -> None:
        for key in (1, 2):
            home.collect(key)

    if early:
        collect()
    else:
        while_rows_are_read(monkeypatch, collect, lambda: None)
    plant(monkeypatch)
    newest = home.snapshot(parent)
    assert home.restore().snapshot == newest.name
    assert sorted(set(home.wrongs())) == found


def test_after_a_snapshot_that_held_back_the_next_has_the_whole(home: Collecting, monkeypatch: Patch) -> None:
    home.write(list(range(50)), 1.0)
    first = home.snapshot()
    home.write([1, 2], None)
    home.deleted = {1, 2}
    with monkeypatch.context() as patch:
        while_rows_are_read(patch, lambda: [home.collect(key) for key in (1, 2)], lambda: None)  # type: ignore[func-returns-value]
        second = home.snapshot(first)
    third = home.snapshot(second)
    assert third.models[0].whole
    expected = contents(home.model)
    home.restore()
    assert contents(home.model) == expected
    assert not home.wrongs()
