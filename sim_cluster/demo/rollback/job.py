"""What the chapter's workers are told beside the demo's `Job`, and where they leave what they did."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sim_cluster.demo.job import Job

ONLINE = 0
BASELINE = 1
NOBODY = 255  # not answered yet


@dataclass(frozen=True, slots=True)
class RollbackJob(Job):
    """One run of the chapter.

    Args:
        train_dir: `run_dir` of the training node, whose rows the trainer goes on with after a rollback.
        baseline_dir: `run_dir` of the baseline node.
        bad: stretches of the feed, [first, last) each, counted from the first of all events.
    """

    train_dir: str
    baseline_dir: str
    bad: list[list[int]]

    def repaired_at(self, event: int) -> int:
        """The event from which on the feed is good again, where the feed is bad at `event`; else `event`."""
        return next((last for first, last in self.bad if first <= event < last), event)


def feed_path(folder: Path) -> Path:
    """The corrupted events, written by the demo."""
    return folder / "feed.npz"


def create_arms(folder: Path, events: int) -> None:
    """Nobody has answered anything yet."""
    np.save(folder / "arms.npy", np.full(events, NOBODY, np.uint8))


def open_arms(folder: Path) -> NDArray[np.uint8]:
    """uint8[events]: who answered, `ONLINE` or `BASELINE`; each scorer writes those of its own region."""
    arms: NDArray[np.uint8] = np.load(folder / "arms.npy", mmap_mode="r+")
    return arms
