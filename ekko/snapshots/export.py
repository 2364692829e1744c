"""Export to safetensors: rows decoded, in the names that `ekko load` understands, so that what goes out comes back."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ekko.codec import decode
from ekko.errors import SnapshotError
from ekko.model import DENSE_TABLE
from ekko.snapshots.catalog import Catalog
from ekko.snapshots.files import KEYS_SUFFIX, STAMPS_SUFFIX, SafetensorsWriter
from ekko.snapshots.folders import open_folder
from ekko.snapshots.load import Loader, Progress, Wanted
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p.stamps import WRITERS_MAX

ROWS_AT_ONCE = 1 << 16


def export(url: str, model: str, path: Path, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Write a model of the newest sound snapshot of a folder to a safetensors file.

    Tables are NAME (F32 [rows, dim]), NAME.keys and NAME.stamps (U64 [rows]), in ascending order of the keys, without deleted
    rows; dense tensors have their names and shapes, and are F32; those that nobody published are left out.

    Raises:
        SnapshotError: no snapshot is sound, it has no such model, or the file cannot be written.
    """
    folder = open_folder(url)
    newest = Catalog(folder).newest()
    if newest is None:
        raise SnapshotError(f"there are no sound snapshots in {url}")
    chain = Catalog(folder).chain(newest.name)
    store = Store.anonymous(table_bytes_max=max(1 << 30, 2 * sum(entry.manifest.bytes for entry in chain)))
    Loader(folder, chain, Wanted(), progress=progress).fill(store)
    held = store.models.get(model)
    if held is None:
        raise SnapshotError(
            f"snapshot {newest.name} has no model {model!r}: it has {', '.join(map(repr, store.models)) or 'none'}"
        )
    unfinished = path.with_name(f"{path.name}.new")
    try:
        rows = _write(held, unfinished, newest.name)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise SnapshotError(f"{path} cannot be written: {error.strerror or error}") from None
    store.close()
    return {"name": newest.name, "model": model, "file": str(path), "rows": rows}


def _write(model: ModelStore, path: Path, snapshot: str) -> int:
    slots = {
        selection.table: selection.slots for selection in model.scan_since(np.zeros((model.shards, WRITERS_MAX), np.uint64))
    }
    tables = {name: _live(model, spec.id, slots.get(spec.id)) for name, spec in model.spec.tables.items()}
    dense = {}
    for name, spec_ in model.spec.tensors.items():
        rows, written = model.lookup(DENSE_TABLE, spec_.keys)
        if written.all():
            dense[name] = rows
    names = [name + suffix for name in tables for suffix in ("", KEYS_SUFFIX, STAMPS_SUFFIX)] + list(dense)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SnapshotError(f"two tables or tensors of model {model.spec.name!r} need the name {twice!r} in the file")
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (_, keys, _) in tables.items():
        layout[name] = "F32", (keys.size, model.spec.tables[name].dim)
        layout[name + KEYS_SUFFIX] = layout[name + STAMPS_SUFFIX] = "U64", (keys.size,)
    layout |= {name: ("F32", model.spec.tensors[name].shape) for name in dense}
    about = {"ekko": "1", "snapshot": snapshot, "model": json.dumps(asdict(model.entry()))}
    writer = SafetensorsWriter(path, layout, about)
    for name, (ordered, keys, stamps) in tables.items():
        spec = model.spec.tables[name]
        for begin in range(0, keys.size, ROWS_AT_ONCE):
            part = model.read(spec.id, ordered[begin : begin + ROWS_AT_ONCE])
            writer.write(decode(spec.codec, part.rows, spec.dim))
        writer.write(keys)
        writer.write(stamps)
    for name, rows in dense.items():
        spec_ = model.spec.tensors[name]
        writer.write(rows.reshape(-1)[: int(np.prod(spec_.shape))])
    writer.close()
    return sum(keys.size for _, keys, _ in tables.values())


def _live(
    model: ModelStore, table: int, slots: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Slots, keys and stamps of the live rows, by ascending key."""
    if slots is None:
        return np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.uint64)
    name = next(spec.name for spec in model.table_specs if spec.id == table)
    found = model.read(table, slots)
    keys = np.sort(found.keys[: len(found.rows)])
    held = model.table(table).resolve(keys)
    _, stamps = model.lookup(name, keys)
    alive = stamps != 0
    return held[alive], keys[alive], stamps[alive]
