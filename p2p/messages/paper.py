"""The four messages of a round by shard versions (`p2p.paper`), since protocol version 2."""

from dataclasses import field

import numpy as np
from numpy.typing import NDArray

from p2p.messages.rows import Floor, Rows, no_numbers, no_shards, no_writers
from p2p.replica import U64, RowColumns
from p2p.values import dataclass


# The four messages of a round by shard versions (`p2p.paper.rounds`), since protocol version 2.
@dataclass(frozen=True, slots=True)
class VersionsWanted:
    """1: which shard versions of yours have changed?"""

    keyspace: int
    request: int
    since: int  # a mark that the receiver gave in this life; 0: tell me all
    retired_digest: int = 0  # as in `PullRequest`


@dataclass(frozen=True, slots=True, eq=False)
class VersionList:
    """2: these have."""

    keyspace: int
    request: int
    mark: int  # what to ask with next time
    shards: NDArray[np.uint32]  # [k], ascending, no repeats
    versions: U64  # [k]
    writers: NDArray[np.uint16]  # [w] of `frontier`, ascending
    frontier: U64  # [w], the sender's when it read its versions


@dataclass(frozen=True, slots=True, eq=False)
class ShardsWanted:
    """3: send me everything above these vectors in those shards."""

    keyspace: int
    request: int
    shards: NDArray[np.uint32]  # [k], ascending, no repeats, not empty
    writers: NDArray[np.uint16]  # [w] columns of `vectors`, ascending
    vectors: U64  # [k, w], the asker's
    retired_digest: int = 0  # as in `PullRequest`


@dataclass(frozen=True, slots=True, eq=False)
class ShardsReply(Rows):
    """4: one chunk of the answer. Rows claim nothing; vectors and versions are in the last one and count only if all came."""

    keyspace: int
    request: int
    chunk: int  # 0-based
    last: bool
    columns: tuple[RowColumns, ...]  # with stamps
    shards: NDArray[np.uint32]  # [k], as asked; empty unless last, as all that follows
    versions: U64  # [k]
    writers: NDArray[np.uint16]  # [w]
    vectors: U64  # [k, w]; the answerer's, read before it selected the rows
    bound: NDArray[np.uint16] = field(default_factory=no_writers)  # [b] in the first chunk: writers whose nonces are known
    nonces: U64 = field(default_factory=no_numbers)  # [b]
    whole: NDArray[np.uint32] = field(default_factory=no_shards)  # as in `PullReply`
    floor: "Floor | None" = None

    def __post_init__(self) -> None:
        self._count(self.columns)
