"""A publisher's half of the local endpoint: connections to one node, one for each call under way. The wire is `ekko.local`.

A client is synchronous: it has one request outstanding, so what a connection can hold in memory is bounded by one message.
An answer that comes after its request timed out carries an old number and is dropped.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator
from typing import Final

import zmq

from ekko.errors import NodeUnreachable, PublishError
from ekko.local import HEADER_BYTES_MAX, LOCAL_MESSAGE_BYTES_MAX, Answer, Request, decode_answer, encode_request, frames_bytes

RECONNECT_MS: Final = 20
RECONNECT_MS_MAX: Final = 200
# Requests up to this size are copied into ZeroMQ. Handing arrays over, and learning when it lets go of them, wakes a thread of
# its own for each: a step of 256 KiB takes 97 us there and back when it is copied, 115 us when it is handed over.
COPY_BYTES_MAX: Final = 1 << 20
ABANDON_S_MAX: Final = 10.0  # the I/O thread lets go of a closed socket's memory in milliseconds; a guess for a stopped machine
# Connections kept for the next call. One is enough for one thread; more are opened while more threads call at once.
CONNECTIONS_IDLE_MAX: Final = 8


class Connection:
    """One synchronous connection to a node's local endpoint. Used by one thread at a time.

    After any exception of `request` the connection must be closed: an answer may still be under way.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._number = 0
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),  # nothing is queued for a node that is not there: `request` sees it instead
            (zmq.SNDHWM, 2),
            (zmq.RCVHWM, 16),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX),
            (zmq.MAXMSGSIZE, HEADER_BYTES_MAX),
        ):
            self._socket.setsockopt(option, value)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise NodeUnreachable(f"cannot connect to {address}: {error}: expected tcp://HOST:PORT or ipc://PATH") from None

    def request(self, request: Request, timeout_s: float) -> Answer:
        """Ask and wait for the answer.

        Raises:
            NodeUnreachable: nobody took the request, or nobody answered, within `timeout_s`.
            PublishError: the step is larger than one message may be; nothing was sent.
        """
        deadline = time.monotonic() + timeout_s
        self._number += 1
        frames = encode_request(self._number, request)
        size = frames_bytes(frames)
        if size > LOCAL_MESSAGE_BYTES_MAX:
            raise PublishError(
                f"a step of {size} bytes: one step may have {LOCAL_MESSAGE_BYTES_MAX}: publish it as several steps"
            )
        handed_over = size > COPY_BYTES_MAX
        # Time limits of the socket: to poll it first takes an object and two calls of the system for each step.
        self._socket.set(zmq.SNDTIMEO, _milliseconds_until(deadline))
        try:
            tracker = self._socket.send_multipart(frames, copy=not handed_over, track=handed_over)
        except zmq.Again:
            raise NodeUnreachable(
                f"no node answers at {self._address} within {timeout_s:g} s: start it (ekko node --config node.toml) "
                "or check [node].local in its configuration"
            ) from None
        try:
            while True:
                self._socket.set(zmq.RCVTIMEO, _milliseconds_until(deadline))
                number, answer = decode_answer(self._socket.recv())
                if number == self._number:
                    return answer
        except zmq.Again:
            pass
        except BaseException:
            self._abandon(tracker)
            raise
        self._abandon(tracker)
        raise NodeUnreachable(
            f"the node at {self._address} did not answer within {timeout_s:g} s: it is busy or went away. "
            "Whether a step was stored is not known; publishing it again is harmless"
        )

    def _abandon(self, tracker: zmq.MessageTracker | None) -> None:
        """Close, and return only when ZeroMQ no longer reads the caller's arrays, which the caller may now change."""
        self.close()
        if tracker is not None:
            with contextlib.suppress(zmq.NotDone):
                tracker.wait(ABANDON_S_MAX)

    def close(self) -> None:
        """Drop the connection and whatever is under way on it."""
        self._socket.close(linger=0)


def _milliseconds_until(deadline: float) -> int:
    return max(0, math.ceil((deadline - time.monotonic()) * 1000))


class Connections:
    """Connections to one endpoint: one per call under way, kept for the next. Safe for threads and forks."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._closed = False

    def check_open(self) -> None:
        if self._closed:
            raise PublishError("this publisher is closed: make another one")

    def ask(self, request: Request, timeout_s: float) -> Answer:
        """One request, one answer."""
        self.check_open()
        with self._connection() as connection:
            return connection.request(request, timeout_s)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Connection]:
        if os.getpid() != self._pid:
            # A child has copies of the parent's connections and maybe of a lock that is held there: neither is usable.
            self._pid, self._lock, self._idle = os.getpid(), threading.Lock(), []
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or Connection(self._address)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            kept = not self._closed and len(self._idle) < CONNECTIONS_IDLE_MAX
            if kept:
                self._idle.append(connection)
        if not kept:
            connection.close()

    def close(self) -> None:
        self._closed = True
        if os.getpid() != self._pid:
            return  # the connections are the parent's
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
