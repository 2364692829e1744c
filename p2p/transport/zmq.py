"""The transport over ZeroMQ: one ROUTER that receives from everybody, one DEALER for each address we send to.

Why two sockets for two directions: a ROUTER that also sends must know the peer's routing id before the peer has spoken, and
it drops silently what it cannot route. A DEALER with `ZMQ_IMMEDIATE` belongs to one address, takes a message only while a
connection to it stands, and says at once when it does not: nothing is ever queued towards a dead peer. DEALERs set no
routing id, so the receiving ROUTER gives each connection one of its own and two nodes can never collide on it.

Sockets are used raw and without blocking, with the event loop watching their file descriptors; that is edge-triggered in
ZeroMQ, so each wake-up reads until nothing is left or its time budget is used up, and comes back by itself in that case.

ZeroMQ's I/O thread collects all frames of a message before we see the first one. A single frame is bounded by it
(`FRAME_BYTES_MAX`), their number is not, so a hostile peer on an unauthenticated port can make us hold a message without
end. Only peers that proved an allowed key may be let in from beyond the machine: with `keys`, every connection speaks CURVE
(`p2p.transport.curve`), and when a key is not allowed any more the listener is closed and opened anew, which cuts everybody
off for some tens of milliseconds and lets in only those who still may.

A name is resolved by us, off ZeroMQ's I/O thread, which would stand still meanwhile, and again whenever a connection stays
down.
"""

import asyncio
import contextlib
import errno
import re
import socket
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import zmq
from zmq.utils.monitor import parse_monitor_message

from p2p.transport import FRAMES_MAX, Buffer, Frames, Origin, Receive
from p2p.transport.curve import Gate, KeyPair, Keys, demand, guard
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
# A connection that is down this long is dialled anew: its name is resolved again, its keys are tried again. Longer than
# CONNECT_TIMEOUT_MS, so that an attempt on a slow path is not cut short.
REDIAL_S: Final = 6.0
# After a handshake that failed for the key, when no other key is left to try.
REFUSED_REDIAL_S: Final = 1.0
# Closing a listener takes ZeroMQ's I/O thread a moment; until then its address is taken.
REOPEN_RETRY_S: Final = 0.005
REOPEN_S_MAX: Final = 10.0
# ZeroMQ's own heartbeat finds connections that are dead without being closed (a cable, a frozen process).
HEARTBEAT_MS: Final = 2_000
HEARTBEAT_TIMEOUT_MS: Final = 10_000

PORT_MAX: Final = 65_535

# Flags and options as plain numbers: an operation on pyzmq's own costs as much as handing a frame over.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_NOBLOCK_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_READABLE: Final = int(zmq.POLLIN)

_ADDRESS: Final = re.compile(r"tcp://[^:\s/;]+:[0-9]{1,5}|tcp://\[[0-9a-fA-F:.%]+\]:[0-9]{1,5}|ipc://[^\s]+")
_NUMBERS: Final = re.compile(r"[0-9.]+")
_HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_MONITORED: Final = _HANDSHAKE_FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class ZmqTransport:
    """Fulfils `p2p.transport.Transport` over `tcp://HOST:PORT` (port 0: any free one) and `ipc://PATH`.

    Args:
        bind: where to listen.
        advertise: what peers dial, where it differs from `bind`.
        keys: encrypt, and speak with the owners of these keys only; None: with everybody, in the clear.
    """

    def __init__(self, bind: str, *, advertise: str | None = None, keys: Keys | None = None) -> None:
        self.counters = TransportCounters()
        self._bind = bind
        self._keys = keys
        self._own: KeyPair | None = None  # with which the listener was opened
        self._gate: Gate | None = None
        self._advertise = advertise
        self._address = advertise or bind
        self._receive: Receive | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._router: zmq.Socket[bytes] | None = None
        self._monitor: _Monitor | None = None
        self._peers: dict[str, _Peer] = {}
        self._origins: dict[bytes, Origin] = {}  # by the routing id of a connection

    @property
    def address(self) -> str:
        return self._address

    async def start(self, receive: Receive) -> None:
        self._loop = asyncio.get_running_loop()
        context = self._context = zmq.Context()
        context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)
        if self._keys is not None:
            self._gate = Gate(context, self._loop, self._keys, self.counters)
        try:
            _check_address(self._bind)
            _refuse_taken_path(self._bind)
            self._bind = await _numeric(self._loop, self._bind)
            self._open_listener(context, self._loop)
        except (OSError, zmq.ZMQError) as error:
            await self.close()
            raise OSError(error.errno, f"cannot listen on {self._bind}: {_reason(error)}") from None
        self._address = self._advertise or self._bind
        self._receive = receive
        self._wake()  # what came meanwhile makes no new edge

    def _open_listener(self, context: "zmq.Context[zmq.Socket[bytes]]", loop: asyncio.AbstractEventLoop) -> None:
        """Bind a new ROUTER; `_bind` gets the port that was chosen.

        Raises:
            ZMQError: the address is taken or malformed. Nothing is left open.
        """
        router = _configured(context.socket(zmq.ROUTER), self._bind)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.BACKLOG, BACKLOG)
        if self._keys is not None:
            self._own = self._keys.own
            guard(router, self._own)
        monitor = _Monitor(router, loop, self.counters)
        try:
            router.bind(self._bind)
        except zmq.ZMQError:
            monitor.close()
            router.close(0)
            raise
        self._bind = router.get_string(zmq.LAST_ENDPOINT)
        self._router, self._monitor = router, monitor
        loop.add_reader(router.fileno(), self._wake)

    def _close_listener(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._router is not None and self._monitor is not None:
            loop.remove_reader(self._router.fileno())
            self._monitor.close()
            self._router.close(0)
        self._router = self._monitor = None

    async def check_keys(self) -> None:
        """End every connection that rests on a key which is not allowed any more, or on our old one; when `keys` has changed.

        Raises:
            OSError: we cannot listen again.
        """
        keys, gate, context, loop = self._keys, self._gate, self._context, self._loop
        if keys is None or gate is None or context is None or loop is None or self._receive is None:
            return
        renewed = self._own != keys.own
        for peer in self._peers.values():
            if renewed or (peer.server is not None and keys.owner(peer.server) is None):
                peer.redial()
        if not renewed and all(keys.owner(public) is not None for public in gate.admitted):
            return
        gate.admitted.clear()
        self._close_listener(loop)
        deadline = time.monotonic() + REOPEN_S_MAX
        while self._context is not None:
            try:
                self._open_listener(context, loop)
            except zmq.ZMQError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise OSError(error.errno, f"cannot listen again on {self._bind}: {_reason(error)}") from None
                await asyncio.sleep(REOPEN_RETRY_S)
            else:
                self._wake()
                return

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
        if self._context is None or self._loop is None:
            return
        context, self._context = self._context, None
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
            self._close_listener(self._loop)
            if self._gate is not None:
                self._gate.close()
            # Waits up to LINGER_MS for what the DEALERs still hold; not on the loop's thread.
            await asyncio.to_thread(context.term)

    def _peer(self, address: str) -> "_Peer | None":
        """The DEALER for `address`, made on first use; None when there can be none."""
        peer = self._peers.get(address)
        if peer is not None and peer.broken:
            self.disconnect(address)
            peer = None
        if peer is None and len(self._peers) >= PEERS_MAX:
            # Who does not answer makes room, the first of them first: nobody's addresses must not take a member's place.
            silent = next((one for one, other in self._peers.items() if not other.connected), None)
            if silent is not None:
                self.disconnect(silent)
        if peer is None and self._context is not None and self._loop is not None and len(self._peers) < PEERS_MAX:
            # Addresses come from peers' gossip: a bad one is refused like an absent peer.
            with contextlib.suppress(OSError, zmq.ZMQError):
                _check_address(address)
                peer = self._peers[address] = _Peer(self._context, address, self._loop, self.counters, self._keys)
        return peer

    def _wake(self) -> None:
        """Receive until nothing is left, for a bounded time; then let timers and others run."""
        if self._receive is None or self._router is None or self._loop is None:
            return
        stop = time.monotonic() + WAKE_BUDGET_S
        drained = False
        try:
            while not drained and self._router is not None and time.monotonic() < stop:
                message = _receive_message(self._router)
                drained = message is None
                if message is not None:
                    self._hand_up(*message, self._receive)
        finally:
            if not drained:
                self._loop.call_soon(self._wake)

    def _hand_up(self, routing: zmq.Frame, frames: list[memoryview], receive: Receive) -> None:
        if not frames:
            self.counters.junk += 1
            return
        if self._keys is None:
            origin = self._origin_of(routing.bytes)
        else:
            node = self._keys.owner(str(routing.get("User-Id")))
            if node is None:  # until `check_keys` has cut it off
                self.counters.revoked += 1
                return
            origin = Origin(node, node)
        self.counters.messages_in += 1
        self.counters.bytes_in += sum([frame.nbytes for frame in frames])
        receive(frames, origin)

    def _origin_of(self, routing: bytes) -> Origin:
        """Who speaks on an unauthenticated connection, as the ROUTER numbers them; the same object for the same one."""
        origin = self._origins.get(routing)
        if origin is None:
            if len(self._origins) >= PEERS_MAX:
                self._origins.clear()
            origin = self._origins[routing] = Origin(f"connection {routing.hex()}")
        return origin


class _Peer:
    """The DEALER towards one address, and the delay line in front of it.

    ZeroMQ reconnects by itself. We begin anew where it would repeat a mistake: the name may mean another machine by now, or the
    listener may have another key.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        address: str,
        loop: asyncio.AbstractEventLoop,
        counters: TransportCounters,
        keys: Keys | None,
    ) -> None:
        self.line = DelayLine(self.send)
        self.broken = False  # of no more use: a message was cut in the middle
        self.server: str | None = None  # the public key that we demand of the listener
        self._context = context
        self._address = address
        self._loop = loop
        self._counters = counters
        self._keys = keys
        self._untried: list[str] = []  # keys that the listener may hold, the likeliest last
        self._resolutions = 0
        self._resolving: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: _Monitor | None = None
        self._dial()

    @property
    def connected(self) -> bool:
        return self._monitor is not None and self._monitor.connected and not self.broken

    def redial(self) -> None:
        """Give up the connection, with what waits for it, and begin anew."""
        self._untried.clear()
        self._drop_delayed()
        self._dial()

    def _dial(self) -> None:
        self._hang_up(linger_ms=0)
        self._redial_in(REDIAL_S)
        if _name_of(self._address) is None:
            self._connect(self._address)
        else:
            self._resolving = self._loop.create_task(self._resolve_and_connect())

    async def _resolve_and_connect(self) -> None:
        # A name that means nothing now may mean something at the next attempt.
        with contextlib.suppress(OSError, zmq.ZMQError):
            target = await _numeric(self._loop, self._address, self._resolutions)
            self._resolutions += 1  # of several addresses, another one each time
            self._connect(target)

    def _connect(self, target: str) -> None:
        """Connect to numbers.

        Raises:
            ZMQError: ZeroMQ does not understand them. Nothing is left open.
        """
        if self._keys is not None:
            self._untried = self._untried or list(self._keys.candidates(self._address))[::-1]
            if not self._untried:
                return
            self.server = self._untried.pop()
        new = self._socket = _configured(self._context.socket(zmq.DEALER), target)
        # A DEALER is written only; what a peer sends into it stays in the peer's queue and our kernel's.
        new.set(zmq.RCVHWM, 1)
        new.set(zmq.IMMEDIATE, 1)
        new.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        new.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
        new.set(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
        if self._keys is not None and self.server is not None:
            demand(new, self._keys.own, self.server)
        self._monitor = _Monitor(new, self._loop, self._counters, self._on_event)
        try:
            new.connect(target)
        except zmq.ZMQError:
            self.close(linger_ms=0)
            raise

    def _on_event(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._untried.clear()
            self._cancel_timer()
        elif event == zmq.EVENT_DISCONNECTED:
            self._drop_delayed()
            if self._timer is None:
                self._redial_in(REDIAL_S)
        elif self._keys is not None:  # a handshake failed: the listener has another key, or does not let us in
            self._hang_up(linger_ms=0)  # ZeroMQ would try the same key again and again
            self._redial_in(0.0 if self._untried and event != zmq.EVENT_HANDSHAKE_FAILED_AUTH else REFUSED_REDIAL_S)

    def _redial_in(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(seconds, self._dial)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send(self, frames: Frames) -> bool:
        """Hand a message to ZeroMQ; False when the peer is not there or its queue is full."""
        if self.broken or self._socket is None:
            return False
        last = len(frames) - 1
        for index, frame in enumerate(frames):
            sent = _sendable(frame)
            try:
                self._socket.send(sent, _NOBLOCK if index == last else _NOBLOCK_MORE, copy=not isinstance(sent, zmq.Frame))
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

    def _hang_up(self, linger_ms: int) -> None:
        self._cancel_timer()
        if self._resolving is not None:
            self._resolving.cancel()
            self._resolving = None
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self._socket is not None:
            self._socket.close(linger_ms)
            self._socket = None

    def close(self, linger_ms: int) -> None:
        self.line.clear()
        self._hang_up(linger_ms)


class _Monitor:
    """Follows a socket's connections: whether one stands, and how many failed or ended."""

    def __init__(
        self,
        watched: "zmq.Socket[bytes]",
        loop: asyncio.AbstractEventLoop,
        counters: TransportCounters,
        on_event: Callable[[int], None] | None = None,
    ) -> None:
        self.connected = False
        self._watched = watched
        self._loop = loop
        self._counters = counters
        self._on_event = on_event
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
            elif event & _HANDSHAKE_FAILED:
                self._counters.handshakes_failed += 1
            if self._on_event is not None:
                self._on_event(event)

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._descriptor)
            self._watched.disable_monitor()
            self._socket.close(0)


def _configured(new: "zmq.Socket[bytes]", address: str) -> "zmq.Socket[bytes]":
    """Set what both kinds of socket share."""
    for option, value in (
        (zmq.IPV6, int("[" in address)),
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


def _sendable(frame: Buffer) -> Buffer | zmq.Frame:
    """A small frame as it is, to be copied; a large one as ZeroMQ's own, to be shared.

    A large frame that came from ZeroMQ and goes on whole, through whatever views, shares its memory inside ZeroMQ. A view of it
    would wake a Python thread at every receiver to let go of it: 0.1 ms for three of them.
    """
    if type(frame) is bytes and len(frame) < COPY_BYTES_MAX:
        return frame
    view = byte_view(frame)
    if view.nbytes < COPY_BYTES_MAX:
        return view
    owner: object = view
    while isinstance(owner, (memoryview, np.ndarray)):
        owner = owner.obj if isinstance(owner, memoryview) else owner.base
    # Of equal length: not a part of it.
    return owner if isinstance(owner, zmq.Frame) and len(owner) == view.nbytes else zmq.Frame(view, copy=False)


def _receive_message(router: "zmq.Socket[bytes]") -> tuple[zmq.Frame, list[memoryview]] | None:
    """The routing id and the frames of the next message, none of them for junk; None when nothing is there."""
    if not int(router.get(zmq.EVENTS)) & _READABLE:  # a third of what it costs to be told so by an exception
        return None
    routing = frame = router.recv(_NOBLOCK, copy=False)
    frames: list[memoryview] = []
    count = 0
    while frame.more:
        frame = router.recv(_NOBLOCK, copy=False)
        count += 1
        if count <= FRAMES_MAX:
            frames.append(frame.buffer.toreadonly())
    return routing, frames if count <= FRAMES_MAX else []


def _check_address(address: str) -> None:
    """Refuse what ZeroMQ would misread: it knows more schemes than ours, and wraps ports around.

    Raises:
        OSError: not an address of ours.
    """
    if not _ADDRESS.fullmatch(address) or (address.startswith("tcp://") and int(address.rpartition(":")[2]) > PORT_MAX):
        raise OSError(errno.EINVAL, "expected tcp://HOST:PORT or ipc://PATH")


def _name_of(address: str) -> tuple[str, str] | None:
    """Host and port where the host is a name; None for numbers, `*` and paths."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or host.startswith("[") or host == "*" or _NUMBERS.fullmatch(host):
        return None
    return host, port


async def _numeric(loop: asyncio.AbstractEventLoop, address: str, choice: int = 0) -> str:
    """`address` with numbers for a name, the `choice`-th of its addresses, counted in a circle.

    Raises:
        OSError: the name cannot be resolved.
    """
    name = _name_of(address)
    if name is None:
        return address
    found = sorted(
        {str(info[4][0]) for info in await loop.getaddrinfo(*name, type=socket.SOCK_STREAM)}, key=lambda a: (":" in a, a)
    )
    host = found[choice % len(found)]
    return f"tcp://[{host}]:{name[1]}" if ":" in host else f"tcp://{host}:{name[1]}"


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
