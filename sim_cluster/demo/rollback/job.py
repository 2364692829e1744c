"""What the chapter's workers are told beside the demo's `Job`, and where they leave what they did."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sim_cluster.demo.job import Job
from sim_cluster.demo.rollback.faults import Fault, Kind

ONLINE = 0
BASELINE = 1
NOBODY = 255  # not answered yet


@dataclass(frozen=True, slots=True)
class RollbackJob(Job):
    """One run of the chapter.

    Args:
        train_dir: `run_dir` of the training node, whose rows the trainer goes on with after a rollback.
        baseline_dir: `run_dir` of the baseline node.
        kinds: of the faults, in order.
        bad: how many events each of them lasts.
    """

    train_dir: str
    baseline_dir: str
    kinds: list[Kind]
    bad: list[int]

    def fault(self, place: int, first: int, events: int) -> Fault:
        """The `place`-th fault, where it begins with event `first` of `events`, counted from the first of all."""
        return Fault(self.kinds[place], first, min(first + self.bad[place], events))


def create_arms(folder: Path, events: int) -> None:
    """Nobody has answered anything yet."""
    np.save(folder / "arms.npy", np.full(events, NOBODY, np.uint8))


def open_arms(folder: Path) -> NDArray[np.uint8]:
    """uint8[events]: who answered, `ONLINE` or `BASELINE`; each scorer writes those of its own region."""
    arms: NDArray[np.uint8] = np.load(folder / "arms.npy", mmap_mode="r+")
    return arms
