"""The one file that the device's writer and its readers have both mapped: is the cache alive, and how far is it?

It lies in the node's run_dir, not with the store: a daemon that starts again finds the one that the readers of the daemon
before it have mapped, and its first word to them is that their caches are gone. It is never replaced.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from ekko.device.manifest import NAME as MANIFEST
from ekko.errors import StoreError
from ekko.store.access import Access
from ekko.store.kernels.atomics import publish_word, watch_word
from ekko.store.memory import Mapping

NAME: Final = "device-control"
MAGIC: Final = int.from_bytes(b"ekkodevc", "little")
VERSION: Final = 1
BYTES: Final = 4096
# Models whose caches one node can have; each has a word.
MODELS_MAX: Final = 256

# Offsets, in bytes. Words with different rhythms lie on different lines.
_GENERATION: Final = 64  # grows with each device manifest; 0: there was none yet
_FRESH_MS: Final = 128  # CLOCK_MONOTONIC milliseconds: the caches have all that was in the store at that moment
_APPLIED: Final = 1024  # uint64 for each place of a model: the device has every batch that ended until this epoch of it


class DeviceControl:
    """The file as one side has it mapped. Use `begin` or `open`."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._address = mapping.address
        self._words = mapping.view(BYTES)

    @classmethod
    def begin(cls, run_dir: Path, access: Access) -> "DeviceControl":
        """For the daemon, whose run_dir it is: the file as it lies there, or a new one. Readers let go of older caches.

        Raises:
            StoreError: it cannot be made.
        """
        path = run_dir / NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                access.apply(descriptor, path)
                if os.fstat(descriptor).st_size != BYTES:
                    os.ftruncate(descriptor, BYTES)
            finally:
                os.close(descriptor)
            mapping = Mapping.open(path)
        except OSError as error:
            raise StoreError(f"{path} cannot be made: {error.strerror}") from error
        control = cls(mapping)
        mapping.words(0, 2)[...] = (MAGIC, VERSION)
        control.renew()
        return control

    @classmethod
    def open(cls, run_dir: Path) -> "DeviceControl | None":
        """For a reader; None: this node has, and had, no caches.

        Raises:
            PermissionError: it is not for us to read.
        """
        try:
            mapping = Mapping.open_to_read(run_dir / NAME)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: it is empty, just being made
            return None
        if len(mapping) != BYTES or mapping.words(0, 2).tolist() != [MAGIC, VERSION]:
            return None
        return cls(mapping)

    # --- for the daemon

    def renew(self) -> int:
        """Another generation: whoever has opened caches of an earlier one uses them no more; returns it."""
        generation = watch_word(self._address + _GENERATION) + 1
        publish_word(self._address + _GENERATION, generation)
        return generation

    def set_applied(self, place: int, epoch: int) -> None:
        """The caches of the model at this place have every batch that ended until this epoch."""
        publish_word(self._address + _APPLIED + 8 * place, epoch)

    def set_fresh(self, monotonic_ms: int) -> None:
        """All caches have what was in the store at this moment."""
        publish_word(self._address + _FRESH_MS, monotonic_ms)

    # --- for readers

    @property
    def generation(self) -> int:
        """Of the caches that may be used now."""
        return self._words[_GENERATION // 8]

    def settled_generation(self) -> int:
        """The same; what the daemon wrote before it is visible afterwards."""
        return watch_word(self._address + _GENERATION)

    def applied(self, place: int) -> int:
        """Up to which epoch the device has everything of a model; what is looked up afterwards has it."""
        return watch_word(self._address + _APPLIED + 8 * place)

    def behind_ms(self) -> int:
        """By how much, at most, what is on the device is older than what is in the store."""
        return monotonic_ms() - self._words[_FRESH_MS // 8]


def retire(run_dir: Path) -> None:
    """The caches of a daemon before this one are gone: readers that outlived it are told, if there are any."""
    (run_dir / MANIFEST).unlink(missing_ok=True)
    with suppress(OSError, ValueError):
        mapping = Mapping.open(run_dir / NAME)
        if len(mapping) == BYTES:
            DeviceControl(mapping).renew()


def monotonic_ms() -> int:
    """Of the machine's monotonic clock, the same in all processes."""
    return time.monotonic_ns() // 1_000_000
