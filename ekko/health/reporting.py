"""The scorer's half of quality events: a bounded queue, and a thread that hands it to the local node.

A scorer must never wait for the monitor. `put` costs a copy into a queue; when the queue is full, or the node does not answer,
events are dropped and counted. A metric of a window is a mean, and a mean does not mind. What waits of one model and segment
goes as one report, so that a scorer that reports each request by itself asks the node no more often than it answers.
"""

import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ekko.errors import EkkoError, ModelError
from ekko.health.windows import Events
from ekko.health.wire import REPORT_EVENTS_MAX, Report, Reported
from ekko.local import Failed
from ekko.rundir import read_endpoint
from ekko.train.connection import Connections

# Events that wait to be handed over: 6 MB, and some seconds of a busy scorer.
EVENTS_QUEUED_MAX: Final = 1 << 18
# Calls of `put` that wait; a part takes a kilobyte, however few its events.
PARTS_QUEUED_MAX: Final = 1 << 14
# A node that answers later than this is as good as none.
ANSWER_S_MAX: Final = 5.0
# After a failure, and while there is nothing to do.
PAUSE_S: Final = 0.2


@dataclass(slots=True)
class ReportCounts:
    """What became of the events of one reader, in this process."""

    sent: int = 0  # the node has taken them
    late: int = 0  # came after their window was closed, or are of the future
    dropped: int = 0  # the queue was full, or the node did not answer
    refused: int = 0  # the node does not want them; `problem` says why
    problem: str = ""


class Reporter:
    """Hands events of one process to its node. Safe for threads, and after a fork."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.counts = ReportCounts()
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._queue: deque[tuple[str, Events]] = deque()
        self._queued = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, model: str, events: Events) -> bool:
        """Queue events; False: there was no room, and they are dropped."""
        if os.getpid() != self._pid:
            self._begin()  # a child has neither the thread nor what it was about to send
        with self._changed:
            full = self._queued + len(events) > EVENTS_QUEUED_MAX or len(self._queue) >= PARTS_QUEUED_MAX
            if self._closed or full:
                self.counts.dropped += len(events)
                return False
            self._queue.append((model, events))
            self._queued += len(events)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ekko-report", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return True

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was queued is handed over, or dropped; False: not in time."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            return self._changed.wait_for(lambda: not self._queued, max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Drop what is left, and end the thread."""
        with self._changed:
            self._closed = True
            self.counts.dropped += self._queued
            self._queue.clear()
            self._queued = 0
            self._changed.notify_all()
        if self._thread is not None and self._pid == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join(ANSWER_S_MAX + 1)

    def _run(self) -> None:
        connections: Connections | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    break
                model, parts = self._next()
            events = _together(parts)
            try:
                if connections is None:
                    connections = Connections(read_endpoint(self._run_dir))
                answer = connections.ask(Report(model, events), ANSWER_S_MAX)
                self._note(events, answer)
            except EkkoError as error:
                self.counts.dropped += len(events)
                self.counts.problem = str(error)
                connections = None  # the node may have moved
                time.sleep(PAUSE_S)
            with self._changed:
                self._queued = max(0, self._queued - len(events))
                self._changed.notify_all()
        if connections is not None:
            connections.close()

    def _next(self) -> tuple[str, list[Events]]:
        """Take the oldest part from the queue, and what is behind it of its model and segment, up to a whole report."""
        model, first = self._queue.popleft()
        parts, count, rest = [first], len(first), deque[tuple[str, Events]]()
        while self._queue:
            other, events = self._queue.popleft()
            if (other, events.segment) == (model, first.segment) and count + len(events) <= REPORT_EVENTS_MAX:
                parts.append(events)
                count += len(events)
            else:
                rest.append((other, events))
        self._queue = rest
        return model, parts

    def _note(self, events: Events, answer: object) -> None:
        counts = self.counts
        match answer:
            case Reported(taken, late, ahead):
                counts.sent += taken
                counts.late += late + ahead
            case Failed(_, reason):
                counts.refused += len(events)
                counts.problem = reason
            case _:
                raise ModelError(f"the node answered a report with {answer!r}: use one release of ekko for both")


def _together(parts: list[Events]) -> Events:
    """Of one segment."""
    if len(parts) == 1:
        return parts[0]
    return Events(
        np.concatenate([one.at_ms for one in parts]),
        np.concatenate([one.prediction for one in parts]),
        np.concatenate([one.label for one in parts]),
        np.concatenate([one.weight for one in parts]),
        np.concatenate([one.arm for one in parts]),
        parts[0].segment,
    )
