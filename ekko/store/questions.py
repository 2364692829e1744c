"""Which rows a peer lacks that says what it knows: the questions of the pull, to all tables of a model.

A question is a vector uint64[shards, WRITERS_MAX]. Tables answer from their update caches (`ekko.store.recent`), or by
looking at every row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ekko.store.kernels.ring import ABOVE_ALL
from ekko.store.table import Table
from p2p.replica import U64, KnownSteps, Selection
from p2p.stamps import WRITERS_MAX

I64 = NDArray[np.int64]
T = TypeVar("T")


class Questions:
    """To one model.

    Args:
        tables: live, by id.
        shards: of the model.
        partitions: of the model.
    """

    def __init__(self, tables: Mapping[int, Table], shards: int, partitions: int) -> None:
        self._tables = tables
        self._shards = shards
        self._partitions = partitions
        self._elsewhere: U64 | None = None  # scratch of `in_partition`

    def in_partition(self, partition: int, base: U64, ask: Callable[[U64], T]) -> T:
        """Ask with a vector of the whole model that is above everything in other partitions."""
        # Filled once: writing a vector of 64 shards anew costs 2 MiB of memory traffic each time.
        if self._elsewhere is None:
            self._elsewhere = np.full((self._shards, WRITERS_MAX), ABOVE_ALL, np.uint64)
        own = self._elsewhere[partition :: self._partitions]
        own[...] = base
        try:
            return ask(self._elsewhere)
        finally:
            own[...] = ABOVE_ALL

    def changed_since(self, base: U64, *, measured: bool = True) -> list[Selection]:
        """Rows above the vector. Not measured: the update cache does not learn from the question how far back peers look."""
        return self._select(base, lambda table, flat: table.changed_since(flat, self._shards, measured=measured))

    def scan_since(self, base: U64) -> list[Selection]:
        """`changed_since` by looking at every row: what the update cache is measured against."""
        return self._select(base, lambda table, flat: table.scan(flat, self._shards))

    def _select(self, base: U64, select: Callable[[Table, U64], I64]) -> list[Selection]:
        flat = np.ascontiguousarray(base, np.uint64).reshape(-1)
        assert flat.size == self._shards * WRITERS_MAX, f"vector of {flat.size} entries"
        chosen = [Selection(table.spec.id, table.spec.row_bytes, select(table, flat)) for table in self._tables.values()]
        return [selection for selection in chosen if selection.slots.size]

    def without(self, selections: Sequence[Selection], known: KnownSteps, partitions: int) -> list[Selection]:
        """What is left of them without the steps that the asker named."""
        # Of a partition of several, `known` has one bit for each of its own shards.
        assert known.shards.shape[1] * 8 >= self._shards // partitions, "a bit for each shard"
        stamps, bits = np.require(known.stamps, np.uint64, ["C", "A"]), np.ascontiguousarray(known.shards)
        left = []
        for selection in selections:
            if selection.table not in self._tables:  # dropped since
                left.append(selection)  # what reads it finds nothing, and says so
                continue
            slots = self._tables[selection.table].without(selection.slots, stamps, bits, self._shards, partitions)
            if slots.size:
                left.append(Selection(selection.table, selection.row_bytes, slots))
        return left

    def digest_above(self, base: U64) -> int:
        """A digest of the rows above the vector, which does not depend on their order."""
        sums = np.zeros(2, np.uint64)
        for selection in self.changed_since(base, measured=False):
            self._tables[selection.table].add_digest(selection.slots, sums)
        return int(sums[0]) | int(sums[1]) << 64
