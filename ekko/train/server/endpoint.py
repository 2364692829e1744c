"""Where workers and other servers connect: a ROUTER on the server's event loop, and a DEALER to each other server.

Thin: what a request means is decided by the `Handler`, which answers under the ask that it was given, now or later. Columns are
not copied on their way in, and large ones not on their way out. With keys, as on all links between nodes, every connection is
encrypted and both ends prove theirs (`p2p.transport.curve`).
"""

import asyncio
import errno
import time
from collections.abc import Mapping
from typing import Protocol

import structlog
import zmq

from ekko.errors import ConfigError
from ekko.security import NodeKeys
from ekko.train.server import wire as w
from ekko.train.server.coding import decode_answer, decode_request, encode_answer, encode_request, frames_bytes
from ekko.train.server.unsent import Unsent
from p2p.transport import Buffer
from p2p.transport.curve import Gate, demand, guard
from p2p.transport.shared import TransportCounters

# Requests without an answer, of all clients. One more is refused.
ASKS_MAX = 8_192
# Requests served before the loop gets a turn.
REQUESTS_PER_TURN_MAX = 64
# Per client: it bounds what it has under way by itself.
CLIENT_QUEUE_MAX = 256
LINGER_MS = 200
# Messages that are none are counted, and logged no more often than so.
TOLD_S = 10.0
# Of answers to one client that it has not taken; beyond it its pulls are refused as busy. Twice what one answer may have.
UNSENT_BYTES_MAX = 2 * w.MESSAGE_BYTES_MAX
# An answer of more than this is counted there.
COPIED_BYTES_MAX = 64 << 10

_NOBLOCK = int(zmq.NOBLOCK)
_READABLE = int(zmq.POLLIN)

log = structlog.get_logger(__name__)


class Handler(Protocol):
    """Who decides."""

    def on_request(self, ask: int, request: w.Request) -> None:
        """`Endpoint.answer(ask, ...)` is called for each, once."""

    def on_answer(self, answer: w.Answer) -> None:
        """Another server has answered."""


class Endpoint:
    """A bound endpoint, from `open` to `close`. Used from one event loop.

    Args:
        address: `tcp://HOST:PORT`.
        handler: who decides.
        keys: who may connect; None: everybody, on this machine.
    """

    def __init__(self, address: str, handler: Handler, keys: NodeKeys | None = None) -> None:
        self._address = address
        self._handler = handler
        self._keys = keys
        self._gate: Gate | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router: zmq.Socket[bytes] | None = None
        self._peers: dict[str, zmq.Socket[bytes]] = {}  # by endpoint
        self._asks: dict[int, tuple[bytes, int]] = {}  # our number -> client, and its number
        self._last = 0
        self._shut = False
        self._turn: asyncio.Handle | None = None
        self._unsent = Unsent()
        self.transport = TransportCounters()
        self.malformed = 0
        self._told_s = -TOLD_S  # when one was logged last
        self.unanswerable = 0

    @property
    def waiting(self) -> int:
        """Requests without an answer; at most `ASKS_MAX`."""
        return len(self._asks)

    def open(self) -> None:
        """Bind and serve.

        Raises:
            ConfigError: the address is taken or cannot be bound.
        """
        loop = asyncio.get_running_loop()
        if self._keys is not None and self._gate is None:
            self._gate = Gate(self._context, loop, self._keys, self.transport)
        router = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, LINGER_MS),
            (zmq.ROUTER_MANDATORY, 1),  # an answer to a client that went away is an error, not a silence
            (zmq.SNDHWM, CLIENT_QUEUE_MAX),
            (zmq.RCVHWM, CLIENT_QUEUE_MAX),
            (zmq.MAXMSGSIZE, w.MESSAGE_BYTES_MAX),
            (zmq.IPV6, 1),
        ):
            router.set(option, value)
        if self._keys is not None:
            guard(router, self._keys.own)
        try:
            router.bind(self._address)
        except zmq.ZMQError as error:
            router.close(linger=0)
            raise ConfigError(
                f"server.listen: cannot listen on {self._address}: {error}: stop what listens there, or choose another port"
            ) from None
        self._router = router
        loop.add_reader(router.fileno(), self._serve)
        self._serve()

    def shut(self) -> None:
        """Take no more requests; answers still go out. Who has a connection asks in vain, and then another server."""
        self._shut = True  # not unbound: that ends the connections, too, on which answers go out
        if self._router is not None:
            asyncio.get_running_loop().remove_reader(self._router.fileno())

    def keys_changed(self) -> None:
        """Who has no key any more is cut off: all connections end, and those that may come back do."""
        asyncio.get_running_loop().remove_reader(self._the_router.fileno())
        self._the_router.close(linger=0)
        for address in list(self._peers):
            self._hang_up(address)
        self._asks.clear()
        self.open()

    @property
    def _the_router(self) -> "zmq.Socket[bytes]":
        assert self._router is not None, "only while it is open"
        return self._router

    # --- requests

    def _serve(self) -> None:
        """Serve what is there. ZeroMQ's descriptor signals edges only: it is read until nothing is left."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self._shut:
            return
        router = self._the_router
        for _ in range(REQUESTS_PER_TURN_MAX):
            if not int(router.get(zmq.EVENTS)) & _READABLE:  # cheaper than to be told so by an exception
                return
            client = part = router.recv(_NOBLOCK, copy=False)
            frames: list[memoryview] = []
            while part.more:  # `recv_multipart` asks the socket instead, which costs 10 us a frame
                part = router.recv(_NOBLOCK, copy=False)
                if len(frames) <= w.FRAMES_MAX:  # one more than a message may have tells that it has too many
                    frames.append(part.buffer)
            self._serve_one(client.bytes, frames)
        self._take_another_turn()

    def _serve_one(self, client: bytes, frames: list[memoryview]) -> None:
        try:
            theirs, request = decode_request(frames)
        except w.ServerWireError as error:
            self.malformed += 1
            if time.monotonic() >= self._told_s + TOLD_S:  # who sends one may send thousands
                self._told_s = time.monotonic()
                log.warning("server_request_malformed", error=str(error), count=self.malformed)
            if error.number is not None:
                self._send(client, error.number, w.Failed(w.REFUSED, str(error)))
            return
        if len(self._asks) >= ASKS_MAX:
            self._send(client, theirs, w.Failed(w.BUSY, f"the server has {ASKS_MAX} requests waiting: again in a moment"))
            return
        self._last += 1
        self._asks[self._last] = client, theirs
        self._handler.on_request(self._last, request)

    def is_behind(self, ask: int) -> bool:
        """Whether who asked this has not taken its answers, so that it can have no large one now."""
        asked = self._asks.get(ask)
        return asked is not None and self._unsent.bytes_of(asked[0]) > UNSENT_BYTES_MAX

    def answer(self, ask: int, answer: w.Answer) -> None:
        """Answer a request; a client that is gone gets none."""
        asked = self._asks.pop(ask, None)
        if asked is not None:
            self._send(*asked, answer)

    def _send(self, client: bytes, number: int, answer: w.Answer) -> None:
        if self._router is None:
            return
        try:
            frames = encode_answer(number, answer)
            # Frames below ZeroMQ's threshold are copied; larger ones are handed over, and freed when they have left.
            if isinstance(answer, w.Pulled) and (size := frames_bytes(frames)) > COPIED_BYTES_MAX:
                tracked = [zmq.Frame(frame, track=True, copy=False) for frame in frames]
                self._router.send_multipart([client, *tracked], _NOBLOCK, copy=False)
                self._unsent.add(client, zmq.MessageTracker(*tracked), size)
            else:
                self._router.send_multipart([client, *frames], _NOBLOCK, copy=False)
        except (zmq.ZMQError, w.ServerWireError) as error:
            self.unanswerable += 1
            log.info("server_answer_dropped", error=str(error))
        self._take_another_turn()  # sending may have swallowed the signal of a request that came meanwhile

    def _take_another_turn(self) -> None:
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._serve)

    # --- other servers

    def ask_server(self, address: str, request: w.Release) -> None:
        """Send a request to another server. Best effort: what does not leave is asked again by whoever wants it."""
        try:
            peer = self._peers.get(address) or self._dial(address)
            peer.send_multipart(encode_request(0, request), _NOBLOCK)
            # Sending may have swallowed the signal of an answer that came meanwhile.
            asyncio.get_running_loop().call_soon(self._hear, address)
        except zmq.ZMQError as error:
            log.debug("server_not_reached", address=address, error=str(error))
            self._hang_up(address)

    def _dial(self, address: str) -> "zmq.Socket[bytes]":
        peer = self._context.socket(zmq.DEALER)
        for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, 16), (zmq.RCVHWM, 64), (zmq.MAXMSGSIZE, w.HEADER_BYTES_MAX)):
            peer.set(option, value)
        peer.set(zmq.IPV6, 1)
        if self._keys is not None:
            theirs = self._keys.candidates(address)
            if not theirs:
                peer.close(0)
                raise zmq.ZMQError(errno.EACCES, "no key of that node is allowed here")
            demand(peer, self._keys.own, theirs[0])
        peer.connect(address)
        self._peers[address] = peer
        asyncio.get_running_loop().add_reader(peer.fileno(), self._hear, address)
        return peer

    def _hear(self, address: str) -> None:
        peer = self._peers.get(address)
        while peer is not None:
            try:
                frames: list[Buffer] = list(peer.recv_multipart(_NOBLOCK))
            except zmq.Again:
                return
            try:
                _, answer = decode_answer(frames)
            except w.ServerWireError as error:
                self.malformed += 1
                log.warning("server_answer_malformed", address=address, error=str(error))
                continue
            self._handler.on_answer(answer)

    def _hang_up(self, address: str) -> None:
        peer = self._peers.pop(address, None)
        if peer is not None:
            asyncio.get_running_loop().remove_reader(peer.fileno())
            peer.close(0)

    def close(self) -> None:
        """Let go of all sockets; what is on its way out has a moment."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        for address in list(self._peers):
            self._hang_up(address)
        if self._router is not None:
            asyncio.get_running_loop().remove_reader(self._router.fileno())
            self._router.close()
            self._router = None
        if self._gate is not None:
            self._gate.close()
        self._context.term()


def addresses_of(endpoints: Mapping[str, str]) -> dict[str, str]:
    """Endpoint -> node: whose key a server proves."""
    return {endpoint: node for node, endpoint in endpoints.items()}
