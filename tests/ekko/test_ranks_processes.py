"""Two ranks under torchrun: what they publish is what changed, nothing twice; one is killed, and both go on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ekko
from sim_cluster.processes import LocalCluster, NodeSpec
from tests.ekko import ranks_trainer as trainer

pytestmark = pytest.mark.processes

RUN_S_MAX = 200.0
SAVED_AT = trainer.KILLED_AT // trainer.SAVE_EVERY * trainer.SAVE_EVERY


def told_by(folder: Path, life: int) -> list[dict[str, np.ndarray]]:
    """What each rank wrote down in one of its lives."""
    return [dict(np.load(folder / f"rank-{rank}-life-{life}.npz")) for rank in range(2)]


def assert_whole_and_disjoint(ranks: list[dict[str, np.ndarray]], first: int, end: int) -> None:
    for number in range(first, end):
        for table in trainer.ROWS:
            changed = [set(rank[f"changed/{number}/{table}"].tolist()) for rank in ranks]
            assert changed[0] == changed[1], "the ranks have the same weights"
            assert changed[0]
            published = [rank[f"published/{number}/{table}"].tolist() for rank in ranks]
            assert sorted(published[0] + published[1]) == sorted(changed[0]), f"step {number}, table {table}"
        assert [int(rank[f"tensors/{number}"]) for rank in ranks] == [2, 0], "dense parameters are rank 0's"


def test_two_ranks_publish_a_part_each_and_go_on_together_when_one_is_killed(tmp_path: Path) -> None:
    with LocalCluster(tmp_path / "nodes", (NodeSpec("home-1", "home", "train"),)) as cluster:
        cluster.start()
        home = cluster["home-1"]
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
        words += ["--monitor-interval=0.1", trainer.__file__, str(tmp_path), home.local, str(home.run_dir)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        run = subprocess.run(words, env=environment, timeout=RUN_S_MAX, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-12_000:]
        assert_whole_and_disjoint(told_by(tmp_path, 0), 0, trainer.KILLED_AT)
        last = max(life for life in range(4) if (tmp_path / f"rank-0-life-{life}.npz").exists())
        # Of which rank torchrun tells is by chance: when it looks the other one may have ended, too.
        assert last > 0, "rank 1 was not killed"
        assert f"tensors/{trainer.KILLED_AT}" not in told_by(tmp_path, 0)[1], "it was killed later"
        again = told_by(tmp_path, last)
        assert [int(rank["first"]) for rank in again] == [SAVED_AT, SAVED_AT]
        assert_whole_and_disjoint(again, SAVED_AT, trainer.STEPS)
        weights = [dict(np.load(tmp_path / f"weights-{rank}.npz")) for rank in range(2)]
        with ekko.Reader("ctr", home.run_dir) as reader:
            for table, rows in trainer.ROWS.items():
                held = reader.lookup(table, np.arange(rows, dtype=np.uint64))
                for rank in weights:
                    assert np.array_equal(held, rank[f"{table}.weight"]), table
            for name in ("top.weight", "top.bias"):
                assert np.array_equal(reader.dense(name), weights[0][name])
        assert_published_again(told_by(tmp_path, 0), again)


def assert_published_again(dead: list[dict[str, np.ndarray]], again: list[dict[str, np.ndarray]]) -> None:
    """Each rank published its part of what the steps after the checkpoint had changed; together they are all of it."""
    for place, table in enumerate(trainer.ROWS):
        changed = set.union(*(set(dead[0][f"changed/{n}/{table}"].tolist()) for n in range(SAVED_AT, trainer.KILLED_AT)))
        assert sum(int(rank["resumed"][place]) for rank in again) == len(changed), table
        assert all(int(rank["resumed"][place]) for rank in again)
