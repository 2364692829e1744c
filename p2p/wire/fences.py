"""Fences on the wire (`p2p.identity.fence`): records inside `Retirements`, and reports."""

from typing import Final

from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.messages.fences import EPOCH_BITS, LIFTED, NOTE_CHARS_MAX, RESTORERS_MAX, Fence, Restorer
from p2p.wire.columns import Columns
from p2p.wire.kind import Header, Kind, Packed
from p2p.wire.values import flag, items, text, uint

# As many members as a register has.
BOOTS_MAX: Final = 4_096
FENCES_TOLD_MAX: Final = 4_096


def pack_fence(fence: Fence) -> Header:
    """One fence."""
    restorers = [[one.writer, one.nonce, one.since] for one in fence.restorers]
    return [fence.family, fence.epoch, fence.stage, fence.stamp, fence.until, restorers, fence.note]


def unpack_fence(value: Header) -> Fence:
    """One fence; of a stage and its stamps that fit together."""
    family, epoch, stage, stamp, until, restorers, note = value
    if uint(stage, 8) > LIFTED or (uint(until) > 0) != (stage == LIFTED):
        raise RemoteProtocolError(f"stage {stage} of a fence that was lifted at {until}"[:200])
    if len(text(note)) > NOTE_CHARS_MAX:
        raise RemoteProtocolError(f"a note of {len(note)} characters, limit {NOTE_CHARS_MAX}")
    if not uint(epoch, EPOCH_BITS):
        raise RemoteProtocolError("a fence of epoch 0")
    who = items(restorers, RESTORERS_MAX, _restorer)
    return Fence(uint(family, 32), epoch, stage, uint(stamp), until, who, note)


def _restorer(value: Header) -> Restorer:
    writer, nonce, since = value
    return Restorer(uint(writer, 12), uint(nonce), uint(since))


def _pack_report(report: m.FenceReport, _version: int) -> Packed:
    return [report.family, report.epoch, report.retired_digest, report.reached, list(report.boots)], []


def _unpack_report(header: Header, _columns: Columns) -> m.FenceReport:
    family, epoch, digest, reached, boots = header
    return m.FenceReport(uint(family, 32), uint(epoch, EPOCH_BITS), uint(digest), flag(reached), items(boots, BOOTS_MAX, uint))


FENCE_REPORT: Final = Kind(m.FenceReport, _pack_report, _unpack_report, since=2)
