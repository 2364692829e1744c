"""What a reader has seen in shared memory must not be older on the device afterwards (invariant 7 over both tiers).

A key that was missed on the device was read in the store, maybe while a batch was written there that the device does not have
yet. The device may get the key meanwhile, in an older version: it was on its way there. So the epoch at which the store was
read is remembered, and what the device has of that key counts again when it has every batch up to that epoch.

Remembered is not the key but its place among some thousand: another key of the same place is read in the store once too often,
and no key too seldom. Keys that are always found on the device need nothing, so that hot ones hardly ever wait for the others.
"""

from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

PLACES_LOG2: Final = 14
# An odd number whose upper bits mix all of a key's: 2**64 / the golden ratio (Knuth, volume 3, 6.4).
_MIX = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(64 - PLACES_LOG2)


class Needed:
    """Of one model, as one reader has seen it. Threads may share it."""

    def __init__(self) -> None:
        self._epochs = np.zeros(1 << PLACES_LOG2, np.uint64)
        self._newest = 0
        self._lock = Lock()

    def note(self, keys: U64, epoch: int) -> None:
        """These keys were read in the store, and then its epoch was this; odd: a batch was being applied."""
        ended = epoch + (epoch & 1)
        with self._lock:
            places = _places(keys)
            self._epochs[places] = np.maximum(self._epochs[places], np.uint64(ended))
            self._newest = max(self._newest, ended)

    def behind(self, keys: U64, applied: int) -> NDArray[np.bool_] | None:
        """bool[n]: which keys the device, which has all batches up to `applied`, may have older than they were seen.

        None: none of them, which is told without a look at them.
        """
        if applied >= self._newest:
            return None
        found: NDArray[np.bool_] = self._epochs[_places(keys)] > np.uint64(applied)
        return found


def _places(keys: U64) -> NDArray[np.int64]:
    return ((keys * _MIX) >> _SHIFT).astype(np.int64)
