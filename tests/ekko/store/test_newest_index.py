"""Readers map the next index before it is in use, and let the old one go, outside of look-ups."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ekko.model import ModelSpec, TableSpec, table_id
from ekko.serve.reader import Reader
from ekko.store import Store, layout, slices, table
from ekko.store.manifest import prefix_of
from ekko.store.memory import Mapping
from ekko.store.model_store import ModelStore
from ekko.store.newest_index import NewestIndex
from p2p.replica import RowColumns

SPEC = ModelSpec("ctr", 8, {"item": TableSpec("item", 1)})
# An index of so many places is the largest that is not told ahead: the one after it is larger than THREAD_BYTES_MIN.
PLACES = slices.THREAD_BYTES_MIN // layout.ENTRY_BYTES // 2
BATCH = 2_000
DEADLINE_S = 60


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


@dataclass
class Growing:
    """A table whose keys are 0, 1, 2 and so on."""

    model: ModelStore
    rows: int = 0

    def insert(self) -> None:
        keys = np.arange(self.rows, self.rows + BATCH, dtype=np.uint64)
        self.model.apply([RowColumns(table_id("item"), keys, np.ones((BATCH, 4), np.uint8))], 5)
        self.rows += BATCH

    def insert_until(self, reached: Callable[[table.Table], bool]) -> None:
        while not reached(self.model._tables[table_id("item")]):
            self.insert()


def told(grown: table.Table) -> bool:
    return int(grown._word("index_ahead")) > grown.index.generation


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def newest(reader: Reader) -> NewestIndex:
    return reader._table("item").newest_index


def deleted_indexes(run_dir: Path) -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if prefix_of(run_dir) in line and "-index-" in line and line.endswith("(deleted)")]


def test_the_next_index_is_mapped_ahead_and_the_old_one_let_go(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "KEEP_S", 0.0)
    growing = Growing(Store.open(run_dir).add_model(SPEC))
    with Reader("ctr", run_dir) as reader:
        growing.insert_until(told)
        before = newest(reader)()
        reader.lookup("item", [1])
        wait_for(lambda: newest(reader)._ahead is not None)
        ahead = newest(reader)._ahead
        assert ahead is not None
        assert newest(reader)() is before, "it was used before it was complete"
        growing.insert_until(lambda grown: not told(grown))
        assert reader.lookup("item", np.arange(growing.rows), stamps=True)[1].all()
        assert newest(reader)() is ahead
        assert len(before.mapping) < slices.THREAD_BYTES_MIN <= len(ahead.mapping)
        # The next one again, whose predecessor is large, and is freed by a thread.
        del before, ahead
        growing.insert_until(told)
        growing.insert_until(lambda grown: not told(grown))
        reader.lookup("item", [1])
        assert reader.lookup("item", np.arange(growing.rows), stamps=True)[1].all()
        wait_for(lambda: not deleted_indexes(run_dir))


@pytest.mark.parametrize("planted", [False, True])
def test_an_index_that_a_killed_writer_began_is_not_taken_for_its_successor(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, planted: bool
) -> None:
    store = Store.open(run_dir)
    growing = Growing(store.add_model(SPEC))
    with Reader("ctr", run_dir) as reader:
        growing.insert_until(told)
        reader.lookup("item", [1])
        wait_for(lambda: newest(reader)._ahead is not None)
        store.close()  # what it filled is gone, as after a kill
        store = Store.open(run_dir)
        assert store.resumed
        growing.model = store.models["ctr"]
        assert not told(growing.model._tables[table_id("item")])
        ahead = newest(reader)._ahead
        assert ahead is not None
        growing.insert_until(told)
        growing.insert_until(lambda grown: not told(grown))
        if planted:
            monkeypatch.setattr(Mapping, "is_of", lambda *_: True)
        stamps = reader.lookup("item", np.arange(growing.rows), stamps=True)[1]
        assert (newest(reader)() is ahead) == planted
        assert stamps.all() != planted


def test_look_ups_do_without_threads(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(slices._thread, "start_new_thread", start)  # type: ignore[attr-defined]
    growing = Growing(Store.open(run_dir).add_model(SPEC))
    with Reader("ctr", run_dir) as reader:
        while growing.rows < PLACES * 3:
            growing.insert()
            assert reader.lookup("item", np.arange(0, growing.rows, 16), stamps=True)[1].all()
        assert newest(reader)._ahead is None


def test_pages_that_were_let_go_are_still_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    size = 3 * slices.SLICE_BYTES + layout.PAGE_BYTES
    path.write_bytes(np.arange(size // 8, dtype=np.uint64).tobytes())
    mapping = Mapping.open_to_read(path)
    words = mapping.words(0, size // 8)
    slices.populate(mapping)
    slices._advise(mapping, slices.mmap.MADV_DONTNEED)
    assert np.array_equal(words, np.arange(size // 8))


def test_small_files_start_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(slices, "in_background", started.append)
    slices.let_go(Mapping.anonymous(slices.THREAD_BYTES_MIN - layout.PAGE_BYTES), 0)
    assert not started
    slices.let_go(Mapping.anonymous(slices.THREAD_BYTES_MIN), 0)
    assert len(started) == 1
