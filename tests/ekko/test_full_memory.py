"""Real nodes on small tmpfs mounts: full, alive, and whole again when there is room."""

import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import ekko
from ekko.errors import EkkoError, PublishError
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec, wait_until
from tests.everywhere import PATIENCE_S, everywhere
from tests.small_memory import small_tmpfs

pytestmark = pytest.mark.processes
DIM = 16
STEP = 20_000
# `ekko node` has no setting for where shared memory is: on a machine it is /dev/shm.
NODE = """
import asyncio, sys
from pathlib import Path
from ekko.config import load_config
from ekko.daemon import Node
from ekko.logs import configure_logs
configure_logs(this_node="test")
asyncio.run(Node(load_config(Path(sys.argv[1])), memory_dir=Path(sys.argv[2])).run())
"""


def start_in(node: NodeProcess, memory: Path) -> None:
    command = [sys.executable, "-c", NODE, str(node.config_path), str(memory)]
    with node.log_path.open("ab") as log:
        node._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def rows(value: float, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.full((count, DIM), value, np.float32)


def fill(publisher: ekko.Publisher, begin: int) -> tuple[int, str]:
    """Publish new rows until some are refused; returns the first key that was, and why."""
    for key in range(begin, 2_000_000, STEP):
        try:
            publisher.publish("item", np.arange(key, key + STEP, dtype=np.uint64), rows(2, STEP))
        except PublishError as error:
            return key, str(error)
    raise AssertionError("nothing was refused")


def test_full_nodes_live_say_so_and_recover_by_themselves(tmp_path: Path) -> None:
    nodes = [NodeSpec("train-1", "us", "train"), NodeSpec("serve-1", "eu")]
    models = {"ctr": ModelTables({"item": DIM}, capacity_rows=1_000)}
    with (
        small_tmpfs(tmp_path / "large", "48m") as large,
        small_tmpfs(tmp_path / "small", "16m") as small,
        LocalCluster(tmp_path, nodes, models=models) as cluster,
    ):
        train, serve = cluster["train-1"], cluster["serve-1"]
        start_in(train, large)
        start_in(serve, small)
        for node in (train, serve):
            node.wait_ready()
        cluster.wait_members()
        held = np.arange(1_000, dtype=np.uint64)
        with (
            ekko.Publisher(train.local, model="ctr", timeout=PATIENCE_S) as publisher,
            closing(ekko.Reader("ctr", run_dir=serve.run_dir, wait=PATIENCE_S)) as reader,
        ):
            everywhere(publisher, publisher.publish("item", held, rows(1, 1_000)))
            stored, reason = fill(publisher, 1_000)
            assert re.search(r"shared memory is full: .* enlarge the tmpfs .*; nothing was published", reason)
            assert train.status()["models"]["ctr"]["rows"] == stored, "a part of the refused step is there"
            assert train.status()["counters"]["steps_refused_full"] == 1
            publisher.publish("item", held, rows(3, 1_000))  # rows that are there
            with pytest.raises(EkkoError, match="shared memory"):
                ekko.Publisher(train.local, model="other", tables={f"t{number}": 64 for number in range(60)}, shards=4_096)

            wait_until(
                lambda: serve.status()["models"]["ctr"]["memory_full_ms"] is not None, "it says that it is full", PATIENCE_S
            )
            wait_until(lambda: reader.lookup("item", held)[:, 0].tolist() == [3.0] * 1_000, "held rows are updated", PATIENCE_S)
            status = serve.status()
            assert status["models"]["ctr"]["rows"] < stored
            refused = [status["counters"][f"{what}_refused_full"] for what in ("batches", "answers")]
            assert sum(refused) > 0  # whichever way rows come: on a busy machine the link may be in state mode
            assert serve.log_path.read_text().count("memory_full") <= 3

            for memory in (large, small):
                subprocess.run(["mount", "-o", "remount,size=200m", str(memory)], check=True)
            more = np.arange(stored, stored + STEP, dtype=np.uint64)
            publisher.publish("item", more, rows(4, STEP))
            # Pulls pause for up to half a minute.
            wait_until(lambda: serve.status()["models"]["ctr"]["rows"] == stored + STEP, "it recovers", 2 * PATIENCE_S)
            wait_until(lambda: serve.status()["models"]["ctr"]["memory_full_ms"] is None, "it says so", PATIENCE_S)
            assert set(reader.lookup("item", more)[:, 0].tolist()) == {4.0}
