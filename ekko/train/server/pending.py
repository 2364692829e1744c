"""Requests that wait, and the bounds on them."""

from dataclasses import dataclass, field
from typing import Final

# Of one worker, in partitions of one server. A worker has a few pushes under way, each in a message or two for a server.
PUSHES_MAX: Final = 16
ANSWERS_MAX: Final = 64
PULLS_MAX: Final = 64
# Of all workers: a bound on memory. A worker's push of 4,096 rows of dim 64 with Adagrad's state counts 2 MiB.
QUEUE_BYTES_MAX: Final = 256 << 20


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
    since_ms: int


@dataclass(slots=True)
class Pending:
    """What waits: pushes for their step, answers to pushes for its end, and pulls. In order of arrival."""

    pushes: dict[int, Push] = field(default_factory=dict)  # by ask
    waiters: dict[int, Waiter] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)
    bytes: int = 0

    def add_push(self, push: Push) -> None:
        """Keep a push until `drop_push`."""
        self.pushes[push.ask] = push
        self.bytes += push.bytes

    def drop_push(self, ask: int) -> None:
        """Forget a push."""
        self.bytes -= self.pushes.pop(ask).bytes

    def has_room(self, worker: int, size: int) -> bool:
        """Whether a push of so many bytes may wait."""
        if sum(push.worker == worker for push in self.pushes.values()) >= PUSHES_MAX:
            return False
        return not self.pushes or self.bytes + size <= QUEUE_BYTES_MAX

    def waiters_of(self, worker: int) -> list[Waiter]:
        """Answers that a worker waits for."""
        return [waiter for waiter in self.waiters.values() if waiter.worker == worker]
