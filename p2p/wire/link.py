"""What two ends of a link say of it, on the wire (`p2p.link`)."""

from typing import Final

from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.link.budget import REGIONS_MAX
from p2p.wire.columns import Columns
from p2p.wire.kind import Header, Kind, Packed
from p2p.wire.values import items, text, uint


def _pack_ack(ack: m.Ack, _version: int) -> Packed:
    return [ack.session, ack.sequence], []


def _unpack_ack(header: Header, _columns: Columns) -> m.Ack:
    session, sequence = header
    return m.Ack(uint(session, 32), uint(sequence))


ACK: Final = Kind(m.Ack, _pack_ack, _unpack_ack)


def _pack_broken(broken: m.SessionBroken, _version: int) -> Packed:
    return [broken.session], []


def _unpack_broken(header: Header, _columns: Columns) -> m.SessionBroken:
    (session,) = header
    return m.SessionBroken(uint(session, 32))


SESSION_BROKEN: Final = Kind(m.SessionBroken, _pack_broken, _unpack_broken)


def _pack_wants(wants: m.Wants, _version: int) -> Packed:
    return [[[region, bytes_per_s] for region, bytes_per_s in wants.regions]], []


def _unpack_wants(header: Header, _columns: Columns) -> m.Wants:
    (regions,) = header

    def one(item: Header) -> tuple[str, int]:
        region, bytes_per_s = item
        return text(region), uint(bytes_per_s)

    wants = m.Wants(items(regions, REGIONS_MAX, one))
    if len(dict(wants.regions)) < len(wants.regions):
        raise RemoteProtocolError("two wishes for one region")  # each costs the receiver a look at what all others want
    return wants


WANTS: Final = Kind(m.Wants, _pack_wants, _unpack_wants, since=2)
