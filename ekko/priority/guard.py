"""A formula of somebody else's: what it gets wrong costs it its say, never the publisher's step.

When it raises, or returns what is no priority, the rows of that step are weighed by the built-in formula, which is counted and
reported. One that fails again and again is asked less and less often, so that a module that uses up all of its time each time
does not take the node's: after n failures in a row it rests for 2**n steps.
"""

from typing import Final

import numpy as np
import structlog

from ekko.priority.updates import F32, Formula, Updates

# Rests are at most so many steps: then somebody may have repaired what it asks for.
REST_STEPS_MAX: Final = 1_024

log = structlog.get_logger(__name__)


class Guarded:
    """A formula, and what to do without it.

    Args:
        name: as it is configured.
        formula: somebody's.
        built_in: what weighs rows where that fails.
    """

    def __init__(self, name: str, formula: Formula, built_in: Formula) -> None:
        self.name = name
        self.failures = 0  # it was asked, and failed
        self.steps_without = 0  # tables of steps that the built-in one weighed
        self.last_failure = ""
        self._formula = formula
        self._built_in = built_in
        self._in_a_row = 0
        self._rests = 0

    def __call__(self, updates: Updates) -> F32:
        """float32[n], finite and not negative."""
        if self._rests:
            self._rests -= 1
        else:
            try:
                priorities = checked(self._formula(updates), updates.keys.size)
            except Exception as error:  # noqa: BLE001 - it may fail in any way
                self._on_failure(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
            else:
                self._in_a_row = 0
                return priorities
        self.steps_without += 1
        return self._built_in(updates)

    def _on_failure(self, reason: str) -> None:
        reason = reason.splitlines()[0][:200]
        if reason != self.last_failure:
            log.warning("priority_failed", formula=self.name, reason=reason, instead="the built-in formula")
        self.failures += 1
        self.last_failure = reason
        self._rests = min(1 << self._in_a_row, REST_STEPS_MAX)
        self._in_a_row = min(self._in_a_row + 1, 20)


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
