"""Which node holds which part of a family, and how a step is divided among the parts (R22).

A family of keyspaces is held whole by everybody as long as it has one partition. Where it has several, each node says in its
member record which of them it holds. Who says nothing of such a family holds nothing of it: its record came before the family
did, or it runs a version that knows no partitions.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from p2p.messages import Holding, MemberRecord
from p2p.replica import Place, RowColumns

# The protocol version in which a record says what its node holds.
HOLDS_SINCE = 2


def holds(record: MemberRecord, place: Place) -> bool:
    """Whether the node with this record holds the keyspace at `place`."""
    if place.partitions == 1:
        return True
    return any(
        holding.family == place.family and holding.partitions == place.partitions and place.partition in holding.held
        for holding in record.holds
    )


def may_hold(record: MemberRecord, place: Place) -> bool:
    """The same, also when we cannot tell yet."""
    return holds(record, place) or is_short(record)


def is_short(record: MemberRecord) -> bool:
    """Whether a record lacks what its node holds, though it says so itself: a hello and nodes of version 1 leave it out."""
    return record.told < HOLDS_SINCE <= record.protocol


def holdings_of(places: Iterable[Place]) -> tuple[Holding, ...]:
    """What a node that holds keyspaces at these places says of it."""
    held: dict[tuple[int, int], list[int]] = {}
    for place in places:
        if place.partitions > 1:
            held.setdefault((place.family, place.partitions), []).append(place.partition)
    return tuple(Holding(*family, tuple(sorted(partitions))) for family, partitions in sorted(held.items()))


def divide(
    columns: Sequence[RowColumns], partition_of: Sequence[NDArray[np.int64]], partitions: int
) -> dict[int, tuple[RowColumns, ...]]:
    """The rows of a step by partition, ascending; partitions that it does not touch are left out.

    Args:
        columns: without stamps of their own.
        partition_of: int64[n] for each of them.
        partitions: of the family.

    Returns:
        Partition -> its rows; where a section has the rows of each partition together, in ascending order, they are not copied.
    """
    parts: dict[int, list[RowColumns]] = {}
    for section, belongs in zip(columns, partition_of, strict=True):
        ends = np.cumsum(np.bincount(belongs, minlength=partitions))
        together = bool((belongs[1:] >= belongs[:-1]).all())
        # The order is stable, so live rows stay before tombstones. NumPy counts numbers of 16 bits instead of comparing them.
        order = None if together else np.argsort(belongs.astype(np.uint16), kind="stable")
        begin = 0
        for partition, end in enumerate(ends.tolist()):
            if end > begin:
                part = _slice(section, begin, end) if order is None else take(section, order[begin:end])
                parts.setdefault(partition, []).append(part)
            begin = end
    return {partition: tuple(parts[partition]) for partition in sorted(parts)}


def _slice(section: RowColumns, begin: int, end: int) -> RowColumns:
    """The rows of a section from `begin` to `end`, uncopied."""
    priority = None if section.priority is None else section.priority[begin:end]
    stamps = None if section.stamps is None else section.stamps[begin:end]
    return RowColumns(section.table, section.keys[begin:end], section.rows[begin:end], stamps, priority)


def take(section: RowColumns, indices: NDArray[np.int64]) -> RowColumns:
    """Some rows of a section, in order; live rows come before tombstones, so they stay so."""
    live = indices[indices < len(section.rows)]
    priority = None if section.priority is None else section.priority[indices]
    stamps = None if section.stamps is None else section.stamps[indices]
    # `take` goes row by row; an index into the array goes value by value.
    return RowColumns(section.table, section.keys[indices], section.rows.take(live, axis=0), stamps, priority)
