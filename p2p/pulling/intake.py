"""Rows of an answer come in: checked first, then applied. They claim nothing; who asked merges claims when all is here.

Shared by pulls by vector (`p2p.pulling.pull`) and rounds by shard versions (`p2p.paper.rounds`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from p2p import messages as m
from p2p.busy.noting import note_rows
from p2p.core import Core, Keyspace
from p2p.errors import BlamelessError, FullError, RemoteProtocolError
from p2p.pulling.full import note_refused_answer
from p2p.replica import U64, Arrivals, RowColumns
from p2p.stamps import check_not_ahead


def check_rows(keyspace: Keyspace, columns: Sequence[RowColumns], stamps: Sequence[U64], now: m.Now) -> None:
    """Refuse a chunk before it touches anything.

    Args:
        keyspace: where the rows belong.
        columns: with stamps.
        stamps: others of the same message: vectors, frontiers.
        now: stamps may not be too far ahead of it (R14).

    Raises:
        RemoteProtocolError: rows that do not fit, or stamps from the future.
    """
    keyspace.replica.check(columns)
    own = [section.stamps for section in columns if section.stamps is not None and len(section.stamps)]
    if not all(column.all() for column in own):
        raise RemoteProtocolError("a row without a stamp")
    check_not_ahead(max((int(array.max()) for array in (*own, *stamps) if array.size), default=0), now.unix_ms)


def check_writers(keyspace: Keyspace, writers: NDArray[np.uint16]) -> None:
    """Refuse knowledge about more writers than we could pass on.

    Raises:
        BlamelessError: the vector has no room for them; the sender may have met fewer others than we.
    """
    if not keyspace.knowledge.has_room_for(writers.tolist()):
        raise BlamelessError(f"{len(writers)} writers of {keyspace.knowledge.shards} shards: our vector has no room for them")


def take_rows(core: Core, keyspace: Keyspace, columns: Sequence[RowColumns], now: m.Now) -> int | None:
    """Apply the rows of a checked chunk; returns how many of them were new here, None when there is no room for all."""
    for section in columns:
        if section.stamps is not None and len(section.stamps):
            core.clock.observe(int(section.stamps.max()))
    try:
        keyspace.replica.reserve(columns)
        applied = keyspace.replica.apply(columns, 0)
    except FullError as error:
        keyspace.strays_possible = True  # some may be there
        note_refused_answer(core, keyspace, error, now)
        return None
    keyspace.strays_possible = True
    note_rows(core, keyspace, columns, applied)
    core.counters.rows_written += applied.written
    core.counters.rows_stale += applied.stale
    core.counters.rows_ghosts += applied.ghosts
    core.counters.pull_rows_received += sum(len(section.keys) for section in columns)
    return applied.written


def observe(core: Core, *stamps: U64) -> None:
    """Our clock follows what others know of, also of rows that are not there any more: a writer that begins here writes above
    every tombstone that was collected (R5).
    """
    core.clock.observe(max((int(array.max()) for array in stamps if array.size), default=0))


class WholeArrivals:
    """What an answer has brought of shards that come whole (R5), on the side that asked; none, as a rule."""

    def __init__(self) -> None:
        self._shards: NDArray[np.uint32] = np.empty(0, np.uint32)
        self._told: NDArray[np.uint32] = np.empty(0, np.uint32)  # of these, shards whose floor came
        self._arrivals: Arrivals | None = None

    @property
    def active(self) -> bool:
        """Whether some shards come whole."""
        return self._arrivals is not None

    def check(self, shards: int, whole: NDArray[np.uint32], last: bool, floor: m.Floor | None) -> None:
        """Refuse what contradicts itself; nothing changes.

        Raises:
            RemoteProtocolError: shards that do not exist, or floors of others than came whole.
        """
        if len(whole) and int(whole[-1]) >= shards:
            raise RemoteProtocolError(f"shard {int(whole[-1])} comes whole, the keyspace has {shards}")
        came = np.union1d(self._shards, whole)
        more = self._told[:0] if floor is None else floor.shards
        told = np.concatenate([self._told, more])
        twice = len(np.unique(told)) != len(told)
        if twice or not np.isin(told, came).all() or (last and len(told) != len(came)):
            raise RemoteProtocolError("a loss floor of other shards than came whole")

    def begin(self, keyspace: Keyspace, whole: NDArray[np.uint32]) -> None:
        """These come whole from now on."""
        if len(whole):
            self._arrivals = self._arrivals or keyspace.replica.arrivals()
            self._arrivals.begin(whole)
            self._shards = np.union1d(self._shards, whole).astype(np.uint32)

    def note(self, core: Core, keyspace: Keyspace, columns: Sequence[RowColumns], floor: m.Floor | None, now: m.Now) -> bool:
        """These rows came, and are applied; what was dropped of some shards is taken over.

        Returns:
            False when there is no memory for the floor.
        """
        if self._arrivals is None:
            return True
        self._arrivals.note(columns)
        if floor is None:
            return True
        try:
            keyspace.replica.merge_floor(floor.shards, floor.writers, floor.stamps)
        except FullError as error:
            note_refused_answer(core, keyspace, error, now)
            return False
        observe(core, floor.stamps)
        self._told = np.concatenate([self._told, floor.shards])
        return True

    def finish(
        self,
        core: Core,
        keyspace: Keyspace,
        writers: NDArray[np.uint16],
        vector: U64,
        now: m.Now,
    ) -> bool:
        """All rows and floors came: drop what did not come; only then may claims be merged.

        Returns:
            False when there is no memory for the floor; then nothing may be merged.
        """
        if self._arrivals is None:
            return True
        try:
            dropped = self._arrivals.drop_absent(*_with_settled(keyspace, writers, vector))
        except FullError as error:
            note_refused_answer(core, keyspace, error, now)
            return False
        keyspace.strays_possible = True
        core.counters.rows_dropped += dropped
        return True


def _with_settled(keyspace: Keyspace, writers: NDArray[np.uint16], vector: U64) -> tuple[NDArray[np.uint16], U64]:
    """An answerer's vector, with the retired writers that it leaves out, since both of us have all of them (R13).

    Old rows of theirs may have been deleted by others since, like anybody's.
    """
    told = set(writers.tolist())
    left_out = [(writer, floor) for writer, floor in keyspace.knowledge.settled.items() if writer not in told]
    if not left_out:
        return writers, vector
    more = np.array([writer for writer, _ in left_out], np.uint16)
    return np.concatenate([writers, more]), np.column_stack([vector, *(floor for _, floor in left_out)])


def bindings_of(core: Core, keyspace: Keyspace) -> tuple[NDArray[np.uint16], U64]:
    """Writers of a keyspace whose nonces we know, uint16[b], and the nonces, uint64[b]: who is answered compares them (R12)."""
    family = keyspace.replica.place.family
    known = [(writer, core.writers.nonce_of(family, writer)) for writer in keyspace.knowledge.writers.tolist()]
    bound = np.array([writer for writer, nonce in known if nonce], np.uint16)
    return bound, np.array([nonce for _, nonce in known if nonce], np.uint64)
