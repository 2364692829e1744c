"""Ceilings on the wire (`p2p.ceilings`)."""

from typing import Final

from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.stamps import WRITERS_MAX, writer_of
from p2p.wire.columns import Columns
from p2p.wire.kind import Header, Kind, Packed
from p2p.wire.values import items, uint, wide


def _pack_ask(ask: m.CeilingAsk, _version: int) -> Packed:
    return [ask.keyspace, ask.query], []


def _unpack_ask(header: Header, _columns: Columns) -> m.CeilingAsk:
    keyspace, query = header
    return m.CeilingAsk(uint(keyspace, 32), uint(query))


CEILING_ASK: Final = Kind(m.CeilingAsk, _pack_ask, _unpack_ask, since=2)


def _pack_told(told: m.CeilingTold, _version: int) -> Packed:
    return [
        told.query,
        told.stamp,
        told.vector_digest.to_bytes(16, "little"),
        told.stray_digest.to_bytes(16, "little"),
        [list(pair) for pair in told.writers],
    ], []


def _unpack_told(header: Header, _columns: Columns) -> m.CeilingTold:
    query, stamp, vector_digest, stray_digest, writers = header
    told = items(writers, WRITERS_MAX, _writer)
    return m.CeilingTold(uint(query), uint(stamp), wide(vector_digest), wide(stray_digest), told)


def _writer(value: Header) -> tuple[int, int]:
    writer, stamp = value
    if writer_of(uint(stamp)) != uint(writer, 12):
        raise RemoteProtocolError(f"stamp {stamp} is not of writer {writer}")
    return writer, stamp


CEILING_TOLD: Final = Kind(m.CeilingTold, _pack_told, _unpack_told, since=2)
