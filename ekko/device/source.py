"""What the writer of a device reads: rows of the store, encoded, in a thread of its own while the daemon's loop writes them.

It maps the store's files as a reader does, so that it needs no lock with the loop, and holds on to a table that was dropped
until it lets go of it.
"""

from contextlib import suppress
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.errors import StoreError
from ekko.model import TableSpec
from ekko.store.view import TableFiles, TableView

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]

# Times that a row may be found locked for a second.
ATTEMPTS_MAX: Final = 5
# Newer than every stamp: what is erased with it is erased whatever it was.
NEWEST: Final = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class StoreRows:
    """One table of the node's own store.

    Raises:
        FileNotFoundError: it is gone already.
        StoreError: it cannot be read.
    """

    def __init__(self, spec: TableSpec, files: TableFiles) -> None:
        self.row_bytes = spec.row_bytes
        self._view = TableView(spec, files, counted=False)

    def read(self, keys: U64) -> tuple[U64, U64, U8, U64]:
        """What is there of these keys: those that are live, their stamps uint64[n] and rows uint8[n, row_bytes]; the others.

        Each row is whole, and of the stamp that comes with it.
        """
        rows, stamps = self._encoded(np.ascontiguousarray(keys))
        live = stamps != 0
        if live.all():
            return keys, stamps, rows, keys[:0]
        return keys[live], stamps[live], rows[live], keys[~live]

    def _encoded(self, keys: U64) -> tuple[U8, U64]:
        for _ in range(ATTEMPTS_MAX - 1):
            # The writer of the row is a thread of this process, and may have been stopped with it in mid-row.
            with suppress(StoreError):
                return self._view.encoded(keys)
        return self._view.encoded(keys)
