"""How long somebody may look at a row that stays locked, before its writer counts as dead."""

import time
from typing import Final

# A row takes well below a microsecond to write. Locked for this long, its writer is dead or stopped.
ROW_DEADLINE_S = 1.0
# Of the time between two looks counts so much. Whoever looks gives the processor away for less: if more has gone by, it stood
# still itself, perhaps with the whole machine, and so did the writer.
GAP_S_MAX: Final = 0.01


class Patience:
    """Time for which one row is found locked, look by look."""

    __slots__ = ("_looked_s", "_row", "_waited_s")

    def __init__(self) -> None:
        self._row, self._looked_s, self._waited_s = -1, 0.0, 0.0

    def is_over(self, row: int) -> bool:
        """A look found this row locked: whether it has been so for `ROW_DEADLINE_S` of looking, and no other in between."""
        now = time.monotonic()
        self._waited_s = self._waited_s + min(now - self._looked_s, GAP_S_MAX) if row == self._row else 0.0
        self._row, self._looked_s = row, now
        return self._waited_s > ROW_DEADLINE_S
