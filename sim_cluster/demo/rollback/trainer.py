"""The trainer of the chapter: learns a feed that goes bad, until it is told that its model is taken back.

It notices nothing by itself. When the model is fenced, a step is refused with a `ModelError`; then it stops learning, asks now
and then whether the rollback is over, goes on with the rows that were restored, and leaves out what the feed brings until it is
repaired, as somebody whom the alarm woke up would see to.
"""

import sys
import time
from pathlib import Path
from typing import Final

import ekko.torch
from ekko import Publisher, Reader
from ekko.errors import ModelError
from sim_cluster.demo.board import Board, Word
from sim_cluster.demo.data import Events
from sim_cluster.demo.job import events_path
from sim_cluster.demo.learning import DIM, STREAM_BATCH, Learner
from sim_cluster.demo.rollback.faults import Fault, corrupt
from sim_cluster.demo.rollback.job import RollbackJob
from sim_cluster.demo.rollback.schedule import Schedule
from sim_cluster.demo.trainer import DENSE_EVERY, MARGIN_NS, VISIBLE_TIMEOUT_S
from sim_cluster.demo.worker import run_worker

NOTHING: Final = ekko.torch.Reloaded({})  # the rollback is not over


class GuardedTrainer:
    """One run of the trainer."""

    def __init__(self, folder: Path) -> None:
        self._job = RollbackJob.load(folder)
        self._board = Board.open(folder, self._job.parent)
        self._schedule = Schedule(folder)
        self._feed = Events.load(events_path(folder))
        self._fault: Fault | None = None  # the last one that began
        self._learner = Learner(self._feed, self._job.seed)
        self._stopped = False  # until the rollback is over
        self._leave_out_until = 0  # event of all

    def run(self) -> None:
        """Everything, in order."""
        board = self._board
        self._learner.train_offline(self._job.start, self._show_offline)
        board.wait_for(lambda: board[Word.CLUSTER_READY] == 1)
        job, learner = self._job, self._learner
        with (
            Publisher(job.local, job.model, dict.fromkeys(self._feed.rows, DIM)) as publisher,
            Reader(job.model, job.train_dir, wait=VISIBLE_TIMEOUT_S) as reader,
        ):
            model = learner.model
            tracker = ekko.torch.track(
                model, learner.optimizer, publisher, model.tracked, dense_every=DENSE_EVERY, reader=reader, background=False
            )
            publisher.wait(tracker.publish_all(), scope="all", timeout=VISIBLE_TIMEOUT_S)
            board[Word.VISIBLE] = 1
            board.wait_for(lambda: board[Word.START_NS] != 0)
            self._stream(tracker)
            board[Word.DONE] = 1

    def _show_offline(self, fraction: float) -> None:
        self._board[Word.OFFLINE_PERMILLE] = int(fraction * 1000)
        self._board.check()

    def _stream(self, tracker: ekko.torch.Tracker) -> None:
        """Learn the stream, never an event that was not answered.

        Steps stay small where the machine is busy, and requests wait for them: with larger ones a bad feed would do less harm.
        """
        board, job = self._board, self._job
        start_ns, total = board[Word.START_NS], len(self._feed) - job.start
        first = 0
        while first < total and not self._schedule.ended:
            self._break(job.start + first)
            last = min(first + STREAM_BATCH, total)
            board.sleep_until(start_ns + job.due_ns(last - 1) + MARGIN_NS)
            board.wait_for(lambda last=last: bool(board.scored.min() >= last))  # type: ignore[misc]
            now_ns = time.monotonic_ns()
            board.learnt_ns[first:last] = now_ns
            answered_ns = int(board.scored_ns[first % len(job.regions), first])
            board[Word.LAG_MAX_US] = max(board[Word.LAG_MAX_US], (now_ns - answered_ns) // 1000)
            if self._stopped and tracker.reload() != NOTHING:
                self._stopped = False
            if not self._stopped and job.start + first >= self._leave_out_until:
                self._learn(job.start + first, job.start + last)
            board[Word.LEARNT] = first = last

    def _break(self, event: int) -> None:
        """Have the next fault begin with this event, if it may."""
        place = len(self._schedule.firsts)
        if self._schedule.allowed > place:
            self._fault = self._job.fault(place, event, len(self._feed))
            corrupt(self._feed, self._fault, self._job.seed, place)  # the learner has the same arrays
            self._schedule.begin(event)

    def _learn(self, first: int, last: int) -> None:
        try:
            self._learner.learn(first, last)
        except ModelError:  # the model is taken back; what was just learnt is thrown away with the rest
            self._stopped = True
            if self._fault is not None and first < self._fault.last:
                self._leave_out_until = self._fault.last


if __name__ == "__main__":
    run_worker(lambda: GuardedTrainer(Path(sys.argv[1])).run())
