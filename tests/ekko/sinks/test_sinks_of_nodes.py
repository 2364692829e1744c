"""`[sinks]` of a real node: processes that it starts, that are killed, whose store is down, and that end with it."""

import json
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ekko
from benchmarks.baselines import servers
from ekko.errors import ModelError, SinkError
from ekko.sinks import RedisRows
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec, free_ports, wait_until

pytestmark = pytest.mark.processes
KEYS = np.arange(300, dtype=np.uint64)
SOON_S = 120.0  # a process that starts on a very busy machine included
EXAMPLES = Path(__file__).parents[3] / "examples"
MODELS = {"ctr": ModelTables({"item": 4}, capacity_rows=1_000)}


class SinkNode(NodeProcess):
    """With sinks."""

    sinks: dict[str, dict[str, Any]]

    def write_config(self, *arguments: Any) -> None:
        super().write_config(*arguments)
        with self.config_path.open("a") as file:
            for name, section in self.sinks.items():
                file.write(f"[sinks.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items()))

    def sink(self, name: str) -> dict[str, Any]:
        """What /status says."""
        said: dict[str, Any] = self.status()["sinks"][name]
        return said

    def pids(self) -> list[int]:
        """Of its companions."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]


@pytest.fixture
def make_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SinkNode]]:
    clusters: list[LocalCluster] = []
    monkeypatch.setenv("SINK_FILE", str(tmp_path / "sink.db"))
    monkeypatch.setenv("PYTHONPATH", f"{EXAMPLES}:{os.environ.get('PYTHONPATH', '')}")

    def make(**sinks: dict[str, Any]) -> SinkNode:
        def make_one(spec: NodeSpec, home: Path, ports: Sequence[int]) -> SinkNode:
            node = SinkNode(spec, home, ports)
            node.sinks = sinks
            return node

        nodes = [NodeSpec("train-1", "eu", "train")]
        clusters.append(LocalCluster(tmp_path / "cluster", nodes, models=MODELS, make_node=make_one))
        node = clusters[0]["train-1"]
        assert isinstance(node, SinkNode)
        return node

    yield make
    for cluster in clusters:
        cluster.close()


def published(publisher: ekko.Publisher, value: float, keys: np.ndarray[tuple[int], np.dtype[np.uint64]] = KEYS) -> None:
    publisher.publish("item", keys, np.full((len(keys), 4), value, np.float32))


def in_file(path: Path) -> dict[int, float]:
    """Key -> first value, of the SQLite file."""
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(path)) as file:
        rows = file.execute("select key, row from rows where row is not null").fetchall()
        return {int.from_bytes(key, "big"): float(np.frombuffer(row, "<f4")[0]) for key, row in rows}
    return {}


def on_node(node: NodeProcess) -> dict[int, float]:
    with ekko.Reader("ctr", run_dir=node.run_dir, wait=SOON_S) as reader:
        rows, stamps = reader.lookup("item", KEYS, stamps=True)
    return {key: value for key, value, stamp in zip(KEYS.tolist(), rows[:, 0].tolist(), stamps, strict=True) if stamp}


def test_a_sink_that_is_killed_comes_back_and_ends_with_its_node(make_node: Callable[..., SinkNode], tmp_path: Path) -> None:
    node = make_node(file={"model": "ctr", "target": "sqlite_sink:make"})
    node.start()
    node.wait_ready()

    def wait_equal(what: str) -> None:
        wait_until(lambda: in_file(tmp_path / "sink.db") == on_node(node), what, SOON_S)

    with ekko.Publisher(node.local, model="ctr") as publisher:
        published(publisher, 1.0)
        wait_equal("the first state")
        wait_until(lambda: node.sink("file")["behind_rows"] == 0, "the sink to say so", SOON_S)
        (pid,) = node.pids()
        os.kill(pid, signal.SIGSTOP)  # what it does not take is seen at the node
        published(publisher, 2.0, KEYS[:100])
        wait_until(lambda: node.sink("file")["behind_rows"] == 100, "the node to tell how far the sink is behind", SOON_S)
        os.kill(pid, signal.SIGKILL)
        publisher.delete("item", KEYS[50:150])
        wait_equal("what was published while no sink was there")
        wait_until(lambda: node.sink("file")["working"] and node.sink("file")["behind_rows"] == 0, "the status to tell", SOON_S)
        said = node.sink("file")
        assert (said["starts"], said["failures"], said["running"]) == (2, 1, True)
        assert "ended with -9" in said["last_error"]
        assert said["behind_ms"] is not None
        metrics = node.metrics()
        for line in ('ekko_sink_up{model="ctr",sink="file"} 1.0', 'ekko_sink_failures_total{model="ctr",sink="file"} 1.0'):
            assert line in metrics, metrics
    (pid,) = node.pids()
    assert node.stop() == 0
    assert not Path(f"/proc/{pid}").exists(), "the sink outlives its node"
    assert in_file(tmp_path / "sink.db"), "what is in the sink stays there"


def test_a_store_that_is_down_is_told_and_tried_again(make_node: Callable[..., SinkNode], tmp_path: Path) -> None:
    if reason := servers.absent("redis"):
        pytest.skip(reason)
    (port,) = free_ports(1)
    url = f"redis://127.0.0.1:{port}/0"
    node = make_node(cache={"model": "ctr", "target": url})
    node.start()
    node.wait_ready()
    with ekko.Publisher(node.local, model="ctr") as publisher:
        published(publisher, 1.0)
        wait_until(lambda: node.sink("cache")["counts"].get("retries", 0) >= 3, "attempts", SOON_S)
        said = node.sink("cache")
        assert not said["working"]
        assert "Connection refused" in said["last_error"]
        for _ in range(2):  # it comes up empty, goes down, and comes up empty again
            with servers.server("redis", tmp_path / "redis", port), closing(RedisRows(url, "ctr")) as rows:
                wait_until(lambda rows=rows: same(node, rows), "redis to have what the node has", SOON_S)
                wait_until(lambda: node.sink("cache")["working"], "the status to tell", SOON_S)
            published(publisher, 2.0, KEYS[:10])
            wait_until(lambda: not node.sink("cache")["working"], "the node to tell that redis is down", SOON_S)
            assert node.sink("cache")["behind_rows"] == 10
        assert node.sink("cache")["starts"] == 1, "a store that is down ends no process"


def same(node: NodeProcess, rows: RedisRows) -> bool:
    with suppress(SinkError, ModelError):
        found, stamps = rows.lookup("item", KEYS)
        return {k: v for k, v, s in zip(KEYS.tolist(), found[:, 0].tolist(), stamps, strict=True) if s} == on_node(node)
    return False
