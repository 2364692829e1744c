"""Messages to frames and back."""

from collections.abc import Sequence

from p2p import messages as m
from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.transport import FRAMES_MAX, Buffer
from p2p.versions import PROTOCOL_VERSION
from p2p.wire import table
from p2p.wire.frames import body_of, checksum, open_body, pack_envelope, read_header, unpack_envelope
from p2p.wire.kind import extend
from p2p.wire.limits import MESSAGE_BYTES_MAX


def encode(envelope: m.Envelope, message: m.Message) -> list[Buffer]:
    """Frames of one message; arrays are not copied and must not change until they are sent.

    A forwarded batch keeps the frames and the checksum it came with, where the receiver's version has the same shape.

    Raises:
        LocalProtocolError: the version of the envelope does not have this kind of message.
    """
    number = table.NUMBER_OF[type(message)]
    kind = table.KINDS[number - 1]
    if kind.since > envelope.version:
        raise LocalProtocolError(f"{kind.name} exists since protocol version {kind.since}, the link speaks {envelope.version}")
    if isinstance(message, m.Batch) and message.body and kind.same_shape(message.body_version, envelope.version):
        return [pack_envelope(envelope, number, message.checksum), *message.body]
    body = body_of(*kind.encode(message, envelope.version), envelope.version)
    return [pack_envelope(envelope, number, checksum(body)), *body]


def seal(batch: m.Batch) -> m.Batch:
    """The batch itself, with its frames made, so that it is encoded once for all of its receivers."""
    body = body_of(*table.KINDS[table.NUMBER_OF[m.Batch] - 1].encode(batch, PROTOCOL_VERSION), PROTOCOL_VERSION)
    _keep_frames(batch, body, checksum(body), PROTOCOL_VERSION)
    return batch


def _keep_frames(batch: m.Batch, body: Sequence[Buffer], check: int, version: int) -> None:
    """The frames belong to the batch from when it is made; a copy of all of its fields for their sake costs 10 us."""
    object.__setattr__(batch, "body", tuple(body))
    object.__setattr__(batch, "checksum", check)
    object.__setattr__(batch, "body_version", version)


def decode(frames: Sequence[memoryview]) -> tuple[m.Envelope, m.Message]:
    """The message in these frames; its arrays look into them without copying.

    Raises:
        RemoteProtocolError: anything at all is wrong with them.
    """
    if not 2 <= len(frames) <= FRAMES_MAX:
        raise RemoteProtocolError(f"message of {len(frames)} frames, expected 2 to {FRAMES_MAX}")
    bytes_total = sum([frame.nbytes for frame in frames])
    if bytes_total > MESSAGE_BYTES_MAX:
        raise RemoteProtocolError(f"message of {bytes_total} bytes, limit {MESSAGE_BYTES_MAX}")
    envelope, number, expected = unpack_envelope(frames[0])
    if not 1 <= number <= len(table.KINDS) or table.KINDS[number - 1].since > envelope.version:
        raise RemoteProtocolError(f"unknown message type {number} in protocol version {envelope.version}")
    kind = table.KINDS[number - 1]
    if checksum(frames[1:]) != expected:
        raise RemoteProtocolError("checksum mismatch")
    packed, columns = open_body(frames[1], frames[2:], envelope.version)
    try:
        header = read_header(packed, kind.header_items_max)
        message = kind.unpack(extend(header, kind.added, envelope.version), columns)
        columns.done()
    except RemoteProtocolError:
        raise
    except Exception as error:
        raise RemoteProtocolError(f"malformed {kind.name}: {error!r}"[:200]) from error
    if isinstance(message, m.Batch):
        _keep_frames(message, frames[1:], expected, envelope.version)
    return envelope, message
