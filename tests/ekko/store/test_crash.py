"""Writers that are killed in the middle of a row, and what the next process makes of it."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from store_writer import MODEL, STAMP_MASK, TABLE, WRITER, value_of

from ekko.errors import StoreError
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.serve.reader import Reader
from ekko.store import Store, layout, patience, view
from ekko.store.manifest import header_name, index_name, read_manifest, rows_name
from ekko.store.memory import Mapping, TmpfsMemory
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns
from p2p.stamps import WRITERS_MAX

DEADLINE_S = 60


@contextmanager
def writer(mode: str, run_dir: Path, dim: int, count: int, *codec: str) -> Iterator["subprocess.Popen[str]"]:
    script = str(Path(__file__).with_name("store_writer.py"))
    command = [sys.executable, script, mode, str(run_dir), str(dim), str(count), *codec]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that does not run for a second or two, on a busy machine, is not dead."""
    monkeypatch.setattr(patience, "ROW_DEADLINE_S", DEADLINE_S)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


def raw_rows(run_dir: Path) -> Mapping:
    """The rows file, mapped for writing behind everybody's back."""
    manifest = read_manifest(run_dir)
    assert manifest is not None
    memory = TmpfsMemory(Path(manifest.memory_dir), manifest.prefix)
    return memory.open(rows_name(ModelSpec(MODEL).id, table_id(TABLE)))


def locks(run_dir: Path, dim: int) -> np.ndarray:
    """uint32[rows]: the lock of every row, live."""
    mapping = raw_rows(run_dir)
    used = int(mapping.words(layout.TABLE.offset("rows_used")))
    stride = layout.row_stride(4 * dim)
    words = mapping.words(layout.TABLE.offset("rows"), used * stride // 8).reshape(used, stride // 8)
    return words.view(np.uint32)[:, 0]


def wait_for_batches(run_dir: Path, batches: int) -> None:
    """Return when the writer has begun this many more batches."""
    manifest = read_manifest(run_dir)
    assert manifest is not None
    header = TmpfsMemory(Path(manifest.memory_dir), manifest.prefix).open(header_name(ModelSpec(MODEL).id))
    words = header.view(layout.PAGE_BYTES)
    pending = layout.MODEL.offset("pending_stamp") // 8
    target = words[layout.MODEL.offset("stamp_max") // 8] + (batches << 12)
    deadline = time.monotonic() + DEADLINE_S
    while words[pending] < target:
        assert time.monotonic() < deadline


def stop_in_a_row(process: "subprocess.Popen[str]", live: np.ndarray) -> None:
    """Stop the writer where one of these locks, uint32[rows], is odd."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)  # it may have gone on for a moment
        assert os.WIFSTOPPED(status)
        if (live & 1).any():
            return
        assert time.monotonic() < deadline
        process.send_signal(signal.SIGCONT)


def everything(model: ModelStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    (selection,) = model.changed_since(np.zeros((model.shards, WRITERS_MAX), np.uint64))
    columns = model.read(selection.table, selection.slots)
    assert columns.stamps is not None
    return columns.keys, columns.rows.view(np.float32), columns.stamps


def assert_whole(model: ModelStore) -> np.ndarray:
    """Every row is of one version, found by its key, and covered by the vector. Returns the stamps, by key."""
    keys, rows, stamps = everything(model)
    assert np.array_equal(rows, np.repeat((stamps & np.uint64(STAMP_MASK)).astype(np.float32)[:, None], rows.shape[1], axis=1))
    found, at = model.lookup(TABLE, keys)
    assert np.array_equal(found, rows)
    assert np.array_equal(at, stamps)
    assert (stamps <= model.vector[model.shards_of(keys), WRITER]).all(), "what the dead writer wrote is claimed (R4)"
    assert model.stray_digest() == 0
    order = np.argsort(keys)
    assert np.array_equal(keys[order], np.arange(keys.size, dtype=np.uint64))
    return stamps[order]


@pytest.mark.processes
def test_a_killed_writer_leaves_no_torn_row(run_dir: Path) -> None:
    dim, count = 16_384, 48  # rows so long that a writer is often in one
    newest = np.zeros(count, np.uint64)
    for attempt in range(2):
        with writer("overwrite", run_dir, dim, count) as process:
            wait_for_batches(run_dir, attempt + 1)
            stop_in_a_row(process, locks(run_dir, dim))
            process.kill()
        assert (locks(run_dir, dim) & 1).sum() == 1
        store = Store.open(run_dir)
        assert store.resumed
        stamps = assert_whole(store.models[MODEL])
        assert (stamps >= newest).all()
        newest = stamps
        assert not (locks(run_dir, dim) & 1).any()
        store.close()


@pytest.mark.processes
def test_a_killed_inserter_leaves_every_counted_row_findable(run_dir: Path) -> None:
    for attempt in range(3):
        with writer("insert", run_dir, 8, 1 << 22) as process:
            wait_for_batches(run_dir, 50 * attempt + 1)
            process.kill()
        store = Store.open(run_dir)
        assert store.resumed
        assert_whole(store.models[MODEL])
        store.close()


# --- the same by hand, at every point of a row's writing ----------------------------------------------------------------


def store_with_rows(run_dir: Path, dim: int = 4) -> Store:
    store = Store.open(run_dir)
    model = store.add_model(ModelSpec(MODEL, 8, {TABLE: TableSpec(TABLE, dim)}))
    for stamp in (5, 6):  # the second overwrites, so that there is an undo record, of the last row
        rows = np.full((3, dim), stamp, np.float32)
        model.apply([RowColumns(table_id(TABLE), np.arange(3, dtype=np.uint64), rows.view(np.uint8))], stamp)
    return store


def last_row(run_dir: Path, dim: int = 4) -> np.ndarray:
    """uint32 words of the row of key 2."""
    stride = layout.row_stride(4 * dim)
    offset = layout.TABLE.offset("rows") + 2 * stride
    return raw_rows(run_dir).words(offset, stride // 8).view(np.uint32)


def test_a_half_written_row_is_taken_back_and_its_lock_moves_on(run_dir: Path) -> None:
    store_with_rows(run_dir).close()
    row = last_row(run_dir)
    before = int(row[0])
    assert before == 2
    row[0] += 1  # as after a kill behind the first words of a third version
    row[2] = 7
    row[6:8] = 0xDEAD

    store = Store.open(run_dir)
    assert store.resumed
    rows, stamps = store.models[MODEL].lookup(TABLE, np.arange(3, dtype=np.uint64))
    # The record holds the row as it was before the second version; of a third, which we only pretend, it knows nothing.
    assert stamps.tolist() == [6, 6, 5]
    assert rows[2].tolist() == [5.0] * 4
    assert int(last_row(run_dir)[0]) == before + 2, "a reader that began before the kill must not find its number again"
    store.close()


def test_a_finished_row_is_not_taken_back(run_dir: Path) -> None:
    store_with_rows(run_dir).close()
    store = Store.open(run_dir)
    _, stamps = store.models[MODEL].lookup(TABLE, np.arange(3, dtype=np.uint64))
    assert stamps.tolist() == [6, 6, 6]
    store.close()


def test_a_tombstone_taken_back_is_counted_back(run_dir: Path) -> None:
    store = store_with_rows(run_dir)
    empty = np.empty((0, 16), np.uint8)
    store.models[MODEL].apply([RowColumns(table_id(TABLE), np.array([2], np.uint64), empty)], 7)
    assert store.models[MODEL].table_stats()[TABLE].tombstones == 1
    store.close()
    last_row(run_dir)[0] += 1  # killed just before the last store of the row
    store = Store.open(run_dir)
    assert store.models[MODEL].table_stats()[TABLE].tombstones == 0
    rows, stamps = store.models[MODEL].lookup(TABLE, np.array([2], np.uint64))
    assert (rows[0].tolist(), stamps.tolist()) == ([6.0] * 4, [6])
    store.close()


def test_a_counted_row_that_no_index_knows_is_published(run_dir: Path) -> None:
    store_with_rows(run_dir).close()
    manifest = read_manifest(run_dir)
    assert manifest is not None
    memory = TmpfsMemory(Path(manifest.memory_dir), manifest.prefix)
    index = memory.open(index_name(ModelSpec(MODEL).id, table_id(TABLE), 1))
    entries = index.words(layout.INDEX.offset("entries"), 1 << 8)
    of_last = (entries > layout.ENTRY_REMOVED) & (entries & np.uint64(0xFFFF_FFFF) == 2)
    assert np.count_nonzero(of_last) == 1
    entries[of_last] = layout.ENTRY_EMPTY
    store = Store.open(run_dir)
    _, stamps = store.models[MODEL].lookup(TABLE, np.arange(3, dtype=np.uint64))
    assert stamps.tolist() == [6, 6, 6]
    store.close()


def test_a_reader_gives_up_on_a_row_whose_writer_is_dead(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with_rows(run_dir)
    monkeypatch.setattr(patience, "ROW_DEADLINE_S", 0.05)
    with Reader(MODEL, run_dir) as reader:
        row = last_row(run_dir)
        row[0] += 1
        assert reader.lookup(TABLE, [0, 1])[:, 0].tolist() == [6.0, 6.0], "other rows are not affected"
        with pytest.raises(StoreError, match=r"row 2 of table 'item' stays locked"):
            reader.lookup(TABLE, [0, 1, 2])
        store.close()
        store = Store.open(run_dir)  # the next daemon repairs it, in the same files
        assert reader.lookup(TABLE, [2], stamps=True)[1].tolist() == [5]
    store.close()


def test_who_stood_still_itself_does_not_take_a_writer_for_dead(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the whole machine was asleep for a while."""
    store = store_with_rows(run_dir)
    monkeypatch.setattr(patience, "ROW_DEADLINE_S", 0.05)
    row, looks = last_row(run_dir), [0]

    def asleep(seconds: float) -> None:
        looks[0] += 1
        if looks[0] == 2:
            time.sleep(0.2)
        if looks[0] == 3:
            row[0] += 1  # the writer wakes up, too, a moment later
        time.sleep(seconds)

    with Reader(MODEL, run_dir) as reader:
        monkeypatch.setattr(view, "time", SimpleNamespace(sleep=asleep))
        row[0] += 1
        assert reader.lookup(TABLE, [2])[0].tolist() == [6.0] * 4
    assert looks[0] == 3
    store.close()


def test_a_reader_waits_for_a_row_that_is_being_written(run_dir: Path) -> None:
    store = store_with_rows(run_dir)
    with Reader(MODEL, run_dir) as reader:
        row = last_row(run_dir)
        row[0] += 1
        found: list[float] = []
        thread = threading.Thread(target=lambda: found.extend(reader.lookup(TABLE, [2])[0].tolist()))
        thread.start()
        row[6:10] = np.full(4, 9, np.float32).view(np.uint32)
        row[0] += 1
        thread.join(DEADLINE_S)
    assert found == [9.0] * 4
    store.close()


def test_a_full_tmpfs_is_an_error_and_loses_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with_rows(run_dir)
    model = store.models[MODEL]

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    keys = np.arange(100_000, dtype=np.uint64)
    rows = np.full((keys.size, 4), 9, np.float32).view(np.uint8)
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError, match="shared memory is full"):
            model.apply([RowColumns(table_id(TABLE), keys, rows)], 9)
    found, stamps = model.lookup(TABLE, keys)
    assert 0 < np.count_nonzero(stamps) < keys.size
    assert np.array_equal(found[:, 0], np.where(stamps == 9, 9, 0))
    assert model.apply([RowColumns(table_id(TABLE), keys, rows)], 9).inserted == keys.size - np.count_nonzero(stamps)
    assert (model.lookup(TABLE, keys)[1] == 9).all(), "once there is room again, the same batch completes"
    store.close()


def test_a_model_that_found_no_room_can_be_added_later(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(run_dir)
    spec = ModelSpec(MODEL, 8, {TABLE: TableSpec(TABLE, 4)})
    allocate = os.posix_fallocate

    def full(descriptor: int, offset: int, length: int) -> None:
        if offset == 0 and length == layout.PAGE_BYTES:  # the header is there, the first page of the table is not
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, offset, length)

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError, match="shared memory is full"):
            store.add_model(spec)
    assert dict(store.models) == {}
    store.add_model(spec)
    with Reader(MODEL, run_dir) as reader:
        assert not reader.lookup(TABLE, [1]).any()
    store.close()


@pytest.mark.parametrize(
    ("codec", "lookups"),
    [
        ("float32", 20_000),
        ("float16", 8_000),
        pytest.param("bfloat16", 4_000, marks=pytest.mark.long),  # two bytes a value, as float16
        ("int8", 8_000),
    ],
)
def test_wide_rows_that_are_always_being_written_are_never_torn(run_dir: Path, codec: str, lookups: int) -> None:
    """Two rows of 8,192 values, overwritten without pause: a reader that does not look at the lock again takes torn ones."""
    dim = 8_192
    keys = np.arange(2, dtype=np.uint64)
    with writer("overwrite", run_dir, dim, 2, codec), Reader(MODEL, run_dir, wait=10.0) as reader:
        newest = np.zeros(2, np.uint64)
        out = np.empty((2, dim), np.float32)
        for _ in range(lookups):
            _, stamps = reader.lookup(TABLE, keys, stamps=True, out=out)
            written = value_of(stamps, codec)
            assert (out == written[:, None]).all(), "torn, or another version's stamp"
            assert (stamps >= newest).all(), "went back"
            newest = stamps
    assert newest.all()
