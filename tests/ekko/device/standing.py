"""A node's store and the writer of its device, in this process: started, or taken round by round by the test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ekko import Reader
from ekko.codec import encode
from ekko.device.check import CacheCheck, check_caches
from ekko.device.settings import CacheSettings, DeviceSettings, Policy
from ekko.device.writer import DeviceWriter
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.node.devices import Devices
from ekko.store import Store
from ekko.store.access import DEFAULT_ACCESS
from gpu.backend import Device, open_device
from p2p.replica import RowColumns

TWIN = "host-twin"
DIM = 6


class Standing:
    """One node. Use as a context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        codec: str = "float32",
        rows: int = 64,
        tables: Sequence[str] = ("item",),
        policy: Policy = "lru",
        device: Device | None = None,
    ) -> None:
        self.run_dir = folder / "node"
        self.codec = codec
        self.store = Store.open(self.run_dir)
        self.model = self.store.add_model(
            ModelSpec("ctr", 4, {name: TableSpec(name, DIM, codec) for name in tables}, codec=codec)
        )
        self.told: list[tuple[str, dict[str, object]]] = []
        self.settings = DeviceSettings(TWIN, CacheSettings(rows, None, policy), {})
        self.device = device or open_device(TWIN)
        self.begin()

    def begin(self) -> None:
        """A writer begins, as in a daemon that starts."""
        access, prefix = DEFAULT_ACCESS, self.store.memory.prefix
        self.writer = DeviceWriter(self.device, self.run_dir, access, prefix, lambda *told: self.told.append(told))
        self.devices = Devices(self.settings, self.store, self.writer)
        self.devices.follow()
        self.round()

    def __enter__(self) -> "Standing":
        return self

    def __exit__(self, *exception: object) -> None:
        self.devices.close()
        self.store.destroy()

    def round(self) -> None:
        """What the writer's thread does once."""
        self.writer.turn()

    def put(self, keys: Sequence[int], stamp: int, table: str = "item") -> None:
        """Rows that only this stamp has."""
        values = np.random.default_rng(stamp).standard_normal((len(keys), DIM)).astype(np.float32)
        self.apply(keys, encode(self.codec, values), stamp, table)

    def delete(self, keys: Sequence[int], stamp: int, table: str = "item") -> None:
        self.apply(keys, np.empty((0, self.model.spec.tables[table].row_bytes), np.uint8), stamp, table)

    def apply(self, keys: Sequence[int], rows: Any, stamp: int, table: str = "item") -> None:
        self.model.apply([RowColumns(table_id(table), np.array(keys, np.uint64), rows)], stamp)

    def remove(self, keys: Sequence[int], table: str = "item") -> None:
        """Drop rows for good, as an eviction does."""
        number = table_id(table)
        places = self.model.table(number).resolve(np.array(keys, np.uint64))
        self.model.remove(number, places[places >= 0], complete=False)

    def reader(self, **options: Any) -> Reader:
        return Reader("ctr", self.run_dir, device=TWIN, **options)

    def cached(self, table: str = "item") -> dict[int, int]:
        """Key -> stamp of all rows on the device."""
        cache = self.writer.cache_of(self.model.spec.id, table_id(table))
        return {
            key: stamp
            for batch in cache.export()
            for key, stamp in zip(batch.keys.tolist(), batch.stamps.tolist(), strict=True)
        }

    def check(self) -> list[CacheCheck]:
        return check_caches(self.run_dir)
