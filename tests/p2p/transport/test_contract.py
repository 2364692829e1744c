"""The transport contract, over every transport, and ZeroMQ under both event loops."""

import asyncio
import errno
import math
import socket
import struct
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop
import zmq

from p2p import wire
from p2p.errors import LocalProtocolError
from p2p.transport import FRAMES_MAX, Origin, Transport
from p2p.transport import shared as shared_module
from p2p.transport import zmq as zmq_module
from p2p.transport.memory import MemoryNetwork, MemoryTransport
from p2p.transport.shared import FRAME_BYTES_MAX, TransportCounters
from p2p.transport.zmq import COPY_BYTES_MAX, ZmqTransport, _sendable
from sim_cluster.processes import free_ports

End = MemoryTransport | ZmqTransport
# What `connect` sends. More than one may be on its way when the first has arrived: none of them is a message of a test.
KNOCK = b"is anybody there?"


@dataclass
class Inbox:
    """A transport and what it received, without what `connect` sent."""

    transport: End
    knocks: int = 0
    messages: list[list[bytes]] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    origins: set[Origin] = field(default_factory=set)

    def receive(self, frames: list[memoryview], origin: Origin) -> None:
        self.origins.add(origin)
        if bytes(frames[0]) == KNOCK:
            self.knocks += 1
            return
        self.messages.append([bytes(frame) for frame in frames])
        self.arrived_s.append(time.monotonic())

    @property
    def address(self) -> str:
        return self.transport.address

    @property
    def counters(self) -> TransportCounters:
        return self.transport.counters


class Bench:
    """Makes transports of one kind and closes them."""

    def __init__(self, kind: str, folder: Path, stack: AsyncExitStack) -> None:
        self.kind = kind
        self._folder = folder
        self._stack = stack
        self._network = MemoryNetwork()
        self._count = 0

    def any_address(self) -> str:
        self._count += 1
        if self.kind == "tcp":
            # Not one that the kernel gives to outgoing connections: who calls where nobody listens may get just that port for
            # its own end, and is connected with itself.
            return f"tcp://127.0.0.1:{free_ports(1)[0]}"
        return {"memory": "memory:0", "ipc": f"ipc://{self._folder}/{self._count}"}[self.kind]

    def make(self, address: str | None = None) -> End:
        address = address or self.any_address()
        return MemoryTransport(self._network, address) if self.kind == "memory" else ZmqTransport(address)

    async def open(self, address: str | None = None) -> Inbox:
        inbox = Inbox(self.make(address))
        await inbox.transport.start(inbox.receive)
        self._stack.push_async_callback(inbox.transport.close)
        return inbox

    def inject(self, address: str, frames: list[bytes]) -> None:
        """Send a message that our own `send` would refuse."""
        if self.kind == "memory":
            self._network.inject(address, frames)
            return
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.set(zmq.LINGER, 60_000)
            stranger.connect(address)
            stranger.send_multipart(frames)


Body = Callable[[Bench], Coroutine[Any, Any, None]]


def over(*kinds: str) -> Callable[[Body], Callable[..., None]]:
    """Run an async test body over these kinds of transport, `tcp` on both event loops."""
    cases = [(kind, False) for kind in kinds] + [("tcp", True) for kind in kinds if kind == "tcp"]

    def decorate(body: Body) -> Callable[..., None]:
        @pytest.mark.parametrize(("kind", "fast_loop"), cases, ids=[f"{k}{'-uvloop' * f}" for k, f in cases])
        def test(kind: str, fast_loop: bool, tmp_path: Path) -> None:
            async def main() -> None:
                async with AsyncExitStack() as stack:
                    await body(Bench(kind, tmp_path, stack))

            with asyncio.Runner(loop_factory=uvloop.new_event_loop if fast_loop else None) as runner:
                runner.run(main())

        test.__name__ = body.__name__
        return test

    return decorate


every_transport = over("memory", "tcp", "ipc")
every_zmq = over("tcp", "ipc")


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Return once `condition()` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition never held"
        await asyncio.sleep(0.002)


def open_files() -> int:
    """How many descriptors this process holds."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def connect(sender: Inbox, receiver: Inbox) -> int:
    """Send until one message is taken and has arrived; one that was taken as its connection died is lost, as it may be.

    Returns how many were taken.
    """
    count, taken, taken_s = receiver.knocks, 0, -math.inf

    def arrived() -> bool:
        nonlocal taken, taken_s
        if time.monotonic() - taken_s > 2.0 and sender.transport.send(receiver.address, [KNOCK]):
            taken, taken_s = taken + 1, time.monotonic()
        return receiver.knocks > count

    await until(arrived)
    await until(lambda: sender.transport.connected(receiver.address))
    return taken


def test_both_fulfil_the_protocol_and_carry_the_largest_message() -> None:
    ends: list[Transport] = [MemoryTransport(MemoryNetwork()), ZmqTransport("tcp://127.0.0.1:0")]
    assert len(ends) == 2
    assert wire.MESSAGE_BYTES_MAX <= FRAME_BYTES_MAX


@every_transport
async def test_messages_arrive_whole_and_in_order(bench: Bench) -> None:
    a, b = await bench.open(), await bench.open()
    knocked = await connect(a, b)
    sent = []
    for number in range(2_000):
        message = [struct.pack("<I", number)] + [bytes([part]) * (number % 700) for part in range(number % 4)]
        await until(lambda message=message: a.transport.send(b.address, message))  # type: ignore[misc]
        sent.append(message)
    await until(lambda: len(b.messages) == 2_000)
    assert b.messages == sent
    assert a.messages == []
    assert b.counters.messages_in - b.knocks == a.counters.messages_out - knocked == 2_000
    assert b.counters.bytes_in - b.knocks * len(KNOCK) == a.counters.bytes_out - knocked * len(KNOCK)


@over("memory", "tcp")
async def test_address_names_the_port_that_was_chosen(bench: Bench) -> None:
    any_port = {"memory": "memory:0", "tcp": "tcp://127.0.0.1:0"}[bench.kind]
    a, b = await bench.open(any_port), await bench.open(any_port)
    assert a.address != b.address
    assert not a.address.endswith(":0")


@every_transport
async def test_large_columns_cross_unchanged_and_read_only(bench: Bench) -> None:
    a = await bench.open()
    received: list[list[memoryview]] = []
    b = bench.make()
    await b.start(lambda frames, _: received.append(frames))
    try:
        keys = np.arange(1_000, dtype=np.uint64)
        rows = np.random.default_rng(0).standard_normal((1_000, 1_000), dtype=np.float32)
        frames = [b"envelope", keys.data, rows.data, np.zeros((0, 16), np.float32).data]
        await until(lambda: a.transport.send(b.address, frames))
        await until(lambda: received)
        [[envelope, got_keys, got_rows, empty]] = received
        assert bytes(envelope) == b"envelope"
        assert np.array_equal(np.frombuffer(got_keys, np.uint64), keys)
        assert np.array_equal(np.frombuffer(got_rows, np.float32).reshape(rows.shape), rows)
        assert empty.nbytes == 0
        assert got_rows.readonly
    finally:
        await b.close()


def test_large_frames_are_handed_over_without_a_copy() -> None:
    """In memory the receiver sees the sender's own buffer; ZeroMQ is given it, and gives it back when it is sent."""

    async def main() -> None:
        network = MemoryNetwork()
        a, b = MemoryTransport(network), MemoryTransport(network)
        received: list[list[memoryview]] = []
        await a.start(lambda frames, _: received.append(frames))
        await b.start(lambda frames, _: received.append(frames))
        rows = np.arange(1_000_000, dtype=np.float32)
        assert a.send(b.address, [rows.data])
        await until(lambda: received)
        assert np.shares_memory(np.frombuffer(received[0][0], np.float32), rows)
        await a.close()
        await b.close()

    asyncio.run(main())


@every_transport
async def test_what_arrived_can_be_forwarded_and_arrives_unchanged(bench: Bench) -> None:
    origin, second, third = [await bench.open() for _ in range(3)]
    relay, held = bench.make(), list[list[memoryview]]()
    await relay.start(lambda frames, _: held.append(frames))
    bench._stack.push_async_callback(relay.close)
    for receiver in (second, third):
        await connect(Inbox(relay), receiver)
    await until(lambda: origin.transport.send(relay.address, [b"hello"]))
    sent = [b"header", bytes(range(256)) * 1_000, b"x" * (COPY_BYTES_MAX - 1)]
    await until(lambda: origin.transport.send(relay.address, sent) and len(held) > 1)
    for receiver in (second, third):
        assert relay.send(receiver.address, held[-1])
        assert relay.send(receiver.address, [held[-1][1][8:]])  # a part of a frame is not the frame
    await until(lambda: len(second.messages) == len(third.messages) == 2)
    for receiver in (second, third):
        assert receiver.messages == [sent, [sent[1][8:]]]


def test_a_frame_that_came_from_zmq_goes_on_as_it_is() -> None:
    large, small = zmq.Frame(bytes(COPY_BYTES_MAX)), zmq.Frame(b"small")
    assert _sendable(large.buffer.toreadonly()) is large
    assert _sendable(large.buffer[1:]) is not large
    assert _sendable(small.buffer) is not small  # copying it is cheaper
    rows = np.frombuffer(large.buffer, np.float32).reshape(-1, 64)  # as a batch holds it
    assert _sendable(rows.reshape(-1).view(np.uint8).data) is large
    part = _sendable(rows[1:].reshape(-1).view(np.uint8).data)
    assert isinstance(part, memoryview)
    assert part.nbytes == COPY_BYTES_MAX - 256


@every_transport
async def test_absent_peer_takes_nothing_and_gets_nothing_later(bench: Bench) -> None:
    a, later = await bench.open(), await bench.open()
    address = later.address
    await later.transport.close()
    for number in range(100):
        assert not a.transport.send(address, [b"lost", bytes([number])])
    assert not a.transport.connected(address)
    assert a.counters.refused == 100
    assert a.counters.messages_out == 0
    again = await bench.open(address)
    await until(lambda: a.transport.send(address, [b"taken"]))
    await until(lambda: again.messages)
    assert again.messages == [[b"taken"]]


@every_transport
async def test_peer_that_restarts_on_its_address_is_found_again(bench: Bench) -> None:
    a, b = await bench.open(), await bench.open()
    for life in range(3):
        await connect(a, b)
        assert a.transport.send(b.address, [bytes([life])])
        await until(lambda b=b: b.messages)  # type: ignore[misc]
        assert b.messages == [[bytes([life])]]
        await b.transport.close()
        await until(lambda b=b: not a.transport.connected(b.address))  # type: ignore[misc]
        assert not a.transport.send(b.address, [b"nobody"])
        b = await bench.open(b.address)


@every_transport
async def test_full_queue_refuses_and_recovers(bench: Bench) -> None:
    a, b = await bench.open(), await bench.open()
    knocked = await connect(a, b)
    frames = [b"n", bytes(64_000)]
    taken = 0
    # The loop does not run in between, so `b` reads nothing; ZeroMQ's I/O threads move what sockets and queues hold.
    deadline = time.monotonic() + 60
    while a.transport.send(b.address, frames) or (taken < 2 * zmq_module.QUEUE_MESSAGES_MAX and bench.kind != "memory"):
        taken += 1
        assert time.monotonic() < deadline, "the queue never filled"
    assert a.counters.refused >= 1
    assert a.transport.connected(b.address)
    await until(lambda: len(b.messages) == a.counters.messages_out - knocked)
    assert a.transport.send(b.address, [b"again"])
    await until(lambda: b.messages[-1] == [b"again"])


@every_transport
async def test_too_large_a_message_is_the_callers_error(bench: Bench) -> None:
    a, b = await bench.open(), await bench.open()
    await connect(a, b)
    for frames in ([], [b""] * (FRAMES_MAX + 1), [bytes(FRAME_BYTES_MAX + 1)]):
        with pytest.raises(LocalProtocolError, match=r"limit|expected"):
            a.transport.send(b.address, frames)
    assert a.transport.send(b.address, [bytes(FRAME_BYTES_MAX)])
    await until(lambda: b.messages)
    assert len(b.messages[0][0]) == FRAME_BYTES_MAX


@every_transport
async def test_junk_messages_are_dropped_and_counted(bench: Bench) -> None:
    a, b = await bench.open(), await bench.open()
    await connect(a, b)
    bench.inject(b.address, [b"x"] * (FRAMES_MAX + 1))
    await until(lambda: b.counters.junk == 1)
    bench.inject(b.address, [b"short", bytes(FRAME_BYTES_MAX + 1)])
    # ZeroMQ cuts the sender off in mid-message; in memory the message arrives and is dropped.
    await until(lambda: b.counters.junk == 2 or b.counters.connections_lost >= 2)
    assert b.messages == []
    assert a.transport.send(b.address, [b"still here"])
    await until(lambda: b.messages)
    assert b.messages == [[b"still here"]]


@over("tcp")
async def test_raw_socket_junk_does_no_harm(bench: Bench) -> None:
    a, b = await bench.open(), await bench.open()
    await connect(a, b)
    port = int(b.address.rsplit(":", 1)[1])
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
    wrong_mechanism = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"PLAIN".ljust(20, b"\0") + b"\0" + bytes(31)
    random = np.random.default_rng(7)
    for junk in (b"GET / HTTP/1.1\r\n\r\n", greeting + b"\x04\xff" * 40, wrong_mechanism, random.bytes(5_000), b"\xff" * 64):
        failures = b.counters.handshakes_failed + b.counters.connections_lost + b.counters.messages_in
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(junk)
            stranger.shutdown(socket.SHUT_WR)
            await until(
                lambda failures=failures: (  # type: ignore[misc]
                    b.counters.handshakes_failed + b.counters.connections_lost + b.counters.messages_in > failures
                )
            )
    await until(lambda: b.counters.handshakes_failed >= 2)  # of those who spoke last, too, which may be told late
    assert a.transport.send(b.address, [b"still here"])
    await until(lambda: [b"still here"] in b.messages)


@every_transport
async def test_emulated_delay_keeps_order_and_lasts_its_time(bench: Bench) -> None:
    a, b = await bench.open(), await bench.open()
    await connect(a, b)
    a.transport.set_delay(b.address, 0.05)
    sent_s = []
    for number in range(20):
        sent_s.append(time.monotonic())
        assert a.transport.send(b.address, [bytes([number])])
        await asyncio.sleep(0.002)
    a.transport.set_delay(b.address, 0.0)  # shorter now, but order is kept
    assert a.transport.send(b.address, [bytes([20])])
    await until(lambda: len(b.messages) == 21)
    assert b.messages == [[bytes([number])] for number in range(21)]
    assert all(arrived - sent >= 0.05 for sent, arrived in zip(sent_s, b.arrived_s, strict=False))
    # One that nobody delays is there sooner; not each of them, where other processes have the cores.
    taken_s: list[float] = []
    while not taken_s or (min(taken_s) >= 0.05 and len(taken_s) < 100):
        before, started = len(b.messages), time.monotonic()
        await until(lambda: a.transport.send(b.address, [b"direct"]))
        await until(lambda before=before: len(b.messages) > before)  # type: ignore[misc]
        taken_s.append(b.arrived_s[-1] - started)
    assert min(taken_s) < 0.05


@every_transport
async def test_delayed_messages_die_with_the_connection(bench: Bench) -> None:
    a, b = await bench.open(), await bench.open()
    await connect(a, b)
    # In memory nobody is told that a connection ended: it shows when the message is due. Over sockets it is to end before that.
    a.transport.set_delay(b.address, 0.2 if bench.kind == "memory" else 60.0)
    assert a.transport.send(b.address, [b"on its way"])
    await b.transport.close()
    await until(lambda: a.counters.delayed_lost == 1)
    again = await bench.open(b.address)
    a.transport.set_delay(b.address, 0.0)
    await connect(a, again)
    assert again.messages == []


@every_transport
async def test_delay_line_is_bounded(bench: Bench) -> None:
    a, b = await bench.open(), await bench.open()
    await connect(a, b)
    a.transport.set_delay(b.address, 60.0)
    block = bytes(8 << 20)
    taken = 0
    while a.transport.send(b.address, [block]):
        taken += 1
    assert taken == shared_module.DELAYED_BYTES_MAX // len(block)
    a.transport.disconnect(b.address)


@every_transport
async def test_disconnect_drops_what_waits_and_allows_a_new_start(bench: Bench) -> None:
    a, b = await bench.open(), await bench.open()
    await connect(a, b)
    a.transport.set_delay(b.address, 60.0)
    assert a.transport.send(b.address, [b"never"])
    a.transport.disconnect(b.address)
    assert not a.transport.connected(b.address)
    a.transport.disconnect(b.address)  # twice does no harm
    await connect(a, b)  # with no delay any more
    assert b.messages == []


@every_transport
async def test_taken_address_is_one_clear_line(bench: Bench) -> None:
    a = await bench.open()
    second = bench.make(a.address)
    with pytest.raises(OSError, match="already in use") as caught:
        await second.start(lambda *_: None)
    assert caught.value.errno == errno.EADDRINUSE
    assert a.address in str(caught.value)
    assert "\n" not in str(caught.value)
    await second.close()
    b = await bench.open()
    await connect(b, a)  # the first one still listens


@pytest.mark.parametrize(
    "address", ["tcp://nonsense", "tcp://127.0.0.1:99999999", "inproc://x", "7700", "ipc:///no/such/folder/x"]
)
def test_malformed_address_is_one_clear_line(address: str) -> None:
    async def main() -> None:
        transport = ZmqTransport(address)
        with pytest.raises(OSError, match="cannot listen on") as caught:
            await transport.start(lambda *_: None)
        assert "\n" not in str(caught.value)

        sender = ZmqTransport("tcp://127.0.0.1:0")
        await sender.start(lambda *_: None)
        sender.set_delay(address, 0.1)
        assert not sender.send(address, [b"x"])
        assert not sender.connected(address)
        await sender.close()

    asyncio.run(main())


@every_transport
async def test_close_leaves_nothing_open(bench: Bench) -> None:
    await asyncio.to_thread(int)  # the executor's thread and its pipe exist from here on
    warm = await bench.open()
    await warm.transport.close()
    addresses = [(bench.any_address(), bench.any_address()) for _ in range(3)]  # what keeps their ports for us stays open
    before = open_files()
    for ours, theirs in addresses:
        a, b = await bench.open(ours), await bench.open(theirs)
        await connect(a, b)
        await connect(b, a)
        assert a.transport.send(b.address, [b"last words"])
        await a.transport.close()
        await a.transport.close()
        await until(lambda b=b: b.messages)  # type: ignore[misc]
        assert b.messages == [[b"last words"]]
        await b.transport.close()
        assert not a.transport.send(b.address, [b"closed"])
    assert open_files() <= before


@every_transport
async def test_close_waits_briefly_for_delayed_messages(bench: Bench) -> None:
    a, b = await bench.open(), await bench.open()
    await connect(a, b)
    a.transport.set_delay(b.address, 0.05)
    assert a.transport.send(b.address, [b"farewell"])
    await a.transport.close()
    await until(lambda: b.messages)
    assert b.messages == [[b"farewell"]]


@every_transport
async def test_flood_starves_neither_timers_nor_other_callbacks(bench: Bench) -> None:
    a = await bench.open()
    b = bench.make()
    handled = 0

    def receive_slowly(*_: object) -> None:
        nonlocal handled
        handled += 1
        stop = time.perf_counter() + 0.0005
        while time.perf_counter() < stop:
            pass

    await b.start(receive_slowly)
    try:
        await until(lambda: a.transport.send(b.address, [b"x"]))
        await until(lambda: handled)
        late_s: list[float] = []
        deadline = time.monotonic() + 60.0

        async def flood() -> None:
            while len(late_s) < 20 and time.monotonic() < deadline:
                for _ in range(200):  # more than is handled meanwhile, in the same loop as the receiver
                    a.transport.send(b.address, [b"x"])
                await asyncio.sleep(0)

        async def tick() -> None:
            while len(late_s) < 20 and time.monotonic() < deadline:
                begin = time.process_time()  # the loop never rests meanwhile; what others do on this machine does not count
                await asyncio.sleep(0.005)
                late_s.append(time.process_time() - begin)

        await asyncio.gather(flood(), tick())
        assert handled > 50
        assert len(late_s) >= 20
        assert sorted(late_s)[len(late_s) // 2] < 0.1
    finally:
        await b.close()


@every_zmq
async def test_receiver_that_raises_loses_only_that_message(bench: Bench) -> None:
    a = await bench.open()
    b = bench.make()
    got: list[bytes] = []

    def receive(frames: list[memoryview], _: Origin) -> None:
        got.append(bytes(frames[0]))
        if got[-1] == b"bad":
            raise ValueError("planned")

    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    await b.start(receive)
    try:
        await until(lambda: a.transport.send(b.address, [b"bad"]))
        for number in range(10):
            assert a.transport.send(b.address, [bytes([number])])
        await until(lambda: len(got) == 11)
        assert len(problems) == 1
    finally:
        await b.close()
