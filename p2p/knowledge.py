"""What a node knows it holds: vectors, claims, and the one function that merges claims into vectors.

`V[shard][writer] = t` says: every update of that writer to that shard with a stamp up to t was delivered here, or a newer
version of its row (invariant 3). A *claim* `(shard, writer, base, until]` says the same of an interval, so it may be merged
only where `V >= base` (theorem T1); where V is still below, the claim waits until the gap is filled. Everything that moves
knowledge, a pushed batch or a pull reply, ends in `merge_claims`; rows alone never do.

The *frontier* is the same promise over all shards: everything a writer wrote up to that stamp is here. Batches chain it
(`writer_prev`), so it tells a lagging node apart from an idle writer, which per-shard vectors cannot.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from p2p import loops
from p2p.replica import NO_STEPS, U64, KnownSteps
from p2p.stamps import WRITERS_MAX, writer_of

# Steps whose claims wait for a gap. At 1,000 steps a second this is 4 s of a stream, longer than a repair takes; beyond it
# the oldest is dropped, which is safe: the pull that fills the gap claims at least as much.
OPEN_STEPS_MAX = 4_096
# Parts that came of all of them, where others are missing: of 4 MiB each 256 GiB. Beyond it the oldest such step is dropped.
OPEN_PARTS_MAX = 65_536
# A vector travels in one message (a pull and its answer), beside a chunk of rows. All 4,096 writers fit with 384 shards, 192
# with 8,192, 24 with 65,536; retired ones make room (R13).
VECTOR_BYTES_MAX = 12 << 20

_NOTHING: U64 = np.empty(0, np.uint64)


def merge_claims(vector: U64, shards: NDArray[np.uint32], writer: int, base: U64, until: U64 | np.uint64) -> NDArray[np.bool_]:
    """Merge claims of one writer: `V := max(V, until)` where `V >= base`.

    Args:
        vector: uint64[shards, WRITERS_MAX], changed in place.
        shards: uint32[k], without repeats.
        writer: the column.
        base: uint64[k].
        until: uint64[k], or one stamp for all.

    Returns:
        bool[k]: which claims held. The others must wait; nothing of them is merged.
    """
    column = vector[:, writer]
    held = column[shards]
    fits: NDArray[np.bool_] = held >= base
    newest = np.maximum(held, until)
    column[shards] = newest if all_of(fits) else np.where(fits, newest, held)
    return fits


def all_of(mask: NDArray[np.bool_]) -> bool:
    """`mask.all()`, at a tenth of its price: asked several times for every message of a step."""
    return bool(np.count_nonzero(mask) == len(mask))


@dataclass(slots=True, eq=False)
class _OpenStep:
    """A step that is not known whole yet: claims that wait for a gap (R6), or parts that are missing (R7)."""

    stamp: int
    writer_prev: int
    shards_touched: int
    here: NDArray[np.bool_]  # [shards]: whose rows of this step are all here
    # Of those, claims above a gap: shards, prev, and until where.
    waiting: list[tuple[NDArray[np.uint32], U64, U64 | np.uint64]] = field(default_factory=list)
    parts: dict[int, set[int]] = field(default_factory=dict)  # shard -> parts that came, while some are missing
    stamps: U64 | None = None  # of all steps of a group, ascending
    parts_kept: int = 0  # in `parts`

    @property
    def merged(self) -> bool:
        """Whether every claim of the whole step is in the vector."""
        return not self.waiting and bool(np.count_nonzero(self.here) == self.shards_touched)


class Knowledge:
    """V, the frontier and the waiting claims of one keyspace on one node.

    Args:
        vector: live uint64[shards, WRITERS_MAX].
        frontier: live uint64[WRITERS_MAX].
    """

    def __init__(self, vector: U64, frontier: U64) -> None:
        assert vector.shape[1] == WRITERS_MAX == len(frontier)
        self.vector = vector
        self.frontier = frontier
        self.dropped = 0  # open steps given up because there were too many
        self._open: dict[int, _OpenStep] = {}  # by stamp
        self._parts_kept = 0  # of all of them
        self._writers: set[int] = {int(w) for w in np.flatnonzero(vector.any(axis=0) | (frontier > 0))}
        self._retired: dict[int, U64] = {}  # writers whose retirement is done, whose id nobody uses, and where each ends (R13)
        # Per writer, the shards in which some open step waits for a lower claim: only a merge there can unblock anything.
        self._awaited: dict[int, NDArray[np.bool_]] = {}
        # Writer -> frontiers that hold once the vector covers another one: stamp, shards, that vector. The oldest and newest.
        self._later: dict[int, list[tuple[int, NDArray[np.uint32], U64]]] = {}
        # Writers of whom replies claimed something lately -> up to where all of it was here before.
        self._coalesced: dict[int, int] = {}

    @property
    def shards(self) -> int:
        return int(self.vector.shape[0])

    @property
    def writers(self) -> NDArray[np.uint16]:
        """uint16[w]: every writer ever heard of here, ascending; without retired ones of which all is here."""
        gone = self._retired.keys() if not self._retired else {w for w in self._retired if self.is_settled(w)}
        return np.array(sorted(self._writers - gone), np.uint16)

    @property
    def room(self) -> int:
        """How many writers more the vector may name; below 0: it does not fit in a message as it is."""
        return VECTOR_BYTES_MAX // (8 * self.shards) - len(self._writers)

    def has_room_for(self, writers: Iterable[int]) -> bool:
        """Whether the vector still fits in a message when it names these writers, too."""
        new = sum(writer not in self._writers for writer in writers)
        return not new or new <= self.room

    def is_settled(self, writer: int) -> bool:
        """Whether a retired writer's entry is exactly what is left of it, so that it needs not be told."""
        floor = self._retired.get(writer)
        return floor is not None and np.array_equal(self.vector[:, writer], floor)

    @property
    def settled(self) -> dict[int, U64]:
        """Retired writers, and where each ends: uint64[shards]."""
        return self._retired

    def retire(self, writer: int, floor: U64) -> None:
        """The entry of a writer leaves the vector wherever it equals `floor`, until its id is used again."""
        self._retired[writer] = floor
        self._later.pop(writer, None)
        self._writers.add(writer)  # until all of it is here it is told, above all by who has nothing of it
        self.give_up(writer)

    def settle(self, writer: int, floor: U64) -> None:
        """What is here of a writer is all that there is: by decree, its vector says so."""
        self.vector[:, writer] = np.maximum(self.vector[:, writer], floor)
        self.frontier[writer] = max(int(self.frontier[writer]), int(floor.max(initial=np.uint64(0))))
        self._writers.add(writer)
        self.give_up(writer)

    def note_writer(self, writer: int) -> None:
        """A writer has begun, and may have written nothing yet: from now on our vector names it."""
        self._writers.add(writer)
        self._retired.pop(writer, None)

    @property
    def open_steps(self) -> int:
        """Steps that wait for a gap or for parts."""
        return len(self._open)

    @property
    def oldest_open(self) -> int:
        """Stamp of the step that has waited longest; 0 when none waits."""
        return next(iter(self._open), 0)

    def awaits(self, writer: int) -> bool:
        """Whether a step of this writer waits."""
        return any(writer_of(stamp) == writer for stamp in self._open)

    def claims_wait(self, writer: int, shards: NDArray[np.uint32] | None = None) -> bool:
        """Whether in some shard, or in some of these, a claim of this writer waits for one before it."""
        awaited = self._awaited.get(writer)
        return awaited is not None and bool((awaited if shards is None else awaited[shards]).any())

    def known_steps(self, bytes_max: int) -> KnownSteps:
        """Steps above the vector whose rows are here: those that wait for a claim before theirs, by shard.

        A shard of which only some parts came is not among them (R7). Of too many the youngest, since what older ones wrote is
        likelier to have newer versions among the rest.

        Args:
            bytes_max: of stamps and bits together.
        """
        row_bytes = (self.shards + 7) // 8
        count_max = bytes_max // (8 + row_bytes)
        waiting = [step for step in self._open.values() if step.waiting]
        if not waiting or not count_max:
            return NO_STEPS
        # Of a group, all rows of each of its steps are here where any are.
        of_each = [np.array([step.stamp], np.uint64) if step.stamps is None else step.stamps for step in waiting]
        which = np.repeat(np.arange(len(waiting)), [len(stamps) for stamps in of_each])
        # An origin that lies may tell of a step twice, alone and in a group: it is named once, or we would seem to lie.
        stamps, first = np.unique(np.concatenate(of_each), return_index=True)
        # Only of those that are named: all that may wait would be 256 MiB of 65,536 shards.
        named, place = np.unique(which[first[-count_max:]], return_inverse=True)
        here = np.zeros((len(named), 8 * row_bytes), np.bool_)
        for index, known in zip(named.tolist(), here, strict=True):
            for shards, *_ in waiting[index].waiting:
                known[shards] = True
        return KnownSteps(stamps[-count_max:], np.packbits(here, axis=1, bitorder="little")[place])

    def digest(self) -> int:
        """128 bits that are equal exactly when the vectors are."""
        # Writers whose column is still empty must not count: a node that only heard of them knows nothing more. But of retired
        # ones somebody else has all, and does not say so any more: two that came after that would take each other for whole.
        ids = self.writers
        columns = np.ascontiguousarray(self.vector[:, ids])
        used = columns.any(axis=0)
        if self._retired:
            used |= np.isin(ids, list(self._retired))
        body = xxhash.xxh3_128(ids[used].tobytes())
        body.update(np.ascontiguousarray(columns[:, used]).tobytes())
        return int(body.intdigest())

    def learn_step(
        self,
        stamp: int,
        writer_prev: int,
        shards_touched: int,
        shards: NDArray[np.uint32],
        prev: U64,
        part: NDArray[np.uint16],
        parts: NDArray[np.uint16],
        until: U64 | None = None,
        stamps: U64 | None = None,
    ) -> bool:
        """Take the claims of one message of a step, whose rows are all applied (R6, R7); or of a group, as of one large step.

        Args:
            stamp: of the step, or of the group's last one.
            writer_prev: of the writer's step before.
            shards_touched: by all of it.
            shards: uint32[k], like the others, of this message.
            prev: the writer's stamp before, in each shard.
            part: which part of the shard's rows these are.
            parts: of how many.
            until: the stamp of the last step of a group that touched the shard; None: `stamp`, in all of them.
            stamps: uint64[s], of the steps of a group, ascending.

        Returns:
            True when the whole step is known and nothing before it is missing; False: something waits, a gap is open.
        """
        writer = writer_of(stamp)
        self.note_writer(writer)
        if int(self.frontier[writer]) >= stamp:
            return True  # a repeat, or a pull was faster
        fit = loops.used.merge_all(self.vector[:, writer], shards, prev, parts, stamp, _NOTHING if until is None else until)
        if not fit:
            complete = parts == 1
            if not all_of(complete):
                self._note_parts(self._step(stamp, writer_prev, shards_touched), shards, part, parts, complete)
                shards, prev = shards[complete], prev[complete]
                until = None if until is None else until[complete]
            reaches = np.uint64(stamp) if until is None else until
            fits = merge_claims(self.vector, shards, writer, prev, reaches)
            fit = all_of(fits)
        progress = fit and len(shards) == shards_touched and self._advance_frontier(writer, writer_prev, stamp)
        if progress:  # steps come whole and in order, in small clusters and as a rule
            self._close(stamp)
        else:
            step = self._step(stamp, writer_prev, shards_touched)
            step.stamps = stamps
            if not fit:  # what waits already does not wait again, however often somebody repeats it
                self._hold(step, writer, shards, prev, reaches, ~(fits | step.here[shards]))
            step.here[shards] = True
            # The last message of a step that nothing before is missing for.
            progress = step.merged and self._advance_frontier(writer, writer_prev, stamp)
            if progress:
                self._close(stamp)
        merged = shards if fit else shards[fits]
        if self._open and (progress or (writer in self._awaited and self._awaited[writer][merged].any())):
            self._absorb(writer)
        if self._later:
            self._reach(writer)
        return int(self.frontier[writer]) >= stamp

    def learn_reply(
        self, writers: NDArray[np.uint16], base: U64, until: U64, frontier: U64, shards: NDArray[np.uint32] | None = None
    ) -> None:
        """Take the claims of a whole pull reply over these shards: the answerer's vector, from what we asked with.

        Args:
            writers: uint16[w], ascending.
            base: uint64[shards, w], the vector the request carried (0 for writers unknown to us then).
            until: uint64[shards, w], the answerer's vector.
            frontier: uint64[w], the answerer's; zeros where `shards` are not all.
            shards: uint32[k], if not all; then `base` and `until` have k rows.
        """
        every = np.arange(self.shards, dtype=np.uint32) if shards is None else shards
        for column, writer in enumerate(writers.tolist()):
            self._writers.add(writer)
            floor = self._retired.get(writer)
            if floor is not None and (until[:, column] > floor[every]).any():
                self.note_writer(writer)  # what is above the floor is of another one, who uses the id now
            if (until[:, column] > self.vector[every, writer]).any():
                self._coalesced.setdefault(writer, int(self.frontier[writer]))
            fits = merge_claims(self.vector, every, writer, base[:, column], until[:, column])
            if fits.all() and frontier[column] > self.frontier[writer]:
                self.frontier[writer] = frontier[column]
            self._absorb(writer)
            self._reach(writer)

    def take_coalesced(self) -> dict[int, int]:
        """Since the last call: writers of whom claims of replies were merged, and up to where all of it was here before.

        Of what such a claim covers above that, only the newest version of each row may have come.
        """
        taken, self._coalesced = self._coalesced, {}
        return taken

    def learn_frontier(self, writers: NDArray[np.uint16], frontier: U64) -> None:
        """Our vector dominates, in every shard, the one that somebody had when this was its frontier.

        Args:
            writers: uint16[w], ascending.
            frontier: uint64[w].
        """
        for writer, stamp in zip(writers.tolist(), frontier, strict=True):
            if not self.has_room_for((writer,)):
                continue
            self.frontier[writer] = max(self.frontier[writer], stamp)
            self._writers.add(writer)
            self._absorb(writer)

    def learn_frontier_later(self, writer: int, stamp: int, shards: NDArray[np.uint32], least: U64) -> None:
        """All of a writer up to `stamp` is here once our vector covers somebody's of when this was its frontier.

        What comes of several parents comes at different times, so it may have to wait; of what waits the oldest is kept, since
        it holds first, and the newest.

        Args:
            writer: whose.
            stamp: the frontier; 0 says nothing.
            shards: uint32[r]: where our vector may not cover it yet.
            least: uint64[r]: what it has to reach there.
        """
        if stamp <= int(self.frontier[writer]):
            return
        # Copies: these are looks into a message, of which each would keep up to 16 MiB for as long as it waits.
        self._later[writer] = [*self._later.get(writer, ())[:1], (stamp, shards.copy(), least.copy())]
        self._reach(writer)

    def _reach(self, writer: int) -> None:
        """Frontiers that waited, and wait no more."""
        waiting = self._later.get(writer)
        if waiting is None:
            return
        column, before = self.vector[:, writer], int(self.frontier[writer])
        reached = max((stamp for stamp, shards, least in waiting if (column[shards] >= least).all()), default=before)
        reached = max(reached, before)
        waiting = [one for one in waiting if one[0] > reached]
        if waiting:
            self._later[writer] = waiting
        else:
            del self._later[writer]
        if reached > before:
            self.frontier[writer] = reached
            self._absorb(writer)

    def give_up(self, writer: int) -> None:
        """Forget the open steps of a writer. Safe: their rows stay, as strays, and a pull that fills the gap claims as much."""
        for stamp in [stamp for stamp in self._open if writer_of(stamp) == writer]:
            self._close(stamp)
            self.dropped += 1
        self._awaited.pop(writer, None)

    def _step(self, stamp: int, writer_prev: int, shards_touched: int) -> _OpenStep:
        step = self._open.get(stamp)
        if step is None:
            while len(self._open) >= OPEN_STEPS_MAX:
                self._close(next(iter(self._open)))
                self.dropped += 1
            step = self._open[stamp] = _OpenStep(stamp, writer_prev, shards_touched, np.zeros(self.shards, np.bool_))
        return step

    def _close(self, stamp: int) -> None:
        """A step is whole, or given up."""
        step = self._open.pop(stamp, None)
        if step is not None:
            self._parts_kept -= step.parts_kept

    def _note_parts(
        self,
        step: _OpenStep,
        shards: NDArray[np.uint32],
        part: NDArray[np.uint16],
        parts: NDArray[np.uint16],
        complete: NDArray[np.bool_],
    ) -> None:
        """Mark in `complete` each shard of which the last missing part has come."""
        for index in np.flatnonzero(parts > 1).tolist():
            came = step.parts.setdefault(int(shards[index]), set())
            before = len(came)
            came.add(int(part[index]))
            step.parts_kept += len(came) - before
            self._parts_kept += len(came) - before
            complete[index] = len(came) == int(parts[index])
        while self._parts_kept > OPEN_PARTS_MAX:
            self._close(next(stamp for stamp, one in self._open.items() if one.parts_kept))
            self.dropped += 1

    def _advance_frontier(self, writer: int, writer_prev: int, stamp: int) -> bool:
        if writer_prev <= int(self.frontier[writer]) < stamp:
            self.frontier[writer] = stamp
            return True
        return False

    def _hold(
        self,
        step: _OpenStep,
        writer: int,
        shards: NDArray[np.uint32],
        prev: U64,
        until: U64 | np.uint64,
        wait: NDArray[np.bool_],
    ) -> None:
        """Those of a step's claims that `wait` lie above a gap."""
        if not wait.any():
            return
        step.waiting.append((shards[wait], prev[wait], until[wait] if isinstance(until, np.ndarray) else until))
        self._awaited.setdefault(writer, np.zeros(self.shards, np.bool_))[shards[wait]] = True

    def _absorb(self, writer: int) -> None:
        """Merge what no longer has to wait. One pass in stamp order is enough: a claim builds only on older ones."""
        self._awaited.pop(writer, None)
        for stamp in sorted(stamp for stamp in self._open if writer_of(stamp) == writer):
            step = self._open[stamp]
            waiting, step.waiting = step.waiting, []
            for shards, prev, until in waiting:
                fits = merge_claims(self.vector, shards, writer, prev, until)
                if not all_of(fits):
                    self._hold(step, writer, shards, prev, until, ~fits)
            if step.merged:
                self._advance_frontier(writer, step.writer_prev, stamp)
            if int(self.frontier[writer]) >= stamp:  # by this step, or by a pull that brought all of it
                self._close(stamp)
