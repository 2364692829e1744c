"""A formula of somebody else's: what it gets wrong costs it its say, never the publisher's step.

When it raises, or returns what is no priority, the rows of that step are weighed by the built-in formula, which is counted and
reported. One that fails again and again is asked less and less often, so that a module that uses up all of its time each time
does not take the node's: after n failures in a row it rests for 2**n steps.

A slow one costs the node time, on the thread that does everything else. One that took longer than it may (`STEP_S_MAX`,
`ROW_S_MAX`) rests for nineteen times as long as it took, so that it has a twentieth of the node's time at most, however slow it
is; one that does not come back is interrupted (`stopping`).
"""

import time
from collections.abc import Callable
from typing import Final

import numpy as np
import structlog

from ekko.priority.stopping import TooLongError, stopped_after
from ekko.priority.updates import F32, Formula, Updates

# Rests are at most so many steps: then somebody may have repaired what it asks for.
REST_STEPS_MAX: Final = 1_024
# What a formula may take of the processor for the rows of one table of a step: a hundred times what the built-in one takes.
STEP_S_MAX: Final = 0.02
ROW_S_MAX: Final = 10e-6
# On a busy machine, or asleep, by the clock on the wall.
WALL_TIMES: Final = 10
# Of the time that a slow one took, it rests.
REST_TIMES: Final = 19
STOPPED_AFTER_S: Final = 1.0

log = structlog.get_logger(__name__)


class Guarded:
    """A formula, and what to do without it.

    Args:
        name: as it is configured.
        formula: somebody's.
        built_in: what weighs rows where that fails.
        clock: seconds, monotonic.
        processor: seconds of the processor that this thread has had.
    """

    def __init__(
        self,
        name: str,
        formula: Formula,
        built_in: Formula,
        clock: Callable[[], float] = time.monotonic,
        processor: Callable[[], float] = time.thread_time,
    ) -> None:
        self.name = name
        self._clock = clock
        self._processor = processor
        self.failures = 0  # it was asked, and failed
        self.steps_without = 0  # tables of steps that the built-in one weighed
        self.last_failure = ""
        self._formula = formula
        self._built_in = built_in
        self._said = ""  # the kind of it that was logged last
        self._in_a_row = 0
        self._rests = 0  # steps
        self._rests_until = 0.0  # by the clock

    def __call__(self, updates: Updates) -> F32:
        """float32[n], finite and not negative."""
        if self._rests:
            self._rests -= 1
        elif self._clock() >= self._rests_until:
            begin, worked = self._clock(), self._processor()
            priorities: F32 | None = None
            try:
                with stopped_after(STOPPED_AFTER_S):
                    priorities = checked(self._formula(updates), updates.keys.size)
                self._in_a_row = 0
            except (Exception, TooLongError) as error:  # noqa: BLE001 - it may fail in any way
                self._on_failure(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
            self._check_time(updates.keys.size, self._clock() - begin, self._processor() - worked, failed=priorities is None)
            if priorities is not None:
                return priorities  # late, but there
        self.steps_without += 1
        return self._built_in(updates)

    def _check_time(self, rows: int, took_s: float, worked_s: float, *, failed: bool) -> None:
        allowed_s = STEP_S_MAX + ROW_S_MAX * rows
        if worked_s <= allowed_s and took_s <= WALL_TIMES * allowed_s:
            return
        self._rests_until = self._clock() + REST_TIMES * took_s
        if not failed:
            self.failures += 1
            said = f"{took_s * 1000:,.0f} ms for {rows:,} rows, allowed are {allowed_s * 1000:,.0f} ms"
            self._say("too slow", f"too slow: {said}")

    def _on_failure(self, reason: str) -> None:
        self.failures += 1
        reason = reason.splitlines()[0][:200]
        self._say(reason, reason)
        self._rests = min(1 << self._in_a_row, REST_STEPS_MAX)
        self._in_a_row = min(self._in_a_row + 1, 20)

    def _say(self, kind: str, reason: str) -> None:
        if kind != self._said:  # once, for it may be at every step
            log.warning("priority_failed", formula=self.name, reason=reason, instead="the built-in formula")
        self._said, self.last_failure = kind, reason


def checked(value: object, count: int) -> F32:
    """What a formula returned, if it is priorities of so many rows.

    Raises:
        ValueError: it is not.
    """
    priorities = np.asarray(value)
    if priorities.dtype.kind not in "fiu":
        raise ValueError(f"returned {priorities.dtype}: expected float32[{count}]")
    if priorities.shape != (count,):
        raise ValueError(f"returned shape {priorities.shape}: expected ({count},)")
    priorities = priorities.astype(np.float32)
    if not (np.isfinite(priorities).all() and (priorities >= 0).all()):
        raise ValueError("returned negative numbers, NaN or infinity: expected finite numbers from 0")
    return priorities
