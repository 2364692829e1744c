"""Where the demo's processes meet: words and columns in mapped files, each with one writer.

The board keeps the promise on which the figures rest: the trainer learns an event only when every scorer has written down its
prediction of it. Nobody waits for the trainer, and updates travel through the nodes alone.
"""

import os
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import numpy as np

POLL_S = 0.002


class StoppedError(Exception):
    """The demo was told to end, or is gone."""


class Word(IntEnum):
    """Single numbers on the board. The demo writes the first three, the trainer the others."""

    STOP = 0  # 1: end at once
    CLUSTER_READY = 1  # 1: the nodes are up
    START_NS = 2  # CLOCK_MONOTONIC of the first event, nanoseconds; 0: not yet known
    OFFLINE_PERMILLE = 3  # of the offline training
    VISIBLE = 4  # 1: the first state is visible on every node
    LEARNT = 5  # events of the stream learnt
    ROWS = 6  # published while streaming
    BYTES = 7
    BATCHES = 8
    LAG_MAX_US = 9  # from an event's time until it was learnt, at most
    DONE = 10  # 1: everything published is visible everywhere, and written down


class Board:
    """The board of one run, in `folder`.

    Attributes:
        words: int64, indexed by `Word`.
        ready: int64[regions]: 1 when the scorer is ready.
        scored: int64[regions]: events predicted so far.
        device_keys: int64[regions, 2]: keys that the scorer found on its device, and those that it read in shared memory.
        scores: float32[regions, events]: the predictions.
        scored_ns: int64[regions, events]: CLOCK_MONOTONIC when the prediction was there.
        learnt_ns: int64[events]: CLOCK_MONOTONIC when the trainer began to learn the event.
    """

    def __init__(self, folder: Path, mode: str, parent: int) -> None:
        self.words = np.load(folder / "board.words.npy", mmap_mode=mode)  # type: ignore[arg-type]
        self.ready = np.load(folder / "board.ready.npy", mmap_mode=mode)  # type: ignore[arg-type]
        self.scored = np.load(folder / "board.scored.npy", mmap_mode=mode)  # type: ignore[arg-type]
        self.device_keys = np.load(folder / "board.device_keys.npy", mmap_mode=mode)  # type: ignore[arg-type]
        self.scores = np.load(folder / "board.scores.npy", mmap_mode=mode)  # type: ignore[arg-type]
        self.scored_ns = np.load(folder / "board.scored_ns.npy", mmap_mode=mode)  # type: ignore[arg-type]
        self.learnt_ns = np.load(folder / "board.learnt_ns.npy", mmap_mode=mode)  # type: ignore[arg-type]
        self._parent = parent

    @classmethod
    def create(cls, folder: Path, regions: int, events: int) -> "Board":
        """A blank board, for the demo itself."""
        np.save(folder / "board.words.npy", np.zeros(len(Word), np.int64))
        np.save(folder / "board.ready.npy", np.zeros(regions, np.int64))
        np.save(folder / "board.scored.npy", np.zeros(regions, np.int64))
        np.save(folder / "board.device_keys.npy", np.zeros((regions, 2), np.int64))
        np.save(folder / "board.scores.npy", np.zeros((regions, events), np.float32))
        np.save(folder / "board.scored_ns.npy", np.zeros((regions, events), np.int64))
        np.save(folder / "board.learnt_ns.npy", np.zeros(events, np.int64))
        return cls(folder, "r+", os.getppid())

    @classmethod
    def open(cls, folder: Path, parent: int) -> "Board":
        """The board that the process `parent` made."""
        return cls(folder, "r+", parent)

    def __getitem__(self, word: Word) -> int:
        return int(self.words[word])

    def __setitem__(self, word: Word, value: int) -> None:
        self.words[word] = value

    def check(self) -> None:
        """Raise `StoppedError` when there is nothing left to do."""
        if self[Word.STOP] or os.getppid() != self._parent:
            raise StoppedError

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return when `condition()` holds.

        Raises:
            StoppedError: the demo ended first.
        """
        while not condition():
            self.check()
            time.sleep(POLL_S)

    def sleep_until(self, moment_ns: int) -> None:
        """Sleep until CLOCK_MONOTONIC reaches `moment_ns`. Raises as `wait_for`."""
        self.check()
        left_ns = moment_ns - time.monotonic_ns()
        if left_ns > 0:
            time.sleep(left_ns / 1e9)
