"""Feature admission: a key is published from its n-th touch on, so that those seen once or twice cost nobody anything.

A touch is a call that would publish the key's row; several of one key in one call are one. The row that is published is the
one of the call that admits the key: the newest. Counts are a count-min sketch, so memory is bounded, and a key may be
admitted early by chance (less than one of a hundred is), never late.

There are two generations of the sketch. Touches are counted in the young one; when it has seen as many keys as it is made
for, it becomes the old one, the old one is cleared, and both are asked. A key that is admitted is written into the young one
at each touch, so that it stays admitted as long as no more than that many other keys are touched between two touches of it.
(Source: Yoon, "Aging Bloom Filter with Two Active Buffers for Dynamic Sets", 2010.)
"""

import threading
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ConfigError
from ekko.store.kernels.checks import last_occurrences
from ekko.store.kernels.touches import ROWS, touch

U64 = NDArray[np.uint64]

TOUCHES_MAX: Final = 255  # a counter is a byte
KEYS_DEFAULT: Final = 1 << 20
KEYS_MAX: Final = 1 << 30
# Counters of a row for each key of a generation: a quarter of them filled means that four are so by chance once in 256.
WIDTH_PER_KEY: Final = 4


class Admission:
    """Which keys of one table are published. Safe for threads.

    Args:
        touches: from which touch on a key is published; 1: from the first.
        keys: how many keys a generation is made for; takes 32 bytes each. At least as many as are in use at a time.

    Raises:
        ConfigError: a number is out of its limits.
    """

    def __init__(self, touches: int, keys: int = KEYS_DEFAULT) -> None:
        for what, number, largest in (("touches", touches, TOUCHES_MAX), ("keys", keys, KEYS_MAX)):
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= largest:
                raise ConfigError(f"admission has {what} {number!r}: expected a whole number from 1 to {largest}")
        self.touches = touches
        self.keys = keys
        self.held_back = 0  # rows that were not published
        width = 1 << (WIDTH_PER_KEY * keys - 1).bit_length()
        # Zeroed pages that cost nothing until they are used.
        self._young, self._old = (np.zeros((ROWS, width), np.uint8) for _ in range(2))
        self._room = np.array([keys], np.int64)  # in the young generation
        self._lock = threading.Lock()

    def admit(self, keys: U64) -> NDArray[np.bool_] | None:
        """Touch keys of uint64[n]; bool[n], which of their rows are to be published, or None: all."""
        if self.touches == 1 or keys.size == 0:
            return None
        last = last_occurrences(keys)
        asked = keys if last is None else keys[last]
        with self._lock:
            mask = self._touch(np.ascontiguousarray(asked))
            self.held_back += int(mask.size - np.count_nonzero(mask))
        if last is not None:  # of one that occurs twice, the last row counts
            whole = np.zeros(keys.size, np.bool_)
            whole[last] = mask
            return whole
        return None if mask.all() else mask

    def _touch(self, keys: U64) -> NDArray[np.bool_]:
        mask = np.zeros(keys.size, np.bool_)
        done = touch(keys, self.touches, self._young, self._old, self._room, mask)
        while done < keys.size:
            self._young, self._old = self._old, self._young
            self._young[...] = 0
            self._room[0] = self.keys
            done += touch(keys[done:], self.touches, self._young, self._old, self._room, mask[done:])
        return mask
