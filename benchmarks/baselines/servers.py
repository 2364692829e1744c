"""Redis and NATS servers on loopback, from the system's packages, for as long as a block runs.

Redis listens on a Unix socket in its folder, too.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sim_cluster.processes import free_ports, wait_until

SERVERS = {"redis": "redis-server", "nats": "nats-server"}
START_S_MAX = 60.0  # a busy machine included
STOP_S_MAX = 10.0
REDIS_SOCKET = "redis.sock"


def absent(kind: str) -> str | None:
    """Why a server of this kind cannot be started here; None when it can."""
    return None if _program(kind) else f"{SERVERS[kind]} is not installed: apt-get install {SERVERS[kind]}"


@contextmanager
def server(kind: str, folder: Path, port: int | None = None) -> Iterator[int]:
    """Run a server that keeps everything in memory; gives its port, a free one unless it is said which."""
    port = port or free_ports(1)[0]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{kind}.log").open("wb") as log:
        process = subprocess.Popen(_command(kind, port), cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_until(lambda: _listens(process, port), f"{SERVERS[kind]} on port {port}", START_S_MAX)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _program(kind: str) -> str | None:
    # Debian puts one of them where the search path of an ordinary user does not lead.
    return shutil.which(SERVERS[kind], path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin")


def _command(kind: str, port: int) -> list[str]:
    program = _program(kind)
    if program is None:
        raise FileNotFoundError(absent(kind))
    if kind == "nats":
        return [program, "--addr", "127.0.0.1", "--port", str(port)]
    where = ["--bind", "127.0.0.1", "--port", str(port), "--unixsocket", REDIS_SOCKET]
    # No snapshots and no log: nothing that the others do not do either.
    return [program, *where, "--save", "", "--appendonly", "no", "--daemonize", "no"]


def _listens(process: "subprocess.Popen[bytes]", port: int) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False
