"""A step cut into messages: one or more for each tree (R1), each of at most so many bytes (R7).

Whole shards are packed together; a shard too large for one message travels as numbered parts. Live rows stay before tombstones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2p import messages as m
from p2p.classes import NOT_KNOWN
from p2p.errors import LocalProtocolError
from p2p.placement import take
from p2p.replica import U64, RowColumns

# A shard's part number is 16 bits on the wire.
PARTS_MAX = 65_535


def split_step(batch: m.Batch, shard_of: Sequence[NDArray[np.int64]], bytes_max: int) -> Iterator[m.Batch]:
    """Cut a step into messages: one or more for each tree (R1), of at most `bytes_max` payload (R7).

    Args:
        batch: the whole step; or a group, which is at most one message for each tree.
        shard_of: int64[n] for each of its sections.
        bytes_max: payload bytes of a message; at least one row goes into each.
    """
    if batch.trees == 1:
        yield from _split_by_size(batch, shard_of, bytes_max)
        return
    tree_of_claim = batch.claims.shards % batch.trees
    for tree in np.unique(tree_of_claim).tolist():
        claimed = np.flatnonzero(tree_of_claim == tree)
        chosen = [np.flatnonzero(shards % batch.trees == tree) for shards in shard_of]
        columns = tuple(take(section, rows) for section, rows in zip(batch.columns, chosen, strict=True) if len(rows))
        its_shards = [shards[rows] for shards, rows in zip(shard_of, chosen, strict=True) if len(rows)]
        whole = batch.claims
        claims = m.ShardClaims(
            whole.shards[claimed],
            whole.prev[claimed],
            whole.part[claimed],
            whole.parts[claimed],
            None if whole.until is None else whole.until[claimed],
        )
        steps = None if batch.steps is None else _steps_of(batch.steps, columns)
        yield from _split_by_size(replace(batch, claims=claims, columns=columns, steps=steps), its_shards, bytes_max)


def _steps_of(steps: m.Steps, columns: Sequence[RowColumns]) -> m.Steps:
    """The steps of a group, of which these are the rows."""
    rows = np.zeros(len(steps.stamps), np.int64)
    for section in columns:
        rows += np.bincount(np.searchsorted(steps.stamps, stamps_of(section)), minlength=len(rows))
    return replace(steps, rows=rows)


def _split_by_size(batch: m.Batch, shard_of: Sequence[NDArray[np.int64]], bytes_max: int) -> Iterator[m.Batch]:
    """Whole shards are packed together; a shard that exceeds the limit alone travels as parts (R7)."""
    if sum(section.payload_bytes for section in batch.columns) <= bytes_max:
        yield batch
        return
    assert batch.steps is None, "a group is cut in parts"
    # Rows by shard; the order is stable, so live rows stay before tombstones.
    order = [np.argsort(shards, kind="stable") for shards in shard_of]
    starts = [np.searchsorted(shards[rows], batch.claims.shards) for shards, rows in zip(shard_of, order, strict=True)]
    ends = [np.searchsorted(shards[rows], batch.claims.shards, "right") for shards, rows in zip(shard_of, order, strict=True)]
    group: list[_Piece] = []
    room = bytes_max
    for index in range(len(batch.claims.shards)):
        chosen = [rows[start[index] : end[index]] for rows, start, end in zip(order, starts, ends, strict=True)]
        for piece in _pieces_of_shard(batch.columns, chosen, index, bytes_max):
            # Two parts of one shard never share a message: its claim has room for one part of each shard.
            if group and (piece.bytes > room or group[-1].index == index):
                yield _message_of(batch, group)
                group, room = [], bytes_max
            group.append(piece)
            room -= piece.bytes
    yield _message_of(batch, group)


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """The rows of one shard, or a part of them, on their way into a message."""

    index: int  # of the shard among the step's claims
    part: int
    parts: int
    columns: list[RowColumns]

    @property
    def bytes(self) -> int:
        return sum(section.payload_bytes for section in self.columns)


def _pieces_of_shard(
    columns: Sequence[RowColumns], chosen: Sequence[NDArray[np.int64]], index: int, bytes_max: int
) -> list[_Piece]:
    parts: list[list[RowColumns]] = [[]]
    room = bytes_max
    for section, rows in zip(columns, chosen, strict=True):
        row_bytes = 12 + section.rows.shape[1]  # key, class, value, and a little to spare
        while len(rows):
            if room < row_bytes and parts[-1]:
                parts.append([])
                room = bytes_max
            taken = rows[: max(1, room // row_bytes)]
            rows = rows[len(taken) :]
            parts[-1].append(take(section, taken))
            room -= len(taken) * row_bytes
    if len(parts) > PARTS_MAX:
        raise LocalProtocolError(
            f"a step needs {len(parts)} parts for one shard, limit {PARTS_MAX}: publish it in several steps"
        )
    return [_Piece(index, part, len(parts), rows) for part, rows in enumerate(parts)]


def _message_of(batch: m.Batch, group: Sequence[_Piece]) -> m.Batch:
    indices = [piece.index for piece in group]
    claims = m.ShardClaims(
        batch.claims.shards[indices],
        batch.claims.prev[indices],
        np.array([piece.part for piece in group], np.uint16),
        np.array([piece.parts for piece in group], np.uint16),
    )
    by_table: dict[int, list[RowColumns]] = {}
    for piece in group:
        for section in piece.columns:
            by_table.setdefault(section.table, []).append(section)
    return replace(batch, claims=claims, columns=tuple(join_sections(sections) for sections in by_table.values()))


def join_sections(sections: Sequence[RowColumns], stamps: Sequence[int] = ()) -> RowColumns:
    """Sections of one table as one, tombstones to the end; `stamps`: of each, which its rows get."""
    if len(sections) == 1 and not stamps:
        return sections[0]
    order = _live_first(sections)
    counts = [len(section.keys) for section in sections]
    known = any(section.priority is not None for section in sections)
    return RowColumns(
        sections[0].table,
        _column([section.keys for section in sections], order),
        # Where a step only deletes, rows that are not there may have any width.
        np.concatenate([section.rows for section in sections if len(section.rows)] or [sections[0].rows]),
        _column([np.repeat(np.array(stamps, np.uint64), counts)], order) if stamps else None,
        _column([priority_of(section) for section in sections], order) if known else None,
    )


def join_columns(sections: Sequence[RowColumns], of_each: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """What is said of each row of these sections, in the order in which `join_sections` has them."""
    return _column(of_each, _live_first(sections))


def _live_first(sections: Sequence[RowColumns]) -> NDArray[np.int64] | None:
    """int64[n]: an order in which all live rows come before the tombstones; None: they do already."""
    if all(len(section.rows) == len(section.keys) for section in sections[:-1]):
        return None
    live = np.concatenate([np.arange(len(section.keys)) < len(section.rows) for section in sections])
    return np.concatenate([np.flatnonzero(live), np.flatnonzero(~live)])


def _column(arrays: Sequence[NDArray[Any]], order: NDArray[np.int64] | None) -> NDArray[Any]:
    joined = np.concatenate(arrays)
    return joined if order is None else joined[order]


def stamps_of(section: RowColumns) -> U64:
    """The stamps of rows that have some of their own."""
    assert section.stamps is not None, "rows without stamps"
    return section.stamps


def priority_of(section: RowColumns) -> NDArray[np.uint8]:
    """The classes of its rows, also where they are not known."""
    return np.full(len(section.keys), NOT_KNOWN, np.uint8) if section.priority is None else section.priority
