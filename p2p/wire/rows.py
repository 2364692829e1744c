"""Rows on the wire: sections of one table each, in all messages that carry rows."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2p import classes
from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.replica import U64, RowColumns
from p2p.stamps import WRITERS_MAX
from p2p.wire.columns import FLOAT32, NO_SHARDS, UINT8, UINT16, UINT32, UINT64, Columns, take_shards, take_stamps, take_writers
from p2p.wire.kind import Header, Packed
from p2p.wire.limits import SECTIONS_MAX
from p2p.wire.values import items, uint

_HAS_STAMPS: Final = 1
_HAS_SIGNIFICANCE: Final = 2  # version 1: float32[n], in a scale of its own
_HAS_PRIORITY: Final = 4  # since version 2: uint8[n]
PRIORITY_SINCE: Final = 2
# How rows are encoded is a fact of the schema, on which nodes agree before they send any; the field is 0 in all versions.
_CODEC_OF_SCHEMA: Final = 0


def pack_sections(columns: Sequence[RowColumns], version: int, steps: m.Steps | None = None) -> Packed:
    """Of a group, rows are in the order of their steps, and runs stand for their stamps: 1,000 rows have one, in four bytes."""
    header: Header = []
    arrays: list[NDArray[Any]] = []
    for section in columns:
        own_stamps = section.stamps is not None and steps is None
        flags = _HAS_STAMPS if own_stamps else 0
        if section.priority is not None:
            flags |= _HAS_SIGNIFICANCE if version < PRIORITY_SINCE else _HAS_PRIORITY
        live, row_bytes = section.rows.shape
        header.append([section.table, len(section.keys), live, row_bytes, _CODEC_OF_SCHEMA, flags])
        arrays.append(np.ascontiguousarray(section.keys))
        if steps is not None:
            arrays.append(_runs_of(section, steps.stamps))
        elif section.stamps is not None:
            arrays.append(np.ascontiguousarray(section.stamps))
        if section.priority is not None:
            arrays.append(
                _significance_of(section.priority) if version < PRIORITY_SINCE else np.ascontiguousarray(section.priority)
            )
        arrays.append(np.ascontiguousarray(section.rows))
    return header, arrays


def _significance_of(priority: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What version 1 has for a class: a weight, 1 at the threshold."""
    return np.exp2((priority.astype(np.float32) - classes.SIGNIFICANT) / classes.PER_DOUBLING)


def _runs_of(section: RowColumns, stamps: U64) -> NDArray[np.uint32]:
    """uint32[2 * s]: how many rows each step of a group has among the live ones, then among the tombstones."""
    assert section.stamps is not None, "a group's rows have stamps"
    live, deleted = np.split(section.stamps, [len(section.rows)])
    ends = [np.searchsorted(part, stamps, "right") for part in (live, deleted)]
    return np.concatenate([np.diff(end, prepend=0) for end in ends]).astype(np.uint32)


def _take_runs(columns: Columns, steps: m.Steps, live: int, count: int) -> U64:
    """Their stamps; and `steps.rows` is told how many they are."""
    size = len(steps.stamps)
    runs = columns.take(UINT32, 2 * size).astype(np.int64)
    if int(runs[:size].sum()) != live or int(runs[size:].sum()) != count - live:
        raise RemoteProtocolError(f"rows of {size} steps are not {live} live ones of {count}")
    np.add(steps.rows, runs.reshape(2, size).sum(axis=0), out=steps.rows)
    return np.repeat(np.tile(steps.stamps, 2), runs)


def unpack_sections(value: object, columns: Columns, with_stamps: bool, steps: m.Steps | None = None) -> tuple[RowColumns, ...]:
    """Rows with stamps of their own, without any, or with those of a group's steps."""

    def parse(item: Header) -> RowColumns:
        table, count, live, row_bytes, codec, flags = item
        uint(table, 32), uint(count, 32), uint(live, 32), uint(row_bytes, 24), uint(flags, 3)
        if codec != _CODEC_OF_SCHEMA:
            raise RemoteProtocolError(f"unknown codec {codec!r}"[:80])
        if live > count or not row_bytes or bool(flags & _HAS_STAMPS) != with_stamps:
            raise RemoteProtocolError("rows that contradict themselves")
        keys = columns.take(UINT64, count)
        if steps is None:
            stamps = columns.take(UINT64, count) if flags & _HAS_STAMPS else None
        else:
            stamps = _take_runs(columns, steps, live, count)
        if flags & _HAS_SIGNIFICANCE:
            columns.take(FLOAT32, count)  # of what scale it is, version 1 does not say
        priority = columns.take(UINT8, count) if flags & _HAS_PRIORITY else None
        rows = columns.take(UINT8, live * row_bytes).reshape(live, row_bytes)
        return RowColumns(table, keys, rows, stamps, priority)

    return items(value, SECTIONS_MAX, parse)


def take_bindings(columns: Columns, count: object) -> tuple[NDArray[np.uint16], U64]:
    """Writers, and the nonces that they are bound to."""
    who, nonces = columns.take(UINT16, uint(count, 32)), columns.take(UINT64, uint(count, 32))
    if len(who) and int(who.max()) >= WRITERS_MAX:
        raise RemoteProtocolError(f"a nonce of writer {int(who.max())}")
    return who, nonces


def pack_whole(reply: m.PullReply | m.ShardsReply) -> Packed:
    """Of shards that come whole: how many of them, and in the floor; and the columns."""
    if not len(reply.whole) and reply.floor is None:
        return [], []
    floor = reply.floor
    if floor is None:
        return [len(reply.whole)], [reply.whole]
    sizes = [len(reply.whole), len(floor.shards), len(floor.writers)]
    return sizes, [reply.whole, floor.shards, floor.writers, np.ascontiguousarray(floor.stamps)]


def take_whole(sizes: Any, columns: Columns) -> tuple[NDArray[np.uint32], m.Floor | None]:
    """Shards that come whole, and their floor."""
    if not isinstance(sizes, list) or len(sizes) not in (0, 1, 3):
        raise RemoteProtocolError(f"sizes of whole shards: {sizes!r}"[:200])
    if not sizes:  # as a rule, and in version 1
        return NO_SHARDS, None
    whole = take_shards(columns, sizes[0])
    if len(sizes) < 3:
        return whole, None
    shards, writers = take_shards(columns, sizes[1]), take_writers(columns, sizes[2])
    return whole, m.Floor(shards, writers, take_stamps(columns, len(shards), writers))
