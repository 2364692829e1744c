"""Which rows of a model changed lately: a ring in shared memory, noted by the node, read by the processes that feed sinks.

The node never waits for a reader and knows none of them: it overwrites the oldest entries. Who finds that entries are missing
compares all rows with the vector that it had (`ekko.serve.comparing`). So the ring costs a bounded amount of memory, and each
row that is written one entry of 16 bytes.
"""

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.errors import MemoryFullError, StoreError
from ekko.store import layout
from ekko.store.kernels import changes as kernels
from ekko.store.kernels.atomics import publish_word, watch_word
from ekko.store.manifest import changes_name
from ekko.store.memory import Mapping, Memory

U64 = NDArray[np.uint64]

# Second word of an entry: the table, and this where the row is gone.
GONE: Final = 1 << 32
TABLE_MASK: Final = GONE - 1
_CAPACITY: Final = 1 << layout.CHANGES_LOG2
_ENTRIES: Final = layout.CHANGES.offset("entries")
_BREAKS: Final = layout.CHANGES.offset("breaks")
_HEAD: Final = layout.CHANGES.offset("head")
_HEADER: Final = (layout.CHANGES_MAGIC, layout.LAYOUT_VERSION, layout.CHANGES_LOG2)


class ChangeRing:
    """The node's side. For the thread that writes the model."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._head = 0

    @classmethod
    def attach(cls, model: int, memory: Memory, header: Mapping) -> "ChangeRing | None":
        """The ring of a model, made where there is none; what was not noted before this is known to be missing.

        Args:
            model: its id.
            memory: where its files are.
            header: the model's.

        Returns:
            None: the model is in memory of this process only, or there is no room: sinks compare all rows then.
        """
        if not header.is_file:
            return None
        try:
            ring = cls(_open_or_create(changes_name(model), memory))
        except MemoryFullError:
            memory.remove(changes_name(model))
            return None
        ring._head = watch_word(ring._mapping.address + _HEAD)
        ring._break()
        return ring

    def _break(self) -> None:
        address = self._mapping.address + _BREAKS
        publish_word(address, watch_word(address) + 1)

    @property
    def noted(self) -> tuple[int, int]:
        """Its `breaks`, and how many entries were noted, as `ChangesView` has them."""
        return int(watch_word(self._mapping.address + _BREAKS)), self._head

    def note(self, table: int, keys: U64) -> None:
        """Rows of these keys were written or deleted, or may have been; their batch has not ended yet."""
        self._note(table, keys)

    def note_gone(self, table: int, keys: U64) -> None:
        """Rows of these keys were dropped for good; likewise."""
        self._note(table | GONE, keys)

    def _note(self, what: int, keys: U64) -> None:
        if not keys.size:
            return
        if self._head < _CAPACITY:
            try:  # pages come as entries do, so that small models take little
                self._mapping.ensure(_ENTRIES + layout.CHANGE_BYTES * min(self._head + keys.size, _CAPACITY))
            except MemoryFullError:
                self._break()
                return
        if not (keys.flags.c_contiguous and keys.flags.aligned):
            keys = np.require(keys, np.uint64, ["C", "A"])
        kernels.note(self._mapping.address, _CAPACITY, keys, what)
        self._head += keys.size


def _open_or_create(name: str, memory: Memory) -> Mapping:
    """Raises MemoryFullError: there is no room."""
    try:
        mapping = memory.open(name)
        if len(mapping) == layout.changes_bytes() and tuple(map(int, mapping.words(0, len(_HEADER)))) == _HEADER:
            used = min(watch_word(mapping.address + _HEAD), _CAPACITY)
            mapping.find(_ENTRIES + layout.CHANGE_BYTES * used)
            return mapping
    except (OSError, ValueError, StoreError):
        pass  # there is none, or it is damaged: a new one, which nobody has an entry of
    mapping = memory.create(name, layout.changes_bytes())
    mapping.ensure(_ENTRIES)
    mapping.words(0, len(_HEADER))[...] = _HEADER
    return mapping


class ChangesView:
    """The side of another process.

    Raises:
        FileNotFoundError: the node keeps none.
        StoreError: it is damaged, or of another layout.
    """

    def __init__(self, mapping: Mapping) -> None:
        if len(mapping) < _ENTRIES or tuple(map(int, mapping.words(0, 2))) != _HEADER[:2]:
            raise StoreError("a changes file is damaged, or of another version of ekko")
        self.capacity = 1 << int(mapping.words(layout.CHANGES.offset("capacity_log2")))
        if len(mapping) < _ENTRIES + layout.CHANGE_BYTES * self.capacity:
            raise StoreError("a changes file is shorter than it says")
        self._mapping = mapping

    def is_of(self, path: Path) -> bool:
        """Whether this is the file that has this name now. Raises FileNotFoundError: there is none."""
        return self._mapping.is_of(path)

    @property
    def breaks(self) -> int:
        """Another number than before: changes are missing."""
        return watch_word(self._mapping.address + _BREAKS)

    @property
    def head(self) -> int:
        """Entries noted so far."""
        return watch_word(self._mapping.address + _HEAD)

    def read(self, begin: int, out: U64) -> int | None:
        """Copy entries from number `begin` on.

        Args:
            begin: the first.
            out: uint64[n, 2], written: keys; tables, with `GONE` or without.

        Returns:
            How many; None: entries are missing.
        """
        count = int(kernels.noted(self._mapping.address, self.capacity, begin, out))
        return None if count < 0 else count
