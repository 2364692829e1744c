"""Members, schema and heartbeats on the wire (`p2p.members`)."""

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Final

import numpy as np

from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.placement import HOLDS_SINCE
from p2p.replica import PARTITIONS_MAX, SchemaEntry
from p2p.stamps import WRITERS_MAX, writer_of
from p2p.versions import PROTOCOL_VERSION
from p2p.wire.columns import Columns, take_lives
from p2p.wire.frames import VERSIONS
from p2p.wire.kind import Added, Header, Kind, Packed, extend, trim
from p2p.wire.limits import (
    HOLDINGS_MAX,
    LARGE_HEADER_ITEMS_MAX,
    MEMBERS_MAX,
    SCHEMA_ENTRIES_MAX,
    SUMMARIES_MAX,
    TIME_BITS,
    WRITER_RECORDS_MAX,
)
from p2p.wire.values import STRING_BYTES_MAX, flag, items, text, uint, wide

_MEMBER_FIELDS: Final = 11  # of version 1
_MEMBER_ADDED: Final[Added] = ((HOLDS_SINCE, []),)  # holds


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


def _unpack_member(value: Header) -> m.MemberRecord:
    told = _shape_of(value)
    if told < PROTOCOL_VERSION:
        value = extend(value, _MEMBER_ADDED, told)
    node, boot, boot_ms, region, role, address, heartbeat, left, writers, version, deaf, holds = value
    plain = _unpack_plain_member(node, boot, boot_ms, region, role, address, heartbeat, left, version, deaf, told)
    if writers == [] and holds == []:
        return plain
    return replace(
        plain,
        writers=items(writers, WRITER_RECORDS_MAX, _unpack_writer_record),
        holds=items(holds, HOLDINGS_MAX, _unpack_holding),
    )


# News comes to everybody several times over. With their types: what is equal to a number need not be one.
@lru_cache(MEMBERS_MAX, typed=True)
def _unpack_plain_member(
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
    """What a record says besides its writers and holdings; most have neither."""
    return m.MemberRecord(
        text(node),
        uint(boot),
        uint(boot_ms, TIME_BITS),
        text(region),
        text(role),
        text(address),
        uint(heartbeat, 32),
        flag(left),
        (),
        uint(version, 32),
        flag(deaf),
        (),
        told,
    )


def _unpack_holding(value: Header) -> m.Holding:
    family, partitions, held = value
    if not 2 <= uint(partitions, 32) <= PARTITIONS_MAX:
        raise RemoteProtocolError(f"{partitions} partitions, expected 2 to {PARTITIONS_MAX}")
    chosen = items(held, PARTITIONS_MAX, lambda partition: uint(partition, 32))
    if any(later <= earlier for earlier, later in pairwise(chosen)) or (chosen and chosen[-1] >= partitions):
        raise RemoteProtocolError(f"held partitions are not ascending, or not of {partitions}")
    return m.Holding(uint(family, 32), partitions, chosen)


def _shape_of(record: Header) -> int:
    """The newest version in whose shape a member's record is; its length tells."""
    return _lengths(_MEMBER_FIELDS, tuple([since for since, _ in _MEMBER_ADDED]))[len(record)]


@lru_cache(8)
def _lengths(fields: int, added: tuple[int, ...]) -> dict[int, int]:
    """Length of a member's record -> the newest version that has it."""
    return {fields + sum(since <= version for since in added): version for version in VERSIONS}


def _unpack_writer_record(value: Header) -> m.WriterRecord:
    keyspace, writer, nonce, last_stamp = value
    record = m.WriterRecord(uint(keyspace, 32), uint(writer, 12), uint(nonce), uint(last_stamp))
    if record.last_stamp and writer_of(record.last_stamp) != record.writer:
        raise RemoteProtocolError(f"stamp {record.last_stamp} is not of writer {record.writer}")
    return record


def _pack_entry(entry: SchemaEntry) -> Header:
    return [entry.keyspace, entry.name, entry.body]


def _unpack_entry(value: Header) -> SchemaEntry:
    keyspace, name, body = value
    if type(body) is not bytes or len(body) > STRING_BYTES_MAX:
        raise RemoteProtocolError("schema entry without a body")
    return SchemaEntry(uint(keyspace, 32), text(name), body)


def _pack_summary(summary: m.KeyspaceSummary) -> Header:
    return [
        summary.keyspace,
        summary.vector_digest.to_bytes(16, "little"),
        summary.stray_digest.to_bytes(16, "little"),
        [list(pair) for pair in summary.frontier],
    ]


def _unpack_summary(value: Header) -> m.KeyspaceSummary:
    keyspace, vector_digest, stray_digest, frontier = value
    return m.KeyspaceSummary(
        uint(keyspace, 32), wide(vector_digest), wide(stray_digest), items(frontier, WRITERS_MAX, _unpack_frontier_pair)
    )


def _unpack_frontier_pair(value: Header) -> tuple[int, int]:
    writer, stamp = value
    if writer_of(uint(stamp)) != uint(writer, 12):
        raise RemoteProtocolError(f"stamp {stamp} is not of writer {writer}")
    return writer, stamp


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


def _unpack_hello(header: Header, _columns: Columns) -> m.Hello:
    version, cluster, constants, member, members, schema, answer_wanted = header
    return m.Hello(
        uint(version, 8),
        uint(cluster),
        items(constants, 16, uint),
        _unpack_member(member),
        items(members, MEMBERS_MAX, _unpack_member),
        items(schema, SCHEMA_ENTRIES_MAX, _unpack_entry),
        flag(answer_wanted),
    )


HELLO: Final = Kind(m.Hello, _pack_hello, _unpack_hello, header_items_max=LARGE_HEADER_ITEMS_MAX)


def _pack_refusal(refusal: m.Refusal, _version: int) -> Packed:
    return [refusal.reason], []


def _unpack_refusal(header: Header, _columns: Columns) -> m.Refusal:
    (reason,) = header
    return m.Refusal(text(reason))


REFUSAL: Final = Kind(m.Refusal, _pack_refusal, _unpack_refusal)


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


def _unpack_heartbeat(header: Header, columns: Columns) -> m.Heartbeat:
    member, members, schema_digest, unix_ms, summaries, register_digest, count, cluster, retired_digest, standing = header
    boots, counters = take_lives(columns, count)
    told = items(summaries, SUMMARIES_MAX, _unpack_summary)
    if len({summary.keyspace for summary in told}) < len(told):
        raise RemoteProtocolError("two summaries of one keyspace")  # each costs the receiver a digest of a vector
    stands = items(standing, SUMMARIES_MAX, lambda one: uint(one, 2))
    if len(stands) not in (0, len(told)):
        raise RemoteProtocolError(f"{len(stands)} standings of {len(told)} summaries")
    return m.Heartbeat(
        _unpack_member(member),
        items(members, MEMBERS_MAX, _unpack_member),
        uint(schema_digest),
        uint(unix_ms, TIME_BITS),
        told,
        uint(register_digest),
        boots,
        counters,
        uint(cluster),
        uint(retired_digest),
        stands,
    )


HEARTBEAT: Final = Kind(
    m.Heartbeat,
    _pack_heartbeat,
    _unpack_heartbeat,
    added=((2, 0), (2, 0), (2, [])),
    header_items_max=LARGE_HEADER_ITEMS_MAX,
)


def _pack_schema(update: m.SchemaUpdate, _version: int) -> Packed:
    return [[_pack_entry(entry) for entry in update.entries]], []


def _unpack_schema(header: Header, _columns: Columns) -> m.SchemaUpdate:
    (entries,) = header
    return m.SchemaUpdate(items(entries, SCHEMA_ENTRIES_MAX, _unpack_entry))


SCHEMA_UPDATE: Final = Kind(m.SchemaUpdate, _pack_schema, _unpack_schema, header_items_max=LARGE_HEADER_ITEMS_MAX)


def _pack_leave(leave: m.Leave, _version: int) -> Packed:
    return [leave.node, leave.version], []


def _unpack_leave(header: Header, _columns: Columns) -> m.Leave:
    node, version = header
    return m.Leave(text(node), uint(version, 32))


LEAVE: Final = Kind(m.Leave, _pack_leave, _unpack_leave, added=((2, 0),))


def _pack_index(index: m.RegisterIndex, _version: int) -> Packed:
    return [len(index.boots), index.answer_wanted], [index.boots, index.versions.astype(np.uint32)]


def _unpack_index(header: Header, columns: Columns) -> m.RegisterIndex:
    count, answer_wanted = header
    boots, versions = take_lives(columns, count)
    return m.RegisterIndex(boots, versions, flag(answer_wanted))


REGISTER_INDEX: Final = Kind(m.RegisterIndex, _pack_index, _unpack_index)


def _pack_news(news: m.MemberNews, version: int) -> Packed:
    return [[_pack_member(member, version) for member in news.members]], []


def _unpack_news(header: Header, _columns: Columns) -> m.MemberNews:
    (members,) = header
    return m.MemberNews(items(members, MEMBERS_MAX, _unpack_member))


MEMBER_NEWS: Final = Kind(m.MemberNews, _pack_news, _unpack_news, header_items_max=LARGE_HEADER_ITEMS_MAX)
