"""Sinks that are killed by SIGKILL, in forks of the process that tests: of a store that outlives a process nothing is lost."""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

import numpy as np

from ekko.serve import session
from ekko.serve.feeding import Feed
from ekko.serve.sink import Batch, Sink
from ekko.serve.sink_conformance.feeds import caught_up, node_of
from ekko.serve.sink_conformance.subject import MODEL, Subject, expect, opened, put

KILLS: Final = 9
# Of one batch: before lines, evenly among them where there are more moments; and at times, which also fall within a line.
LINE_KILLS_MAX: Final = 100
TIMED_KILLS: Final = 6
WITHIN_S_MAX: Final = 0.002
KILLED_S_MAX: Final = 60.0  # for one that does not end: one that is only slow is to be killed where it was meant to be


def what_was_committed_outlives_a_kill(subject: Subject) -> None:
    """Rows, and the cursor behind them: where the cursor is found, they are."""
    if not subject.durable:
        return
    keys = subject.keys

    def begin(at: int) -> None:
        sink = opened(subject)
        sink.apply(put(subject, keys, at))
        sink.commit(b"%d" % at)
        sink.apply(put(subject, keys[:9], at + 1))
        _die()

    for at in (1, 4, 7):
        _wait(_forked(partial(begin, at)))
        sink = subject.sink()
        cursor = sink.open(MODEL)
        assert cursor is None or int(cursor) <= at, "a cursor was found that nobody has committed"
        if cursor is not None:
            expect(subject, keys[9:], int(cursor), "killed after a commit: the cursor is there, and its rows are not")
        sink.close()


def a_batch_that_was_cut_short_comes_again(subject: Subject) -> None:
    """Kills before each line that the sink runs, and at times within one; then the batch comes once more, and is there."""
    if not subject.durable:
        return
    keys = subject.keys
    sink = opened(subject)
    sink.apply(put(subject, keys, 1))  # the first one of an empty store may go another way
    moments = _first_and_last_visits(sink, put(subject, keys, 2))
    begun = time.monotonic()
    sink.apply(put(subject, keys, 3))
    takes_s = time.monotonic() - begun
    sink.close()

    def at_line(moment: int, sink: Sink, batch: Batch) -> None:
        visits = count()
        _traced(sink, batch, lambda *_: _die() if next(visits) == moment else None)

    def at_time(after_s: float, sink: Sink, batch: Batch) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # who runs tests may have a handler: it is to end the process, at once
        signal.setitimer(signal.ITIMER_REAL, after_s)
        sink.apply(batch)

    ways = [partial(at_line, moment) for moment in moments]
    ways += [partial(at_time, takes_s * number / TIMED_KILLS) for number in range(1, 1 + TIMED_KILLS)]

    def begin(way: Callable[[Sink, Batch], None], at: int) -> None:
        way(opened(subject), put(subject, keys, at))
        _die()

    for at, way in enumerate(ways, 4):
        _wait(_forked(partial(begin, way, at)))
        sink = opened(subject)
        sink.apply(put(subject, keys, at))
        expect(subject, keys, at, "killed in the middle of a batch, which then came again")
        sink.close()


def _first_and_last_visits(sink: Sink, batch: Batch) -> list[int]:
    """Apply a batch; of the lines that this runs, in their order, the numbers of the first and of the last time of each."""
    first: dict[tuple[CodeType, int], int] = {}
    last: dict[tuple[CodeType, int], int] = {}
    visits = count()

    def visited(*line: *tuple[CodeType, int]) -> None:
        last[line] = next(visits)
        first.setdefault(line, last[line])

    _traced(sink, batch, visited)
    moments = sorted({*first.values(), *last.values()})
    return moments[:: 1 + len(moments) // LINE_KILLS_MAX]


def _traced(sink: Sink, batch: Batch, visit: Callable[[CodeType, int], None]) -> None:
    """Apply a batch; before each line of the packages that the sink's classes are of, `visit` is told where it is."""
    packages = {kind.__module__.partition(".")[0] for kind in type(sink).__mro__}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in packages:
            return None
        if event == "line":
            visit(frame.f_code, frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        sink.apply(batch)
    finally:
        sys.settrace(before)


def feeds_are_killed_in_mid_batch(subject: Subject) -> None:
    """Processes of their own, by SIGKILL, before, after and within batches, while the node is written; the last one is left."""
    if not subject.durable:
        return
    rng = np.random.default_rng(3)
    with node_of(subject) as node:
        node.put(subject.keys)
        for number in range(KILLS):
            child = _feed_in_child(subject, node.run_dir, calls=int(rng.integers(2, 14)), moment=number % 3)
            deadline = time.monotonic() + KILLED_S_MAX
            while os.waitpid(child, os.WNOHANG)[0] == 0:
                keys = rng.choice(subject.keys, 30, replace=False)
                (node.put if rng.random() < 0.8 else node.delete)(keys)
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
        sink = subject.sink()
        caught_up(Feed(node.run_dir, MODEL, sink))
        node.check(sink, f"{KILLS} feeds were killed")
        sink.close()


def _feed_in_child(subject: Subject, run_dir: Path, calls: int, moment: int) -> int:
    """Pid of a process that feeds, and is killed at so many calls of its sink: before it, within it, or after it."""

    def begin() -> None:
        session.COMMIT_S = 0.0  # type: ignore[misc]  # a cursor after each part, so that what is kept too early shows
        sink = subject.sink()
        counter = count(1)
        for name in ("apply", "commit"):
            setattr(sink, name, _deadly(getattr(sink, name), counter, calls, moment))
        Feed(run_dir, MODEL, sink).run()

    return _forked(begin)


def _forked(begin: Callable[[], None]) -> int:
    """Pid of a process that does this, and ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork where there are threads: the child leaves them alone
        child = os.fork()
    if child == 0:
        try:
            begin()
        finally:
            os._exit(1)
    return child


def _wait(child: int) -> None:
    """Until it is gone; what it does not do by itself is done to it."""
    deadline = time.monotonic() + KILLED_S_MAX
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _deadly(call: Callable[..., None], counter: Iterator[int], calls: int, moment: int) -> Callable[..., None]:
    def called(*arguments: object) -> None:
        if next(counter) < calls:
            call(*arguments)
            return
        if moment == 1:  # a call takes about as long
            threading.Timer(float(np.random.default_rng(os.getpid()).uniform(0, WITHIN_S_MAX)), _die).start()
        if moment:
            call(*arguments)
        if moment != 1:
            _die()

    return called
