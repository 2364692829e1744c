"""A plan that is begun while the fence still closes, when the witness has little else to do.

What a row was at the cut does not change any more, whatever is still on its way; only which rows have changed since may grow.
So a batch that is worked out early is as right later: at worst it names a row that is by then as it was, and that is left out
when it is written back, as everything is that is there already. What the fence brought besides is added behind it, over all
that changed since the cut (R15: the witness has everything before it compares for the last time); then the plan is whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.rollback.plan import PlanBatch, PlanWriter, RowsAtRisk

# The disk is given so much at once: 8 ms of one that writes 130 MB a second.
SETTLE_BYTES: Final = 1 << 20

Pieces = Iterator[PlanBatch | RowsAtRisk | None]
Known = Mapping[int, Sequence[NDArray[np.uint64]]]


class Draft:
    """Use `work` until the fence has closed, then `finish`.

    Args:
        writer: of the plan.
        cut_ms: the mark that it goes back to; a plan of another mark is another plan.
        wanted_ms: the moment for which it was found.
        differences: makes the pieces of a plan, but of the keys that are known by table.
    """

    def __init__(self, writer: PlanWriter, cut_ms: int, wanted_ms: int, differences: Callable[[Known], Pieces]) -> None:
        self.writer = writer
        self.of = cut_ms, wanted_ms
        self.working = True
        self._differences = differences
        self._pieces = differences({})
        self._unsettled = 0  # bytes

    def work(self) -> None:
        """A slice.

        Raises:
            EkkoError: it cannot be gone on with.
        """
        try:
            piece = next(self._pieces)
        except StopIteration:
            self.working = False
            self.writer.settle()
            return
        # Rows at risk are those of all that came: at the end.
        if isinstance(piece, PlanBatch):
            self.writer.add(piece)
            self._unsettled += piece.payload_bytes
            if self._unsettled >= SETTLE_BYTES:  # the disk and the comparison work at the same time
                self._unsettled = 0
                self.writer.settle()

    def finish(self) -> Pieces:
        """What is left to be added, now that nothing more comes."""
        first = (piece for piece in self._pieces if not isinstance(piece, RowsAtRisk))
        return chain(first, self._differences(self.writer.keys))

    def close(self) -> None:
        """It is not wanted."""
        self.working = False
        self.writer.close()
