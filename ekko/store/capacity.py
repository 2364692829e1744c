"""How much memory a model may take, and what is told to whom when that is reached.

What counts is what stands: the header, the loss floor in it whether or not anything was dropped yet, and of every table,
`_dense` included, the pages of all slots given out, free ones too, the index, and what readers count. Rows never move, so
memory that a table has stays its own, and free slots are for later rows of the same table.
While an index is built anew, the old one stands beside it and is not counted; nor is the ring of changes, 1 MiB at most.

A step of a publisher here that has no room is refused whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ekko.errors import PublishError
from ekko.model import DENSE_SPEC
from ekko.store import layout
from ekko.store.table import INDEX_LOAD_BEGIN, INDEX_LOAD_CLEAN, INDEX_LOG2_MIN, Table, index_log2_for
from p2p.replica import RowColumns

if TYPE_CHECKING:
    from ekko.store.model_store import ModelStore


# What was dropped is pulled again where there is room for one row more for so many that are there. A table that is full has
# room for a few, since room is made for several at once.
SPARE = 16

Evict = Literal["least_recently_updated", "least_frequently_read"]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an operator allows a model.

    `evict` says which rows go when rows of other nodes find no room: None: none, what comes is dropped.
    """

    bytes: int
    evict: Evict | None = None


@dataclass(frozen=True, slots=True)
class TableMemory:
    """What one table takes, in bytes."""

    rows: int  # of slots in use
    free: int  # of slots that are free, for later rows of this table
    index: int
    counts: int  # what its readers count, and what is made of it

    @property
    def total(self) -> int:
        return self.rows + self.free + self.index + self.counts


def free_slots(table: Table) -> int:
    """Slots that were given out and belong to no key any more."""
    return int(table.mapping.words(layout.TABLE.offset("free")))


def memory_of(model: "ModelStore", table: Table) -> TableMemory:
    """What a table takes now."""
    free = free_slots(table) * table.stride
    rows = layout.TABLE.offset("rows") + table.rows_used * table.stride - free
    return TableMemory(rows, free, layout.index_bytes(table.index.capacity_log2), _counts_bytes(model, table))


def _counts_bytes(model: "ModelStore", table: Table) -> int:
    heat = model.heat.get(table.spec.name)
    return 0 if heat is None else heat.bytes


def _keys_max(table: Table, log2: int, evicts: bool) -> int:
    """How many keys an index takes before a larger one is built.

    Where keys come and go, an index that is full of removed entries is built anew, and larger when it is this full of keys.
    """
    churns = evicts or free_slots(table) > 0 or table.index.removed > 0 or table.slots_reused > 0
    return int((INDEX_LOAD_CLEAN if churns else INDEX_LOAD_BEGIN) * (1 << log2))


def _with_rows(table: Table | None, stride: int, more: int, evicts: bool) -> int:
    """Bytes that a table takes when so many more keys have come; None: a new table."""
    if table is None:
        return layout.TABLE.offset("rows") + more * stride + layout.index_bytes(max(INDEX_LOG2_MIN, index_log2_for(more)))
    slots = table.rows_used + max(0, more - free_slots(table))
    return layout.TABLE.offset("rows") + slots * stride + layout.index_bytes(_log2_with(table, more, evicts))


def _log2_with(table: Table, more: int, evicts: bool) -> int:
    """How large its index is when so many more keys have come."""
    log2 = table.index.capacity_log2
    while more and table.rows_used - free_slots(table) + more > _keys_max(table, log2, evicts):
        log2 += 1
    return log2


def header_bytes(model: "ModelStore") -> int:
    """What a model takes besides its tables."""
    return layout.model_bytes(model.shards, model.spec.partitions)


def memory_bytes(model: "ModelStore", tables: Mapping[int, Table]) -> int:
    """What a model takes."""
    return header_bytes(model) + sum(memory_of(model, table).total for table in tables.values())


def check_step(model: "ModelStore", tables: Mapping[int, Table], capacity: Capacity, columns: Sequence[RowColumns]) -> None:
    """Refuse a step of a publisher that finds no room. Keys come once in a table.

    Raises:
        PublishError: with the model, the bytes, the limit and the remedies. Nothing is changed.
    """
    counts = {column.table: len(column.keys) for column in columns}
    if bytes_with(model, tables, counts) <= capacity.bytes:  # even if all keys are new: as a rule
        return
    new = {column.table: absent_keys(tables.get(column.table), column) for column in columns}
    needed, held = bytes_with(model, tables, new), memory_bytes(model, tables)
    if needed <= max(capacity.bytes, held):
        return
    raise PublishError(
        f"model {model.spec.name!r} is full: it takes {held} bytes and {sum(new.values())} new rows need {needed - held} more, "
        f"capacity_bytes is {capacity.bytes}: raise models.{model.spec.name}.capacity_bytes on this node, or delete rows that "
        "are not needed; updates of rows that are there go on; nothing was published"
    )


def bytes_with(model: "ModelStore", tables: Mapping[int, Table], more: Mapping[int, int]) -> int:
    """Bytes of the model when so many more keys have come, by table."""
    total = header_bytes(model)
    evicts = model.capacity is not None and model.capacity.evict is not None
    for number, table in tables.items():
        total += _with_rows(table, table.stride, more.get(number, 0), evicts) + _counts_bytes(model, table)
    for number, count in more.items():
        if number not in tables and count:  # the first tensor of a model; an unknown table is refused elsewhere
            total += _with_rows(None, layout.row_stride(DENSE_SPEC.row_bytes), count, evicts)
    return total


def room_for(model: "ModelStore", tables: Mapping[int, Table], number: int, granted: Mapping[int, int]) -> int:
    """For how many more keys a table has room; negative: so many must go before its index can be kept as large as it is.

    Args:
        model: its capacity is set.
        tables: of the model.
        number: of the table.
        granted: keys that are about to come, by table: the room that these take is taken.
    """
    assert model.capacity is not None
    table, evicts = tables[number], model.capacity.evict is not None
    coming = granted.get(number, 0)
    spare = max(model.capacity.bytes, memory_bytes(model, tables)) - bytes_with(model, tables, granted)
    budget = spare + _with_rows(table, table.stride, coming, evicts) - layout.TABLE.offset("rows")
    used = table.rows_used + max(0, coming - free_slots(table))
    free, log2 = max(0, free_slots(table) - coming), _log2_with(table, coming, evicts)
    best = free - used
    while True:
        slots = (budget - layout.index_bytes(log2)) // table.stride
        if slots < used:
            return best
        of_index = _keys_max(table, log2, evicts) - (used - free)
        best = max(best, min(slots - used + free, of_index))
        if slots - used + free <= of_index:
            return best
        log2 += 1


def has_spare(model: "ModelStore", tables: Mapping[int, Table]) -> bool:
    """Whether more rows than a few would find room in each table: the limit was raised, or taken away."""
    if model.capacity is None:
        return True
    return all(
        room_for(model, tables, number, {}) > (table.rows_used - free_slots(table)) // SPARE
        for number, table in tables.items()
        if number != DENSE_SPEC.id
    )


def absent_keys(table: Table | None, column: RowColumns) -> int:
    """How many keys of the column the table, None: one that is not there yet, does not have."""
    if table is None:
        return len(column.keys)
    return int(np.count_nonzero(table.resolve(np.require(column.keys, np.uint64, ["C", "A"])) < 0))
