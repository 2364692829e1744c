"""What look-ups give, and how the host learns of the keys that they missed."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu.backend import Device, Stream
from gpu.errors import ArgumentError

I64 = NDArray[np.int64]

# All places of missed keys are copied, though few may be taken, where that is quicker than to wait for their number first:
# 64 KiB over PCIe take as long as a wait, some microseconds.
_KEYS_AT_ONCE_MAX = 1 << 13
_POLL_S = 20e-6  # between two looks at an event; a look-up of some thousand keys takes about as long


@dataclass(frozen=True, slots=True)
class Found:
    """What a look-up found, once its stream has come so far. Arrays of the device: keep it until then.

    rows: float32[n, dim], or of a pooled look-up float32[bags, dim]. A key that was missed has zeros, or adds none.
    stamps: uint64[n], 0 for a key that was missed; None of a pooled look-up.
    missed: int64[n]; the first `missed_count` are the indices of keys that were missed, in any order.
    missed_count: uint64[1].
    buffer: what the look-up needs while it runs, or None.
    """

    device: Device
    rows: Any
    stamps: Any
    missed: Any
    missed_count: Any
    buffer: Any = None

    def missed_indices(self, stream: Stream | None = None) -> I64:
        """int64[m], rising: the missed keys. Synchronises `stream`, the one of the look-up: once, or twice for many keys."""
        if len(self.missed) <= _KEYS_AT_ONCE_MAX:
            missed = MissedKeys(self.device, len(self.missed))
            missed.fetch(self, stream)
            return missed.wait_for_all()
        count = int(self.device.download(self.missed_count, stream=stream)[0])
        return np.sort(self.device.download(self.missed[:count], stream=stream))


class MissedKeys:
    """Pinned memory by which missed keys reach the host while it does something else; for one look-up at a time."""

    def __init__(self, device: Device, keys_max: int) -> None:
        """Raises `DeviceMemoryError` when there is no memory to pin."""
        self._device = device
        self._count = device.pinned(1, np.uint64)
        self._indices = device.pinned(keys_max, np.int64)
        self._event = device.event()

    def fetch(self, found: Found, stream: Stream | None = None) -> None:
        """Copy what `found` missed, in order with `stream`. Does not wait.

        Raises:
            ArgumentError: the look-up was of more keys than this has room for.
        """
        keys = len(found.missed)
        if keys > len(self._indices):
            raise ArgumentError(f"a look-up of {keys} keys: there is room for the misses of {len(self._indices)}")
        self._device.download(found.missed_count, self._count, stream)
        if keys:
            self._device.download(found.missed, self._indices[:keys], stream)
        self._event.record(stream)

    def wait(self, timeout_s: float) -> bool:
        """Wait for what was fetched, at most so long; whether it is here. Other streams' work goes on."""
        deadline = time.monotonic() + timeout_s
        while not self._event.done():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def wait_for_all(self) -> I64:
        """Wait for what was fetched; int64[m], rising: the missed keys."""
        self._event.synchronize()
        return self.indices()

    def indices(self) -> I64:
        """int64[m], rising: the missed keys, after `wait` said that they are here."""
        return np.sort(self._indices[: int(self._count[0])])
