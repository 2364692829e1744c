"""What a message looks like: envelope, head, columns, checksum. `p2p.wire` describes it."""

import struct
from collections.abc import Sequence
from typing import Any, Final

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.transport import Buffer
from p2p.versions import FIRST_VERSION, PROTOCOL_VERSION, describe
from p2p.wire.columns import ALIGNMENT, Columns
from p2p.wire.kind import Header
from p2p.wire.limits import HEADER_BYTES_MAX, PACK_BYTES_MAX, PLAIN_HEADER_BYTES_MAX, SCHEMA_ENTRIES_MAX
from p2p.wire.values import STRING_BYTES_MAX

ENVELOPE: Final = struct.Struct("<2sBBQQIBB2xQQ4x")  # magic, version, type, boots, session, hops, flags, sequence, checksum
# The flags of an envelope. Version 1 has none: it writes zero there, and does not look. What is not known is not looked at.
_ASKS: Final = 1
MAGIC: Final = b"EK"
PACKED_SINCE: Final = 2
VERSIONS: Final = range(FIRST_VERSION, PROTOCOL_VERSION + 1)
_HEADER_BYTES: Final = struct.Struct("<I")


def body_of(header: Header, columns: Sequence[NDArray[Any]], version: int) -> list[Buffer]:
    """Head and large columns."""
    packed = msgpack.packb(header)
    if version < PACKED_SINCE:
        return [packed, *(column.reshape(-1).view(np.uint8).data for column in columns)]
    head = [_HEADER_BYTES.pack(len(packed)), packed, _padding(_HEADER_BYTES.size + len(packed))]
    large: list[Buffer] = []
    for column in columns:
        if column.nbytes < PACK_BYTES_MAX:
            head += [column.tobytes(), _padding(column.nbytes)]
        else:
            large.append(column.reshape(-1).view(np.uint8).data)
    return [b"".join(head), *large]


def _padding(size: int) -> bytes:
    return bytes(-size % ALIGNMENT)


def read_header(packed: memoryview, items_max: int) -> Header:
    """What msgpack makes of it, without any maps, and of a large one at most `items_max` items and lists."""
    if packed.nbytes <= PLAIN_HEADER_BYTES_MAX:
        return msgpack.unpackb(packed, max_str_len=STRING_BYTES_MAX, object_pairs_hook=_refuse_map)  # type: ignore[no-any-return]
    left = items_max

    def count(items: list[Any]) -> list[Any]:
        nonlocal left
        left -= 1 + len(items)
        if left < 0:
            raise RemoteProtocolError(f"header of more than {items_max} items")
        return items

    return msgpack.unpackb(  # type: ignore[no-any-return]
        packed,
        max_str_len=STRING_BYTES_MAX,
        max_array_len=SCHEMA_ENTRIES_MAX,
        object_pairs_hook=_refuse_map,
        list_hook=count,
    )


def _refuse_map(_pairs: object) -> None:
    raise RemoteProtocolError("a map in a header")


def open_body(head: memoryview, large: Sequence[memoryview], version: int) -> tuple[memoryview, Columns]:
    """The packed header, and the columns behind it."""
    if version < PACKED_SINCE:
        header, columns = head, Columns(None, 0, large)
    else:
        if head.nbytes < _HEADER_BYTES.size or head.nbytes % ALIGNMENT:
            raise RemoteProtocolError(f"head of {head.nbytes} bytes")
        end = _HEADER_BYTES.size + _HEADER_BYTES.unpack_from(head)[0]
        if end > head.nbytes:
            raise RemoteProtocolError(f"header ends at byte {end} of {head.nbytes}")
        header, columns = head[_HEADER_BYTES.size : end], Columns(head, end, large)
    if header.nbytes > HEADER_BYTES_MAX:
        raise RemoteProtocolError(f"header of {header.nbytes} bytes, limit {HEADER_BYTES_MAX}")
    return header, columns


def checksum(body: Sequence[Buffer]) -> int:
    """xxh3-64 over head and columns."""
    digest = xxhash.xxh3_64()
    for frame in body:
        digest.update(frame)
    return digest.intdigest()


def pack_envelope(envelope: m.Envelope, kind: int, check: int) -> bytes:
    """The first frame."""
    return ENVELOPE.pack(
        MAGIC,
        envelope.version,
        kind,
        envelope.sender_boot,
        envelope.receiver_boot,
        envelope.session,
        envelope.hops,
        _ASKS if envelope.asks else 0,
        envelope.sequence,
        check,
    )


def unpack_envelope(frame: memoryview) -> tuple[m.Envelope, int, int]:
    """Envelope, number of the kind of message, checksum."""
    if frame.nbytes != ENVELOPE.size:
        raise RemoteProtocolError(f"envelope of {frame.nbytes} bytes, expected {ENVELOPE.size}")
    magic, version, kind, sender, receiver, session, hops, flags, sequence, check = ENVELOPE.unpack(frame)
    if magic != MAGIC:
        raise RemoteProtocolError("not an ekko message")
    if not FIRST_VERSION <= version <= PROTOCOL_VERSION:
        raise RemoteProtocolError(
            f"a message in protocol version {version}, this node speaks {describe(PROTOCOL_VERSION)}: upgrade the older node"
        )
    return m.Envelope(sender, receiver, session, sequence, hops, version, bool(flags & _ASKS)), kind, check
