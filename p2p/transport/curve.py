"""Who may connect: CURVE keys, and the gate that ZeroMQ asks before it lets a connection in.

Every connection is encrypted and both ends prove a key: a listener has its own pair, and lets in only keys of members; who
dials demands that the listener holds a key of a member. ZeroMQ's I/O thread does the handshake and asks the gate (its ZAP
protocol, on an in-process socket) with the key that the other side has just proven. A stranger costs a handshake and one
look-up here; nothing that it sends reaches us, and it gets no byte of ours.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import zmq
from zmq.utils import z85

from p2p.transport.shared import TransportCounters

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"  # fixed by ZeroMQ's RFC 27
ZAP_VERSION: Final = b"1.0"
ZAP_DOMAIN: Final = b"ekko"
ZAP_FRAMES: Final = 7  # version, request, domain, address, routing id, mechanism, and the one credential of CURVE
KEY_BYTES: Final = 32


class KeyPair(NamedTuple):
    """A node's own key, as ZeroMQ writes keys: 40 characters of Z85 each."""

    public: str
    secret: str


class Keys(Protocol):
    """Whose key is whose, at this moment. Asked from the event loop; must not block."""

    @property
    def own(self) -> KeyPair:
        """Our key."""

    def owner(self, public: str) -> str | None:
        """The node that `public` belongs to; None for a stranger."""

    def candidates(self, address: str) -> Sequence[str]:
        """Public keys that the listener at `address` may hold, the likeliest first."""


class Gate:
    """Answers ZeroMQ's question whether a key may come in. Lives in one context, on the event loop."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        loop: asyncio.AbstractEventLoop,
        keys: Keys,
        counters: TransportCounters,
    ) -> None:
        self.admitted: set[str] = set()  # keys let in since the listener was opened
        self._keys = keys
        self._loop = loop
        self._counters = counters
        self._socket = context.socket(zmq.REP)
        self._socket.set(zmq.LINGER, 0)
        self._socket.bind(ZAP_ENDPOINT)
        loop.add_reader(self._socket.fileno(), self._wake)
        self._wake()  # ZeroMQ signals the descriptor only to a reader that has found nothing before

    def _wake(self) -> None:
        while not self._socket.closed:
            try:
                question = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._socket.send_multipart(self._answer(question), zmq.NOBLOCK)

    def _answer(self, question: list[bytes]) -> list[bytes]:
        request = question[1] if len(question) > 1 else b""
        if len(question) == ZAP_FRAMES and question[5] == b"CURVE" and len(question[6]) == KEY_BYTES:
            public = z85.encode(question[6]).decode()
            if self._keys.owner(public) is not None:
                self.admitted.add(public)
                return [ZAP_VERSION, request, b"200", b"", public.encode(), b""]
        self._counters.strangers += 1
        return [ZAP_VERSION, request, b"400", b"not a member", b"", b""]

    def close(self) -> None:
        """Let nobody in any more."""
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close(0)


def guard(listener: "zmq.Socket[bytes]", own: KeyPair) -> None:
    """Make a socket that is about to listen speak CURVE only, and only to those whom the gate lets in."""
    listener.set(zmq.CURVE_SERVER, 1)
    listener.set(zmq.CURVE_SECRETKEY, own.secret.encode())
    listener.set(zmq.CURVE_PUBLICKEY, own.public.encode())
    listener.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
    listener.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a gate nobody comes in


def demand(dialer: "zmq.Socket[bytes]", own: KeyPair, server: str) -> None:
    """Make a socket that is about to connect prove `own`, and talk only to the holder of `server`."""
    dialer.set(zmq.CURVE_SERVERKEY, server.encode())
    dialer.set(zmq.CURVE_PUBLICKEY, own.public.encode())
    dialer.set(zmq.CURVE_SECRETKEY, own.secret.encode())
