"""What was dropped from a model for good: the loss floor L of protocol.md (R5, R11), in the model's header file.

L[shard][writer] is the largest stamp of a row that was dropped here: a tombstone that was collected, a row that expired or was
evicted. Of a shard whose floor is *incomplete* live rows were dropped, too. The floor is raised before the rows go, so that a
kill in between leaves one that is too high, which costs a longer answer and never a wrong one.

The floor is as large as the vector, and most models never delete anything: its pages are allocated when the first row goes.
"""

import numpy as np
from numpy.typing import NDArray

from ekko.store import layout
from ekko.store.memory import Mapping
from p2p.stamps import WRITER_MASK, WRITERS_MAX

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


class LossFloor:
    """The floor of one model, all partitions. One thread writes.

    Args:
        header: the model's header file.
        shards: of the model.
        partitions: of the model.
    """

    def __init__(self, header: Mapping, shards: int, partitions: int) -> None:
        self._header = header
        self._bytes = layout.model_bytes(shards, partitions)
        self._used = header.words(layout.MODEL.offset("floor_used"))
        # By writer, as in the file; not to be looked at before it is used, since that allocates its pages.
        self.columns = header.words(layout.loss_floor_offset(shards, partitions), WRITERS_MAX, shards)
        self._bits = header.words(layout.incomplete_offset(shards, partitions), (shards + 63) // 64).view(np.uint8)
        self._writers: set[int] = set()
        self.writers: NDArray[np.uint16] = np.empty(0, np.uint16)  # whose column is not empty, ascending
        self.incomplete = np.zeros(shards, np.bool_)  # a copy of the bitmap
        if int(self._used):
            header.ensure(self._bytes)
            self._note(np.flatnonzero(self.columns.any(axis=1)))
            self.incomplete[...] = np.unpackbits(self._bits, bitorder="little", count=shards)

    @property
    def values(self) -> U64:
        """Live uint64[shards, WRITERS_MAX]; only the columns of `writers` are worth a look."""
        return self.columns.T

    def _begin(self) -> None:
        if not int(self._used):
            self._header.ensure(self._bytes)
            self._used[...] = 1

    def _note(self, writers: NDArray[np.int64]) -> None:
        new = set(writers.tolist()) - self._writers
        if new:
            self._writers |= new
            self.writers = np.array(sorted(self._writers), np.uint16)

    def add(self, shards: I64, stamps: U64, complete: bool) -> None:
        """Rows with these stamps are about to go.

        Raises:
            StoreError: shared memory is full; nothing changed.
        """
        self._begin()
        writers = (stamps & np.uint64(WRITER_MASK)).astype(np.int64)
        np.maximum.at(self.columns, (writers, shards), stamps)
        self._note(np.unique(writers))
        if not complete:
            dropped = self.incomplete.copy()
            dropped[shards] = True
            self._set_incomplete(dropped)

    def take_over(self, other: "LossFloor", shards: slice) -> None:
        """Have of these shards what another model's floor, of the same shape, says."""
        if len(other.writers):
            every = np.arange(len(self.incomplete), dtype=np.uint32)[shards]
            self.merge(every, other.writers, other.values[shards, other.writers])
            self._set_incomplete(self.incomplete | (other.incomplete & np.isin(np.arange(len(self.incomplete)), every)))

    def complete(self) -> None:
        """What was dropped of live rows counts as lacking from now on, and not as dropped; the floor stays."""
        if self.incomplete.any():
            self._set_incomplete(np.zeros_like(self.incomplete))

    def _set_incomplete(self, incomplete: NDArray[np.bool_]) -> None:
        self.incomplete[...] = incomplete
        bits = np.packbits(incomplete, bitorder="little")
        self._bits[: len(bits)] = bits

    def replace(self, columns: U64, incomplete: NDArray[np.bool_]) -> None:
        """Have what a snapshot says, uint64[WRITERS_MAX, shards], instead."""
        if not columns.any() and not incomplete.any() and not int(self._used):
            return
        self._begin()
        self.columns[...] = columns
        self._set_incomplete(incomplete)
        self._writers.clear()
        self._note(np.flatnonzero(columns.any(axis=1)))

    def merge(self, shards: NDArray[np.uint32], writers: NDArray[np.uint16], floor: U64) -> None:
        """Take over somebody's floor, uint64[k, f], of these shards and writers."""
        if not floor.any():
            return
        self._begin()
        place = np.ix_(writers, shards)
        self.columns[place] = np.maximum(self.columns[place], floor.T)
        self._note(writers.astype(np.int64)[floor.any(axis=0)])
