"""Repair, joins, and rows by key (`p2p.pulling`)."""

from dataclasses import field

import numpy as np
from numpy.typing import NDArray

from p2p.messages.rows import Floor, Rows, no_numbers, no_shards, no_writers
from p2p.replica import NO_STEPS, U64, KnownSteps, RowColumns, TableKeys
from p2p.values import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class PullRequest:
    """Send me everything above this vector."""

    keyspace: int
    request: int
    writers: NDArray[np.uint16]  # [w] columns of `vector`, ascending
    vector: U64  # [shards, w]
    frontier: U64  # [w], the asker's
    shards: int
    nonces: U64 = field(default_factory=no_numbers)  # [w] or empty: to which the asker knows them bound; 0: unknown
    retired_digest: int = 0  # as in `Heartbeat`: writers whose retirement is done are left out where all of it is reached
    known: KnownSteps = NO_STEPS  # above the vector: their rows need not be sent again; since protocol version 2
    backlog: bool = False  # it answers `Backlogged`: the rows are to come in order of priority (`StateChunk`)


@dataclass(frozen=True, slots=True, eq=False)
class PullReply(Rows):
    """One chunk of the answer. Rows claim nothing; the claims ride in the last chunk and count only if all chunks came."""

    keyspace: int
    request: int
    chunk: int  # 0-based
    last: bool
    columns: tuple[RowColumns, ...]  # with stamps
    writers: NDArray[np.uint16]  # [w]; empty unless last
    vector: U64  # [shards, w]; the answerer's vector, read before it selected the rows
    frontier: U64  # [w]
    bound: NDArray[np.uint16] = field(default_factory=no_writers)  # [b] in the first chunk: writers whose nonces are known
    nonces: U64 = field(default_factory=no_numbers)  # [b]
    whole: NDArray[np.uint32] = field(default_factory=no_shards)  # ascending: from this chunk on all of their rows come (R5)
    floor: "Floor | None" = None  # in the last chunks, of shards that came whole, in the end of all; since protocol version 2

    def __post_init__(self) -> None:
        self._count(self.columns)


@dataclass(frozen=True, slots=True)
class Incomplete:
    """The sender has dropped live rows of this keyspace (R11): ask somebody else. Since protocol version 2."""

    keyspace: int
    request: int  # the pull that this answers; 0: none


# How rows that were dropped for want of room come back (`p2p.pulling.fetching`), since protocol version 2.
@dataclass(frozen=True, slots=True, eq=False)
class KeysWanted:
    """Send me the live rows of these keys, which I dropped, if your vector covers my loss floor."""

    keyspace: int
    request: int
    floor: Floor  # of the shards of these keys
    keys: tuple[TableKeys, ...]
    retired_digest: int = 0  # as in `PullRequest`


@dataclass(frozen=True, slots=True, eq=False)
class KeysFound(Rows):
    """Some of these rows. They claim nothing."""

    keyspace: int
    request: int
    columns: tuple[RowColumns, ...]  # with stamps, live rows only
    bound: NDArray[np.uint16] = field(default_factory=no_writers)  # [b]: writers whose nonces are known
    nonces: U64 = field(default_factory=no_numbers)  # [b]

    def __post_init__(self) -> None:
        self._count(self.columns)
