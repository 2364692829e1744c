"""Writer ids and retirements on the wire (`p2p.identity`)."""

from typing import Final

import numpy as np

from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.identity.writers import BLOCKS
from p2p.replica import U64
from p2p.stamps import WRITERS_MAX
from p2p.wire.columns import NO_NONCES, UINT64, Columns
from p2p.wire.fences import FENCES_TOLD_MAX, pack_fence, unpack_fence
from p2p.wire.kind import Header, Kind, Packed
from p2p.wire.limits import MEMBERS_MAX, SHARDS_MAX, TIME_BITS
from p2p.wire.values import flag, items, text, uint


def _pack_block_request(request: m.BlockRequest, _version: int) -> Packed:
    return [request.cluster, request.holder, list(request.held)], []


def _unpack_block_request(header: Header, _columns: Columns) -> m.BlockRequest:
    cluster, holder, held = header
    return m.BlockRequest(uint(cluster), uint(holder), items(held, BLOCKS, _unpack_block))


BLOCK_REQUEST: Final = Kind(m.BlockRequest, _pack_block_request, _unpack_block_request, since=2)


def _unpack_block(value: object) -> int:
    if uint(value, 16) >= BLOCKS:
        raise RemoteProtocolError(f"block {value} of writer ids, there are {BLOCKS}")
    return value  # type: ignore[return-value]


def _pack_block_grant(grant: m.BlockGrant, _version: int) -> Packed:
    return [grant.cluster, grant.holder, list(grant.blocks), grant.clock_floor, grant.founded], []


def _unpack_block_grant(header: Header, _columns: Columns) -> m.BlockGrant:
    cluster, holder, blocks, clock_floor, founded = header
    return m.BlockGrant(uint(cluster), uint(holder), items(blocks, BLOCKS, _unpack_block), uint(clock_floor), flag(founded))


BLOCK_GRANT: Final = Kind(m.BlockGrant, _pack_block_grant, _unpack_block_grant, since=2)


def _pack_retirements(told: m.Retirements, _version: int) -> Packed:
    floors = [one.floor for one in told.retired]
    expulsions = [[one.node, one.boot, one.boot_ms] for one in told.expulsions]
    retired = [[one.keyspace, one.family, one.writer, one.nonce, one.stage, len(one.floor)] for one in told.retired]
    fences = [pack_fence(one) for one in told.fences]
    return [expulsions, retired, fences], [np.concatenate(floors) if floors else NO_NONCES]


def _unpack_retirements(header: Header, columns: Columns) -> m.Retirements:
    expulsions, retired, fences = header
    lives = items(expulsions, MEMBERS_MAX, lambda one: m.Expulsion(text(one[0]), uint(one[1]), uint(one[2], TIME_BITS)))
    counts = items(retired, WRITERS_MAX, lambda one: uint(one[5], 32))
    if max(counts, default=0) > SHARDS_MAX:
        raise RemoteProtocolError(f"a floor of {max(counts)} shards, limit {SHARDS_MAX}")
    floors = np.split(columns.take(UINT64, sum(counts)), np.cumsum(counts)[:-1].astype(np.int64))
    entries = tuple(_unpack_retired(one, floor) for one, floor in zip(retired, floors, strict=False))
    return m.Retirements(lives, entries, items(fences, FENCES_TOLD_MAX, unpack_fence))


RETIREMENTS: Final = Kind(m.Retirements, _pack_retirements, _unpack_retirements, since=2)


def _unpack_retired(value: Header, floor: U64) -> m.Retired:
    keyspace, family, writer, nonce, stage, _ = value
    if uint(stage, 8) > m.DONE or (stage == m.FROZEN) != (len(floor) == 0):
        raise RemoteProtocolError(f"stage {stage} of a retirement, with a floor of {len(floor)} shards")
    _check_column(uint(writer, 12), floor)
    return m.Retired(uint(keyspace, 32), uint(family, 32), writer, uint(nonce), stage, floor)


def _check_column(writer: int, column: U64) -> None:
    if np.any((column & np.uint64(WRITERS_MAX - 1) != writer) & (column != 0)):
        raise RemoteProtocolError(f"a column of writer {writer} holds a stamp of another")


def _pack_retire_report(report: m.RetireReport, _version: int) -> Packed:
    return [report.keyspace, report.writer, report.nonce, report.stage, len(report.column)], [report.column]


def _unpack_retire_report(header: Header, columns: Columns) -> m.RetireReport:
    keyspace, writer, nonce, stage, shards = header
    if uint(shards, 32) > SHARDS_MAX:
        raise RemoteProtocolError(f"a report of {shards} shards, limit {SHARDS_MAX}")
    column = columns.take(UINT64, shards)
    _check_column(uint(writer, 12), column)
    return m.RetireReport(uint(keyspace, 32), writer, uint(nonce), uint(stage, 8), column)


RETIRE_REPORT: Final = Kind(m.RetireReport, _pack_retire_report, _unpack_retire_report, since=2)
