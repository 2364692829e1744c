"""What a sink in this process's memory has: of each row of a table the stamp of its version, so that only newer ones count.

9 bytes a row, and 8 more where keys are not row numbers.
"""

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ModelError
from ekko.serve.sink import HELD_KEYS_MAX, Batch, Removed

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
Places = Callable[[U64], I64]

_NOWHERE: Final = -1


class HeldRows:
    """Of one table.

    Args:
        table: its name, for errors.
        rows: how many there is room for.
        places: uint64[n] keys -> int64[n] row numbers, each key's always the same and no two keys' equal, -1 for keys that
            are to be left out; None: a key is a row number.
    """

    def __init__(self, table: str, rows: int, places: Places | None = None) -> None:
        self._table = table
        self._places = places
        self._stamps = np.zeros(rows, np.uint64)
        self._live = np.zeros(rows, np.bool_)
        self._keys = None if places is None else np.zeros(rows, np.uint64)

    def take(self, batch: Batch) -> tuple[I64, I64, F32]:
        """Note what of a batch counts.

        Returns:
            int64[n], rows that are to be cleared first; int64[m], rows that are to be written, and with what, float32[m, dim].

        Raises:
            ModelError: a key has no place. Nothing is noted.
        """
        placed = [self._place(keys) for keys in (batch.forgotten.keys, batch.deleted.keys, batch.keys)]
        forgotten = self._forget(placed[0], batch.forgotten)
        deleted, _ = self._newer(placed[1], batch.deleted.stamps)
        self._live[deleted] = False
        written, chosen = self._newer(placed[2], batch.stamps)
        self._live[written] = True
        if self._keys is not None:
            self._keys[written] = batch.keys[chosen]
        return np.concatenate((forgotten, deleted)), written, batch.rows[chosen]

    def _forget(self, places: I64, removed: Removed) -> I64:
        there = places != _NOWHERE
        there[there] = self._stamps[places[there]] <= removed.stamps[there]
        places = places[there]
        self._stamps[places] = 0
        self._live[places] = False
        return places

    def _newer(self, places: I64, stamps: U64) -> tuple[I64, NDArray[np.bool_]]:
        chosen = places != _NOWHERE
        chosen[chosen] = stamps[chosen] > self._stamps[places[chosen]]
        self._stamps[places[chosen]] = stamps[chosen]
        return places[chosen], chosen

    def _place(self, keys: U64) -> I64:
        rows = len(self._stamps)
        places = keys if self._places is None else self._places(keys).astype(np.int64, copy=False)
        if places.size and ((self._places is not None and int(places.min()) < _NOWHERE) or int(places.max()) >= rows):
            first = int(keys[np.flatnonzero((places >= rows) | (places.astype(np.int64) < _NOWHERE))[0]])
            raise ModelError(
                f"key {first} of table {self._table!r} has no place in {rows} rows: make the sink's table larger, or give "
                "places=, which tells the row of a key"
            )
        return places.astype(np.int64, copy=False)

    def clear(self) -> I64:
        """Forget all; returns int64[n], the rows that there were."""
        there = np.flatnonzero(self._live)
        self._stamps[:], self._live[:] = 0, False
        return there

    def held(self) -> Iterator[tuple[U64, U64]]:
        """As `Sink.held`."""
        for begin in range(0, len(self._stamps), HELD_KEYS_MAX):
            places = begin + np.flatnonzero(self._live[begin : begin + HELD_KEYS_MAX])
            if places.size:
                yield places.astype(np.uint64) if self._keys is None else self._keys[places], self._stamps[places]
