"""Models from files: what becomes of which tensor, and a real node that loads them, and another one that pulls."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ekko
from ekko.errors import ModelError
from ekko.snapshots.files import SafetensorsWriter, plan_load, read_tensors, slices
from sim_cluster.processes import LocalCluster, ModelTables, NodeSpec, wait_until

RNG = np.random.default_rng(1)
ITEMS = RNG.standard_normal((5_000, 4)).astype(np.float32)
MODELS = {"ctr": ModelTables({"item": 4}, capacity_rows=1_000)}


def loaded(path: Path, known: dict[str, int], chosen: dict[str, str] | None = None) -> dict[str, dict[int, Any]]:
    out: dict[str, dict[int, Any]] = {}
    for table, keys, rows in slices(plan_load(read_tensors(path), known, chosen or {})):
        out.setdefault(table, {}).update(zip(keys.tolist(), rows.tolist(), strict=True))
    return out


def test_safetensors_as_the_library_writes_them(tmp_path: Path) -> None:
    path, keys = tmp_path / "a.safetensors", RNG.permutation(1 << 20)[:5_000].astype(np.int64)
    save_file({"emb": ITEMS, "emb.keys": keys, "w": np.ones((3, 2), np.float32), "half": ITEMS.astype(np.float16)}, path)
    found = loaded(path, {"half": 4})
    assert found["emb"] == dict(zip(keys.tolist(), ITEMS.tolist(), strict=True))
    assert found["half"] == dict(enumerate(ITEMS.astype(np.float16).astype(np.float32).tolist()))
    assert [row[:6] for row in found["_dense"].values()] == [[1.0] * 6]
    assert loaded(path, {}, {"half": "item"})["item"] == found["half"]


def test_safetensors_as_the_library_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    writer = SafetensorsWriter(path, {"a": ("F32", ITEMS.shape), "b": ("U64", (3,))}, {"made": "here"})
    for data in (ITEMS[:7], ITEMS[7:], np.arange(3, dtype=np.uint64)):
        writer.write(data)
    writer.close()
    found = load_file(path)
    assert np.array_equal(found["a"], ITEMS)
    assert found["b"].tolist() == [0, 1, 2]


def test_npy_and_torch(tmp_path: Path) -> None:
    np.save(tmp_path / "item.npy", ITEMS)
    expected = dict(enumerate(ITEMS.tolist()))
    assert loaded(tmp_path / "item.npy", {}) == {"item": expected}
    torch = pytest.importorskip("torch")
    torch.save({"emb.weight": torch.from_numpy(ITEMS), "bias": torch.zeros(2)}, tmp_path / "m.pt")
    assert loaded(tmp_path / "m.pt", {"item": 4}, {"emb.weight": "item"})["item"] == expected
    torch.save({"bad": print}, tmp_path / "code.pt")
    with pytest.raises(ModelError, match="is no state dict"):
        read_tensors(tmp_path / "code.pt")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file({"item": ITEMS, "item.keys": np.arange(4_999), "x": np.array([np.nan], np.float32)}, path)
    tensors = read_tensors(path)
    with pytest.raises(ModelError, match="expected an integer for each row"):
        plan_load(tensors, {}, {})
    del tensors["item.keys"]
    with pytest.raises(ModelError, match="rows of 4 values, and table 'item' has dim 5"):
        plan_load(tensors, {"item": 5}, {})
    with pytest.raises(ModelError, match="no tensor 'y'"):
        plan_load(tensors, {}, {"y": "item"})
    with pytest.raises(ModelError, match="no numbers"):
        list(slices(plan_load(tensors, {"item": 4}, {})))
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ModelError, match="lies outside the file"):
        read_tensors(path)
    (tmp_path / "d.csv").write_text("1")
    with pytest.raises(ModelError, match="of no kind that is known"):
        read_tensors(tmp_path / "d.csv")


@pytest.mark.processes
def test_a_node_loads_a_file_and_another_pulls_it(tmp_path: Path) -> None:
    dense = RNG.standard_normal((300, 7)).astype(np.float32)
    save_file({"item": ITEMS, "top.0.weight": dense}, tmp_path / "m.safetensors")
    nodes = [NodeSpec("train-1", "us", "train"), NodeSpec("serve-1", "eu")]
    with LocalCluster(tmp_path / "pair", nodes, models=MODELS) as cluster:
        cluster.start()
        arguments = ["load", "ctr", str(tmp_path / "m.safetensors"), "--http", cluster["train-1"].http, "--json"]
        command = [sys.executable, "-m", "ekko.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["error"], answer["rows"]) == ("", 5_009)
        with ekko.Publisher(cluster["train-1"].local, model="ctr") as publisher:
            publisher.wait(answer["stamp"], "all", timeout=60.0)
            last = publisher.publish("item", [1], np.zeros((1, 4), np.float32))  # its chain goes on
            publisher.wait(last, "all", timeout=60.0)
        for node in cluster.nodes.values():
            with closing(ekko.Reader("ctr", run_dir=node.run_dir)) as reader:
                expected = ITEMS.copy()
                expected[1] = 0
                wait_until(lambda: np.array_equal(reader.dense("top.0.weight"), dense), 30.0, "the tensor")
                assert np.array_equal(reader.lookup("item", np.arange(5_000, dtype=np.uint64)), expected)
