"""Which rows of a table are due, and how much each matters: an entry for each row of the table, whatever happened to it.

So what waits is bounded by the table, 4 bytes and a bit a row, and not by how long it waits; a row that is touched again while
it waits is sent once.
"""

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ekko.store.kernels.due import BLOCK_ROWS, NOT_DUE, add_changed, add_gradients, add_norms, add_rows, drop_rows, take_rows

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

# Gradients of several steps up to so many entries each are put together: a call of a kernel takes longer than such a copy.
_JOIN_ENTRIES_MAX: Final = 4_096


class DueRows:
    """The due rows of one table. Not safe for threads.

    Args:
        rows: how many the table has.
    """

    def __init__(self, rows: int) -> None:
        self._weights = np.full(rows, NOT_DUE, np.float32)
        self._blocks = np.zeros(-(-rows // BLOCK_ROWS), np.uint8)
        self._place = np.zeros(1, np.int64)
        self.count = 0
        self.count_max = 0

    @property
    def rows(self) -> int:
        """How many the table has."""
        return len(self._weights)

    @property
    def nbytes(self) -> int:
        """Memory that this takes; it stays the same while rows become due."""
        return self._weights.nbytes + self._blocks.nbytes

    def grow(self, rows: int) -> None:
        """The table has more rows now."""
        more = rows - len(self._weights)
        self._weights = np.concatenate([self._weights, np.full(more, NOT_DUE, np.float32)])
        self._blocks = np.concatenate([self._blocks, np.zeros(-(-rows // BLOCK_ROWS) - len(self._blocks), np.uint8)])

    def add_gradients(self, indices: tuple[Tensor, ...], values: tuple[Tensor, ...], sizes: I64, *, zeros: bool) -> None:
        """Rows that sparse gradients touch.

        Args:
            indices: int64[1, n] of each gradient.
            values: float32[n, dim] of each.
            sizes: int64[gradients], n of each.
            zeros: whether rows whose gradient is zero are touched.
        """
        if len(sizes) > 1 and sizes.max() > _JOIN_ENTRIES_MAX:
            middle = len(sizes) // 2
            self.add_gradients(indices[:middle], values[:middle], sizes[:middle], zeros=zeros)
            self.add_gradients(indices[middle:], values[middle:], sizes[middle:], zeros=zeros)
            return
        ids = _host(torch.cat(indices, 1))[0]  # of one alone a copy, too, and contiguous
        rows = _host(torch.cat(values))
        self._became(add_gradients(ids, rows, sizes.cumsum(), zeros, self._weights, self._blocks))

    def add_norms(self, norms: Tensor) -> None:
        """Rows of which a gradient's norm is not zero: one for each row, float32[rows]."""
        self._became(add_norms(_host(norms)[: len(self._weights)], self._weights, self._blocks))

    def add_changed(self, table: F32, known: F32, begin: int, end: int) -> None:
        """Rows from `begin` to before `end` that differ, to the bit, between two tables of float32[rows, dim]."""
        bits = (table.view(np.uint32), known.view(np.uint32))
        self._became(add_changed(*bits, begin, end, self._weights, self._blocks))

    def add(self, ids: I64, weights: F32) -> None:
        """Rows by their number, each with what it weighs: float32[n]."""
        self._became(add_rows(ids, weights, self._weights, self._blocks))

    def drop(self, ids: I64) -> None:
        """Nothing is due of these any more."""
        self.count -= drop_rows(ids, self._weights)

    def take(self, limit: int | None = None) -> tuple[I64, F32]:
        """Take due rows, at most `limit`; None: all. They are not due any more.

        Returns:
            int64[n], ascending but for one step back where a limit had an earlier call end; and float32[n], what they weigh.
        """
        room = self.count if limit is None else min(self.count, limit)
        ids, weights = np.empty(room, np.int64), np.empty(room, np.float32)
        if room:
            taken = take_rows(self._weights, self._blocks, self._place, ids, weights)
            self.count -= taken
            ids, weights = ids[:taken], weights[:taken]
        return ids, weights

    def _became(self, added: int) -> None:
        self.count += added
        self.count_max = max(self.count_max, self.count)


def _host(value: Tensor) -> Any:
    """An array in the host's memory; a view where it is there."""
    return (value.detach() if value.device.type == "cpu" else value.detach().cpu()).numpy()
