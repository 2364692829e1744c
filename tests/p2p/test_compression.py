"""Compression between regions: the choice, the bytes, what a hostile peer can make of them, and the order of messages."""

import asyncio
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from p2p import messages as m
from p2p import wire
from p2p.errors import RemoteProtocolError
from p2p.link import outgoing as outgoing_module
from p2p.link.compression import BUSY_BYTES, PAUSE_MS_MAX, PAUSE_MS_MIN, RATE_ASSUMED, TRIALS_MIN, LinkRate, Mode, Stream
from p2p.link.links import ACK_BYTES
from p2p.link.outgoing import THREAD_BYTES_MIN, Outgoing
from p2p.link.wrapping import WRAPPED, WRAPPED_BYTES_MAX, unwrap, wrap, wrapped_frames
from p2p.replica import RowColumns
from p2p.transport import Buffer
from p2p.transport.memory import MemoryNetwork
from tests.p2p.test_runtime import Node, Script, run, until

ENVELOPE = m.Envelope(1, 2, 3, 4, version=2)
SLOW = 0.0001  # bytes a nanosecond: 0.8 Mbit/s
FAST = 10.0


def batch_of(rows: np.ndarray, stamp: int = 1 << 22) -> m.Batch:
    """One step of `rows`, float32[n, dim], in shard 0; the keys are not compressible."""
    keys = np.random.default_rng(1).integers(0, 1 << 63, len(rows), np.uint64)
    claims = m.ShardClaims(np.zeros(1, np.uint32), np.zeros(1, np.uint64), np.zeros(1, np.uint16), np.ones(1, np.uint16))
    return wire.seal(m.Batch(7, "t1", "us", 0, 9, stamp, 0, 1, claims, (RowColumns(3, keys, rows.view(np.uint8)),)))


def even(count: int = 500, value: float = 0.5) -> np.ndarray:
    return np.full((count, 64), value, np.float32)


def noise(count: int = 500) -> np.ndarray:
    """Whatever it is, not compressible."""
    return np.random.default_rng(0).integers(0, 1 << 32, (count, 64), np.uint32).view(np.float32)


def views(frames: Sequence[Buffer]) -> list[memoryview]:
    return [memoryview(bytes(frame)) for frame in frames]


# --- the bytes


@pytest.mark.parametrize("rows", [even(), noise(3), even(0)], ids=["even", "noise", "none"])
def test_what_is_unwrapped_is_the_message_to_the_byte(rows: np.ndarray) -> None:
    plain = wire.encode(ENVELOPE, batch_of(rows))
    sent = views(wrapped_frames(plain[0], wrap(plain[1:])))
    assert [bytes(frame) for frame in unwrap(sent)] == [bytes(frame) for frame in plain]
    envelope, message = wire.decode(unwrap(sent))
    assert envelope == ENVELOPE
    assert isinstance(message, m.Batch)
    assert message.columns[0].rows.tobytes() == rows.tobytes()
    assert [bytes(frame) for frame in wire.encode(ENVELOPE, message)[1:]] == [bytes(frame) for frame in plain[1:]]


def test_a_plain_message_passes_untouched() -> None:
    frames = views(wire.encode(ENVELOPE, batch_of(even())))
    assert unwrap(frames) is frames
    assert unwrap([]) == []


def test_the_checksum_is_over_the_bytes_inside() -> None:
    plain = wire.encode(ENVELOPE, batch_of(even()))
    damaged = [plain[0], *(bytearray(frame) for frame in plain[1:])]
    damaged[-1][5] ^= 1
    with pytest.raises(RemoteProtocolError, match="checksum"):
        wire.decode(unwrap(views(wrapped_frames(plain[0], wrap(damaged[1:])))))


def sizes_of(*sizes: int) -> bytes:
    return np.array(sizes, "<u4").tobytes()


def zstd(data: bytes, **options: int) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def without_size(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


HEAD = bytearray(bytes(wire.encode(ENVELOPE, m.Ack(1, 1))[0]))
HEAD[3] |= WRAPPED
OLD = bytearray(HEAD)
OLD[2] = 1


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        pytest.param([OLD, sizes_of(4), zstd(b"abcd")], "in protocol version 1", id="version-1"),
        pytest.param([HEAD], "without sizes", id="alone"),
        pytest.param([HEAD, sizes_of(4)], "without sizes", id="no-payload"),
        pytest.param([HEAD, sizes_of(4), zstd(b"abcd"), b""], "without sizes", id="one-too-many"),
        pytest.param([HEAD, b"", zstd(b"")], "without sizes", id="no-sizes"),
        pytest.param([HEAD, b"12345", zstd(b"")], "without sizes", id="ragged-sizes"),
        pytest.param([HEAD, sizes_of(*[0] * 20_000), zstd(b"")], "without sizes", id="too-many-frames"),
        pytest.param([HEAD, sizes_of(WRAPPED_BYTES_MAX), zstd(bytes(100))], "limit", id="announces-too-much"),
        pytest.param([HEAD, sizes_of(*[2**32 - 1] * 100), zstd(bytes(100))], "limit", id="announces-far-too-much"),
        pytest.param([HEAD, sizes_of(100), zstd(bytes(200 << 20))], "where 100 were announced", id="bomb"),
        pytest.param([HEAD, sizes_of(4 << 20), zstd(bytes(200 << 20))], "were announced", id="bomb-within-the-limit"),
        pytest.param([HEAD, sizes_of(100), without_size(bytes(200 << 20))], "were announced", id="bomb-of-unknown-size"),
        pytest.param([HEAD, sizes_of(100), zstd(bytes(100)) + b"x"], "not zstd", id="more-after-it"),
        pytest.param([HEAD, sizes_of(100), zstd(bytes(100))[:-3]], "not zstd", id="cut-short"),
        pytest.param([HEAD, sizes_of(100), b"\x28\xb5\x2f\xfd junk"], "announced|not zstd", id="junk-with-magic"),
        pytest.param([HEAD, sizes_of(100), b"junk"], "not zstd", id="junk"),
        pytest.param([HEAD, sizes_of(100), b""], "not zstd", id="empty"),
        pytest.param([HEAD, sizes_of(3, 4), zstd(b"abcdefg")], "checksum", id="junk-inside"),
    ],
)
def test_a_wrapped_message_that_is_wrong_costs_no_memory(frames: list[bytes], complaint: str) -> None:
    received = views(frames)
    tracemalloc.start()
    with pytest.raises(RemoteProtocolError, match=complaint):
        wire.decode(unwrap(received))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_frame_that_holds_more_than_it_says_is_refused() -> None:
    """The size that a zstd frame announces is patched: the library must not believe what it finds."""
    honest = bytearray(zstd(bytes(1_000_000)))
    position = honest.find((1_000_000).to_bytes(4, "little"))
    assert position > 0
    honest[position : position + 4] = (1_000).to_bytes(4, "little")
    with pytest.raises(RemoteProtocolError):
        unwrap(views([HEAD, sizes_of(1_000), bytes(honest)]))


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4), st.binary(max_size=20), st.integers(0, 200))
def test_random_bytes_raise_only_remote_errors(frames: list[bytes], junk: bytes, at: int) -> None:
    plain = wire.encode(ENVELOPE, batch_of(even(2)))
    sent = [bytearray(bytes(frame)) for frame in wrapped_frames(plain[0], wrap(plain[1:]))]
    sent[2][at : at + len(junk)] = junk
    for candidate in ([bytes(frame) for frame in sent], [bytes(HEAD), *frames]):
        try:
            wire.decode(unwrap(views(candidate)))
        except RemoteProtocolError:
            continue


# --- the choice


def learnt(saved: float, ns_per_byte: float) -> Stream:
    """After its trials, at time 0."""
    stream = Stream()
    for _ in range(TRIALS_MIN):
        assert stream.wants(SLOW, Mode.AUTO, 0)
        stream.learn(1_000_000, round(1_000_000 * (1 - saved)), round(ns_per_byte * 1_000_000), 0)
    return stream


@pytest.mark.parametrize(
    ("saved", "ns_per_byte", "rate", "auto", "always"),
    [
        (0.15, 2.5, 0.0125, True, True),  # float16 rows over 100 Mbit/s: 12 ns saved for 3
        (0.15, 2.5, 1.25, False, True),  # over 10 Gbit/s: 0.12 ns saved
        (0.99, 0.4, 1.25, True, True),  # rows that are all alike
        (0.0, 2.0, SLOW, False, False),
        (0.02, 0.1, SLOW, False, False),  # not worth the other side's trouble
    ],
)
def test_compressing_pays_where_it_saves_more_time_than_it_takes(
    saved: float, ns_per_byte: float, rate: float, auto: bool, always: bool
) -> None:
    stream = learnt(saved, ns_per_byte)
    assert stream.wants(rate, Mode.AUTO, 0) == auto
    assert stream.wants(rate, Mode.ALWAYS, 0) == always


def test_what_does_not_pay_is_tried_again_ever_more_rarely() -> None:
    stream = learnt(0.0, 2.0)
    trials = []
    for now_ms in range(0, 3_600_000, 100):
        if stream.wants(SLOW, Mode.ALWAYS, now_ms):
            trials.append(now_ms)
            stream.learn(1_000, 1_000, 2_000, now_ms)
    pauses = np.diff(trials)
    assert trials[0] == PAUSE_MS_MIN
    assert pauses.max() <= PAUSE_MS_MAX + 100
    assert (np.diff(pauses) >= 0).all()
    assert len(trials) < 25
    for _ in range(20):  # then the rows change
        stream.learn(1_000, 100, 500, 3_600_000)
    assert stream.wants(SLOW, Mode.AUTO, 3_600_000)


def test_a_link_is_measured_only_while_it_is_busy() -> None:
    rate = LinkRate()
    for number in range(1, 50):  # one message at a time says nothing of what the link could carry
        rate.on_sent(1, number, 10_000, number * 10_000_000)
        rate.on_ack(1, number, number * 10_000_000 + 9_000_000)
    assert rate.rate == RATE_ASSUMED
    # From here on there is always more to send: 1 MiB is acknowledged every 80 ms, 100 Mbit/s.
    size, sequence = 1 << 20, 50
    ahead = 2 * BUSY_BYTES // size
    for _ in range(ahead):
        rate.on_sent(1, sequence, size, 10**9)
        sequence += 1
    for number in range(120):
        rate.on_ack(1, 50 + number, 10**9 + number * 80_000_000)
        rate.on_sent(1, sequence, size, 10**9 + number * 80_000_000)
        sequence += 1
    assert rate.rate == pytest.approx(size / 80_000_000, rel=0.05)
    # An acknowledgement that comes right after another one is no sign of a faster link.
    for number in range(120, 240):
        at_ns = 10**9 + number * 80_000_000
        for sent, after_ns in ((size, 0), (1_000, 1_000)):
            rate.on_sent(1, sequence, sent, at_ns)
            rate.on_ack(1, sequence - ahead, at_ns + after_ns)
            sequence += 1
    assert rate.rate == pytest.approx(size / 80_000_000, rel=0.1)


def test_a_link_that_waits_for_its_acknowledgement_only_is_not_busy() -> None:
    assert 2 * ACK_BYTES <= BUSY_BYTES


def test_what_an_ended_session_had_under_way_is_forgotten() -> None:
    rate = LinkRate()
    rate.on_sent(1, 1, 2 * BUSY_BYTES, 0)
    rate.on_sent(2, 1, 100, 0)
    rate.on_ack(1, 1, 1)
    rate.on_ack(2, 1, 2)
    assert rate.rate == RATE_ASSUMED
    assert rate._in_flight == 0


# --- sending


class Wire:
    """A transport that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, list[bytes]]] = []
        self.refuses = False

    def send(self, address: str, frames: Sequence[Buffer]) -> bool:
        if not self.refuses:
            self.sent.append((address, [bytes(frame) for frame in frames]))
        return not self.refuses

    def stamps(self, address: str) -> list[int]:
        messages = [wire.decode(unwrap(views(frames)))[1] for to, frames in self.sent if to == address]
        return [message.stamp if isinstance(message, m.Batch) else 0 for message in messages]

    @property
    def wrapped(self) -> list[bool]:
        return [bool(frames[0][3] & WRAPPED) for _, frames in self.sent]


def outgoing_of(transport: Wire, mode: Mode = Mode.AUTO) -> Outgoing:
    return Outgoing(transport, mode, lambda address: address != "near")  # type: ignore[arg-type]


def test_compressible_rows_are_wrapped_between_regions_only_and_for_who_understands_it() -> None:
    transport = Wire()
    outgoing = outgoing_of(transport)
    batch = batch_of(even())
    old = m.Envelope(1, 2, 3, 4, version=1)
    for address, envelope, expected in (("far", ENVELOPE, True), ("near", ENVELOPE, False), ("far", old, False)):
        assert outgoing.send(address, envelope, batch)
        assert transport.wrapped[-1] == expected
        assert wire.decode(unwrap(views(transport.sent[-1][1])))[0] == envelope
    assert outgoing.send("far", ENVELOPE, m.Ack(1, 1))
    assert not transport.wrapped[-1], "too small"
    counters = outgoing.counters
    assert (counters.messages, counters.in_vain) == (1, 0)
    plain = sum(len(bytes(frame)) for frame in wire.encode(ENVELOPE, batch))
    assert counters.bytes_before == plain
    assert counters.bytes_saved == plain - sum(map(len, transport.sent[0][1]))


def test_what_would_keep_its_receiver_for_long_goes_as_it_is() -> None:
    """It is expanded on the event loop. The largest batch is below that."""

    async def main() -> None:
        transport = Wire()
        outgoing = outgoing_of(transport, Mode.ALWAYS)
        for payload, wrapped in ((wire.BATCH_BYTES_MAX, True), (WRAPPED_BYTES_MAX, False)):
            assert outgoing.send("far", ENVELOPE, batch_of(even(payload // 264)))
            await outgoing.close()
            outgoing = outgoing_of(transport, Mode.ALWAYS)
            assert transport.wrapped[-1] == wrapped
            assert wire.decode(unwrap(views(transport.sent[-1][1])))[0] == ENVELOPE

    asyncio.run(main())


def test_never_is_never() -> None:
    transport = Wire()
    outgoing_of(transport, Mode.NEVER).send("far", ENVELOPE, batch_of(even()))
    assert transport.wrapped == [False]


def test_noise_switches_itself_off_and_then_costs_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, calls = Wire(), []
    monkeypatch.setattr(outgoing_module, "wrap", lambda body: calls.append(1) or wrap(body))
    outgoing = outgoing_of(transport, Mode.ALWAYS)
    for number in range(200):
        assert outgoing.send("far", ENVELOPE, batch_of(noise(50), (number + 1) << 22))
    assert TRIALS_MIN <= len(calls) <= TRIALS_MIN + 2
    assert outgoing.counters.bytes_saved == 0
    assert not any(transport.wrapped), "what became larger goes as it was"
    assert transport.stamps("far") == [(number + 1) << 22 for number in range(200)]


def test_one_message_to_many_regions_is_compressed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, calls = Wire(), []
    monkeypatch.setattr(outgoing_module, "wrap", lambda body: calls.append(1) or wrap(body))
    outgoing = outgoing_of(transport)
    batch = batch_of(even())
    for number in range(5):
        outgoing.send(f"far-{number}", m.Envelope(1, 100 + number, 3, 4, version=2), batch)
    assert len(calls) == 1
    assert transport.wrapped == [True] * 5
    assert len({frames[2] for _, frames in transport.sent}) == 1


def test_what_follows_a_large_message_waits_for_it() -> None:
    async def main() -> None:
        transport = Wire()
        outgoing = outgoing_of(transport)
        large = even(THREAD_BYTES_MIN // 256 + 1)
        sent = []
        for number, rows in enumerate([even(10), large, even(10), large, even(1)]):
            sent.append((number + 1) << 22)
            assert outgoing.send("far", ENVELOPE, batch_of(rows, sent[-1]))
            if rows is not large:
                assert outgoing.send("other", m.Envelope(1, 5, 3, 4, version=2), batch_of(rows, sent[-1]))
        assert transport.stamps("far") == sent[:1]
        assert transport.stamps("other") == [sent[0], sent[2], sent[4]], "only one address waits"
        await outgoing.close()
        assert transport.stamps("far") == sent
        assert not outgoing._lines

    asyncio.run(main())


def test_what_waits_is_bounded_and_what_is_refused_afterwards_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing_module, "WAITING_BYTES_MAX", 3 * THREAD_BYTES_MIN)

    async def main() -> None:
        transport = Wire()
        outgoing = outgoing_of(transport)
        large = even(THREAD_BYTES_MIN // 256 + 1)
        taken = [outgoing.send("far", ENVELOPE, batch_of(large, (number + 1) << 22)) for number in range(5)]
        assert taken == [True, True, False, False, False]
        transport.refuses = True
        await outgoing.close()
        assert outgoing.counters.lost == 2
        assert outgoing.send("far", ENVELOPE, batch_of(even(1))) is False

    asyncio.run(main())


def test_who_is_forgotten_gets_nothing_that_waited() -> None:
    async def main() -> None:
        transport = Wire()
        outgoing = outgoing_of(transport)
        outgoing.send("far", ENVELOPE, batch_of(even(THREAD_BYTES_MIN // 256 + 1)))
        outgoing.forget("far")
        await outgoing.close()
        assert transport.sent == []
        assert outgoing.counters.lost == 0

    asyncio.run(main())


def test_a_runtime_wraps_and_unwraps() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        peer = Script()
        batch = batch_of(even(3_000))
        async with Node(network, peer, "memory:peer"):
            script = Script(lambda event: [m.Send("memory:peer", ENVELOPE, batch)] if event == m.SchemaChanged() else [])
            async with Node(network, script, compression=Mode.AUTO, crosses=lambda _: True) as node:
                await until(lambda: node.transport.send("memory:peer", [b"x"]))  # connected
                for _ in range(3):
                    node.runtime.submit(m.SchemaChanged())
                await until(lambda: sum(isinstance(event, m.MessageReceived) for event in peer.events) == 3)
                assert node.runtime.outgoing.counters.messages == 3
        received = [event.message for event in peer.events if isinstance(event, m.MessageReceived)]
        assert all(
            isinstance(message, m.Batch) and message.columns[0].rows.size == batch.columns[0].rows.size for message in received
        )

    run(main())
