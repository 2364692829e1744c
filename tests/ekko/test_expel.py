"""`ekko expel` with real processes: what is refused, what it answers, and what becomes of a node that comes back."""

import http.client
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import ekko
from sim_cluster.processes import LocalCluster, NodeProcess, NodeProcessError, NodeSpec, living, wait_until
from tests.everywhere import PATIENCE_S, everywhere

pytestmark = pytest.mark.processes

NODES = (NodeSpec("train-1", "home", "train"), NodeSpec("train-2", "eu", "train"), NodeSpec("us-1", "us"))


def expel(node: str, at: NodeProcess, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ekko.cli", "expel", node, "--http", at.http, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def post(node: NodeProcess, body: str, content_type: str = "application/json") -> tuple[int, dict[str, object]]:
    host, _, port = node.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE_S)
    connection.request("POST", "/expel", body, {"Content-Type": content_type})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def test_a_node_is_expelled_and_comes_back_without_what_it_held(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, NODES) as cluster:
        cluster.start()
        first, second, third = cluster.nodes.values()
        keys = np.arange(40, dtype=np.uint64)
        with (
            ekko.Publisher(first.local, model="ctr", tables={"item": 4}, timeout=PATIENCE_S) as one,
            ekko.Publisher(second.local, model="ctr", tables={"item": 4}, timeout=PATIENCE_S) as other,
        ):
            everywhere(one, one.publish("item", keys[:20], np.full((20, 4), 1.0, np.float32)))
            everywhere(other, other.publish("item", keys[20:], np.full((20, 4), 2.0, np.float32)))

            done = expel("train-2", third)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr == "ekko: node 'train-2' is alive: stop it first, then expel it\n"
            assert "no node 'nobody' is known here" in expel("nobody", third).stderr
            assert post(third, '{"node": "train-2"}', "text/plain")[0] == 415
            assert post(third, "[]")[0] == 400

            pid, life = second.pid, life_of(second)
            second.pause()
            wait_until(lambda: "train-2" not in living(third.status()), "train-2 is missed", PATIENCE_S)
            done = expel("train-2", third, "--json")
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == {"node": "train-2", "writers": 1}
            wait_until(lambda: retired(first) == retired(third) == 1, "both know", PATIENCE_S)
            everywhere(one, one.publish("item", keys[:10], np.full((10, 4), 3.0, np.float32)))

            second.resume()
            wait_until(lambda: life_of(second) not in ("", life), "train-2 is told, and starts over", PATIENCE_S)
            assert "node_starts_over" in second.log_path.read_text()
            second.wait_ready()
            assert second.pid == pid, "it needs no supervisor to begin anew"
            cluster.wait_members()
            stamp = other.publish("item", keys[30:], np.full((10, 4), 4.0, np.float32))
            everywhere(other, stamp)
        expected = np.repeat(np.float32([3, 1, 2, 4]), 10)
        for node in cluster.nodes.values():
            with ekko.Reader("ctr", run_dir=node.run_dir, wait=PATIENCE_S) as reader:
                assert reader.lookup("item", keys)[:, 0].tolist() == expected.tolist(), node.id


def life_of(node: NodeProcess) -> str:
    """The nonce of the life that a node is in; empty between two of them."""
    with suppress(NodeProcessError, KeyError):
        return str(node.status()["node"]["boot"])
    return ""


def retired(node: NodeProcess) -> int:
    return next(int(queue["fill"]) for queue in node.status()["queues"] if queue["name"] == "retired_writers")
