"""The transport over ZeroMQ: one ROUTER that receives from everybody, one DEALER for each address we send to.

Why two sockets for two directions: a ROUTER that also sends must know the peer's routing id before the peer has spoken, and
it drops silently what it cannot route. A DEALER with `ZMQ_IMMEDIATE` belongs to one address, takes a message only while a
connection to it stands, and says at once when it does not: nothing is ever queued towards a dead peer. DEALERs set no
routing id, so the receiving ROUTER gives each connection one of its own and two nodes can never collide on it.

Sockets are used raw and without blocking, with the event loop watching their file descriptors; that is edge-triggered in
ZeroMQ, so each wake-up reads until nothing is left or its time budget is used up, and comes back by itself in that case.

ZeroMQ's I/O thread collects all frames of a message before we see the first one. A single frame is bounded by it
(`FRAME_BYTES_MAX`), their number is not, so a hostile peer on an unauthenticated port can make us hold a message without
end. Only authenticated peers may be let in from beyond the machine.
"""

import asyncio
import contextlib
import errno
import re
import socket
import time
from collections.abc import Callable
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from p2p.transport import FRAMES_MAX, Buffer, Frames, Receive
from p2p.transport.shared import (
    CLOSE_FLUSH_S,
    FRAME_BYTES_MAX,
    WAKE_BUDGET_S,
    DelayLine,
    TransportCounters,
    byte_view,
    check_frames,
)

# Messages queued in ZeroMQ towards or from one peer. The protocol's credit (4,096 messages, 32 MiB) is what bounds a link,
# and has to run out first: a message refused here ends its session. This bounds what carries no credit.
QUEUE_MESSAGES_MAX: Final = 6_144
# Addresses we hold a DEALER for; as many as there can be members.
PEERS_MAX: Final = 4_096
# Each peer takes a DEALER and the two ends of its monitor; ZeroMQ's own default of 1,023 would stop at 341 peers.
SOCKETS_MAX: Final = 3 * PEERS_MAX + 16
# Frames below this are copied into ZeroMQ: handing a buffer over and back costs about as much as copying 16 KiB.
COPY_BYTES_MAX: Final = 16_384
# Connections waiting to be accepted: a whole region may come back at once.
BACKLOG: Final = 1_024
# A closing socket keeps sending this long what it already took.
LINGER_MS: Final = 200
# A peer that restarts is found again within the larger of these.
RECONNECT_MS: Final = 50
RECONNECT_MS_MAX: Final = 500
CONNECT_TIMEOUT_MS: Final = 5_000
# A connection that does not finish the handshake by then is a stranger.
HANDSHAKE_MS_MAX: Final = 5_000
# ZeroMQ's own heartbeat finds connections that are dead without being closed (a cable, a frozen process).
HEARTBEAT_MS: Final = 2_000
HEARTBEAT_TIMEOUT_MS: Final = 10_000

PORT_MAX: Final = 65_535

_ADDRESS: Final = re.compile(r"tcp://[^:\s/;]+:[0-9]{1,5}|tcp://\[[0-9a-fA-F:.%]+\]:[0-9]{1,5}|ipc://[^\s]+")
_HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_MONITORED: Final = _HANDSHAKE_FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class ZmqTransport:
    """Fulfils `p2p.transport.Transport` over `tcp://HOST:PORT` (port 0: any free one) and `ipc://PATH`.

    Args:
        bind: where to listen.
        advertise: what peers dial, where it differs from `bind`.
    """

    def __init__(self, bind: str, *, advertise: str | None = None) -> None:
        self.counters = TransportCounters()
        self._bind = bind
        self._advertise = advertise
        self._address = advertise or bind
        self._receive: Receive | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._router: zmq.Socket[bytes] | None = None
        self._monitor: _Monitor | None = None
        self._peers: dict[str, _Peer] = {}

    @property
    def address(self) -> str:
        return self._address

    async def start(self, receive: Receive) -> None:
        self._loop = asyncio.get_running_loop()
        context = self._context = zmq.Context()
        context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)
        router = self._router = _configured(context.socket(zmq.ROUTER))
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.BACKLOG, BACKLOG)
        self._monitor = _Monitor(router, self._loop, self.counters)
        try:
            _check_address(self._bind)
            _refuse_taken_path(self._bind)
            router.bind(self._bind)
        except (OSError, zmq.ZMQError) as error:
            await self.close()
            raise OSError(error.errno, f"cannot listen on {self._bind}: {_reason(error)}") from None
        self._address = self._advertise or router.get_string(zmq.LAST_ENDPOINT)
        self._receive = receive
        self._loop.add_reader(router.fileno(), self._wake)
        self._wake()  # what came between `bind` and `add_reader` makes no new edge

    def send(self, address: str, frames: Frames) -> bool:
        size = check_frames(frames)
        peer = self._peer(address)
        if peer is None:
            taken = False
        elif peer.line.direct:
            taken = peer.send(frames)
        else:
            taken = peer.connected and peer.line.offer(tuple(frames), size)
        if taken:
            self.counters.messages_out += 1
            self.counters.bytes_out += size
        else:
            self.counters.refused += 1
        return taken

    def connected(self, address: str) -> bool:
        peer = self._peers.get(address)
        return peer is not None and peer.connected

    def disconnect(self, address: str) -> None:
        peer = self._peers.pop(address, None)
        if peer is not None:
            peer.close(linger_ms=0)

    def set_delay(self, address: str, seconds: float) -> None:
        peer = self._peer(address)
        if peer is not None:
            peer.line.seconds = seconds

    async def close(self) -> None:
        if self._context is None or self._router is None or self._loop is None:
            return
        context, router, self._context = self._context, self._router, None
        if self._receive is not None:
            self._loop.remove_reader(router.fileno())
            self._receive = None
        try:
            async with asyncio.timeout(CLOSE_FLUSH_S):
                for peer in list(self._peers.values()):
                    await peer.line.emptied.wait()
        except TimeoutError:
            pass
        finally:
            for peer in self._peers.values():
                peer.close(LINGER_MS)
            self._peers.clear()
            if self._monitor is not None:
                self._monitor.close()
            router.close(0)
            # Waits up to LINGER_MS for what the DEALERs still hold; not on the loop's thread.
            await asyncio.to_thread(context.term)

    def _peer(self, address: str) -> "_Peer | None":
        """The DEALER for `address`, made on first use; None when there can be none."""
        peer = self._peers.get(address)
        if peer is not None and peer.broken:
            self.disconnect(address)
            peer = None
        if peer is None and self._context is not None and self._loop is not None and len(self._peers) < PEERS_MAX:
            # Addresses come from peers' gossip: a bad one is refused like an absent peer.
            with contextlib.suppress(OSError, zmq.ZMQError):
                _check_address(address)
                peer = self._peers[address] = _Peer(self._context, address, self._loop, self.counters)
        return peer

    def _wake(self) -> None:
        """Receive until nothing is left, for a bounded time; then let timers and others run."""
        if self._receive is None or self._router is None or self._loop is None:
            return
        stop = time.monotonic() + WAKE_BUDGET_S
        drained = False
        try:
            while not drained and time.monotonic() < stop:
                frames = _receive_message(self._router)
                drained = frames is None
                if frames is not None:
                    self._hand_up(frames, self._receive)
        finally:
            if not drained:
                self._loop.call_soon(self._wake)

    def _hand_up(self, frames: list[memoryview], receive: Receive) -> None:
        if not frames:
            self.counters.junk += 1
            return
        self.counters.messages_in += 1
        self.counters.bytes_in += sum(frame.nbytes for frame in frames)
        receive(frames)


class _Peer:
    """The DEALER towards one address, and the delay line in front of it."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        address: str,
        loop: asyncio.AbstractEventLoop,
        counters: TransportCounters,
    ) -> None:
        self.line = DelayLine(self.send)
        self.broken = False  # of no more use: a message was cut in the middle
        self._counters = counters
        self._socket = _configured(context.socket(zmq.DEALER))
        # A DEALER is written only; what a peer sends into it stays in the peer's queue and our kernel's.
        self._socket.set(zmq.RCVHWM, 1)
        self._socket.set(zmq.IMMEDIATE, 1)
        self._socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
        self._socket.set(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
        self._monitor = _Monitor(self._socket, loop, counters, self._drop_delayed)
        try:
            self._socket.connect(address)
        except zmq.ZMQError:
            self.close(linger_ms=0)
            raise

    @property
    def connected(self) -> bool:
        return self._monitor.connected and not self.broken

    def send(self, frames: Frames) -> bool:
        """Hand a message to ZeroMQ; False when the peer is not there or its queue is full."""
        if self.broken:
            return False
        for index, frame in enumerate(frames):
            more = zmq.SNDMORE if index + 1 < len(frames) else 0
            try:
                self._socket.send(_sendable(frame), zmq.NOBLOCK | more, copy=False)
            except zmq.Again:
                if index:
                    # The connection broke inside the message, and ZeroMQ now swallows frames until a message ends: it would
                    # swallow the next one too.
                    self.broken = True
                    self._drop_delayed()
                return False
        return True

    def _drop_delayed(self) -> None:
        self._counters.delayed_lost += self.line.clear()

    def close(self, linger_ms: int) -> None:
        self.line.clear()
        self._monitor.close()
        self._socket.close(linger_ms)


class _Monitor:
    """Follows a socket's connections: whether one stands, and how many failed or ended."""

    def __init__(
        self,
        watched: "zmq.Socket[bytes]",
        loop: asyncio.AbstractEventLoop,
        counters: TransportCounters,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self.connected = False
        self._watched = watched
        self._loop = loop
        self._counters = counters
        self._on_lost = on_lost
        self._socket = watched.get_monitor_socket(_MONITORED)
        self._descriptor = self._socket.fileno()
        loop.add_reader(self._descriptor, self._wake)
        self._wake()  # ZeroMQ signals the descriptor only to a reader that has found nothing before

    def _wake(self) -> None:
        while not self._socket.closed:
            try:
                event = parse_monitor_message(self._socket.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected = True
            elif event == zmq.EVENT_DISCONNECTED:
                self._counters.connections_lost += 1
                self.connected = False
                if self._on_lost is not None:
                    self._on_lost()
            elif event & _HANDSHAKE_FAILED:
                self._counters.handshakes_failed += 1

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._descriptor)
            self._watched.disable_monitor()
            self._socket.close(0)


def _configured(new: "zmq.Socket[bytes]") -> "zmq.Socket[bytes]":
    """Set what both kinds of socket share."""
    for option, value in (
        (zmq.SNDHWM, QUEUE_MESSAGES_MAX),
        (zmq.RCVHWM, QUEUE_MESSAGES_MAX),
        (zmq.LINGER, 0),
        (zmq.MAXMSGSIZE, FRAME_BYTES_MAX),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_MS_MAX),
        (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        (zmq.TCP_KEEPALIVE, 1),
    ):
        new.set(option, value)
    new.copy_threshold = COPY_BYTES_MAX
    return new


def _sendable(frame: Buffer) -> Buffer:
    return byte_view(frame) if isinstance(frame, memoryview) else frame


def _receive_message(router: "zmq.Socket[bytes]") -> list[memoryview] | None:
    """The next message without its routing id; [] for junk, None when nothing is there."""
    try:
        frame = router.recv(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
    frames: list[memoryview] = []
    count = 0
    while frame.more:
        frame = router.recv(zmq.NOBLOCK, copy=False)
        count += 1
        if count <= FRAMES_MAX:
            frames.append(frame.buffer.toreadonly())
    return frames if count <= FRAMES_MAX else []


def _check_address(address: str) -> None:
    """Refuse what ZeroMQ would misread: it knows more schemes than ours, and wraps ports around.

    Raises:
        OSError: not an address of ours.
    """
    if not _ADDRESS.fullmatch(address) or (address.startswith("tcp://") and int(address.rpartition(":")[2]) > PORT_MAX):
        raise OSError(errno.EINVAL, "expected tcp://HOST:PORT or ipc://PATH")


def _refuse_taken_path(address: str) -> None:
    """ZeroMQ removes a socket file that it finds in its way, even when somebody listens there.

    Raises:
        OSError: somebody does.
    """
    if address.startswith("ipc://"):
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            probe.setblocking(False)
            probe.connect(address.removeprefix("ipc://"))
            raise OSError(errno.EADDRINUSE, "the address is already in use")


def _reason(error: OSError | zmq.ZMQError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "the address is already in use; stop the process that listens there, or choose another port"
        case errno.EINVAL | errno.EPROTONOSUPPORT:
            return "expected tcp://HOST:PORT or ipc://PATH"
        case _:
            return error.strerror or str(error)
