"""Steps that share a message when an origin is busy.

Intuition. A lift that leaves for every single passenger carries few of them an hour. One that has just left waits a moment for
those who come meanwhile, and takes them together; who comes to a lift that stands there rides alone, at once.

A message costs each node on its way some hundred calls of the interpreter whatever is in it, so what saves processor time is
fewer messages. The first step after a pause leaves at once. What is published within `LINGER_MS` of the last message of its
keyspace is stored and answered like any step, and leaves with all others like it when that time is over, or when they are as
much as one message should be, or when somebody waits for one of them. A writer of fewer steps than one in `LINGER_MS` never
notices. It is a delay of at most that, at the origin only: nobody who forwards waits for anything.

A *group* of steps is one large step of its writer in its keyspace: it follows what the first one follows, ends with the last,
and touches what any of them touches. Its claim of a shard reaches from what the first step that touched the shard found there
to the last one that touched it, not to the end of the group: nodes that hold the same must have equal vectors, and the origin's
own says that. Rows keep the stamp of their step. So a node has after a group exactly what it has after its steps one by one.

What is held here is stored and covered by our vector, so whoever pulls gets it; a crash takes nothing but the push of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from p2p import messages as m
from p2p import wire
from p2p.pushing.cutting import join_columns, join_sections
from p2p.replica import U64, RowColumns, WriterIdentity

# A step waits at most so long, in milliseconds. More of it is fewer messages, and delay where steps come that fast.
LINGER_MS = 5
# Payload of a group: a message that takes much longer than a step's holds up what comes behind it at every hop.
GROUP_BYTES_MAX = 2 << 20
# How many rows a step has in a table, live ones and deleted ones.
COUNT_BYTES = 8


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A step of ours in one keyspace, which is stored here and has to be sent."""

    identity: WriterIdentity
    stamp: int
    writer_prev: int  # the writer's step before
    shards: NDArray[np.uint32]  # [k] that it touches, ascending
    prev: U64  # [k], the writer's stamp there before
    columns: tuple[RowColumns, ...]
    shard_of: list[NDArray[np.int64]]  # [n] for each of `columns`
    published_ns: int

    @property
    def bytes(self) -> int:
        """What it is of a group: its rows get stamps of their own."""
        return sum([section.payload_bytes + section.keys.nbytes for section in self.columns])


@dataclass(slots=True, eq=False)
class Group:
    """Steps of one keyspace that wait to leave together; empty as a rule."""

    steps: list[Step] = field(default_factory=list)
    bytes: int = 0
    tables: set[int] = field(default_factory=set)
    sent_ms: int | None = None  # monotonic, when the last message of our own left

    def add(self, step: Step) -> None:
        """Hold one more."""
        self.steps.append(step)
        self.bytes += step.bytes
        self.tables.update(section.table for section in step.columns)

    def admits(self, step: Step) -> bool:
        """Whether this step may leave with those that are held."""
        if not self.steps:
            return True
        # A node may take a fresh writer id at any moment (R4).
        same_writer = self.steps[0].identity.nonce == step.identity.nonce
        fits = len(self.steps) < wire.GROUP_STEPS_MAX and self.bytes + step.bytes <= bytes_max()
        # On the wire each step counts its rows in each table of the group, live and deleted: where steps touch other tables
        # each, that would soon be more than the rows.
        tables = self.tables | {section.table for section in step.columns}
        fits = fits and COUNT_BYTES * (len(self.steps) + 1) * len(tables) <= self.bytes + step.bytes
        return same_writer and fits

    def take(self, now_ms: int) -> list[Step]:
        """All of them, which leave now."""
        steps, self.steps, self.bytes, self.sent_ms = self.steps, [], 0, now_ms
        self.tables.clear()
        return steps


def bytes_max() -> int:
    """Payload of a group, which is never cut in parts."""
    return min(GROUP_BYTES_MAX, wire.BATCH_BYTES_MAX)


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """What is sent of one step, or of several together."""

    claims: m.ShardClaims
    columns: tuple[RowColumns, ...]
    shard_of: Sequence[NDArray[np.int64]]  # [n] for each of `columns`
    steps: m.Steps | None


def join(steps: Sequence[Step]) -> Joined:
    """Steps of one writer that follow each other, as one; a single one stays as it is."""
    first = steps[0]
    if len(steps) == 1:
        count = len(first.shards)
        claims = m.ShardClaims(first.shards, first.prev, np.zeros(count, np.uint16), np.ones(count, np.uint16))
        return Joined(claims, first.columns, first.shard_of, None)
    stamps = np.array([step.stamp for step in steps], np.uint64)
    columns, shard_of = _rows_of(steps)
    rows = np.array([sum([len(section.keys) for section in step.columns]) for step in steps], np.int64)
    published_ns = np.array([step.published_ns for step in steps], np.uint64)
    return Joined(_claims_of(steps, stamps), columns, shard_of, m.Steps(stamps, published_ns, rows))


def _claims_of(steps: Sequence[Step], stamps: U64) -> m.ShardClaims:
    shards = np.concatenate([step.shards for step in steps])
    until_of = np.repeat(stamps, [len(step.shards) for step in steps])
    touched, begins = np.unique(shards, return_index=True)  # where each comes first
    until = np.zeros(int(touched[-1]) + 1, np.uint64)
    np.maximum.at(until, shards, until_of)
    prev = np.concatenate([step.prev for step in steps])[begins]
    count = len(touched)
    return m.ShardClaims(touched, prev, np.zeros(count, np.uint16), np.ones(count, np.uint16), until[touched])


def _rows_of(steps: Sequence[Step]) -> tuple[tuple[RowColumns, ...], list[NDArray[np.int64]]]:
    """The rows of all steps by table, and the shards of each."""
    by_table: dict[int, list[tuple[int, RowColumns, NDArray[np.int64]]]] = {}
    for step in steps:
        for section, shards in zip(step.columns, step.shard_of, strict=True):
            by_table.setdefault(section.table, []).append((step.stamp, section, shards))
    columns: list[RowColumns] = []
    shard_of: list[NDArray[np.int64]] = []
    for found in by_table.values():
        stamps, sections, shards_of = zip(*found, strict=True)
        columns.append(join_sections(sections, stamps))
        shard_of.append(join_columns(sections, shards_of))
    return tuple(columns), shard_of
