"""Shared memory that dead nodes left behind: found, told from what is used, and removed (`ekko clean`).

A node that starts again in its run_dir takes up what lies there, or removes it. Files stay when that never happens: the run_dir
was deleted, the machine runs other nodes now. Nothing refers to them any more, and they fill the tmpfs.

A store's files have a prefix in common. Its control file says which run_dir it belongs to, and is locked by the daemon while
that lives, in whatever container; so is the run_dir. What is locked, what a run_dir's manifest names, and what is too young to
tell is left alone. So is what we do not understand, such as stores of older versions of ekko: it is listed, for a person to
decide.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ekko.errors import StoreError
from ekko.store import layout
from ekko.store.manifest import CONTROL_NAME, kernel_boot_id, prefix_of, read_manifest
from ekko.store.memory import Mapping

# In a `run_dir`: held by its daemon while it lives (`ekko.rundir.locked`).
RUN_DIR_LOCK = "lock"
# A store is being made: its control file may be there without a lock, or its other files without a control file.
YOUNG_S = 60.0
LOOK_S = 60.0  # between two looks of a living node

_NAME = re.compile(r"(ekko-[0-9a-f]{16})-([0-9a-f]{8})-.+")
_RUN_DIR = layout.CONTROL.offset("run_dir")


class State(Enum):
    """What is known of a store's files."""

    IN_USE = "in use"  # by a daemon that lives
    KEPT = "kept for the next start"  # its daemon is stopped, and its run_dir names it
    YOUNG = "too young to tell"
    UNKNOWN = "not understood"
    LEFTOVER = "leftover"


@dataclass(frozen=True, slots=True)
class StoreFiles:
    """All files of one prefix."""

    prefix: str
    state: State
    run_dir: Path | None  # None: nothing says
    files: tuple[Path, ...]
    bytes: int  # of memory


def note_run_dir(control: Mapping, run_dir: Path) -> None:
    """Write into a new control file whose it is."""
    path = os.fsencode(run_dir.resolve())
    room = layout.CONTROL_BYTES - _RUN_DIR
    if len(path) < room:
        words = control.words(_RUN_DIR, room // 8)
        words.view("u1")[: len(path)] = bytearray(path)


def find_stores(memory_dir: Path, now_s: float | None = None) -> list[StoreFiles]:
    """Every store with files in this tmpfs, by prefix.

    Args:
        memory_dir: the tmpfs.
        now_s: Unix seconds; None: now.
    """
    now_s = time.time() if now_s is None else now_s
    groups: dict[str, dict[str, list[Path]]] = {}  # of a run_dir -> of a store
    for path in sorted(memory_dir.glob("ekko-*")):
        if match := _NAME.fullmatch(path.name):
            groups.setdefault(match[1], {}).setdefault(f"{match[1]}-{match[2]}", []).append(path)
    return [store for family, stores in groups.items() for store in _judge(family, stores, now_s)]


def _judge(family: str, stores: dict[str, list[Path]], now_s: float) -> Iterator[StoreFiles]:
    """The stores of one run_dir. While its daemon lives all are its own: it may be copying one into another."""
    controls = [files[0].with_name(f"{prefix}-{CONTROL_NAME}") for prefix, files in stores.items()]
    run_dir = next((path for control in controls if (path := _run_dir_of(control, family)) is not None), None)
    lives = any(_is_locked(control) for control in controls) or (run_dir is not None and _is_locked(run_dir / RUN_DIR_LOCK))
    named = None if run_dir is None else _prefix_named(run_dir)
    for prefix, files in stores.items():
        sizes = [stat for path in files if (stat := _stat(path)) is not None]
        if lives:
            state = State.IN_USE
        elif any(now_s - stat.st_mtime < YOUNG_S for stat in sizes):
            state = State.YOUNG
        elif run_dir is None or named is None:
            state = State.UNKNOWN
        else:
            state = State.KEPT if prefix == named else State.LEFTOVER
        yield StoreFiles(prefix, state, run_dir, tuple(files), sum(stat.st_blocks * 512 for stat in sizes))


def remove(store: StoreFiles) -> int:
    """Remove a leftover; returns the bytes that are free now.

    Raises:
        StoreError: it belongs to another user. What could be removed is.
    """
    assert store.state is State.LEFTOVER
    freed, refused = 0, ""
    for path in store.files:
        stat = _stat(path)
        try:
            path.unlink(missing_ok=True)
            freed += 0 if stat is None else stat.st_blocks * 512
        except OSError as error:
            refused = f"{path} cannot be removed: {error.strerror}: run `ekko clean` as the user whose file it is"
    if refused:
        raise StoreError(refused)
    return freed


class LeftoversWatch:
    """How much there is, for a node's status: looked at now and then, since each look opens a file of every store."""

    def __init__(self, memory_dir: Path) -> None:
        self._memory_dir = memory_dir
        self._looked_s = -LOOK_S
        self._bytes = 0

    def bytes(self, monotonic_s: float) -> int:
        """Bytes of all leftovers, at most `LOOK_S` old."""
        if monotonic_s - self._looked_s >= LOOK_S:
            self._looked_s = monotonic_s
            self._bytes = sum(store.bytes for store in find_stores(self._memory_dir) if store.state is State.LEFTOVER)
        return self._bytes


def _run_dir_of(control: Path, family: str) -> Path | None:
    """What the control file says, if it is of our layout and its name agrees."""
    try:
        head = control.read_bytes()[: layout.CONTROL_BYTES]
    except OSError:
        return None
    words = (int.from_bytes(head[:8], "little"), int.from_bytes(head[8:16], "little"))
    text = head[_RUN_DIR:].rstrip(b"\0")
    if words != (layout.CONTROL_MAGIC, layout.LAYOUT_VERSION) or not text:
        return None
    run_dir = Path(os.fsdecode(text))
    return run_dir if prefix_of(run_dir) == family else None


def _prefix_named(run_dir: Path) -> str | None:
    """The prefix that the run_dir's manifest names; empty when it names none that could be used; None when nobody can tell."""
    try:
        manifest = read_manifest(run_dir)
    except (StoreError, OSError):  # damaged, or not for us to read
        return None
    if manifest is None or manifest.boot_id != kernel_boot_id() or manifest.layout_version != layout.LAYOUT_VERSION:
        return ""
    return manifest.prefix


def _is_locked(path: Path) -> bool:
    """Whether another process holds a lock on the file; what cannot be opened may be locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _stat(path: Path) -> os.stat_result | None:
    with suppress(OSError):
        return path.stat()
    return None
