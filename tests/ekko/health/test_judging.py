"""Real nodes: scorers on two nodes report, labels are flipped, and all nodes agree that the model is corrupted."""

import json
import math
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import ekko
from ekko.errors import ModelError
from ekko.health.reporting import ANSWER_S_MAX
from ekko.health.traffic import BASELINE, ONLINE
from ekko.health.windows import AHEAD_MS_MAX
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec, wait_until

pytestmark = pytest.mark.processes
HEALTH = """
[health]
window = "1s"
lateness = "0.5s"
detectors = ["sequential", "watermarks"]
level = 0.001
horizon = "1h"
precision = 0.1
baseline_share = 0.2
[health.watermarks.calibration]
min = 0.001
"""
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    nodes = [NodeSpec("train-1", "us", "train"), NodeSpec("serve-1", "eu")]
    with LocalCluster(tmp_path_factory.mktemp("judging"), nodes, models={"ctr": ModelTables({"item": 4})}) as cluster:
        for node in cluster.nodes.values():
            node.config_path.write_text(node.config_path.read_text() + HEALTH)
        cluster.start()
        yield cluster


class Scorer(threading.Thread):
    """Answers requests of one arm at one node, and reports; its labels can be flipped."""

    def __init__(self, node: NodeProcess, arm: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.reader = ekko.Reader("ctr", run_dir=node.run_dir, wait=30.0)
        self.arm = arm
        self.flipped = False
        self.ends = threading.Event()
        self._rng = np.random.default_rng(seed)

    def run(self) -> None:
        while not self.ends.wait(0.1):
            truth = (self._rng.random(200) < 0.3).astype(np.float32)
            prediction = 1 / (1 + np.exp(1.0 - self._rng.normal(truth * 1.5)))
            label = 1 - truth if self.flipped else truth
            self.reader.report("ctr", prediction, label, None, "eu" if self.arm else "us", arm=self.arm)
        self.reader.close()


def health(node: NodeProcess) -> Any:
    return node.status()["health"]["ctr"]


def command(*arguments: str, at: NodeProcess) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ekko.cli", *arguments, "--http", at.http]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.long
def test_all_nodes_agree_on_a_corrupted_model_and_on_its_recovery(cluster: LocalCluster) -> None:
    nodes = list(cluster.nodes.values())
    online, baseline = Scorer(cluster["serve-1"], ONLINE, 1), Scorer(cluster["train-1"], BASELINE, 2)
    for scorer in (online, baseline):
        scorer.start()
    try:

        def all_are(state: str) -> bool:
            return all(health(node)["state"] == state for node in nodes)

        wait_until(lambda: all_are("healthy"), "all nodes find the model healthy", WITHIN_S)
        flipped_ms = time.time_ns() // 1_000_000
        online.flipped = True
        wait_until(lambda: all_are("corrupted"), "all nodes find the model corrupted", WITHIN_S)
        wait_until(lambda: len({json.dumps(health(node)["healthy_until_ms"]) for node in nodes}) == 1, "they agree", WITHIN_S)
        until = health(nodes[0])["healthy_until_ms"]
        assert until is None or until <= flipped_ms + 1_000, "nothing of the bad time is found healthy"
        why = health(cluster["serve-1"])["log"][-1]
        assert why["detector"] == "sequential"
        assert why["from_ms"] <= flipped_ms + 1_000
        shown = command("health", "ctr", at=cluster["train-1"])
        assert "corrupted" in shown.stdout, shown.stderr
        assert json.loads(command("health", "--json", at=cluster["train-1"]).stdout)["ctr"]["state"] == "corrupted"
        metrics = urllib.request.urlopen(f"http://{cluster['train-1'].http}/metrics", timeout=WITHIN_S).read().decode()
        assert 'ekko_model_state{model="ctr",state="corrupted"} 1.0' in metrics
        assert 'ekko_quality{arm="baseline",metric="auc",model="ctr"}' in metrics
        arms = health(cluster["train-1"])["arms"]
        assert arms["baseline"]["auc"] > 0.75 > arms["online"]["auc"]
        assert set(health(cluster["serve-1"])["segments"]) == {"us"}
        assert "model_state" in cluster["train-1"].log_path.read_text()
        online.flipped = False
        wait_until(lambda: all_are("healthy"), "all nodes find the model healthy again", WITHIN_S)
        assert online.reader.report_counts.dropped == online.reader.report_counts.refused == 0
        assert online.reader.report_counts.sent > 1_000
    finally:
        for scorer in (online, baseline):
            scorer.ends.set()
            scorer.join(10)
    # An operator has the last word, on all nodes.
    said = command("health", "ctr", "--set", "uncertain", "--why", "a drill", at=cluster["serve-1"])
    assert said.returncode == 0, said.stderr
    wait_until(lambda: all_are("uncertain"), "all nodes have heard the operator", WITHIN_S)


def test_reports_by_http_and_what_is_refused(cluster: LocalCluster) -> None:
    node = cluster["serve-1"]

    def post(body: dict[str, object]) -> tuple[int, Any]:
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"http://{node.http}/report", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=WITHIN_S) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    soon_ms = time.time_ns() // 1_000_000 + AHEAD_MS_MAX - 100  # its window is open for a while
    body: dict[str, object] = {"model": "ctr", "prediction": [0.5, 0.1], "label": [1, 0], "at_ms": [soon_ms, soon_ms + 120_000]}
    assert post(body) == (200, {"taken": 1, "late": 0, "ahead": 1})
    assert post(body | {"label": [1, 7]})[0] == 409
    assert "does not fit 2 predictions" in post(body | {"label": [1, 0, 1]})[1]["error"]
    assert "predictions are no numbers" in post(body | {"prediction": [[1], "x"]})[1]["error"]
    assert post(body | {"segment": "\ud800"})[0] == 200, "a name that is no UTF-8 is spelled otherwise, and nothing breaks"
    assert "unknown model 'nothing'" in post(body | {"model": "nothing"})[1]["error"]
    assert post({"model": "ctr"})[0] == 400
    with ekko.Reader("ctr", run_dir=node.run_dir) as reader:
        with pytest.raises(ModelError, match="outside 0 to 1"):
            reader.report("ctr", [math.nan], [1])
        assert reader.report("nothing", [0.5], [1]) == 1
        assert reader.flush_reports(WITHIN_S)
        assert reader.report_counts.refused == 1
        assert "unknown model 'nothing'" in reader.report_counts.problem
        # A node that does not answer costs events, and no time.
        node.pause()
        try:
            begin = time.monotonic()
            queued = sum(reader.report("ctr", np.full(40_000, 0.5), np.zeros(40_000)) for _ in range(10))
            assert time.monotonic() - begin < 10 * ANSWER_S_MAX / 2, "half of what answers would be waited for"
            assert 0 < queued < 400_000
            assert reader.report_counts.dropped >= 400_000 - queued
        finally:
            node.resume()
        child = os.fork()
        if not child:  # the child of a scorer that forks has a queue of its own
            code, before = 1, reader.report_counts.sent
            try:
                deadline = time.monotonic() + WITHIN_S
                # What the node answers late is dropped.
                while reader.report_counts.sent == before and time.monotonic() < deadline:
                    assert reader.report("ctr", [0.5], [1]) == 1
                    assert reader.flush_reports(WITHIN_S)
                code = 0 if reader.report_counts.sent > before else 1
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
    share = node.status()["health"]["ctr"]["baseline_share"]
    assert share == pytest.approx(0.2)
