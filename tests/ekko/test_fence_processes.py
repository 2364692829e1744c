"""`ekko fence` and `ekko lift` with real processes: publishers are refused or pause, a killed node remembers, all go on."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import ekko
from ekko.errors import ModelError
from sim_cluster.processes import LocalCluster, NodeProcess, NodeSpec, wait_until
from tests.ekko.settled import WITHIN_S, everywhere

pytestmark = pytest.mark.processes

NODES = (NodeSpec("train-1", "home", "train"), NodeSpec("train-2", "eu", "train"), NodeSpec("us-1", "us"))


def run(at: NodeProcess, *command: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ekko.cli", *command, "--http", at.http]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def fenced(at: NodeProcess, *arguments: str) -> dict[str, object]:
    done = run(at, "fence", "ctr", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def stage(node: NodeProcess) -> str:
    fence = node.status()["models"]["ctr"]["fence"]
    return "" if fence is None else str(fence["stage"])


def test_writers_are_stopped_and_go_on(tmp_path: Path) -> None:
    keys, rows = np.arange(40, dtype=np.uint64), np.ones((40, 4), np.float32)
    with LocalCluster(tmp_path, NODES) as cluster:
        cluster.start()
        first, second, third = cluster.nodes.values()
        with (
            ekko.Publisher(first.local, model="ctr", tables={"item": 4}) as one,
            ekko.Publisher(second.local, model="ctr", tables={"item": 4}, while_fenced="wait", fenced_timeout=120.0) as other,
        ):
            everywhere(one, one.publish("item", keys, rows))
            everywhere(other, other.publish("item", keys[:20], 2 * rows[:20]))
            last = one.publish("item", keys[:10], 3 * rows[:10])

            asked = fenced(third, "--note", "shuffled labels")
            deadline = time.monotonic() + WITHIN_S
            while not asked["closed"]:  # after a few seconds it says for whom it waits
                assert time.monotonic() < deadline, asked
                asked = fenced(third, "--epoch", str(asked["epoch"]))
            assert asked == {"model": "ctr", "epoch": 1, "closed": True, "waits_for": []}
            wait_until(lambda: stage(first) == stage(second) == "closed", "all know", WITHIN_S)
            with pytest.raises(ModelError, match=r"model 'ctr': it is being rolled back \(epoch 1: shuffled labels\)"):
                one.publish("item", keys, rows)
            for node in cluster.nodes.values():  # what was acknowledged is everywhere
                with ekko.Reader("ctr", run_dir=node.run_dir, wait=WITHIN_S) as reader:
                    _, stamps = reader.lookup("item", keys[:10], stamps=True)
                    assert (stamps == last).all(), node.id

            stamps_after: list[int] = []
            thread = threading.Thread(target=lambda: stamps_after.append(other.publish("item", keys[5:8], 4 * rows[:3])))
            thread.start()
            first.kill()
            first.start()
            first.wait_ready()
            assert stage(first) == "closed", "a killed node forgot the fence"
            assert not stamps_after
            shown = run(third, "status")
            assert "ctr is fenced (epoch 1, closed: shuffled labels)" in " ".join(shown.stdout.split()), shown.stdout

            done = run(second, "lift", "ctr")
            assert done.stdout == "the fence of epoch 1 is lifted: model ctr is written\n", done.stderr
            thread.join(WITHIN_S)
            assert stamps_after
            assert stamps_after[0] > last
            wait_until(lambda: stage(first) == stage(third) == "lifted", "all know", WITHIN_S)
            everywhere(one, one.publish("item", keys[:2], 5 * rows[:2]))
            everywhere(other, stamps_after[0])
            assert "model 'ctr' is not fenced" in run(third, "lift", "ctr").stderr
            assert one.restored() == other.restored() == ()
        expected = np.repeat(np.float32([5, 3, 4, 3, 2, 1]), [2, 3, 3, 2, 10, 20])
        for node in cluster.nodes.values():
            with ekko.Reader("ctr", run_dir=node.run_dir, wait=WITHIN_S) as reader:
                assert reader.lookup("item", keys)[:, 0].tolist() == expected.tolist(), node.id
