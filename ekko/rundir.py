"""What a node keeps in its `run_dir` besides the store: the lock that makes it the only one, and where it listens."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ekko.errors import ConfigError, NodeUnreachable
from ekko.store.access import Access
from ekko.store.leftovers import RUN_DIR_LOCK

ENDPOINT_NAME = "endpoint"
LOOKS_MET_MAX = 5


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir` for this process; the kernel lets go of it when the process ends, however it ends.

    Raises:
        ConfigError: another node runs here, or the folder cannot be made or written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / RUN_DIR_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"node.run_dir: {run_dir} cannot be used: {error.strerror}") from None
    try:
        try:
            _lock(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"node.run_dir: {run_dir} is in use by another node (process {holder}): stop it, or choose another run_dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Raises BlockingIOError when another process holds it, and not only looks whether anybody does (`ekko clean`)."""
    for _ in range(LOOKS_MET_MAX):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.01)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_endpoint(run_dir: Path, address: str, access: Access) -> None:
    """Say where the node listens to processes of its machine, for those that know its `run_dir` only."""
    temporary = run_dir / f"{ENDPOINT_NAME}.new"
    temporary.write_text(address)
    access.apply_to(temporary)
    temporary.replace(run_dir / ENDPOINT_NAME)


def read_endpoint(run_dir: Path) -> str:
    """Where the node of this folder listens to processes of its machine.

    Raises:
        NodeUnreachable: no node has ever said so.
    """
    try:
        return (run_dir / ENDPOINT_NAME).read_text()
    except OSError as error:
        raise NodeUnreachable(
            f"no node has its endpoint in {run_dir} ({error.strerror}): start `ekko node` with this run_dir"
        ) from None
