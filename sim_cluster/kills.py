"""A kill in the middle of what a node does, for virtual time, where one event is one call that cannot be interrupted.

SIGKILL comes between any two instructions. Here it comes between two *steps*: an effect that is carried out, a part of the rows
that is written, a record that is saved. What was done before it stays, as it would in shared memory and on disk; the next life
attaches to that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ekko.store import Store
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

    def apply_by_halves(columns: Sequence[RowColumns], stamp: int) -> Applied:
        fuse.burn()
        first = apply([_first_half(section) for section in columns], stamp)
        fuse.burn()
        second = apply(columns, stamp)
        fuse.burn()
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


def _first_half(section: RowColumns) -> RowColumns:
    half = len(section.keys) // 2
    stamps = None if section.stamps is None else section.stamps[:half]
    return RowColumns(section.table, section.keys[:half], section.rows[: min(half, len(section.rows))], stamps)
