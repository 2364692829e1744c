"""What readers ask for, from the reader in one process to `ekko hot`, status and metrics of the daemon in another."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ekko
from ekko.asking import fetch_status
from sim_cluster.processes import LocalCluster, ModelTables, NodeSpec, wait_until
from tests.everywhere import PATIENCE_S

pytestmark = pytest.mark.processes
MODELS = {"ctr": ModelTables({"item": 4, "user": 4}), "other": ModelTables({"item": 4})}


def ekko_hot(http: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ekko.cli", "hot", *arguments, "--http", http]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"COLUMNS": "160", "PATH": ""})


def test_a_node_says_which_keys_its_readers_ask_for(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, [NodeSpec("solo", "eu", "train")], models=MODELS) as cluster:
        cluster.start()
        node = cluster["solo"]
        with ekko.Publisher(node.local, model="ctr", timeout=PATIENCE_S) as publisher:
            publisher.publish("item", [1, 2, 3], np.ones((3, 4), np.float32))
        keys = np.repeat(np.array([1, 2, 2**63 + 1], np.uint64), [500, 1_500, 2_000])
        with closing(ekko.Reader("ctr", run_dir=node.run_dir)) as reader, closing(ekko.Reader("other", node.run_dir)) as other:
            assert reader.counting
            for _ in range(300):
                reader.lookup("item", keys)
                other.lookup("item", keys)
                other.lookup("item", keys)

        def model() -> dict[str, Any]:
            answer: dict[str, Any] = fetch_status(node.http)["models"]["ctr"]
            return answer

        wait_until(lambda: model()["tables"]["item"]["reads"]["lookups"] == 300, "the daemon folds the counts", PATIENCE_S)
        reads = model()["tables"]["item"]["reads"]
        assert reads["keys"] == 300 * 4_000
        assert 0.25 < reads["absent"] / reads["keys"] < 0.75
        assert reads["counted_by"] == "its user and group"
        wait_until(lambda: 0.2 < model()["request_share"] < 0.45, "a third of all requests is for ctr", PATIENCE_S)
        answer = json.loads(ekko_hot(node.http, "ctr", "item", "--json", "-n", "2").stdout)
        assert [entry["key"] for entry in answer["tables"]["item"]["hottest"]] == [str(2**63 + 1), "2"]
        assert [entry["here"] for entry in answer["tables"]["item"]["hottest"]] == [False, True]
        assert set(json.loads(ekko_hot(node.http, "ctr", "--json").stdout)["tables"]) == {"item", "user"}
        shown = ekko_hot(node.http, "ctr").stdout
        assert str(2**63 + 1) in shown
        assert "1,200,000 keys in 300 look-ups" in shown
        metrics = node.metrics()
        assert 'ekko_lookups_total{model="ctr",table="item"} 300.0' in metrics
        assert 'ekko_keys_looked_up_total{model="ctr",table="item"} 1.2e+06' in metrics
        assert 'ekko_request_share{model="other"} 0.' in metrics
        for wrong in (("none",), ("ctr", "none")):
            refused = ekko_hot(node.http, *wrong)
            assert refused.returncode == 2
            assert "there are 'ctr', 'other'" in refused.stderr or "it has 'item', 'user'" in refused.stderr
