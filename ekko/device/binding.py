"""Which caches a reader has open: those of the newest device manifest, as long as it is the newest.

A reader outlives the daemon, its caches, its store and its models, in any order. So before each look-up it asks the control
file whether the manifest that it knows still counts, and whether somebody keeps the caches up to date; if not, it reads shared
memory, and looks again before the next one.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ekko.device.control import DeviceControl
from ekko.device.manifest import DeviceManifest, TableCache, read
from ekko.device.wanted import WantedPost
from ekko.errors import StoreError
from ekko.store.locks import ForkSafeLock
from ekko.store.view import TableView
from gpu.backend import Device
from gpu.errors import DeviceError
from gpu.reading import CacheReader, attach

# What is on the device may be so much older than what is in shared memory; beyond that shared memory is read. A daemon that
# lives is some milliseconds behind; one that was killed, or stopped, is noticed by this.
BEHIND_MS_MAX: Final = 1_000
# After an attempt that found nothing to bind to, the next one waits for so long.
RETRY_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class BoundCache:
    """The cache of a table."""

    cache: CacheReader
    place: int  # of the model's word in the control file
    post: WantedPost | None  # None: this process may not say what it misses


@dataclass(frozen=True, slots=True)
class Readable:
    """A cache that may be looked into now; what is looked up has every batch that ended until the epoch `applied`."""

    cache: CacheReader
    post: WantedPost | None
    applied: int


@dataclass(frozen=True, slots=True)
class Bound:
    """All caches of one manifest."""

    manifest: DeviceManifest
    caches: dict[tuple[int, int], BoundCache] = field(default_factory=dict)  # by model and table


class Binding:
    """Of one reader. Threads may share it.

    Args:
        device: open in this process.
        run_dir: the node's.
    """

    def __init__(self, device: Device, run_dir: Path) -> None:
        self.control: DeviceControl | None = None
        self.reason = "it was not asked yet"  # why there is no cache now
        self._device = device
        self._run_dir = run_dir
        self._lock = ForkSafeLock()
        self._bound: Bound | None = None
        self._opened: dict[str, CacheReader] = {}  # by what names them
        self._retry_s = 0.0

    def cache_of(self, view: TableView) -> Readable | None:
        """The cache of a table of the store, if it is to be read now; asked before each look-up."""
        control, bound = self.control, self._bound
        if control is None or bound is None or control.generation != bound.manifest.generation:
            bound = self._bind()
            if bound is None or (control := self.control) is None:
                return None
        files = view.files
        if bound.manifest.store != files.memory.prefix:
            self.reason = "the caches are of another store than the one that is read"
            return None
        if control.behind_ms() > BEHIND_MS_MAX:
            self.reason = f"nobody has written the caches for {control.behind_ms()} ms"
            return None
        found = bound.caches.get((files.model_id, files.table_id))
        if found is None:
            self.reason = bound.manifest.reason or f"table {view.spec.name!r} has no cache"
            return None
        applied = control.applied(found.place)
        if control.generation != bound.manifest.generation:
            return None  # the word may be one of another daemon by now, whose caches have what these have not
        return Readable(found.cache, found.post, applied)

    def _bind(self) -> Bound | None:
        """Open what the manifest names now."""
        with self._lock:
            now = time.monotonic()
            if now < self._retry_s:
                return None
            self._retry_s = now + RETRY_S
            try:
                self.control = self.control or DeviceControl.open(self._run_dir)
                manifest = read(self._run_dir)
            except PermissionError as error:
                self.reason = f"{error.filename} is not for this user to read"
                return None
            if self.control is None:
                self.reason = f"the node at {self._run_dir} keeps no rows on a device"
                return None
            generation = self.control.settled_generation()
            if self._bound is not None and self._bound.manifest.generation == generation:
                return self._bound  # another thread was here
            self._bound = None
            if manifest is None or manifest.generation != generation:
                self.reason = "the node has no caches now: it is starting, or was stopped"
                return None
            if manifest.device != self._device.name:
                self.reason = f"the node keeps rows on {manifest.device!r}, and not on {self._device.name!r}"
                return None
            try:
                bound = Bound(manifest, self._open_all(manifest))
            except DeviceError as error:
                self.reason = f"a cache cannot be opened: {error}"
                return None
            self._bound, self._retry_s, self.reason = bound, 0.0, manifest.reason
            return bound

    def _open_all(self, manifest: DeviceManifest) -> dict[tuple[int, int], BoundCache]:
        opened: dict[str, CacheReader] = {}
        caches = {}
        for model in manifest.models:
            for number, table in model.tables.items():
                cache = self._opened.get(table.cache) or self._open(table)
                opened[table.cache] = cache
                caches[model.id, number] = BoundCache(cache, model.place, WantedPost.open(Path(table.wanted)))
        self._opened = opened  # others go when the last look-up in them ends
        return caches

    def _open(self, table: TableCache) -> CacheReader:
        return attach(self._device, table.handle)


def check_device(run_dir: Path, name: str, wait_s: float) -> None:
    """Refuse a device on which the node of this run_dir keeps no rows; one whose caches are not there yet is waited for.

    Raises:
        StoreError: naming what the node has, and what to change.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            manifest = read(run_dir)
        except PermissionError as error:
            raise StoreError(
                f"user {os.geteuid()} may not read {error.filename}: rows on a device are for the daemon's own user; pass none"
            ) from error
        if manifest is not None:
            if manifest.device != name:
                raise StoreError(
                    f"the node at {run_dir} keeps rows on device {manifest.device!r}, not on {name!r}: pass that one, or none"
                )
            return
        if time.monotonic() >= deadline:
            raise StoreError(f"the node at {run_dir} keeps no rows on a device: add [device] to its node.toml, or pass none")
        time.sleep(RETRY_S)
