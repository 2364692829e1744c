"""The one thread that writes the caches of a node.

A round: make and drop caches as the tables of the store are by now; drain the feeds, and have what they name as the store has
it; insert what readers missed; wait for the device; then say how far it is. The daemon's loop never waits for any of that: it
leaves keys in the feeds, and reads what `picture` says.

Where the device has no room, or fails, the node goes on as without one, and says so: readers find no cache, and read shared
memory. A device without room is tried again later; one that failed is left alone until the node is started again.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

from ekko.device.caches import Counts, ModelWriter, TableWriter, WantedModel
from ekko.device.control import MODELS_MAX, DeviceControl, monotonic_ms
from ekko.device.manifest import DeviceManifest, ModelCaches
from ekko.device.picture import DevicePicture
from ekko.errors import MemoryFullError, StoreError
from ekko.store.access import Access
from gpu.backend import Device
from gpu.cache import EmbeddingCache
from gpu.errors import DeviceError, DeviceMemoryError

# Between two looks at what readers want, where nothing changes; and once nothing has happened for a while.
POLL_S: Final = 0.01
IDLE_POLL_S: Final = 0.05
IDLE_MS: Final = 1_000
# After so long a table that found no room is tried again.
RETRY_S: Final = 30.0
# So long the memory of a cache outlives it: longer than any look-up.
KEEP_MS: Final = 5_000
# How often the device is asked for figures, which takes a copy to the host.
LOOK_MS: Final = 1_000
# How long the end of the node waits for the round that is being done.
STOP_S_MAX: Final = 5.0

# Told of what an operator should know: an event's name, and fields.
Tell = Callable[[str, dict[str, object]], None]


class DeviceWriter:
    """Starts with `start`, ends with `close`; `want` says which caches there are to be.

    Args:
        device: open.
        run_dir: of the node.
        access: who may read its store, and so its caches.
        store: the prefix of the files of the store that is cached.
        tell: called in the writer's thread.
    """

    def __init__(self, device: Device, run_dir: Path, access: Access, store: str, tell: Tell) -> None:
        self.wake = threading.Event()
        self._device = device
        self._run_dir = run_dir
        self._access = access
        self._store = store
        self._tell = tell
        self._control = DeviceControl.begin(run_dir, access)
        self._stream = device.stream()
        self._wanted: tuple[WantedModel, ...] = ()
        self._models: dict[int, ModelWriter] = {}  # by the model's id
        self._refused: dict[tuple[int, int], float] = {}  # (model, table) -> when it may be tried again
        self._reason = ""
        self._failed = False
        self._counts = Counts()
        self._fresh_ms = monotonic_ms()
        self._dropped: list[tuple[int, TableWriter]] = []  # and when their memory may be given back
        self._look_ms = 0
        self._wishes_ms = 0  # when wishes are looked at again
        self._busy_ms = 0  # when there was something to do last
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="ekko-device", daemon=True)
        self._write_manifest()

    # --- for the daemon's loop

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def close(self) -> None:
        """End, and tell readers; waits for the round that is being done."""
        self._stopping = True
        self.wake.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S_MAX)
        models, self._models = self._models, {}
        self._reason = "the node was stopped"
        self._write_manifest()
        if not self._thread.is_alive():
            for model in models.values():
                model.close()

    def want(self, models: tuple[WantedModel, ...]) -> None:
        """Have caches of these models and tables, and no others. Their feeds note changes already."""
        self._wanted = models
        self.wake.set()

    def picture(self) -> DevicePicture:
        """How it is now."""
        feeds = [model.feed for model in self._wanted]
        models = {
            model.wanted.name: {table.spec.name: table.figures for table in list(model.tables.values())}
            for model in list(self._models.values())
        }
        return DevicePicture(
            self._device.name,
            any(models.values()) and not self._failed,
            self._reason,
            max(0, monotonic_ms() - self._fresh_ms),
            sum(feed.waiting for feed in feeds),
            sum(feed.keys_max for feed in feeds),
            sum(feed.overflows for feed in feeds),
            asdict(self._counts),
            models,
        )

    def cache_of(self, model: int, table: int) -> EmbeddingCache:
        """One of the caches, by the ids of model and table."""
        return self._models[model].tables[table].cache

    # --- the thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.wake.clear()
                wishes = monotonic_ms() >= self._wishes_ms
                self.turn(wishes=wishes)
                self.wake.wait(POLL_S if monotonic_ms() - self._busy_ms < IDLE_MS else IDLE_POLL_S)
        except (DeviceError, StoreError, OSError) as error:
            self._fail(str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, the node serves from the host, and says so
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        """Readers go on without caches."""
        self._failed, self._reason = True, reason
        self._control.renew()
        self._models.clear()
        for model in self._wanted:
            model.feed.follow(())
        with suppress(OSError):  # it may be the disk that failed
            self._write_manifest()
        self._tell("device_failed", {"device": self._device.name, "reason": reason, "remedy": "start the node again"})

    def turn(self, *, wishes: bool = True) -> None:
        """Everything that is due, once; the thread does nothing else, and where there is none a test may.

        `wishes`: also what readers want.
        """
        began_ms = monotonic_ms()
        self._follow()
        reached = []
        for model in self._models.values():
            drained = model.wanted.feed.drain()
            if not drained.empty:
                self._busy_ms = began_ms
            for number in list(model.tables):
                self._at(model, number, lambda table, n=number, d=drained: table.take(d, n))  # type: ignore[misc]
            reached.append((model, drained.until))
        if wishes:
            self._grant()
        self._stream.synchronize()
        for model, until in reached:
            if until != model.applied:
                model.applied = until
                self._control.set_applied(model.place, until)
        self._fresh_ms = began_ms
        self._control.set_fresh(began_ms)
        self._bury()
        if monotonic_ms() >= self._look_ms:
            self._look_ms = monotonic_ms() + LOOK_MS
            for model in self._models.values():
                for table in model.tables.values():
                    table.look()

    def _grant(self) -> None:
        """Insert what readers missed; then nothing of it for as long as that took, however much they miss."""
        began_ms = monotonic_ms()
        for model in self._models.values():
            for number in list(model.tables):
                self._at(model, number, self._insert_wanted)
        now_ms = monotonic_ms()
        self._wishes_ms = 2 * now_ms - began_ms

    def _insert_wanted(self, table: TableWriter) -> None:
        if table.insert_wanted():
            self._busy_ms = monotonic_ms()

    def _at(self, model: ModelWriter, number: int, do: Callable[[TableWriter], None]) -> None:
        """Do something with a table that may have been dropped since."""
        try:
            do(model.tables[number])
        except FileNotFoundError:
            self._refuse(model.wanted, number, "")
            self._drop(model, [number])
            self._write_manifest()

    # --- which caches there are

    def _follow(self) -> None:
        """Make and drop caches, and tell readers of the new manifest."""
        wanted, changed = {one.id: one for one in self._wanted}, False
        for number, model in list(self._models.items()):
            new = wanted.get(number)
            same = new is not None and new.feed is model.wanted.feed  # else it is another model of the same id
            left = {table.spec.id for table in new.tables} if new is not None and same else set()
            gone = [table for table in model.tables if table not in left]
            self._drop(model, gone)
            if not same:
                del self._models[number]
            changed |= bool(gone) or not same
        for one in self._wanted:
            changed |= self._follow_model(one)
        if changed:
            self._write_manifest()

    def _follow_model(self, wanted: WantedModel) -> bool:
        """Make the caches that are lacking of one model; True: there are some more."""
        model = self._models.get(wanted.id)
        if model is not None:
            model.wanted = wanted
        elif (place := self._free_place()) is None:
            self._refuse(wanted, 0, f"model {wanted.name!r} has no caches: a node has them of {MODELS_MAX} models at most")
            return False
        else:
            model = ModelWriter(wanted, place)
        made = False
        for one in wanted.tables:
            at = (wanted.id, one.spec.id)
            if one.spec.id in model.tables or self._refused.get(at, 0.0) > time.monotonic():
                continue
            try:
                model.tables[one.spec.id] = TableWriter(self._device, self._stream, wanted, one, self._counts)
                self._refused.pop(at, None)
                made = True
            except (DeviceMemoryError, MemoryFullError) as error:
                reason = f"table {one.spec.name!r} of model {wanted.name!r} is served from the host: {error}"
                self._refuse(wanted, one.spec.id, reason)
            except FileNotFoundError:
                self._refuse(wanted, one.spec.id, "")
        if model.tables and wanted.id not in self._models:
            self._models[wanted.id] = model
        if made and not any(due > time.monotonic() for due in self._refused.values()):
            self._reason = ""
        return made

    def _free_place(self) -> int | None:
        taken = {model.place for model in self._models.values()}
        return next((place for place in range(MODELS_MAX) if place not in taken), None)

    def _refuse(self, model: WantedModel, table: int, reason: str) -> None:
        """Have no cache of this table for a while."""
        self._refused[model.id, table] = time.monotonic() + RETRY_S
        if reason and reason != self._reason:
            self._reason = reason
            self._tell("device_has_no_room", {"device": self._device.name, "reason": reason})
            self._write_manifest()

    def _drop(self, model: ModelWriter, tables: list[int]) -> None:
        """Have no caches of these tables any more; their memory is kept while look-ups may be at it that began before."""
        for table in tables:
            self._dropped.append((monotonic_ms() + KEEP_MS, model.tables.pop(table)))

    def _bury(self) -> None:
        while self._dropped and self._dropped[0][0] <= monotonic_ms():
            self._dropped.pop(0)[1].close()

    def _write_manifest(self) -> None:
        """Tell readers which caches there are. First the manifest, then its number: who sees that finds this one or a newer."""
        models = [
            ModelCaches(
                model.wanted.name,
                model.wanted.id,
                model.place,
                {number: table.entry() for number, table in model.tables.items()},
            )
            for model in self._models.values()
        ]
        for model in self._models.values():
            self._control.set_applied(model.place, model.applied)
        following = self._control.generation + 1
        DeviceManifest(following, self._device.name, self._store, self._reason, models).write(self._run_dir, self._access)
        self._control.renew()
