"""The last step of a message on its way out: encoded, compressed where that pays, and handed to the transport.

Small messages are compressed where they are sent. Large ones are compressed in a thread, and whatever goes to the same address
meanwhile waits behind them, so that order is kept; what waits is bounded. A batch that goes to several regions is compressed
once. A message that the transport refuses after it waited is lost, and counted: its session then shows a hole (R3).
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from p2p import messages as m
from p2p import wire
from p2p.link.compression import WRAP_BYTES_MIN, LinkRate, Mode, Stream
from p2p.link.wrapping import WRAPPED_BYTES_MAX, WRAPPED_SINCE, Wrapped, wrap, wrapped_frames
from p2p.transport import Buffer, Transport

# From here on a message is compressed in a thread: about a millisecond.
THREAD_BYTES_MIN: Final = 512 << 10
# What may wait for one address behind a message that is compressed.
WAITING_BYTES_MAX: Final = 64 << 20
# Peers and streams that are remembered; of the others everything is learnt anew.
LINKS_MAX: Final = 4_096
STREAMS_MAX: Final = 4_096


@dataclass(slots=True)
class CompressionCounters:
    """What compressing did since the start."""

    messages: int = 0  # sent compressed
    bytes_before: int = 0  # of those
    bytes_saved: int = 0
    in_vain: int = 0  # messages that were compressed, and sent as they were
    microseconds: int = 0  # spent on compressing
    lost: int = 0  # messages that waited for a thread, and then found no connection


@dataclass(slots=True, eq=False)
class _Shared:
    """One message compressed, for all links that take it; `wrapped` None: not worth sending so."""

    message: m.Message
    version: int
    wrapped: Wrapped | None = None
    job: "asyncio.Future[None] | None" = None  # while a thread is at it


@dataclass(slots=True, eq=False)
class _Waiting:
    """A message on its way to one address, and what it waits for."""

    plain: Sequence[Buffer]
    size: int
    envelope: m.Envelope
    shared: _Shared | None


@dataclass(slots=True)
class _Line:
    """Messages that wait for one address."""

    messages: deque[_Waiting] = field(default_factory=deque)
    bytes: int = 0


class Outgoing:
    """Sends messages for one runtime. Used from one event loop.

    Args:
        transport: takes the frames.
        mode: what the operator wants.
        crosses: whether an address is in another region.
        on_failure: told of a bug that shows when a message is sent later; `send` raises its own.
        on_saved: told how many bytes less a message of a session to this life of a peer took on the wire.
    """

    def __init__(
        self,
        transport: Transport,
        mode: Mode = Mode.NEVER,
        crosses: Callable[[str], bool] = lambda _: False,
        on_failure: Callable[[Exception], None] = lambda _: None,
        on_saved: Callable[[int, int], None] = lambda _boot, _bytes: None,
    ) -> None:
        self.counters = CompressionCounters()
        self._transport = transport
        self._mode = mode
        self._crosses = crosses
        self._on_failure = on_failure
        self._on_saved = on_saved
        self._rates: dict[int, LinkRate] = {}  # by the peer's boot
        self._streams: dict[tuple[int, int], Stream] = {}  # by the peer's boot and the keyspace
        self._lines: dict[str, _Line] = {}
        self._recent: _Shared | None = None  # the last message that was compressed
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: set[asyncio.Future[None]] = set()  # messages that the thread is at, or that wait for it

    def send(self, address: str, envelope: m.Envelope, message: m.Message) -> bool:
        """Encode and send; False when it was not taken."""
        plain = wire.encode(envelope, message)
        if self._mode is Mode.NEVER or envelope.version < WRAPPED_SINCE or not self._crosses(address):
            return self._transport.send(address, plain)
        size = sum(memoryview(frame).nbytes for frame in plain)
        shared = self._compressed(envelope, message, plain[1:], size) if WRAP_BYTES_MIN <= size <= WRAPPED_BYTES_MAX else None
        line = self._lines.get(address)
        if line is None and (shared is None or shared.job is None):
            return self._hand_over(address, _Waiting(plain, size, envelope, shared))
        if (0 if line is None else line.bytes) + size > WAITING_BYTES_MAX:
            return False
        line = self._lines.setdefault(address, line or _Line())
        line.messages.append(_Waiting(plain, size, envelope, shared))
        line.bytes += size
        if shared is not None and shared.job is not None:
            shared.job.add_done_callback(lambda _: self._advance(address))
        return True

    def on_ack(self, boot: int, ack: m.Ack) -> None:
        """A peer acknowledged: what its link carries."""
        rate = self._rates.get(boot)
        if rate is not None:
            rate.on_ack(ack.session, ack.sequence, time.monotonic_ns())

    def forget(self, address: str) -> None:
        """Drop what waits for an address."""
        self._lines.pop(address, None)

    async def close(self) -> None:
        """Wait for the thread, and send what waits."""
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await asyncio.sleep(0)  # for what the ends of the jobs call
        if self._pool is not None:
            self._pool.shutdown(wait=False)  # nothing is left for it to do

    def _compressed(self, envelope: m.Envelope, message: m.Message, body: Sequence[Buffer], size: int) -> _Shared | None:
        """The message compressed or about to be, when that is wanted."""
        now_ns = time.monotonic_ns()
        stream = self._stream(envelope.receiver_boot, message)
        rate = self._rates.get(envelope.receiver_boot)
        if not stream.wants(LinkRate().rate if rate is None else rate.rate, self._mode, now_ns // 1_000_000):
            return None
        recent = self._recent
        if recent is not None and recent.message is message and recent.version == envelope.version:
            return recent
        shared = self._recent = _Shared(message, envelope.version)
        if size < THREAD_BYTES_MIN:
            self._learn(stream, shared, size, *_timed_wrap(body))
            return shared
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "compress")
        shared.job = asyncio.get_running_loop().create_task(self._compress_in_thread(stream, shared, body, size))
        self._jobs.add(shared.job)
        shared.job.add_done_callback(self._jobs.discard)
        return shared

    async def _compress_in_thread(self, stream: Stream, shared: _Shared, body: Sequence[Buffer], size: int) -> None:
        assert self._pool is not None
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._pool, _timed_wrap, body)
        finally:
            shared.job = None
        self._learn(stream, shared, size, *result)

    def _learn(self, stream: Stream, shared: _Shared, size: int, wrapped: Wrapped, taken_ns: int) -> None:
        wrapped_size = wire.ENVELOPE.size + sum(map(len, wrapped))
        stream.learn(size, wrapped_size, taken_ns, time.monotonic_ns() // 1_000_000)
        self.counters.microseconds += taken_ns // 1_000
        if wrapped_size < size:
            shared.wrapped = wrapped

    def _advance(self, address: str) -> None:
        """Send what waits for an address, up to a message that a thread is still at."""
        line = self._lines.get(address)
        if line is None:
            return
        while line.messages:
            first = line.messages[0]
            if first.shared is not None and first.shared.job is not None:
                return
            line.messages.popleft()
            line.bytes -= first.size
            try:
                taken = self._hand_over(address, first)
            except Exception as error:  # noqa: BLE001 - asyncio would swallow it, and the line would stand for ever
                taken = False
                self._on_failure(error)
            if not taken:
                self.counters.lost += 1
        del self._lines[address]

    def _hand_over(self, address: str, message: _Waiting) -> bool:
        frames, size = message.plain, message.size
        wrapped = None if message.shared is None else message.shared.wrapped
        if wrapped is not None:
            frames = wrapped_frames(message.plain[0], wrapped)
            size = sum(memoryview(frame).nbytes for frame in frames)
        if not self._transport.send(address, frames):
            return False
        if wrapped is not None:
            self.counters.messages += 1
            self.counters.bytes_before += message.size
            self.counters.bytes_saved += message.size - size
        elif message.shared is not None:
            self.counters.in_vain += 1
        envelope = message.envelope
        if envelope.sequence:
            self._rate(envelope.receiver_boot).on_sent(envelope.session, envelope.sequence, size, time.monotonic_ns())
            if size < message.size:
                self._on_saved(envelope.receiver_boot, message.size - size)
        return True

    def _rate(self, boot: int) -> LinkRate:
        rate = self._rates.get(boot)
        if rate is None:
            while len(self._rates) >= LINKS_MAX:
                del self._rates[next(iter(self._rates))]
            rate = self._rates[boot] = LinkRate()
        return rate

    def _stream(self, boot: int, message: m.Message) -> Stream:
        place = (boot, message.keyspace if isinstance(message, m.Batch | m.PullReply) else -1)
        stream = self._streams.get(place)
        if stream is None:
            while len(self._streams) >= STREAMS_MAX:
                del self._streams[next(iter(self._streams))]
            stream = self._streams[place] = Stream()
        return stream


def _timed_wrap(body: Sequence[Buffer]) -> tuple[Wrapped, int]:
    """The message wrapped, and the processor's nanoseconds that took."""
    begin_ns = time.thread_time_ns()
    wrapped = wrap(body)
    return wrapped, time.thread_time_ns() - begin_ns
