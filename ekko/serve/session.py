"""One life of a feed: from opening a sink until something fails. What is known of the sink is in its cursor, and nowhere else.

In this order, or rows would be missed: the ring's place is read, then what the node knows, then rows. What is written after the
first is noted behind that place; what the second covers is among the rows. So a walk over the rows and the ring together bring
everything, whatever is written meanwhile.
"""

import time
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ekko.model import DENSE_SPEC
from ekko.serve.comparing import Keys, Sweep, Walk, difference
from ekko.serve.cursor import Cursor, Known, Place, Way, decode, encode, way_from
from ekko.serve.sink import Batch, Sink, rows_at_once
from ekko.serve.source import Source
from ekko.store.changes import GONE, TABLE_MASK

U64 = NDArray[np.uint64]

# Entries of the ring that are taken at once: a quarter of it, so that it goes on meanwhile.
ENTRIES_AT_ONCE: Final = 1 << 14
# The cursor is left with the sink so often while rows come; a restart sends what came since again.
COMMIT_S: Final = 1.0
# What the node knows is copied less often, as it takes some MB: it only bounds what is sent where the ring does not reach back.
KNOWN_S: Final = 10.0
# Of a node that keeps no ring, from the end of one walk to the next one.
WALK_S: Final = 1.0

_NONE: Final[U64] = np.empty(0, np.uint64)


@dataclass(slots=True)
class FeedCounts:
    """What a feed did and how it is; all but the last five only grow."""

    rows: int = 0  # applied
    deleted: int = 0
    forgotten: int = 0
    tensors: int = 0
    batches: int = 0
    noted: int = 0  # entries of the ring that were read
    coalesced: int = 0  # of those, for keys that were to be sent anyway
    overflows: int = 0  # how often the ring had gone round, or the node had begun anew
    walks: int = 0  # over all rows
    sweeps: int = 0  # over all that the sink has
    commits: int = 0
    retries: int = 0  # how often the sink or the store had to be opened again
    behind: int = 0  # entries of the ring that wait
    walking: bool = False  # not all rows have been there yet
    sweeping: bool = False  # what the node does not have is still to be found; removing it waits until it has caught up
    through_ms: int = 0  # Unix milliseconds: what the node had then is in the sink; 0: not all of it yet
    error: str = ""  # of the last attempt; empty: all is well


class Moment(NamedTuple):
    """When a turn was begun: how often somebody had asked for all that there is, and the time."""

    asked: int = 0
    unix_ms: int = 0


class Session:
    """See the module. For one thread.

    Args:
        source: the node's store.
        sink: opened here.
        counts: added to.

    Raises:
        SinkError: the sink cannot be opened now.
        ModelError: it has no room for one of the tables.
    """

    def __init__(self, source: Source, sink: Sink, counts: FeedCounts) -> None:
        self._source = source
        self._sink = sink
        self._counts = counts
        self._entries = np.empty((ENTRIES_AT_ONCE, 2), np.uint64)
        self._tensors_due: set[str] = set()
        self._walk: Walk | None = None
        self._walk_again = False
        self._walked_s = 0.0
        self._walked: Moment | None = None  # when the walk began
        self._sweep: Sweep | None = None
        self._sweep_part: Keys | None = None
        self._dirty = True
        self._committed_s = self._known_s = time.monotonic()
        self._place = source.place()  # before anything of the rows
        cursor = decode(sink.open(source.model))
        self._known: Known | None = None if cursor is None else cursor.known
        self._sweep_due = cursor is None or cursor.sweep
        self._since_ms = time.time_ns() // 1_000_000
        self._tables = {} if cursor is None else dict(cursor.tables)
        self._new: set[str] = set()  # tables that came since the last walk began: no vector says anything of them
        self._offer_tables()
        way = way_from(cursor, self._place, source.capacity, source.shards)
        if way is Way.FOLLOW:
            assert cursor is not None
            self._place = cursor.place
        elif way is Way.EVERYTHING:
            self._known, self._sweep_due = None, True
        counts.walking, counts.sweeping = False, self._sweep_due
        if way is not Way.FOLLOW or self._new:
            self._begin_walk(None)

    @property
    def place(self) -> Place:
        """Up to where changes are in the sink."""
        return self._place

    def _offer_tables(self) -> None:
        """Have the sink know the tables that there are now; those that are not there any more go first."""
        there = {name: (spec.dim, spec.incarnation) for name, spec in self._source.specs.items()}
        for name, what in list(self._tables.items()):
            if there.get(name) != what:
                self._sink.drop_table(name)
                del self._tables[name]
        for name, what in there.items():
            self._sink.add_table(name, what[0])
            if self._tables.get(name) != what:
                self._tables[name] = what
                self._new.add(name)
        self._dirty = True

    def _see_tables(self) -> None:
        if self._source.refresh():
            self._offer_tables()

    def turn(self, moment: Moment) -> tuple[bool, Moment | None]:
        """Do a bounded part of what there is to do.

        Args:
            moment: now.

        Returns:
            Whether there was anything; and a moment of which the sink has all that the node had, and nothing else, or None.
        """
        self._see_tables()
        known = self._known_now()
        followed, at_head = self._follow(moment)
        walked = self._go_on(moment)
        self._send_tensors()
        up_to_date = at_head and self._walk is None
        if up_to_date and known is not None:
            self._known = known
        # While a walk is not over, the cursor of before stands: it is older, and so true.
        if self._walk is None and self._dirty and time.monotonic() - self._committed_s >= COMMIT_S:
            self.commit()
        if not up_to_date or self._sweep_due:
            return followed or walked, None
        return followed or walked, moment if self._place.breaks >= 0 else self._walked

    def _known_now(self) -> Known | None:
        """What the node knows, before changes are taken, if it is time to say so again."""
        now = time.monotonic()
        if self._walk is not None or not self._dirty or now - self._known_s < KNOWN_S:
            return None
        self._known_s = now
        return self._source.known()

    def commit(self) -> None:
        """Leave the cursor with the sink, unless not all rows have been there yet."""
        if self._walk is None and self._known is not None and self._dirty:
            self._sink.commit(encode(Cursor(self._place, self._known, self._tables, self._sweep_due)))
            self._committed_s = time.monotonic()
            self._dirty = False
            self._counts.commits += 1

    # --- what changes

    def _follow(self, moment: Moment) -> tuple[bool, bool]:
        """Send what was noted, up to a part of the ring; whether there was anything, and whether that was all."""
        now, counts = self._source.place(), self._counts
        if now.breaks != self._place.breaks:
            self._lose_sight(now, moment)
            return True, False
        if now.breaks < 0:  # the node keeps no ring: all rows are looked at, again and again
            # A sweep that goes on is not begun anew, or one that takes longer than the pause would never end.
            sweeps = self._sweep_due and self._sweep_part is None
            if self._walk is None and not sweeps and time.monotonic() - self._walked_s >= WALK_S:
                self._begin_walk(moment)
            return False, True
        if now.position == self._place.position:
            counts.behind = 0
            return False, True
        count = self._source.changes(self._place.position, self._entries)
        if count is None:
            self._lose_sight(now, moment)
            return True, False
        self._see_tables()  # after the entries were read: a table is in the manifest before it has a row
        counts.behind = now.position - self._place.position - count
        counts.noted += count
        self._send_noted(self._entries[:count])
        self._place = replace(self._place, position=self._place.position + count)
        return True, counts.behind <= 0

    def _send_noted(self, entries: U64) -> None:
        sent = 0
        tables, gone = entries[:, 1] & np.uint64(TABLE_MASK), entries[:, 1] >= np.uint64(GONE)
        for table in np.unique(tables).tolist():
            chosen = tables == table
            keys = np.unique(entries[chosen, 0])
            came_back = np.unique(entries[chosen & gone, 0]) if gone.any() else _NONE
            sent += keys.size
            self._send(Keys(table, keys), came_back)
        self._counts.coalesced += len(entries) - sent

    def _lose_sight(self, now: Place, moment: Moment) -> None:
        """Changes are missing: all rows are compared with what the sink has."""
        self._counts.overflows += 1
        self._place = now
        if self._walk is None:
            self._begin_walk(moment)
        else:  # of what it has passed, something may be missing: the next one begins with what this one ends with
            self._walk_again = True

    # --- all rows, and all that the sink has

    def _begin_walk(self, moment: Moment | None) -> None:
        """The ring is followed from a place that was read before."""
        self._walk, self._walked = Walk(self._source, self._known, frozenset(self._new)), moment
        self._offer_tables()  # the walk has looked which there are
        self._walk_again = False
        if self._walk.finds_removals:
            self._sweep_due, self._sweep, self._sweep_part = True, None, None
            self._since_ms = time.time_ns() // 1_000_000
        self._counts.walks += 1
        self._counts.walking, self._counts.sweeping, self._counts.through_ms = True, self._sweep_due, 0

    def _go_on(self, moment: Moment) -> bool:
        """One part of a walk, or else of a sweep; whether there was one."""
        if self._walk is None:
            return self._sweep_due and self._sweep_on()
        if (part := self._walk.next()) is not None:
            self._send(part, _NONE)
            return True
        self._known, self._dirty = self._walk.known, True
        self._walked_s = time.monotonic()
        self._committed_s = 0.0  # at once: to begin it again takes longest of all
        self._new -= self._walk.new
        self._walk = None
        self._counts.walking = False
        if self._walk_again:
            self._begin_walk(moment)
        return True

    def _sweep_on(self) -> bool:
        if self._sweep is None:
            self._sweep = Sweep(self._source, self._sink)
            self._counts.sweeps += 1
        part = self._sweep_part or self._sweep.next()
        self._sweep_part = None
        if part is None:
            self._sweep, self._sweep_due, self._dirty = None, False, True
            self._counts.sweeping = False
            return True
        if part.table not in self._source.tables:
            return True
        batch = difference(self._source.read(part.table, part.keys, _NONE), part)
        # What a node that has just come lacks may be on its way; until it has caught up, the sink keeps it.
        if batch.forgotten.keys.size and not self._source.synced_since(self._since_ms):
            self._sweep_part = part
            return False
        self._apply(batch)
        return True

    # --- to the sink

    def _send(self, wanted: Keys, came_back: U64) -> None:
        """Read keys in their newest versions, and apply them in batches."""
        view = self._source.tables.get(wanted.table)
        if view is None:  # dropped, not chosen, or newer than the manifest that we know: then a walk follows
            return
        if wanted.table == DENSE_SPEC.id:
            self._note_tensors(wanted.keys)
            return
        at_once = rows_at_once(view.spec.dim)
        for begin in range(0, wanted.keys.size, at_once):
            keys = wanted.keys[begin : begin + at_once]
            back = came_back[np.isin(came_back, keys)] if came_back.size else came_back
            self._apply(self._source.read(wanted.table, keys, back))

    def _apply(self, batch: Batch) -> None:
        if not batch.size:
            return
        self._dirty = True
        self._sink.apply(batch)
        counts = self._counts
        counts.batches += 1
        counts.rows += batch.keys.size
        counts.deleted += batch.deleted.keys.size
        counts.forgotten += batch.forgotten.keys.size

    def _note_tensors(self, keys: U64) -> None:
        for name, spec in self._source.tensors.items():
            if name not in self._tensors_due and np.isin(spec.keys, keys).any():
                self._tensors_due.add(name)

    def _send_tensors(self) -> None:
        for name in sorted(self._tensors_due):
            tensor = self._source.tensor(name)
            if tensor is not None and (values := tensor.values()) is not None:  # else the rest of it is noted when it comes
                self._dirty = True
                self._sink.apply_dense(name, values, tensor.stamp)
                self._counts.tensors += 1
        self._tensors_due.clear()
