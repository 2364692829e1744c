"""Every message survives the wire bit for bit; junk raises one error type."""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p import messages as m
from p2p import wire
from p2p.errors import RemoteProtocolError
from p2p.messages.fences import CLOSED, LIFTED, Restorer
from p2p.replica import KnownSteps, RowColumns, SchemaEntry, TableKeys
from p2p.stamps import make_stamp
from p2p.transport import FRAMES_MAX
from p2p.versions import PROTOCOL_VERSION
from p2p.wire.columns import Columns
from p2p.wire.frames import body_of, pack_envelope
from p2p.wire.members import MEMBER_NEWS
from p2p.wire.table import KINDS, NUMBER_OF

ENVELOPE = m.Envelope(11, 22, 3, 4, 1, PROTOCOL_VERSION)
STAMP = make_stamp(1_700_000_000_000, 5, 9)
WRITERS = np.array([2, 9], np.uint16)
NO_SHARDS, NO_STAMPS = np.empty(0, np.uint32), np.empty((0, 0), np.uint64)
MEMBER = m.MemberRecord(
    "eu-1",
    77,
    1_700_000_000_000,
    "eu",
    "serve",
    "tcp://127.0.0.1:1",
    12,
    False,
    (m.WriterRecord(5, 9, 3, STAMP),),
    holds=(m.Holding(5, 3, (0, 2)), m.Holding(6, 2, ())),
)


def vector(shards: int = 3) -> np.ndarray:
    return np.array([[make_stamp(1_700_000_000_000, row, writer) for writer in (2, 9)] for row in range(shards)], np.uint64)


def sections(stamps: bool) -> tuple[RowColumns, ...]:
    keys = np.arange(5, dtype=np.uint64)
    rows = np.arange(3 * 8, dtype=np.uint8).reshape(3, 8)
    one = RowColumns(1, keys, rows, np.full(5, STAMP, np.uint64) if stamps else None)
    two = RowColumns(2, keys[:1], rows[:0], np.full(1, STAMP, np.uint64) if stamps else None, np.full(1, 77, np.uint8))
    return one, two


def claims(count: int = 2) -> m.ShardClaims:
    shards = np.arange(count, dtype=np.uint32)
    return m.ShardClaims(shards, np.zeros(count, np.uint64), np.zeros(count, np.uint16), np.ones(count, np.uint16))


def batch() -> m.Batch:
    return m.Batch(5, "t-1", "train", 9, 3, STAMP, STAMP - 4096, 2, claims(), sections(False), 123, 456, 7)


def reply(last: bool = True) -> m.PullReply:
    return m.PullReply(5, 1, 0, last, sections(True), WRITERS, vector(), vector()[0])


def known(stamps: np.ndarray, row_bytes: int = 1) -> KnownSteps:
    """Steps of a keyspace of 3 shards, if a row has a byte."""
    return KnownSteps(stamps, np.arange(len(stamps) * row_bytes, dtype=np.uint8).reshape(len(stamps), row_bytes))


BOOTS = np.array([1, 2**64 - 1], np.uint64)
FLOOR = m.Floor(np.array([0, 2, 3], np.uint32), WRITERS, vector())
MESSAGES: list[m.Message] = [
    m.Hello(1, 99, (4, 1), MEMBER, (MEMBER,), (SchemaEntry(5, "model", b"\x01"),), True),
    m.Refusal("no"),
    m.Heartbeat(
        MEMBER,
        (MEMBER,),
        7,
        1_700_000_000_000,
        (m.KeyspaceSummary(5, 1 << 127, 3, ((9, STAMP),)),),
        5,
        BOOTS,
        BOOTS & np.uint64(3),
    ),
    m.SchemaUpdate((SchemaEntry(5, "model", b"\x01"),)),
    m.Leave("eu-1"),
    batch(),
    m.PullRequest(5, 1, WRITERS, vector(), vector()[0], 3),
    reply(),
    m.Ack(3, 17),
    m.SessionBroken(3),
    m.ReachQuery(5, 8, STAMP),
    m.Reached(8),
    m.RegisterIndex(BOOTS, BOOTS & np.uint64(0xFFFF), True),
    m.MemberNews((MEMBER,)),
    m.BlockRequest(99, 7, (0, 1023)),
    m.BlockGrant(99, 7, (3, 4), STAMP, True),
    m.VersionsWanted(5, 1, 17, 3),
    m.VersionList(5, 1, 19, np.array([0, 3], np.uint32), BOOTS, WRITERS, vector()[0]),
    m.ShardsWanted(5, 1, np.array([0, 1, 7], np.uint32), WRITERS, vector(), 3),
    m.ShardsReply(
        5, 1, 0, True, sections(True), np.arange(3, dtype=np.uint32), BOOTS[[0, 0, 1]], WRITERS, vector(), WRITERS, BOOTS
    ),
    m.Retirements(
        (m.Expulsion("us-1", 5, 6),),
        (
            m.Retired(5, 5, 9, 3, m.FROZEN),
            m.Retired(5, 5, 2, 3, m.DONE, vector()[:, 0]),
            m.Retired(6, 6, 9, 3, m.FLOORED, vector()[:, 1]),
        ),
        (m.Fence(5, 6), m.Fence(5, 7, CLOSED, STAMP, 0, (Restorer(9, 3, STAMP),), "shuffled labels")),
    ),
    m.RetireReport(5, 9, 3, m.FROZEN, vector()[:, 1]),
    m.FenceReport(5, 7, 98, True, (1, 2)),
    m.Adopt(5, 3, ("eu-1", "us-2")),
    m.Wants((("us", 1 << 63), ("ap", 0))),
    m.StableAsk(5),
    m.StableReport(5, True, WRITERS, vector()[0], BOOTS),
    m.Stable(5, WRITERS, vector()[0], ("eu-1",)),
    m.Incomplete(5, 7),
    m.KeysWanted(5, 7, FLOOR, (TableKeys(11, BOOTS), TableKeys(12, BOOTS[:1])), 98),
    m.KeysFound(5, 7, sections(True), WRITERS, BOOTS),
    m.Backlogged(5, 7, True, 4, WRITERS, np.arange(1, 1 + len(WRITERS), dtype=np.uint8)),
    m.CeilingAsk(5, 8),
    m.CeilingTold(8, STAMP, 1 << 127, 3, ((9, STAMP),)),
    m.StateChunk(
        5, 7, False, sections(True), FLOOR.shards, WRITERS, vector(), vector()[0], FLOOR.shards[:2], vector(2), WRITERS, BOOTS
    ),
    m.StateChunk(5, 7, True, (), NO_SHARDS, WRITERS[:0], NO_STAMPS, BOOTS[:0], NO_SHARDS, NO_STAMPS, WRITERS[:0], BOOTS[:0]),
]
# With what version 2 added.
LATER: list[m.Message] = [
    m.PullRequest(5, 1, WRITERS, vector(), vector()[0], 3, BOOTS, 98),
    m.PullRequest(5, 1, WRITERS, vector(), vector()[0], 3, BOOTS, 98, known(BOOTS)),
    m.PullRequest(5, 1, WRITERS, vector(), vector()[0], 3, BOOTS, 98, known(BOOTS), backlog=True),
    m.PullReply(5, 1, 0, True, sections(True), WRITERS, vector(), vector()[0], WRITERS, BOOTS),
    m.PullReply(5, 1, 0, True, (), WRITERS, vector(), vector()[0], WRITERS, BOOTS, FLOOR.shards),
    m.PullReply(5, 1, 0, True, sections(True), WRITERS, vector(), vector()[0], WRITERS, BOOTS, FLOOR.shards[1:], FLOOR),
    m.Heartbeat(MEMBER, (), 7, 1_700_000_000_000, (), 5, BOOTS, BOOTS & np.uint64(3), 99, 98),
    m.Heartbeat(MEMBER, (), 7, 1_700_000_000_000, (m.KeyspaceSummary(5, 1, 3, ()),), standing=(m.LACKS,)),
]
FENCE = m.Fence(5, 7, LIFTED, STAMP, STAMP, (Restorer(9, 3, STAMP),), "shuffled labels")


def transfer(message: m.Message, envelope: m.Envelope = ENVELOPE) -> tuple[m.Envelope, m.Message]:
    return wire.decode([memoryview(bytes(frame)) for frame in wire.encode(envelope, message)])


def plain(value: object) -> object:
    """A message as comparable data."""
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if hasattr(value, "__dataclass_fields__"):
        received = ("body", "checksum", "body_version", "told")
        return tuple((name, plain(getattr(value, name))) for name in value.__dataclass_fields__ if name not in received)
    return value


def test_every_message_type_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(m.Message.__args__)


@pytest.mark.parametrize("message", [*MESSAGES, *LATER], ids=lambda message: type(message).__name__)
def test_round_trip(message: m.Message) -> None:
    envelope, received = transfer(message)
    assert envelope == ENVELOPE
    assert plain(received) == plain(message)


@pytest.mark.parametrize("message", LATER, ids=lambda message: type(message).__name__)
def test_what_version_1_does_not_have_is_left_out(message: m.Message) -> None:
    first = replace(ENVELOPE, version=1)
    received = transfer(message, first)[1]
    assert plain(received) != plain(message)
    assert plain(received) == plain(transfer(received, first)[1])


@pytest.mark.parametrize(
    "message",
    [
        m.BlockRequest(99, 7, (0, 1024)),
        m.Retirements((), (m.Retired(5, 5, 9, 3, m.FROZEN, vector()[:, 1]),)),
        m.Retirements((), (m.Retired(5, 5, 9, 3, m.DONE),)),
        m.Retirements((), (m.Retired(5, 5, 8, 3, m.DONE, vector()[:, 1]),)),
        m.Retirements((), (m.Retired(5, 5, 9, 3, 3, vector()[:, 1]),)),
        m.RetireReport(5, 9, 3, m.FROZEN, vector()[:, 0]),
        m.Retirements((), (), (replace(FENCE, stage=3),)),
        m.Retirements((), (), (replace(FENCE, until=0),)),
        m.Retirements((), (), (replace(FENCE, stage=CLOSED),)),
        m.Retirements((), (), (replace(FENCE, epoch=0),)),
        m.Retirements((), (), (replace(FENCE, note="x" * 201),)),
        m.Retirements((), (), (replace(FENCE, restorers=(Restorer(4_096, 3, 0),)),)),
        m.Retirements((), (), (replace(FENCE, restorers=(Restorer(9, 3, 0),) * 65),)),
        m.FenceReport(5, 7, 98, 1, ()),  # type: ignore[arg-type]
        m.FenceReport(5, 7, 98, True, (1,) * 4_097),
        m.BlockGrant(99, 7, (1024,), STAMP, True),
        m.PullRequest(5, 1, WRITERS, vector(), vector()[0], 3, BOOTS[:1]),
        m.PullRequest(5, 1, WRITERS, vector(), vector()[0], 3, BOOTS, 98, known(BOOTS[::-1])),
        m.PullRequest(5, 1, WRITERS, vector(), vector()[0], 3, BOOTS, 98, known(BOOTS[[0, 0]])),
        m.PullRequest(5, 1, WRITERS, vector(), vector()[0], 3, BOOTS, 98, known(BOOTS, 9)),
        m.PullRequest(5, 1, WRITERS, vector(), vector()[0], 3, BOOTS, 98, known(np.arange(8_000, dtype=np.uint64))),
        m.PullReply(5, 1, 0, True, sections(True), WRITERS, vector(), vector()[0], WRITERS * 1_000, BOOTS),
        m.PullReply(5, 1, 0, True, sections(True), WRITERS, vector(), vector()[0], WRITERS, BOOTS[:1]),
        m.PullReply(5, 1, 0, True, (), WRITERS, vector(), vector()[0], WRITERS, BOOTS, FLOOR.shards[::-1].copy()),
        m.PullReply(
            5, 1, 0, True, (), WRITERS, vector(), vector()[0], WRITERS, BOOTS, floor=replace(FLOOR, stamps=vector()[:2])
        ),
        m.Heartbeat(MEMBER, (), 7, 0, (m.KeyspaceSummary(5, 1, 3, ()),), standing=(m.KEEPS, m.KEEPS)),
        m.Heartbeat(MEMBER, (), 7, 0, (m.KeyspaceSummary(5, 1, 3, ()),), standing=(4,)),
        m.KeysWanted(5, 7, FLOOR, ()),
        m.KeysWanted(5, 7, FLOOR, (TableKeys(11, np.arange(1_025, dtype=np.uint64)),)),
        m.KeysWanted(5, 7, replace(FLOOR, shards=FLOOR.shards[::-1].copy()), (TableKeys(11, BOOTS),)),
        m.KeysWanted(5, 7, replace(FLOOR, stamps=FLOOR.stamps[:, ::-1].copy()), (TableKeys(11, BOOTS),)),
        m.StableReport(5, True, WRITERS[::-1].copy(), vector()[0, ::-1].copy(), BOOTS),
        m.StableReport(5, True, WRITERS, vector()[0, ::-1].copy(), BOOTS),
        m.Stable(5, WRITERS, vector()[0], ("eu-1",) * 17),
        m.Wants((("us", 1), ("us", 2))),
    ],
    ids=lambda message: type(message).__name__,
)
def test_nonsense_of_version_2_is_refused(message: m.Message) -> None:
    with pytest.raises(RemoteProtocolError):
        transfer(message)


def test_a_forwarded_batch_keeps_its_frames() -> None:
    frames = [memoryview(bytes(frame)) for frame in wire.encode(ENVELOPE, batch())]
    _, received = wire.decode(frames)
    again = wire.encode(m.Envelope(5, 6, 7, 8, 2, PROTOCOL_VERSION), received)
    assert all(ours is theirs for ours, theirs in zip(again[1:], frames[1:], strict=True))
    envelope, _ = wire.decode([memoryview(bytes(frame)) for frame in again])
    assert envelope.hops == 2


def big_batch() -> m.Batch:
    """Keys are just too large for the head, rows are, classes are not."""
    count = wire.PACK_BYTES_MAX // 8
    keys, rows = np.arange(count, dtype=np.uint64), np.arange(count * 12, dtype=np.uint32).view(np.uint8).reshape(count, 48)
    return replace(
        batch(), columns=(RowColumns(1, keys, rows, None, np.arange(count, dtype=np.uint16).astype(np.uint8)), *sections(False))
    )


def test_small_columns_share_the_head_and_large_ones_are_frames() -> None:
    big = big_batch()
    assert len(wire.encode(ENVELOPE, batch())) == 2
    frames = wire.encode(ENVELOPE, big)
    assert [memoryview(frame).nbytes for frame in frames[2:]] == [big.columns[0].keys.nbytes, big.columns[0].rows.nbytes]
    assert plain(transfer(big)[1]) == plain(big)
    first = replace(ENVELOPE, version=1)
    assert len(wire.encode(first, big)) == 2 + 4 + 3 + 2 + 3
    bare = replace(big, columns=tuple(replace(section, priority=None) for section in big.columns))
    assert plain(transfer(big, first)[1]) == plain(bare)


def test_columns_are_not_copied() -> None:
    for message in (batch(), big_batch()):
        frames = [memoryview(bytes(frame)) for frame in wire.encode(ENVELOPE, message)]
        _, received = wire.decode(frames)
        assert isinstance(received, m.Batch)
        for column in (received.claims.prev, received.columns[0].keys, received.columns[0].rows):
            assert any(np.shares_memory(column, np.frombuffer(frame, np.uint8)) for frame in frames[1:])


@pytest.mark.parametrize("version", wire.VERSIONS)
def test_unaligned_columns_become_aligned(version: int) -> None:
    frames = [bytes(frame) for frame in wire.encode(replace(ENVELOPE, version=version), batch())]
    shifted = [memoryview(b"x" + frame)[1:] for frame in frames]
    _, received = wire.decode(shifted)
    assert isinstance(received, m.Batch)
    assert all(section.keys.flags.aligned for section in received.columns)
    assert received.claims.prev.flags.aligned
    assert plain(received) == plain(wire.decode([memoryview(frame) for frame in frames])[1])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda head: head[:-8], "a column is missing"),
        (lambda head: head + bytes(8), "8 bytes too many"),
        (lambda head: head[:-1], "head of"),
        (lambda head: b"", "head of 0 bytes"),
        (lambda head: b"\xff\xff\xff\x7f" + head[4:], "header ends at byte 2147483651"),
        (lambda head: bytes(4) + head[4:], "malformed Batch"),
    ],
)
def test_a_head_that_contradicts_itself_is_refused(damage: Callable[[bytes], bytes], complaint: str) -> None:
    head = damage(bytes(wire.encode(ENVELOPE, batch())[1]))
    envelope = pack_envelope(ENVELOPE, NUMBER_OF[m.Batch], wire.checksum([head]))
    with pytest.raises(RemoteProtocolError, match=complaint):
        wire.decode([memoryview(envelope), memoryview(head)])


def test_a_flipped_bit_in_a_row_is_noticed() -> None:
    """No structure is broken by it: only the checksum can tell (R17)."""
    frames = [bytearray(frame) for frame in wire.encode(ENVELOPE, batch())]
    rows = next(frame for frame in reversed(frames) if len(frame) > 8)
    rows[0] ^= 1
    with pytest.raises(RemoteProtocolError, match="checksum mismatch"):
        wire.decode([memoryview(bytes(frame)) for frame in frames])


@given(st.sampled_from([*MESSAGES, *LATER]), st.integers(0, 2**32))
def test_damaged_messages_raise_one_error_type(message: m.Message, seed: int) -> None:
    draw = random.Random(seed)
    frames = [bytearray(frame) for frame in wire.encode(replace(ENVELOPE, version=PROTOCOL_VERSION), message)]
    for _ in range(draw.randint(1, 3)):
        match draw.randrange(5):
            case 0:
                frame = draw.choice(frames)
                if frame:
                    frame[draw.randrange(len(frame))] ^= 1 << draw.randrange(8)
            case 1:
                frames.pop(draw.randrange(len(frames)))
            case 2:
                frames.insert(draw.randrange(len(frames) + 1), bytearray(draw.randbytes(draw.randrange(40))))
            case 3:
                del draw.choice(frames)[draw.randrange(20) :]
            case 4:
                draw.shuffle(frames)
        if not frames:
            break
    decode_or_refuse([bytes(frame) for frame in frames])


@given(
    st.integers(1, len(KINDS) + 1),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.binary(max_size=20)
        | st.text(max_size=8)
        | st.floats(),
        lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=30,
    ),
    st.lists(st.binary(max_size=64), max_size=6),
    st.sampled_from(wire.VERSIONS),
)
def test_junk_with_a_valid_checksum_raises_one_error_type(
    kind: int, header: object, columns: list[bytes], version: int
) -> None:
    body = body_of(header, [np.frombuffer(column, np.uint8) for column in columns], version)  # type: ignore[arg-type]
    envelope = wire.ENVELOPE.pack(wire.MAGIC, version, kind, 1, 2, 0, 0, 0, 0, wire.checksum(body))
    decode_or_refuse([envelope, *body])


@given(st.lists(st.binary(max_size=80), max_size=8))
def test_random_frames_raise_one_error_type(frames: list[bytes]) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.decode([memoryview(frame) for frame in frames])


def decode_or_refuse(frames: list[bytes]) -> None:
    """Damage may happen to leave a message valid; anything but that or the one error is a failure."""
    try:
        wire.decode([memoryview(frame) for frame in frames])
    except RemoteProtocolError:
        return


def changed(make: Callable[[m.Batch], m.Batch]) -> list[memoryview]:
    return [memoryview(bytes(frame)) for frame in wire.encode(ENVELOPE, make(batch()))]


def with_(**fields: object) -> Callable[[m.Batch], m.Batch]:
    def make(original: m.Batch) -> m.Batch:
        values = {name: getattr(original, name) for name, kind in original.__dataclass_fields__.items() if kind.init}
        return m.Batch(**(values | fields))

    return make


def claims_of(**fields: object) -> m.ShardClaims:
    original = claims()
    return m.ShardClaims(**({name: getattr(original, name) for name in original.__dataclass_fields__} | fields))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (with_(claims=claims_of(shards=np.array([1, 1], np.uint32))), "not ascending"),
        (with_(claims=claims_of(shards=np.array([1, 1 << 20], np.uint32))), "not ascending"),
        (with_(claims=claims_of(prev=np.full(2, STAMP, np.uint64))), "contradicts itself"),
        (with_(claims=claims_of(part=np.ones(2, np.uint16))), "contradicts itself"),
        (with_(trees=2), "several of 2 trees"),
        (with_(trees=0), "several of 0 trees"),
        (with_(trees=200), "several of 200 trees"),
        (with_(writer=8), "does not follow"),
        (with_(writer_prev=STAMP), "does not follow"),
        (with_(claims=claims(0), shards_touched=0), "without a claimed shard"),
        (with_(shards_touched=1), "touches"),
        (with_(columns=sections(True)), "contradict themselves"),
    ],
)
def test_batches_that_contradict_themselves_are_refused(make: Callable[[m.Batch], m.Batch], complaint: str) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        wire.decode(changed(make))


def test_a_vector_with_a_foreign_stamp_is_refused() -> None:
    bad = vector()
    bad[1, 0] = bad[1, 1]
    frames = wire.encode(ENVELOPE, m.PullRequest(5, 1, WRITERS, bad, vector()[0], 3))
    with pytest.raises(RemoteProtocolError, match="another writer"):
        wire.decode([memoryview(bytes(frame)) for frame in frames])


SHARDS = np.array([0, 1, 7], np.uint32)
VERSIONS = np.ones(3, np.uint64)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (m.VersionList(5, 1, 1, SHARDS[::-1].copy(), VERSIONS, WRITERS, vector()[0]), "not ascending"),
        (m.VersionList(5, 1, 1, SHARDS, VERSIONS * np.uint64(0), WRITERS, vector()[0]), "without a version"),
        (m.VersionList(5, 1, 1, SHARDS, VERSIONS, WRITERS, vector()[0, ::-1].copy()), "another writer"),
        (m.VersionList(5, 1, 1, SHARDS, VERSIONS, WRITERS[::-1].copy(), vector()[0, ::-1].copy()), "writers are not ascending"),
        (m.ShardsWanted(5, 1, SHARDS[:0], WRITERS, vector(0)), "nothing is wanted"),
        (m.ShardsWanted(5, 1, SHARDS + np.uint32(wire.SHARDS_MAX), WRITERS, vector()), "not ascending"),
        (m.ShardsWanted(5, 1, SHARDS, WRITERS, vector()[:, ::-1].copy()), "another writer"),
        (m.ShardsWanted(5, 1, SHARDS, WRITERS, vector(2)), "column"),
        (m.ShardsReply(5, 1, 0, True, (), SHARDS, VERSIONS * np.uint64(0), WRITERS, vector()), "without a version"),
        (m.ShardsReply(5, 1, 0, True, sections(False), SHARDS, VERSIONS, WRITERS, vector()), "contradict themselves"),
    ],
)
def test_rounds_that_contradict_themselves_are_refused(message: m.Message, complaint: str) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        transfer(message)


def test_sizes_are_limited() -> None:
    too_many = [memoryview(b"")] * (FRAMES_MAX + 1)
    with pytest.raises(RemoteProtocolError, match="frames"):
        wire.decode(too_many)
    with pytest.raises(RemoteProtocolError, match="bytes, limit"):
        wire.decode([memoryview(bytes(48)), memoryview(bytes(wire.MESSAGE_BYTES_MAX))])


def test_another_protocol_version_is_named() -> None:
    frames = [bytes(frame) for frame in wire.encode(ENVELOPE, m.Reached(1))]
    frames[0] = frames[0][:2] + bytes([PROTOCOL_VERSION + 1]) + frames[0][3:]
    with pytest.raises(RemoteProtocolError, match="protocol version 3, this node speaks protocol versions 1 to 2"):
        wire.decode([memoryview(frame) for frame in frames])


@pytest.mark.parametrize(
    ("partitions", "held"),
    [(3, [1, 1]), (3, [2, 1]), (3, [3]), (3, [-1]), (3, ["1"]), (0, []), (1, [0]), (65, [0]), (64, [0] * 65)],
)
def test_what_a_node_cannot_hold_is_refused(partitions: int, held: list[object]) -> None:
    header, _ = MEMBER_NEWS.pack(m.MemberNews((MEMBER,)), PROTOCOL_VERSION)
    header[0][0][11] = [[5, partitions, held]]
    body = body_of(header, [], PROTOCOL_VERSION)
    frame = pack_envelope(ENVELOPE, NUMBER_OF[m.MemberNews], wire.checksum(body))
    with pytest.raises(RemoteProtocolError, match=r"partitions|unsigned|list of at most"):
        wire.decode([memoryview(frame), memoryview(body[0])])


def test_what_is_equal_to_a_known_record_and_is_of_another_type_is_refused() -> None:
    # Decoded records are kept, by what they were made of, and True equals 1.
    plain = replace(MEMBER, writers=(), holds=(), boot=1, heartbeat=1)
    for place, value in ((1, True), (6, True), (7, 0), (10, 0), (1, 1.0)):
        header, _ = MEMBER_NEWS.pack(m.MemberNews((plain,)), PROTOCOL_VERSION)
        MEMBER_NEWS.unpack(header, Columns(None, 0, []))
        header[0][0][place] = value
        with pytest.raises(RemoteProtocolError, match="expected"):
            MEMBER_NEWS.unpack(header, Columns(None, 0, []))
