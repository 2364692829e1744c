"""How long each update takes from its commit at the trainer until the slowest replica shows it, or a newer version of its row.

It is told of every row that is written anywhere (`sim_cluster.costs.Observer`). Updates of one row form a chain, newest first;
a replica that shows one shows all before it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

_NONE = -1


@dataclass(frozen=True, slots=True)
class Summary:
    """Of the updates of a stretch of time, milliseconds."""

    updates: int
    missing: int  # not everywhere when the run ended; they count with the time that had passed
    mean_ms: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    growth: float  # mean of the last third over that of the first: well above 1 where a queue grows without end


class Delays:
    """Follows the rows of one table.

    Args:
        origin: the node that writes.
        replicas: all others.
        rows: keys are 0, 1, ... below this.
    """

    def __init__(self, origin: str, replicas: list[str], rows: int) -> None:
        self._origin = origin
        self._replicas = len(replicas)
        self._held = {node: np.full(rows, _NONE, np.int32) for node in replicas}  # newest update of each row that it shows
        self._newest = np.full(rows, _NONE, np.int32)
        self._steps: dict[int, tuple[int, U64]] = {}  # stamp -> its first update, and its keys in order
        self._count = 0
        self._committed_ms = np.empty(1 << 16)
        self._visible_ms = np.empty(1 << 16)  # at the slowest replica so far
        self._previous = np.empty(1 << 16, np.int32)
        self._shown = np.empty(1 << 16, np.int16)  # by how many replicas

    def observe(self, node: str, _table: int, keys: U64, stamps: U64 | int, at_ms: float) -> None:
        """Rows were written at a node."""
        if node == self._origin:
            assert isinstance(stamps, int), "the origin writes one step at a time"
            self._commit(keys, stamps, at_ms)
        elif isinstance(stamps, int):
            self._show(node, keys, stamps, at_ms)
        else:
            for stamp in np.unique(stamps).tolist():
                self._show(node, keys[stamps == stamp], stamp, at_ms)

    @property
    def updates(self) -> int:
        """Committed so far."""
        return self._count

    def waiting(self) -> int:
        """Updates that some replica does not show yet."""
        return int((self._shown[: self._count] < self._replicas).sum())

    def rows_behind(self) -> int:
        """Rows of which some replica does not show the newest version yet."""
        last = self._newest[self._newest >= 0]
        return int((self._shown[last] < self._replicas).sum())

    def oldest_ms(self, now_ms: float) -> float:
        """For how long the oldest update has been there that some replica does not show; 0 without one."""
        waiting = self._shown[: self._count] < self._replicas
        return now_ms - float(self._committed_ms[: self._count][waiting.argmax()]) if waiting.any() else 0.0

    def times(self) -> tuple[F64, F64]:
        """When each update was committed, in that order, and when every replica showed it; infinite: not yet."""
        shown = self._shown[: self._count] >= self._replicas
        return self._committed_ms[: self._count].copy(), np.where(shown, self._visible_ms[: self._count], np.inf)

    def summary(self, begin_ms: float, end_ms: float, now_ms: float) -> Summary:
        """Of the updates that were committed between `begin_ms` and `end_ms`."""
        committed = self._committed_ms[: self._count]
        chosen = (committed >= begin_ms) & (committed < end_ms)
        missing = chosen & (self._shown[: self._count] < self._replicas)
        delays = np.where(missing, now_ms, self._visible_ms[: self._count])[chosen] - committed[chosen]
        if not len(delays):
            return Summary(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0)
        third = max(1, len(delays) // 3)
        return Summary(
            len(delays),
            int(missing.sum()),
            float(delays.mean()),
            *(float(value) for value in np.percentile(delays, [50, 99, 100])),
            float(delays[-third:].mean() / delays[:third].mean()),
        )

    def _commit(self, keys: U64, stamp: int, at_ms: float) -> None:
        assert (np.diff(keys.astype(np.int64)) > 0).all(), "keys of a step come in order, each once"
        first, self._count = self._count, self._count + len(keys)
        while self._count > len(self._committed_ms):
            for name in ("_committed_ms", "_visible_ms", "_previous", "_shown"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.empty_like(column)]))
        updates = slice(first, self._count)
        self._committed_ms[updates] = at_ms
        self._visible_ms[updates] = at_ms
        self._shown[updates] = 0
        self._previous[updates] = self._newest[keys]
        self._newest[keys] = np.arange(first, self._count)
        self._steps[stamp] = first, keys.copy()

    def _show(self, node: str, keys: U64, stamp: int, at_ms: float) -> None:
        step = self._steps.get(stamp)
        if step is None:
            return  # what was there before the trace began
        first, step_keys = step
        updates: I64 = first + np.searchsorted(step_keys, keys)
        held = self._held[node]
        newer = updates > held[keys]
        updates, before = updates[newer], held[keys[newer]]
        held[keys[newer]] = updates
        while len(updates):
            self._visible_ms[updates] = np.maximum(self._visible_ms[updates], at_ms)
            self._shown[updates] += 1
            updates = self._previous[updates].astype(np.int64)
            more = updates > before
            updates, before = updates[more], before[more]
