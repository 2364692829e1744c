"""Real nodes with caches on the host twin, read by this process: updates, deletes, kills, restarts, mistakes."""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ekko
from ekko.device.__main__ import main
from ekko.device.check import check_caches
from ekko.errors import ModelError, StoreError
from gpu.backend import open_device
from gpu.errors import DeviceError
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec, free_ports, wait_until

pytestmark = pytest.mark.processes
TWIN = "host-twin"
MODELS = {"ctr": ModelTables({"item": 4}, capacity_rows=1_000, codec="float16")}
KEYS = np.arange(100, dtype=np.uint64)
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    nodes = [
        NodeSpec("train-1", "us", "train"),
        NodeSpec("serve-1", "eu", device={"name": TWIN, "rows": 256}),
        NodeSpec("base-1", "eu", "baseline", settings={"delay": "1s", "log_bytes": "64MB"}, device={"name": TWIN}),
    ]
    with LocalCluster(tmp_path_factory.mktemp("device"), nodes, models=MODELS) as cluster:
        cluster.start()
        yield cluster


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[LocalCluster]:
    """Of its own, for a test that starts nodes again."""
    nodes = [NodeSpec("train-1", "us", "train"), NodeSpec("serve-1", "eu", device={"name": TWIN, "rows": 256})]
    with LocalCluster(tmp_path, nodes, models=MODELS) as cluster:
        cluster.start()
        yield cluster


def published(cluster: LocalCluster, value: float, keys: Any = KEYS) -> int:
    with ekko.Publisher(cluster["train-1"].local, model="ctr") as publisher:
        stamp = publisher.publish("item", keys, np.full((len(keys), 4), value, np.float32))
        publisher.wait(stamp, "all", TIMEOUT_S)
    return stamp


def hits_of(reader: ekko.Reader) -> int:
    """How many more keys a look-up finds on the device; those it misses come with the next one."""
    assert reader.device is not None
    before = reader.device.counts.hits
    reader.lookup("item", KEYS)
    return reader.device.counts.hits - before


def warmed(reader: ekko.Reader) -> None:
    wait_until(lambda: hits_of(reader) == len(KEYS), "all keys to be on the device", TIMEOUT_S)


def value_of(reader: ekko.Reader) -> float:
    rows = reader.lookup("item", KEYS)
    assert (rows == rows[0, 0]).all(), "of one batch, which is long there"
    return float(rows[0, 0])


def equal(node: NodeProcess) -> int:
    """How many rows the caches have, which are all the store's."""
    checks = check_caches(node.run_dir, TIMEOUT_S)
    assert [check.difference for check in checks] == [""]
    return sum(check.rows for check in checks)


def test_updates_reach_the_device_and_deletes_leave_it(cluster: LocalCluster) -> None:
    node = cluster["serve-1"]
    published(cluster, 1.0)
    with closing(ekko.Reader("ctr", node.run_dir, device=TWIN, wait=TIMEOUT_S)) as reader:
        warmed(reader)
        assert value_of(reader) == 1.0
        published(cluster, 2.0)
        wait_until(lambda: (reader.lookup("item", KEYS) == 2.0).all(), "the update to be on the device", TIMEOUT_S)
        assert equal(node) == 100
        with ekko.Publisher(cluster["train-1"].local, model="ctr") as publisher:
            publisher.wait(publisher.delete("item", KEYS[:30]), "all", TIMEOUT_S)
        wait_until(lambda: not reader.lookup("item", KEYS[:30]).any(), "the deleted rows to leave", TIMEOUT_S)
        assert equal(node) == 70
        published(cluster, 3.0)
        warmed(reader)
        assert value_of(reader) == 3.0
    status = node.status()["device"]
    assert (status["name"], status["serving"], status["reason"]) == (TWIN, True, "")
    wait_until(lambda: node.status()["device"]["behind_ms"] < 5_000, "the device to have what the store has", TIMEOUT_S)
    assert status["overflows"] == 0
    wait_until(lambda: node.status()["device"]["models"]["ctr"]["item"]["size"] == 100, "figures", TIMEOUT_S)
    text = node.metrics()
    assert "ekko_device_serving 1.0" in text
    assert 'ekko_device_rows{model="ctr",table="item"} 100.0' in text
    assert cluster["train-1"].status()["device"] is None
    assert main([str(node.run_dir)]) == 0
    assert main([str(cluster["train-1"].run_dir)]) == 2


def test_readers_see_no_row_go_back_while_it_is_written(cluster: LocalCluster) -> None:
    node = cluster["serve-1"]
    with (
        closing(ekko.Reader("ctr", node.run_dir, device=TWIN, wait=TIMEOUT_S)) as reader,
        ekko.Publisher(cluster["train-1"].local, model="ctr") as publisher,
    ):
        assert reader.device is not None
        newest, rng = np.zeros(400, np.uint64), np.random.default_rng(0)
        for number in range(150):  # more keys than there is room for: they come and go
            keys = rng.choice(400, 60, replace=False).astype(np.uint64)
            publisher.publish("item", keys, np.full((60, 4), number % 100, np.float32))
            for _ in range(3):
                asked = rng.choice(400, 50, replace=False).astype(np.uint64)
                rows, stamps = reader.lookup("item", asked, stamps=True)
                assert (stamps >= newest[asked]).all()
                assert (rows == rows[:, :1]).all()
                newest[asked] = stamps
        publisher.wait(publisher.publish("item", KEYS, np.ones((100, 4), np.float32)), "all", TIMEOUT_S)
        assert reader.device.counts.hits > 1_000
        assert reader.device.counts.defaulted == 0
    assert equal(node) > 100


def test_a_baselines_caches_are_of_its_older_state(cluster: LocalCluster) -> None:
    node = cluster["base-1"]
    with closing(ekko.Reader("ctr", node.run_dir, device=TWIN, wait=TIMEOUT_S)) as reader:
        published(cluster, 5.0)
        wait_until(lambda: (reader.lookup("item", KEYS) == 5.0).all(), "five", TIMEOUT_S)
        warmed(reader)
        begin = time.monotonic()
        published(cluster, 6.0)
        wait_until(lambda: (reader.lookup("item", KEYS) == 6.0).all(), "six, a second later", TIMEOUT_S)
        assert time.monotonic() - begin >= 1.0
        equal(node)


def test_a_kill_leaves_readers_to_the_host_and_a_restart_gives_them_caches_again(pair: LocalCluster) -> None:
    node = pair["serve-1"]
    published(pair, 7.0)
    with closing(ekko.Reader("ctr", node.run_dir, device=TWIN, wait=TIMEOUT_S)) as reader:
        warmed(reader)
        node.kill()
        assert value_of(reader) == 7.0
        wait_until(lambda: hits_of(reader) == 0, "the caches of the dead to be left alone", TIMEOUT_S)
        assert value_of(reader) == 7.0
        assert reader.device is not None
        assert "nobody has written the caches" in reader.device.reason
        with ekko.Publisher(pair["train-1"].local, model="ctr") as publisher:
            publisher.publish("item", KEYS, np.full((100, 4), 8.0, np.float32))
        node.start()
        node.wait_ready()
        wait_until(lambda: (reader.lookup("item", KEYS) == 8.0).all(), "what came meanwhile", TIMEOUT_S)
        warmed(reader)
        assert value_of(reader) == 8.0
        assert equal(node) >= 100
        assert node.stop() == 0
        assert value_of(reader) == 8.0
        assert reader.device.reason == "the node was stopped"
        with closing(ekko.Reader("ctr", node.run_dir, device=TWIN)) as late:
            assert value_of(late) == 8.0
        node.start()
        node.wait_ready()
        warmed(reader)


@pytest.mark.long
def test_kills_at_any_moment_leave_no_reader_behind_and_no_cache_wrong(pair: LocalCluster) -> None:
    node, stop, rng = pair["serve-1"], threading.Event(), random.Random(0)
    wrong: list[str] = []

    def publishing() -> None:
        numbers = np.random.default_rng(1)
        with ekko.Publisher(pair["train-1"].local, model="ctr") as publisher:
            while not stop.is_set():
                keys = numbers.choice(400, 80, replace=False).astype(np.uint64)
                publisher.publish("item", keys, np.full((80, 4), float(numbers.integers(1, 100)), np.float32))
                time.sleep(0.01)

    def reading(seed: int) -> None:
        numbers, newest = np.random.default_rng(seed), np.zeros(400, np.uint64)
        with closing(ekko.Reader("ctr", node.run_dir, device=TWIN, wait=TIMEOUT_S)) as reader:
            assert reader.device is not None
            while not stop.is_set():
                keys = numbers.choice(400, 50, replace=False).astype(np.uint64)
                rows, stamps = reader.lookup("item", keys, stamps=True)
                # A row whose writer was killed in it has the default, until the node is there again.
                seen = (
                    stamps >= newest[keys] if not reader.device.counts.defaulted else (stamps >= newest[keys]) | (stamps == 0)
                )
                if not seen.all() or not (rows == rows[:, :1]).all():
                    wrong.append(f"keys {keys[~seen]} went back to {stamps[~seen]} from {newest[keys][~seen]}")
                    return
                newest[keys] = np.maximum(newest[keys], stamps)
            if not reader.device.counts.hits:
                wrong.append(f"reader {seed} found nothing on the device")

    threads = [threading.Thread(target=publishing), *(threading.Thread(target=reading, args=(seed,)) for seed in (2, 3))]
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            time.sleep(rng.uniform(0.2, 3.0))
            node.kill()
            time.sleep(rng.uniform(0.0, 2.0))
            node.start()
            node.wait_ready()
    finally:
        time.sleep(2.0)
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    published(pair, 1.0)
    with closing(ekko.Reader("ctr", node.run_dir, device=TWIN)) as reader:
        warmed(reader)
    assert equal(node) >= 100


def test_mistakes_are_one_line(cluster: LocalCluster, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="keeps no rows on a device"):
        ekko.Reader("ctr", cluster["train-1"].run_dir, device=TWIN)
    with pytest.raises(ModelError, match="no device is called 'gpu'"):
        ekko.Reader("ctr", cluster["serve-1"].run_dir, device="gpu")
    try:
        open_device("cuda:0")
    except DeviceError:
        text = cluster["serve-1"].config_path.read_text().replace(TWIN, "cuda:0")
        text = text.replace(str(cluster["serve-1"].run_dir), str(tmp_path / "run"))
        text = text.replace(cluster["serve-1"].http, f"127.0.0.1:{free_ports(1)[0]}")
        (tmp_path / "node.toml").write_text(text)
        command = [sys.executable, "-m", "ekko.cli", "node", "--config", str(tmp_path / "node.toml")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode != 0
        assert "device.name: " in ended.stdout + ended.stderr
