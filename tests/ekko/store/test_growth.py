"""Rows and index grow while another process reads."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from store_writer import BATCH, MODEL, PACE, STAMP_MASK, TABLE

from ekko.model import ModelSpec, TableSpec, table_id
from ekko.serve.reader import Reader
from ekko.store import Store, layout, patience
from ekko.store import table as table_module
from ekko.store.kernels.index import _MULTIPLIER_1, _MULTIPLIER_2
from ekko.store.table import INDEX_LOAD_MAX, index_log2_for
from p2p.replica import RowColumns

COUNT = 300_000
DIM = 64
DEADLINE_S = 120


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


class Inserting:
    """A process that inserts keys from 0 on, and is never far ahead of whoever looks on, however slow that one is."""

    def __init__(self, run_dir: Path) -> None:
        script = str(Path(__file__).with_name("store_writer.py"))
        command = [sys.executable, script, "paced", str(run_dir), str(DIM), str(COUNT)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE)
        self._may_insert = 0

    def go_on(self, rows_used: int) -> bool:
        """Let it insert some rows beyond these; whether there are more to come."""
        assert self.process.stdin is not None
        while self._may_insert < min(rows_used + 2 * PACE * BATCH, COUNT):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
            self._may_insert += PACE * BATCH
        return rows_used < COUNT

    def end(self) -> None:
        """Wait until it has inserted all."""
        assert self.process.wait(DEADLINE_S) == 0


@contextmanager
def inserting(run_dir: Path) -> Iterator[Inserting]:
    writer = Inserting(run_dir)
    with writer.process:
        try:
            yield writer
        finally:
            writer.process.kill()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that does not run for a second or two, on a busy machine, is not dead."""
    monkeypatch.setattr(patience, "ROW_DEADLINE_S", DEADLINE_S)


@pytest.mark.processes
def test_what_was_inserted_is_found_at_every_size(run_dir: Path) -> None:
    rng = np.random.default_rng(11)
    checks, generations = 0, set[int]()
    with inserting(run_dir) as writer, Reader(MODEL, run_dir, wait=DEADLINE_S) as reader:
        view = reader._table(TABLE)
        deadline = time.monotonic() + DEADLINE_S
        while writer.go_on(view.rows_used):
            assert time.monotonic() < deadline
            complete = view.rows_used // BATCH * BATCH  # of a batch that is being written, the last row may not be indexed
            if complete == 0:
                continue
            # Some rows of all ages, the newest, and those that are just being inserted.
            keys = np.concatenate([rng.integers(0, complete, 100), np.arange(max(0, complete - 100), complete + 4 * BATCH)])
            rows, stamps = reader.lookup(TABLE, keys, stamps=True)
            found = stamps != 0
            assert found[keys < complete].all(), f"keys {keys[~found]} of {complete} are not found"
            values = (stamps & np.uint64(STAMP_MASK)).astype(np.float32)
            assert np.array_equal(rows, np.repeat(values[:, None], DIM, axis=1)), "a row was seen before it was whole"
            assert not reader.lookup(TABLE, np.arange(COUNT, COUNT + 64)).any()
            checks += 1
            generations.add(view.newest_index().generation)
        writer.end()
        assert reader.lookup(TABLE, np.arange(COUNT), stamps=True)[1].all()
    assert checks > COUNT / (4 * PACE * BATCH)
    assert len(generations) > 3, "the index was replaced under the reader"
    store = Store.open(run_dir)
    assert store.resumed
    assert store.models[MODEL].table_stats()[TABLE].rows == COUNT
    assert store.models[MODEL].lookup(TABLE, np.arange(COUNT, dtype=np.uint64))[1].all()
    store.close()


@pytest.mark.processes
def test_a_key_that_is_absent_stays_so_while_its_place_is_taken(run_dir: Path) -> None:
    """A look-up that ends at an empty entry must not look again: the writer may have put another key there meanwhile."""
    absent = _neighbour_in_every_index(np.arange(COUNT, dtype=np.uint64))
    assert (absent >= COUNT).all()
    with inserting(run_dir) as writer, Reader(MODEL, run_dir, wait=DEADLINE_S) as reader:
        view = reader._table(TABLE)
        deadline = time.monotonic() + DEADLINE_S
        while writer.go_on(view.rows_used):
            assert time.monotonic() < deadline
            begin = view.rows_used
            assert not reader.lookup(TABLE, absent[begin : begin + 4 * BATCH], stamps=True)[1].any()
        writer.end()


def _neighbour_in_every_index(keys: np.ndarray) -> np.ndarray:
    """For each key another one whose search begins at the same entry, in an index of any size."""
    hashes = _mix64(keys) ^ np.uint64(1)  # the entry follows from the highest bits
    for multiplier in (_MULTIPLIER_2, _MULTIPLIER_1):
        hashes ^= hashes >> np.uint64(33)
        hashes *= np.uint64(pow(int(multiplier), -1, 1 << 64))
    return hashes ^ hashes >> np.uint64(33)


def _mix64(keys: np.ndarray) -> np.ndarray:
    hashes = keys ^ keys >> np.uint64(33)
    for multiplier in (_MULTIPLIER_1, _MULTIPLIER_2):
        hashes *= multiplier
        hashes ^= hashes >> np.uint64(33)
    return hashes


def test_the_larger_index_is_ready_before_the_load_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one size never have to finish a larger index in one call: the steps are enough."""
    model = Store.anonymous().add_model(ModelSpec(MODEL, 8, {TABLE: TableSpec(TABLE, 1)}))
    table = model._tables[table_id(TABLE)]
    monkeypatch.setattr(table_module, "GROWTH_ROWS_MIN", 0)
    monkeypatch.setattr(table_module, "GROWTH_BYTES_MIN", 0)
    forced = 0
    make_room = table._make_room

    def counted() -> None:
        nonlocal forced
        forced += table.rows_used >= table.index.rows_max
        make_room()

    monkeypatch.setattr(table, "_make_room", counted)
    for begin in range(0, 400_000, 1_000):
        keys = np.arange(begin, begin + 1_000, dtype=np.uint64)
        before = table.index.generation
        model.apply([RowColumns(table_id(TABLE), keys, np.ones((1_000, 4), np.uint8))], 5)
        assert table.rows_used <= INDEX_LOAD_MAX * (1 << table.index.capacity_log2) + 1
        if begin < 40_000:  # for a small index, such batches are too coarse, and growing it at once costs little
            forced = 0
        assert table.index.generation - before <= 1 or begin < 40_000
    assert forced == 0


def test_a_batch_larger_than_everything_before_it_fits() -> None:
    model = Store.anonymous().add_model(ModelSpec(MODEL, 8, {TABLE: TableSpec(TABLE, 1)}))
    keys = np.random.default_rng(1).permutation(200_000).astype(np.uint64)
    rows = keys.astype(np.float32)[:, None].view(np.uint8)
    assert model.apply([RowColumns(table_id(TABLE), keys, rows)], 5).inserted == keys.size
    assert np.array_equal(model.lookup(TABLE, keys)[0][:, 0], keys.astype(np.float32))


@pytest.mark.parametrize("rows", [0, 1, 100, 1_000_000])
def test_the_first_index_takes_the_first_guess(rows: int) -> None:
    assert rows <= INDEX_LOAD_MAX * (1 << index_log2_for(rows))
    model = Store.anonymous().add_model(ModelSpec(MODEL, 8, {TABLE: TableSpec(TABLE, 1)}), rows)
    assert model._tables[table_id(TABLE)].index.capacity_log2 == index_log2_for(rows)


def test_half_built_indexes_of_a_killed_writer_are_removed(run_dir: Path) -> None:
    store = Store.open(run_dir)
    model = store.add_model(ModelSpec(MODEL, 8, {TABLE: TableSpec(TABLE, 1)}))
    for begin in range(0, 160, 10):  # just above the load at which a larger index is begun
        keys = np.arange(begin, begin + 10, dtype=np.uint64)
        model.apply([RowColumns(table_id(TABLE), keys, np.ones((10, 4), np.uint8))], 5)
    assert model._tables[table_id(TABLE)]._next is not None
    store.close()
    store = Store.open(run_dir)
    assert store.resumed
    model = store.models[MODEL]
    generation = model._tables[table_id(TABLE)].index.generation
    prefix = model._memory.prefix  # type: ignore[attr-defined]
    names = [path.name for path in Path("/dev/shm").glob(f"{prefix}-*-index-*")]
    assert names == [f"{prefix}-{model.keyspace:08x}-{table_id(TABLE):08x}-index-{generation}"]
    keys = np.arange(100_000, dtype=np.uint64)
    model.apply([RowColumns(table_id(TABLE), keys, np.ones((keys.size, 4), np.uint8))], 6)
    assert (model.lookup(TABLE, keys)[1] == 6).all()
    assert layout.index_bytes(8) < model.table_stats()[TABLE].bytes
    store.close()
