"""Memory of which there is only so much: anonymous, more or less of it as a test goes on; or a real, small tmpfs."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ekko.errors import MemoryFullError, StoreError
from ekko.store import Store
from ekko.store.memory import Mapping

TABLE_BYTES_MAX = 1 << 26


class SmallMemory:
    """`ekko.store.memory.Memory` that gives its mappings at most `limit` bytes of pages together."""

    def __init__(self, limit: int = 1 << 40) -> None:
        self.limit = limit
        self.taken = 0
        self.asked = 0  # refusals
        self._mapped: dict[str, _SmallMapping] = {}

    def create(self, name: str, size: int) -> Mapping:
        self.remove(name)
        mapping = _SmallMapping.anonymous(size)
        assert isinstance(mapping, _SmallMapping)
        mapping.memory, mapping.ensured = self, 0
        self._mapped[name] = mapping
        return mapping

    def open(self, name: str) -> Mapping:
        if name not in self._mapped:
            raise StoreError(f"{name}: there is no such memory")
        return self._mapped[name]

    def remove(self, name: str) -> None:
        if name in self._mapped:
            self.taken -= self._mapped.pop(name).ensured

    def fill(self) -> None:
        """From now on there is none."""
        self.limit = self.taken

    def store(self) -> Store:
        """A store in it."""
        return Store(self, TABLE_BYTES_MAX)


class _SmallMapping(Mapping):
    memory: SmallMemory

    def ensure(self, end: int) -> None:
        more = end - self.ensured
        if more <= 0:
            return
        if end > len(self) or self.memory.taken + more > self.memory.limit:
            self.memory.asked += 1
            raise MemoryFullError(f"shared memory is full: {more} more bytes were asked for")
        self.memory.taken += more
        self.ensured = end


@contextmanager
def small_tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of its own at a new folder; `size` as mount takes it. Skips the test where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
