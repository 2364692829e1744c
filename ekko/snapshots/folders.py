"""Where snapshots lie: a folder of this machine, or any URL that fsspec knows.

Names are relative, with `/`. A file appears whole or not at all only through `put`; that is what a snapshot's manifest is
written with. Object stores have no rename, and need none: an object appears when its upload ends.
"""

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ekko.errors import ConfigError, SnapshotError

BLOCK_BYTES = 16 << 20  # of an upload or a read-ahead in an object store
MANIFEST = "manifest.json"  # the file that makes a folder a snapshot; written last
LOCK = "lock"  # held by who writes


class Sink(Protocol):
    """A file that is being written."""

    def write(self, data: memoryview) -> None:
        """Append."""

    def close(self) -> None:
        """Have it written durably."""

    def abandon(self) -> None:
        """Let go of it as it is."""


class Source(Protocol):
    """A file that is being read from its beginning."""

    def readinto(self, target: memoryview) -> int:
        """Fill `target`; fewer bytes only at the end."""

    def close(self) -> None:
        """Let go of it."""


class Folder(Protocol):
    """A place for snapshots. Every method raises `SnapshotError` when the place fails."""

    url: str

    def names(self) -> list[str]:
        """What is directly in it, sorted."""

    def has(self, path: str) -> bool:
        """Whether there is such a file; who cannot tell raises, since what is not there is removed."""

    def size(self, path: str) -> int | None:
        """Bytes of a file; None where the place does not say."""

    def locked(self) -> AbstractContextManager[None]:
        """Be the only process that writes here, where the place can tell."""

    def create(self, path: str) -> Sink:
        """A new file; the folders on the way are made."""

    def put(self, path: str, data: bytes) -> None:
        """A new file, whole or not at all, durable on return."""

    def open(self, path: str) -> Source:
        """An existing file."""

    def get(self, path: str, bytes_max: int) -> bytes:
        """A whole file, no longer than that."""

    def remove(self, name: str) -> None:
        """What is directly in it under this name, with all that is below; the manifest goes first."""


def open_folder(url: str) -> Folder:
    """The folder of a path or URL.

    Raises:
        ConfigError: fsspec does not know such URLs, or lacks the package for them.
    """
    if "://" not in url and "::" not in url:
        return LocalFolder(Path(url))
    if url.startswith("file://"):
        return LocalFolder(Path(url.removeprefix("file://")))
    import fsspec.core
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"{url} cannot be used for snapshots: {error}") from None
    if type(system) is LocalFileSystem:  # by another spelling: what this says of durability holds there, too
        return LocalFolder(Path(str(path)))
    return RemoteFolder(url, system, str(path))


def _failed(url: str, error: OSError) -> SnapshotError:
    return SnapshotError(f"{url}: {error.strerror or error}")


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.url = str(path)
        self._path = path

    def names(self) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self._path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _failed(self.url, error) from None

    def has(self, path: str) -> bool:
        try:
            return stat.S_ISREG((self._path / path).stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise _failed(str(self._path / path), error) from None

    def size(self, path: str) -> int | None:
        try:
            return (self._path / path).stat().st_size
        except OSError as error:
            raise _failed(str(self._path / path), error) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise _failed(self.url, error) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SnapshotError(
                    f"another process writes snapshots to {self.url}: give each node a folder, or an id, of its own"
                ) from None
            except OSError:
                pass  # a file system without locks
            yield
        finally:
            os.close(descriptor)

    def create(self, path: str) -> Sink:
        whole = self._path / path
        try:
            whole.parent.mkdir(parents=True, exist_ok=True)
            return _LocalSink(whole)
        except OSError as error:
            raise _failed(str(whole), error) from None

    def put(self, path: str, data: bytes) -> None:
        sink = self.create(f"{path}.new")
        sink.write(memoryview(data))
        sink.close()
        whole = self._path / path
        try:
            (self._path / f"{path}.new").replace(whole)
            for folder in (whole.parent, whole.parent.parent):  # the new names, too, must survive
                _sync(folder)
        except OSError as error:
            raise _failed(str(whole), error) from None

    def open(self, path: str) -> Source:
        try:
            return _LocalSource(self._path / path)
        except OSError as error:
            raise _failed(str(self._path / path), error) from None

    def get(self, path: str, bytes_max: int) -> bytes:
        whole = self._path / path
        try:
            if whole.stat().st_size > bytes_max:
                raise SnapshotError(f"{whole} is larger than {bytes_max} bytes")
            return whole.read_bytes()
        except OSError as error:
            raise _failed(str(whole), error) from None

    def remove(self, name: str) -> None:
        whole = self._path / name
        try:
            (whole / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(whole)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _failed(str(whole), error) from None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _LocalSink:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)

    def write(self, data: memoryview) -> None:
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise _failed(str(self._path), error) from None

    def close(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise _failed(str(self._path), error) from None
        finally:
            self.abandon()

    def abandon(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _LocalSource:
    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def readinto(self, target: memoryview) -> int:
        done = 0
        try:
            while done < len(target):
                count = self._file.readinto(target[done:])
                if not count:
                    break
                done += count
        except OSError as error:
            raise _failed(self._file.name, error) from None
        return done

    def close(self) -> None:
        self._file.close()


@contextmanager
def _named(url: str) -> Iterator[None]:
    """One error for whatever fails in there: the libraries of object stores raise what they like."""
    try:
        yield
    except SnapshotError:
        raise
    except Exception as error:  # noqa: BLE001 - see above; a place that fails must not end a node
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise SnapshotError(f"{url}: {said}") from None


class RemoteFolder:
    """A prefix in whatever fsspec reaches."""

    def __init__(self, url: str, system: Any, path: str) -> None:
        self.url = url
        self._system = system
        self._path = path.rstrip("/")

    def _whole(self, path: str) -> str:
        return f"{self._path}/{path}"

    def names(self) -> list[str]:
        with _named(self.url):
            try:
                self._system.invalidate_cache()
                found = self._system.ls(self._path, detail=False)
            except FileNotFoundError:
                return []
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in found)

    def has(self, path: str) -> bool:
        with _named(f"{self.url}/{path}"):
            try:
                # Not `exists`: most file systems answer no when they cannot tell.
                self._system.info(self._whole(path))
            except FileNotFoundError:
                return False
        return True

    def size(self, path: str) -> int | None:
        with _named(f"{self.url}/{path}"):
            size = self._system.size(self._whole(path))
        return None if size is None else int(size)

    def locked(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()  # an object store has no locks

    def create(self, path: str) -> Sink:
        with _named(f"{self.url}/{path}"):
            self._system.makedirs(self._whole(path).rsplit("/", 1)[0], exist_ok=True)
            return _RemoteSink(self.url, self._system.open(self._whole(path), "wb", block_size=BLOCK_BYTES))

    def put(self, path: str, data: bytes) -> None:
        with _named(f"{self.url}/{path}"):
            self._system.pipe_file(self._whole(path), data)

    def open(self, path: str) -> Source:
        with _named(f"{self.url}/{path}"):
            return _RemoteSource(self.url, self._system.open(self._whole(path), "rb", block_size=BLOCK_BYTES))

    def get(self, path: str, bytes_max: int) -> bytes:
        with _named(f"{self.url}/{path}"):
            if (self.size(path) or 0) > bytes_max:
                raise SnapshotError(f"{self.url}/{path} is larger than {bytes_max} bytes")
            return bytes(self._system.cat_file(self._whole(path)))

    def remove(self, name: str) -> None:
        with _named(f"{self.url}/{name}"):
            try:
                if self.has(f"{name}/{MANIFEST}"):
                    self._system.rm_file(self._whole(f"{name}/{MANIFEST}"))
                self._system.rm(self._whole(name), recursive=True)
            except FileNotFoundError:
                return


class _RemoteSink:
    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def write(self, data: memoryview) -> None:
        with _named(self._url):
            self._file.write(data)

    def close(self) -> None:
        with _named(self._url):
            self._file.close()

    def abandon(self) -> None:
        # What lies there without a manifest is removed; and what failed already may fail again.
        with contextlib.suppress(Exception):
            self._file.close()


class _RemoteSource:
    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def readinto(self, target: memoryview) -> int:
        done = 0
        with _named(self._url):
            while done < len(target):
                part = self._file.read(len(target) - done)
                if not part:
                    break
                target[done : done + len(part)] = part
                done += len(part)
        return done

    def close(self) -> None:
        with contextlib.suppress(Exception):  # it was only read
            self._file.close()
