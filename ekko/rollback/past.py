"""What a rollback asks of whoever keeps the past of a model: what changed since a moment, and how it was then.

The witness's delayed store and log (`ekko.delayed`) answer; tests have a simpler one.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ekko.delayed.store import DelayedStore
from ekko.generations import Generation
from p2p.values import dataclass

U64 = NDArray[np.uint64]

# Keys that are compared with one step; their rows, twice, are what a step takes in memory. Where what they were has to be found
# in the log, all of it is read for each step, and few steps are better; else a step is some milliseconds, since the witness has
# its part in the fence meanwhile.
PIECE_KEYS: Final = 1 << 16
PIECE_KEYS_SHORT: Final = 1 << 12


@dataclass(frozen=True, slots=True, eq=False)
class ChangedKeys:
    """Keys of one table of which some version is newer than the cut, whether they are there now or not."""

    table: int
    keys: U64  # [n], no repeats


@dataclass(frozen=True, slots=True, eq=False)
class Versions:
    """How the rows of some keys of one table were, or are: a live row, or none."""

    live: NDArray[np.bool_]  # [n]
    stamps: U64  # [n]; of a tombstone its own; 0: there was nothing
    rows: NDArray[np.uint8]  # [n, row_bytes]; of what does not live: zeros


@dataclass(frozen=True, slots=True, eq=False)
class Under:
    """What lies under the rows that some writers wrote after a mark."""

    versions: Versions  # the newest of others; else those of the mark
    held: U64  # [n]: stamps of what lies over them: of the newest version, also of a deletion that is forgotten; 0: not known
    newer: NDArray[np.bool_]  # [n]: it is newer than the mark
    unsure: NDArray[np.bool_]  # [n]: a newer one of others may have been there, that never came here


class Past(Protocol):
    """The past of the models of one witness. Moments are Unix milliseconds."""

    def range(self, model: Generation) -> tuple[int, int] | None:
        """From which moment up to which it can be told how the model was; None: nothing is kept of it."""

    def mark(self, model: Generation, until_ms: int) -> int | None:
        """The newest moment not later than this at which everything was here, in all shards (R15); None: there is none."""

    def changed_since(self, model: Generation, cut_ms: int) -> Iterator[ChangedKeys | None]:
        """What changed since a mark, in pieces of bounded size; None: nothing yet, let others have their turn."""

    def at(self, model: Generation, cut_ms: int, table: int, keys: U64) -> Versions:
        """How these rows were at a mark."""

    def under(self, model: Generation, cut_ms: int, table: int, keys: U64, writers: tuple[int, ...]) -> Under:
        """What there would be of these rows if those writers, by their ids, had written nothing after a mark."""

    def at_risk(self, model: Generation, cut_ms: int, wanted_ms: int) -> Iterator[tuple[int, U64, U64]]:
        """What was written after one moment and not after another: table, keys, and the stamps of the newest such versions."""


class DelayedPast:
    """As a witness keeps it."""

    def __init__(self, delayed: DelayedStore) -> None:
        self._delayed = delayed

    def range(self, model: Generation) -> tuple[int, int] | None:
        if self._delayed.current.generation(model.name) != model:
            return None
        newest = self._delayed.valid_cut(model.name, _ALWAYS_MS)
        return None if newest is None else (self._delayed.oldest_cut(model.name), newest)

    def mark(self, model: Generation, until_ms: int) -> int | None:
        return self._delayed.valid_cut(model.name, until_ms)

    def changed_since(self, model: Generation, cut_ms: int) -> Iterator[ChangedKeys | None]:
        keys_max = PIECE_KEYS if self._delayed.reads_log_at(model.name, cut_ms) else PIECE_KEYS_SHORT
        kept: list[U64] = []
        table = -1
        for changed in chain(self._delayed.changes(model.name, cut_ms), (None,)):
            if changed is not None and changed.table == table and sum(map(len, kept)) < keys_max:
                kept.append(changed.keys)
                yield None
                continue
            keys = np.concatenate(kept) if kept else np.empty(0, np.uint64)
            for begin in range(0, len(keys), keys_max):
                yield ChangedKeys(table, keys[begin : begin + keys_max])
            kept, table = ([], -1) if changed is None else ([changed.keys], changed.table)
            yield None

    def at(self, model: Generation, cut_ms: int, table: int, keys: U64) -> Versions:
        found = self._delayed.at(model.name, cut_ms, table, keys)
        return Versions(found.live, found.stamps, found.rows)

    def under(self, model: Generation, cut_ms: int, table: int, keys: U64, writers: tuple[int, ...]) -> Under:
        found = self._delayed.by_others(model.name, cut_ms, table, keys, np.array(writers, np.uint64))
        versions = Versions(found.under.live, found.under.stamps, found.under.rows)
        return Under(versions, found.held, found.newer, found.unsure)

    def at_risk(self, model: Generation, cut_ms: int, wanted_ms: int) -> Iterator[tuple[int, U64, U64]]:
        for changed in self._delayed.at_risk(model.name, cut_ms, wanted_ms):
            yield changed.table, changed.keys, changed.stamps


# Below 2**42 ms after the epoch of stamps.
_ALWAYS_MS: Final = 5_000_000_000_000
