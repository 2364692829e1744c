"""What may be forgotten for good, on the wire (`p2p.collection`)."""

from typing import Final

from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.wire.columns import UINT64, Columns, take_stamps, take_writers
from p2p.wire.kind import Header, Kind, Packed
from p2p.wire.limits import HELD_UP_MAX, MEMBERS_MAX
from p2p.wire.values import flag, items, text, uint


def _pack_stable_ask(ask: m.StableAsk, _version: int) -> Packed:
    return [ask.keyspace], []


def _unpack_stable_ask(header: Header, _columns: Columns) -> m.StableAsk:
    (keyspace,) = header
    return m.StableAsk(uint(keyspace, 32))


STABLE_ASK: Final = Kind(m.StableAsk, _pack_stable_ask, _unpack_stable_ask, since=2)


def _pack_stable_report(report: m.StableReport, _version: int) -> Packed:
    header: Header = [report.keyspace, report.waiting, len(report.writers), len(report.boots)]
    return header, [report.writers, report.reached, report.boots]


def _unpack_stable_report(header: Header, columns: Columns) -> m.StableReport:
    keyspace, waiting, writers, boots = header
    ids = take_writers(columns, writers)
    reached = take_stamps(columns, 1, ids)[0]
    if uint(boots, 32) > MEMBERS_MAX:
        raise RemoteProtocolError(f"{boots} lives, limit {MEMBERS_MAX}")
    return m.StableReport(uint(keyspace, 32), flag(waiting), ids, reached, columns.take(UINT64, boots))


STABLE_REPORT: Final = Kind(m.StableReport, _pack_stable_report, _unpack_stable_report, since=2)


def _pack_stable(told: m.Stable, _version: int) -> Packed:
    return [told.keyspace, len(told.writers), list(told.held_up_by)], [told.writers, told.reached]


def _unpack_stable(header: Header, columns: Columns) -> m.Stable:
    keyspace, writers, held_up_by = header
    ids = take_writers(columns, writers)
    reached = take_stamps(columns, 1, ids)[0]
    return m.Stable(uint(keyspace, 32), ids, reached, items(held_up_by, HELD_UP_MAX, text))


STABLE: Final = Kind(m.Stable, _pack_stable, _unpack_stable, since=2)
