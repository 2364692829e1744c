"""Records of the log: versions of rows of one table as columns, or what is known at that point.

    header    64 bytes: what it is, how many rows, the stamps between which they lie, checksums of the body and of itself
    body      rows: keys uint64[n], stamps uint64[n] unless all are one step's, values uint8[live, row_bytes]; or msgpack
    padding   to 8 bytes

The first `live` keys have values, the others are tombstones (`p2p.replica.RowColumns`). A record that is cut short, or of which
one bit is wrong, is noticed; what follows it cannot be found.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

from ekko.errors import StoreError
from p2p.replica import RowColumns

U64 = NDArray[np.uint64]

MAGIC: Final = 0x4B4C4F47
# magic, kind, flags, model, table, rows, live, row_bytes, -, stamp_min, stamp_max, body_bytes, body checksum, header checksum
_HEADER: Final = struct.Struct("<IHHIIIIIIQQQII")
HEADER_BYTES: Final = _HEADER.size
_SUMMED: Final = HEADER_BYTES - 4
ROWS: Final = 1  # kinds
STATE: Final = 2
OWN_STAMPS: Final = 1  # flags: each row has a stamp of its own
_ALIGN: Final = 8
_ZEROS: Final = bytes(_ALIGN)
# A message is cut long before; what claims more is damaged.
BODY_BYTES_MAX: Final = 1 << 32


class DamagedError(StoreError):
    """A record is not as it was written."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a record says of itself."""

    kind: int
    flags: int
    model: int
    table: int
    rows: int
    live: int
    row_bytes: int
    stamp_min: int
    stamp_max: int
    body_bytes: int
    body_sum: int

    @property
    def bytes(self) -> int:
        """Of the whole record."""
        return HEADER_BYTES + self.body_bytes + -self.body_bytes % _ALIGN


Part = bytes | memoryview


def encode_rows(model: int, column: RowColumns, stamp: int) -> tuple[Header, list[Part]]:
    """A record of rows as the buffers to be written, of which none is a copy where the columns are contiguous.

    Args:
        model: its id.
        column: at least one row.
        stamp: of all of them, where they have none of their own.
    """
    keys = np.ascontiguousarray(column.keys)
    body: list[Part] = [keys.view(np.uint8).data]
    flags, lowest, highest = 0, stamp, stamp
    if column.stamps is not None:
        stamps = np.ascontiguousarray(column.stamps)
        flags |= OWN_STAMPS
        lowest, highest = int(stamps.min()), int(stamps.max())
        body.append(stamps.view(np.uint8).data)
    live, row_bytes = column.rows.shape
    if live:
        body.append(np.ascontiguousarray(column.rows).reshape(-1).data)
    return _sealed(ROWS, flags, (model, column.table, keys.size, live, row_bytes), (lowest, highest), body)


def encode_state(state: object) -> tuple[Header, list[Part]]:
    """A record of what is known where it stands."""
    return _sealed(STATE, 0, (0, 0, 0, 0, 0), (0, 0), [msgpack.packb(state)])


def _sealed(
    kind: int, flags: int, what: tuple[int, int, int, int, int], stamps: tuple[int, int], body: Sequence[Part]
) -> tuple[Header, list[Part]]:
    digest = xxhash.xxh3_64()
    size = 0
    for part in body:
        digest.update(part)
        size += len(part)
    header = Header(kind, flags, *what, *stamps, size, digest.intdigest() & 0xFFFFFFFF)
    fields = (MAGIC, kind, flags, *what, 0, *stamps, size, header.body_sum)
    head = bytearray(_HEADER.pack(*fields, 0))
    head[_SUMMED:] = xxhash.xxh32_intdigest(memoryview(head)[:_SUMMED]).to_bytes(4, "little")
    return header, [bytes(head), *body, _ZEROS[: -size % _ALIGN]]


def decode_header(data: bytes) -> Header:
    """Understand the first `HEADER_BYTES` of a record.

    Raises:
        DamagedError: they are none.
    """
    if len(data) < HEADER_BYTES:
        raise DamagedError("a record of the log is cut short")
    fields: tuple[int, ...] = _HEADER.unpack_from(data)
    magic, kind, flags, model, table, count, live, row_bytes, _, lowest, highest, size, body_sum, own_sum = fields
    header = Header(kind, flags, model, table, count, live, row_bytes, lowest, highest, size, body_sum)
    if magic != MAGIC or own_sum != xxhash.xxh32_intdigest(data[:_SUMMED]) or size > BODY_BYTES_MAX:
        raise DamagedError("a record of the log is damaged")
    if kind == ROWS:
        stamps = 8 * header.rows if flags & OWN_STAMPS else 0
        if size != 8 * header.rows + stamps + header.live * header.row_bytes or header.live > header.rows:
            raise DamagedError("a record of the log contradicts itself")
    return header


def check_body(header: Header, body: bytes) -> None:
    """Refuse a body that is not as it was written.

    Raises:
        DamagedError: it is not.
    """
    if len(body) != header.body_bytes or xxhash.xxh3_64_intdigest(body) & 0xFFFFFFFF != header.body_sum:
        raise DamagedError("a record of the log is damaged: its checksum is wrong")


def decode_rows(header: Header, body: bytes) -> RowColumns:
    """The rows of a checked record, with stamps; views of `body`."""
    count = header.rows
    keys = np.frombuffer(body, np.uint64, count)
    begin = 8 * count
    if header.flags & OWN_STAMPS:
        stamps = np.frombuffer(body, np.uint64, count, begin)
        begin += 8 * count
    else:
        stamps = np.full(count, header.stamp_max, np.uint64)
    rows = np.frombuffer(body, np.uint8, header.live * header.row_bytes, begin).reshape(header.live, header.row_bytes)
    return RowColumns(header.table, keys, rows, stamps)


def decode_state(body: bytes) -> object:
    """What `encode_state` was given.

    Raises:
        DamagedError: it cannot be understood.
    """
    try:
        return msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise DamagedError(f"a record of the log cannot be understood: {error}") from None
