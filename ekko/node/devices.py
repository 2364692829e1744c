"""The daemon's side of rows on a device: which tables have caches there, as models and tables come and go."""

import asyncio
import sys

import structlog

from ekko.config import NodeConfig
from ekko.device.caches import WantedCache, WantedModel
from ekko.device.feed import Feed
from ekko.device.picture import DevicePicture
from ekko.device.settings import DeviceSettings
from ekko.device.warming import warm_writer
from ekko.device.writer import DeviceWriter
from ekko.errors import ConfigError
from ekko.store import Store
from ekko.store.model_store import ModelStore
from gpu.backend import Device, open_device
from gpu.errors import DeviceError

# A table that comes later is served from the host for so long.
FOLLOW_S = 0.1
# The writer's thread gives Python's lock back to the loop after so long. Each kernel of the store lets go of the lock, and
# waits for it again: with Python's own 5 ms a batch of 256 rows took up to 16 ms (p99, two busy cores), with this up to 6.
SWITCH_S = 0.0005

log = structlog.get_logger(__name__)


class Devices:
    """Of one life of a node. Use `devices_of`.

    Args:
        settings: what is cached.
        store: what readers of the node see.
        writer: of its device, not started.
    """

    def __init__(self, settings: DeviceSettings, store: Store, writer: DeviceWriter) -> None:
        self._settings = settings
        self._store = store
        self._writer = writer
        self._followed: dict[int, tuple[ModelStore, WantedModel]] = {}  # by the model's id

    async def run(self) -> None:
        """Until cancelled."""
        sys.setswitchinterval(SWITCH_S)
        self.follow()
        self._writer.start()
        while True:
            await asyncio.sleep(FOLLOW_S)
            self.follow()

    def follow(self) -> None:
        """Have the writer know of all models and tables that there are, and their changes noted."""
        models = {model.spec.id: model for model in self._store.models.values()}
        before = {number: wanted for number, (_, wanted) in self._followed.items()}
        for number, (model, _) in list(self._followed.items()):
            if models.get(number) is not model:
                model.changes = None
                del self._followed[number]
        for number, model in models.items():
            wanted = self._wanted_of(model)
            if wanted is not None:
                # From here on changes of its tables are noted; the writer makes their caches afterwards.
                wanted.feed.follow([table.spec.id for table in wanted.tables])
                model.changes = wanted.feed
                self._followed[number] = model, wanted
        after = {number: wanted for number, (_, wanted) in self._followed.items()}
        if after != before:
            self._writer.want(tuple(after.values()))

    def _wanted_of(self, model: ModelStore) -> WantedModel | None:
        """What is to be cached of a model; None: nothing, or nothing else than before."""
        spec = model.spec
        settings = self._settings.of(spec.name)
        rows = {table: settings.rows_of(table) for table in spec.tables.values()}
        tables = tuple(WantedCache(table, rows[table], settings.policy) for table in rows if rows[table] > 0)
        held = self._followed.get(spec.id)
        if held is None and not tables:
            return None
        if held is not None and held[1].tables == tables:
            return None
        feed = Feed(model.header, self._writer.wake) if held is None else held[1].feed
        return WantedModel(spec.name, spec.id, self._store.memory, feed, model.hotness, tables)

    def feed_of(self, model: ModelStore) -> Feed:
        """What notes the changes of a model that has caches."""
        return self._followed[model.spec.id][1].feed

    def picture(self) -> DevicePicture:
        """How it is."""
        return self._writer.picture()

    def close(self) -> None:
        """Before the store is closed."""
        for model, _ in self._followed.values():
            model.changes = None
        self._followed.clear()
        self._writer.close()


def open_configured(config: NodeConfig) -> Device | None:
    """The device of the configuration; None: there is none. Takes seconds where kernels are compiled.

    Raises:
        ConfigError: the device cannot be used.
    """
    if config.device is None:
        return None
    try:
        device = open_device(config.device.name)
        warm_writer(device)
    except DeviceError as error:
        raise ConfigError(f"device.name: {error}") from None
    log.info("device_open", device=device.name)
    return device


def devices_of(config: NodeConfig, device: Device | None, store: Store) -> Devices | None:
    """The caches of a node, none of which is there yet; None: it has no device."""
    if device is None or (settings := config.device_settings) is None:
        return None
    writer = DeviceWriter(device, config.node.run_dir, config.node.access, store.memory.prefix, _tell)
    return Devices(settings, store, writer)


def _tell(event: str, fields: dict[str, object]) -> None:
    log.warning(event, **fields)
