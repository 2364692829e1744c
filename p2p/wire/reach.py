"""Waits on the wire (`p2p.reach`)."""

from typing import Final

from p2p import messages as m
from p2p.wire.columns import Columns
from p2p.wire.kind import Header, Kind, Packed
from p2p.wire.values import uint


def _pack_query(query: m.ReachQuery, _version: int) -> Packed:
    return [query.keyspace, query.query, query.stamp], []


def _unpack_query(header: Header, _columns: Columns) -> m.ReachQuery:
    keyspace, query, stamp = header
    return m.ReachQuery(uint(keyspace, 32), uint(query), uint(stamp))


REACH_QUERY: Final = Kind(m.ReachQuery, _pack_query, _unpack_query)


def _pack_reached(reached: m.Reached, _version: int) -> Packed:
    return [reached.query], []


def _unpack_reached(header: Header, _columns: Columns) -> m.Reached:
    (query,) = header
    return m.Reached(uint(query))


REACHED: Final = Kind(m.Reached, _pack_reached, _unpack_reached)
