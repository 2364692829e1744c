"""State mode of a link: where the network is busy, which rows are due is kept, and not what they were (theorem T2).

While there is credit, batches pass through whole (`p2p.pushing.push`). Without it, a link goes into *state mode* for a
keyspace:

    1. the child is told (`Backlogged`), and does not pull what is queued for it; it answers with its vector A. Meanwhile what
       is significant goes ahead, which claims nothing (T3)
    2. due := what changed since A, in all shards of which we send it something; from then on every row that changes here,
       however it came, and also the row of an update that was superseded when it came (R2)
    3. V := our vector, recorded together with what is due. Rows leave by priority, a fifth of the bytes in order
       (`p2p.busy.due`); their newest values are read then. They claim nothing
    4. when all that was recorded has left, V is claimed, for exactly the pairs of which we are the child's parent (R1); 3 again
    5. once nothing is due and that has stayed so for a while, and all of it is acknowledged: a last claim, and batches again

Why a claim may follow the rows at once. T2 wants every recorded row acknowledged, which means applied, as a contiguous prefix
of the session (R3). A claim travels in that same session behind them, and who receives it takes it only as the next message of
an unbroken session in which it applied every chunk. So it holds exactly when all of them would have been acknowledged, half a
round trip earlier; and a link under steady load, on which there is never a moment with nothing in flight, can leave state mode.

Whatever goes wrong is answered the same way: throw the backlog away, ask for the child's vector, select again. So it is when a
session ends (R3), the view gives a pair another parent (R1), or a row that was due is not in its slot any more (R18). Where
that would not help, since the child lacks what was dropped for good (below the loss floor), or too much is due, the child is
told to pull, as it would have without all this.

A child that gets rows so has no batches to forward, so towards its own children it goes into state mode, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from p2p.busy.due import DueRows
from p2p.busy.pairs import Pairs
from p2p.core import Keyspace
from p2p.link.links import Link
from p2p.replica import U64, RowColumns, Selection

Mask = NDArray[np.bool_]

# What a link does with batches (`LinkMode.mode`).
PASS_THROUGH, STATE_MODE = "pass-through", "state"

# Since when the other end knows of it.
STATE_SINCE = 2
# Payload of one chunk, where no budget says less: what matters more waits behind one of them.
CHUNK_BYTES_MAX = 1 << 18
# Chunks built per event, so that a link with much credit does not stall everybody else.
CHUNKS_PER_EVENT = 4
# Rows that are due to one child in one keyspace: 20 bytes each, and two bytes a slot. Beyond it the child pulls.
ROWS_MAX = 1 << 24
# The child is told again so often, while it has not answered and while state mode lasts; what it is told counts for `KEPT_MS`.
TELL_MS = 400
KEPT_MS = 3_000
# Who does not answer for so long pulls, as it would without state mode.
TOLD_MS_MAX = 10_000
# After a child was left to pull, state mode is not tried again for so long.
REFUSED_MS = 5_000
# A claim without rows moves the frontier of a child for which nothing is due; so often, as an idle writer's beat does.
CLAIM_MS = 50
# Where others send some trees, a claim brings our vector there now and then, so that the frontier moves, too (`Cycle.rest`).
# Not more often than this; of what the link carries it takes this share at most, but after so long it comes in any case.
REST_MS = 250
REST_SHARE = 0.05
REST_MS_MAX = 5_000
# Writers and adopted children change without a change of view; who is whose parent is looked at so often at least.
LOOK_MS = 50
# Batches pass through again when nothing has been due for so long: to enter costs a question and a selection.
CALM_MS = 500
# And only where what came meanwhile, whole and each time, is no more than this part of what the budget brings in: else batches
# that pass would fill the link again at once, and whoever goes in and out pays that question each time.
CALM_SHARE = 0.8
# A link that is back in state mode so soon after it left has a load in waves: it stays until it was calm for so long.
WAVES_MS = 20_000


@dataclass(slots=True, eq=False)
class Known:
    """What the child has, as far as it told us or we claimed it."""

    writers: NDArray[np.uint16]
    vector: U64  # [shards, w]

    def of(self, writers: NDArray[np.uint16]) -> U64:
        """uint64[shards, k]: of these writers; 0 of others than it knows."""
        found = np.zeros((self.vector.shape[0], len(writers)), np.uint64)
        places = np.searchsorted(self.writers, writers)
        for column, place in enumerate(places.tolist()):
            if place < len(self.writers) and self.writers[place] == writers[column]:
                found[:, column] = self.vector[:, place]
        return found

    def raise_to(self, writers: NDArray[np.uint16], vector: U64) -> None:
        """It has all of this, too."""
        union = np.union1d(self.writers, writers).astype(np.uint16)
        merged = self.of(union)
        places = np.searchsorted(union, writers)
        merged[:, places] = np.maximum(merged[:, places], vector)
        self.writers, self.vector = union, merged


@dataclass(frozen=True, slots=True, eq=False)
class Cycle:
    """What is claimed when all that was recorded has left."""

    writers: NDArray[np.uint16]
    vector: U64  # [shards, w]: ours
    grid: Mask  # [shards, w]: the pairs
    frontier: U64  # [w]: ours, when that was our vector

    @property
    def until(self) -> U64:
        """uint64[shards, w]: what is claimed; 0 outside of the pairs."""
        return np.where(self.grid, self.vector, np.uint64(0))

    def rest(self) -> tuple[NDArray[np.uint32], U64]:
        """What others send: uint32[r] shards, and uint64[r, w], our vector there; 0 in the pairs."""
        outside = np.where(self.grid, np.uint64(0), self.vector)
        shards = np.flatnonzero(outside.any(axis=1))
        return shards.astype(np.uint32), np.ascontiguousarray(outside[shards])


@dataclass(slots=True, eq=False)
class Backlog:
    """State mode towards one life of one child, in one keyspace."""

    keyspace: Keyspace
    link: Link
    pairs: Pairs
    number: int
    since_ms: int
    grid: Mask = field(init=False)  # [shards, w]
    shards: Mask | None = field(init=False)  # of which anything is sent; None: all
    due: DueRows = field(default_factory=DueRows)
    request: int = 0  # the question by which the child told its vector; 0: it has not yet
    asked_ms: int = 0  # since when it has been asked for it
    told_ms: int = 0  # when it was told last
    known: Known | None = None
    cycle: Cycle | None = None
    torn: bool = False  # a row that was due was not there any more (R18)
    stirred: bool = True  # there may be something to claim
    claimed_ms: int = 0
    chunks: int = 0  # sent since the child told its vector
    waves: bool = False  # it was left a moment before
    calm_ms: int | None = None  # since when nothing has been due
    calm_sequence: int = 0  # what had been sent then
    calm_bytes: int = 0  # and what it and others had charged to the budget then, with what they had saved
    bytes_saved: int = 0
    served: int = 0  # when it was its turn last
    frontier: U64 = field(default_factory=lambda: np.empty(0, np.uint64))  # that was claimed last
    rest_ms: int = 0  # when the rest of the vector was told last
    rest_bytes: int = 0  # of it
    sent_bytes: int = 0  # since then
    view: object = None  # of which the pairs are
    looked_ms: int = 0

    def __post_init__(self) -> None:
        self.take_pairs(self.pairs)

    def take_pairs(self, pairs: Pairs) -> None:
        """These are what it covers from now on."""
        self.pairs = pairs
        self.grid = pairs.grid(self.keyspace.knowledge.shards)
        mask: Mask = np.asarray(self.grid.any(axis=1), np.bool_)
        self.shards = None if mask.all() else mask

    def note(self, section: RowColumns, places: NDArray[np.int64], now_ms: int) -> None:
        """Rows of a section came, wherever from (R2)."""
        classes = section.priority
        if self.shards is not None:
            wanted = self.shards[self.keyspace.replica.shards_of(section.keys)]
            places, classes = places[wanted], None if classes is None else classes[wanted]
        row_bytes = self.keyspace.replica.row_bytes_of(section.table)
        self.bytes_saved += self.due.add(section.table, row_bytes, places, classes, now_ms)

    def select(self, selections: Sequence[Selection], now_ms: int) -> None:
        """What changed since the child's vector is due."""
        for selection in selections:
            self.due.add(selection.table, selection.row_bytes, selection.slots, None, now_ms)

    def begin_cycle(self) -> None:
        """V and what is due are recorded together: all that V covers and the child may lack is among it."""
        knowledge, writers = self.keyspace.knowledge, self.pairs.writers
        self.cycle = Cycle(writers, knowledge.vector[:, writers], self.grid, knowledge.frontier[writers])
        self.due.record()

    @property
    def whole(self) -> Mask:
        """bool[w]: of whom we send all trees."""
        return np.asarray(self.pairs.bits == self.pairs.all_trees, np.bool_)

    def tells_rest(self, now_ms: int) -> bool:
        """Whether it is time to tell the rest of the vector."""
        passed_ms = now_ms - self.rest_ms
        if passed_ms < REST_MS or self.whole.all():
            return False
        return not self.due.rows or passed_ms >= REST_MS_MAX or self.rest_bytes <= REST_SHARE * self.sent_bytes

    def has_moved(self, now_ms: int) -> bool:
        """Whether we know more of the pairs than was claimed."""
        knowledge, writers = self.keyspace.knowledge, self.pairs.writers
        if self.known is None or len(self.frontier) != len(writers):
            return True
        if ((self.whole | self.tells_rest(now_ms)) & (knowledge.frontier[writers] > self.frontier)).any():
            return True
        return bool((self.grid & (knowledge.vector[:, writers] > self.known.of(writers))).any())

    def reset(self) -> None:
        """All of it is thrown away."""
        self.due.clear()
        self.frontier = self.frontier[:0]
        self.request, self.known, self.cycle, self.torn, self.chunks, self.calm_ms = 0, None, None, False, 0, None

    def is_below_floor(self) -> bool:
        """Whether the child may lack what was dropped here for good; then nothing can be claimed to it (R5)."""
        replica, writers = self.keyspace.replica, self.keyspace.replica.floor_writers
        if not len(writers) or self.known is None:
            return False
        known, told = self.known.of(writers), set(self.known.writers.tolist())
        for column, writer in enumerate(writers.tolist()):
            settled = self.keyspace.knowledge.settled.get(writer)
            if settled is not None and writer not in told:  # who tells it lacks some of it; else both of us have all (R13)
                known[:, column] = settled
        below = (replica.loss_floor[:, writers] > known).any(axis=1)
        return bool(below.any() if self.shards is None else (below & self.shards).any())


@dataclass(frozen=True, slots=True)
class LinkMode:
    """How a link fares, for the operator: over all keyspaces."""

    mode: str = PASS_THROUGH
    since_ms: int = 0  # for how long it has been in state mode
    rows: int = 0  # due, and not sent
    bytes: int = 0
    oldest_ms: tuple[
        tuple[str, int], ...
    ] = ()  # how long the oldest row has waited, by band: taken_back, significant, ordinary
    bytes_saved: int = 0  # since the link is there: of rows that changed again while they waited


def mode_of(backlogs: Sequence[Backlog], bytes_saved: int, now_ms: int) -> LinkMode:
    """A picture of a link; `bytes_saved`: by backlogs that ended."""
    if not backlogs:
        return LinkMode(bytes_saved=bytes_saved)
    oldest: dict[str, int] = {}
    for backlog in backlogs:
        for band, since_ms in backlog.due.since_ms().items():
            oldest[band] = max(oldest.get(band, 0), now_ms - since_ms)
    return LinkMode(
        STATE_MODE,
        now_ms - min(backlog.since_ms for backlog in backlogs),
        sum(backlog.due.rows for backlog in backlogs),
        sum(backlog.due.bytes for backlog in backlogs),
        tuple(sorted(oldest.items())),
        bytes_saved + sum(backlog.bytes_saved for backlog in backlogs),
    )
