"""The trainer process: learns offline, publishes that state, then learns the stream and publishes each step.

Publishing is `ekko.torch.track` and nothing else: this is the loop of any PyTorch trainer, with a clock.
"""

import sys
import time
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import ArrayLike

import ekko.torch
from ekko import Publisher
from ekko.codec import rounded
from sim_cluster.demo.board import Board, Word
from sim_cluster.demo.data import Events
from sim_cluster.demo.history import Floats, History, Recorder
from sim_cluster.demo.job import Job, events_path, history_path, parameters_path
from sim_cluster.demo.learning import DIM, STREAM_BATCH, STREAM_BATCH_MAX, Learner
from sim_cluster.demo.worker import run_worker

DENSE_EVERY: Final = 8  # steps: four times a second at the default rate
# A step begins this long after its last event's time, by when every scorer has predicted it as a rule; then nobody waits.
MARGIN_NS: Final = 18_000_000
VISIBLE_TIMEOUT_S: Final = 60.0
SILENT_POLL_S: Final = 0.1


class Trainer:
    """One run of the trainer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._job = Job.load(folder)
        self._board = Board.open(folder, self._job.parent)
        self._events = Events.load(events_path(folder))
        self._learner = Learner(self._events, self._job.seed)

    def run(self) -> None:
        """Everything, in order."""
        board = self._board
        self._learner.train_offline(self._job.start, self._show_offline)
        board.wait_for(lambda: board[Word.CLUSTER_READY] == 1)
        tables = dict.fromkeys(self._events.rows, DIM)
        codec = self._job.codec
        with Publisher(self._job.local, self._job.model, tables, codec=codec, timeout=VISIBLE_TIMEOUT_S) as publisher:
            recorder = Recorder(publisher, codec)
            learner = self._learner
            tracker = ekko.torch.track(
                learner.model, learner.optimizer, recorder, learner.model.tracked, dense_every=DENSE_EVERY, background=False
            )
            _wait_everywhere(publisher, tracker.publish_all())
            recorder.batches.clear()
            first_tables, first_tensors = self._state()
            board[Word.VISIBLE] = 1
            board.wait_for(lambda: board[Word.START_NS] != 0)
            learnt = self._stream(recorder)
            tracker.publish_dense()  # the last steps' dense parameters, which no N-th step took along
            learnt.append(learnt[-1])
            _wait_everywhere(publisher, tracker.stamp)
            self._count(recorder, len(learnt) - 1)
            History.of(first_tables, first_tensors, recorder.batches, learnt).save(history_path(self._folder))
            self._save_parameters()
            board[Word.DONE] = 1

    def _show_offline(self, fraction: float) -> None:
        self._board[Word.OFFLINE_PERMILLE] = int(fraction * 1000)
        self._board.check()

    def _state(self) -> tuple[dict[str, Floats], dict[str, Floats]]:
        """Copies of the tables, as replicas hold them, and of the dense parameters."""
        model, codec = self._learner.model, self._job.codec
        tables = {name: rounded(codec, _copy(table.get_parameter("weight"))) for name, table in model.tables.items()}
        return tables, {name: _copy(value) for name, value in model.named_parameters() if not name.startswith("tables.")}

    def _stream(self, recorder: Recorder) -> list[int]:
        """Learn the stream, never an event that a scorer has not predicted.

        Returns:
            How many events had been learnt with each batch.
        """
        board, job = self._board, self._job
        start_ns = board[Word.START_NS]
        total = len(self._events) - job.start
        learnt: list[int] = []
        first = 0
        while first < total:
            last = min(first + STREAM_BATCH, total)
            board.sleep_until(start_ns + job.due_ns(last - 1) + MARGIN_NS)
            # What has come meanwhile is learnt along with it, so that a trainer that was held up catches up.
            come = job.due_count(time.monotonic_ns() - MARGIN_NS - start_ns)
            last = max(last, min(come, first + STREAM_BATCH_MAX, total))
            board.wait_for(lambda last=last: bool(board.scored.min() >= last))  # type: ignore[misc]
            now_ns = time.monotonic_ns()
            board.learnt_ns[first:last] = now_ns
            board[Word.LAG_MAX_US] = max(board[Word.LAG_MAX_US], (now_ns - start_ns - job.due_ns(first)) // 1000)
            self._learner.learn(job.start + first, job.start + last)
            learnt.append(last)
            board[Word.LEARNT] = first = last
            self._count(recorder, len(learnt) - 1)
        return learnt

    def _count(self, recorder: Recorder, since: int) -> None:
        """Add the batches from index `since` on to the board's totals."""
        for batch in recorder.batches[since:]:
            self._board[Word.ROWS] += batch.row_count
            self._board[Word.BYTES] += batch.payload_bytes
            self._board[Word.BATCHES] += 1

    def _save_parameters(self) -> None:
        tables, tensors = self._state()
        columns: dict[str, ArrayLike] = {f"table/{name}": rows for name, rows in tables.items()}
        columns |= {f"tensor/{name}": value for name, value in tensors.items()}
        np.savez(parameters_path(self._folder), allow_pickle=False, **columns)


def _wait_everywhere(publisher: Publisher, stamp: int) -> None:
    """Also on nodes that are silent, for as long; on a machine that is busy they are soon back.

    Raises:
        TimeoutError: nodes lag that are there.
    """
    deadline_s = time.monotonic() + VISIBLE_TIMEOUT_S
    while publisher.wait(stamp, scope="all", timeout=VISIBLE_TIMEOUT_S) and time.monotonic() < deadline_s:
        time.sleep(SILENT_POLL_S)


def _copy(value: torch.Tensor) -> Floats:
    return value.detach().numpy().copy()


if __name__ == "__main__":
    run_worker(lambda: Trainer(Path(sys.argv[1])).run())
