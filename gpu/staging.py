"""How batches reach the device: through pinned memory, two batches in flight, no copy waited for."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gpu.backend import Array, Device, Event, Stream
from gpu.batches import Batch
from gpu.layout import Shape

# What one stage holds: so much that the start of a copy, some microseconds, is nothing to the copy (0.3 ms at 25 GB/s).
STAGE_BYTES_MAX: Final = 8 << 20
STAGES: Final = 2  # one is filled while the other is copied
_KEY_BYTES: Final = 8 + 8 + 8 + 1  # key, stamp, score, outcome


@dataclass(frozen=True, slots=True)
class Staged:
    """A piece of a batch, on the device for the work that `stream` is given next. `outcomes` is undefined yet."""

    keys: Array
    stamps: Array
    rows: Array
    scores: Array | None
    outcomes: Array


class _Stage:
    def __init__(self, device: Device, rows_max: int, row_bytes: int) -> None:
        fields: list[tuple[Any, Any]] = [
            (rows_max, np.uint64),
            (rows_max, np.uint64),
            ((rows_max, row_bytes), np.uint8),
            (rows_max, np.uint64),
        ]
        self.pinned: list[NDArray[Any]] = [device.pinned(shape, dtype) for shape, dtype in fields]
        self.arrays = [device.empty(shape, dtype) for shape, dtype in fields]
        self.outcomes = device.empty(rows_max, np.uint8)
        self.used: Event = device.event()  # the end of the launch that read it


class Staging:
    """The writer's buffers. One thread, one stream."""

    def __init__(self, device: Device, shape: Shape) -> None:
        """Raises `DeviceMemoryError`."""
        self._device = device
        self.rows_max = max(1, min(shape.slots, STAGE_BYTES_MAX // (shape.row_bytes + _KEY_BYTES)))
        stages = [_Stage(device, self.rows_max, shape.row_bytes) for _ in range(STAGES)]
        self._stages = cycle(stages)

    def pieces(self, batch: Batch, stream: Stream | None) -> Iterator[Staged]:
        """Copy a batch to the device piece by piece, in order with `stream`; the caller launches what uses one, then asks on.

        Waits for the launch before the last one, whose memory it takes, and for nothing else.
        """
        for first in range(0, len(batch), self.rows_max):
            part = slice(first, first + self.rows_max)
            stage = next(self._stages)
            stage.used.synchronize()
            columns: list[NDArray[Any]] = [batch.keys[part], batch.stamps[part], batch.rows[part]]
            if batch.scores is not None:
                columns.append(batch.scores[part])
            try:
                keys, stamps, rows, *scores = self._copy(stage, columns, stream)
                yield Staged(keys, stamps, rows, scores[0] if scores else None, stage.outcomes[: len(columns[0])])
            finally:
                stage.used.record(stream)

    def _copy(self, stage: _Stage, columns: list[NDArray[Any]], stream: Stream | None) -> list[Array]:
        copies: list[Array] = []
        for column, pinned, array in zip(columns, stage.pinned, stage.arrays, strict=False):  # there may be no scores
            out = array[: len(column)]
            if column.size:  # of an erase, rows have no bytes
                staged = pinned[: len(column)]
                np.copyto(staged, column)
                self._device.upload(staged, out, stream)
            copies.append(out)
        return copies
