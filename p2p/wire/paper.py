"""The four messages of the paper's protocol on the wire (`p2p.paper`)."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.replica import U64
from p2p.wire.columns import UINT64, Columns, take_shards, take_stamps, take_writers
from p2p.wire.kind import Header, Kind, Packed
from p2p.wire.rows import pack_sections, pack_whole, take_bindings, take_whole, unpack_sections
from p2p.wire.values import flag, uint


def _pack_versions_wanted(wanted: m.VersionsWanted, _version: int) -> Packed:
    return [wanted.keyspace, wanted.request, wanted.since, wanted.retired_digest], []


def _unpack_versions_wanted(header: Header, _columns: Columns) -> m.VersionsWanted:
    keyspace, request, since, retired_digest = header
    return m.VersionsWanted(uint(keyspace, 32), uint(request), uint(since, 63), uint(retired_digest))


VERSIONS_WANTED: Final = Kind(m.VersionsWanted, _pack_versions_wanted, _unpack_versions_wanted, since=2)


def _pack_version_list(told: m.VersionList, _version: int) -> Packed:
    header: Header = [told.keyspace, told.request, told.mark, len(told.shards), len(told.writers)]
    return header, [told.shards, told.versions, told.writers, told.frontier]


def _unpack_version_list(header: Header, columns: Columns) -> m.VersionList:
    keyspace, request, mark, count, writers = header
    shards = take_shards(columns, count)
    versions = _take_versions(columns, len(shards))
    ids = take_writers(columns, writers)
    frontier = take_stamps(columns, 1, ids)[0]
    return m.VersionList(uint(keyspace, 32), uint(request), uint(mark, 63), shards, versions, ids, frontier)


VERSION_LIST: Final = Kind(m.VersionList, _pack_version_list, _unpack_version_list, since=2)


def _take_versions(columns: Columns, count: int) -> U64:
    versions = columns.take(UINT64, count)
    if not versions.all():
        raise RemoteProtocolError("a shard without a version")
    return versions


def _pack_shards_wanted(wanted: m.ShardsWanted, _version: int) -> Packed:
    header: Header = [wanted.keyspace, wanted.request, len(wanted.shards), len(wanted.writers), wanted.retired_digest]
    return header, [wanted.shards, wanted.writers, np.ascontiguousarray(wanted.vectors)]


def _unpack_shards_wanted(header: Header, columns: Columns) -> m.ShardsWanted:
    keyspace, request, count, writers, retired_digest = header
    shards = take_shards(columns, count)
    if not len(shards):
        raise RemoteProtocolError("nothing is wanted")
    ids = take_writers(columns, writers)
    vectors = take_stamps(columns, len(shards), ids)
    return m.ShardsWanted(uint(keyspace, 32), uint(request), shards, ids, vectors, uint(retired_digest))


SHARDS_WANTED: Final = Kind(m.ShardsWanted, _pack_shards_wanted, _unpack_shards_wanted, since=2)


def _pack_shards_reply(reply: m.ShardsReply, version: int) -> Packed:
    sections, arrays = pack_sections(reply.columns, version)
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
    sizes, whole = pack_whole(reply)
    staged: list[NDArray[Any]] = [reply.shards, reply.versions, reply.writers, np.ascontiguousarray(reply.vectors)]
    return [*header, sizes], [*staged, *arrays, reply.bound, reply.nonces, *whole]


def _unpack_shards_reply(header: Header, columns: Columns) -> m.ShardsReply:
    keyspace, request, chunk, last, count, writers, sections, bound, sizes = header
    shards = take_shards(columns, count)
    versions = _take_versions(columns, len(shards))
    ids = take_writers(columns, writers)
    vectors = take_stamps(columns, len(shards), ids)
    rows = unpack_sections(sections, columns, with_stamps=True)
    reply = uint(keyspace, 32), uint(request), uint(chunk, 32), flag(last)
    who, nonces = take_bindings(columns, bound)
    return m.ShardsReply(*reply, rows, shards, versions, ids, vectors, who, nonces, *take_whole(sizes, columns))


SHARDS_REPLY: Final = Kind(m.ShardsReply, _pack_shards_reply, _unpack_shards_reply, since=2)
