"""Large files are mapped and unmapped in slices, by threads that live as long as that takes; they are for speed only."""

import _thread
import ctypes
import mmap
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ekko.store.memory import Mapping

# Mapping or unmapping so much takes some 0.01 ms, less than a look-up of 256 keys; between two slices others have the core, and
# the lock of the address space.
SLICE_BYTES: Final = 1 << 18
SLICE_PAUSE_S: Final = 0.0001
# Freeing less than this takes hardly longer than starting a thread and switching to it.
THREAD_BYTES_MIN: Final = 4 << 20

_MADV_POPULATE_READ: Final = 22  # madvise(2) number that Python does not name; Linux 5.14

# Not `mmap.madvise`, which keeps the interpreter lock.
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def populate(mapping: Mapping) -> None:
    """Map all pages of a file; they must be there already."""
    _advise(mapping, _MADV_POPULATE_READ)


def let_go(mapping: Mapping, keep_s: float) -> None:
    """See that a file is unmapped, and freed where nobody else has it, by another thread than this one.

    Args:
        mapping: of a file. The caller gives its reference up.
        keep_s: seconds for others that are using it; who takes longer finds its pages again, and frees the file in the end.
    """
    if len(mapping) >= THREAD_BYTES_MIN:

        def unmap() -> None:
            time.sleep(keep_s)
            _advise(mapping, mmap.MADV_DONTNEED)  # of a shared mapping: the pages stay in the file

        in_background(unmap)


def in_background(work: Callable[[], None]) -> None:
    """Do some work in a thread of its own, or, where there can be none, not at all."""
    with suppress(RuntimeError):  # too many threads, or the interpreter is ending
        _thread.start_new_thread(work, ())  # `threading.Thread.start` would wait until it runs


def _advise(mapping: Mapping, advice: int) -> None:
    for begin in range(0, len(mapping), SLICE_BYTES):
        if _madvise(mapping.address + begin, min(SLICE_BYTES, len(mapping) - begin), advice):
            return  # an older kernel
        time.sleep(SLICE_PAUSE_S)
