"""One publishing process and some replicas, which play each opponent in turn; the clock of a round.

The processes live as long as the benchmark and wait on a pipe between rounds, so that nobody's idle processes cost another
side anything. What has happened so far is in counters in shared memory: batches published, and batches applied by each replica.
"""

import ctypes
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.baselines.load import F32, U64, Batches, Load
from benchmarks.baselines.sides import SIDES, WINDOW
from benchmarks.baselines.spent import Round

READY_S_MAX = 60.0
CHECKED_BATCHES = 20  # at the end of each round, the newest ones
LINE = 8  # words between counters: each on a cache line of its own
PUBLISHED, FINAL = 0, 1  # the first counters; then one for each replica
OPEN = (1 << 64) - 1  # of FINAL while the publisher goes on


@dataclass(frozen=True, slots=True)
class Order:
    """What the next round is."""

    side: str
    port: int
    seconds: float
    number: int


class BaselineError(RuntimeError):
    """A round did not do what it should have."""


class Fleet:
    """Runs rounds of the opponents. Use as a context manager."""

    def __init__(self, load: Load, replicas: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._load = load
        self._rounds = 0
        self._memory = context.RawArray(ctypes.c_uint64, (2 + replicas) * LINE)
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        for number in range(1 + replicas):
            ours, theirs = context.Pipe()
            arguments = (theirs, self._memory, load, number - 1)
            process = context.Process(target=_publisher if number == 0 else _replica, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes:
            _expect(pipe, "started", READY_S_MAX)

    def round(self, side: str, port: int, seconds: float) -> Round:
        """Rows a second that the slowest replica applied, from the first batch sent to the last one applied.

        What a server of the side spent is not counted.

        Raises:
            BaselineError: a replica missed something, or did not keep up.
        """
        counters = _counters(self._memory)
        counters[:] = 0
        counters[FINAL] = OPEN
        self._rounds += 1
        order = Order(side, port, seconds, self._rounds)
        publisher, *replicas = self._pipes
        # Who binds the port first, then who connects; nobody sends before all are there.
        publisher.send(order)
        _expect(publisher, "ready", READY_S_MAX)
        for pipe in replicas:
            pipe.send(order)
        for pipe in replicas:
            _expect(pipe, "ready", READY_S_MAX)
        publisher.send(len(replicas))
        begin, published = _expect(publisher, "published", seconds + READY_S_MAX)
        try:
            applied = [_expect(pipe, "applied", READY_S_MAX) for pipe in replicas]
        except BaselineError as error:
            raise BaselineError(f"{side}: {error}; published and applied: {counters.tolist()}") from None
        # Replicas leave before the publisher: a socket that lost its publisher would join the next round's.
        for pipe in (*replicas, publisher):
            pipe.send("end")
            (publisher_s,) = _expect(pipe, "ended", READY_S_MAX)
        taken = max(end for end, _ in applied) - begin
        spent_s = {"publisher": [publisher_s], "replica": [replica_s for _, replica_s in applied]}
        return Round(published * self._load.batch_rows / taken, published, taken, spent_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5.0)
            process.kill()


def _counters(memory: Any) -> U64:
    """uint64[2 + replicas], live; one word is read and written whole."""
    words: NDArray[np.uint64] = np.frombuffer(memory, np.uint64)
    return words[::LINE]


def _expect(pipe: Connection, what: str, timeout_s: float) -> tuple[Any, ...]:
    if not pipe.poll(timeout_s):
        raise BaselineError(f"a process did not say {what!r} within {timeout_s:g} s")
    said, *values = pipe.recv()
    if said != what:
        raise BaselineError(f"expected {what!r}, got {said!r}: {values}")
    return tuple(values)


def _orders(pipe: Connection) -> Iterator[Order]:
    """Orders until the parent hangs up."""
    pipe.send(("started",))
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        yield order


def _publisher(pipe: Connection, memory: Any, load: Load, _number: int) -> None:
    batches, counters = load.batches(), _counters(memory)
    for order in _orders(pipe):
        batches = replace(batches, round=order.number)
        half = SIDES[order.side].publishing(order.port, batches)
        pipe.send(("ready",))
        half.wait_for(pipe.recv())
        begin, begin_s = time.monotonic(), time.process_time()
        half.publish(_paced(counters, begin + order.seconds))
        counters[FINAL] = counters[PUBLISHED]
        pipe.send(("published", begin, int(counters[PUBLISHED])))
        pipe.recv()  # the socket must stay until all have read from it
        spent_s = time.process_time() - begin_s
        half.close()
        pipe.send(("ended", spent_s))


def _paced(counters: U64, until: float) -> Iterator[int | None]:
    """Numbers of the batches to send now; None while the slowest replica is too far behind."""
    number = 0
    while time.monotonic() < until:
        if number - int(counters[2:].min()) >= WINDOW:
            yield None
            continue
        yield number
        number += 1
        counters[PUBLISHED] = number  # it has left: whoever asked for the next one has sent the last


def _replica(pipe: Connection, memory: Any, load: Load, number: int) -> None:
    batches, counters = load.batches(), _counters(memory)
    mine = counters[2 + number :]
    table = np.zeros((load.table_rows, load.dim), np.float32)
    table[...] = 1.0  # every page is there
    for order in _orders(pipe):
        batches = replace(batches, round=order.number)
        half = SIDES[order.side].applying(order.port, batches, lambda: int(counters[PUBLISHED]))
        last = time.monotonic()

        def apply(keys: U64, rows: F32) -> None:
            nonlocal last
            table[keys] = rows
            mine[0] += np.uint64(1)
            last = time.monotonic()

        pipe.send(("ready",))
        begin_s = time.process_time()
        half.serve(apply, lambda: int(mine[0]) >= int(counters[FINAL]))
        spent_s = time.process_time() - begin_s
        wrong = differences(lambda keys: table[keys], batches, int(mine[0]))
        pipe.send(("wrong", f"{wrong} batches of {order.side}") if wrong else ("applied", last, spent_s))
        pipe.recv()
        half.close()
        pipe.send(("ended", spent_s))


def differences(look_up: Callable[[U64], F32], batches: Batches, count: int) -> int:
    """How many of the newest of `count` batches a replica does not hold as they were published."""
    newest = list(batches.newest(count - 1))[:CHECKED_BATCHES]
    return sum(not np.array_equal(look_up(batches.keys_of(number)), batches.rows_of(number)) for number in newest)
