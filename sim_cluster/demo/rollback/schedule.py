"""When a stage begins: once the one before it has ended well, and not at a time that was written down before.

How long it takes until a fault is decided and taken back depends on the machine, and on luck. By the clock the next fault
would begin in the middle of a rollback on a busy one. So the demo lets the trainer begin a fault, and the trainer
writes down with which event it did: nobody has to guess what the other one is about to do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from sim_cluster.demo.rollback.faults import Fault
from sim_cluster.demo.rollback.plan import Stage
from sim_cluster.demo.rollback.watch import Course, Watch

NOT_YET: Final = -1
_ALLOWED, _ENDED, _FIRSTS = 0, 1, 2


class Schedule:
    """What the demo and the trainer tell each other, in a mapped file.

    Args:
        folder: of the run.
        stages: how many; 0: the file is there.
    """

    def __init__(self, folder: Path, stages: int = 0) -> None:
        path = folder / "schedule.npy"
        if stages:
            np.save(path, np.array([0, 0, *[NOT_YET] * stages], np.int64))
        self._words = np.load(path, mmap_mode="r+")

    @property
    def allowed(self) -> int:
        """How many faults may have begun; the demo's word."""
        return int(self._words[_ALLOWED])

    def allow(self, stages: int) -> None:
        """Let faults begin."""
        self._words[_ALLOWED] = stages

    @property
    def ended(self) -> bool:
        """Whether nothing more is learnt; the demo's word."""
        return bool(self._words[_ENDED])

    def end(self) -> None:
        """All was seen."""
        self._words[_ENDED] = 1

    @property
    def firsts(self) -> list[int]:
        """The event with which each fault began that did, counted from the first of all; the trainer's word."""
        return [int(first) for first in self._words[_FIRSTS:] if first != NOT_YET]

    def begin(self, first: int) -> None:
        """The next fault begins with this event."""
        self._words[_FIRSTS + len(self.firsts)] = first

    def faults(self, stages: Sequence[Stage], last: int = 1 << 62) -> tuple[Fault, ...]:
        """Those that began, none longer than up to event `last`."""
        begun = zip(self.firsts, stages, strict=False)
        return tuple(Fault(stage.kind, first, min(first + stage.bad, last)) for first, stage in begun if first < last)


@dataclass(slots=True)
class Director:
    """Says when the next fault may begin, and when the stream has been long enough.

    Args:
        schedule: where it says so.
        stages: the faults, and what has to be clean around them.
        start: index of the stream's first event.
        event_at: how many events of the stream had been answered at a second of it.
    """

    schedule: Schedule
    stages: Sequence[Stage]
    start: int
    event_at: Callable[[float], int]

    def look(self, watch: Watch, learnt: int) -> None:
        """`learnt`: events of the stream."""
        begun = len(self.schedule.firsts)
        if self.schedule.allowed > begun:
            return  # the trainer is about to
        clean_since = self._clean_since(watch)
        if clean_since is None:
            return
        before = self.stages[begun - 1].after if begun else 0
        if begun == len(self.stages):
            if learnt >= clean_since + before:
                self.schedule.end()
        elif learnt >= clean_since + before + self.stages[begun].before and watch.judged == "healthy":
            self.schedule.allow(begun + 1)

    def _clean_since(self, watch: Watch) -> int | None:
        """The event of the stream from which on nothing of the last fault is left; None: that is not so yet."""
        firsts = self.schedule.firsts
        if not firsts:
            return 0
        stage, first = self.stages[len(firsts) - 1], firsts[-1] - self.start
        courses = [one for one in watch.courses.values() if self.event_at(one.decided_s) >= first]
        if any(one.over_s is None for one in courses):
            return None
        if not courses:  # missed so far: it may still be found, for as long again
            return first + 2 * stage.bad if self.event_at(watch.now_s) >= first + 2 * stage.bad else None
        return max(first + stage.bad, *(self.event_at(_over_s(one)) for one in courses))


def _over_s(course: Course) -> float:
    assert course.over_s is not None
    return course.over_s
