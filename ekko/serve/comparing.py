"""Walks over a whole model, a bounded part at a time: rows that a sink may not have, and keys that a node may not have."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.serve.cursor import Known
from ekko.serve.sink import HELD_KEYS_MAX, Batch, Removed, Sink, rows_at_once
from ekko.serve.source import Source

U64 = NDArray[np.uint64]
Mask = NDArray[np.bool_]

_NONE: Final[U64] = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """Keys of one table that are to be read, each once.

    Args:
        table: its id.
        keys: uint64[n].
        stamps: uint64[n], what the sink has of each; None: that is not known.
    """

    table: int
    keys: U64
    stamps: U64 | None = None


class Walk:
    """All rows of a source above what was known, table by table. Changes are to be followed since before it began.

    Args:
        source: of which.
        base: what the sink has; None: nothing.
        new: names of tables of which it has nothing anyway.
    """

    def __init__(self, source: Source, base: Known | None, new: frozenset[str] = frozenset()) -> None:
        self.known = source.known()  # what the sink has when the walk has ended
        self.new = new
        source.refresh()  # after what is known: it covers rows of a table that came just before
        self._source = source
        self._base = _NONE if base is None else np.ascontiguousarray(base.vector.T).reshape(-1)
        nothing = np.zeros(source.shards, np.bool_)
        self._whole = nothing if base is None else source.whole_since(base, self.known)
        self._left = list(source.tables)
        self._slot = 0

    @property
    def finds_removals(self) -> bool:
        """Whether rows may have gone without a trace, so that the sink is to be asked what it has."""
        return not self._base.size or bool(self._whole.any()) or self._source.expires

    def next(self) -> Keys | None:
        """Keys of a part of the rows, maybe none; None: that was all. Tables that came later are not the walk's."""
        while self._left:
            table = self._left[0]
            if (view := self._source.tables.get(table)) is None:  # dropped meanwhile
                self._left.pop(0)
                continue
            keys = np.empty(rows_at_once(view.spec.dim), np.uint64)
            base = _NONE if view.spec.name in self.new else self._base
            count, self._slot, end = view.keys_above(self._slot, base, self._source.shards, self._whole, keys)
            if self._slot >= end:
                self._left.pop(0)
                self._slot = 0
            # A slot that changes hands while we pass may show a key twice.
            return Keys(table, np.unique(keys[:count]))
        return None


class Sweep:
    """All keys that a sink has, to be compared with what the node has: `difference`.

    Args:
        source: the node's.
        sink: which.
    """

    def __init__(self, source: Source, sink: Sink) -> None:
        self._parts = self._all(source, sink)

    def next(self) -> Keys | None:
        """A part of them; None: that was all."""
        return next(self._parts, None)

    @staticmethod
    def _all(source: Source, sink: Sink) -> Iterator[Keys]:
        for name, spec in source.specs.items():
            for keys, stamps in sink.held(name):
                assert keys.size <= HELD_KEYS_MAX, f"{type(sink).__name__}.held gives more than {HELD_KEYS_MAX} keys at once"
                at_once = rows_at_once(spec.dim)
                for begin in range(0, keys.size, at_once):
                    part = slice(begin, begin + at_once)
                    yield Keys(spec.id, *_each_once(keys[part], stamps[part]))


def _each_once(keys: U64, stamps: U64) -> tuple[U64, U64]:
    unique, places = np.unique(keys, return_index=True)
    return unique, stamps[places]


def difference(batch: Batch, held: Keys) -> Batch:
    """What of a batch, which was read for these keys, differs from what the sink has of them.

    A row that the sink has in a newer version than the node, which lost its memory, is forgotten first.
    """
    assert held.stamps is not None

    def before(keys: U64) -> U64:
        return held.stamps[np.searchsorted(held.keys, keys)]  # type: ignore[index]

    had = before(batch.keys)
    newer, changed = had > batch.stamps, had != batch.stamps
    undone = batch.deleted.keys[before(batch.deleted.keys) > batch.deleted.stamps]
    gone = np.concatenate((batch.forgotten.keys, undone, batch.keys[newer]))
    return Batch(
        batch.table, batch.keys[changed], batch.rows[changed], batch.stamps[changed], batch.deleted, Removed(gone, before(gone))
    )
