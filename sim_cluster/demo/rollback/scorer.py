"""A scorer of the chapter: answers its region's requests, and reports what came of them.

Each request is one region's. The reader's hash says whether the online model answers it or the baseline, whose rows are some
time older; both are looked up in shared memory. The label becomes known a little later, and is the true one: only what the
trainer learns from is corrupted.
"""

import sys
import time
from collections import deque
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko import Reader
from sim_cluster.demo.board import Board, Word
from sim_cluster.demo.data import Events
from sim_cluster.demo.job import events_path
from sim_cluster.demo.rollback.job import BASELINE, ONLINE, RollbackJob, open_arms
from sim_cluster.demo.rollback.plan import LABEL_DELAY_S
from sim_cluster.demo.scorer import MODEL_TIMEOUT_S, TICK_NS
from sim_cluster.demo.scoring import Scorer
from sim_cluster.demo.worker import run_worker

UNLEARNT_MAX: Final = 300  # events that were answered and not yet learnt: a second
SLACK: Final = 1e-6  # float32's sigmoid may round to 0 or 1


class GuardedScorer:
    """One run of one region's scorer."""

    def __init__(self, folder: Path, region: str) -> None:
        self._job = RollbackJob.load(folder)
        self._place = self._job.regions.index(region)
        self._board = Board.open(folder, self._job.parent)
        self._arms = open_arms(folder)
        self._events = Events.load(events_path(folder))
        self._run_dir = self._job.run_dirs[region]
        self._unlabelled: deque[tuple[float, NDArray[np.int64]]] = deque()  # when they were answered, and which

    def run(self) -> None:
        """Wait for the first state, then answer the stream."""
        board, place, job = self._board, self._place, self._job
        board.wait_for(lambda: board[Word.VISIBLE] == 1)
        with (
            Reader(job.model, self._run_dir, wait=MODEL_TIMEOUT_S) as online,
            Reader(job.model, job.baseline_dir, wait=MODEL_TIMEOUT_S) as baseline,
        ):
            board.wait_for(lambda: self._whole(baseline))
            scorers = {ONLINE: Scorer(self._events, online), BASELINE: Scorer(self._events, baseline)}
            for scorer in scorers.values():
                scorer.score(0, 1)  # whatever is loaded lazily is loaded now
            board.ready[place] = 1
            board.wait_for(lambda: board[Word.START_NS] != 0)
            self._stream(online, scorers)
            board.wait_for(lambda: board[Word.DONE] == 1)

    def _whole(self, reader: Reader) -> bool:
        """Whether what was learnt offline is there; at the baseline it is one delay after it was published."""
        if not set(self._events.rows) <= set(reader.tables):
            return False
        return all(reader.lookup(table, [0, rows - 1], stamps=True)[1].all() for table, rows in self._events.rows.items())

    def _stream(self, online: Reader, scorers: dict[int, Scorer]) -> None:
        board, job = self._board, self._job
        start_ns, total = board[Word.START_NS], board.scores.shape[1]
        regions = len(job.regions)
        done = 0
        tick_ns = start_ns + TICK_NS * self._place // regions
        while done < total and board[Word.DONE] == 0:
            board.sleep_until(tick_ns)
            now_ns = time.monotonic_ns()
            # Requests wait where the trainer is behind, so that a busy machine makes the stream slow, and not the model old.
            due = min(total, job.due_count(now_ns - start_ns), board[Word.LEARNT] + UNLEARNT_MAX)
            if due > done:
                events = np.arange(done, due)
                self._answer(online, scorers, events[events % regions == self._place])
                board.scored[self._place] = done = due  # from here on the trainer may learn them
            self._report(online)
            tick_ns += TICK_NS * max(1, -(-(now_ns - tick_ns) // TICK_NS))

    def _answer(self, online: Reader, scorers: dict[int, Scorer], events: NDArray[np.int64]) -> None:
        """Predict these events of the stream, each by whom the hash of its number names."""
        arms = online.arm(events)
        for arm, scorer in scorers.items():
            chosen = events[arms == arm]
            if len(chosen):
                self._board.scores[self._place, chosen] = scorer.score_some(self._job.start + chosen)
                self._board.scored_ns[self._place, chosen] = time.monotonic_ns()
        self._arms[events] = arms
        if len(events):
            self._unlabelled.append((time.time(), events))

    def _report(self, online: Reader) -> None:
        """Tell the node of answers whose labels have become known."""
        while self._unlabelled and self._unlabelled[0][0] <= time.time() - LABEL_DELAY_S:
            at, events = self._unlabelled.popleft()
            predictions = np.clip(self._board.scores[self._place, events], SLACK, 1 - SLACK)
            labels = self._events.labels[self._job.start + events]
            online.report(None, predictions, labels, arm=self._arms[events], at=at)


if __name__ == "__main__":
    run_worker(lambda: GuardedScorer(Path(sys.argv[1]), sys.argv[2]).run())
