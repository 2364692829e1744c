"""The runtime's C interface: the structures of runtime.h and twin.h, and the one call."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gpu.twin.memory import Memory

PARAMETERS_MAX: Final = 32
REPORT_BYTES: Final = 1024


class Entry(ctypes.Structure):
    """A kernel, as `KERNEL` exports it."""

    count: int
    threads_max: int
    _fields_ = (
        ("lane", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("threads_max", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("sizes", ctypes.c_uint32 * PARAMETERS_MAX),
        ("is_global", ctypes.c_uint32 * PARAMETERS_MAX),
    )


class Allocations(ctypes.Structure):
    """By tag."""

    _fields_ = (("bases", ctypes.c_void_p), ("sizes", ctypes.c_void_p), ("count", ctypes.c_uint32))


class Launch(ctypes.Structure):
    """One launch of a run."""

    _fields_ = (
        ("entry", ctypes.POINTER(Entry)),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("after", ctypes.POINTER(ctypes.c_uint32)),
        ("after_count", ctypes.c_uint32),
    )


class Options(ctypes.Structure):
    """How a run goes."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("accesses_max", ctypes.c_uint64),
        ("lanes_max", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("reads", ctypes.c_uint32),
        ("stores", ctypes.c_uint32),
        ("report_races", ctypes.c_uint32),
    )


class Counts(ctypes.Structure):
    """What a run did."""

    accesses: int
    switches: int
    stale: int
    delayed: int
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("accesses", "switches", "stale", "delayed"))


def launch(entry: Entry, grid: int, block: int, values: Sequence[bytes], after: Sequence[int]) -> Launch:
    """A launch whose arguments are `values`, in order."""
    buffers = [ctypes.create_string_buffer(value, len(value)) for value in values]
    pointers: Any = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, buffers))
    made = Launch(ctypes.pointer(entry), pointers, grid, block, (ctypes.c_uint32 * len(after))(*after), len(after))
    made.held = buffers  # the pointers are addresses only
    return made


class Library:
    """A compiled runtime."""

    def __init__(self, path: Path) -> None:
        self._run = ctypes.CDLL(str(path)).ekko_twin_run
        self._run.restype = ctypes.c_int

    def run(self, memory: Memory, launches: Sequence[Launch], options: Options) -> tuple[Counts, str]:
        """Run launches to their ends; without the interpreter's lock. Returns what was done, and one line if it failed."""
        table = Allocations(ctypes.addressof(memory.bases), ctypes.addressof(memory.sizes), memory.tags_end)
        counts, report = Counts(), ctypes.create_string_buffer(REPORT_BYTES)
        array = (Launch * len(launches))(*launches)
        failed = self._run(
            ctypes.byref(table), array, len(launches), ctypes.byref(options), ctypes.byref(counts), report, REPORT_BYTES
        )
        return counts, report.value.decode(errors="replace") if failed else ""
