"""Which rows still have to go to somebody, in what order, and never their bytes.

A pigeonhole for each row says whether it is due and how much it matters; the queues say in which order to look at the
pigeonholes. A row that changes while it is due stays one entry, and its newest value is read when it leaves: that is all there
is to coalescing. Rows are columns here: a place (slot and slot epoch, R18), a class, and when it became due.

Order. A queue for each *band* of 16 classes (a factor of four in priority), first in, first out. Of each room that is to be
filled, what was taken back goes first, whatever else there is; then a fifth of the room is filled with whatever has waited
longest, so that the recorded cycle ends under any load (R16); where that is less than a row, one room in a few has one. The
rest goes by priority, significant before ordinary, where a band counts as one more for each `AGE_MS` that its first row has
waited longer than another's.

A row may stand in several queues, when it came to matter more while it waited; it leaves with the first of them, and the others
find its pigeonhole empty. When those are too many, the queues are made anew.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2p.classes import NOT_KNOWN, SIGNIFICANT, TAKEN_BACK
from p2p.replica import SLOT_MASK

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

BAND_CLASSES = 16
BANDS = 256 // BAND_CLASSES + 1  # the last is of what was taken back alone
# What nobody knows the class of is ordinary, and in the middle of what is.
ORDINARY = SIGNIFICANT // 2
# So much longer a row has to wait to stand beside one that matters four times as much.
AGE_MS = 2_000
# Of what leaves, in order of age (R16).
IN_ORDER_SHARE = 0.2
# Beside its value a row has a key, a stamp and a class.
ROW_BYTES = 17
# Entries of the queues that are of rows which left, before they are made anew.
DEAD_MAX = 1 << 12

_NOTHING, _FIRST, _SECOND = range(3)  # what a pigeonhole holds: nothing, or a row of one of two cycles that take turns


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """Rows of one table that leave now."""

    table: int
    places: I64  # [n], no repeats
    classes: U8  # [n], the largest that each had since it left last


class _Table:
    """The pigeonholes of one table, by slot; memory that is never touched is never there."""

    def __init__(self, table: int, row_bytes: int) -> None:
        self.table, self.row_bytes = table, row_bytes + ROW_BYTES
        self.state = np.zeros(0, np.uint8)
        self.classes = np.zeros(0, np.uint8)

    def reach(self, slots: int) -> None:
        """Have a pigeonhole for so many slots."""
        if len(self.state) < slots:
            size = max(slots, 2 * len(self.state), 1_024)
            state, classes = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
            state[: len(self.state)], classes[: len(self.classes)] = self.state, self.classes
            self.state, self.classes = state, classes


class _Queue:
    """Entries of one band, oldest first: which table, which place, since when."""

    def __init__(self) -> None:
        self._tables, self._places, self._since = np.empty(64, np.uint16), np.empty(64, np.int64), np.empty(64, np.int64)
        self._begin = self._end = 0

    def __len__(self) -> int:
        return self._end - self._begin

    @property
    def head_ms(self) -> int:
        """Since when the first has waited."""
        return int(self._since[self._begin])

    def columns(self) -> tuple[NDArray[np.uint16], I64, I64]:
        """Tables, places and moments of all of them."""
        held = slice(self._begin, self._end)
        return self._tables[held], self._places[held], self._since[held]

    def append(self, tables: NDArray[np.uint16] | int, places: I64, since: I64 | int) -> None:
        """Put some to the end."""
        end = self._end + len(places)
        if end > len(self._places):
            self._make_room(len(places))
            end = self._end + len(places)
        self._tables[self._end : end] = tables
        self._places[self._end : end] = places
        self._since[self._end : end] = since
        self._end = end

    def pop(self, count: int, until_ms: int) -> tuple[NDArray[np.uint16], I64]:
        """The first `count` at most, of those that have waited since `until_ms` or longer; one at least."""
        until = int(np.searchsorted(self._since[self._begin : self._end], until_ms, "right"))
        end = self._begin + max(1, min(count, until))
        popped = self._tables[self._begin : end], self._places[self._begin : end]
        self._begin = end
        return popped

    def clear(self) -> None:
        self._begin = self._end = 0

    def _make_room(self, more: int) -> None:
        held = len(self)
        size = len(self._places)
        while size < 2 * (held + more):
            size *= 2
        for name in ("_tables", "_places", "_since"):
            column = getattr(self, name)
            larger = np.empty(size, column.dtype)
            larger[:held] = column[self._begin : self._end]
            setattr(self, name, larger)
        self._begin, self._end = 0, held


class DueRows:
    """Rows that are due, of all tables of a keyspace."""

    def __init__(self) -> None:
        self.rows = 0
        self.bytes = 0  # of them, as they would travel
        self.recorded = 0  # of them, those that became due before `record`
        self._tables: list[_Table] = []
        self._numbers: dict[int, int] = {}  # table -> its place in the list
        self._queues = [_Queue() for _ in range(BANDS)]
        self._cycle = _FIRST
        self._in_order = 0.0  # bytes of what has waited longest that are to leave next

    def add(self, table: int, row_bytes: int, places: I64, classes: U8 | None, now_ms: int) -> int:
        """These rows have changed, or were selected.

        Args:
            table: its id.
            row_bytes: of one encoded row.
            places: int64[n]; -1: not here.
            classes: uint8[n]; None: not known.
            now_ms: monotonic.

        Returns:
            Bytes that need not be sent, since the row was due already.
        """
        here = places >= 0
        known = np.full(len(places), NOT_KNOWN, np.uint8) if classes is None else classes
        places, known = places[here], known[here]
        if not len(places):
            return 0
        order = np.argsort(known, kind="stable")  # of a place that comes twice the larger class is the last
        unique, last = np.unique(places[order][::-1], return_index=True)
        known = known[order][::-1][last]
        held = self._table(table, row_bytes)
        slots = unique & SLOT_MASK
        held.reach(int(slots.max()) + 1)
        fresh = held.state[slots] == _NOTHING
        known = np.where(known == NOT_KNOWN, ORDINARY, known).astype(np.uint8)
        before = held.classes[slots]
        known = np.maximum(before, known)
        raised = ~fresh & (_bands(known) > _bands(before))
        held.classes[slots] = known
        held.state[slots[fresh]] = self._cycle
        self._enqueue(self._numbers[table], unique, known, fresh | raised, now_ms)
        count = int(np.count_nonzero(fresh))
        self.rows += count
        self.bytes += count * held.row_bytes
        self._tidy()
        return (len(unique) - count) * held.row_bytes

    def record(self) -> None:
        """All that is due now is of the cycle that begins here, and nothing that comes later."""
        assert not self.recorded, "a cycle ends before the next begins"
        self.recorded, self._cycle = self.rows, _FIRST + _SECOND - self._cycle

    def take(self, bytes_max: int) -> list[Taken]:
        """Rows that leave now, until they fill `bytes_max`, one at least; they are due no more until they change again."""
        taken: list[Taken] = []
        room = self._fill(bytes_max, taken, self._taken_back, 0)
        if room > 0:
            room -= self._take_in_order(room, taken)
        if room > 0:
            self._fill(room, taken, self._preferred, AGE_MS)
        return taken

    def take_significant(self, bytes_max: int) -> list[Taken]:
        """The same of significant rows, and of what was taken back, alone; none if there are none."""
        taken: list[Taken] = []
        room = self._fill(bytes_max, taken, self._taken_back, 0)
        self._fill(room, taken, self._significant, AGE_MS)
        return taken

    def _take_in_order(self, room: int, taken: list[Taken]) -> int:
        """Its share of the room leaves in order of age (R16), as soon as that is a row; returns the bytes.

        Narrow links send one or two rows at a time: a row in order with each would be half of all, and not a fifth.
        """
        self._in_order += IN_ORDER_SHARE * room
        if self._in_order < self._row_bytes_max():
            return 0
        share = int(self._in_order)
        left = self._fill(share, taken, self._waiting, 0)
        self._in_order = min(0.0, float(left))  # nothing is saved up by an empty table
        return share - left

    def _row_bytes_max(self) -> int:
        return max((held.row_bytes for held in self._tables), default=0)

    def clear(self) -> None:
        """Nothing is due any more. What is known of how much rows matter stays: who selects them again knows no classes."""
        for queue in self._queues:
            queue.clear()
        for held in self._tables:
            held.state[:] = _NOTHING
        self.rows = self.bytes = self.recorded = 0

    def since_ms(self) -> dict[str, int]:
        """How long the oldest row has waited, for taken-back, significant and ordinary rows; none without any."""
        names = {"ordinary": range(SIGNIFICANT // BAND_CLASSES)}
        names |= {"significant": range(SIGNIFICANT // BAND_CLASSES, BANDS - 1), "taken_back": range(BANDS - 1, BANDS)}
        oldest = {name: [moment for band in bands for moment in self._alive_since(band)] for name, bands in names.items()}
        return {name: min(moments) for name, moments in oldest.items() if moments}

    @property
    def urgency(self) -> int:
        """2: something was taken back; 1: something is significant; 0: all is ordinary; -1: nothing is due."""
        if not self.rows:
            return -1
        if len(self._queues[-1]):
            return 2
        return int(any(len(queue) for queue in self._queues[SIGNIFICANT // BAND_CLASSES :]))

    def _alive_since(self, band: int) -> Iterator[int]:
        tables, places, since = self._queues[band].columns()
        alive = np.flatnonzero(self._are_due(tables, places))
        if len(alive):
            yield int(since[alive[0]])

    def _table(self, table: int, row_bytes: int) -> _Table:
        number = self._numbers.get(table)
        if number is None:
            number = self._numbers[table] = len(self._tables)
            self._tables.append(_Table(table, row_bytes))
        return self._tables[number]

    def _enqueue(self, number: int, places: I64, classes: U8, wanted: NDArray[np.bool_], now_ms: int) -> None:
        bands = _bands(classes)
        for band in np.unique(bands[wanted]).tolist():
            self._queues[band].append(number, places[wanted & (bands == band)], now_ms)

    def _waiting(self) -> list[int]:
        return [band for band, queue in enumerate(self._queues) if len(queue)]

    def _preferred(self) -> list[int]:
        """Bands of which one is next: significant ones, if there are any."""
        return self._significant() or self._waiting()

    def _taken_back(self) -> list[int]:
        return [BANDS - 1] if len(self._queues[-1]) else []

    def _significant(self) -> list[int]:
        return [band for band in self._waiting() if band >= SIGNIFICANT // BAND_CLASSES]

    def _fill(self, room: int, taken: list[Taken], choose: Callable[[], list[int]], age_ms: int) -> int:
        """Take rows of the chosen bands, whose first has waited longest, a band counting for so long; returns the room left."""
        while room > 0 and (bands := choose()):
            moments = sorted((self._queues[band].head_ms - band * age_ms, band) for band in bands)
            best = moments[0][1]
            until_ms = moments[1][0] + best * age_ms if len(moments) > 1 else 1 << 62
            room -= self._leave(*self._queues[best].pop(max(1, room // self._row_bytes_max()), until_ms), taken)
        return room

    def _leave(self, tables: NDArray[np.uint16], places: I64, taken: list[Taken]) -> int:
        """Those of the entries that are due leave; returns their bytes."""
        bytes_before = self.bytes
        for number in np.unique(tables).tolist():
            held = self._tables[number]
            chosen = np.unique(places[tables == number])
            chosen = chosen[held.state[chosen & SLOT_MASK] != _NOTHING]
            if not len(chosen):
                continue
            slots = chosen & SLOT_MASK
            self.recorded -= int(np.count_nonzero(held.state[slots] != self._cycle))
            taken.append(Taken(held.table, chosen, held.classes[slots]))
            held.state[slots] = _NOTHING
            held.classes[slots] = NOT_KNOWN
            self.rows -= len(chosen)
            self.bytes -= len(chosen) * held.row_bytes
        return bytes_before - self.bytes

    def _are_due(self, tables: NDArray[np.uint16], places: I64) -> NDArray[np.bool_]:
        due = np.zeros(len(places), np.bool_)
        for number in np.unique(tables).tolist():
            of_table = tables == number
            due[of_table] = self._tables[number].state[places[of_table] & SLOT_MASK] != _NOTHING
        return due

    def _tidy(self) -> None:
        """Make the queues anew when most of what stands in them has left, or stands in another one, too."""
        if sum(map(len, self._queues)) <= 2 * self.rows + DEAD_MAX:
            return
        for band, queue in enumerate(self._queues):
            tables, places, since = queue.columns()
            kept = self._are_due(tables, places)
            for number in np.unique(tables).tolist():
                of_table = tables == number
                kept[of_table] &= _bands(self._tables[number].classes[places[of_table] & SLOT_MASK]) == band
            tables, places, since = tables[kept], places[kept], since[kept]
            # Of a row that stands here several times, the first entry counts.
            _, first = np.unique(np.stack([tables.astype(np.int64), places]), axis=1, return_index=True)
            first.sort()
            tables, places, since = tables[first], places[first], since[first]  # copies
            queue.clear()
            queue.append(tables, places, since)


def _bands(classes: U8) -> NDArray[np.uint8]:
    """uint8[n]: the band of each class."""
    bands: NDArray[np.uint8] = classes // BAND_CLASSES + (classes == TAKEN_BACK)
    return bands
