"""A cluster that runs the code of protocol version 1 is upgraded node by node, with real processes, and loses nothing."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

import ekko
from p2p.versions import PROTOCOL_VERSION
from sim_cluster.processes import LocalCluster, NodeSpec

pytestmark = pytest.mark.processes

# The last commit that spoke version 1.
VERSION_1 = "9924b4a"
NODES = (NodeSpec("train-1", "home", "train"), NodeSpec("eu-1", "eu"), NodeSpec("us-1", "us"))
KEYS = np.arange(300, dtype=np.uint64)
# Its kernels are compiled at its first start; the whole cluster of it does so at once.
START_S_MAX = 180.0


@pytest.fixture
def version_1(request: pytest.FixtureRequest) -> Path:
    """A folder with the code of version 1; kept, so that its kernels are compiled once."""
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("protocol-version-1") / VERSION_1
    if not folder.exists():
        git = shutil.which("git")
        archive = git and subprocess.run(
            [git, "archive", VERSION_1, "ekko", "p2p"], cwd=Path(__file__).parents[1], capture_output=True, check=False
        )
        if not archive or archive.returncode:
            pytest.skip(f"commit {VERSION_1} is not in this checkout: fetch the whole history")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
    return folder


@pytest.mark.timeout(600)
@pytest.mark.long
def test_real_nodes_are_upgraded_one_after_another(version_1: Path, tmp_path: Path) -> None:
    with LocalCluster(tmp_path, NODES) as cluster:
        for node in cluster.nodes.values():
            node.source = version_1
        # One at a time, so that the kernels are compiled once.
        for node in cluster.nodes.values():
            node.start()
            node.wait_ready(START_S_MAX)
        cluster.wait_members()
        expected = np.zeros((len(KEYS), 8), np.float32)
        rng = np.random.default_rng(3)
        steps = 0

        with ekko.Publisher(cluster["train-1"].local, model="ctr", tables={"item": 8}) as publisher:

            def publish(count: int) -> int:
                nonlocal steps
                stamp = 0
                for _ in range(count):
                    keys = rng.choice(KEYS, 40, replace=False)
                    steps += 1
                    expected[keys] = steps
                    stamp = publisher.publish("item", keys, expected[keys])
                return stamp

            publisher.wait(publish(20), scope="all", timeout=30.0)
            for name in ("eu-1", "train-1", "us-1"):
                node = cluster[name]
                node.stop()
                if name != "train-1":
                    publish(20)
                node.source = None
                node.start()
                node.wait_ready()
                publisher.wait(publish(20), scope="all", timeout=30.0)
            cluster.wait_members()
            publisher.wait(publish(20), scope="all", timeout=30.0)
        for node in cluster.nodes.values():
            with ekko.Reader("ctr", run_dir=node.run_dir, wait=10.0) as reader:
                assert reader.lookup("item", KEYS).tobytes() == expected.tobytes(), node.id
            status = node.status()
            assert status["node"]["protocol_version"] == PROTOCOL_VERSION
            assert [peer["protocol_version"] for peer in status["peers"]] == [PROTOCOL_VERSION] * 2
