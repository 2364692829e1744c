"""A worker's sockets: one to each server, made when something is first sent there. Used by one thread at a time.

Beyond this machine connections are encrypted and both ends prove their keys, as those between nodes are. A worker knows whose
key a server has to prove once it knows the server's node; before that it tries the keys of its folder in turn.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import zmq

from ekko.addresses import check_endpoint, is_loopback
from ekko.errors import ConfigError, NodeUnreachable
from ekko.security import NodeKeys
from ekko.train.connection import RECONNECT_MS, RECONNECT_MS_MAX
from ekko.train.handshake import Handshake, Refusal
from ekko.train.server import wire as w
from p2p.transport import Buffer
from p2p.transport.curve import demand

# Messages that wait in a socket. What a worker may have under way is less; servers have few words beside.
QUEUE_MAX: Final = 2_048
# A server that proves another key than the one we demand lets the connection fail without a word: then another key is tried.
KEY_S: Final = 0.5


class Sockets:
    """Connections to servers by endpoint.

    Args:
        keys: our key, and those of servers; None: none are needed on this machine.
    """

    def __init__(self, keys: NodeKeys | None = None) -> None:
        self._keys = keys
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._opened_s: dict[str, float] = {}
        self._handshakes: dict[str, Handshake] = {}
        self._refusals: dict[str, Refusal] = {}  # of connections that were given up
        self._tried: dict[str, int] = {}  # how many keys were demanded there
        self._poller = zmq.Poller()

    @property
    def endpoints(self) -> Sequence[str]:
        """Those that something was sent to."""
        return tuple(self._sockets)

    @property
    def refusals(self) -> dict[str, Refusal]:
        """Endpoint -> why no connection to it comes about, where that is known."""
        for endpoint, handshake in self._handshakes.items():
            if (refusal := handshake.refusal) is not None:
                self._refusals[endpoint] = refusal
        return dict(self._refusals)

    def send(self, endpoint: str, frames: Sequence[Buffer]) -> bool:
        """Hand a message over; columns are not copied and must not change. False: nobody is there, or not yet."""
        socket = self._sockets.get(endpoint) or self._connect(endpoint)
        try:
            socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            if self._keys is not None and time.monotonic() > self._opened_s[endpoint] + KEY_S:
                self._hang_up(endpoint)
            return False
        return True

    def receive(self, timeout_ms: int) -> Iterator[tuple[str, list[Buffer]]]:
        """What has come, with who sent it; waits for the first of it."""
        if len(self._sockets) == 1:  # half the time of a poller's
            (own,) = self._sockets.values()
            ready: list[Any] = [own] if own.poll(timeout_ms) else []
        else:
            ready = [socket for socket, _ in self._poller.poll(timeout_ms)]
        for endpoint, socket in list(self._sockets.items()):
            if socket in ready:
                self._refusals.pop(endpoint, None)
            while socket in ready:
                try:
                    frames = socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                yield endpoint, [frame.buffer for frame in frames]

    def _connect(self, endpoint: str) -> "zmq.Socket[bytes]":
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),  # nothing is queued for a server that is not there: it would come twice when it is
            (zmq.SNDHWM, QUEUE_MAX),
            (zmq.RCVHWM, QUEUE_MAX),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX),
            (zmq.MAXMSGSIZE, w.MESSAGE_BYTES_MAX),
            (zmq.IPV6, 1),
        ):
            socket.setsockopt(option, value)
        if self._keys is not None:
            if not (theirs := self._keys.candidates(endpoint)):
                socket.close()
                raise ConfigError("the folder `allow` has no key of a server: put NODE.pub of each training node there")
            demand(socket, self._keys.own, theirs[self._tried.get(endpoint, 0) % len(theirs)])
            self._tried[endpoint] = self._tried.get(endpoint, 0) + 1
        handshake = Handshake(socket, with_keys=self._keys is not None)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            handshake.close()
            socket.close()
            raise NodeUnreachable(f"cannot connect to {endpoint}: {error}: expected tcp://HOST:PORT") from None
        self._sockets[endpoint], self._opened_s[endpoint], self._handshakes[endpoint] = socket, time.monotonic(), handshake
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def _hang_up(self, endpoint: str) -> None:
        socket, handshake = self._sockets.pop(endpoint), self._handshakes.pop(endpoint)
        if (refusal := handshake.refusal) is not None:
            self._refusals[endpoint] = refusal
        handshake.close()
        self._poller.unregister(socket)
        socket.close(linger=0)

    def close(self) -> None:
        """Drop all connections and whatever is under way on them."""
        for endpoint in list(self._sockets):
            self._hang_up(endpoint)


def keys_of_worker(
    endpoints: Sequence[str],
    name: str,
    key_file: str | Path | None,
    allow: str | Path | None,
    node_at: Callable[[str], str | None],
) -> NodeKeys | None:
    """The keys that a worker connects with; None where all servers are on this machine and it was given none.

    Raises:
        ConfigError: an endpoint is none, or beyond this machine and there are no keys; or they cannot be read.
    """
    if (key_file is None) != (allow is None):
        raise ConfigError(
            "key_file and allow belong together: this worker's secret key, and the folder of the servers' public keys"
        )
    for endpoint in endpoints:
        try:
            host = check_endpoint(endpoint, ipc=True)
        except ValueError as error:
            raise ConfigError(f"endpoints: {error}") from None
        if key_file is None and host is not None and not is_loopback(host):
            raise ConfigError(
                f"endpoints: {endpoint} is beyond this machine, and connections there are encrypted: pass key_file and allow "
                "(ekko keygen makes keys)"
            )
    if key_file is None or allow is None:
        return None
    try:
        return NodeKeys(name, Path(key_file), Path(allow), node_at)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("security.")) from None  # a worker has no such section
