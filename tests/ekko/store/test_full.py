"""Room is made before rows are written: what has none changes nothing."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ekko.errors import MemoryFullError
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.store import Store, layout
from ekko.store.model_store import ModelStore
from ekko.store.table import EXTENT_BYTES_MAX, Table
from p2p.errors import FullError
from p2p.replica import RowColumns
from tests.small_memory import SmallMemory, small_tmpfs

DIM = 16
SPEC = ModelSpec("ctr", 8, {"item": TableSpec("item", DIM), "user": TableSpec("user", DIM)})
STRIDE = layout.row_stride(4 * DIM)
TMPFS_BYTES = 8 << 20


def rows(keys: np.ndarray, value: float = 0.0, table: str = "item") -> RowColumns:
    data = np.full((len(keys), DIM), value, np.float32).view(np.uint8)
    return RowColumns(table_id(table), keys.astype(np.uint64), data)


def seen(model: ModelStore, count: int, table: str = "item") -> list[float]:
    return model.lookup(table, np.arange(count, dtype=np.uint64))[0][:, 0].tolist()


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A small tmpfs of its own."""
    with small_tmpfs(tmp_path / "memory", str(TMPFS_BYTES)) as folder:
        yield folder


@pytest.mark.parametrize("step", [1, 63, 1_000, 9_000])
def test_a_full_tmpfs_refuses_whole_steps_and_takes_the_rest(tmpfs: Path, tmp_path: Path, step: int) -> None:
    """Rows until nothing fits; each step is there whole, or not at all, and the store goes on."""
    store = Store.open(tmp_path / "node", memory_dir=tmpfs, table_bytes_max=64 << 20)
    model = store.add_model(SPEC)
    ballast = tmpfs / "ballast"
    if step == 1:  # a row each takes long: leave room for some
        ballast.write_bytes(bytes(TMPFS_BYTES - sum(path.stat().st_blocks * 512 for path in tmpfs.iterdir()) - (512 << 10)))
    keys = 0
    while True:
        columns = [rows(np.arange(keys, keys + step), keys + 1), rows(np.arange(keys, keys + step), table="user")]
        try:
            model.reserve(columns)
        except MemoryFullError:
            break
        model.apply(columns, keys + 1 << 12)
        keys += step
    assert keys
    with pytest.raises(MemoryFullError, match="enlarge the tmpfs"):
        model.reserve(columns)
    assert {name: stats.rows for name, stats in model.table_stats().items()} == {"item": keys, "user": keys}
    held = rows(np.arange(keys), -1.0)
    model.reserve([held])  # needs nothing
    model.apply([held], 1 << 40)
    assert seen(model, keys + 1) == [-1.0] * keys + [0.0]
    if step == 1:
        ballast.unlink()
        model.reserve(columns)
        model.apply(columns, 1 << 41)
        assert seen(model, keys + 1)[keys] == keys + 1
    reopened = Store.open(tmp_path / "node", memory_dir=tmpfs, table_bytes_max=64 << 20)
    assert reopened.resumed, "a full memory must not cost what is in it"
    assert seen(reopened.models["ctr"], 5) == [-1.0] * 5
    reopened.destroy()
    store.close()


def test_room_that_is_reserved_suffices() -> None:
    """Whatever was there before and however many come: once room is made, nothing more is asked for that could be refused."""
    rng = np.random.default_rng(5)
    memory = SmallMemory()
    model = memory.store().add_model(SPEC)
    stamp, free = 1, memory.limit
    for turn in range(150):
        keys = np.unique(rng.integers(0, 200 << min(turn // 10, 9), rng.integers(1, 2_000 if turn % 7 else 40_000)))
        memory.limit = free
        model.reserve([rows(keys)])
        memory.fill()
        stamp += 1 << 12
        model.apply([rows(keys, turn)], stamp)
        if turn % 5 == 4:
            memory.limit = free
            gone = np.flatnonzero(rng.random(model.table(table_id("item")).rows_used) < 0.5)
            model.table(table_id("item")).remove(model.table(table_id("item")).places(gone))


def test_parts_of_a_step_for_one_table_are_counted_together() -> None:
    memory = SmallMemory()
    model = memory.store().add_model(SPEC)
    memory.limit = memory.taken + (64 << 10) + 600 * STRIDE
    parts = [rows(np.arange(begin, begin + 500)) for begin in (0, 500, 1_000)]
    for part in parts:
        model.reserve([part])
    with pytest.raises(FullError):
        model.reserve(parts)
    assert model.table(table_id("item")).rows_used == 0


def test_a_refused_step_gives_back_the_index_that_it_began() -> None:
    memory = SmallMemory()
    model = memory.store().add_model(SPEC)
    before = memory.taken
    memory.limit = before + (8 << 20)
    with pytest.raises(FullError):
        model.reserve([rows(np.arange(1_000_000))])
    assert memory.taken == before
    model.reserve([rows(np.arange(1_000))])


def test_steps_of_a_table_that_does_not_grow_look_no_keys_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fewer pages are left than a step has keys, they are asked for once; without memory for them keys are looked up."""
    memory = SmallMemory()
    model = memory.store().add_model(SPEC)
    table = model.tables_by_id[table_id("item")]
    keys = 0

    def grow() -> int:
        """Rows until fewer pages are left than a step has keys."""
        done = keys
        while done < keys + 1_000 or table._rows_max - done > 100:
            step = rows(np.arange(done, done + 100))
            model.reserve([step])
            model.apply([step], done + 1 << 12)
            done += 100
        return done

    keys = grow()
    looked_up: list[int] = []
    slots_of = Table._slots_of
    monkeypatch.setattr(Table, "_slots_of", lambda self, asked: (looked_up.append(asked.size), slots_of(self, asked))[1])
    memory.fill()
    refused = []
    for _ in range(3):
        model.reserve([rows(np.arange(500))])  # needs nothing
        refused.append(memory.asked)
    assert looked_up == [500] * 3
    assert refused[0] == refused[2], "what had no room is not asked for again"
    memory.limit = 1 << 40
    keys = grow()
    looked_up.clear()
    ensured = table.mapping.ensured
    for _ in range(3):
        model.reserve([rows(np.arange(500))])
    assert not looked_up
    assert 0 < table.mapping.ensured - ensured <= EXTENT_BYTES_MAX
