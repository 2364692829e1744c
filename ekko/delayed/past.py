"""What a rollback asks of a witness (`ekko.rollback.past.Past`), answered by its two stores and its log."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ekko.delayed.store import DelayedStore
from ekko.generations import Generation
from ekko.rollback.past import ChangedKeys, Versions

U64 = NDArray[np.uint64]

# Keys that are told at once: each piece reads the part of the log between the older state and the cut again, so few large ones.
PIECE_KEYS = 1 << 18
# Unix milliseconds, of the year 2109: later than anything.
NEVER_MS = 1 << 42


class DelayedPast:
    """The past of the models of one node.

    Args:
        delayed: both of its states.
    """

    def __init__(self, delayed: DelayedStore) -> None:
        self._delayed = delayed

    def _here(self, model: Generation) -> bool:
        return self._delayed.current.holds(model)

    def range(self, model: Generation) -> tuple[int, int] | None:
        """See `Past`."""
        if not self._here(model):
            return None
        newest_ms = self._delayed.valid_cut(model.name, NEVER_MS)
        return None if newest_ms is None else (self._delayed.oldest_cut(model.name), newest_ms)

    def mark(self, model: Generation, until_ms: int) -> int | None:
        """See `Past`: any moment that is known exactly will do."""
        return self._delayed.valid_cut(model.name, until_ms) if self._here(model) else None

    def changed_since(self, model: Generation, cut_ms: int) -> Iterator[ChangedKeys | None]:
        """See `Past`. A table is looked through at once, some milliseconds for a million rows."""
        for one in self._delayed.changes(model.name, cut_ms):
            for begin in range(0, len(one.keys), PIECE_KEYS):
                yield ChangedKeys(one.table, one.keys[begin : begin + PIECE_KEYS])
            yield None

    def at(self, model: Generation, cut_ms: int, table: int, keys: U64) -> Versions:
        """See `Past`."""
        found = self._delayed.at(model.name, cut_ms, table, keys)
        return Versions(found.live, found.stamps, found.rows)
