"""Redis as a sink: a hash for each table, whose fields are keys and whose values are stamps and rows.

    PREFIX:MODEL:rows:TABLE      field: the key, uint64; value: the stamp, uint64, then float32[dim]
    PREFIX:MODEL:deleted:TABLE   field: the key; value: the stamp of its deletion, for a day
    PREFIX:MODEL:tables          field: a table's name; value: its dim, in decimal
    PREFIX:MODEL:life:NAME       how often a feed of this name has begun
    PREFIX:MODEL:cursor:NAME     how far it is

All numbers are little-endian. What is newer is decided in Redis, by a script for each part of a batch, which is one step there:
so a write that comes late (of a feed that was stopped and goes on, or out of a socket of one that was killed) never wins. Nor
does one of a feed that another one of its name has replaced: its number is no longer the one in `life`.
"""

import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np
import redis
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

from ekko.errors import ConfigError, ModelError, SinkError, SinkTakenError
from ekko.serve.sink import Batch, Removed, Sink
from ekko.sinks.redis_scripts import APPLY, COMMIT, DROP, HELD, LOOKUP, TAKEN
from ekko.sinks.target import PREFIX_DEFAULT
from p2p.stamps import make_stamp

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]
P = ParamSpec("P")
T = TypeVar("T")

NAME_DEFAULT: Final = "feed"
# Keys in one script: others wait for Redis meanwhile, a millisecond or so.
SCRIPT_KEYS_MAX: Final = 512
TIMEOUT_S: Final = 10.0
# So long it is remembered that a key was deleted, by the time of the deletion. Nothing of a feed is under way for longer.
DELETED_KEPT_S: Final = 86_400
# Deletions that are looked at with each commit, whether they are that old.
DELETED_LOOKED_AT: Final = 4_096
HELD_AT_ONCE: Final = 4_096


def _reaching(method: Callable[P, T]) -> Callable[P, T]:
    """What Redis says is a `SinkError`: the feed tries again."""

    @wraps(method)
    def reached(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except AuthenticationError as error:
            raise ConfigError(f"redis does not let us in: {error}: give the user and the password in the URL") from error
        except (RedisError, OSError) as error:
            _check_life(str(error))
            raise SinkError(f"redis: {error}") from error

    return reached


def _check_life(message: str) -> None:
    if not message.startswith(TAKEN):
        return
    life, ours = message.split()[1:3]
    if int(life) > int(ours):
        raise SinkTakenError(
            f"another feed of this name writes into redis by now (it is number {life}, this one is {ours}): give each a name "
            "of its own, or stop one"
        )
    raise SinkError("redis has lost what was in it: it is opened again, and gets what it lacks")


class RedisSink(Sink):
    """One model in a Redis server, or in what speaks as one.

    Args:
        url: as of `redis.from_url`: "redis://localhost:6379/0".
        prefix: what all names in Redis begin with.
        name: of the feed: each feed that writes into this Redis has one of its own, the same when it begins again.
    """

    def __init__(self, url: str, *, prefix: str = PREFIX_DEFAULT, name: str = NAME_DEFAULT) -> None:
        self._redis = _connect(url)
        self._prefix = prefix
        self._name = name
        self._model = ""
        self._life = 0
        self._scripts: dict[str, str] = {}
        self._looked_at: tuple[int, bytes] = 0, b"0"  # where the search for old deletions goes on

    def _key(self, kind: str, of: str = "") -> str:
        return f"{self._prefix}:{self._model}:{kind}" + (f":{of}" if of else "")

    @_reaching
    def open(self, model: str) -> bytes | None:
        self._model = model
        self._redis.connection_pool.disconnect()  # what was sent there counts no more, and answers to it are nobody's
        self._scripts = {script: self._redis.script_load(script) for script in (APPLY, COMMIT, DROP, HELD)}
        self._life = int(self._redis.incr(self._key("life", self._name)))
        cursor = self._redis.get(self._key("cursor", self._name))
        return None if cursor is None else bytes(cursor)

    @_reaching
    def add_table(self, table: str, dim: int) -> None:
        held = self._redis.hget(self._key("tables"), table)
        if held is not None and int(held) != dim:
            raise ModelError(f"table {table!r} has dim {dim}, and {int(held)} in redis: give another prefix")
        self._redis.hset(self._key("tables"), table, dim)

    @_reaching
    def drop_table(self, table: str) -> None:
        names = self._key("life", self._name), self._key("rows", table), self._key("deleted", table), self._key("tables")
        self._redis.evalsha(self._scripts[DROP], len(names), *names, self._life, table)

    @_reaching
    def apply(self, batch: Batch) -> None:
        names = self._key("life", self._name), self._key("rows", batch.table), self._key("deleted", batch.table)
        rows = np.ascontiguousarray(batch.rows, "<f4")
        live = Removed(batch.keys, batch.stamps)
        pipeline = self._redis.pipeline(transaction=False)
        for kind, named in (("forget", batch.forgotten), ("delete", batch.deleted), ("put", live)):
            for begin in range(0, named.keys.size, SCRIPT_KEYS_MAX):
                part = slice(begin, begin + SCRIPT_KEYS_MAX)
                columns = _bytes(named.keys[part]), _bytes(named.stamps[part]), rows[part].tobytes() if named is live else b""
                pipeline.evalsha(self._scripts[APPLY], 3, *names, self._life, kind, *columns)
        for answer in pipeline.execute(raise_on_error=False):
            if isinstance(answer, Exception):
                raise answer

    @_reaching
    def held(self, table: str) -> Iterator[tuple[U64, U64]]:
        return _Held(self, table)

    @_reaching
    def held_at(self, table: str, cursor: bytes) -> tuple[bytes, U64, U64]:
        """A part of the keys, from a cursor of Redis on (b"0" at first, and when that was all), and their stamps."""
        after, keys, stamps = self._redis.evalsha(self._scripts[HELD], 1, self._key("rows", table), cursor, HELD_AT_ONCE)
        return after, np.frombuffer(keys, "<u8").astype(np.uint64), np.frombuffer(stamps, "<u8").astype(np.uint64)

    @_reaching
    def commit(self, cursor: bytes) -> None:
        old = make_stamp(int(time.time() * 1000) - 1000 * DELETED_KEPT_S, 0, 0)
        tables = [name.decode() for name in self._redis.hkeys(self._key("tables"))]
        names = [self._key("life", self._name), self._key("cursor", self._name), *(self._key("deleted", one) for one in tables)]
        arguments = self._life, cursor, _bytes(np.array([old], np.uint64)), *self._looked_at, DELETED_LOOKED_AT
        table, after = self._redis.evalsha(self._scripts[COMMIT], len(names), *names, *arguments)
        self._looked_at = int(table), bytes(after)

    def close(self) -> None:
        self._redis.close()


class _Held:
    """Parts of a table's keys; Redis may say one twice."""

    def __init__(self, sink: RedisSink, table: str) -> None:
        self._sink, self._table = sink, table
        self._cursor: bytes | None = b"0"

    def __iter__(self) -> "_Held":
        return self

    def __next__(self) -> tuple[U64, U64]:
        while self._cursor is not None:
            after, keys, stamps = self._sink.held_at(self._table, self._cursor)
            self._cursor = None if after == b"0" else after
            if keys.size:
                return keys, stamps
        raise StopIteration


def _bytes(values: U64) -> bytes:
    return np.ascontiguousarray(values, "<u8").tobytes()


class RedisRows:
    """Reads what a `RedisSink` wrote, as a server of yours would.

    Args:
        url, prefix: as the sink's.
        model: its name.
    """

    def __init__(self, url: str, model: str, *, prefix: str = PREFIX_DEFAULT) -> None:
        self._redis = _connect(url)
        self._names = f"{prefix}:{model}"

    @_reaching
    def lookup(self, table: str, keys: U64) -> tuple[F32, U64]:
        """Copy rows out by key, all keys of a part of `SCRIPT_KEYS_MAX` at one moment.

        Args:
            table: its name.
            keys: uint64[n].

        Returns:
            float32[n, dim], zeros for keys that have none; uint64[n], their stamps.

        Raises:
            ModelError: there is no such table.
            SinkError: Redis cannot be reached.
        """
        dim = self._redis.hget(f"{self._names}:tables", table)
        if dim is None:
            raise ModelError(f"redis has no table {table!r} in {self._names}:tables")
        width, parts = int(dim), []
        for begin in range(0, keys.size, SCRIPT_KEYS_MAX):
            part = _bytes(keys[begin : begin + SCRIPT_KEYS_MAX])
            parts.append(self._redis.eval(LOOKUP, 1, f"{self._names}:rows:{table}", part, 4 * width))
        values = np.frombuffer(b"".join(parts), np.dtype([("stamp", "<u8"), ("row", "<f4", (width,))]))
        return values["row"].astype(np.float32), values["stamp"].astype(np.uint64)

    def close(self) -> None:
        """Let go of the connection."""
        self._redis.close()


def _connect(url: str) -> Any:
    try:
        # No retries of its own: what it reaches after a failure may be a server that has lost everything.
        return redis.Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as error:
        raise ConfigError(f"no address of a redis ({error}): expected redis://[USER:PASSWORD@]HOST:PORT/DATABASE") from None
