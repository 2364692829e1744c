"""Keys that readers miss on the device, on their way to the daemon, which inserts them.

A file a table, beside those of the store; readers of whatever user may write to it, if the node lets them count
(`ekko.store.hot`). Nothing in it is trusted: it is read by descriptor, so that a file that was cut short hurts nobody, and the
worst that a bad reader can do is to have the wrong rows in the cache.

Nothing depends on a wish being granted. One that is lost, overwritten by those of a lap later, is counted, and comes again with
the next look-up that misses the key.
"""

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels import wanted as kernels
from ekko.store.memory import Mapping, TmpfsMemory

U64 = NDArray[np.uint64]

CAPACITY_LOG2: Final = 14
CAPACITY: Final = 1 << CAPACITY_LOG2
# Of one look-up: what a batch misses in a cold cache should not push everybody else's wishes out.
POSTED_MAX: Final = 2_048
# Numbers that were given out since the last look, at most; more, and somebody wrote what nobody should.
_GROWTH_MAX: Final = 1 << 40
_BYTES: Final = kernels.ENTRIES + kernels.ENTRY_BYTES * CAPACITY


def file_name(model_id: int, table_id: int) -> str:
    """Of the table's file, below the store's prefix."""
    return f"{model_id:08x}-{table_id:08x}-wanted"


class WantedKeys:
    """The daemon's end.

    Raises:
        StoreError: shared memory is full.
    """

    def __init__(self, memory: TmpfsMemory, model_id: int, table_id: int) -> None:
        name = file_name(model_id, table_id)
        self.path = memory.path(name)
        self.lost = 0  # wishes that were overwritten, or half-written
        self._mapping = memory.create(name, _BYTES)
        self._mapping.let_readers_write()
        self._mapping.ensure(_BYTES)
        self._next = 0
        self._unfinished = -1  # the number at which we stopped last

    def take(self) -> U64:
        """uint64[n]: what was wanted since the last call, in order, repeats included; at most `CAPACITY`."""
        head = int(self._mapping.peek(kernels.HEAD))
        count = head - self._next & (1 << 64) - 1
        if count == 0:
            return np.empty(0, np.uint64)
        content = self._mapping.read()
        if count > _GROWTH_MAX or len(content) < _BYTES:
            self.mend()  # somebody cut it short, or wrote where nobody should
            self._next, self.lost = head, self.lost + 1
            return np.empty(0, np.uint64)
        if count > CAPACITY:
            self.lost += count - CAPACITY
            self._next, count = head - CAPACITY, CAPACITY
        entries = content[kernels.ENTRIES :].view(np.uint64).reshape(-1, 2)
        numbers = np.uint64(self._next) + np.arange(count, dtype=np.uint64)
        found = entries[(numbers & np.uint64(CAPACITY - 1)).astype(np.int64)]
        return self._finished(numbers, found)

    def mend(self) -> None:
        """Give the file its length back, if somebody cut it short: whoever writes to it then would be killed."""
        if self.path.exists() and self.path.stat().st_size < _BYTES:
            self._mapping.lengthen()

    def _finished(self, numbers: U64, found: U64) -> U64:
        """The keys up to the first that is still being written; that one is waited for once."""
        unfinished = np.flatnonzero(found[:, 1] < numbers + np.uint64(1))
        if unfinished.size and int(numbers[unfinished[0]]) != self._unfinished:
            end = int(unfinished[0])
            self._unfinished = int(numbers[end])
        else:
            end = len(numbers)
        self._next += end
        right = found[:end, 1] == numbers[:end] + np.uint64(1)
        self.lost += int(end - np.count_nonzero(right))
        keys: U64 = found[:end, 0][right]
        return keys


class WantedPost:
    """A reader's end."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping

    @classmethod
    def open(cls, path: Path) -> "WantedPost | None":
        """None: it is not there, or this process may not write to it, and its misses bring no row into the cache."""
        try:
            mapping = Mapping.open_to_count(path)
        except (OSError, ValueError):
            return None
        return cls(mapping) if len(mapping) == _BYTES else None

    def post(self, keys: U64) -> None:
        """Ask for these keys, C-contiguous; the first `POSTED_MAX` of them."""
        kernels.post(self._mapping.address, CAPACITY_LOG2, keys[:POSTED_MAX])
