"""Fences on the wire (`p2p.identity.fence`): records inside `Retirements`, and reports. For `p2p.wire`."""

from typing import Any, Final

from p2p.errors import RemoteProtocolError
from p2p.identity.fence_messages import EPOCH_BITS, LIFTED, NOTE_CHARS_MAX, RESTORERS_MAX, Fence, FenceReport, Restorer
from p2p.wire_values import flag, items, text, uint

# As many members as a register has.
BOOTS_MAX: Final = 4_096
FENCES_TOLD_MAX: Final = 4_096

Header = list[Any]


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


def pack_report(report: FenceReport, _version: int) -> tuple[Header, list[Any]]:
    """A report."""
    return [report.family, report.epoch, report.retired_digest, report.reached, list(report.boots)], []


def unpack_report(header: Header, _columns: object) -> FenceReport:
    """A report."""
    family, epoch, digest, reached, boots = header
    return FenceReport(uint(family, 32), uint(epoch, EPOCH_BITS), uint(digest), flag(reached), items(boots, BOOTS_MAX, uint))
