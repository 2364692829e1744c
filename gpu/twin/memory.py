"""The twin's memory: allocations that kernels' accesses are checked against, and how processes share one.

An address that a kernel gets has the number of its allocation in its upper 16 bits, so that an access which leaves the
allocation is caught even where it would hit another one. NumPy arrays over an allocation keep it alive.
"""

import bisect
import ctypes
import mmap
import os
import secrets
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu.errors import ArgumentError, DeviceError, DeviceMemoryError

TAG_SHIFT: Final = 48
TAGS: Final = 1 << 16  # 0 is no allocation

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class Memory:
    """All allocations of one twin."""

    def __init__(self, name: str, memory_bytes: int | None, undefined: int | None) -> None:
        """`memory_bytes`: how much there is, None: what the host has free. `undefined`: what new memory is filled with."""
        self._name = name
        self._memory_bytes = memory_bytes
        self._undefined = undefined
        self._used = 0
        self._lock = threading.RLock()  # a finalizer may run within any line of its holder
        self._free_tags: list[int] = []
        self._tags_end = 1
        self._bases: list[int] = []  # sorted
        self._tag_of: dict[int, int] = {}  # by base
        self._pinned: set[int] = set()  # bases
        self._exported: dict[int, tuple[int, str]] = {}  # base -> descriptor, name
        self.bases = (ctypes.c_uint64 * TAGS)()  # by tag, as the runtime reads them
        self.sizes = (ctypes.c_uint64 * TAGS)()

    @property
    def tags_end(self) -> int:
        """All tags in use are below it."""
        return self._tags_end

    def free_bytes(self) -> int:
        if self._memory_bytes is not None:
            return max(0, self._memory_bytes - self._used)
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return 0

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike, *, pinned: bool = False) -> npt.NDArray[Any]:
        """A new allocation of its own, which begins at a page. Raises `DeviceMemoryError`.

        Pinned memory is the host's: kernels may use it, and it takes none of the device's.
        """
        count = int(np.prod(shape, dtype=np.int64))
        size = count * np.dtype(dtype).itemsize
        free = self.free_bytes()
        if size > free and not pinned:
            raise DeviceMemoryError(size, free)
        try:
            # Of this process alone until it is exported.
            memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            raise DeviceMemoryError(size, free) from None
        array = self._adopt(memory, size, pinned).view(dtype).reshape(shape)
        if self._undefined is not None:
            array.reshape(-1).view(np.uint8)[:] = self._undefined
        return array

    def _adopt(self, memory: mmap.mmap, size: int, pinned: bool = False) -> npt.NDArray[np.uint8]:
        array = np.frombuffer(memory, np.uint8, size)
        base = array.ctypes.data
        with self._lock:
            if not self._free_tags and self._tags_end == TAGS:
                raise DeviceError(f"{self._name} has {TAGS - 1} arrays: drop some first")
            tag = self._free_tags.pop() if self._free_tags else self._tags_end
            self._tags_end = max(self._tags_end, tag + 1)
            self.bases[tag], self.sizes[tag] = base, size
            bisect.insort(self._bases, base)
            self._tag_of[base] = tag
            if pinned:
                self._pinned.add(base)
            else:
                self._used += size
        weakref.finalize(memory, self._release, base, size).atexit = False  # all of it goes with the process
        return array

    def _release(self, base: int, size: int) -> None:
        with self._lock:
            tag = self._tag_of.pop(base)
            self._bases.remove(base)
            self.bases[tag], self.sizes[tag] = 0, 0
            self._free_tags.append(tag)
            self._used -= 0 if base in self._pinned else size
            self._pinned.discard(base)
            exported = self._exported.pop(base, None)
        if exported is not None:
            os.close(exported[0])

    def _base_of(self, address: int) -> int | None:
        with self._lock:
            index = bisect.bisect_right(self._bases, address) - 1
            if index < 0:
                return None
            base = self._bases[index]
            return base if address < base + max(1, self.sizes[self._tag_of[base]]) else None

    def is_pinned(self, array: npt.NDArray[Any]) -> bool:
        return self._base_of(array.ctypes.data) in self._pinned

    def address(self, array: object) -> int:
        """With its tag; 0 for an array without elements. Raises `ArgumentError`."""
        if not isinstance(array, np.ndarray):
            raise ArgumentError(f"an array of {self._name} is needed, not {type(array).__name__}")
        if not array.flags.c_contiguous:
            raise ArgumentError(f"an array of {array.shape} is not C-contiguous")
        if array.size == 0:
            return 0
        base = self._base_of(array.ctypes.data)
        if base is None:
            raise ArgumentError(
                f"an array of {array.dtype}{list(array.shape)} is not of {self._name} but of the host: upload it first"
            )
        return int(array.ctypes.data) | self._tag_of[base] << TAG_SHIFT

    def export(self, array: npt.NDArray[Any]) -> dict[str, Any]:
        """Move the array's allocation, where it lies, to memory that another process can map; a handle of it.

        No kernel may run on the allocation meanwhile. The handle is good while this process lives and keeps the array.
        """
        tagged = self.address(array)
        base = self._base_of(array.ctypes.data) if tagged else None
        handle = {"device": self._name, "process": os.getpid(), "shape": list(array.shape), "dtype": array.dtype.str}
        if base is None:
            return handle | {"descriptor": -1, "name": "", "offset": 0, "size": 0}
        with self._lock:
            size = self.sizes[self._tag_of[base]]
            if base not in self._exported:
                self._exported[base] = self._share(base, size)
            descriptor, name = self._exported[base]
        return handle | {"descriptor": descriptor, "name": name, "offset": array.ctypes.data - base, "size": size}

    def _share(self, base: int, size: int) -> tuple[int, str]:
        # Memory without a name in any folder: it goes when its last process goes, however that ends.
        name = f"ekko-twin-{secrets.token_hex(8)}"
        descriptor = os.memfd_create(name)
        try:
            os.truncate(descriptor, size)
            with mmap.mmap(descriptor, size) as copy:
                copy[:] = ctypes.string_at(base, size)
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            if _LIBC.mmap(base, size, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0) == _MAP_FAILED:
                raise OSError(ctypes.get_errno(), "mmap")
        except OSError as error:
            os.close(descriptor)
            raise DeviceError(f"{self._name}: {size:,} bytes cannot be shared: {error}") from error
        return descriptor, name

    def open(self, handle: Mapping[str, Any]) -> npt.NDArray[Any]:
        """The array behind a handle; of this process, or of another. Raises `DeviceError`."""
        if handle["device"] != self._name:
            raise DeviceError(f"the cache is on {handle['device']}, not on {self._name}")
        shape, dtype = tuple(handle["shape"]), np.dtype(handle["dtype"])
        if handle["descriptor"] < 0:
            return self.empty(shape, dtype)
        path = Path("/proc") / str(int(handle["process"])) / "fd" / str(int(handle["descriptor"]))
        try:
            # The number may be another file's by now, and the process another one.
            if f"memfd:{handle['name']}" not in str(path.readlink()):
                raise FileNotFoundError("its process closed it")
            with path.open("r+b") as file:
                memory = mmap.mmap(file.fileno(), int(handle["size"]))
        except (OSError, ValueError) as error:
            raise DeviceError(f"the memory of process {handle['process']} is gone or not ours to open: {error}") from error
        offset, count = int(handle["offset"]), int(np.prod(shape, dtype=np.int64))
        end = offset + count * dtype.itemsize
        array: npt.NDArray[Any] = self._adopt(memory, int(handle["size"]))[offset:end].view(dtype).reshape(shape)
        return array
