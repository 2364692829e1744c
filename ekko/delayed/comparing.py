"""What stands in for a lost part of the log: both stores are compared, row by row, and the older one gets what it lacks.

The older state then has of every key the newest version up to the cut, unless the key was changed after the cut as well: of
that one a version may be lost. So nothing is known exactly before the newest row that is here when the comparison ends
(`History.compared`).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ekko.store.model_store import ModelStore
from ekko.store.table import Table
from p2p.replica import U64
from p2p.stamps import WRITERS_MAX

# Rows looked at between two breaks: a few milliseconds.
SLICE_ROWS = 1 << 16


def compare(current: ModelStore, older: ModelStore, cut: int) -> Iterator[int]:
    """Copy rows with stamps up to `cut` that the older store lacks or has older versions of; yields how many were looked at.

    Both models have the same tables. Rows that were dropped for good here go there, too.

    Raises:
        MemoryFullError: there is no room for them; what was copied stays.
    """
    everything = np.zeros(current.shards * WRITERS_MAX, np.uint64)
    for table in current.tables:
        begin = 0
        while begin < table.rows_used:
            places = table.scan(everything, current.shards, begin, begin + SLICE_ROWS)
            begin += SLICE_ROWS
            keys, stamps = table.heads(places)
            wanted = (stamps <= np.uint64(cut)) & (stamps > stamps_of(older.table(table.spec.id), keys))
            if wanted.any():
                older.copy([current.read(table.spec.id, places[wanted])])
            yield len(places)
    if len(current.floor_writers):
        yield from _drop_gone(current, older, everything)


def _drop_gone(current: ModelStore, older: ModelStore, everything: U64) -> Iterator[int]:
    """Rows whose tombstones were collected before they came, or were lost: they are absent there, and covered (T6)."""
    for table in older.tables:
        here = current.table(table.spec.id)
        begin = 0
        while begin < table.rows_used:
            places = table.scan(everything, older.shards, begin, begin + SLICE_ROWS)
            begin += SLICE_ROWS
            keys, stamps = table.heads(places)
            writers = (stamps & np.uint64(WRITERS_MAX - 1)).astype(np.int64)
            gone = (here.resolve(keys) < 0) & (current.vector[current.shards_of(keys), writers] >= stamps)
            if gone.any():
                older.remove(table.spec.id, places[gone], complete=True)
            yield len(places)


def stamps_of(table: Table, keys: U64) -> U64:
    """uint64[n]: the stamp that each key has, of its tombstone, too; 0 where it is absent."""
    places = table.resolve(np.ascontiguousarray(keys))
    present = places >= 0
    out = np.zeros(len(keys), np.uint64)
    out[present] = table.heads(np.ascontiguousarray(places[present]))[1]
    return out


def absent_in(table: Table, keys: U64) -> NDArray[np.bool_]:
    """bool[n]: whether the key is not there at all."""
    absent: NDArray[np.bool_] = table.resolve(np.ascontiguousarray(keys)) < 0
    return absent
