"""Columns of rows as records of the log have them, with stamps: cut to a stretch of time, joined, laid over one another."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from p2p.placement import take
from p2p.replica import RowColumns
from p2p.stamps import WRITER_MASK

U64 = NDArray[np.uint64]

# Rows that are applied with one call.
BATCH_ROWS: Final = 1 << 15


def batches(rows: NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """Cut records with so many rows each into runs of about `BATCH_ROWS`."""
    ends = np.cumsum(rows.astype(np.int64))
    begin = 0
    while begin < len(rows):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + BATCH_ROWS, "right")))
        yield begin, end
        begin = end


def stamps_in(rows: RowColumns) -> U64:
    """uint64[n]: each has one of its own."""
    assert rows.stamps is not None, "a record's rows have stamps"
    return rows.stamps


def up_to(rows: RowColumns, cut: int, above: int = 0) -> RowColumns:
    """Those with stamps above one cut and up to another."""
    stamps = stamps_in(rows)
    kept = (stamps <= np.uint64(cut)) & (stamps > np.uint64(above))
    return rows if kept.all() else take(rows, np.flatnonzero(kept))


def not_by(rows: RowColumns, writers: U64) -> RowColumns:
    """Those that none of these writers wrote."""
    return take(rows, np.flatnonzero(~np.isin(stamps_in(rows) & np.uint64(WRITER_MASK), writers)))


def join(table: int, parts: Sequence[RowColumns]) -> RowColumns:
    """Rows of one table as one: live ones first."""
    if len(parts) == 1:
        return parts[0]
    lives = [len(part.rows) for part in parts]
    keys = [part.keys[:live] for part, live in zip(parts, lives, strict=True)]
    keys += [part.keys[live:] for part, live in zip(parts, lives, strict=True)]
    stamps = [stamps_in(part)[:live] for part, live in zip(parts, lives, strict=True)]
    stamps += [stamps_in(part)[live:] for part, live in zip(parts, lives, strict=True)]
    rows = [part.rows for part in parts if len(part.rows)]
    return RowColumns(
        table,
        np.concatenate(keys),
        np.concatenate(rows) if rows else np.empty((0, parts[0].rows.shape[1]), np.uint8),
        np.concatenate(stamps),
    )


def overlay(rows: RowColumns, keys: U64, stamps: U64, live: NDArray[np.bool_], data: NDArray[np.uint8]) -> None:
    """Put newer versions of sorted keys in their places; a key may come again, the newest counts."""
    if not len(keys):
        return
    theirs = stamps_in(rows)
    place = np.minimum(np.searchsorted(keys, rows.keys), len(keys) - 1)
    newer = np.flatnonzero((keys[place] == rows.keys) & (theirs > stamps[place]))
    newer = newer[np.argsort(theirs[newer], kind="stable")]  # of those that are written twice the last one stays
    stamps[place[newer]] = theirs[newer]
    has_row = newer < len(rows.rows)
    # Whether the newest of a key has a row is known only when all are in their places.
    live[place[newer]] = has_row
    data[place[newer]] = 0
    which = newer[has_row]
    if len(which):  # of deletions alone the rows that there are none of have any width
        last = theirs[which] == stamps[place[which]]
        data[place[which[last]]] = rows.rows[which[last]]
