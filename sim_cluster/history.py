"""What was acknowledged to publishers, and which of it somebody still holds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ekko.model import ModelSpec
from ekko.store import Store
from p2p.stamps import WRITERS_MAX, writer_of


@dataclass(frozen=True, slots=True)
class Write:
    """One acknowledged update, for the checkers."""

    table: str
    key: int
    stamp: int
    deleted: bool
    value: float
    model: str


def still_held(history: Sequence[Write], stores: Iterable[Store], models: Mapping[str, ModelSpec]) -> list[Write]:
    """The writes of which some store holds the row, in that version or a newer one, or has collected a newer tombstone."""
    stores = list(stores)
    held = [_stamps_held(store) for store in stores]
    kept = []
    for write in history:
        key = (write.model, models[write.model].tables[write.table].id, write.key)
        here = zip(stores, held, strict=True)
        if any(one.get(key, 0) >= write.stamp or (key not in one and _covers(store, write)) for store, one in here):
            kept.append(write)
    return kept


def _covers(store: Store, write: Write) -> bool:
    """Whether a store that does not have the key knows of this version: then a tombstone of it was collected (T6)."""
    replica = store.models.get(write.model)
    if replica is None:
        return False
    shard = int(replica.shards_of(np.array([write.key], np.uint64))[0])
    return int(replica.vector[shard, writer_of(write.stamp)]) >= write.stamp


def _stamps_held(store: Store) -> dict[tuple[str, int, int], int]:
    """(model, table, key) -> stamp of every row version a store holds, tombstones too."""
    held: dict[tuple[str, int, int], int] = {}
    for name, replica in store.models.items():
        for selection in replica.scan_since(np.zeros((replica.shards, WRITERS_MAX), np.uint64)):
            columns = replica.read(selection.table, selection.slots)
            assert columns.stamps is not None
            keys = ((name, columns.table, key) for key in columns.keys.tolist())
            held.update(zip(keys, columns.stamps.tolist(), strict=True))
    return held
