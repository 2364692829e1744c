"""Readers count what they are asked for: one call of this per look-up, and next to nothing in most of them.

`ekko.store.kernels.hot` says how look-ups are drawn and what is written; `ekko.store.hot` what becomes of it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from random import expovariate
from secrets import randbits

import numpy as np
from numpy.typing import NDArray

from ekko.store.hot import open_to_count
from ekko.store.kernels import hot as kernels
from ekko.store.table import Index

# What is called once a look-up.
Count = Callable[[NDArray[np.uint64], Index, int | None], None]
U64 = NDArray[np.uint64]

CALL_COST = kernels.CALL_COST
PERIOD = kernels.PERIOD


class KeyCounter:
    """Counts the look-ups of one table in this process. Threads may share it, and lose a look-up or two to each other."""

    __slots__ = (
        "_address",
        "_begun",
        "_calls",
        "_left",
        "_mapping",
        "_pid",
        "_random",
        "_share",
        "_stride",
        "_table",
        "_width_log2",
    )

    def __init__(self, path: Path, table_id: int, table: int, stride: int) -> None:
        """Open the hot file at `path`; where that fails, nothing is counted, and `on` is False.

        Args:
            path: of the hot file.
            table_id: whose it must be.
            table: address of the table file.
            stride: of its rows.
        """
        opened = open_to_count(path, table_id)
        self._mapping = opened[0] if opened else None
        self._width_log2 = opened[1] if opened else 0
        self._address = 0 if self._mapping is None else self._mapping.address
        self._table = table
        self._stride = stride
        self._random = np.array([randbits(64) | 1], np.uint64)
        self._pid = os.getpid()
        self._left = self._begun = int(expovariate(1 / PERIOD))  # else readers that live shortly would never be counted
        self._calls = 0
        self._share = 1.0  # of the keys of the last look-up that was drawn, what was not padding

    @property
    def on(self) -> bool:
        """Whether this process may count."""
        return self._address != 0

    def count(self, keys: U64, index: Index, padding: int | None = None) -> None:
        """Count a look-up of uint64[n] keys in this index, `padding` among them left out. Call it only while `on`."""
        # In as few steps as there can be: for a look-up of 64 keys, each of these lines is half a percent.
        self._calls += 1
        self._left = left = self._left - keys.size - CALL_COST
        if left < 0:
            self._draw(keys, index, padding)

    def _draw(self, keys: U64, index: Index, padding: int | None) -> None:
        # Taken to be as in those that are not drawn: to count padding each time would cost a tenth of a look-up.
        padded = padding is not None and keys.size
        self._share = int(np.count_nonzero(keys != np.uint64(padding or 0))) / keys.size if padded else 1.0
        left, calls, total = self._take()
        if self._pid != os.getpid():  # children of one parent must not draw the same numbers
            self._pid, self._random[0] = os.getpid(), randbits(64) | 1
        self._left = self._begun = kernels.count(
            self._address,
            self._width_log2,
            self._table,
            self._stride,
            index.address,
            index.capacity_log2,
            keys,
            padding is not None,
            padding or 0,
            left,
            calls,
            total,
            self._random,
        )

    def _take(self) -> tuple[int, int, int]:
        """What is left to spend, and the calls and keys it was spent on; begins anew."""
        left, calls, begun = self._left, self._calls, self._begun
        # Other threads go on meanwhile as if nothing were due.
        self._left = self._begun = PERIOD
        self._calls = 0
        return left, calls, round(self._share * max(0, begun - left - calls * CALL_COST))

    def flush(self) -> None:
        """Tell the calls and keys that were not told yet, before the reader ends."""
        if self.on:
            _, calls, total = self._take()
            kernels.count_calls(self._address, calls, total)


def count_nothing(keys: U64, index: Index, padding: int | None = None) -> None:
    """In place of `KeyCounter.count` where this process may not count."""
