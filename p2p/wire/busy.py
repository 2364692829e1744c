"""Links in state mode on the wire (`p2p.busy`)."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.members.trees import TREES_MAX
from p2p.wire.columns import UINT8, Columns, take_shards, take_stamps, take_writers
from p2p.wire.kind import Header, Kind, Packed
from p2p.wire.rows import pack_sections, take_bindings, unpack_sections
from p2p.wire.values import flag, uint


def _pack_backlogged(told: m.Backlogged, _version: int) -> Packed:
    header: Header = [told.keyspace, told.number, told.on, told.trees, len(told.writers), told.retired_digest]
    return header, [told.writers, told.served]


def _unpack_backlogged(header: Header, columns: Columns) -> m.Backlogged:
    keyspace, number, on, trees, count, retired_digest = header
    ids = take_writers(columns, count)
    if not 1 <= uint(trees, 8) <= TREES_MAX:
        raise RemoteProtocolError(f"{trees} trees, limit {TREES_MAX}")
    served = columns.take(UINT8, len(ids))
    return m.Backlogged(uint(keyspace, 32), uint(number), flag(on), trees, ids, served, uint(retired_digest))


BACKLOGGED: Final = Kind(m.Backlogged, _pack_backlogged, _unpack_backlogged, since=2)


def _pack_state_chunk(chunk: m.StateChunk, version: int) -> Packed:
    sections, arrays = pack_sections(chunk.columns, version)
    sizes = [len(chunk.shards), len(chunk.writers), len(chunk.rest_shards), len(chunk.bound)]
    claims: list[NDArray[Any]] = [chunk.shards, chunk.writers, np.ascontiguousarray(chunk.until), chunk.frontier]
    claims += [chunk.rest_shards, np.ascontiguousarray(chunk.rest)]
    return [chunk.keyspace, chunk.request, chunk.ends, *sizes, sections], [*claims, *arrays, chunk.bound, chunk.nonces]


def _unpack_state_chunk(header: Header, columns: Columns) -> m.StateChunk:
    keyspace, request, ends, count, writers, rest, bound, sections = header
    shards, ids = take_shards(columns, count), take_writers(columns, writers)
    until, frontier = take_stamps(columns, len(shards), ids), take_stamps(columns, 1, ids)[0]
    rest_shards = take_shards(columns, rest)
    claims = shards, ids, until, frontier, rest_shards, take_stamps(columns, len(rest_shards), ids)
    rows = unpack_sections(sections, columns, with_stamps=True)
    return m.StateChunk(uint(keyspace, 32), uint(request), flag(ends), rows, *claims, *take_bindings(columns, bound))


STATE_CHUNK: Final = Kind(m.StateChunk, _pack_state_chunk, _unpack_state_chunk, since=2)
