"""Pulls, and rows by key, on the wire (`p2p.pulling`)."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.replica import NO_STEPS, KnownSteps, TableKeys
from p2p.wire.columns import NO_NONCES, NO_WRITERS, UINT8, UINT64, Columns, take_shards, take_stamps, take_vector, take_writers
from p2p.wire.kind import Header, Kind, Packed
from p2p.wire.limits import KNOWN_BYTES_MAX, SECTIONS_MAX, WANTED_KEYS_MAX
from p2p.wire.rows import pack_sections, pack_whole, take_bindings, take_whole, unpack_sections
from p2p.wire.values import flag, items, uint


def _pack_pull(pull: m.PullRequest, version: int) -> Packed:
    known = pull.known
    header = [pull.keyspace, pull.request, pull.shards, len(pull.writers), len(pull.nonces), pull.retired_digest]
    later: list[NDArray[Any]] = [pull.nonces, known.stamps, known.shards] if version >= 2 else []
    return [*header, len(known.stamps), pull.backlog], [pull.writers, pull.vector, pull.frontier, *later]


def _unpack_pull(header: Header, columns: Columns) -> m.PullRequest:
    keyspace, request, shards, writers, bound, retired_digest, known, backlog = header
    ids, vector, frontier = take_vector(columns, shards, writers)
    nonces = NO_NONCES if bound is None else columns.take(UINT64, uint(bound, 32))
    if len(nonces) not in (0, len(ids)):
        raise RemoteProtocolError(f"{len(nonces)} nonces of {len(ids)} writers")
    steps = NO_STEPS if known is None else _take_steps(columns, known, shards)
    return m.PullRequest(
        uint(keyspace, 32), uint(request), ids, vector, frontier, shards, nonces, uint(retired_digest), steps, flag(backlog)
    )


PULL_REQUEST: Final = Kind(m.PullRequest, _pack_pull, _unpack_pull, added=((2, None), (2, 0), (2, None), (2, False)))


def _take_steps(columns: Columns, count: int, shards: int) -> KnownSteps:
    row_bytes = (shards + 7) // 8
    if uint(count, 32) * (8 + row_bytes) > KNOWN_BYTES_MAX:
        raise RemoteProtocolError(f"{count} known steps of {shards} shards")
    stamps, bits = columns.take(UINT64, count), columns.take(UINT8, count * row_bytes)
    if np.any(stamps[1:] <= stamps[:-1]):
        raise RemoteProtocolError("known steps are not ascending")
    return KnownSteps(stamps, bits.reshape(count, row_bytes)) if count else NO_STEPS


def _pack_reply(reply: m.PullReply, version: int) -> Packed:
    sections, arrays = pack_sections(reply.columns, version)
    shards = reply.vector.shape[0]
    header: Header = [reply.keyspace, reply.request, reply.chunk, reply.last, shards, len(reply.writers), sections]
    bindings: list[NDArray[Any]] = [reply.bound, reply.nonces] if version >= 2 else []
    sizes, whole = pack_whole(reply)
    columns: list[NDArray[Any]] = [reply.writers, np.ascontiguousarray(reply.vector), reply.frontier, *arrays, *bindings]
    return [*header, len(reply.bound), sizes], columns + (whole if version >= 2 else [])


def _unpack_reply(header: Header, columns: Columns) -> m.PullReply:
    keyspace, request, chunk, last, shards, writers, sections, bound, sizes = header
    ids, vector, frontier = take_vector(columns, shards, writers)
    rows = unpack_sections(sections, columns, with_stamps=True)
    who, nonces = (NO_WRITERS, NO_NONCES) if bound is None else take_bindings(columns, bound)
    reply = uint(keyspace, 32), uint(request), uint(chunk, 32), flag(last)
    return m.PullReply(*reply, rows, ids, vector, frontier, who, nonces, *take_whole(sizes, columns))


PULL_REPLY: Final = Kind(m.PullReply, _pack_reply, _unpack_reply, added=((2, None), (2, [])))


def _pack_incomplete(told: m.Incomplete, _version: int) -> Packed:
    return [told.keyspace, told.request], []


def _unpack_incomplete(header: Header, _columns: Columns) -> m.Incomplete:
    keyspace, request = header
    return m.Incomplete(uint(keyspace, 32), uint(request))


INCOMPLETE: Final = Kind(m.Incomplete, _pack_incomplete, _unpack_incomplete, since=2)


def _pack_keys_wanted(wanted: m.KeysWanted, _version: int) -> Packed:
    floor = wanted.floor
    tables = [[one.table, len(one.keys)] for one in wanted.keys]
    header: Header = [wanted.keyspace, wanted.request, wanted.retired_digest, len(floor.shards), len(floor.writers), tables]
    return header, [floor.shards, floor.writers, np.ascontiguousarray(floor.stamps), *(one.keys for one in wanted.keys)]


def _unpack_keys_wanted(header: Header, columns: Columns) -> m.KeysWanted:
    keyspace, request, retired_digest, shards, writers, tables = header
    told, ids = take_shards(columns, shards), take_writers(columns, writers)
    floor = m.Floor(told, ids, take_stamps(columns, len(told), ids))
    counts = items(tables, SECTIONS_MAX, lambda one: (uint(one[0], 32), uint(one[1], 32)))
    if not len(told) or not 0 < sum(count for _, count in counts) <= WANTED_KEYS_MAX:
        raise RemoteProtocolError(f"no keys are wanted, or more than {WANTED_KEYS_MAX}")
    keys = tuple(TableKeys(table, columns.take(UINT64, count)) for table, count in counts)
    return m.KeysWanted(uint(keyspace, 32), uint(request), floor, keys, uint(retired_digest))


KEYS_WANTED: Final = Kind(m.KeysWanted, _pack_keys_wanted, _unpack_keys_wanted, since=2)


def _pack_keys_found(found: m.KeysFound, version: int) -> Packed:
    sections, arrays = pack_sections(found.columns, version)
    return [found.keyspace, found.request, sections, len(found.bound)], [*arrays, found.bound, found.nonces]


def _unpack_keys_found(header: Header, columns: Columns) -> m.KeysFound:
    keyspace, request, sections, bound = header
    rows = unpack_sections(sections, columns, with_stamps=True)
    return m.KeysFound(uint(keyspace, 32), uint(request), rows, *take_bindings(columns, bound))


KEYS_FOUND: Final = Kind(m.KeysFound, _pack_keys_found, _unpack_keys_found, since=2)
