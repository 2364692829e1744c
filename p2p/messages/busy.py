"""Messages of a link in state mode (`p2p.busy`), since protocol version 2."""

import numpy as np
from numpy.typing import NDArray

from p2p.messages.rows import Rows
from p2p.replica import U64, RowColumns
from p2p.values import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Backlogged:
    """I am in state mode towards you: tell me your vector, and do not pull what I have queued for you (R16). Told repeatedly.

    The pairs that I send you: of each writer, the trees in which I am your parent (R1).
    """

    keyspace: int
    number: int  # of this backlog, in the sender's life: a new one wants a new answer
    on: bool  # False: it is over, without a last claim; whoever lacks something pulls it
    trees: int  # how many there are
    writers: NDArray[np.uint16]  # [w], ascending
    served: NDArray[np.uint8]  # [w]: a bit for each tree
    retired_digest: int = 0  # as in `PullRequest`: rows that come before the answer are taken while both agree on it (R13)


@dataclass(frozen=True, slots=True, eq=False)
class StateChunk(Rows):
    """Rows of a backlog, which claim nothing; and when all that was recorded has been sent, what is claimed (T2).

    It travels in the link's session, so that a claim comes behind every row that it speaks of, or behind a hole.
    """

    keyspace: int
    request: int  # the question with which the receiver told its vector; 0: rows that go ahead of it, and claim nothing
    ends: bool  # batches come again from now on
    columns: tuple[RowColumns, ...]  # with stamps and classes
    shards: NDArray[np.uint32]  # [k], ascending; empty without a claim
    writers: NDArray[np.uint16]  # [w], ascending; empty without a claim
    until: U64  # [k, w]; 0 where nothing is claimed
    frontier: U64  # [w]: up to where all of a writer is here, once the vector covers `rest`, too; 0: it is not told
    rest_shards: NDArray[np.uint32]  # [r], ascending: shards in which others send
    rest: U64  # [r, w]: the sender's vector there when that was its frontier; 0 where it claims
    bound: NDArray[np.uint16]  # [b] in the first chunk: writers whose nonces are known
    nonces: U64  # [b]

    def __post_init__(self) -> None:
        self._count(self.columns)

    @property
    def claims(self) -> bool:
        """Whether it claims anything."""
        return bool(len(self.writers))
