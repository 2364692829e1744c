"""Memory that the store's files live in: mapped tmpfs files, or anonymous memory for a simulated node.

Every file is as long as it may ever become and mapped once at that length, so that rows never move; tmpfs gives it pages only
where `Mapping.ensure` asked for them. Asking first (posix_fallocate) turns a full tmpfs into a `MemoryFullError`; touching a
page that tmpfs cannot supply would be a SIGBUS.

Not `multiprocessing.shared_memory`: its resource tracker unlinks segments under readers that are still using them.
"""

import errno
import fcntl
import mmap
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ekko.errors import MemoryFullError, StoreError
from ekko.store.access import DEFAULT_ACCESS, Access

U64 = NDArray[np.uint64]

# mmap(2) and madvise(2) numbers that Python does not name.
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23

_OWN = Access()


class Mapping:
    """A mapped file or piece of anonymous memory. It is unmapped when nobody refers to it or to an array over it."""

    def __init__(self, memory: mmap.mmap, descriptor: int | None = None) -> None:
        self._memory = memory
        self._descriptor = descriptor
        self._bytes = np.frombuffer(memory, np.uint8)
        self.address: int = self._bytes.__array_interface__["data"][0]
        self.ensured = 0 if descriptor is not None else len(memory)  # bytes from the start that have real pages
        self._file: tuple[int, int] | None = None  # device and inode, of one that is mapped to be read

    @classmethod
    def create(cls, path: Path, size: int, access: Access = _OWN) -> "Mapping":
        """Make a new file of `size` bytes, sparse and zero, and map it for writing."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            access.apply(descriptor, path)
            os.ftruncate(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        return cls._map(descriptor, size)

    @classmethod
    def open(cls, path: Path) -> "Mapping":
        """Map an existing file for writing."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        return cls._map(descriptor, os.fstat(descriptor).st_size)

    @classmethod
    def _map(cls, descriptor: int, size: int) -> "Mapping":
        try:
            memory = mmap.mmap(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        _advise_huge(memory)
        return cls(memory, descriptor)

    @classmethod
    def open_to_read(cls, path: Path) -> "Mapping":
        """Map an existing file so that writing to it is impossible."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            memory = mmap.mmap(descriptor, status.st_size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        _advise_huge(memory)
        mapping = cls(memory)
        mapping._file = status.st_dev, status.st_ino
        return mapping

    @classmethod
    def open_to_count(cls, path: Path) -> "Mapping":
        """Map a file that readers write to (`let_readers_write`).

        Raises:
            OSError: it is not there, or not ours to write.
            ValueError: it is empty.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(mmap.mmap(descriptor, os.fstat(descriptor).st_size))
        finally:
            os.close(descriptor)

    @classmethod
    def anonymous(cls, size: int) -> "Mapping":
        """Zeroed memory of this process that costs nothing until it is touched."""
        return cls(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE))

    @property
    def is_file(self) -> bool:
        """Whether others may have it mapped."""
        return self._descriptor is not None or self._file is not None

    def __len__(self) -> int:
        return len(self._memory)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]

    def mark_in_use(self) -> None:
        """Hold a shared lock on the file until this mapping ends, however the process ends; nothing of anonymous memory."""
        if self._descriptor is not None:
            with suppress(OSError):  # a tmpfs without locks
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)  # waits for a look of `ekko clean`, which is over at once

    def is_of(self, path: Path) -> bool:
        """Whether this, opened to read, is of the file that has this name now.

        Raises:
            FileNotFoundError: there is none.
        """
        status = path.stat()
        return self._file == (status.st_dev, status.st_ino)

    def words(self, offset: int, *shape: int) -> NDArray[np.uint64]:
        """Live uint64 array over the memory; it keeps the mapping alive."""
        return np.frombuffer(self._memory, np.uint64, prod(shape), offset).reshape(shape)

    def bytes(self, begin: int, count: int) -> memoryview:
        """Live bytes of the memory, to be read to or written from."""
        return memoryview(self._memory)[begin : begin + count]

    def view(self, end: int) -> memoryview:
        """The words below `end`, for reading them one by one from Python."""
        return memoryview(self._memory)[:end].cast("Q")

    def let_readers_write(self) -> None:
        """Let everybody write to the file who may read it."""
        if self._descriptor is not None:
            os.fchmod(self._descriptor, self.mode | (self.mode & 0o044) >> 1)

    @property
    def mode(self) -> int:
        """The file's mode; 0 of anonymous memory."""
        return 0 if self._descriptor is None else stat.S_IMODE(os.fstat(self._descriptor).st_mode)

    def read(self) -> NDArray[np.uint8]:
        """A copy of the file as long as it is now: safe where others may have cut it short, which the mapping is not."""
        if self._descriptor is None:
            return self._bytes.copy()
        out = np.empty(len(self), np.uint8)
        return out[: os.preadv(self._descriptor, [out.data], 0)]

    def peek(self, offset: int) -> int:
        """One word of the file; safe in the same way: 0 where it is too short."""
        if self._descriptor is None:
            return int(self.words(offset))
        return int.from_bytes(os.pread(self._descriptor, 8, offset), "little")

    def write(self, offset: int, values: U64) -> None:
        """Write into the file; safe in the same way."""
        if self._descriptor is None:
            self.words(offset, values.size)[...] = values
        else:
            os.pwrite(self._descriptor, values.tobytes(), offset)

    def lengthen(self) -> None:
        """Give a file that somebody cut short its length back, with real pages if there are any."""
        if self._descriptor is not None:
            with suppress(OSError):  # a full tmpfs: who asks for it may try again
                os.posix_fallocate(self._descriptor, 0, len(self))

    def find(self, end: int) -> None:
        """Know that whoever had the file before has real pages under all bytes below `end`.

        Raises:
            StoreError: the file is shorter.
        """
        if end > len(self):
            raise StoreError(f"a file is {len(self)} bytes long, and {end} are said to be in it")
        self.ensured = max(self.ensured, end)

    def ensure(self, end: int) -> None:
        """Have real pages under all bytes below `end`.

        Raises:
            MemoryFullError: tmpfs is full, or `end` lies beyond the mapping. What was there before is unchanged.
        """
        if end <= self.ensured:
            return
        if end > len(self):
            raise MemoryFullError(
                f"{end} bytes are needed and {len(self)} were reserved: open the store with a larger reservation"
            )
        assert self._descriptor is not None
        try:
            os.posix_fallocate(self._descriptor, self.ensured, end - self.ensured)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise MemoryFullError(
                f"shared memory is full: {end - self.ensured} more bytes were asked for; enlarge the tmpfs "
                "(mount -o remount,size=...) or free space in it"
            ) from error
        begin = self.ensured & -mmap.PAGESIZE
        with suppress(OSError):  # map the pages now and in one call, rather than with a fault each; only a matter of speed
            self._memory.madvise(_MADV_POPULATE_WRITE, begin, end - begin)
        self.ensured = end


def _advise_huge(memory: mmap.mmap) -> None:
    """Ask for huge pages, which tmpfs grants where it was mounted with huge=advise."""
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)


class Memory(Protocol):
    """Where a store makes its files."""

    def create(self, name: str, size: int) -> Mapping:
        """New zeroed memory under this name."""

    def open(self, name: str) -> Mapping:
        """Existing memory, for writing."""

    def remove(self, name: str) -> None:
        """Forget a name; memory still mapped stays usable."""


@dataclass(frozen=True, slots=True)
class TmpfsMemory:
    """Files `PREFIX-name` in a tmpfs directory."""

    directory: Path
    prefix: str
    access: Access = DEFAULT_ACCESS

    def path(self, name: str) -> Path:
        """The file of this name."""
        return self.directory / f"{self.prefix}-{name}"

    def create(self, name: str, size: int) -> Mapping:
        self.remove(name)  # a leftover of an attempt that failed, or of a writer that was killed
        try:
            return Mapping.create(self.path(name), size, self.access)
        except OSError as error:
            kind = MemoryFullError if error.errno == errno.ENOSPC else StoreError
            raise kind(f"cannot make {self.path(name)} ({size} bytes): {error.strerror}") from error

    def open(self, name: str) -> Mapping:
        return Mapping.open(self.path(name))

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class AnonymousMemory:
    """Memory of this process only, by the names that files would have."""

    _mapped: dict[str, Mapping] = field(default_factory=dict)

    def create(self, name: str, size: int) -> Mapping:
        mapping = self._mapped[name] = Mapping.anonymous(size)
        return mapping

    def open(self, name: str) -> Mapping:
        if name not in self._mapped:
            raise StoreError(f"{name}: there is no such memory")
        return self._mapped[name]

    def remove(self, name: str) -> None:
        self._mapped.pop(name, None)
