"""What a node of the model holds, and what travels between two of them."""

from dataclasses import dataclass, field
from typing import Any

NODES = (0, 1, 2)
KEYS = (0, 1, 2)
SHARD_OF = (0, 0, 1)
SHARDS = (0, 1)
ORIGINS = (0, 2)

Pair = tuple[int, int]  # (shard, writer), also as a key of vectors
Vector = dict[Pair, int]


class FalseClaimError(Exception):
    """A node's vector, or its frontier, covers an update that never reached it."""


@dataclass(slots=True)
class Row:
    stamp: int
    writer: int
    slot: int
    epoch: int


@dataclass(slots=True)
class Cycle:
    until: Vector
    frontier: dict[int, int]
    rest: Vector  # of other pairs


@dataclass(slots=True)
class Backlog:
    """A parent's side."""

    boot: int  # the child's life
    number: int
    pairs: frozenset[Pair]
    request: int = 0
    known: Vector = field(default_factory=dict)
    told: frozenset[int] = frozenset()  # writers in it
    due: dict[int, list[int]] = field(default_factory=dict)  # slot -> [epoch, whether it was recorded]
    left: set[int] = field(default_factory=set)  # slots whose rows have left since the last claim
    cycle: Cycle | None = None
    torn: bool = False

    @property
    def shards(self) -> frozenset[int]:
        return frozenset(shard for shard, _ in self.pairs)

    def reset(self) -> None:
        self.request, self.known, self.cycle, self.torn = 0, {}, None, False
        self.due.clear()
        self.left.clear()


@dataclass(slots=True)
class Feed:
    """A child's side."""

    boot: int  # the parent's life
    number: int
    request: int = 0


@dataclass(slots=True)
class Message:
    kind: str
    sender: int
    receiver: int
    boots: tuple[int, int]
    body: tuple[Any, ...]
    session: int = 0
    sequence: int = 0


class Node:
    """One node; what a crash takes is made anew."""

    def __init__(self, node: int, boot: int, writer: int) -> None:
        self.node, self.boot, self.writer = node, boot, writer
        self.rows: dict[int, Row] = {}
        self.high: dict[int, int] = {}
        self.epochs = [0] * len(KEYS)
        self.vector: Vector = {}
        self.frontier: dict[int, int] = {}
        self.later: list[tuple[int, int, Vector]] = []  # (writer, frontier, what the vector has to cover before it holds)
        self.floor: Vector = {}
        self.retired: dict[int, Vector] = {}
        self.view = 0
        self.forget_links()

    def forget_links(self) -> None:
        self.backlogs: dict[int, Backlog] = {}
        self.feeds: dict[int, Feed] = {}
        self.boots = [1, 1, 1]  # lives of the others, as far as it has heard
        self.sent = [[1, 0], [1, 0], [1, 0]]  # session and sequence, by receiver
        self.came: list[list[Any]] = [[0, 0, False], [0, 0, False], [0, 0, False]]  # and whether it has a hole, by sender
        self.numbers = 0

    def free_slot(self) -> int:
        taken = {row.slot for row in self.rows.values()}
        return min(slot for slot in range(len(KEYS)) if slot not in taken)

    def next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def told_vector(self) -> Vector:
        """Without retired writers of whom all is here."""
        return {pair: stamp for pair, stamp in self.vector.items() if not self.is_settled(pair[1])}

    def named(self) -> frozenset[int]:
        """Writers whose entries it tells, empty ones of retired writers, too."""
        return frozenset(w for _, w in self.vector if not self.is_settled(w)) | {
            w for w in self.retired if not self.is_settled(w)
        }

    def is_settled(self, writer: int) -> bool:
        floor = self.retired.get(writer)
        return floor is not None and all(self.vector.get(pair, 0) == stamp for pair, stamp in floor.items())
