"""A trainer and its machine are killed; another trainer goes on from the checkpoint at another node (R24)."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import ekko
from sim_cluster.processes import LocalCluster, NodeProcess, NodeSpec, wait_until
from tests.ekko import checkpoint_trainer as trainer

pytestmark = pytest.mark.processes

NODES = (NodeSpec("home-1", "home", "train"), NodeSpec("away-1", "away", "train"), NodeSpec("eu-1", "eu"))
STEPS = 25
START_S = 90.0
KEYS = np.arange(trainer.ROWS, dtype=np.uint64)


@contextmanager
def started(folder: Path, node: NodeProcess, steps: int) -> Iterator[subprocess.Popen[bytes]]:
    words = [sys.executable, trainer.__file__, str(folder), node.local, str(node.run_dir), str(steps)]
    process = subprocess.Popen(words)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def steps_of(folder: Path) -> list[list[int]]:
    log = folder / "steps"
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
    return [[int(word) for word in line.split()] for line in whole.splitlines()]


def test_what_a_dead_run_left_behind_does_not_stay_and_does_not_win(tmp_path: Path) -> None:
    with LocalCluster(tmp_path / "nodes", NODES) as cluster:
        cluster.start()
        home, away, eu = (cluster[spec.id] for spec in NODES)
        with started(tmp_path, home, 1_000_000) as dead:
            wait_until(lambda: dead.poll() is not None or (tmp_path / "checkpoint.pt").exists(), "a checkpoint", START_S)
            with ekko.Publisher(away.local, "ctr", {"other": 4}, timeout=60.0) as publisher:
                publisher.publish(
                    "other", [1], np.zeros((1, 4), np.float32)
                )  # it has a writer id before the node dies that could give one
            away.pause()  # it misses the last of what the run does
            count = len(steps_of(tmp_path))
            wait_until(lambda: len(steps_of(tmp_path)) > max(count, 2 * trainer.SAVE_EVERY) + 10, "steps after it", START_S)
            dead.kill()
            dead.wait()
        first_run = steps_of(tmp_path)
        with ekko.Reader("ctr", home.run_dir) as here, ekko.Reader("ctr", eu.run_dir) as there:
            wait_until(
                lambda: np.array_equal(here.lookup("item", KEYS), there.lookup("item", KEYS)), "eu to have the run", START_S
            )
        home.kill()
        home.remove_memory()
        with ekko.Reader("ctr", eu.run_dir) as reader:
            last_rows, last_stamps = reader.lookup("item", KEYS, stamps=True)
        away.resume()
        with started(tmp_path, away, STEPS) as again:
            assert again.wait(START_S) == 0
        # A region of which nobody answers was named before it was accepted.
        assert (tmp_path / "refused").read_text().startswith("no node answers in home (home-1): ")
        done = np.load(tmp_path / "done.npz")
        resumed_at = 2 * trainer.SAVE_EVERY
        touched = {key for number, *keys in first_run if number >= resumed_at for key in keys}
        touched_again = {key for number, *keys in steps_of(tmp_path)[len(first_run) :] for key in keys}
        assert touched - touched_again, "rows that only the dead run changed after the checkpoint"
        for node in (away, eu):
            with ekko.Reader("ctr", node.run_dir, wait=60.0) as reader:
                wait_until(
                    lambda reader=reader: np.array_equal(reader.lookup("item", KEYS), done["item"]),  # type: ignore[misc]
                    f"{node.id} has the table of the run that lives",
                    60.0,
                )
                held = reader.lookup("item", KEYS, stamps=True)
                wait_until(
                    lambda reader=reader: np.array_equal(reader.dense("top.weight"), done["weight"]),  # type: ignore[misc]
                    f"{node.id} has its dense parameters",
                    60.0,
                )
                changed = (last_rows != done["item"]).any(axis=1)
                assert set(np.flatnonzero(changed)) & (touched - touched_again)
                assert held[1][changed].min() > last_stamps.max(), "its clock was ahead, and newer rows are above all the same"
