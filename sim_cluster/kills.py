"""A kill in the middle of what a node does, for virtual time, where one event is one call that cannot be interrupted.

SIGKILL comes between any two instructions. Here it comes between two *steps*: an effect that is carried out, a part of the rows
that is written or dropped for good, the loss floor that is raised before, a record that is saved; or in the middle of the last
row that such a part overwrites, frees, or puts into a free slot (R23). What was done before it stays, as it would in shared
memory and on disk; the next life attaches to that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ekko.store import Store, layout
from ekko.store.kernels.rows import mend
from ekko.store.manifest import header_name, rows_name
from ekko.store.model_store import ModelStore
from p2p.replica import Applied, RowColumns


class KilledError(Exception):
    """The process is gone; nothing of the event at hand happens any more."""


@dataclass(slots=True)
class Fuse:
    """Counts the steps of one process; burnt down, it is killed."""

    steps: int

    def burn(self) -> None:
        """One more step.

        Raises:
            KilledError: instead of it.
        """
        self.steps -= 1
        if self.steps < 0:
            raise KilledError


def lay(fuse: Fuse, store: Store) -> None:
    """Make what is written to `store`, by this process, steps of `fuse`."""
    for replica in store.models.values():
        _lay(fuse, replica)


def _lay(fuse: Fuse, replica: ModelStore) -> None:
    apply, begin_write, set_writer = replica.apply, replica.begin_write, replica.set_writer
    remove, raise_floor = replica.remove, replica.floor.add

    def burn_since(before: _Undo) -> None:
        try:
            fuse.burn()
        except KilledError:
            _tear(replica, before)
            raise

    def apply_part(columns: Sequence[RowColumns], stamp: int) -> Applied:
        before = _Undo.of(replica)
        applied = apply(columns, stamp)
        burn_since(before)
        return applied

    def raise_floor_as_a_step(shards: NDArray[np.int64], stamps: NDArray[np.uint64], complete: bool) -> None:
        raise_floor(shards, stamps, complete)
        fuse.burn()

    def remove_by_halves(table: int, slots: NDArray[np.int64], *, complete: bool) -> None:
        fuse.burn()
        for part in np.array_split(slots, 2):
            before = _Undo.of(replica)
            remove(table, part, complete=complete)
            burn_since(before)

    def apply_by_halves(columns: Sequence[RowColumns], stamp: int) -> Applied:
        fuse.burn()
        first = apply_part([_first_half(section) for section in columns], stamp)
        second = apply_part(columns, stamp)
        written, inserted = first.written + second.written, first.inserted + second.inserted
        return Applied(written, inserted, max(0, second.stale - first.written))

    def begin_write_as_a_step(stamp: int, shards: NDArray[np.int64]) -> None:
        fuse.burn()
        begin_write(stamp, shards)

    def set_writer_as_a_step(identity: Any) -> None:
        fuse.burn()
        set_writer(identity)

    # In place of the methods of this one object, which does not outlive the process.
    vars(replica).update(apply=apply_by_halves, begin_write=begin_write_as_a_step, set_writer=set_writer_as_a_step)
    vars(replica).update(remove=remove_by_halves)
    vars(replica.floor).update(add=raise_floor_as_a_step)


@dataclass(frozen=True, slots=True)
class _Undo:
    """What a model's undo record is about."""

    slot: int
    table: int
    stamp: int  # of the image

    @classmethod
    def of(cls, replica: ModelStore) -> "_Undo":
        """Read it."""
        words = _header_words(replica, 0, (layout.UNDO.offset("row") + layout.ROW_HEADER_BYTES) // 8)
        stamp = (layout.UNDO.offset("row") + layout.ROW.offset("stamp")) // 8
        return cls(int(words[0]) - 1, int(words[layout.UNDO.offset("table") // 8]), int(words[stamp]))


def _header_words(replica: ModelStore, offset: int, count: int) -> NDArray[np.uint64]:
    """Live uint64[count] of the undo record, from so many bytes on."""
    memory = replica._memory  # noqa: SLF001 - what a kill leaves is in nobody's interface
    return memory.open(header_name(replica.keyspace)).words(layout.MODEL.offset("undo") + offset, count)


def _tear(replica: ModelStore, before: _Undo) -> None:
    """As if the kill had come in the middle of the row that was overwritten last, if any was since `before`.

    Its lock is odd, its header is new, and so is the first half of its data. New rows behind it count as written earlier: they
    claim nothing. A key that got a free slot is not in the index yet; one whose slot is being freed may be or not.
    """
    undo = _Undo.of(replica)
    if undo == before:
        return
    _unpublish(replica, undo)
    spec = next(spec for spec in replica.table_specs if spec.id == undo.table)
    stride = layout.row_stride(spec.row_bytes)
    memory = replica._memory  # noqa: SLF001
    rows = memory.open(rows_name(replica.keyspace, undo.table))
    row = rows.words(layout.TABLE.offset("rows") + undo.slot * stride, stride // 8).view(np.uint32)
    image = _header_words(replica, layout.UNDO.offset("row"), stride // 8).view(np.uint32)
    row[layout.ROW.offset("lock") // 4] -= 1
    middle = (layout.ROW_HEADER_BYTES + spec.row_bytes // 2) // 4
    row[middle:] = image[middle:]


def _unpublish(replica: ModelStore, undo: _Undo) -> None:
    """Take the key that was put into a free slot out of the index again."""
    table = replica.table(undo.table)
    flags = layout.ROW.offset("flags") // 4
    image = _header_words(replica, layout.UNDO.offset("row"), table.stride // 8).view(np.uint32)
    row = table.mapping.words(layout.TABLE.offset("rows") + undo.slot * table.stride, table.stride // 8).view(np.uint32)
    if image[flags] & layout.FLAG_FREE and not row[flags] & layout.FLAG_FREE:
        written, row[flags] = int(row[flags]), layout.FLAG_FREE
        mend(table.mapping.address, table.stride, table.index.address, table.index.capacity_log2, undo.slot)
        row[flags] = written


def _first_half(section: RowColumns) -> RowColumns:
    half = len(section.keys) // 2
    stamps = None if section.stamps is None else section.stamps[:half]
    return RowColumns(section.table, section.keys[:half], section.rows[: min(half, len(section.rows))], stamps)
