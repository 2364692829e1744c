"""What still has to go to one peer: answers to its pulls, streamed as credit allows.

A stream keeps which rows are due (slots), not their bytes: values are read when they are sent, so memory is bounded by rows
and the newest version travels. The vector was read before the rows were selected, so rows written since may ride along,
which is harmless, and none that the vector covers can be missing (theorem T5 has the same order).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from p2p import messages as m
from p2p.core import Core, Keyspace
from p2p.link.links import Link
from p2p.replica import U64, RowColumns, Selection

# Payload of one chunk: large enough that a chunk's cost is its rows, small enough that batches slip in between.
CHUNK_BYTES_MAX = 1 << 20
# Batches go first, but of so many chunks' worth of them one is a repair's: a fifth, as of a backlog (R16). Else a link that is
# full of batches would bring none of those that are missing before them.
CHUNK_EVERY = 4
# Chunks built per event, so that a joining node does not stall the stream of everyone else.
CHUNKS_PER_EVENT = 2
# Streams towards one peer, one a keyspace; a new request for a keyspace replaces the stream it makes pointless.
STREAMS_MAX = 64


class Completion(Enum):
    """Whether a stream whose last row was read may claim."""

    CLAIM = 0
    GO_ON = 1  # some shards began anew
    GIVE_UP = 2  # it cannot be completed here; the asker asks somebody else


def _no_shards() -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.empty(0, np.uint32)


@dataclass(slots=True, eq=False)
class PullStream:
    """The answer to one pull, as far as it was sent."""

    keyspace: int
    request: int
    writers: np.ndarray[tuple[int], np.dtype[np.uint16]]
    vector: U64  # [shards, w]
    frontier: U64  # [w]; of a round nothing
    selections: deque[Selection]
    bound: np.ndarray[tuple[int], np.dtype[np.uint16]]  # writers whose nonces we know
    nonces: U64
    shards: np.ndarray[tuple[int], np.dtype[np.uint32]] | None = None  # the only ones, in a round by shard versions
    versions: U64 | None = None  # and theirs
    next_chunk: int = 0
    chunk_bytes: int = 0  # of the next one, which its last row may overshoot; 0: the largest that there is
    row_offset: int = 0  # into the first selection
    whole: np.ndarray[tuple[int], np.dtype[np.uint32]] = field(default_factory=_no_shards)  # of which all rows are sent (R5)
    whole_next: np.ndarray[tuple[int], np.dtype[np.uint32]] = field(default_factory=_no_shards)  # of these, not announced yet
    # Called when the last row is read: may add to all this where the asker fell below the loss floor meanwhile
    # (`p2p.pulling.whole`).
    recheck: Callable[["PullStream"], Completion] | None = None
    floor: Callable[[np.ndarray[tuple[int], np.dtype[np.uint32]]], m.Floor] | None = None  # of the first of these shards
    floor_left: np.ndarray[tuple[int], np.dtype[np.uint32]] | None = None  # all rows are read: of these it is told still


@dataclass(slots=True, eq=False)
class Outbox:
    """Streams waiting for credit towards one life of one peer."""

    streams: dict[int, PullStream] = field(default_factory=dict)  # by keyspace
    chunk_at: int | None = None  # bytes that the link had sent after the last chunk, or when the first wanted to go

    @property
    def rows_due(self) -> int:
        """Rows that are selected and not sent."""
        return sum(len(s.slots) for stream in self.streams.values() for s in stream.selections) - sum(
            stream.row_offset for stream in self.streams.values()
        )

    def is_due(self, link: Link) -> bool:
        """Whether batches had so much of the link meanwhile that a chunk may use their half of the credit."""
        if not self.streams or self.chunk_at is None:
            return False
        return link.traffic.bytes_out - self.chunk_at >= CHUNK_EVERY * link.piece_bytes(CHUNK_BYTES_MAX) and link.has_credit()

    def pump(self, core: Core, link: Link) -> None:
        """Send the next chunks, while there is credit; the timer comes back for more."""
        if self.chunk_at is None:
            self.chunk_at = link.traffic.bytes_out
        for _ in range(CHUNKS_PER_EVENT):
            if not self.streams or not (link.has_credit_for_repairs() or self.is_due(link)):
                return
            stream = next(iter(self.streams.values()))
            keyspace = core.keyspaces[stream.keyspace]
            stream.chunk_bytes = link.piece_bytes(CHUNK_BYTES_MAX)
            chunk = next_chunk(stream, keyspace)
            if chunk is None:
                del self.streams[stream.keyspace]
                core.counters.pulls_redirected += 1
                core.send(link, m.Incomplete(stream.keyspace, stream.request))  # else the asker would wait for its silence
                continue
            core.emit(m.Send(link.address, link.next_envelope(chunk.payload_bytes), chunk))
            link.traffic.rows_out += chunk.row_count
            link.traffic.bytes_out += chunk.payload_bytes
            self.chunk_at = link.traffic.bytes_out
            core.counters.pull_rows_sent += chunk.row_count
            if chunk.last:
                del self.streams[stream.keyspace]


def next_chunk(stream: PullStream, keyspace: Keyspace) -> m.PullReply | m.ShardsReply | None:
    """Read the next rows of a stream into a chunk, and move past them; None when the stream cannot be completed."""
    columns = _next_rows(stream, keyspace)
    if not stream.selections and stream.floor_left is None:
        completion = Completion.GIVE_UP if stream.recheck is None else stream.recheck(stream)
        if completion is Completion.GIVE_UP:
            return None
        if not stream.selections:
            stream.floor_left = stream.whole
    floor = _next_floor(stream)
    last = stream.floor_left is not None and not len(stream.floor_left)
    number = stream.next_chunk
    stream.next_chunk += 1
    whole, stream.whole_next = stream.whole_next, _no_shards()
    if stream.shards is None or stream.versions is None:
        return replace(_of_pull(stream, number, last, columns, keyspace.knowledge.shards), whole=whole, floor=floor)
    return replace(_of_round(stream, number, last, columns, stream.shards, stream.versions), whole=whole, floor=floor)


def _next_floor(stream: PullStream) -> m.Floor | None:
    """What was dropped of some shards that were sent whole, once all rows are read."""
    if stream.floor is None or stream.floor_left is None or not len(stream.floor_left):
        return None
    floor = stream.floor(stream.floor_left)
    stream.floor_left = stream.floor_left[len(floor.shards) :]
    return floor


def _next_rows(stream: PullStream, keyspace: Keyspace) -> tuple[RowColumns, ...]:
    """Rows for one chunk; the stream moves past them."""
    columns: list[RowColumns] = []
    room = stream.chunk_bytes or CHUNK_BYTES_MAX
    while stream.selections and room > 0:
        selection = stream.selections[0]
        count = max(1, room // (16 + selection.row_bytes))  # key, stamp, value
        slots = selection.slots[stream.row_offset : stream.row_offset + count]
        if len(slots):
            # Without rows that were removed since they were selected (R18). Their stamps are in the loss floor by now.
            columns.append(keyspace.replica.read(selection.table, slots))
            room -= len(slots) * (16 + selection.row_bytes)
        stream.row_offset += len(slots)
        if stream.row_offset >= len(selection.slots):
            stream.selections.popleft()
            stream.row_offset = 0
    return tuple(columns)


def _of_pull(stream: PullStream, number: int, last: bool, columns: tuple[RowColumns, ...], shards: int) -> m.PullReply:
    nothing = np.empty(0, np.uint16), np.empty((shards, 0), np.uint64), np.empty(0, np.uint64)
    writers, vector, frontier = (stream.writers, stream.vector, stream.frontier) if last else nothing
    bindings = _bindings(stream, number)
    return m.PullReply(stream.keyspace, stream.request, number, last, columns, writers, vector, frontier, *bindings)


def _of_round(
    stream: PullStream,
    number: int,
    last: bool,
    columns: tuple[RowColumns, ...],
    shards: np.ndarray[tuple[int], np.dtype[np.uint32]],
    versions: U64,
) -> m.ShardsReply:
    if last:
        staged = shards, versions, stream.writers, stream.vector
    else:
        staged = shards[:0], versions[:0], stream.writers[:0], stream.vector[:0, :0]
    return m.ShardsReply(stream.keyspace, stream.request, number, last, columns, *staged, *_bindings(stream, number))


def _bindings(stream: PullStream, number: int) -> tuple[np.ndarray[tuple[int], np.dtype[np.uint16]], U64]:
    return (stream.bound, stream.nonces) if number == 0 else (stream.bound[:0], stream.nonces[:0])
