"""The opponents, each as two halves: one publishes batches from one process, one applies them in each replica's process.

    publish(numbers)         sends the batches with these numbers; None among them: somebody is too far behind, wait a moment
    serve(apply, done)       calls apply(keys, rows) for every batch, in order, until done()

A half connects when it is made; a subscriber made before the first batch is sent misses none.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import zmq

from benchmarks.baselines.load import F32, U64, Batches

# Batches that the slowest replica may be behind: 32 MB of them, what ekko lets be on its way to one peer.
WINDOW = 120
PAUSE_S = 0.0002
POLL_MS = 50
SUBSCRIBE_MS_MAX = 10_000
# Batches that one request to Redis may bring.
READ_MAX = 16

Numbers = Iterable[int | None]
Apply = Callable[[U64, F32], None]
Done = Callable[[], bool]


class Publishing(Protocol):
    """The publisher's half."""

    def wait_for(self, replicas: int) -> None:
        """Return when so many replicas will get what is sent from now on. They have connected already."""

    def publish(self, numbers: Numbers) -> None:
        """Send everything; returns when it has left our hands."""

    def close(self) -> None:
        """Disconnect."""


class Applying(Protocol):
    """A replica's half."""

    def serve(self, apply: Apply, done: Done) -> None:
        """Apply what comes until `done()`."""

    def close(self) -> None:
        """Disconnect."""


@dataclass(frozen=True, slots=True)
class Side:
    """How both halves of one opponent are made: from the port to use, and the batches."""

    server: str | None  # of `benchmarks.baselines.servers`; None: publisher and replicas talk to each other
    publishing: Callable[[int, Batches], Publishing]
    applying: Callable[[int, Batches, Callable[[], int]], Applying]  # the last: how many batches were published so far


def _split(blob: bytes | memoryview, batches: Batches) -> tuple[U64, F32]:
    """A blob is the batch's keys and then its rows; nothing is copied."""
    keys_bytes = batches.keys.shape[1] * 8
    view = memoryview(blob)
    rows = np.frombuffer(view[keys_bytes:], np.float32).reshape(batches.blocks.shape[1:])
    return np.frombuffer(view[:keys_bytes], np.uint64), rows


def _blob(batches: Batches, number: int) -> bytes:
    return b"".join((batches.keys_of(number).data, batches.rows_of(number).data))


def _paced(numbers: Numbers) -> Iterator[int]:
    """The numbers, with a moment's rest wherever somebody is too far behind."""
    for number in numbers:
        if number is None:
            time.sleep(PAUSE_S)
        else:
            yield number


# --- raw ZeroMQ -----------------------------------------------------------------------------------------------------------


class ZmqPublishing:
    """PUB (as XPUB, which also tells who has subscribed), frames handed over without a copy."""

    def __init__(self, port: int, batches: Batches) -> None:
        self._batches = batches
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.set(zmq.XPUB_VERBOSE, 1)  # tells of every subscriber, not of the first alone
        # Never reached: PUB drops there. ZeroMQ learns of messages that were read only every half mark, so twice the window is
        # not enough.
        self._socket.set(zmq.SNDHWM, 8 * WINDOW)
        self._socket.bind(f"tcp://127.0.0.1:{port}")

    def wait_for(self, replicas: int) -> None:
        for _ in range(replicas):
            if not self._socket.poll(SUBSCRIBE_MS_MAX):
                raise TimeoutError("a replica has not subscribed")
            self._socket.recv()

    def publish(self, numbers: Numbers) -> None:
        for number in _paced(numbers):
            frames = (self._batches.keys_of(number).data, self._batches.rows_of(number).data)
            self._socket.send_multipart(frames, copy=False)

    def close(self) -> None:
        self._context.destroy(linger=0)


class ZmqApplying:
    """SUB."""

    def __init__(self, port: int, batches: Batches, _published: Callable[[], int]) -> None:
        self._shape = batches.blocks.shape[1:]
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set(zmq.RCVHWM, 8 * WINDOW)
        self._socket.subscribe(b"")
        self._socket.connect(f"tcp://127.0.0.1:{port}")

    def serve(self, apply: Apply, done: Done) -> None:
        while not done():
            if self._socket.poll(POLL_MS):
                keys, rows = self._socket.recv_multipart(copy=False)
                apply(np.frombuffer(keys.buffer, np.uint64), np.frombuffer(rows.buffer, np.float32).reshape(self._shape))

    def close(self) -> None:
        self._context.destroy(linger=0)


# --- Redis ----------------------------------------------------------------------------------------------------------------


def _redis(port: int) -> Any:
    import redis

    return redis.Redis(host="127.0.0.1", port=port)


class StreamPublishing:
    """XADD, one blob a batch; the stream keeps twice the window."""

    KEY = "batches"

    def __init__(self, port: int, batches: Batches) -> None:
        self._batches = batches
        self._redis = _redis(port)

    def wait_for(self, replicas: int) -> None:
        """A server knows them."""

    def publish(self, numbers: Numbers) -> None:
        for number in _paced(numbers):
            self._redis.xadd(self.KEY, {"b": _blob(self._batches, number)}, maxlen=2 * WINDOW, approximate=True)

    def close(self) -> None:
        self._redis.close()


class StreamApplying:
    """XREAD from where the stream ended when we came."""

    def __init__(self, port: int, batches: Batches, _published: Callable[[], int]) -> None:
        self._batches = batches
        self._redis = _redis(port)
        newest = self._redis.xrevrange(StreamPublishing.KEY, count=1)
        self._last = newest[0][0] if newest else b"0"

    def serve(self, apply: Apply, done: Done) -> None:
        while not done():
            answer = self._redis.xread({StreamPublishing.KEY: self._last}, count=READ_MAX, block=POLL_MS)
            for entry, fields in _entries(answer):
                apply(*_split(fields[b"b"], self._batches))
                self._last = entry

    def close(self) -> None:
        self._redis.close()


def _entries(answer: Any) -> list[Any]:
    """Entries of the one stream asked for, in either of the shapes that releases of redis-py give."""
    if not answer:
        return []
    found = next(iter(answer.values())) if isinstance(answer, dict) else answer[0][1]
    return list(found[0] if found and isinstance(found[0], list) else found)


class MsetPublishing:
    """MSET of key -> row, one command a batch. Keys are their eight bytes."""

    def __init__(self, port: int, batches: Batches) -> None:
        self._batches = batches
        self._redis = _redis(port)

    def wait_for(self, replicas: int) -> None:
        """A server knows them."""

    def publish(self, numbers: Numbers) -> None:
        for number in _paced(numbers):
            names = _names(self._batches.keys_of(number))
            values = [row.data.cast("B") for row in self._batches.rows_of(number)]
            self._redis.mset(dict(zip(names, values, strict=True)))

    def close(self) -> None:
        self._redis.close()


class MgetApplying:
    """MGET of the keys of each published batch. Which keys these are is known for nothing, in the opponent's favour."""

    def __init__(self, port: int, batches: Batches, published: Callable[[], int]) -> None:
        self._batches = batches
        self._published = published
        self._redis = _redis(port)

    def serve(self, apply: Apply, done: Done) -> None:
        number, shape = 0, self._batches.blocks.shape[1:]
        while not done():
            if number >= self._published():
                time.sleep(PAUSE_S)
                continue
            keys = self._batches.keys_of(number)
            values = self._redis.mget(_names(keys))
            apply(keys, np.frombuffer(b"".join(values), np.float32).reshape(shape))
            number += 1

    def close(self) -> None:
        self._redis.close()


def _names(keys: U64) -> list[bytes]:
    raw = keys.tobytes()
    return [raw[at : at + 8] for at in range(0, len(raw), 8)]


# --- NATS -----------------------------------------------------------------------------------------------------------------

SUBJECT = "batches"


def _nats(port: int) -> tuple[asyncio.AbstractEventLoop, Any]:
    import nats

    loop = asyncio.new_event_loop()
    return loop, loop.run_until_complete(nats.connect(f"nats://127.0.0.1:{port}"))


class NatsPublishing:
    """One message a batch."""

    def __init__(self, port: int, batches: Batches) -> None:
        self._batches = batches
        self._loop, self._client = _nats(port)

    def wait_for(self, replicas: int) -> None:
        """A server knows them."""

    def publish(self, numbers: Numbers) -> None:
        self._loop.run_until_complete(self._publish(numbers))

    async def _publish(self, numbers: Numbers) -> None:
        for number in numbers:
            if number is None:
                await self._client.flush()  # what the client holds back is what the replicas wait for
                await asyncio.sleep(PAUSE_S)
                continue
            await self._client.publish(SUBJECT, _blob(self._batches, number))
        await self._client.flush()

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


class NatsApplying:
    """A subscription with a callback, the way of the client that costs least a message."""

    def __init__(self, port: int, batches: Batches, _published: Callable[[], int]) -> None:
        self._batches = batches
        self._loop, self._client = _nats(port)
        self._apply: Apply | None = None
        self._loop.run_until_complete(self._subscribe())

    async def _subscribe(self) -> None:
        # Limits above the window: beyond them the client drops.
        await self._client.subscribe(SUBJECT, cb=self._on_message, pending_msgs_limit=4 * WINDOW, pending_bytes_limit=1 << 30)
        await self._client.flush()  # now the server knows

    async def _on_message(self, message: Any) -> None:
        assert self._apply is not None
        self._apply(*_split(message.data, self._batches))

    def serve(self, apply: Apply, done: Done) -> None:
        self._apply = apply
        self._loop.run_until_complete(self._until(done))

    @staticmethod
    async def _until(done: Done) -> None:
        while not done():  # noqa: ASYNC110 - what ends it happens in another process, after the last message
            await asyncio.sleep(POLL_MS / 1000)

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


SIDES = {
    "raw_zmq": Side(None, ZmqPublishing, ZmqApplying),
    "redis_streams": Side("redis", StreamPublishing, StreamApplying),
    "redis_mset_mget": Side("redis", MsetPublishing, MgetApplying),
    "nats": Side("nats", NatsPublishing, NatsApplying),
}
