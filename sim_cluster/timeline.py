"""Virtual time: a number that jumps to the next moment at which something is due.

What is due at one moment happens in the order in which it was asked for, so a run depends on nothing but its events.
"""

import heapq
from collections import deque
from collections.abc import Callable

# A run that handles more events than this at one virtual instant circles.
EVENTS_PER_INSTANT_MAX = 1_000_000

Action = Callable[[], None]


class Timeline:
    """What is due, by millisecond: those of a large cluster have many events each, which need not be sorted one by one."""

    def __init__(self) -> None:
        self.now_ms = 0
        self._moments: list[int] = []  # a heap of those at which something is due
        self._due: dict[int, deque[Action]] = {}

    def at(self, at_ms: int, action: Action) -> None:
        """Have something happen at a moment that is not over yet."""
        due = self._due.get(at_ms)
        if due is None:
            assert at_ms >= self.now_ms, f"{at_ms} ms are over, it is {self.now_ms} ms"
            due = self._due[at_ms] = deque()
            heapq.heappush(self._moments, at_ms)
        due.append(action)

    def run(self, duration_ms: int) -> None:
        """Advance, and let happen what is due on the way."""
        end_ms = self.now_ms + duration_ms
        while self._moments and self._moments[0] <= end_ms:
            self.now_ms = self._moments[0]
            due = self._due[self.now_ms]
            for _ in range(EVENTS_PER_INSTANT_MAX):
                if not due:
                    break
                due.popleft()()
            assert not due, f"time stands still at {self.now_ms} ms"
            del self._due[heapq.heappop(self._moments)]
        self.now_ms = end_ms
