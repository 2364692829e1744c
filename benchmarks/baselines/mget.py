"""Redis as a store of rows that readers look up: MGET over a Unix socket, through hiredis."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.baselines.load import F32, U64
from benchmarks.baselines.servers import REDIS_SOCKET, absent, server

FILL_ROWS = 10_000


class RedisRows:
    """key -> row; keys are their eight bytes."""

    def __init__(self, path: Path) -> None:
        import hiredis  # noqa: F401 - without it redis-py parses in Python, and that would not be a fair opponent
        import redis

        self._client = redis.Redis(unix_socket_path=str(path))

    def fill(self, keys: U64, rows: F32) -> None:
        """Store every row."""
        for begin in range(0, keys.size, FILL_ROWS):
            part = rows[begin : begin + FILL_ROWS]
            values = [row.data.cast("B") for row in np.ascontiguousarray(part)]
            self._client.mset(dict(zip(names(keys[begin : begin + FILL_ROWS]), values, strict=True)))

    def lookup(self, wanted: list[bytes], out: F32) -> None:
        """Copy the rows of these keys into out, float32[n, dim]."""
        out[...] = np.frombuffer(b"".join(self._client.mget(wanted)), np.float32).reshape(out.shape)

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


def names(keys: U64) -> list[bytes]:
    """The keys as Redis has them."""
    raw = keys.tobytes()
    return [raw[at : at + 8] for at in range(0, len(raw), 8)]


@contextmanager
def redis_rows(keys: U64, rows: F32) -> Iterator[RedisRows]:
    """A server that holds these rows.

    Raises:
        FileNotFoundError: there is no Redis here; see `absent`.
    """
    missing = absent("redis")
    if missing is not None:
        raise FileNotFoundError(missing)
    with TemporaryDirectory(prefix="ekko-bench-") as directory, server("redis", Path(directory)):
        found = RedisRows(Path(directory) / REDIS_SOCKET)
        try:
            found.fill(keys, rows)
            yield found
        finally:
            found.close()
