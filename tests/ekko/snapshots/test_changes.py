"""A store whose models, tables and aliases change while a snapshot is read, or between two of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ekko.codec import encode
from ekko.file_ledger import FileLedger
from ekko.generations import Alias, Generation
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.snapshots.catalog import Catalog
from ekko.snapshots.take import Plan, take
from ekko.snapshots.write import SnapshotWriter
from ekko.store import layout
from ekko.store.images import ModelImage, StoreImage
from ekko.store.manifest import header_name
from p2p.identity.ledger import NodeRecord
from p2p.replica import RowColumns
from tests.ekko.snapshots.test_snapshots import MODEL, WRITER, Home, contents

Patch = pytest.MonkeyPatch


def once_before(patch: Patch, of: type, method: str, happen: Callable[[], None]) -> None:
    """Have something happen before the first call of a method."""
    called, waiting = getattr(of, method), [happen]

    def patched(self: Any, *arguments: Any) -> Any:
        if waiting:
            waiting.pop()()
        return called(self, *arguments)

    patch.setattr(of, method, patched)


def test_a_table_that_comes_before_the_vector_is_read_is_there_as_a_whole(home: Home, monkeypatch: Patch) -> None:
    """The vector covers its rows, so they must be in the snapshot: which tables there are is looked up after it."""
    home.write([1], 1.0)

    def grow() -> None:
        home.spec.tables["late"] = TableSpec("late", DIM)
        home.store.add_model(home.spec)
        home.write([2, 3], 2.0, "late")

    once_before(monkeypatch, ModelImage, "knowledge", grow)
    home.snapshot()
    expected, vector = contents(home.model), home.model.vector.copy()
    assert home.restore().snapshot is not None
    assert contents(home.model) == expected
    assert np.array_equal(home.model.vector, vector)


DIM = 4


def test_a_table_that_came_since_its_parent_is_in_an_increment(home: Home) -> None:
    home.write([1], 1.0)
    first = home.snapshot()
    home.spec.tables["late"] = TableSpec("late", DIM)
    home.store.add_model(home.spec)
    home.write([2], 2.0, "late")
    home.snapshot(first)
    expected = contents(home.model)
    home.restore()
    assert contents(home.model) == expected


def test_an_increment_stands_on_no_former_model_of_the_name(home: Home) -> None:
    """Its vector would leave out rows of the new one; it may even have other shards."""
    home.write(list(range(50)), 1.0)
    first = home.snapshot()
    home.store.drop_model(MODEL, 1)
    spec = ModelSpec(MODEL, 2, {"item": TableSpec("item", DIM)}, incarnation=1)
    model = home.store.add_model(spec)
    keys, stamp = np.arange(10, dtype=np.uint64), 1 << 12 | WRITER  # a clock behind the one of before
    model.apply([RowColumns(table_id("item"), keys, encode("float32", np.ones((10, DIM), np.float32)))], stamp)
    model.vector[:, WRITER] = model.frontier[WRITER] = stamp
    expected = contents(model)
    home.snapshot(first)
    assert home.restore().snapshot is not None
    assert home.model.spec.incarnation == 1
    assert contents(home.model) == expected


@pytest.mark.parametrize("method", ["knowledge", "rows", "floors"])
def test_a_model_that_is_dropped_while_it_is_read_is_left_out(home: Home, monkeypatch: Patch, method: str) -> None:
    other = home.store.add_model(ModelSpec("other", 2, {"item": TableSpec("item", DIM)}))
    home.write([1], 1.0)
    first = home.snapshot()
    once_before(monkeypatch, ModelImage, method, lambda: home.store.drop_model(MODEL, 1) and None)
    newest = take(home.run_dir, home.folder, "a", Plan())
    assert newest.parent == first.name, "nothing had to be read again"
    restored = home.restore()
    assert list(restored.store.models) == [other.spec.name]
    assert restored.store.registers.is_dropped(Generation(MODEL, 0)), "also where no manifest is left to say so"


def test_aliases_come_with_a_snapshot(home: Home) -> None:
    """Nobody else may be there to tell: a region is seeded without the trainer."""
    alias = Alias("now", Generation(MODEL, 0), None, 5, 3, 7)
    home.store.set_alias(alias)
    home.snapshot()
    home.store.destroy()
    (home.run_dir / "manifest.json").unlink(missing_ok=True)
    assert home.restore().store.registers.aliases == {"now": alias}
    newer = Alias("now", None, Generation(MODEL, 0), 9, 4, 7)
    home.store.set_alias(newer)
    lost = home.run_dir / "manifest.json"
    kept = lost.read_text()
    home.store.destroy()
    lost.write_text(kept)  # a machine that lost its memory
    assert home.restore().store.registers.aliases == {"now": newer}, "an old snapshot does not switch back"


def test_a_store_that_is_replaced_meanwhile_is_read_again(home: Home, monkeypatch: Patch) -> None:
    home.write([1], 1.0)
    first = home.snapshot()

    def replace() -> None:
        home.restore()
        home.write([5], 5.0)

    once_before(monkeypatch, ModelImage, "rows", replace)
    newest = take(home.run_dir, home.folder, "a", Plan())
    assert newest.parent is None
    assert Catalog(home.folder).names() == [first.name, newest.name], "what failed left nothing"
    expected = contents(home.model)
    home.restore()
    assert contents(home.model) == expected


def test_slots_that_change_hands_while_they_are_read(home: Home, monkeypatch: Patch) -> None:
    """A key that moves to a slot that was looked at already, and one that moves behind it."""
    home.write([1, 2, 3, 4], 1.0)
    home.write([1, 4], None)
    table = home.model.table(table_id("item"))

    def collect(key: int) -> None:
        home.model.remove(table.spec.id, table.resolve(np.array([key], np.uint64)), complete=True)

    copied = ModelImage.rows

    def rows(self: ModelImage, spec: TableSpec, buffer: np.ndarray, *rest: Any) -> Iterator[Any]:
        stride = layout.row_stride(spec.row_bytes)
        for number, chunk in enumerate(copied(self, spec, buffer[: 2 * stride], *rest)):
            yield chunk
            if spec.name == "item" and not number:  # slots 0 and 1 were looked at
                collect(1)
                home.write([7], 7.0)  # takes slot 0, which is behind
                collect(4)
                home.write([1], 8.0)  # takes slot 3, which is ahead

    monkeypatch.setattr(ModelImage, "rows", rows)
    home.snapshot()
    newest = contents(home.model)
    home.restore()
    held = contents(home.model)
    vector, floor = home.model.vector, home.model.loss_floor
    for (name, key), version in newest.items():
        shard = int(home.model.shards_of(np.array([key], np.uint64))[0])
        if int(vector[shard, WRITER]) >= version[0]:
            assert held[name, key] == version
    assert ("item", 7) not in held
    assert held["item", 1] == newest["item", 1]
    for key in (1, 4):
        shard = int(home.model.shards_of(np.array([key], np.uint64))[0])
        assert int(floor[shard, WRITER]) >= 2 << 12 | WRITER


def test_writers_of_strays_are_remembered_too(home: Home) -> None:
    """A row above the vector: its writer's id may be used again before anybody claims for it (R12)."""
    record = NodeRecord.load(FileLedger(home.run_dir))
    record.bindings[home.spec.id, 9] = 77
    record.save()
    home.model.apply([RowColumns(table_id("item"), np.array([1], np.uint64), np.zeros((1, 16), np.uint8))], 5 << 12 | 9)
    home.snapshot()
    (home.run_dir / "ledger").unlink()
    home.restore()
    assert NodeRecord.load(FileLedger(home.run_dir)).bindings == {(home.spec.id, 9): 77}


def test_reading_a_store_makes_no_memory_of_it(home: Home) -> None:
    """Pages of a floor that was never used would be made by looking at them; in a full tmpfs that is SIGBUS."""
    home.write([1], 1.0)
    manifest = StoreImage(home.run_dir).manifest
    header = Path(manifest.memory_dir) / f"{manifest.prefix}-{header_name(home.spec.id)}"
    before = header.stat().st_blocks
    home.snapshot(home.snapshot())
    assert header.stat().st_blocks == before


def test_a_writer_that_failed_leaves_nothing(home: Home, monkeypatch: Patch) -> None:
    home.write([1], 1.0)
    monkeypatch.setattr(SnapshotWriter, "_put_data", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        home.snapshot()
    assert not Catalog(home.folder)._all()
