"""One reader in many processes: forked with locks held, spawned out of a pickle, closed, and of another user."""

import multiprocessing
import os
import pickle
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ekko.errors import ModelError
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.serve.reader import Reader
from ekko.store import Store
from ekko.store.access import Access
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns

SPEC = ModelSpec("ctr", 8, {"item": TableSpec("item", 3)})
NOBODY = 65_534
OTHER_GROUP = 54_321


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


def put(model: ModelStore, keys: range, stamp: int) -> None:
    rows = np.full((len(keys), 3), stamp, np.float32)
    model.apply([RowColumns(table_id("item"), np.array(keys, np.uint64), rows.view(np.uint8))], stamp)


def in_fork(work: Callable[[], None]) -> int:
    """Exit code of a child that does the work: 0, or 1 when it raised. Killed after a minute by its own alarm."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            import signal

            signal.alarm(60)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - whatever it was, it is told and the child ends
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_process_goes_on_with_the_reader_of_its_parent(run_dir: Path) -> None:
    store = Store.open(run_dir)
    put(store.add_model(SPEC), range(10), 1)
    with Reader("ctr", run_dir) as reader:

        def look() -> None:
            assert reader.lookup("item", [1])[0, 0] == 2
            store_again = reader.lookup("item", np.arange(3_000))  # the index has grown since the fork of our ancestors
            assert store_again[2_999, 0] == 2
            reader.close()

        put(store.models["ctr"], range(3_000), 2)
        assert [in_fork(look) for _ in range(3)] == [0, 0, 0]
        assert reader.lookup("item", [1])[0, 0] == 2  # closed in the children only


def test_locks_that_other_threads_held_at_the_fork_are_open_in_the_child(run_dir: Path) -> None:
    store = Store.open(run_dir)
    put(store.add_model(SPEC), range(10), 1)
    with Reader("ctr", run_dir) as reader:
        table = reader._table("item")
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with reader._attaching, table.newest_index._switching:
                held.set()
                done.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        put(store.models["ctr"], range(3_000), 2)  # a larger index: who looks up has to reopen it
        store.add_table("ctr", TableSpec("user", 3))  # a new manifest: and to attach anew

        def look() -> None:
            assert reader.lookup("item", [2_999])[0, 0] == 2
            assert set(reader.tables) == {"item", "user"}

        try:
            assert in_fork(look) == 0
        finally:
            done.set()
            thread.join()


def worker(reader: Reader, keys: list[int]) -> list[float]:
    return [float(value) for value in reader.lookup("item", keys)[:, 0]]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_reader_is_sent_to_worker_processes(run_dir: Path, method: str) -> None:
    put(Store.open(run_dir).add_model(SPEC), range(10), 1)
    pool = multiprocessing.get_context(method).Pool(2)
    with Reader("ctr", run_dir, defaults={"item": [7.0, 7.0, 7.0]}) as reader, pool:
        answers = pool.starmap(worker, [(reader, [1, 99]), (reader, [2, 3])])
        pool.close()
        pool.join()
    assert answers == [[1.0, 7.0], [1.0, 1.0]]


def test_a_pickle_holds_no_memory_and_a_closed_reader_stays_closed(run_dir: Path) -> None:
    put(Store.open(run_dir).add_model(SPEC), range(10), 1)
    reader = Reader("ctr", run_dir, unheld="absent")
    pickled = pickle.dumps(reader)
    assert len(pickled) < 1_000
    with pickle.loads(pickled) as twin:
        reader.close()
        assert worker(twin, [1]) == [1.0]  # each is closed for itself
        assert twin._refuses_unheld is False
    with pytest.raises(ModelError, match="was closed before it was pickled"):
        pickle.loads(pickle.dumps(reader))


# --- another user


def as_other(uid: int, gid: int, work: Callable[[], None]) -> int:
    def demoted() -> None:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
        work()

    return in_fork(demoted)


def open_path(run_dir: Path) -> None:
    """The folders above are pytest's; the test is about ours."""
    for folder in [*run_dir.parents]:
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)


root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")


@root_only
def test_by_default_another_user_may_not_read(run_dir: Path) -> None:
    put(Store.open(run_dir).add_model(SPEC), range(10), 1)
    open_path(run_dir)

    def look() -> None:
        with pytest.raises(Exception, match="Permission denied"):
            Reader("ctr", run_dir)

    assert as_other(NOBODY, NOBODY, look) == 0


@root_only
@pytest.mark.parametrize(
    ("settings", "gid"), [(Access(0o644), NOBODY), (Access(0o640, OTHER_GROUP), OTHER_GROUP)], ids=["mode", "group"]
)
def test_another_user_reads_and_cannot_write(run_dir: Path, settings: Access, gid: int) -> None:
    before = os.umask(0o077)  # a daemon's umask takes nothing away from what it was told to allow
    try:
        store = Store.open(run_dir, access=settings)
        put(store.add_model(SPEC), range(10), 1)
        open_path(run_dir)

        def look() -> None:
            with Reader("ctr", run_dir) as reader:
                assert reader.lookup("item", [1])[0, 0] == 1
                assert reader.lookup("item", [1], consistent=False).size
                mapping = reader._table("item")._mapping
                path = next(Path("/dev/shm").glob(f"{store._memory.prefix}-*-rows"))  # type: ignore[attr-defined]
                with pytest.raises(PermissionError):
                    os.open(path, os.O_RDWR)
                assert not mapping.words(0, 8).flags.writeable

        assert as_other(NOBODY, gid, look) == 0
        store.add_table("ctr", TableSpec("user", 3))  # what is made later, and a manifest that is replaced, too
        put(store.models["ctr"], range(3_000), 2)

        def look_again() -> None:
            with Reader("ctr", run_dir) as reader:
                assert set(reader.tables) == {"item", "user"}
                assert reader.lookup("item", [2_999])[0, 0] == 2

        assert as_other(NOBODY, gid, look_again) == 0
    finally:
        os.umask(before)


@root_only
def test_a_store_that_is_resumed_takes_on_the_new_settings(run_dir: Path) -> None:
    put(Store.open(run_dir).add_model(SPEC), range(10), 1)
    store = Store.open(run_dir, access=Access(0o644))
    assert store.resumed
    for path in store._file_names():
        assert stat.S_IMODE((Path("/dev/shm") / path).stat().st_mode) == 0o644
    assert stat.S_IMODE((run_dir / "manifest.json").stat().st_mode) == 0o644
