"""Snapshots of a virtual node's store, taken while it goes on writing, and what comes of one that is restored later (T5).

The order is the theorem's: the vector, then the slabs, table by table as time passes, then the loss floor. Restored, it is the
memory of a node that lost its own: it has no writer id (R4).
"""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from ekko.model import ModelSpec
from ekko.store import Store
from p2p import messages as m
from p2p.placement import take
from p2p.replica import RowColumns
from p2p.stamps import WRITER_MASK, WRITERS_MAX

U64 = NDArray[np.uint64]


class Snapshot:
    """One snapshot, as far as it was taken.

    Args:
        store: of which.
        models: those that are in it.
    """

    def __init__(self, store: Store, models: Mapping[str, ModelSpec]) -> None:
        self._store = store
        self._models = models
        self._vectors: dict[str, tuple[U64, U64]] = {}
        self._rows: dict[str, list[RowColumns]] = {name: [] for name in models}
        self._floors: dict[str, tuple[NDArray[np.uint16], U64]] = {}

    def take_vectors(self) -> None:
        """First."""
        for name in self._models:
            model = self._store.models[name]
            self._vectors[name] = (model.vector.copy(), model.frontiers.copy())

    def take_rows(self, part: int, parts: int) -> None:
        """Then, as time passes, every part of the keys."""
        for name in self._models:
            model = self._store.models[name]
            for selection in model.scan_since(np.zeros((model.shards, WRITERS_MAX), np.uint64)):
                columns = model.read(selection.table, selection.slots)
                self._rows[name].append(take(columns, np.flatnonzero(columns.keys % np.uint64(parts) == part)))

    def take_floors(self) -> None:
        """Last."""
        for name in self._models:
            model = self._store.models[name]
            writers = model.floor_writers
            self._floors[name] = (writers, model.loss_floor[:, writers].copy())

    def has_more_than_left(self, retired: Iterable[m.Retired]) -> bool:
        """Whether it knows of steps of a retired writer, or has rows of them, that were given up (R13)."""
        for one in retired:
            for name, spec in self._models.items():
                if one.stage == m.FROZEN or one.keyspace != spec.id:
                    continue
                model = self._store.models[name]
                held = self._vectors[name][0][:, one.writer].copy()
                for columns in self._rows[name]:
                    assert columns.stamps is not None
                    own = columns.stamps & np.uint64(WRITER_MASK) == one.writer
                    np.maximum.at(held, model.shards_of(columns.keys[own]), columns.stamps[own])
                if (held > one.floor).any():
                    return True
        return False

    def restore(self, into: Store) -> None:
        """Fill an empty store with it."""
        for name, spec in self._models.items():
            model = into.add_model(spec, hold=self._store.models[name].hold)
            for columns in self._rows[name]:
                model.apply([columns], 0)
            writers, floor = self._floors[name]
            model.merge_floor(np.arange(model.shards, dtype=np.uint32), writers, floor)
            vector, frontiers = self._vectors[name]
            model.vector[...] = vector
            model.frontiers[...] = frontiers
