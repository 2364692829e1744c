"""What is tested: a foreign store as a `Subject`, and batches that tests make by hand."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.serve.sink import HELD_KEYS_MAX, NOTHING, Batch, Removed, Sink
from p2p.stamps import make_stamp

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

MODEL: Final = "ctr"
BASE_MS: Final = 1_700_000_000_000


class Subject(ABC):
    """A foreign store, empty at first, and how to get at it.

    Attributes:
        tables: name -> dim of the tables that it has, or that may be added.
        keys: uint64[n], keys that it takes in each of them; at least 64.
        durable: what was committed is found by another sink of the same store.
    """

    tables: Mapping[str, int] = MappingProxyType({"item": 4, "user": 3})
    keys: U64 = np.concatenate((np.arange(100, dtype=np.uint64), np.uint64(2**64 - 1) - np.arange(28, dtype=np.uint64)))
    durable: bool = True

    @abstractmethod
    def sink(self) -> Sink:
        """A sink of this store, as a feed has that begins: a new one each time, unless the store is the sink."""

    @abstractmethod
    def rows(self, table: str, keys: U64) -> F32:
        """What a request would be answered with: float32[n, dim], zeros where there is no row."""

    def stored(self, rows: F32) -> F32:
        """What becomes of rows that are written and read again; of exact stores they are the same."""
        return rows


Case = Callable[[Subject], None]


def stamp(at: int) -> int:
    """The stamp of a moment of the test."""
    return make_stamp(BASE_MS + at, 0, 7)


def values(subject: Subject, table: str, keys: U64, at: int) -> F32:
    """Rows that only this key has at this moment; none is zero."""
    seed = (keys % np.uint64(1009)).astype(np.float64)[:, None] + 7.0 * at + np.arange(1, 1 + subject.tables[table])
    return (np.sin(seed) + 2).astype(np.float32)


def put(subject: Subject, keys: U64, at: int, table: str = "item", forgotten: Removed = NOTHING) -> Batch:
    """A batch of rows of one moment."""
    return Batch(table, keys, values(subject, table, keys, at), np.full(keys.size, stamp(at), np.uint64), forgotten=forgotten)


def gone(subject: Subject, keys: U64, at: int, table: str = "item", *, forget: bool = False) -> Batch:
    """A batch that deletes keys, or has them forgotten."""
    removed = Removed(keys, np.full(keys.size, stamp(at), np.uint64))
    empty = np.empty((0, subject.tables[table]), np.float32)
    nothing = np.empty(0, np.uint64)
    return Batch(table, nothing, empty, nothing, *((NOTHING, removed) if forget else (removed, NOTHING)))


def opened(subject: Subject) -> Sink:
    """A sink that a feed has opened and told of all tables."""
    sink = subject.sink()
    sink.open(MODEL)
    for table, dim in subject.tables.items():
        sink.add_table(table, dim)
    return sink


def expect(subject: Subject, keys: U64, at: int | None, why: str, table: str = "item") -> None:
    """What these keys are: rows of a moment, or absent."""
    wanted = np.zeros((keys.size, subject.tables[table]), np.float32)
    if at is not None:
        wanted = subject.stored(values(subject, table, keys, at))
    found = subject.rows(table, keys)
    wrong = np.flatnonzero((found != wanted).any(axis=1))
    assert not wrong.size, f"{why}: key {keys[wrong[0]]} of {table!r} is {found[wrong[0]]}, expected {wanted[wrong[0]]}"


def held(sink: Sink, table: str = "item") -> dict[int, int]:
    """What the sink says that it has: key -> stamp."""
    found: dict[int, int] = {}
    for keys, stamps in sink.held(table):
        assert 0 < keys.size == stamps.size <= HELD_KEYS_MAX, f"held gives {keys.size} keys and {stamps.size} stamps"
        found |= dict(zip(keys.tolist(), stamps.tolist(), strict=True))
    return found
