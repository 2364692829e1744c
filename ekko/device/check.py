"""Are the rows on the device those of the store? Compared bit for bit, by another process, through the caches' own handles.

Of a node at rest every row of every cache has the stamp and the bytes that the store has. While rows are written there is no
such moment, so whoever asks waits until the device has all of the store's batches, and asks again where rows changed meanwhile.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ekko.device.control import DeviceControl
from ekko.device.manifest import ModelCaches, TableCache, read
from ekko.device.source import StoreRows
from ekko.errors import StoreError
from ekko.store import layout
from ekko.store.kernels.atomics import watch_word
from ekko.store.manifest import header_name, read_manifest
from ekko.store.memory import Mapping, TmpfsMemory
from ekko.store.view import TableFiles
from gpu.backend import Device, open_device
from gpu.batches import Batch
from gpu.reading import attach

POLL_S: Final = 0.005
_EPOCH: Final = layout.MODEL.offset("batch_epoch")


@dataclass(frozen=True, slots=True)
class CacheCheck:
    """What was found of one table's cache."""

    model: str
    table: str
    rows: int  # in the cache
    difference: str  # the first one, in words; empty: there is none


def check_caches(run_dir: Path, timeout_s: float = 10.0) -> list[CacheCheck]:
    """Compare all caches of a node with its store.

    Args:
        run_dir: the node's.
        timeout_s: for the device to catch up with the store, and for a moment at which nothing is written.

    Raises:
        StoreError: the node keeps no rows on a device, or the time was not enough.
        DeviceError: this process cannot open the device, or the caches' daemon is gone.
    """
    manifest, store = read(run_dir), read_manifest(run_dir)
    control = DeviceControl.open(run_dir)
    if manifest is None or store is None or control is None:
        raise StoreError(f"the node at {run_dir} keeps no rows on a device: add [device] to its node.toml")
    if manifest.store != store.prefix:
        raise StoreError(f"the caches of the node at {run_dir} are of another store than the one that it has")
    memory, device = TmpfsMemory(Path(store.memory_dir), store.prefix), open_device(manifest.device)
    specs = {model.bare_spec.id: {table.id: table for table in model.tables} for model in store.models}
    checks = []
    for model in manifest.models:
        for number, table in model.tables.items():
            rows = StoreRows(specs[model.id][number], TableFiles(memory, model.id, number))
            header = Mapping.open_to_read(memory.path(header_name(model.id)))
            checks.append(_check(device, control, model, table, rows, header, time.monotonic() + timeout_s))
    return checks


def _check(
    device: Device,
    control: DeviceControl,
    model: ModelCaches,
    table: TableCache,
    rows: StoreRows,
    header: Mapping,
    deadline: float,
) -> CacheCheck:
    address = header.address + _EPOCH
    cache = attach(device, table.handle)
    while True:
        epoch = watch_word(address)
        if not epoch & 1 and control.applied(model.place) >= epoch:
            held, difference = 0, ""
            for batch in cache.export():
                held += len(batch)
                difference = difference or _difference(batch, rows)
            # What was compared was all of one moment, if no batch came in between.
            if watch_word(address) == epoch:
                return CacheCheck(model.name, table.name, held, difference)
        if time.monotonic() > deadline:
            behind = f"the device has epoch {control.applied(model.place)} of {epoch}"
            raise StoreError(
                f"the cache of table {table.name!r} was never at rest: {behind}; stop what publishes, and try again"
            )
        time.sleep(POLL_S)


def _difference(held: Batch, rows: StoreRows) -> str:
    """The first difference between rows of the cache and those of the store."""
    order = np.argsort(held.keys)
    keys, stamps, data = held.keys[order], held.stamps[order], held.rows[order]
    if (keys[1:] == keys[:-1]).any():
        return f"key {keys[1:][keys[1:] == keys[:-1]][0]} is there twice"
    present, now, there, absent = rows.read(keys)
    if absent.size:
        return f"{absent.size} rows are not in the store any more, first key {absent[0]}"
    if (wrong := np.flatnonzero(stamps != now)).size:
        first = wrong[0]
        return f"{wrong.size} rows have another stamp, first key {present[first]}: {stamps[first]}, not {now[first]}"
    if (wrong := np.flatnonzero((data != there).any(axis=1))).size:
        return f"{wrong.size} rows have other bytes, first key {present[wrong[0]]}"
    return ""
