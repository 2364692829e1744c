"""Readers of one row against a writer that rewrites it back to back, in threads of one process."""

import threading
import time
from typing import Any

import numba
import numpy as np

from ekko.store import layout
from ekko.store.kernels import rows, whole_row
from ekko.store.kernels.index import publish
from ekko.store.kernels.quantise import FLOAT32

DIM = 4_096
VERSIONS = 64
# So many copies must have met another version than the one before: then both threads ran at the same time.
MEETINGS = 400
PAUSE = 8_000  # steps: several times as long as a copy of the row takes
DEADLINE_S = 60.0
INDEX_LOG2 = 1


def _rewrite(table: Any, row: Any, data: Any, row_bytes: Any, stop: Any, pause: Any) -> Any:
    """Overwrite one row until told to stop, with values that its stamp names; `pause`: steps of idle work in between."""
    stamp, idle = 0, np.uint64(1)
    while stop[0] == 0:
        stamp += 1
        rows._overwrite(table, row, np.uint64(stamp), data + (stamp % VERSIONS) * row_bytes, row_bytes)
        for _ in range(pause):
            idle = idle * np.uint64(6364136223846793005) + np.uint64(1)
    return idle


def test_a_copy_that_the_writer_overtook_is_made_again() -> None:
    """The slow path of a look-up: the lock was even when the copy began, which says nothing of its end."""
    rewrite = numba.njit(nogil=True)(_rewrite)
    row_bytes = 4 * DIM
    memory = np.zeros(layout.TABLE.offset("rows") + layout.row_stride(row_bytes), np.uint8)
    table = memory.ctypes.data
    row = table + layout.TABLE.offset("rows")
    index = np.zeros(layout.index_bytes(INDEX_LOG2), np.uint8)
    publish(index.ctypes.data, index.ctypes.data + layout.INDEX.offset("entries"), np.uint64(0), 0)  # key 0 is in slot 0
    values = np.repeat(np.arange(VERSIONS, dtype=np.float32), DIM)
    stop = np.ones(1, np.int64)
    rewrite(table, row, values.ctypes.data, row_bytes, stop, PAUSE)  # compile it
    stop[0] = 0
    writing = threading.Thread(target=rewrite, args=(table, row, values.ctypes.data, row_bytes, stop, PAUSE))
    writing.start()
    try:
        out, stamp = np.zeros(DIM, np.float32), np.zeros(1, np.uint64)
        place = (row, layout.row_stride(row_bytes), FLOAT32, DIM, index.ctypes.data, INDEX_LOG2)
        newest, met, deadline = 0, 0, time.monotonic() + DEADLINE_S
        while met < MEETINGS:
            assert time.monotonic() < deadline, f"only {met} copies met a new version"
            found = whole_row.read_by_key(*place, 0, 0, out.ctypes.data, stamp.ctypes.data)
            if found == whole_row.FOUND:
                assert (out == np.float32(int(stamp[0]) % VERSIONS)).all(), "torn, or another version's stamp"
                assert int(stamp[0]) >= newest, "went back"
                met += int(stamp[0]) > newest
                newest = int(stamp[0])
            else:
                time.sleep(0)  # on a busy machine the writer may need this processor to come to the row's end
    finally:
        stop[0] = 1
        writing.join()
