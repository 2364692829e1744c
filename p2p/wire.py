"""Messages to frames and back, and every limit on their size.

A message is `[envelope, head, column, column, ...]`. The envelope is 48 fixed bytes and is rewritten at every hop. The head
holds the header, which is msgpack, and behind it the small columns; each large one is a frame of its own, uncopied in both
directions. Columns are raw little-endian arrays. The checksum in the envelope covers everything below it, so a batch is checked
at each hop and forwarded without being encoded again (R17).

    head (since version 2): uint32 header_bytes | header | 0..7 zeros | column | 0..7 zeros | column ...
    head (version 1):       header, and every column is a frame of its own

Versions of the protocol (`p2p.versions`): `_KINDS` at the end says which kinds of message there are since when, `_MEMBER_ADDED`
and `_Kind.added` which fields. What a link does not speak is left out at its end of the header, and filled in at the other.

Bytes of a peer raise only `RemoteProtocolError` here.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, TypeVar

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

from p2p import classes, loops
from p2p import messages as m
from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.identity.fence_wire import FENCES_TOLD_MAX, pack_fence, pack_report, unpack_fence, unpack_report
from p2p.identity.writers import BLOCKS
from p2p.link.budget import REGIONS_MAX
from p2p.members.trees import TREE_ARITY, TREES_MAX
from p2p.placement import HOLDS_SINCE
from p2p.replica import NO_STEPS, PARTITIONS_MAX, U64, KnownSteps, RowColumns, SchemaEntry, TableKeys
from p2p.stamps import WRITERS_MAX, writer_of
from p2p.transport import FRAMES_MAX, Buffer
from p2p.versions import FIRST_VERSION, PROTOCOL_VERSION, describe
from p2p.wire_values import STRING_BYTES_MAX
from p2p.wire_values import flag as _flag
from p2p.wire_values import items as _items
from p2p.wire_values import text as _text
from p2p.wire_values import uint as _uint
from p2p.wire_values import wide as _wide

ENVELOPE: Final = struct.Struct("<2sBBQQIB3xQQ4x")  # magic, version, type, boots, session, hops, sequence, checksum
MAGIC: Final = b"EK"

# One message. Large enough that a step of 10,000 rows of 64 floats is one message, small enough that a row of high priority
# never waits long behind it.
MESSAGE_BYTES_MAX: Final = 16 << 20
# Rows of one batch message or one pull chunk; what exceeds it travels in parts (R7). Far below the message limit, because
# the header, the claims and one row of the largest width come on top.
BATCH_BYTES_MAX: Final = 4 << 20
HEADER_BYTES_MAX: Final = 8 << 20
# What msgpack may make of a header: a byte becomes a list of 72, and repeats compress to nothing. No header has maps. Below
# the first bound it can cost a few megabytes and is not looked at; of those above, only the kinds that tell of the whole
# schema or of many members have more items than the second, and none more than the third.
PLAIN_HEADER_BYTES_MAX: Final = 65_536
HEADER_ITEMS_MAX: Final = 1 << 16
LARGE_HEADER_ITEMS_MAX: Final = 1 << 19
MEMBERS_MAX: Final = 4_096
SCHEMA_ENTRIES_MAX: Final = 131_072
SECTIONS_MAX: Final = 4_096
WRITER_RECORDS_MAX: Final = 4_096
HOLDINGS_MAX: Final = 1_024
SHARDS_MAX: Final = 65_536
# Steps that an asker has above its vector, of 8 bytes and a bit a shard: all that may wait (`OPEN_STEPS_MAX`) at 64 shards.
KNOWN_BYTES_MAX: Final = 65_536
# Clocks in milliseconds: 8,900 years. What is computed with must stay far inside a signed 64-bit number.
TIME_BITS: Final = 48
SUMMARIES_MAX: Final = 4_096
HOPS_MAX: Final = 255
# Nodes that hold collection up, by name; a person needs the first few.
HELD_UP_MAX: Final = 16
# A frame costs 3 to 5 us at each end, whatever is in it, so columns smaller than this share one. Larger ones ZeroMQ hands on
# uncopied, which is worth a frame.
PACK_BYTES_MAX: Final = 16_384
PACKED_SINCE: Final = 2
# Steps that share a message (`p2p.pushing.groups`); each costs 24 bytes and more. A writer of tiny steps has some 5,000 a
# second.
GROUP_STEPS_MAX: Final = 256
GROUPS_SINCE: Final = 2
VERSIONS: Final = range(FIRST_VERSION, PROTOCOL_VERSION + 1)

# Keys that are asked for at once (`p2p.pulling.fetching`).
WANTED_KEYS_MAX: Final = 1_024

_HEADER_BYTES: Final = struct.Struct("<I")
_ALIGNMENT: Final = 8
_UINT8, _UINT16, _UINT32, _UINT64 = (np.dtype(f"<u{size}") for size in (1, 2, 4, 8))
_FLOAT32: Final = np.dtype("<f4")

_HAS_STAMPS: Final = 1
_HAS_SIGNIFICANCE: Final = 2  # version 1: float32[n], in a scale of its own
_HAS_PRIORITY: Final = 4  # since version 2: uint8[n]
PRIORITY_SINCE: Final = 2
# How rows are encoded is a fact of the schema, on which nodes agree before they send any; the field is 0 in all versions.
_CODEC_OF_SCHEMA: Final = 0

_NO_NONCES: Final = np.empty(0, np.uint64)
_NO_WRITERS: Final = np.empty(0, np.uint16)
_NO_SHARDS: Final = np.empty(0, np.uint32)

T = TypeVar("T")
Packed = tuple[list[Any], list[NDArray[Any]]]  # header and columns
Header = list[Any]  # what msgpack makes of junk is anything; each decoder below checks what it takes


def encode(envelope: m.Envelope, message: m.Message) -> list[Buffer]:
    """Frames of one message; arrays are not copied and must not change until they are sent.

    A forwarded batch keeps the frames and the checksum it came with, where the receiver's version has the same shape.

    Raises:
        LocalProtocolError: the version of the envelope does not have this kind of message.
    """
    number = _NUMBER_OF[type(message)]
    kind = _KINDS[number - 1]
    if kind.since > envelope.version:
        raise LocalProtocolError(f"{kind.name} exists since protocol version {kind.since}, the link speaks {envelope.version}")
    if isinstance(message, m.Batch) and message.body and kind.same_shape(message.body_version, envelope.version):
        return [_pack_envelope(envelope, number, message.checksum), *message.body]
    body = _body(*kind.encode(message, envelope.version), envelope.version)
    return [_pack_envelope(envelope, number, checksum(body)), *body]


def _body(header: Header, columns: Sequence[NDArray[Any]], version: int) -> list[Buffer]:
    """Head and large columns."""
    packed = msgpack.packb(header)
    if version < PACKED_SINCE:
        return [packed, *(column.reshape(-1).view(np.uint8).data for column in columns)]
    head = [_HEADER_BYTES.pack(len(packed)), packed, _padding(_HEADER_BYTES.size + len(packed))]
    large: list[Buffer] = []
    for column in columns:
        if column.nbytes < PACK_BYTES_MAX:
            head += [column.tobytes(), _padding(column.nbytes)]
        else:
            large.append(column.reshape(-1).view(np.uint8).data)
    return [b"".join(head), *large]


def _padding(size: int) -> bytes:
    return bytes(-size % _ALIGNMENT)


def seal(batch: m.Batch) -> m.Batch:
    """The batch itself, with its frames made, so that it is encoded once for all of its receivers."""
    body = _body(*_KINDS[_NUMBER_OF[m.Batch] - 1].encode(batch, PROTOCOL_VERSION), PROTOCOL_VERSION)
    _keep_frames(batch, body, checksum(body), PROTOCOL_VERSION)
    return batch


def _keep_frames(batch: m.Batch, body: Sequence[Buffer], check: int, version: int) -> None:
    """The frames belong to the batch from when it is made; a copy of all of its fields for their sake costs 10 us."""
    object.__setattr__(batch, "body", tuple(body))
    object.__setattr__(batch, "checksum", check)
    object.__setattr__(batch, "body_version", version)


def since(message: type) -> int:
    """The first protocol version that has this kind of message."""
    return _KINDS[_NUMBER_OF[message] - 1].since


def decode(frames: Sequence[memoryview]) -> tuple[m.Envelope, m.Message]:
    """The message in these frames; its arrays look into them without copying.

    Raises:
        RemoteProtocolError: anything at all is wrong with them.
    """
    if not 2 <= len(frames) <= FRAMES_MAX:
        raise RemoteProtocolError(f"message of {len(frames)} frames, expected 2 to {FRAMES_MAX}")
    bytes_total = sum([frame.nbytes for frame in frames])
    if bytes_total > MESSAGE_BYTES_MAX:
        raise RemoteProtocolError(f"message of {bytes_total} bytes, limit {MESSAGE_BYTES_MAX}")
    envelope, number, expected = _unpack_envelope(frames[0])
    if not 1 <= number <= len(_KINDS) or _KINDS[number - 1].since > envelope.version:
        raise RemoteProtocolError(f"unknown message type {number} in protocol version {envelope.version}")
    kind = _KINDS[number - 1]
    if checksum(frames[1:]) != expected:
        raise RemoteProtocolError("checksum mismatch")
    packed, columns = _open_body(frames[1], frames[2:], envelope.version)
    try:
        header = _read_header(packed, LARGE_HEADER_ITEMS_MAX if kind.message in _LARGE_HEADERS else HEADER_ITEMS_MAX)
        message = kind.unpack(extend(header, kind.added, envelope.version), columns)
        columns.done()
    except RemoteProtocolError:
        raise
    except Exception as error:
        raise RemoteProtocolError(f"malformed {kind.name}: {error!r}"[:200]) from error
    if isinstance(message, m.Batch):
        _keep_frames(message, frames[1:], expected, envelope.version)
    return envelope, message


def _read_header(packed: memoryview, items_max: int) -> Header:
    """What msgpack makes of it, without any maps, and of a large one at most `items_max` items and lists."""
    if packed.nbytes <= PLAIN_HEADER_BYTES_MAX:
        return msgpack.unpackb(packed, max_str_len=STRING_BYTES_MAX, object_pairs_hook=_refuse_map)  # type: ignore[no-any-return]
    left = items_max

    def count(items: list[Any]) -> list[Any]:
        nonlocal left
        left -= 1 + len(items)
        if left < 0:
            raise RemoteProtocolError(f"header of more than {items_max} items")
        return items

    return msgpack.unpackb(  # type: ignore[no-any-return]
        packed,
        max_str_len=STRING_BYTES_MAX,
        max_array_len=SCHEMA_ENTRIES_MAX,
        object_pairs_hook=_refuse_map,
        list_hook=count,
    )


def _refuse_map(_pairs: object) -> None:
    raise RemoteProtocolError("a map in a header")


def _open_body(head: memoryview, large: Sequence[memoryview], version: int) -> tuple[memoryview, "_Columns"]:
    """The packed header, and the columns behind it."""
    if version < PACKED_SINCE:
        header, columns = head, _Columns(None, 0, large)
    else:
        if head.nbytes < _HEADER_BYTES.size or head.nbytes % _ALIGNMENT:
            raise RemoteProtocolError(f"head of {head.nbytes} bytes")
        end = _HEADER_BYTES.size + _HEADER_BYTES.unpack_from(head)[0]
        if end > head.nbytes:
            raise RemoteProtocolError(f"header ends at byte {end} of {head.nbytes}")
        header, columns = head[_HEADER_BYTES.size : end], _Columns(head, end, large)
    if header.nbytes > HEADER_BYTES_MAX:
        raise RemoteProtocolError(f"header of {header.nbytes} bytes, limit {HEADER_BYTES_MAX}")
    return header, columns


def checksum(body: Sequence[Buffer]) -> int:
    """xxh3-64 over head and columns."""
    digest = xxhash.xxh3_64()
    for frame in body:
        digest.update(frame)
    return digest.intdigest()


def _pack_envelope(envelope: m.Envelope, kind: int, check: int) -> bytes:
    return ENVELOPE.pack(
        MAGIC,
        envelope.version,
        kind,
        envelope.sender_boot,
        envelope.receiver_boot,
        envelope.session,
        envelope.hops,
        envelope.sequence,
        check,
    )


def _unpack_envelope(frame: memoryview) -> tuple[m.Envelope, int, int]:
    if frame.nbytes != ENVELOPE.size:
        raise RemoteProtocolError(f"envelope of {frame.nbytes} bytes, expected {ENVELOPE.size}")
    magic, version, kind, sender, receiver, session, hops, sequence, check = ENVELOPE.unpack(frame)
    if magic != MAGIC:
        raise RemoteProtocolError("not an ekko message")
    if not FIRST_VERSION <= version <= PROTOCOL_VERSION:
        raise RemoteProtocolError(
            f"a message in protocol version {version}, this node speaks {describe(PROTOCOL_VERSION)}: upgrade the older node"
        )
    return m.Envelope(sender, receiver, session, sequence, hops, version), kind, check


# --- what later versions added ----------------------------------------------------------------------------------------------

# Fields that later versions put to the end of a header, in order: (since which version, what it means where it is missing).
Added = tuple[tuple[int, Any], ...]

_MEMBER_FIELDS: Final = 11  # of version 1
_MEMBER_ADDED: Final[Added] = ((HOLDS_SINCE, []),)  # holds


def trim(header: Header, added: Added, version: int) -> Header:
    """What `version` has of a header; `added` are its last fields."""
    later = sum(since > version for since, _ in added)
    return header[: len(header) - later]


def extend(header: Header, added: Added, version: int) -> Header:
    """A header of `version` with the fields that it does not have yet."""
    return [*header, *(missing for since, missing in added if since > version)]


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of message on the wire. A version that has it may lack the last fields of its header."""

    message: type
    pack: Callable[[Any, int], Packed]  # for a version: records inside the header may have fields of their own
    unpack: Callable[[Header, "_Columns"], Any]
    since: int = 1
    added: Added = ()
    changed: tuple[int, ...] = ()  # versions that changed it otherwise: records inside it, or its columns

    @property
    def name(self) -> str:
        return self.message.__name__

    def encode(self, message: m.Message, version: int) -> Packed:
        """Header and columns, in the shape of a version."""
        header, columns = self.pack(message, version)
        return trim(header, self.added, version), columns

    def same_shape(self, one: int, other: int) -> bool:
        """Whether nothing changed between two versions."""
        if one == other:
            return True
        low, high = sorted((one, other))
        return not any(low < since <= high for since in (*self.changed, *(since for since, _ in self.added)))


# --- checked access to what a peer sent -----------------------------------------------------------------------------------


class _Columns:
    """The raw columns of a message, taken in order.

    Args:
        head: the frame in which small columns are, or None where each is a frame of its own (version 1).
        end: where they begin in it, at the next multiple of 8.
        frames: the large ones, or all.
    """

    def __init__(self, head: memoryview | None, end: int, frames: Sequence[memoryview]) -> None:
        # ZeroMQ lets small messages point into its receive buffer at any offset; kernels want aligned columns.
        aligned = head is None or head.nbytes == 0 or np.frombuffer(head, np.uint64).flags.aligned
        self._head = head if aligned or head is None else np.frombuffer(head, np.uint64).copy().data.cast("B")
        self._offset = end + -end % _ALIGNMENT
        self._frames = frames
        self._next = 0

    def take(self, dtype: "np.dtype[Any]", count: int) -> NDArray[Any]:
        """The next column as `dtype[count]`."""
        size = count * dtype.itemsize
        if self._head is not None and size < PACK_BYTES_MAX:
            begin = self._offset
            self._offset = begin + size + -size % _ALIGNMENT
            if self._offset > self._head.nbytes:
                raise RemoteProtocolError("a column is missing")
            return np.frombuffer(self._head, dtype, count, begin) if count else np.empty(0, dtype)
        if self._next >= len(self._frames):
            raise RemoteProtocolError("a column is missing")
        frame = self._frames[self._next]
        self._next += 1
        if frame.nbytes != size:
            raise RemoteProtocolError(f"column of {frame.nbytes} bytes, expected {size}")
        if count == 0:
            return np.empty(0, dtype)
        column = np.frombuffer(frame, dtype)
        return column if column.flags.aligned else column.copy()

    def done(self) -> None:
        if self._next != len(self._frames):
            raise RemoteProtocolError(f"{len(self._frames) - self._next} columns too many")
        if self._head is not None and self._offset != self._head.nbytes:
            raise RemoteProtocolError(f"{self._head.nbytes - self._offset} bytes too many behind the header")


# --- records inside headers -------------------------------------------------------------------------------------------------


def _pack_member(member: m.MemberRecord, version: int) -> Header:
    """Passed on in the shape in which it was told, in every version: who told it may not have known the later fields."""
    writers = [[w.keyspace, w.writer, w.nonce, w.last_stamp] for w in member.writers]
    header = [
        member.node,
        member.boot,
        member.boot_ms,
        member.region,
        member.role,
        member.address,
        member.heartbeat,
        member.left,
        writers,
        member.version,
        member.deaf,
        [[holding.family, holding.partitions, list(holding.held)] for holding in member.holds],
    ]
    return trim(header, _MEMBER_ADDED, min(version, member.told))


def _member(value: Header) -> m.MemberRecord:
    told = _told(value)
    if told < PROTOCOL_VERSION:
        value = extend(value, _MEMBER_ADDED, told)
    node, boot, boot_ms, region, role, address, heartbeat, left, writers, version, deaf, holds = value
    if type(writers) is list and type(holds) is list and not writers and not holds:
        return _plain_member(node, boot, boot_ms, region, role, address, heartbeat, left, version, deaf, told)
    return m.MemberRecord(
        _text(node),
        _uint(boot),
        _uint(boot_ms, TIME_BITS),
        _text(region),
        _text(role),
        _text(address),
        _uint(heartbeat, 32),
        _flag(left),
        _items(writers, WRITER_RECORDS_MAX, _writer_record),
        _uint(version, 32),
        _flag(deaf),
        _items(holds, HOLDINGS_MAX, _holding),
        told,
    )


# News comes to everybody several times over. With their types: what is equal to a number need not be one.
@lru_cache(MEMBERS_MAX, typed=True)
def _plain_member(
    node: object,
    boot: object,
    boot_ms: object,
    region: object,
    role: object,
    address: object,
    heartbeat: object,
    left: object,
    version: object,
    deaf: object,
    told: int,
) -> m.MemberRecord:
    """A record that names no writers and no holdings."""
    return m.MemberRecord(
        _text(node),
        _uint(boot),
        _uint(boot_ms, TIME_BITS),
        _text(region),
        _text(role),
        _text(address),
        _uint(heartbeat, 32),
        _flag(left),
        (),
        _uint(version, 32),
        _flag(deaf),
        (),
        told,
    )


def _holding(value: Header) -> m.Holding:
    family, partitions, held = value
    if not 2 <= _uint(partitions, 32) <= PARTITIONS_MAX:
        raise RemoteProtocolError(f"{partitions} partitions, expected 2 to {PARTITIONS_MAX}")
    chosen = _items(held, PARTITIONS_MAX, lambda partition: _uint(partition, 32))
    if any(later <= earlier for earlier, later in pairwise(chosen)) or (chosen and chosen[-1] >= partitions):
        raise RemoteProtocolError(f"held partitions are not ascending, or not of {partitions}")
    return m.Holding(_uint(family, 32), partitions, chosen)


def _told(record: Header) -> int:
    """The newest version in whose shape a member's record is; its length tells."""
    return _lengths(_MEMBER_FIELDS, tuple([since for since, _ in _MEMBER_ADDED]))[len(record)]


@lru_cache(8)
def _lengths(fields: int, added: tuple[int, ...]) -> dict[int, int]:
    """Length of a member's record -> the newest version that has it."""
    return {fields + sum(since <= version for since in added): version for version in VERSIONS}


def _writer_record(value: Header) -> m.WriterRecord:
    keyspace, writer, nonce, last_stamp = value
    record = m.WriterRecord(_uint(keyspace, 32), _uint(writer, 12), _uint(nonce), _uint(last_stamp))
    if record.last_stamp and writer_of(record.last_stamp) != record.writer:
        raise RemoteProtocolError(f"stamp {record.last_stamp} is not of writer {record.writer}")
    return record


def _pack_entry(entry: SchemaEntry) -> Header:
    return [entry.keyspace, entry.name, entry.body]


def _entry(value: Header) -> SchemaEntry:
    keyspace, name, body = value
    if type(body) is not bytes or len(body) > STRING_BYTES_MAX:
        raise RemoteProtocolError("schema entry without a body")
    return SchemaEntry(_uint(keyspace, 32), _text(name), body)


def _pack_summary(summary: m.KeyspaceSummary) -> Header:
    return [
        summary.keyspace,
        summary.vector_digest.to_bytes(16, "little"),
        summary.stray_digest.to_bytes(16, "little"),
        [list(pair) for pair in summary.frontier],
    ]


def _summary(value: Header) -> m.KeyspaceSummary:
    keyspace, vector_digest, stray_digest, frontier = value
    return m.KeyspaceSummary(
        _uint(keyspace, 32), _wide(vector_digest), _wide(stray_digest), _items(frontier, WRITERS_MAX, _frontier_pair)
    )


def _frontier_pair(value: Header) -> tuple[int, int]:
    writer, stamp = value
    if writer_of(_uint(stamp)) != _uint(writer, 12):
        raise RemoteProtocolError(f"stamp {stamp} is not of writer {writer}")
    return writer, stamp


def _pack_sections(columns: Sequence[RowColumns], version: int, steps: m.Steps | None = None) -> Packed:
    """Of a group, rows are in the order of their steps, and runs stand for their stamps: 1,000 rows have one, in four bytes."""
    header: Header = []
    arrays: list[NDArray[Any]] = []
    for section in columns:
        own_stamps = section.stamps is not None and steps is None
        flags = _HAS_STAMPS if own_stamps else 0
        if section.priority is not None:
            flags |= _HAS_SIGNIFICANCE if version < PRIORITY_SINCE else _HAS_PRIORITY
        live, row_bytes = section.rows.shape
        header.append([section.table, len(section.keys), live, row_bytes, _CODEC_OF_SCHEMA, flags])
        arrays.append(np.ascontiguousarray(section.keys))
        if steps is not None:
            arrays.append(_runs_of(section, steps.stamps))
        elif section.stamps is not None:
            arrays.append(np.ascontiguousarray(section.stamps))
        if section.priority is not None:
            arrays.append(
                _significance_of(section.priority) if version < PRIORITY_SINCE else np.ascontiguousarray(section.priority)
            )
        arrays.append(np.ascontiguousarray(section.rows))
    return header, arrays


def _significance_of(priority: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What version 1 has for a class: a weight, 1 at the threshold."""
    return np.exp2((priority.astype(np.float32) - classes.SIGNIFICANT) / classes.PER_DOUBLING)


def _runs_of(section: RowColumns, stamps: U64) -> NDArray[np.uint32]:
    """uint32[2 * s]: how many rows each step of a group has among the live ones, then among the tombstones."""
    assert section.stamps is not None, "a group's rows have stamps"
    live, deleted = np.split(section.stamps, [len(section.rows)])
    ends = [np.searchsorted(part, stamps, "right") for part in (live, deleted)]
    return np.concatenate([np.diff(end, prepend=0) for end in ends]).astype(np.uint32)


def _take_runs(columns: _Columns, steps: m.Steps, live: int, count: int) -> U64:
    """Their stamps; and `steps.rows` is told how many they are."""
    size = len(steps.stamps)
    runs = columns.take(_UINT32, 2 * size).astype(np.int64)
    if int(runs[:size].sum()) != live or int(runs[size:].sum()) != count - live:
        raise RemoteProtocolError(f"rows of {size} steps are not {live} live ones of {count}")
    np.add(steps.rows, runs.reshape(2, size).sum(axis=0), out=steps.rows)
    return np.repeat(np.tile(steps.stamps, 2), runs)


def _sections(value: object, columns: _Columns, with_stamps: bool, steps: m.Steps | None = None) -> tuple[RowColumns, ...]:
    def parse(item: Header) -> RowColumns:
        table, count, live, row_bytes, codec, flags = item
        _uint(table, 32), _uint(count, 32), _uint(live, 32), _uint(row_bytes, 24), _uint(flags, 3)
        if codec != _CODEC_OF_SCHEMA:
            raise RemoteProtocolError(f"unknown codec {codec!r}"[:80])
        if live > count or not row_bytes or bool(flags & _HAS_STAMPS) != with_stamps:
            raise RemoteProtocolError("rows that contradict themselves")
        keys = columns.take(_UINT64, count)
        if steps is None:
            stamps = columns.take(_UINT64, count) if flags & _HAS_STAMPS else None
        else:
            stamps = _take_runs(columns, steps, live, count)
        if flags & _HAS_SIGNIFICANCE:
            columns.take(_FLOAT32, count)  # of what scale it is, version 1 does not say
        priority = columns.take(_UINT8, count) if flags & _HAS_PRIORITY else None
        rows = columns.take(_UINT8, live * row_bytes).reshape(live, row_bytes)
        return RowColumns(table, keys, rows, stamps, priority)

    return _items(value, SECTIONS_MAX, parse)


# --- one encoder and one decoder a message ---------------------------------------------------------------------------------


def _pack_hello(hello: m.Hello, version: int) -> Packed:
    return [
        hello.protocol_version,
        hello.cluster,
        list(hello.constants),
        _pack_member(hello.member, version),
        [_pack_member(member, version) for member in hello.members],
        [_pack_entry(entry) for entry in hello.schema],
        hello.answer_wanted,
    ], []


def _hello(header: Header, _columns: _Columns) -> m.Hello:
    version, cluster, constants, member, members, schema, answer_wanted = header
    return m.Hello(
        _uint(version, 8),
        _uint(cluster),
        _items(constants, 16, _uint),
        _member(member),
        _items(members, MEMBERS_MAX, _member),
        _items(schema, SCHEMA_ENTRIES_MAX, _entry),
        _flag(answer_wanted),
    )


def _pack_refusal(refusal: m.Refusal, _version: int) -> Packed:
    return [refusal.reason], []


def _refusal(header: Header, _columns: _Columns) -> m.Refusal:
    (reason,) = header
    return m.Refusal(_text(reason))


def _pack_heartbeat(beat: m.Heartbeat, version: int) -> Packed:
    return [
        _pack_member(beat.member, version),
        [_pack_member(member, version) for member in beat.members],
        beat.schema_digest,
        beat.unix_ms,
        [_pack_summary(summary) for summary in beat.summaries],
        beat.register_digest,
        len(beat.boots),
        beat.cluster,
        beat.retired_digest,
        list(beat.standing),
    ], [beat.boots, beat.counters.astype(np.uint32)]


def _heartbeat(header: Header, columns: _Columns) -> m.Heartbeat:
    member, members, schema_digest, unix_ms, summaries, register_digest, count, cluster, retired_digest, standing = header
    boots, counters = _take_lives(columns, count)
    told = _items(summaries, SUMMARIES_MAX, _summary)
    if len({summary.keyspace for summary in told}) < len(told):
        raise RemoteProtocolError("two summaries of one keyspace")  # each costs the receiver a digest of a vector
    stands = _items(standing, SUMMARIES_MAX, lambda one: _uint(one, 2))
    if len(stands) not in (0, len(told)):
        raise RemoteProtocolError(f"{len(stands)} standings of {len(told)} summaries")
    return m.Heartbeat(
        _member(member),
        _items(members, MEMBERS_MAX, _member),
        _uint(schema_digest),
        _uint(unix_ms, TIME_BITS),
        told,
        _uint(register_digest),
        boots,
        counters,
        _uint(cluster),
        _uint(retired_digest),
        stands,
    )


def _take_lives(columns: _Columns, count: object) -> tuple[U64, U64]:
    """Lives of members, and a 32-bit number for each."""
    if type(count) is not int or not 0 <= count <= MEMBERS_MAX + 1:
        raise RemoteProtocolError(f"expected at most {MEMBERS_MAX + 1} lives")
    return columns.take(_UINT64, count), columns.take(_UINT32, count).astype(np.uint64)


def _pack_schema(update: m.SchemaUpdate, _version: int) -> Packed:
    return [[_pack_entry(entry) for entry in update.entries]], []


def _schema(header: Header, _columns: _Columns) -> m.SchemaUpdate:
    (entries,) = header
    return m.SchemaUpdate(_items(entries, SCHEMA_ENTRIES_MAX, _entry))


def _pack_leave(leave: m.Leave, _version: int) -> Packed:
    return [leave.node, leave.version], []


def _leave(header: Header, _columns: _Columns) -> m.Leave:
    node, version = header
    return m.Leave(_text(node), _uint(version, 32))


def _pack_batch(batch: m.Batch, version: int) -> Packed:
    steps, claims = batch.steps, batch.claims
    if steps is not None and version < GROUPS_SINCE:
        raise LocalProtocolError(f"a group of steps exists since protocol version {GROUPS_SINCE}, the link speaks {version}")
    sections, arrays = _pack_sections(batch.columns, version, steps)
    header: Header = [
        batch.keyspace,
        batch.origin,
        batch.origin_region,
        batch.writer,
        batch.nonce,
        batch.stamp,
        batch.writer_prev,
        batch.shards_touched,
        len(claims.shards),
        batch.published_ns,
        batch.machine,
        batch.priority_class,
        batch.trees,
        sections,
        0 if steps is None else len(steps.stamps),
    ]
    if steps is not None:
        assert claims.until is not None, "a group's claims reach as far as its steps"
        ends = np.searchsorted(steps.stamps, claims.until).astype(np.uint16)
        arrays = [steps.stamps, steps.published_ns, ends, *arrays]
    return header, [claims.shards, claims.prev, claims.part, claims.parts, *arrays]


def _batch(header: Header, columns: _Columns) -> m.Batch:
    (
        keyspace,
        origin,
        region,
        writer,
        nonce,
        stamp,
        prev,
        touched,
        claimed,
        published_ns,
        machine,
        priority,
        trees,
        sections,
    ) = header[:-1]
    if _uint(claimed, 32) > SHARDS_MAX or _uint(touched, 32) > SHARDS_MAX or claimed > touched:
        raise RemoteProtocolError(f"batch touches {touched} shards, limit {SHARDS_MAX}")
    claims = m.ShardClaims(
        columns.take(_UINT32, claimed),
        columns.take(_UINT64, claimed),
        columns.take(_UINT16, claimed),
        columns.take(_UINT16, claimed),
    )
    steps = None
    if _uint(header[-1], 16):
        steps, claims = _take_group(columns, header[-1], claims)
    batch = m.Batch(
        _uint(keyspace, 32),
        _text(origin),
        _text(region),
        _uint(writer, 12),
        _uint(nonce),
        _uint(stamp),
        _uint(prev),
        touched,
        claims,
        _sections(sections, columns, False, steps),
        _uint(published_ns),
        _uint(machine),
        _uint(priority, 8),
        _uint(trees, 8),
        steps,
    )
    _check_claims(batch)
    if steps is not None:
        _check_group(batch, steps)
    return batch


def _take_group(columns: _Columns, count: int, claims: m.ShardClaims) -> tuple[m.Steps, m.ShardClaims]:
    """The steps of a group, whose rows are not counted yet, and how far its claims reach."""
    if not 2 <= count <= GROUP_STEPS_MAX:
        raise RemoteProtocolError(f"a group of {count} steps, expected 2 to {GROUP_STEPS_MAX}")
    stamps, published_ns = columns.take(_UINT64, count), columns.take(_UINT64, count)
    ends = columns.take(_UINT16, len(claims.shards))
    if (ends >= count).any():
        raise RemoteProtocolError(f"a claim up to step {int(ends.max())} of {count}")
    reaching = m.ShardClaims(claims.shards, claims.prev, claims.part, claims.parts, stamps[ends])
    return m.Steps(stamps, published_ns, np.zeros(count, np.int64)), reaching


def _check_group(batch: m.Batch, steps: m.Steps) -> None:
    stamps, claims = steps.stamps, batch.claims
    assert claims.until is not None
    if ((stamps & np.uint64(WRITERS_MAX - 1)) != batch.writer).any() or (stamps[1:] <= stamps[:-1]).any():
        raise RemoteProtocolError(f"steps of a group do not follow each other, or are not of writer {batch.writer}")
    if stamps[-1] != batch.stamp or stamps[0] <= batch.writer_prev or len(claims.shards) == 0:
        raise RemoteProtocolError("a group contradicts its steps")
    if (claims.prev >= claims.until).any() or (claims.parts != 1).any():
        raise RemoteProtocolError(_FAULTS[loops.CONTRADICTION])


def _check_claims(batch: m.Batch) -> None:
    claims, shards = batch.claims, batch.claims.shards
    if not 1 <= batch.trees <= TREES_MAX:
        raise RemoteProtocolError(_FAULTS[loops.SEVERAL_TREES].format(trees=batch.trees))
    if writer_of(batch.stamp) != batch.writer or batch.writer_prev >= batch.stamp:
        raise RemoteProtocolError(f"stamp {batch.stamp} does not follow {batch.writer_prev} of writer {batch.writer}")
    if len(shards) == 0:
        if any(len(section.keys) for section in batch.columns):
            raise RemoteProtocolError("rows without a claimed shard")
        return
    fault = loops.used.claims_fault(shards, claims.prev, claims.part, claims.parts, batch.stamp, batch.trees, SHARDS_MAX)
    if fault != loops.SOUND:
        raise RemoteProtocolError(_FAULTS[fault].format(trees=batch.trees))


_FAULTS: Final = {
    loops.SEVERAL_TREES: "one message for several of {trees} trees",
    loops.NOT_ASCENDING: "shards are not ascending",
    loops.CONTRADICTION: "a claim contradicts itself",
}


def _pack_pull(pull: m.PullRequest, version: int) -> Packed:
    known = pull.known
    header = [pull.keyspace, pull.request, pull.shards, len(pull.writers), len(pull.nonces), pull.retired_digest]
    later: list[NDArray[Any]] = [pull.nonces, known.stamps, known.shards] if version >= 2 else []
    return [*header, len(known.stamps), pull.backlog], [pull.writers, pull.vector, pull.frontier, *later]


def _take_vector(columns: _Columns, shards: int, writers: int) -> tuple[NDArray[np.uint16], U64, U64]:
    if _uint(shards, 32) > SHARDS_MAX or _uint(writers, 32) > WRITERS_MAX:
        raise RemoteProtocolError(f"vector of {shards} shards and {writers} writers")
    ids = _take_writers(columns, writers)
    return ids, _take_stamps(columns, shards, ids), _take_stamps(columns, 1, ids)[0]


def _take_writers(columns: _Columns, count: int) -> NDArray[np.uint16]:
    if _uint(count, 32) > WRITERS_MAX:
        raise RemoteProtocolError(f"{count} writers, limit {WRITERS_MAX}")
    ids = columns.take(_UINT16, count)
    if len(ids) and (ids[-1] >= WRITERS_MAX or np.any(ids[1:] <= ids[:-1])):
        raise RemoteProtocolError("writers are not ascending")
    return ids


def _take_stamps(columns: _Columns, shards: int, writers: NDArray[np.uint16]) -> U64:
    """uint64[shards, w], in each column stamps of its writer, or 0."""
    stamps = columns.take(_UINT64, shards * len(writers)).reshape(shards, len(writers))
    if np.any((stamps & np.uint64(WRITERS_MAX - 1) != writers) & (stamps != 0)):
        raise RemoteProtocolError("a vector holds a stamp of another writer")
    return stamps


def _take_shards(columns: _Columns, count: int) -> NDArray[np.uint32]:
    if _uint(count, 32) > SHARDS_MAX:
        raise RemoteProtocolError(f"{count} shards, limit {SHARDS_MAX}")
    shards = columns.take(_UINT32, count)
    if len(shards) and (shards[-1] >= SHARDS_MAX or np.any(shards[1:] <= shards[:-1])):
        raise RemoteProtocolError("shards are not ascending")
    return shards


def _take_versions(columns: _Columns, count: int) -> U64:
    versions = columns.take(_UINT64, count)
    if not versions.all():
        raise RemoteProtocolError("a shard without a version")
    return versions


def _pull(header: Header, columns: _Columns) -> m.PullRequest:
    keyspace, request, shards, writers, bound, retired_digest, known, backlog = header
    ids, vector, frontier = _take_vector(columns, shards, writers)
    nonces = _NO_NONCES if bound is None else columns.take(_UINT64, _uint(bound, 32))
    if len(nonces) not in (0, len(ids)):
        raise RemoteProtocolError(f"{len(nonces)} nonces of {len(ids)} writers")
    steps = NO_STEPS if known is None else _take_steps(columns, known, shards)
    return m.PullRequest(
        _uint(keyspace, 32), _uint(request), ids, vector, frontier, shards, nonces, _uint(retired_digest), steps, _flag(backlog)
    )


def _take_steps(columns: _Columns, count: int, shards: int) -> KnownSteps:
    row_bytes = (shards + 7) // 8
    if _uint(count, 32) * (8 + row_bytes) > KNOWN_BYTES_MAX:
        raise RemoteProtocolError(f"{count} known steps of {shards} shards")
    stamps, bits = columns.take(_UINT64, count), columns.take(_UINT8, count * row_bytes)
    if np.any(stamps[1:] <= stamps[:-1]):
        raise RemoteProtocolError("known steps are not ascending")
    return KnownSteps(stamps, bits.reshape(count, row_bytes)) if count else NO_STEPS


def _pack_reply(reply: m.PullReply, version: int) -> Packed:
    sections, arrays = _pack_sections(reply.columns, version)
    shards = reply.vector.shape[0]
    header: Header = [reply.keyspace, reply.request, reply.chunk, reply.last, shards, len(reply.writers), sections]
    bindings: list[NDArray[Any]] = [reply.bound, reply.nonces] if version >= 2 else []
    sizes, whole = _pack_whole(reply)
    columns: list[NDArray[Any]] = [reply.writers, np.ascontiguousarray(reply.vector), reply.frontier, *arrays, *bindings]
    return [*header, len(reply.bound), sizes], columns + (whole if version >= 2 else [])


def _pack_whole(reply: m.PullReply | m.ShardsReply) -> Packed:
    """Of shards that come whole: how many of them, and in the floor; and the columns."""
    if not len(reply.whole) and reply.floor is None:
        return [], []
    floor = reply.floor
    if floor is None:
        return [len(reply.whole)], [reply.whole]
    sizes = [len(reply.whole), len(floor.shards), len(floor.writers)]
    return sizes, [reply.whole, floor.shards, floor.writers, np.ascontiguousarray(floor.stamps)]


def _take_whole(sizes: Any, columns: _Columns) -> tuple[NDArray[np.uint32], m.Floor | None]:
    if not isinstance(sizes, list) or len(sizes) not in (0, 1, 3):
        raise RemoteProtocolError(f"sizes of whole shards: {sizes!r}"[:200])
    if not sizes:  # as a rule, and in version 1
        return _NO_SHARDS, None
    whole = _take_shards(columns, sizes[0])
    if len(sizes) < 3:
        return whole, None
    shards, writers = _take_shards(columns, sizes[1]), _take_writers(columns, sizes[2])
    return whole, m.Floor(shards, writers, _take_stamps(columns, len(shards), writers))


def _reply(header: Header, columns: _Columns) -> m.PullReply:
    keyspace, request, chunk, last, shards, writers, sections, bound, sizes = header
    ids, vector, frontier = _take_vector(columns, shards, writers)
    rows = _sections(sections, columns, with_stamps=True)
    who, nonces = (_NO_WRITERS, _NO_NONCES) if bound is None else _take_bindings(columns, bound)
    reply = _uint(keyspace, 32), _uint(request), _uint(chunk, 32), _flag(last)
    return m.PullReply(*reply, rows, ids, vector, frontier, who, nonces, *_take_whole(sizes, columns))


def _take_bindings(columns: _Columns, count: object) -> tuple[NDArray[np.uint16], U64]:
    who, nonces = columns.take(_UINT16, _uint(count, 32)), columns.take(_UINT64, _uint(count, 32))
    if len(who) and int(who.max()) >= WRITERS_MAX:
        raise RemoteProtocolError(f"a nonce of writer {int(who.max())}")
    return who, nonces


def _pack_ack(ack: m.Ack, _version: int) -> Packed:
    return [ack.session, ack.sequence], []


def _ack(header: Header, _columns: _Columns) -> m.Ack:
    session, sequence = header
    return m.Ack(_uint(session, 32), _uint(sequence))


def _pack_broken(broken: m.SessionBroken, _version: int) -> Packed:
    return [broken.session], []


def _broken(header: Header, _columns: _Columns) -> m.SessionBroken:
    (session,) = header
    return m.SessionBroken(_uint(session, 32))


def _pack_query(query: m.ReachQuery, _version: int) -> Packed:
    return [query.keyspace, query.query, query.stamp], []


def _query(header: Header, _columns: _Columns) -> m.ReachQuery:
    keyspace, query, stamp = header
    return m.ReachQuery(_uint(keyspace, 32), _uint(query), _uint(stamp))


def _pack_reached(reached: m.Reached, _version: int) -> Packed:
    return [reached.query], []


def _reached(header: Header, _columns: _Columns) -> m.Reached:
    (query,) = header
    return m.Reached(_uint(query))


def _pack_index(index: m.RegisterIndex, _version: int) -> Packed:
    return [len(index.boots), index.answer_wanted], [index.boots, index.versions.astype(np.uint32)]


def _index(header: Header, columns: _Columns) -> m.RegisterIndex:
    count, answer_wanted = header
    boots, versions = _take_lives(columns, count)
    return m.RegisterIndex(boots, versions, _flag(answer_wanted))


def _pack_news(news: m.MemberNews, version: int) -> Packed:
    return [[_pack_member(member, version) for member in news.members]], []


def _news(header: Header, _columns: _Columns) -> m.MemberNews:
    (members,) = header
    return m.MemberNews(_items(members, MEMBERS_MAX, _member))


def _pack_block_request(request: m.BlockRequest, _version: int) -> Packed:
    return [request.cluster, request.holder, list(request.held)], []


def _block_request(header: Header, _columns: _Columns) -> m.BlockRequest:
    cluster, holder, held = header
    return m.BlockRequest(_uint(cluster), _uint(holder), _items(held, BLOCKS, _block))


def _block(value: object) -> int:
    if _uint(value, 16) >= BLOCKS:
        raise RemoteProtocolError(f"block {value} of writer ids, there are {BLOCKS}")
    return value  # type: ignore[return-value]


def _pack_block_grant(grant: m.BlockGrant, _version: int) -> Packed:
    return [grant.cluster, grant.holder, list(grant.blocks), grant.clock_floor, grant.founded], []


def _block_grant(header: Header, _columns: _Columns) -> m.BlockGrant:
    cluster, holder, blocks, clock_floor, founded = header
    return m.BlockGrant(_uint(cluster), _uint(holder), _items(blocks, BLOCKS, _block), _uint(clock_floor), _flag(founded))


def _pack_versions_wanted(wanted: m.VersionsWanted, _version: int) -> Packed:
    return [wanted.keyspace, wanted.request, wanted.since, wanted.retired_digest], []


def _versions_wanted(header: Header, _columns: _Columns) -> m.VersionsWanted:
    keyspace, request, since, retired_digest = header
    return m.VersionsWanted(_uint(keyspace, 32), _uint(request), _uint(since, 63), _uint(retired_digest))


def _pack_version_list(told: m.VersionList, _version: int) -> Packed:
    header: Header = [told.keyspace, told.request, told.mark, len(told.shards), len(told.writers)]
    return header, [told.shards, told.versions, told.writers, told.frontier]


def _version_list(header: Header, columns: _Columns) -> m.VersionList:
    keyspace, request, mark, count, writers = header
    shards = _take_shards(columns, count)
    versions = _take_versions(columns, len(shards))
    ids = _take_writers(columns, writers)
    frontier = _take_stamps(columns, 1, ids)[0]
    return m.VersionList(_uint(keyspace, 32), _uint(request), _uint(mark, 63), shards, versions, ids, frontier)


def _pack_shards_wanted(wanted: m.ShardsWanted, _version: int) -> Packed:
    header: Header = [wanted.keyspace, wanted.request, len(wanted.shards), len(wanted.writers), wanted.retired_digest]
    return header, [wanted.shards, wanted.writers, np.ascontiguousarray(wanted.vectors)]


def _shards_wanted(header: Header, columns: _Columns) -> m.ShardsWanted:
    keyspace, request, count, writers, retired_digest = header
    shards = _take_shards(columns, count)
    if not len(shards):
        raise RemoteProtocolError("nothing is wanted")
    ids = _take_writers(columns, writers)
    vectors = _take_stamps(columns, len(shards), ids)
    return m.ShardsWanted(_uint(keyspace, 32), _uint(request), shards, ids, vectors, _uint(retired_digest))


def _pack_shards_reply(reply: m.ShardsReply, version: int) -> Packed:
    sections, arrays = _pack_sections(reply.columns, version)
    header: Header = [
        reply.keyspace,
        reply.request,
        reply.chunk,
        reply.last,
        len(reply.shards),
        len(reply.writers),
        sections,
        len(reply.bound),
    ]
    sizes, whole = _pack_whole(reply)
    staged: list[NDArray[Any]] = [reply.shards, reply.versions, reply.writers, np.ascontiguousarray(reply.vectors)]
    return [*header, sizes], [*staged, *arrays, reply.bound, reply.nonces, *whole]


def _shards_reply(header: Header, columns: _Columns) -> m.ShardsReply:
    keyspace, request, chunk, last, count, writers, sections, bound, sizes = header
    shards = _take_shards(columns, count)
    versions = _take_versions(columns, len(shards))
    ids = _take_writers(columns, writers)
    vectors = _take_stamps(columns, len(shards), ids)
    rows = _sections(sections, columns, with_stamps=True)
    reply = _uint(keyspace, 32), _uint(request), _uint(chunk, 32), _flag(last)
    who, nonces = _take_bindings(columns, bound)
    return m.ShardsReply(*reply, rows, shards, versions, ids, vectors, who, nonces, *_take_whole(sizes, columns))


def _pack_retirements(told: m.Retirements, _version: int) -> Packed:
    floors = [one.floor for one in told.retired]
    expulsions = [[one.node, one.boot, one.boot_ms] for one in told.expulsions]
    retired = [[one.keyspace, one.family, one.writer, one.nonce, one.stage, len(one.floor)] for one in told.retired]
    fences = [pack_fence(one) for one in told.fences]
    return [expulsions, retired, fences], [np.concatenate(floors) if floors else _NO_NONCES]


def _retirements(header: Header, columns: _Columns) -> m.Retirements:
    expulsions, retired, fences = header
    lives = _items(expulsions, MEMBERS_MAX, lambda one: m.Expulsion(_text(one[0]), _uint(one[1]), _uint(one[2], TIME_BITS)))
    counts = _items(retired, WRITERS_MAX, lambda one: _uint(one[5], 32))
    if max(counts, default=0) > SHARDS_MAX:
        raise RemoteProtocolError(f"a floor of {max(counts)} shards, limit {SHARDS_MAX}")
    floors = np.split(columns.take(_UINT64, sum(counts)), np.cumsum(counts)[:-1].astype(np.int64))
    entries = tuple(_retired(one, floor) for one, floor in zip(retired, floors, strict=False))
    return m.Retirements(lives, entries, _items(fences, FENCES_TOLD_MAX, unpack_fence))


def _retired(value: Header, floor: U64) -> m.Retired:
    keyspace, family, writer, nonce, stage, _ = value
    if _uint(stage, 8) > m.DONE or (stage == m.FROZEN) != (len(floor) == 0):
        raise RemoteProtocolError(f"stage {stage} of a retirement, with a floor of {len(floor)} shards")
    _check_column(_uint(writer, 12), floor)
    return m.Retired(_uint(keyspace, 32), _uint(family, 32), writer, _uint(nonce), stage, floor)


def _check_column(writer: int, column: U64) -> None:
    if np.any((column & np.uint64(WRITERS_MAX - 1) != writer) & (column != 0)):
        raise RemoteProtocolError(f"a column of writer {writer} holds a stamp of another")


def _pack_retire_report(report: m.RetireReport, _version: int) -> Packed:
    return [report.keyspace, report.writer, report.nonce, report.stage, len(report.column)], [report.column]


def _retire_report(header: Header, columns: _Columns) -> m.RetireReport:
    keyspace, writer, nonce, stage, shards = header
    if _uint(shards, 32) > SHARDS_MAX:
        raise RemoteProtocolError(f"a report of {shards} shards, limit {SHARDS_MAX}")
    column = columns.take(_UINT64, shards)
    _check_column(_uint(writer, 12), column)
    return m.RetireReport(_uint(keyspace, 32), writer, _uint(nonce), _uint(stage, 8), column)


def _pack_adopt(adopt: m.Adopt, _version: int) -> Packed:
    return [adopt.keyspace, adopt.tree, list(adopt.children)], []


def _adopt(header: Header, _columns: _Columns) -> m.Adopt:
    keyspace, tree, children = header
    if _uint(tree, 8) >= TREES_MAX:
        raise RemoteProtocolError(f"tree {tree}, there are {TREES_MAX}")
    return m.Adopt(_uint(keyspace, 32), tree, _items(children, TREE_ARITY, _text))


def _wants(header: Header, _columns: _Columns) -> m.Wants:
    (regions,) = header

    def one(item: Header) -> tuple[str, int]:
        region, bytes_per_s = item
        return _text(region), _uint(bytes_per_s)

    return m.Wants(_items(regions, REGIONS_MAX, one))


def _stable_ask(header: Header, _columns: _Columns) -> m.StableAsk:
    (keyspace,) = header
    return m.StableAsk(_uint(keyspace, 32))


def _pack_stable_report(report: m.StableReport, _version: int) -> Packed:
    header: Header = [report.keyspace, report.waiting, len(report.writers), len(report.boots)]
    return header, [report.writers, report.reached, report.boots]


def _stable_report(header: Header, columns: _Columns) -> m.StableReport:
    keyspace, waiting, writers, boots = header
    ids = _take_writers(columns, writers)
    reached = _take_stamps(columns, 1, ids)[0]
    if _uint(boots, 32) > MEMBERS_MAX:
        raise RemoteProtocolError(f"{boots} lives, limit {MEMBERS_MAX}")
    return m.StableReport(_uint(keyspace, 32), _flag(waiting), ids, reached, columns.take(_UINT64, boots))


def _pack_stable(told: m.Stable, _version: int) -> Packed:
    return [told.keyspace, len(told.writers), list(told.held_up_by)], [told.writers, told.reached]


def _stable(header: Header, columns: _Columns) -> m.Stable:
    keyspace, writers, held_up_by = header
    ids = _take_writers(columns, writers)
    reached = _take_stamps(columns, 1, ids)[0]
    return m.Stable(_uint(keyspace, 32), ids, reached, _items(held_up_by, HELD_UP_MAX, _text))


def _incomplete(header: Header, _columns: _Columns) -> m.Incomplete:
    keyspace, request = header
    return m.Incomplete(_uint(keyspace, 32), _uint(request))


def _pack_keys_wanted(wanted: m.KeysWanted, _version: int) -> Packed:
    floor = wanted.floor
    tables = [[one.table, len(one.keys)] for one in wanted.keys]
    header: Header = [wanted.keyspace, wanted.request, wanted.retired_digest, len(floor.shards), len(floor.writers), tables]
    return header, [floor.shards, floor.writers, np.ascontiguousarray(floor.stamps), *(one.keys for one in wanted.keys)]


def _keys_wanted(header: Header, columns: _Columns) -> m.KeysWanted:
    keyspace, request, retired_digest, shards, writers, tables = header
    told, ids = _take_shards(columns, shards), _take_writers(columns, writers)
    floor = m.Floor(told, ids, _take_stamps(columns, len(told), ids))
    counts = _items(tables, SECTIONS_MAX, lambda one: (_uint(one[0], 32), _uint(one[1], 32)))
    if not len(told) or not 0 < sum(count for _, count in counts) <= WANTED_KEYS_MAX:
        raise RemoteProtocolError(f"no keys are wanted, or more than {WANTED_KEYS_MAX}")
    keys = tuple(TableKeys(table, columns.take(_UINT64, count)) for table, count in counts)
    return m.KeysWanted(_uint(keyspace, 32), _uint(request), floor, keys, _uint(retired_digest))


def _pack_keys_found(found: m.KeysFound, version: int) -> Packed:
    sections, arrays = _pack_sections(found.columns, version)
    return [found.keyspace, found.request, sections, len(found.bound)], [*arrays, found.bound, found.nonces]


def _keys_found(header: Header, columns: _Columns) -> m.KeysFound:
    keyspace, request, sections, bound = header
    rows = _sections(sections, columns, with_stamps=True)
    return m.KeysFound(_uint(keyspace, 32), _uint(request), rows, *_take_bindings(columns, bound))


def _pack_backlogged(told: m.Backlogged, _version: int) -> Packed:
    return [told.keyspace, told.number, told.on, told.trees, len(told.writers)], [told.writers, told.served]


def _backlogged(header: Header, columns: _Columns) -> m.Backlogged:
    keyspace, number, on, trees, count = header
    ids = _take_writers(columns, count)
    if not 1 <= _uint(trees, 8) <= TREES_MAX:
        raise RemoteProtocolError(f"{trees} trees, limit {TREES_MAX}")
    return m.Backlogged(_uint(keyspace, 32), _uint(number), _flag(on), trees, ids, columns.take(_UINT8, len(ids)))


def _pack_state_chunk(chunk: m.StateChunk, version: int) -> Packed:
    sections, arrays = _pack_sections(chunk.columns, version)
    sizes = [len(chunk.shards), len(chunk.writers), len(chunk.bound)]
    claims: list[NDArray[Any]] = [chunk.shards, chunk.writers, np.ascontiguousarray(chunk.until), chunk.frontier]
    return [chunk.keyspace, chunk.request, chunk.ends, *sizes, sections], [*claims, *arrays, chunk.bound, chunk.nonces]


def _state_chunk(header: Header, columns: _Columns) -> m.StateChunk:
    keyspace, request, ends, count, writers, bound, sections = header
    shards, ids = _take_shards(columns, count), _take_writers(columns, writers)
    until, frontier = _take_stamps(columns, len(shards), ids), _take_stamps(columns, 1, ids)[0]
    rows = _sections(sections, columns, with_stamps=True)
    claims = shards, ids, until, frontier
    return m.StateChunk(_uint(keyspace, 32), _uint(request), _flag(ends), rows, *claims, *_take_bindings(columns, bound))


# Which kinds there are and since when: a message's number on the wire is its place here, from 1; new ones go to the end.
_KINDS: Final = (
    _Kind(m.Hello, _pack_hello, _hello),
    _Kind(m.Refusal, _pack_refusal, _refusal),
    _Kind(m.Heartbeat, _pack_heartbeat, _heartbeat, added=((2, 0), (2, 0), (2, []))),
    _Kind(m.SchemaUpdate, _pack_schema, _schema),
    _Kind(m.Leave, _pack_leave, _leave, added=((2, 0),)),
    _Kind(m.Batch, _pack_batch, _batch, added=((GROUPS_SINCE, 0),), changed=(PACKED_SINCE,)),
    _Kind(m.PullRequest, _pack_pull, _pull, added=((2, None), (2, 0), (2, None), (2, False))),
    _Kind(m.PullReply, _pack_reply, _reply, added=((2, None), (2, []))),
    _Kind(m.Ack, _pack_ack, _ack),
    _Kind(m.SessionBroken, _pack_broken, _broken),
    _Kind(m.ReachQuery, _pack_query, _query),
    _Kind(m.Reached, _pack_reached, _reached),
    _Kind(m.RegisterIndex, _pack_index, _index),
    _Kind(m.MemberNews, _pack_news, _news),
    _Kind(m.BlockRequest, _pack_block_request, _block_request, since=2),
    _Kind(m.BlockGrant, _pack_block_grant, _block_grant, since=2),
    _Kind(m.VersionsWanted, _pack_versions_wanted, _versions_wanted, since=2),
    _Kind(m.VersionList, _pack_version_list, _version_list, since=2),
    _Kind(m.ShardsWanted, _pack_shards_wanted, _shards_wanted, since=2),
    _Kind(m.ShardsReply, _pack_shards_reply, _shards_reply, since=2),
    _Kind(m.Retirements, _pack_retirements, _retirements, since=2),
    _Kind(m.RetireReport, _pack_retire_report, _retire_report, since=2),
    _Kind(m.Adopt, _pack_adopt, _adopt, since=2),
    _Kind(m.StableAsk, lambda ask, _version: ([ask.keyspace], []), _stable_ask, since=2),
    _Kind(m.StableReport, _pack_stable_report, _stable_report, since=2),
    _Kind(m.Stable, _pack_stable, _stable, since=2),
    _Kind(m.Incomplete, lambda told, _version: ([told.keyspace, told.request], []), _incomplete, since=2),
    _Kind(m.KeysWanted, _pack_keys_wanted, _keys_wanted, since=2),
    _Kind(m.KeysFound, _pack_keys_found, _keys_found, since=2),
    _Kind(m.Wants, lambda told, _version: ([list(map(list, told.regions))], []), _wants, since=2),
    _Kind(m.FenceReport, pack_report, unpack_report, since=2),
    _Kind(m.Backlogged, _pack_backlogged, _backlogged, since=2),
    _Kind(m.StateChunk, _pack_state_chunk, _state_chunk, since=2),
)
_LARGE_HEADERS: Final = (m.Hello, m.SchemaUpdate, m.Heartbeat, m.MemberNews)
_NUMBER_OF: Final = {kind.message: number for number, kind in enumerate(_KINDS, start=1)}
