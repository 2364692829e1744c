"""Requests that wait, and the bounds on them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

# Of one worker, in partitions of one server. A worker has a few pushes under way, each in a message or two for a server.
PUSHES_MAX: Final = 16
ANSWERS_MAX: Final = 64
PULLS_MAX: Final = 64
# Of all workers: a bound on memory. A worker's push of 4,096 rows of dim 64 with Adagrad's state counts 2 MiB.
QUEUE_BYTES_MAX: Final = 256 << 20
# Of all workers: keys of pulls that wait, and the rows that all of them come to at once when clocks move.
PULL_BYTES_MAX: Final = 256 << 20


@dataclass(slots=True)
class Push:
    """A push whose columns the shell has; `left`: partitions in which it is in no step yet."""

    ask: int
    worker: int
    life: int
    number: int
    bytes: int
    shares: int  # of the bytes: partitions it came for
    left: set[int]
    since_ms: int


@dataclass(slots=True)
class Waiter:
    """Who wants to know when push `number` of a worker is settled in all of these partitions."""

    ask: int
    worker: int
    number: int
    left: set[int]
    stamp: int = 0


@dataclass(slots=True)
class Pull:
    """A pull that waits for the clocks of other workers."""

    ask: int
    worker: int
    clock: int
    partitions: tuple[int, ...]
    bytes: int
    since_ms: int


@dataclass(slots=True)
class Pending:
    """What waits: pushes for their step, answers to pushes for its end, and pulls. In order of arrival."""

    pushes: dict[int, Push] = field(default_factory=dict)  # by ask
    waiters: dict[int, Waiter] = field(default_factory=dict)  # `add_waiter` and `drop_waiter`
    pulls: dict[int, Pull] = field(default_factory=dict)  # `add_pull` and `drop_pull`
    bytes: int = 0  # of pushes
    pull_bytes: int = 0
    _pushes_of: Counter[int] = field(default_factory=Counter)  # by worker
    _pulls_of: Counter[int] = field(default_factory=Counter)
    _waiters_of: dict[int, dict[int, Waiter]] = field(default_factory=dict)  # by worker, and ask

    def add_push(self, push: Push) -> None:
        """Keep a push until `drop_push`."""
        self.pushes[push.ask] = push
        self.bytes += push.bytes
        self._pushes_of[push.worker] += 1

    def drop_push(self, ask: int) -> None:
        """Forget a push."""
        push = self.pushes.pop(ask)
        self.bytes -= push.bytes
        self._pushes_of[push.worker] -= 1

    def has_room(self, worker: int, size: int) -> bool:
        """Whether a push of so many bytes may wait."""
        if self._pushes_of[worker] >= PUSHES_MAX:
            return False
        return not self.pushes or self.bytes + size <= QUEUE_BYTES_MAX

    def add_pull(self, pull: Pull) -> None:
        """Keep a pull until `drop_pull`."""
        self.pulls[pull.ask] = pull
        self.pull_bytes += pull.bytes
        self._pulls_of[pull.worker] += 1

    def drop_pull(self, ask: int) -> Pull:
        """It is answered."""
        pull = self.pulls.pop(ask)
        self.pull_bytes -= pull.bytes
        self._pulls_of[pull.worker] -= 1
        return pull

    def has_room_for_pull(self, worker: int, size: int) -> bool:
        """Whether a pull of so many bytes may wait."""
        if self._pulls_of[worker] >= PULLS_MAX:
            return False
        return not self.pulls or self.pull_bytes + size <= PULL_BYTES_MAX

    def waiters_of(self, worker: int) -> list[Waiter]:
        """Answers that a worker waits for."""
        return list(self._waiters_of.get(worker, {}).values())

    def add_waiter(self, waiter: Waiter) -> None:
        """Keep it until `drop_waiter`."""
        self.waiters[waiter.ask] = waiter
        self._waiters_of.setdefault(waiter.worker, {})[waiter.ask] = waiter

    def drop_waiter(self, waiter: Waiter) -> None:
        """It is answered."""
        del self.waiters[waiter.ask]
        del self._waiters_of[waiter.worker][waiter.ask]
