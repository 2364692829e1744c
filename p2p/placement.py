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
    """The same, also when we cannot tell yet: a hello and nodes of version 1 leave out what a node holds."""
    untold = record.told < HOLDS_SINCE <= record.protocol
    return holds(record, place) or untold


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
    """
    parts: dict[int, list[RowColumns]] = {}
    for section, belongs in zip(columns, partition_of, strict=True):
        # The order is stable, so live rows stay before tombstones.
        order = np.argsort(belongs, kind="stable")
        ends = np.searchsorted(belongs[order], np.arange(partitions), "right")
        for partition, rows in enumerate(np.split(order, ends[:-1])):
            if len(rows):
                parts.setdefault(partition, []).append(take(section, rows))
    return {partition: tuple(parts[partition]) for partition in sorted(parts)}


def take(section: RowColumns, indices: NDArray[np.int64]) -> RowColumns:
    """Some rows of a section, in order; live rows come before tombstones, so they stay so."""
    live = indices[indices < len(section.rows)]
    priority = None if section.priority is None else section.priority[indices]
    stamps = None if section.stamps is None else section.stamps[indices]
    return RowColumns(section.table, section.keys[indices], section.rows[live], stamps, priority)
