"""Are the replicas equal? Read from the stores themselves, bit for bit, while the nodes run.

The rows files are mapped and read as their documented layout says, so that extra rows, tombstones and stamps are compared too,
which no look-up by key would show. The trained parameters are compared through a reader, which is how inference sees them.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ekko import Reader
from ekko.model import TableSpec, model_id
from ekko.store import layout
from ekko.store.manifest import read_manifest, rows_name
from ekko.store.memory import Mapping as MappedFile
from ekko.store.memory import TmpfsMemory

Contents = dict[str, NDArray[np.void]]


def contents(run_dir: Path, model: str) -> Contents:
    """Every row version that a node holds of a model, read from its shared memory.

    Returns:
        Table name, `_dense` included -> records (key, stamp, flags, data), sorted by key.
    """
    manifest = read_manifest(run_dir)
    entry = next((entry for entry in manifest.models if entry.name == model), None) if manifest else None
    if manifest is None or entry is None:
        return {}
    memory = TmpfsMemory(Path(manifest.memory_dir), manifest.prefix)
    return {table.name: _rows(memory.path(rows_name(model_id(model), table.id)), table) for table in entry.tables}


def _rows(path: Path, table: TableSpec) -> NDArray[np.void]:
    mapped = MappedFile.open_to_read(path)
    used = int(mapped.words(layout.TABLE.offset("rows_used"), 1)[0])
    stride = layout.row_stride(table.row_bytes)
    raw = mapped.words(layout.TABLE.offset("rows"), used * stride // 8).view(np.uint8)
    fields = {"key": np.uint64, "stamp": np.uint64, "flags": np.uint32, "data": (np.void, table.row_bytes)}
    stored = np.dtype(
        {
            "names": list(fields),
            "formats": list(fields.values()),
            "offsets": [layout.ROW.offset(name) for name in fields],
            "itemsize": stride,
        }
    )
    rows = raw.view(stored)
    packed = np.empty(used, np.dtype(list(fields.items())))
    for name in fields:
        packed[name] = rows[name]
    return packed[np.argsort(packed["key"])]


def difference(ours: Contents, theirs: Contents) -> str:
    """The first difference between two nodes in words; empty when there is none."""
    for table in sorted(ours.keys() | theirs.keys()):
        if table not in ours or table not in theirs:
            return f"table {table!r} is on one of them only"
        one, other = ours[table], theirs[table]
        if not np.array_equal(one["key"], other["key"]):
            return f"table {table!r}: different keys ({len(one)} and {len(other)} rows)"
        for field in ("stamp", "flags", "data"):
            wrong = np.flatnonzero(one[field] != other[field])
            if len(wrong):
                return f"table {table!r}: {len(wrong)} rows differ in {field}, first key {one['key'][wrong[0]]}"
    return ""


def difference_to_parameters(
    run_dir: Path, model: str, tables: Mapping[str, NDArray[np.float32]], tensors: Mapping[str, NDArray[np.float32]]
) -> str:
    """The first difference between what a reader of this node sees and trained parameters; empty when there is none.

    Args:
        run_dir: the node's.
        model: its name.
        tables: table -> float32[rows, dim]; the row index is the key.
        tensors: name -> dense parameter.
    """
    with Reader(model, run_dir) as reader:
        for table, rows in tables.items():
            seen = reader.lookup(table, np.arange(len(rows), dtype=np.uint64))
            wrong = np.flatnonzero((seen.view(np.uint32) != rows.view(np.uint32)).any(axis=1))
            if len(wrong):
                return f"table {table!r}: {len(wrong)} rows differ from the trained ones, first key {wrong[0]}"
        for name, value in tensors.items():
            if reader.dense(name).tobytes() != value.tobytes():
                return f"dense parameter {name!r} differs from the trained one"
    return ""
