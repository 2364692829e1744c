"""Fresh batches, and who forwards them (`p2p.pushing`)."""

from dataclasses import field

import numpy as np
from numpy.typing import NDArray

from p2p.messages.envelope import NodeId
from p2p.messages.rows import Rows
from p2p.replica import U64, RowColumns
from p2p.transport import Buffer
from p2p.values import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class ShardClaims:
    """Per touched shard: `rows up to the batch's stamp follow directly on prev` (R6), and which part this is (R7)."""

    shards: NDArray[np.uint32]  # [k], ascending, no repeats
    prev: U64  # [k], the writer's previous stamp in that shard; 0: none
    part: NDArray[np.uint16]  # [k], 0-based
    parts: NDArray[np.uint16]  # [k], >= 1
    until: U64 | None = None  # [k], of a group: the stamp of its last step that touched the shard; None: the batch's stamp


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """Which steps of one writer share a message, when they are several (`p2p.pushing.groups`). Since protocol version 2."""

    stamps: U64  # [s], ascending; the last one is the stamp of the message
    published_ns: U64  # [s], as in `Batch`
    rows: NDArray[np.int64]  # [s]: how many of the message's rows are of each


@dataclass(frozen=True, slots=True, eq=False)
class Batch(Rows):
    """One optimiser step of one writer, or a part of it, under one stamp; or a *group*, several steps that follow each other.

    A group is like one large step: `stamp` and `published_ns` are its last one's, `writer_prev` is what the first one follows.
    Its claims say for each shard how far they reach, and its `columns` have stamps; those of a single step have none.

    A batch without shards and rows moves only the frontier: an idle writer says "nothing since".
    """

    keyspace: int
    origin: NodeId
    origin_region: str
    writer: int
    nonce: int
    stamp: int
    writer_prev: int  # the stamp of the writer's previous step, in any shard
    shards_touched: int  # by the whole step, over all its messages (R7)
    claims: ShardClaims
    columns: tuple[RowColumns, ...]
    published_ns: int = 0  # CLOCK_MONOTONIC at the entry of `publish`; 0: not measured
    machine: int = 0  # hash of the machine whose clock that is; the difference means something only there
    priority_class: int = 0
    trees: int = 1  # over how many trees the origin spread the step; all shards of one message belong to one of them (R1)
    steps: Steps | None = None  # of a group
    body: tuple[Buffer, ...] = field(default=(), repr=False)  # the frames it came in, forwarded unchanged (R17)
    checksum: int = field(default=0, repr=False)
    body_version: int = field(default=0, repr=False)  # the version in which `body` is encoded

    def __post_init__(self) -> None:
        self._count(self.columns)

    @property
    def tree(self) -> int:
        """The index of its tree: a function of the shard."""
        return int(self.claims.shards[0]) % self.trees if len(self.claims.shards) else 0

    @property
    def step_count(self) -> int:
        """How many steps, or parts of steps, it is."""
        return 1 if self.steps is None else len(self.steps.stamps)


@dataclass(frozen=True, slots=True)
class Adopt:
    """From now on, forward my batches that go down this tree to these nodes, too; it replaces what I said before.

    Since protocol version 2 (`p2p.pushing.adoption`).
    """

    keyspace: int
    tree: int
    children: tuple[NodeId, ...]
