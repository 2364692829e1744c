"""Which rows of a model changed and are not on the device yet: keys that wait between the daemon's loop and its device writer.

The loop notes, the writer drains. Noting copies the keys and never waits for the device; what waits is bounded. Beyond the
bound the keys of that table are given up, and the writer compares everything of it that is cached with the store instead: a
cache has a fixed number of rows, so that this is bounded, too.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.kernels.atomics import watch_word
from ekko.store.memory import Mapping

U64 = NDArray[np.uint64]

# Keys of one model that wait, 8 bytes each. Four batches of 65,536 rows come before the writer has its turn as a rule.
KEYS_MAX: Final = 1 << 20

_EPOCH: Final = layout.MODEL.offset("batch_epoch")


@dataclass(slots=True)
class Drained:
    """What there is to do for the device to have everything of the store up to an epoch.

    Args:
        until: even; all batches that ended until then are among what was drained, now or before.
        gone: by table: rows that were dropped for good; done first.
        changed: by table: rows that were written.
        all_of: tables of which keys were given up.
    """

    until: int
    gone: dict[int, list[U64]] = field(default_factory=dict)
    changed: dict[int, list[U64]] = field(default_factory=dict)
    all_of: set[int] = field(default_factory=set)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.gone or self.changed or self.all_of)


class Feed:
    """Of one model.

    Args:
        header: the model's header file.
        wake: set when there is something to drain.
        keys_max: how many may wait.
    """

    def __init__(self, header: Mapping, wake: Event, keys_max: int = KEYS_MAX) -> None:
        self.keys_max = keys_max
        self.overflows = 0  # how often a table was given up
        self._header = header  # keeps the address valid
        self._epoch = header.address + _EPOCH
        self._wake = wake
        self._lock = Lock()
        self._tables: frozenset[int] = frozenset()
        self._waiting = 0
        self._next = Drained(0)

    @property
    def waiting(self) -> int:
        """Keys that wait."""
        return self._waiting

    def follow(self, tables: Collection[int]) -> None:
        """Note changes of these tables, and of no others. Of a table that is new here the cache must not have a row yet."""
        with self._lock:
            self._tables = frozenset(tables)

    # --- for the loop, which writes the store

    def note(self, table: int, keys: U64) -> None:
        """Rows of these keys were written; their batch has not ended yet."""
        self._add(table, keys, gone=False)

    def note_gone(self, table: int, keys: U64) -> None:
        """Rows of these keys were dropped for good; likewise."""
        self._add(table, keys, gone=True)

    def _add(self, table: int, keys: U64, *, gone: bool) -> None:
        if table not in self._tables or not keys.size:
            return
        with self._lock:
            following = self._next
            if table in following.all_of:
                return
            if self._waiting + keys.size > self.keys_max:
                self._give_up(table)
            else:
                # A copy: the keys are part of a message as a rule, which need not stay for them.
                (following.gone if gone else following.changed).setdefault(table, []).append(keys.copy())
                self._waiting += keys.size
        if not self._wake.is_set():
            self._wake.set()

    def _give_up(self, table: int) -> None:
        following = self._next
        for parts in (following.gone.pop(table, []), following.changed.pop(table, [])):
            self._waiting -= sum(part.size for part in parts)
        following.all_of.add(table)
        self.overflows += 1

    # --- for the writer of the device

    def drain(self) -> Drained:
        """Take what waits."""
        # Read first: keys are noted before their epoch ends, so those of all batches up to here are there.
        until = watch_word(self._epoch) & ~1
        with self._lock:
            taken, self._next = self._next, Drained(0)
            self._waiting = 0
        taken.until = until
        return taken
