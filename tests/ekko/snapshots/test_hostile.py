"""Snapshots in a world that means no good: forged manifests, places that fail, disks that are full, kills, a second writer."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ekko.errors import MemoryFullError, SnapshotError, StoreError
from ekko.model import ModelSpec, TableSpec
from ekko.snapshots.catalog import Catalog
from ekko.snapshots.folders import LocalFolder, open_folder
from ekko.snapshots.format import _spelled, checksum_of
from ekko.snapshots.load import Wanted, open_or_restore
from ekko.snapshots.take import Plan, take
from ekko.snapshots.write import Pace
from ekko.store import Store
from ekko.store.images import TableFiller
from ekko.store.manifest import prefix_of
from ekko.store.store import MEMORY_DIR
from tests.ekko.snapshots.test_snapshots import DIM, MODEL, Home, contents

Patch = pytest.MonkeyPatch


def forge(home: Home, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest, and make its checksum right."""
    path = Path(home.folder.url) / name / "manifest.json"
    body = json.loads(path.read_bytes())["body"]
    change(body)
    path.write_bytes(_spelled({"checksum": checksum_of(_spelled(body)), "body": body}))


def table_of(body: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = body["models"][0]["tables"][0]
    return table


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda body: table_of(body).update(file="../../../secret"), "is not to be expected"),
        (lambda body: body["models"][0].update(knowledge="/etc/passwd"), "is not to be expected"),
        (lambda body: body.update(parent="../other"), "is not to be expected"),
        (lambda body: body.update(parent=5), "is not to be expected"),
        (lambda body: body.update(parent=body["name"]), "came later"),
        (lambda body: body.update(cluster="xyz"), "is not to be expected"),
        (lambda body: body.update(lives=["-1"]), "is not to be expected"),
        (lambda body: table_of(body).update(stride=8), "bytes, not"),
        (lambda body: table_of(body).update(chunks=[[1 << 40, "0"]]), "too many"),
        (lambda body: table_of(body).update(chunks=table_of(body)["chunks"] * 9), "shorter than its manifest"),
        (lambda body: table_of(body).update(table=77), "damaged: 77"),
        (lambda body: body["models"][0]["tables"].append(table_of(body)), "a table twice"),
        (lambda body: body["models"].append(body["models"][0]), "two models of one name"),
        (lambda body: body["models"][0]["entry"].update(shards=0), "shards = 0"),
        (lambda body: body["models"][0]["entry"].update(hold=[3]), "no such partitions"),
        (lambda body: body["models"][0]["entry"].update(codec="int8"), "do not go together"),
        (lambda body: body["models"][0].update(whole=[99]), "no such writers or shards"),
        (lambda body: body["models"][0].update(bindings=[[4096, "0"]]), "no such writers or shards"),
        (
            lambda body: body["models"][0]["entry"]["tensors"].append({"name": "w", "shape": [1 << 60], "dtype": "f4"}),
            "too large",
        ),
        (lambda body: body.update(registers={"alias": [1], "dropped": []}), "damaged"),
    ],
)
def test_a_forged_manifest_is_refused_and_the_next_older_one_is_taken(
    home: Home, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    home.write([1], 1.0)
    sound = home.snapshot()
    forged = home.snapshot()
    forge(home, forged.name, change)
    restored = home.restore()
    assert restored.snapshot == sound.name
    assert reason in restored.refused[0]


def test_what_is_not_as_long_as_it_should_be_is_refused_before_memory_is_made(home: Home, monkeypatch: Patch) -> None:
    home.write([1], 1.0)
    sound = home.snapshot()
    longer = home.snapshot()
    rows = next((Path(home.folder.url) / longer.name).glob("*.rows"))
    rows.write_bytes(rows.read_bytes() + b"x")
    monkeypatch.setattr(TableFiller, "room", lambda *_: pytest.fail("memory was made"))
    with pytest.raises(pytest.fail.Exception):
        home.restore()  # of the sound one
    monkeypatch.undo()
    restored = home.restore()
    assert restored.snapshot == sound.name
    assert "longer than its manifest says" in restored.refused[0]


class Flaky(MemoryFileSystem):
    """Its library raises what it likes, for as long as it is told to."""

    protocol = "flaky"
    fails: type[Exception] | None = None

    def info(self, path: str, **kwargs: Any) -> Any:
        if self.fails is not None and path.endswith("manifest.json"):
            raise self.fails("the network is down")
        return super().info(path, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        if self.fails is not None:
            raise self.fails("the network is down")
        return super().ls(path, detail, **kwargs)


@pytest.mark.parametrize("error", [OSError, RuntimeError, ValueError])
def test_a_place_that_fails_for_a_moment_loses_nothing(home: Home, monkeypatch: Patch, error: type[Exception]) -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    home.folder = open_folder(f"flaky://test-{error.__name__}/a")  # type: ignore[assignment]
    home.write([1], 1.0)
    first = home.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(Flaky, "fails", error)
        patch.setattr(Flaky, "ls", MemoryFileSystem.ls)
        with pytest.raises(SnapshotError, match="the network is down"):
            Catalog(home.folder).remove_leftovers()
    with monkeypatch.context() as patch:
        patch.setattr(Flaky, "fails", error)
        restored = home.restore()
        assert restored.snapshot is None, "a node starts without"
        assert "the network is down" in restored.refused[0]
    assert home.restore().snapshot == first.name


def test_every_spelling_of_a_folder_here_is_one(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}", f"local://{tmp_path}"):
        folder = open_folder(url)
        assert isinstance(folder, LocalFolder)
        assert folder.url == str(tmp_path)


def test_pruning_leaves_what_it_cannot_read_until_it_is_old(home: Home) -> None:
    """It may be of a newer version, which somebody went back from; or the place failed for a moment."""
    names = [home.snapshot().name for _ in range(3)]
    forge(home, names[0], lambda body: body.update(format=2))
    forge(home, names[1], lambda body: body.update(format=2))
    catalog = Catalog(home.folder)
    assert not catalog.prune(2)
    names.append(home.snapshot().name)
    assert sorted(catalog.prune(2)) == names[:2]
    assert catalog.names() == names[2:]


def test_two_nodes_cannot_write_to_one_folder_at_once(home: Home) -> None:
    home.write([1], 1.0)
    with home.folder.locked(), pytest.raises(SnapshotError, match="give each node a folder"):
        take(home.run_dir, home.folder, "b", Plan())
    assert take(home.run_dir, home.folder, "b", Plan()).rows == 1


def test_a_snapshot_whose_files_somebody_else_removed_is_none(home: Home, monkeypatch: Patch) -> None:
    """Where there are no locks: a second node took what had no manifest yet for a leftover."""
    home.write([1], 1.0)
    first = home.snapshot()
    put_data = LocalFolder.size

    def size(self: LocalFolder, path: str) -> int | None:
        Catalog(self).remove_leftovers()
        return put_data(self, path)

    monkeypatch.setattr(LocalFolder, "size", size)
    with pytest.raises(SnapshotError):
        home.snapshot()
    assert Catalog(home.folder).names() == [first.name]


def test_a_full_disk_is_said_and_given_back(home: Home, monkeypatch: Patch) -> None:
    home.write(list(range(100)), 1.0)
    first = home.snapshot()
    write, calls = os.write, []

    def full(descriptor: int, data: Any) -> int:
        calls.append(len(data))
        if len(data) > 4:  # a part of it goes, then nothing
            return write(descriptor, data[:4])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SnapshotError, match="No space left on device"):
        take(home.run_dir, home.folder, "a", Plan())
    monkeypatch.undo()
    assert calls
    assert Catalog(home.folder)._all() == [first.name]
    assert home.restore().snapshot == first.name


def test_a_restore_that_was_killed_takes_no_room_from_the_next(home: Home, monkeypatch: Patch) -> None:
    home.write(list(range(100)), 1.0)
    name = home.snapshot().name
    expected = contents(home.model)
    home.store.destroy()
    pid = os.fork()
    if pid == 0:
        TableFiller.settle = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        open_or_restore(home.run_dir, [home.folder], Wanted(), table_bytes_max=64 << 20)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    mine = f"{prefix_of(home.run_dir)}-*"
    left = set(MEMORY_DIR.glob(mine))
    assert left, "the kill left half of it"
    room = TableFiller.room

    def looked(self: TableFiller, rows: int) -> memoryview:
        assert not left & set(MEMORY_DIR.glob(mine)), "memory is needed twice"
        return room(self, rows)

    monkeypatch.setattr(TableFiller, "room", looked)
    assert home.restore().snapshot == name
    assert contents(home.model) == expected


def test_memory_that_is_full_is_no_fault_of_the_snapshot(home: Home, monkeypatch: Patch) -> None:
    """An older one would not fit either, and to begin empty would hide it."""
    home.write([1], 1.0)
    home.snapshot()

    def full(*_: object) -> memoryview:
        raise MemoryFullError("shared memory is full")

    monkeypatch.setattr(TableFiller, "room", full)
    with pytest.raises(StoreError, match="shared memory is full"):
        home.restore()
    assert not list(MEMORY_DIR.glob(f"{prefix_of(home.run_dir)}-*"))
    monkeypatch.undo()
    assert home.restore().snapshot is not None


def test_other_partitions_than_ours_are_passed(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.store.destroy()
    home.store = Store.open(home.run_dir, table_bytes_max=64 << 20)
    home.store.add_model(ModelSpec(MODEL, 8, {"item": TableSpec("item", DIM)}, partitions=2), hold=[0])
    home.snapshot()
    restored = home.restore(hold={MODEL: [1]})
    assert restored.snapshot is not None
    assert not restored.store.models
    home.store.destroy()


def test_a_ttl_that_is_configured_otherwise_is_a_reason(home: Home) -> None:
    home.snapshot()
    other = ModelSpec(MODEL, 8, {"item": TableSpec("item", DIM, ttl_s=60)})
    restored = home.restore(specs={MODEL: other})
    assert restored.snapshot is None
    assert "ttl_s 0 in it, and 60" in restored.refused[0]


def test_a_damaged_ledger_is_an_error_that_says_so(home: Home) -> None:
    home.snapshot()
    (home.run_dir / "ledger").write_bytes(b"junk")
    with pytest.raises(StoreError, match="record of granted writer ids is damaged"):
        take(home.run_dir, home.folder, "a", Plan())
    with pytest.raises(StoreError, match="record of granted writer ids is damaged"):
        home.restore()
    (home.run_dir / "ledger").unlink()


def test_an_empty_file_in_memory_is_not_intact(home: Home) -> None:
    home.write([1], 1.0)
    home.snapshot()
    for path in MEMORY_DIR.glob(f"{prefix_of(home.run_dir)}-*-rows"):
        os.truncate(path, 0)
    restored = open_or_restore(home.run_dir, [home.folder], Wanted(), table_bytes_max=64 << 20)
    assert restored.snapshot is not None
    home.store = restored.store


def test_values_of_a_knowledge_file_are_those_of_its_model(home: Home) -> None:
    """The right checksum over nonsense: of a model with other shards."""
    home.write([1], 1.0)
    sound, forged = home.snapshot(), home.snapshot()
    path = Path(home.folder.url) / forged.name / "0.knowledge"
    for data in (b"", b"\x00", b"\x81\xa6vector\x92\xc4\x02\xff\xff\xc4\x00", os.urandom(64)):
        path.write_bytes(data)
        forge(home, forged.name, lambda body, data=data: body["models"][0].update(knowledge_checksum=checksum_of(data)))
        restored = home.restore()
        assert restored.snapshot == sound.name
        assert "cannot be understood" in restored.refused[0]


def test_images_that_are_none_are_refused(home: Home) -> None:
    home.write([1], 1.0)
    sound, forged = home.snapshot(), home.snapshot()
    rows = next(path for path in (Path(home.folder.url) / forged.name).glob("*.rows") if path.stat().st_size)
    for lock, flags, stamp in ((1, 0, 5), (0, 1 << 9, 5), (0, 0, 0)):
        image = np.frombuffer(rows.read_bytes(), np.uint32).copy()
        image[:4] = (lock, flags, stamp, 0)
        rows.write_bytes(image.tobytes())
        checksum = checksum_of(image.tobytes())
        forge(home, forged.name, lambda body, checksum=checksum: table_of(body).update(chunks=[[1, checksum]]))
        restored = home.restore()
        assert restored.snapshot == sound.name
        assert "are no rows" in restored.refused[0]


def test_a_snapshot_takes_no_more_of_a_core_than_its_share(home: Home, monkeypatch: Patch) -> None:
    """On clocks that only the work and the rests move."""
    clock = {"cpu": 5.0, "wall": 70.0}

    def sleep(seconds: float) -> None:
        clock["wall"] += seconds

    def work(cpu: float, waited: float = 0.0) -> None:
        clock["cpu"] += cpu
        clock["wall"] += cpu + waited

    clocks = SimpleNamespace(thread_time=lambda: clock["cpu"], monotonic=lambda: clock["wall"], sleep=sleep)
    monkeypatch.setattr("ekko.snapshots.write.time", clocks)  # not the module's own, which threads of other tests may use
    pace = Pace(0.5)
    for _ in range(100):
        work(0.002)
        pace.keep()
    assert clock["wall"] - 70.0 == pytest.approx(0.4, rel=0.01)
    before = clock["wall"]
    work(0.002, waited=1.0)  # for the disk
    pace.keep()
    assert clock["wall"] - before == pytest.approx(1.002), "who waits anyway rests no more"
    before = clock["wall"]
    for _ in range(100):
        work(0.002)
        pace.keep()
    assert clock["wall"] - before == pytest.approx(0.4, rel=0.01), "and takes no more afterwards"
