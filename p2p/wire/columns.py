"""The raw columns of a message, and checked access to those that several kinds of message have."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2p.errors import RemoteProtocolError
from p2p.replica import U64
from p2p.stamps import WRITERS_MAX
from p2p.wire.limits import MEMBERS_MAX, PACK_BYTES_MAX, SHARDS_MAX
from p2p.wire.values import uint

UINT8, UINT16, UINT32, UINT64 = (np.dtype(f"<u{size}") for size in (1, 2, 4, 8))
FLOAT32: Final = np.dtype("<f4")
NO_NONCES: Final = np.empty(0, np.uint64)
NO_WRITERS: Final = np.empty(0, np.uint16)
NO_SHARDS: Final = np.empty(0, np.uint32)
ALIGNMENT: Final = 8


class Columns:
    """The raw columns of a message, taken in order.

    Args:
        head: the frame in which small columns are, or None where each is a frame of its own (version 1).
        end: where they begin in it, at the next multiple of 8.
        frames: the large ones, or all.
    """

    def __init__(self, head: memoryview | None, end: int, frames: Sequence[memoryview]) -> None:
        # ZeroMQ lets small messages point into its receive buffer at any offset; kernels want aligned columns.
        aligned = head is None or head.nbytes == 0 or np.frombuffer(head, np.uint64).flags.aligned
        self._head = head if aligned or head is None else np.frombuffer(head, np.uint64).copy().data.cast("B")
        self._offset = end + -end % ALIGNMENT
        self._frames = frames
        self._next = 0

    def take(self, dtype: "np.dtype[Any]", count: int) -> NDArray[Any]:
        """The next column as `dtype[count]`."""
        size = count * dtype.itemsize
        if self._head is not None and size < PACK_BYTES_MAX:
            begin = self._offset
            self._offset = begin + size + -size % ALIGNMENT
            if self._offset > self._head.nbytes:
                raise RemoteProtocolError("a column is missing")
            return np.frombuffer(self._head, dtype, count, begin) if count else np.empty(0, dtype)
        if self._next >= len(self._frames):
            raise RemoteProtocolError("a column is missing")
        frame = self._frames[self._next]
        self._next += 1
        if frame.nbytes != size:
            raise RemoteProtocolError(f"column of {frame.nbytes} bytes, expected {size}")
        if count == 0:
            return np.empty(0, dtype)
        column = np.frombuffer(frame, dtype)
        return column if column.flags.aligned else column.copy()

    def done(self) -> None:
        if self._next != len(self._frames):
            raise RemoteProtocolError(f"{len(self._frames) - self._next} columns too many")
        if self._head is not None and self._offset != self._head.nbytes:
            raise RemoteProtocolError(f"{self._head.nbytes - self._offset} bytes too many behind the header")


def take_writers(columns: Columns, count: int) -> NDArray[np.uint16]:
    """uint16[count], ascending."""
    if uint(count, 32) > WRITERS_MAX:
        raise RemoteProtocolError(f"{count} writers, limit {WRITERS_MAX}")
    ids = columns.take(UINT16, count)
    if len(ids) and (ids[-1] >= WRITERS_MAX or np.any(ids[1:] <= ids[:-1])):
        raise RemoteProtocolError("writers are not ascending")
    return ids


def take_stamps(columns: Columns, shards: int, writers: NDArray[np.uint16]) -> U64:
    """uint64[shards, w], in each column stamps of its writer, or 0."""
    stamps = columns.take(UINT64, shards * len(writers)).reshape(shards, len(writers))
    if np.any((stamps & np.uint64(WRITERS_MAX - 1) != writers) & (stamps != 0)):
        raise RemoteProtocolError("a vector holds a stamp of another writer")
    return stamps


def take_shards(columns: Columns, count: int) -> NDArray[np.uint32]:
    """uint32[count], ascending."""
    if uint(count, 32) > SHARDS_MAX:
        raise RemoteProtocolError(f"{count} shards, limit {SHARDS_MAX}")
    shards = columns.take(UINT32, count)
    if len(shards) and (shards[-1] >= SHARDS_MAX or np.any(shards[1:] <= shards[:-1])):
        raise RemoteProtocolError("shards are not ascending")
    return shards


def take_vector(columns: Columns, shards: int, writers: int) -> tuple[NDArray[np.uint16], U64, U64]:
    """Writers, uint64[shards, w] and the frontier, uint64[w]."""
    if uint(shards, 32) > SHARDS_MAX or uint(writers, 32) > WRITERS_MAX:
        raise RemoteProtocolError(f"vector of {shards} shards and {writers} writers")
    ids = take_writers(columns, writers)
    return ids, take_stamps(columns, shards, ids), take_stamps(columns, 1, ids)[0]


def take_lives(columns: Columns, count: object) -> tuple[U64, U64]:
    """Lives of members, and a 32-bit number for each."""
    if type(count) is not int or not 0 <= count <= MEMBERS_MAX + 1:
        raise RemoteProtocolError(f"expected at most {MEMBERS_MAX + 1} lives")
    return columns.take(UINT64, count), columns.take(UINT32, count).astype(np.uint64)
