"""The caches of one node: which there are to be, and one of them with all that its writer needs."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ekko.device.feed import Drained, Feed
from ekko.device.manifest import TableCache
from ekko.device.settings import Policy
from ekko.device.source import NEWEST, StoreRows
from ekko.device.wanted import WantedKeys
from ekko.model import TableSpec
from ekko.store.memory import TmpfsMemory
from ekko.store.view import TableFiles
from gpu.backend import Device, Stream
from gpu.cache import EmbeddingCache

U64 = NDArray[np.uint64]

# Keys of one launch: their rows pass through host memory, and other threads of the daemon have their turn in between.
SLICE: Final = 8_192
RANK_MAX: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class WantedCache:
    """A table that is to have a cache."""

    spec: TableSpec
    rows: int
    policy: Policy


@dataclass(frozen=True, slots=True, eq=False)
class WantedModel:
    """A model with tables that are to have caches."""

    name: str
    id: int
    memory: TmpfsMemory
    feed: Feed
    hotness: Callable[[str, U64], NDArray[np.float64]]  # of a table: how often readers asked for each key lately
    tables: tuple[WantedCache, ...]


@dataclass(slots=True)
class Counts:
    """What became of rows on the way to the device, over all caches of this life; see `ekko.device.picture`."""

    updated: int = 0  # keys that changed in the store and were offered to a cache
    wanted: int = 0  # keys that readers asked for
    wanted_absent: int = 0  # of these, keys that the store does not have
    wanted_lost: int = 0  # wishes that were overwritten before they were read
    offered: int = 0  # rows that were missed, and offered
    compared: int = 0  # tables that were compared with the store, since too many changes waited


class TableWriter:
    """One cache, and where its rows come from. For the writer's thread.

    Raises:
        DeviceError: the device has no room, or cannot be used.
        StoreError: shared memory is full.
        FileNotFoundError: the table was dropped meanwhile.
    """

    def __init__(self, device: Device, stream: Stream, model: WantedModel, wanted: WantedCache, counts: Counts) -> None:
        spec = wanted.spec
        self.spec = spec
        self.name = f"{model.name}/{spec.name}"
        self.cache = EmbeddingCache(device, dim=spec.dim, codec=spec.codec, capacity=wanted.rows, policy=wanted.policy)
        self._handle = self.cache.handle()
        self.id = secrets.token_hex(8)
        self._rows = StoreRows(spec, TableFiles(model.memory, model.id, spec.id))
        self._by_priority = wanted.policy == "priority"
        self._hotness = partial(model.hotness, spec.name)
        self._wanted = WantedKeys(model.memory, model.id, spec.id)
        self._stream = stream
        self._counts = counts
        self._lost_before = 0
        self.figures: dict[str, Any] = {}  # as of the last look

    def entry(self) -> TableCache:
        """What the manifest says of it."""
        spec = self.spec
        path = str(self._wanted.path)
        return TableCache(spec.name, spec.dim, spec.codec, self.cache.shape.slots, self.id, self._handle, path)

    def take(self, drained: Drained, number: int) -> None:
        """Have what was drained of this table."""
        if number in drained.all_of:
            self.compare()
        for keys in drained.gone.get(number, ()):
            self.forget(keys)
        for keys in drained.changed.get(number, ()):
            self.update(keys)

    def update(self, keys: U64) -> None:
        """Have the rows of these keys as the store has them now, where they are cached; repeats do no harm."""
        for part in _slices(np.unique(keys)):
            present, stamps, rows, absent = self._rows.read(part)
            if present.size:
                self.cache.apply(present, stamps, rows, stream=self._stream)
            self._erase(absent)
            self._counts.updated += part.size

    def forget(self, keys: U64) -> None:
        """Have nothing of these keys, whatever their stamps."""
        for part in _slices(np.unique(keys)):
            self._erase(part)

    def _erase(self, keys: U64) -> None:
        if keys.size:
            self.cache.erase(keys, np.full(keys.size, NEWEST), stream=self._stream)

    def compare(self) -> None:
        """Have all that is cached as the store has it now. Costs a look at every row of the cache."""
        for held in self.cache.export(rows_max=SLICE, stream=self._stream):
            present, stamps, rows, absent = self._rows.read(held.keys)
            before = held.stamps[np.isin(held.keys, present)]
            # A row that went and came back may be an older version; it comes back to the cache when it is missed.
            self._erase(np.concatenate((absent, present[stamps < before])))
            newer = stamps > before
            if newer.any():
                self.cache.apply(present[newer], stamps[newer], np.ascontiguousarray(rows[newer]), stream=self._stream)
        self._counts.compared += 1

    def insert_wanted(self) -> bool:
        """Insert rows that readers missed, as the store has them now; False: they missed none."""
        wanted = self._wanted.take()
        self._counts.wanted_lost += self._wanted.lost - self._lost_before
        self._lost_before = self._wanted.lost
        if not wanted.size:
            return False
        self._counts.wanted += wanted.size
        for part in _slices(np.unique(wanted)):
            present, stamps, rows, absent = self._rows.read(part)
            if present.size:
                scores = self.cache.score(_ranks(self._hotness(present))) if self._by_priority else None
                self.cache.insert(present, stamps, rows, stream=self._stream, scores=scores)
            self._counts.offered += present.size
            self._counts.wanted_absent += absent.size
        return True

    def look(self) -> None:
        """Ask the device how it is, and see that readers can write what they want."""
        self._wanted.mend()
        self.figures = asdict(self.cache.stats())

    def close(self) -> None:
        """Nobody is to use it any more; its memory goes with this object."""
        Path(self._wanted.path).unlink(missing_ok=True)


@dataclass(slots=True)
class ModelWriter:
    """The caches of one model that are there."""

    wanted: WantedModel
    place: int  # of its word in the control file
    tables: dict[int, TableWriter] = field(default_factory=dict)  # by the table's id
    applied: int = 0

    def close(self) -> None:
        """The node ends."""
        for table in self.tables.values():
            table.close()


def _ranks(hotness: NDArray[np.float64]) -> U64:
    """What is asked for more often stays longer."""
    ranks: U64 = np.minimum(hotness, float(RANK_MAX)).astype(np.uint64)
    return ranks


def _slices(keys: U64) -> Iterator[U64]:
    for begin in range(0, keys.size, SLICE):
        yield keys[begin : begin + SLICE]
