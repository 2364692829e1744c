"""The supervisor of real nodes: what it writes, what it says when a node fails, and that it leaves nothing behind."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ekko.config import load_config
from ekko.model import ModelSpec, TableSpec
from ekko.node.delaying import CURRENT_DIR
from ekko.store import Store
from ekko.store.manifest import prefix_of
from sim_cluster.processes import (
    MEMORY_DIR,
    LocalCluster,
    ModelTables,
    NodeProcess,
    NodeProcessError,
    NodeSpec,
    free_ports,
    wait_until,
)
from tests.everywhere import PATIENCE_S

TRAIN, SERVE = NodeSpec("train-1", "home", "train"), NodeSpec("eu-1", "eu")


def test_ports_are_free_and_different() -> None:
    ports = free_ports(50, random.Random(1))
    assert len(set(ports)) == 50
    # Nobody listens on them yet, and the next who asks gets others.
    assert not set(ports) & set(free_ports(50, random.Random(1)))


def test_ports_that_another_process_was_given_are_given_here_when_it_is_gone() -> None:
    """Before that, the nodes that are to listen there may still start, or start again."""
    program = "import random; from sim_cluster.processes import free_ports; print(*free_ports(5, random.Random(2))); input()"
    with subprocess.Popen([sys.executable, "-uc", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            theirs = set(map(int, other.stdout.readline().split()))
            assert len(theirs) == 5
            assert not theirs & set(free_ports(20, random.Random(2)))
        finally:
            other.kill()
    assert theirs & set(free_ports(20, random.Random(2)))  # of which a program elsewhere may have taken one


def test_configuration_says_what_was_asked_for(tmp_path: Path) -> None:
    models = {"ctr": ModelTables({"item": 16, "user.id": 8}, shards=32, capacity_rows=5_000)}
    with LocalCluster(tmp_path, [SERVE, TRAIN], models=models, delays_ms={"home/eu": 2.5}) as cluster:
        train, serve = load_config(cluster["train-1"].config_path), load_config(cluster["eu-1"].config_path)
        assert train.node.seeds == []
        assert serve.node.seeds == [cluster["train-1"].peers] == [train.node.peers]
        assert (serve.node.id, serve.node.region, serve.node.role) == ("eu-1", "eu", "serve")
        assert serve.node.run_dir == cluster["eu-1"].run_dir
        assert {name: table.dim for name, table in serve.models["ctr"].tables.items()} == {"item": 16, "user.id": 8}
        assert serve.delay_s("eu", "home") == 0.0025
        assert [node.id for node in cluster.in_region("eu")] == ["eu-1"]
        assert serve.node.http != train.node.http
        with pytest.raises(NodeProcessError, match="not running"):
            _ = cluster["eu-1"].pid


def test_two_nodes_with_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NodeProcessError, match="two nodes are called 'eu-1'"):
        LocalCluster(tmp_path, [SERVE, SERVE])


def test_node_that_cannot_start_is_quoted(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, [TRAIN]) as cluster:
        node = cluster["train-1"]
        node.config_path.write_text("[node]\nid = 7\n")
        node.start()
        with pytest.raises(
            NodeProcessError, match=r"train-1 ended before it was ready: .*node\.toml:2: node\.id: expected text"
        ):
            node.wait_ready()
        assert node.stop() == 2
        with pytest.raises(NodeProcessError, match="does not answer GET /status"):
            node.status()


@pytest.mark.processes
def test_nothing_is_left_behind_after_stop_kill_pause_or_an_exception(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path, [TRAIN, SERVE], models={"m": ModelTables({"t": 4})})
    train, serve = cluster.nodes.values()

    def use() -> None:
        with cluster:
            cluster.start()
            with pytest.raises(NodeProcessError, match="runs already"):
                train.start()
            assert list(MEMORY_DIR.glob(f"{prefix_of(train.run_dir)}-*"))
            assert train.stop() == 0
            serve.kill()
            assert not serve.running
            serve.start()
            serve.pause()  # in the middle of its start, and deaf to SIGTERM
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    for node in (train, serve):
        assert not node.running
        assert not list(MEMORY_DIR.glob(f"{prefix_of(node.run_dir)}-*"))


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:  # also between the file's being found and being read
        return False


@pytest.mark.processes
def test_nodes_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from sim_cluster.processes import LocalCluster, NodeSpec
cluster = LocalCluster(Path({str(tmp_path)!r}), [NodeSpec("n-1", "home", "train")])
cluster["n-1"].start()
cluster["n-1"].wait_ready()
print(cluster["n-1"].pid, flush=True)
input()
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert lives(pid)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        wait_until(lambda: not lives(pid), "it ends", PATIENCE_S)
    finally:
        parent.kill()
        parent.communicate()
        for path in MEMORY_DIR.glob(f"{prefix_of(tmp_path / 'n-1' / 'run')}-*"):
            path.unlink()


def test_both_stores_of_a_baseline_are_removed(tmp_path: Path) -> None:
    node = NodeProcess(NodeSpec("base-1", "eu", "baseline"), tmp_path / "base-1", free_ports(3))
    run_dirs = [node.run_dir, node.run_dir / CURRENT_DIR]
    for run_dir in run_dirs:
        store = Store.open(run_dir)
        store.add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 4)}))
        store.close()
        assert list(MEMORY_DIR.glob(f"{prefix_of(run_dir)}-*"))
    node.remove_memory()
    assert [path for run_dir in run_dirs for path in MEMORY_DIR.glob(f"{prefix_of(run_dir)}-*")] == []
