"""A scorer process: predicts every event when its time comes, with the rows that its node holds at that moment.

It reads through `ekko.Reader`, from the shared memory of one serving node of its region. Events whose times came within the
last few milliseconds are predicted together; rows are looked up anew for each such handful. It never waits for an update.
"""

import sys
import time
from pathlib import Path
from typing import Final

from ekko import Reader
from sim_cluster.demo.board import Board, Word
from sim_cluster.demo.data import Events
from sim_cluster.demo.job import Job, events_path
from sim_cluster.demo.scoring import Scorer
from sim_cluster.demo.worker import run_worker

TICK_NS: Final = 15_000_000
HANDFUL_MAX: Final = 256  # events predicted with one look-up, should the process have been held up
MODEL_TIMEOUT_S: Final = 120.0


class RegionScorer:
    """One run of one region's scorer."""

    def __init__(self, folder: Path, region: str) -> None:
        self._job = Job.load(folder)
        self._place = self._job.regions.index(region)
        self._board = Board.open(folder, self._job.parent)
        self._events = Events.load(events_path(folder))
        self._run_dir = self._job.run_dirs[region]

    def run(self) -> None:
        """Wait for the first state, then predict the stream."""
        board, place = self._board, self._place
        board.wait_for(lambda: board[Word.VISIBLE] == 1)
        device = self._job.device or None
        with Reader(self._job.model, self._run_dir, wait=MODEL_TIMEOUT_S, device=device) as reader:
            scorer = Scorer(self._events, reader)
            scorer.score(0, 1)  # whatever is loaded lazily is loaded now
            board.ready[place] = 1
            board.wait_for(lambda: board[Word.START_NS] != 0)
            self._stream(scorer)
            if reader.device is not None:
                counts = reader.device.counts
                board.device_keys[place] = counts.hits, counts.misses + counts.behind + counts.host_only
            # Ending is work too, and three processes that end at once would hold the last updates up.
            board.wait_for(lambda: board[Word.DONE] == 1)

    def _stream(self, scorer: Scorer) -> None:
        board, job, place = self._board, self._job, self._place
        start_ns = board[Word.START_NS]
        total = board.scores.shape[1]
        done = 0
        # The scorers take turns: a dozen processes that wake at one moment would keep each other waiting.
        tick_ns = start_ns + TICK_NS * place // len(job.regions)
        while done < total:
            board.sleep_until(tick_ns)
            now_ns = time.monotonic_ns()
            due = min(total, job.due_count(now_ns - start_ns))
            while done < due:
                last = min(due, done + HANDFUL_MAX)
                board.scores[place, done:last] = scorer.score(job.start + done, job.start + last)
                board.scored_ns[place, done:last] = time.monotonic_ns()
                board.scored[place] = done = last  # from here on the trainer may learn them
            tick_ns += TICK_NS * max(1, -(-(now_ns - tick_ns) // TICK_NS))  # keeps to its turn, also after a stop


if __name__ == "__main__":
    run_worker(lambda: RegionScorer(Path(sys.argv[1]), sys.argv[2]).run())
