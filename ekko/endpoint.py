"""The node's half of the local endpoint: requests of publishers and tools in, answers out.

A thin shell on the node's event loop. What the requests mean is decided by the `Handler`, which answers now or later under
the number it was given. The wire is `ekko.local`.
"""

import asyncio
import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Protocol

import structlog
import zmq

from ekko.errors import ConfigError, EkkoError, ModelError
from ekko.local import (
    LOCAL_FRAMES_MAX,
    LOCAL_MESSAGE_BYTES_MAX,
    Answer,
    Failed,
    MalformedError,
    Request,
    Wait,
    Waited,
    decode_request,
    encode_answer,
)

# Requests that were not answered yet, waits above all. One more is refused.
REQUESTS_PENDING_MAX = 4_096
# Requests served before the loop gets a turn: a publisher in a tight loop must not keep peers waiting.
REQUESTS_PER_TURN_MAX = 16
# Per client. It sends one request and waits, so more is not of our client.
CLIENT_QUEUE_MAX = 16
LINGER_MS = 200

_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_READABLE = int(zmq.POLLIN)

log = structlog.get_logger(__name__)


class Handler(Protocol):
    """Who decides."""

    def handle_request(self, number: int, request: Request) -> Answer | None:
        """Answer at once, or return None and call `LocalEndpoint.answer(number, ...)` later.

        Raises:
            EkkoError: the request is refused for this reason.
        """


class LocalEndpoint:
    """A bound local endpoint, from `start` to `close`. Used from one event loop.

    Args:
        address: `tcp://127.0.0.1:PORT` or `ipc:///PATH`.
        handler: who decides.
    """

    def __init__(self, address: str, handler: Handler) -> None:
        self._address = address
        self._handler = handler
        self._number = 0
        # Our number -> client, the client's number, and whether it understands who was not waited for.
        self._pending: dict[int, tuple[bytes, int, bool]] = {}
        self._socket: zmq.Socket[bytes] | None = None
        self._turn: asyncio.Handle | None = None
        self._serving = False
        self.malformed = 0
        self.unanswerable = 0

    @property
    def pending(self) -> int:
        """Requests that wait for their answer; at most `REQUESTS_PENDING_MAX`."""
        return len(self._pending)

    def start(self) -> None:
        """Bind and serve.

        Raises:
            ConfigError: the address is taken or cannot be bound.
        """
        router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, LINGER_MS),
            (zmq.ROUTER_MANDATORY, 1),  # an answer to a client that went away is an error, not a silence
            (zmq.SNDHWM, CLIENT_QUEUE_MAX),
            (zmq.RCVHWM, CLIENT_QUEUE_MAX),
            (zmq.MAXMSGSIZE, LOCAL_MESSAGE_BYTES_MAX),
        ):
            router.setsockopt(option, value)
        try:
            _check_ipc_is_free(self._address)
            router.bind(self._address)
        except zmq.ZMQError as error:
            router.close(linger=0)
            if error.errno == zmq.EADDRINUSE:
                raise ConfigError(
                    f"node.local: {self._address} is taken: stop what listens there, or choose another port"
                ) from None
            raise ConfigError(f"node.local: cannot listen on {self._address}: {error}") from None
        self._socket = router
        asyncio.get_running_loop().add_reader(router.fileno(), self._serve)
        self._serve()

    def answer(self, number: int, answer: Answer) -> None:
        """Answer a request that the handler left open; a client that is gone gets none."""
        pending = self._pending.pop(number, None)
        if pending is None:
            return
        client, theirs, named = pending
        self._send(client, theirs, answer.unnamed() if isinstance(answer, Waited) and not named else answer)

    def _serve(self) -> None:
        """Serve what is there. ZeroMQ's descriptor signals edges only: it is read until nothing is left."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        self._serving = True
        try:
            drained = self._serve_some()
        finally:
            self._serving = False
        if not drained:
            self._take_another_turn()

    def _serve_some(self) -> bool:
        """Serve one turn's worth of requests; True when none is left."""
        for _ in range(REQUESTS_PER_TURN_MAX):
            if self._socket is None:
                return True
            if not int(self._socket.get(zmq.EVENTS)) & _READABLE:  # cheaper than to be told so by an exception
                return True
            client = part = self._socket.recv(_NOBLOCK, copy=False)
            frames: list[memoryview] = []
            while part.more:  # `recv_multipart` asks the socket instead, which costs 10 us a frame
                part = self._socket.recv(_NOBLOCK, copy=False)
                frames.append(part.buffer)
            self._serve_one(client.bytes, frames)
        return False

    def _serve_one(self, client: bytes, frames: list[memoryview]) -> None:
        try:
            theirs, request = decode_request(frames[: LOCAL_FRAMES_MAX + 1])
        except MalformedError as error:
            self.malformed += 1
            log.warning("local_request_malformed", error=str(error))
            if error.number is not None:
                self._send(client, error.number, Failed("publish", str(error)))
            return
        if len(self._pending) >= REQUESTS_PENDING_MAX:
            self._send(
                client, theirs, Failed("publish", f"the node has {REQUESTS_PENDING_MAX} requests waiting: try again later")
            )
            return
        self._number += 1
        number = self._number
        self._pending[number] = (client, theirs, isinstance(request, Wait) and request.named)
        try:
            answer = self._handler.handle_request(number, request)
        except EkkoError as error:
            answer = failure_of(error)
        except Exception as error:  # a bug in one request must not end the service for all others
            log.error("local_request_failed", error=repr(error), exc_info=True)
            answer = Failed("publish", f"the node failed at this request: {error!r}")
        if answer is not None:
            self.answer(number, answer)

    def _send(self, client: bytes, number: int, answer: Answer) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(client, _NOBLOCK_MORE)
            self._socket.send(encode_answer(number, answer), _NOBLOCK)
        except zmq.ZMQError as error:
            self.unanswerable += 1
            log.info("local_answer_dropped", error=str(error))
        if not self._serving:  # sending may have swallowed the signal of a request that came meanwhile
            self._take_another_turn()

    def _take_another_turn(self) -> None:
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._serve)

    def close(self) -> None:
        """Stop listening. Requests that were not answered get no answer."""
        if self._turn is not None:
            self._turn.cancel()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self._pending.clear()


def failure_of(error: EkkoError) -> Failed:
    """The answer that makes the client raise the like of `error`."""
    return Failed("model" if isinstance(error, ModelError) else "publish", str(error))


def _check_ipc_is_free(address: str) -> None:
    """Refuse a socket file that another process serves: ZeroMQ would take it over in silence.

    Raises:
        ConfigError: somebody answers there, or the path is something else than a socket.
    """
    scheme, _, name = address.partition("://")
    path = Path(name)
    if scheme != "ipc" or not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ConfigError(f"node.local: {path} is there and is not a socket: choose another path")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return  # left behind by a process that ended
    raise ConfigError(f"node.local: {address} is taken: stop what listens there, or choose another path")
