"""Shared memory that dead nodes left behind is told from what somebody uses; with real processes that are killed."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ekko import cli
from ekko.errors import EkkoError
from ekko.model import ModelSpec, TableSpec
from ekko.rundir import locked
from ekko.store import Store, layout
from ekko.store.leftovers import YOUNG_S, State, find_stores, note_run_dir, remove
from ekko.store.manifest import prefix_of, read_manifest
from ekko.store.memory import Mapping
from ekko.store.store import MEMORY_DIR

SPEC = ModelSpec("ctr", 8, {"item": TableSpec("item", 4)})


@pytest.fixture
def memory_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder of its own in the tmpfs, so that the stores of others are not looked at, let alone removed."""
    folder = MEMORY_DIR / f"ekko-test-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@contextmanager
def daemon(run_dir: Path, memory_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has a store open, as a daemon has; killed at the end."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from ekko.store import Store; from ekko.model import ModelSpec, TableSpec\n"
        "store = Store.open(Path(sys.argv[1]), memory_dir=Path(sys.argv[2]))\n"
        "store.add_model(ModelSpec('ctr', 8, {'item': TableSpec('item', 4)}))\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir), str(memory_dir)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def states(memory_dir: Path, later_s: float = 2 * YOUNG_S) -> list[State]:
    return [store.state for store in find_stores(memory_dir, time.time() + later_s)]


def test_what_a_living_daemon_uses_is_never_a_leftover(tmp_path: Path, memory_dir: Path) -> None:
    run_dir = tmp_path / "node"
    with daemon(run_dir, memory_dir):
        assert states(memory_dir) == [State.IN_USE]
        shutil.rmtree(run_dir)  # even then: its memory is all there is of its rows
        assert states(memory_dir) == [State.IN_USE]
    assert states(memory_dir) == [State.LEFTOVER]


def test_what_a_stopped_node_takes_up_again_is_kept(tmp_path: Path, memory_dir: Path) -> None:
    run_dir = tmp_path / "node"
    with daemon(run_dir, memory_dir):
        pass
    assert states(memory_dir) == [State.KEPT]
    again = Store.open(run_dir, memory_dir=memory_dir)
    assert again.resumed
    assert states(memory_dir) == [State.IN_USE]
    again.close()
    assert states(memory_dir) == [State.KEPT]


def test_a_store_whose_run_dir_names_another_or_is_gone_is_removed(tmp_path: Path, memory_dir: Path) -> None:
    run_dir = tmp_path / "node"
    with daemon(run_dir, memory_dir):
        pass
    manifest = read_manifest(run_dir)
    assert manifest is not None
    # Copies as a kill in the middle of `narrowed` or of a replacement leaves them.
    for path in memory_dir.glob(f"{manifest.prefix}-*"):
        if "control" not in path.name:
            # Not a copy of the bytes: the files are sparse, 64 GiB long, and a copy fills the machine's memory.
            path.with_name(path.name.replace(manifest.prefix, f"{prefix_of(run_dir)}-00000000")).write_bytes(b"leftover")
    by_prefix = {store.prefix: store for store in find_stores(memory_dir, time.time() + 2 * YOUNG_S)}
    assert by_prefix.pop(manifest.prefix).state is State.KEPT
    (copy,) = by_prefix.values()
    assert copy.state is State.LEFTOVER
    assert copy.bytes > 0
    assert remove(copy) == copy.bytes
    assert states(memory_dir) == [State.KEPT]
    shutil.rmtree(run_dir)
    (gone,) = find_stores(memory_dir, time.time() + 2 * YOUNG_S)
    assert gone.state is State.LEFTOVER
    remove(gone)
    assert list(memory_dir.iterdir()) == []


def test_files_that_are_being_made_or_not_understood_stay(tmp_path: Path, memory_dir: Path) -> None:
    prefix = f"{prefix_of(tmp_path / 'node')}-12345678"
    (memory_dir / f"{prefix}-00000001-header").write_bytes(b"x")
    (memory_dir / "ekko-something-else").write_bytes(b"x")
    assert states(memory_dir, later_s=0) == [State.YOUNG]
    assert states(memory_dir) == [State.UNKNOWN]  # no control file: nothing says whose it is
    control = Mapping.create(memory_dir / f"{prefix}-control", layout.CONTROL_BYTES)
    control.ensure(layout.CONTROL_BYTES)
    control.words(0, 2)[...] = (layout.CONTROL_MAGIC, layout.LAYOUT_VERSION - 1)
    note_run_dir(control, tmp_path / "node")
    assert states(memory_dir) == [State.UNKNOWN]  # of another layout
    control.words(0, 2)[...] = (layout.CONTROL_MAGIC, layout.LAYOUT_VERSION)
    note_run_dir(control, tmp_path / "other")
    assert states(memory_dir) == [State.UNKNOWN]  # a path that does not belong to these names
    control.words(128, 496)[...] = 0
    note_run_dir(control, tmp_path / "node")
    assert states(memory_dir) == [State.LEFTOVER]
    control.mark_in_use()
    assert states(memory_dir) == [State.IN_USE]


def test_a_locked_run_dir_protects_its_files(tmp_path: Path, memory_dir: Path) -> None:
    run_dir = tmp_path / "node"
    store = Store.open(run_dir, memory_dir=memory_dir)
    store.close()
    (run_dir / "manifest.json").unlink()
    with locked(run_dir):  # its daemon has just begun, and has not opened its store yet
        assert states(memory_dir) == [State.IN_USE]
    assert states(memory_dir) == [State.LEFTOVER]


def test_a_damaged_manifest_is_for_a_person_to_decide(tmp_path: Path, memory_dir: Path) -> None:
    run_dir = tmp_path / "node"
    Store.open(run_dir, memory_dir=memory_dir).close()
    (run_dir / "manifest.json").write_text("{")
    assert states(memory_dir) == [State.UNKNOWN]


def test_the_command_removes_leftovers_and_nothing_else(
    tmp_path: Path, memory_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ekko.store.leftovers.YOUNG_S", 0.0)
    live, dead = tmp_path / "live", tmp_path / "dead"
    with daemon(dead, memory_dir):
        pass
    shutil.rmtree(dead)

    def clean(*arguments: str) -> dict[str, object]:
        cli.clean(dry_run="--dry-run" in arguments, memory_dir=memory_dir, as_json=True)
        answer: dict[str, object] = json.loads(capsys.readouterr().out)
        return answer

    with daemon(live, memory_dir):
        before = sorted(memory_dir.iterdir())
        dry = clean("--dry-run")
        assert sorted(memory_dir.iterdir()) == before
        real = clean()
        assert real["freed_bytes"] == dry["freed_bytes"] != 0
        assert {path.name[:21] for path in memory_dir.iterdir()} == {prefix_of(live)}
        assert clean()["freed_bytes"] == 0
        cli.clean(dry_run=False, memory_dir=memory_dir, as_json=False)
        assert "in use" in capsys.readouterr().out
    assert Store.open(live, memory_dir=memory_dir).resumed
    with pytest.raises(EkkoError, match="not a directory"):
        cli.clean(dry_run=False, memory_dir=tmp_path / "nowhere", as_json=False)
