"""What an origin remembers of keys, in a bounded sketch: a number each, forgotten when another key takes its place.

One place a key, chosen by its hash, with 32 bits of the hash beside the number. Of two keys of one place the later one stays,
so what is lost is lost of the key that was noted first. Reading a key that is not there gives a default; taking another key's
number for one's own has a chance of one in four thousand million a look.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels import weighing

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

# Places: 1 MiB. What is noted of so many keys at once is remembered of two in three.
PLACES_LOG2: Final = 17

_SEED: Final = 0x9E3779B9


class KeyMemory:
    """A float32 for each of many keys. Takes no memory before something is noted."""

    def __init__(self) -> None:
        self._marks: NDArray[np.uint32] = np.empty(0, np.uint32)
        self._values: F32 = np.empty(0, np.float32)

    @property
    def empty(self) -> bool:
        """Whether nothing was ever noted."""
        return not self._marks.size

    def note(self, table: int, keys: U64, values: F32) -> None:
        """Remember a number of each key; of two keys with one place, that of the later one."""
        if not keys.size:
            return
        if not self._marks.size:
            self._marks = np.zeros(1 << PLACES_LOG2, np.uint32)
            self._values = np.zeros(1 << PLACES_LOG2, np.float32)
        weighing.note(np.uint64(table << 32 | _SEED), keys, values, self._marks, self._values)

    def recall(self, table: int, keys: U64, default: float) -> F32:
        """float32[n]: what was noted of each key."""
        out = np.empty(keys.size, np.float32)
        weighing.recall(np.uint64(table << 32 | _SEED), keys, default, self._marks, self._values, out)
        return out
