"""A table's index as its readers follow it from generation to generation, without a look-up that waits.

A look-up that finds the index replaced must use the new one: rows inserted since are in no other. What would make it wait is to
map the new index page by page, and to free the old one, of which it may hold the last mapping. So the writer tells of the next
index as soon as its pages are there, well before it is in use, and a thread that lives as long as that maps it in slices; and
the old one is let go by such a thread, too. The threads are for speed only: where there is none, for instance in a process that
was just forked, the look-up does their work.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from ekko.errors import StoreError
from ekko.store import layout
from ekko.store.kernels.atomics import watch_word
from ekko.store.locks import ForkSafeLock
from ekko.store.memory import Mapping
from ekko.store.slices import in_background, let_go, populate
from ekko.store.table import Index, open_index

# The index may be replaced again between a look at its generation and opening the file; a writer cannot do that often in a row.
REOPEN_ATTEMPTS_MAX: Final = 100
# So long the old index is kept for the look-ups that began with it. One that takes longer frees it itself, and loses little.
KEEP_S: Final = 0.1

_GENERATION: Final = layout.TABLE.offset("index_generation") // 8
_AHEAD: Final = layout.TABLE.offset("index_ahead") // 8


class NewestIndex:
    """The index in use, mapped read-only. Safe in any thread.

    Args:
        rows: the table's rows file, mapped.
        path: where the index file of a generation is.

    Raises:
        FileNotFoundError: the file is gone: the store was replaced.
        StoreError: it is damaged, or of another layout.
    """

    def __init__(self, rows: Mapping, path: Callable[[int], Path]) -> None:
        # A memoryview reads a word in 40 ns, in no order with other accesses: what it says is new is read again with one.
        self._header = rows.view(layout.TABLE.offset("rows"))
        self._address = rows.address
        self._path = path
        self._switching = ForkSafeLock()
        self._ahead: Index | None = None
        self._ahead_seen = 0  # the generation that somebody maps, or mapped, ahead
        self._index = self._open()

    def __call__(self) -> Index:
        """The index that holds every row that was inserted before this call; a reference to it keeps it mapped."""
        index = self._index
        header = self._header
        if header[_GENERATION] != index.generation:
            index = self._switch()
        if header[_AHEAD] != self._ahead_seen:
            self._look_ahead()
        return index

    def _look_ahead(self) -> None:
        with self._switching:
            generation = watch_word(self._address + 8 * _AHEAD)  # acquired: the file is there
            if generation == self._ahead_seen:
                return
            self._ahead_seen = generation
        if generation > self._index.generation:
            in_background(lambda: self._map_ahead(generation))

    def _map_ahead(self, generation: int) -> None:
        try:
            ahead = open_index(Mapping.open_to_read(self._path(generation)), generation)
        except (OSError, StoreError):
            return  # replaced already, or damaged: the look-up that needs it will say so
        with self._switching:
            if generation > self._index.generation:
                self._ahead = ahead
        # Should a look-up switch to it meanwhile, each slice still saves look-ups its faults.
        populate(ahead.mapping)

    def _switch(self) -> Index:
        with self._switching:
            old = self._index
            if self._header[_GENERATION] != old.generation:
                ahead, self._ahead = self._ahead, None
                self._index = self._open(ahead)
                let_go(old.mapping, KEEP_S)
            return self._index

    def _open(self, ahead: Index | None = None) -> Index:
        for _ in range(REOPEN_ATTEMPTS_MAX):
            generation = watch_word(self._address + 8 * _GENERATION)  # acquired: what the file holds is read after it
            path = self._path(generation)
            try:
                # A writer that was killed while it filled an index has begun another one, of the same generation.
                if ahead is not None and ahead.generation == generation and ahead.mapping.is_of(path):
                    return ahead
                mapping = Mapping.open_to_read(path)
            except FileNotFoundError:
                if generation != self._header[_GENERATION]:
                    continue  # the writer has replaced it meanwhile
                raise
            return open_index(mapping, generation)
        raise StoreError(f"{path} is replaced faster than it can be opened")
