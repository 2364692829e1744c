"""A message inside a zstd frame: on links between regions, where `p2p.link.compression` says that it pays; since protocol
version 2.

`[envelope, sizes, payload]`. The envelope is the message's own with `WRAPPED` set in its type, the sizes are those of the
frames after it, uint32 each, and the payload is one zstd frame of them all. So the message inside is unchanged, and its
checksum is over the bytes inside: whoever unwraps it checks and forwards it as if it had come plain.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import zstandard

from p2p.errors import RemoteProtocolError
from p2p.transport import FRAMES_MAX, Buffer
from p2p.versions import PROTOCOL_VERSION
from p2p.wire import BATCH_BYTES_MAX, ENVELOPE

WRAPPED_SINCE: Final = 2
WRAPPED: Final = 0x80
_VERSION_AT, _TYPE_AT = 2, 3  # in the envelope
# On trained rows level 3 saves 2 % more and takes twice the time; the levels below 1 save half.
LEVEL: Final = 1
# Larger messages travel as they are. Who receives one expands it on its event loop, at 1.1 ns a byte: 5 ms at most. Whole
# batches and chunks have room in it, with their claims.
WRAPPED_BYTES_MAX: Final = 5 << 20
assert WRAPPED_BYTES_MAX >= BATCH_BYTES_MAX + (1 << 20)
assert PROTOCOL_VERSION >= WRAPPED_SINCE

Wrapped = tuple[bytes, bytes]  # sizes and payload


def wrap(body: Sequence[Buffer]) -> Wrapped:
    """Compress the frames that follow an envelope. Safe in any thread."""
    sizes = np.array([memoryview(frame).nbytes for frame in body], "<u4").tobytes()
    return sizes, zstandard.ZstdCompressor(level=LEVEL).compress(b"".join(body))


def wrapped_frames(envelope: Buffer, wrapped: Wrapped) -> list[Buffer]:
    """The message to send; `envelope` is that of the message inside."""
    head = bytearray(envelope)
    head[_TYPE_AT] |= WRAPPED
    return [bytes(head), *wrapped]


def unwrap(frames: list[memoryview]) -> list[memoryview]:
    """The message inside, or the frames themselves where nothing is wrapped.

    Raises:
        RemoteProtocolError: it is not what `wrapped_frames` makes. Memory is spent on at most `WRAPPED_BYTES_MAX`, and only
            when everything that the frames say of themselves agrees.
    """
    if not frames or frames[0].nbytes != ENVELOPE.size or not frames[0][_TYPE_AT] & WRAPPED:
        return frames
    if frames[0][_VERSION_AT] < WRAPPED_SINCE:
        raise RemoteProtocolError(f"a wrapped message in protocol version {frames[0][_VERSION_AT]}")
    if len(frames) != 3 or frames[1].nbytes % 4 or not 4 <= frames[1].nbytes <= 4 * (FRAMES_MAX - 1):
        raise RemoteProtocolError("a wrapped message without sizes and payload")
    sizes = np.frombuffer(frames[1], "<u4").tolist()
    total = sum(sizes)
    if total > WRAPPED_BYTES_MAX - ENVELOPE.size:
        raise RemoteProtocolError(f"a wrapped message of {total} bytes, limit {WRAPPED_BYTES_MAX}")
    payload = memoryview(_expand(frames[2], total))
    head = bytearray(frames[0])
    head[_TYPE_AT] ^= WRAPPED
    inside = [memoryview(bytes(head))]
    begin = 0
    for size in sizes:
        inside.append(payload[begin : begin + size])
        begin += size
    return inside


def _expand(payload: memoryview, total: int) -> bytes:
    try:
        parameters = zstandard.get_frame_parameters(payload)
        # The size that the zstd frame announces is what the library will allocate, and a window beyond it would cost more.
        if parameters.content_size != total or parameters.dict_id or parameters.window_size > WRAPPED_BYTES_MAX:
            raise RemoteProtocolError(f"a payload of {parameters.content_size} bytes where {total} were announced"[:200])
        if not total:
            return b""
        return zstandard.ZstdDecompressor().decompress(payload, max_output_size=total, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RemoteProtocolError(f"a payload that is not zstd: {error}"[:200]) from error
