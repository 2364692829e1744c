"""Real nodes with snapshots: taken while they run, restored when memory is gone; a region seeded without its trainer."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import ekko
from ekko.store.manifest import read_manifest
from sim_cluster.demo.verify import contents
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec

pytestmark = pytest.mark.processes
MODELS = {"ctr": ModelTables({"item": 4}, capacity_rows=1_000)}
KEYS = np.arange(500, dtype=np.uint64)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EKKO_SNAPSHOTS__URL", str(tmp_path / "snapshots"))
    monkeypatch.setenv("EKKO_SNAPSHOTS__EVERY", "1h")
    return tmp_path / "snapshots"


@pytest.fixture
def single(tmp_path: Path, folder: Path) -> Iterator[NodeProcess]:
    with LocalCluster(tmp_path, [NodeSpec("solo", "eu", "train")], models=MODELS) as cluster:
        cluster.start()
        yield cluster["solo"]


def cli(*arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "ekko.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def publish(node: NodeProcess, keys: np.ndarray, value: float) -> int:
    with ekko.Publisher(node.local, model="ctr", timeout=60.0) as publisher:
        return publisher.publish("item", keys, np.full((keys.size, 4), value, np.float32))


def lose_memory(node: NodeProcess) -> None:
    """What a machine's end leaves: the disk."""
    manifest = read_manifest(node.run_dir)
    assert manifest is not None
    for path in Path(manifest.memory_dir).glob(f"{manifest.prefix}-*"):
        path.unlink()


def test_a_node_begins_with_its_newest_sound_snapshot(single: NodeProcess, folder: Path) -> None:
    publish(single, KEYS, 1.0)
    first = cli("snapshot", "--http", single.http, "--json")
    assert first["full"] is True
    publish(single, KEYS[:10], 2.0)
    second = cli("snapshot", "--http", single.http, "--json")
    assert (second["full"], second["rows"]) == (False, 10)
    before = contents(single.run_dir, "ctr")["item"]
    single.kill()
    lose_memory(single)
    rows = next((folder / "solo" / str(second["name"])).glob("*.rows"))
    sound = rows.read_bytes()
    rows.write_bytes(sound[:-1] + b"\1")  # the newest is damaged: the one before it is taken
    single.start()
    single.wait_ready()
    status = single.status()["snapshots"]
    assert status["restored"] == first["name"]
    assert "damaged: a checksum is wrong" in status["refused"][0]
    with closing(ekko.Reader("ctr", run_dir=single.run_dir)) as reader:
        assert reader.lookup("item", KEYS).tolist() == [[1.0] * 4] * KEYS.size
    rows.write_bytes(sound)
    single.kill()
    lose_memory(single)
    single.start()
    single.wait_ready()
    after = contents(single.run_dir, "ctr")["item"]
    assert np.array_equal(np.sort(after, order="key"), np.sort(before, order="key"))
    publish(single, KEYS[:1], 3.0)
    with closing(ekko.Reader("ctr", run_dir=single.run_dir)) as reader:
        assert reader.lookup("item", KEYS[:2]).tolist() == [[3.0] * 4, [2.0] * 4]
    single.kill()
    single.start()
    single.wait_ready()
    assert single.status()["node"]["resumed"] is True, "intact memory is attached to, not restored"


@pytest.mark.long
def test_a_region_is_seeded_without_the_trainer(tmp_path: Path, single: NodeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(single, KEYS, 1.0)
    done = cli("snapshot", "--http", single.http, "--full", "--json")
    url = str(tmp_path / "snapshots" / "solo")
    assert cli("snapshot", "verify", url, "--json")["name"] == done["name"]
    assert [one["name"] for one in cli("snapshot", "list", url, "--json")["snapshots"]] == [done["name"]]  # type: ignore[index,attr-defined]
    single.stop()
    monkeypatch.setenv("EKKO_SNAPSHOTS__SEED", url)
    with LocalCluster(tmp_path / "new", [NodeSpec("far-1", "us")], models=MODELS) as cluster:
        node = cluster["far-1"]
        cluster.start()
        assert node.status()["snapshots"]["restored"] == done["name"]
        with closing(ekko.Reader("ctr", run_dir=node.run_dir)) as reader:
            assert reader.lookup("item", KEYS).tolist() == [[1.0] * 4] * KEYS.size
