"""Models from files: what becomes of which tensor, and a real node that loads them, and another one that pulls."""

import asyncio
import json
import subprocess
import sys
import urllib.request
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ekko
from ekko.errors import EkkoError, ModelError
from ekko.loading import Loading, LoadPicture, LoadRequest
from ekko.local import Opened, PublishStep
from ekko.model import TensorSpec
from ekko.snapshots import commands as snapshot_commands
from ekko.snapshots.commands import load_now
from ekko.snapshots.files import FileTensor, LoadPlan, SafetensorsWriter, plan_load, read_keys, read_tensors, slices
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec, wait_until
from tests.everywhere import PATIENCE_S, everywhere

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
    with pytest.raises(ModelError, match="expected an integer for each of the 5000 rows"):
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


def test_keys_from_elsewhere(tmp_path: Path) -> None:
    keys = RNG.permutation(1 << 20)[:5_000].astype(np.int64)
    np.save(tmp_path / "keys.npy", keys)
    np.save(tmp_path / "item.npy", ITEMS)
    save_file({"emb": ITEMS, "ids": keys, "w": np.ones(3, np.float32)}, tmp_path / "m.safetensors")
    expected = dict(zip(keys.tolist(), ITEMS.tolist(), strict=True))

    def with_keys(file: str, known: dict[str, int], chosen: dict[str, str], of: str, where: str) -> LoadPlan:
        tensors = read_tensors(tmp_path / file)
        return plan_load(tensors, known, chosen, {of: read_keys(tensors, where)})

    beside = str(tmp_path / "keys.npy")
    for plan in (
        with_keys("item.npy", {}, {}, "", beside),
        with_keys("item.npy", {}, {"item": "user"}, "user", beside),
        with_keys("m.safetensors", {}, {"emb": "item"}, "", "ids"),
        with_keys("m.safetensors", {"emb": 4}, {}, "emb", beside),
        with_keys("m.safetensors", {}, {}, "emb", "ids"),
    ):
        found = {
            key: row
            for table, ids, rows in slices(plan)
            if table != "_dense"
            for key, row in zip(ids.tolist(), rows.tolist(), strict=True)
        }
        assert found == expected
    assert set(with_keys("m.safetensors", {}, {"emb": "item"}, "", "ids").dense) == {"w"}, "keys are no tensor of the model"
    for of, where, reason in (
        ("other", "ids", "no table 'other'"),
        ("", "nowhere", "neither a tensor of the file nor a file"),
        ("", str(tmp_path / "m.safetensors"), "has 3 tensors"),
        ("emb", "w", "expected an integer for each of the 5000 rows"),
    ):
        with pytest.raises(ModelError, match=reason):
            with_keys("m.safetensors", {}, {}, of, where)


def test_of_a_key_that_comes_twice_the_last_row_counts(tmp_path: Path) -> None:
    """Wherever slices end: within a step the store would keep the first."""
    keys = np.array([5, 7, 5, 5, 9, 7], np.uint64)
    save_file({"item": ITEMS[:6], "item.keys": keys}, tmp_path / "a.safetensors")
    steps = list(slices(plan_load(read_tensors(tmp_path / "a.safetensors"), {}, {})))
    assert all(np.unique(ids).size == ids.size for _, ids, _ in steps)
    assert loaded(tmp_path / "a.safetensors", {})["item"] == {5: ITEMS[3].tolist(), 7: ITEMS[5].tolist(), 9: ITEMS[4].tolist()}


def test_odd_arrays(tmp_path: Path) -> None:
    """Other byte orders, orders of memory and types are what they say; what is no real number is refused."""
    wanted = dict(enumerate(ITEMS.tolist()))
    for name, array in {
        "f64": ITEMS.astype(np.float64),
        "big": ITEMS.astype(">f4"),
        "fortran": np.asfortranarray(ITEMS),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
        assert loaded(tmp_path / f"{name}.npy", {})[name] == wanted
    np.save(tmp_path / "i8.npy", np.arange(-4, 4, dtype=np.int8).reshape(2, 4))
    assert loaded(tmp_path / "i8.npy", {})["i8"][1] == [0.0, 1.0, 2.0, 3.0]
    for name, array, reason in (
        ("huge", np.full((2, 2), 1e300), "too large for float32"),
        ("inf", np.full((2, 2), np.inf, np.float32), "infinite"),
        ("complex", np.ones((2, 2), np.complex64), "expected real numbers"),
        ("text", np.array([["a", "b"]]), "expected real numbers"),
        ("time", np.array([[1, 2]], "datetime64[s]"), "expected real numbers"),
        ("object", np.array([[None, 1]], object), "cannot be understood"),
    ):
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        with pytest.raises(ModelError, match=reason):
            loaded(tmp_path / f"{name}.npy", {})
    for junk in (b"", b"\x93NUMPY", bytes(200)):
        (tmp_path / "junk.npy").write_bytes(junk)
        (tmp_path / "junk.safetensors").write_bytes(junk)
        for suffix in ("npy", "safetensors"):
            with pytest.raises(ModelError, match="cannot be understood"):
                read_tensors(tmp_path / f"junk.{suffix}")


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": []},
        {"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}},
        {"a": {"dtype": "F32", "shape": [1 << 33, 1 << 31], "data_offsets": [0, 0]}},  # the product wraps to zero
        {"a": {"dtype": "F32", "shape": [-1, -8], "data_offsets": [0, 32]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(ModelError, match="cannot be understood"):
        read_tensors(tmp_path / "a.safetensors")


def test_dense_tensors_are_read_in_slices_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ekko.snapshots.files.SLICE_BYTES", 4 * 256 * 3)
    shapes = [(), (1,), (255,), (256,), (7, 300), (2_000, 2), (3, 0), (1, 1, 5_000)]
    tensors = {f"t{i}": RNG.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}
    save_file(tensors, tmp_path / "a.safetensors")
    plan = plan_load(read_tensors(tmp_path / "a.safetensors"), {}, {})
    found: dict[int, list[float]] = {}
    for table, keys, rows in slices(plan):
        assert (table, len(rows) <= 3, len(keys)) == ("_dense", True, len(rows))
        found.update(zip(keys.tolist(), rows.tolist(), strict=True))
    for name, array in tensors.items():
        values = [value for key in TensorSpec(name, array.shape, "float32").keys.tolist() for value in found.pop(key)]
        assert values[: array.size] == array.reshape(-1).tolist()
        assert not any(values[array.size :])
    assert not found
    huge = FileTensor("emb", ((1 << 28) + 1,), "f", lambda begin, end: np.zeros(end - begin))
    with pytest.raises(ModelError, match="is it a table"):
        plan_load({"emb": huge}, {}, {})
    with pytest.raises(ModelError, match="tensor name 'a/b' is not usable"):
        plan_load({"a/b": FileTensor("a/b", (1,), "f", lambda begin, end: np.zeros(end - begin))}, {}, {})


def test_state_dicts_that_are_none(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    torch.save({"model": {"w": torch.zeros(2)}, "epoch": 3}, path)
    with pytest.raises(ModelError, match="has no tensors: it has 'model', 'epoch'"):
        read_tensors(path)
    torch.save({"item": torch.from_numpy(ITEMS).T.contiguous().T}, path, _use_new_zipfile_serialization=False)
    assert loaded(path, {}) == {"item": dict(enumerate(ITEMS.tolist()))}
    torch.save({"z": torch.ones(2, 2, dtype=torch.complex64), "half": torch.ones(2, 2, dtype=torch.bfloat16)}, path)
    with pytest.raises(ModelError, match="expected real numbers"):
        loaded(path, {})


async def _loads_in_two_lives(path: Path) -> None:
    began = asyncio.Event()

    def never(_request: LoadRequest, _plan: LoadPlan | None) -> Opened:
        began.set()
        return Opened("train-1", "us", 64, {"item": 4})

    async def publish(_step: PublishStep) -> int:
        return await asyncio.get_running_loop().create_future()

    loads, request = Loading(never, publish), LoadRequest("ctr", path, {})
    loads.begin(request)
    await began.wait()
    loads.close()
    await asyncio.sleep(0)
    assert "load it again" in loads.picture.error
    loads.begin(request)  # in the next life
    assert loads.picture == LoadPicture("ctr", str(path), True, finished=1)
    loads.close()


def test_a_load_that_the_end_of_a_life_cuts_short_stands_in_nobodys_way(tmp_path: Path) -> None:
    np.save(tmp_path / "item.npy", ITEMS)
    asyncio.run(_loads_in_two_lives(tmp_path / "item.npy"))


def test_whoever_waits_for_a_load_is_told_that_the_node_was_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    running, none = asdict(LoadPicture("ctr", "x", True)), asdict(LoadPicture())
    answers: list[dict[str, Any]] = [{"load": running}, {"ready": False}, {"load": none}]
    monkeypatch.setattr(snapshot_commands, "ask_node", lambda *ask: dict(none) if len(ask) == 3 else answers.pop(0))
    with pytest.raises(EkkoError, match="was started again while it loaded"):
        load_now("127.0.0.1:1", {}, quiet=True)


@pytest.mark.processes
def test_a_node_loads_a_file_and_another_pulls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"tables": {"nan": 4}, "capacity_rows": 100, "capacity_bytes": 6_000_000}
    monkeypatch.setenv("EKKO_MODELS__SMALL", json.dumps(small))
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
        with ekko.Publisher(cluster["train-1"].local, model="ctr", timeout=PATIENCE_S) as publisher:
            everywhere(publisher, answer["stamp"])
            last = publisher.publish("item", [1], np.zeros((1, 4), np.float32))  # its chain goes on
            everywhere(publisher, last)
        for node in cluster.nodes.values():
            with closing(ekko.Reader("ctr", run_dir=node.run_dir)) as reader:
                expected = ITEMS.copy()
                expected[1] = 0
                wait_until(lambda: np.array_equal(reader.dense("top.0.weight"), dense), "the tensor", PATIENCE_S)
                assert np.array_equal(reader.lookup("item", np.arange(5_000, dtype=np.uint64)), expected)
        _load_what_is_odd(tmp_path, cluster)


def _load_what_is_odd(path: Path, cluster: LocalCluster) -> None:
    """Keys elsewhere, values that end a load, a model that is full, dropped, or an alias: all of one pair of nodes."""
    train, serve = cluster["train-1"], cluster["serve-1"]

    def ask(file: str, model: str = "ctr", codec: str | None = None, **keys: str) -> dict[str, Any]:
        request = {"model": model, "file": str(path / file), "tables": {}, "codec": codec, "keys": keys}
        return load_now(train.http, request, quiet=True)

    np.save(path / "item.npy", ITEMS)
    np.save(path / "ids.npy", np.arange(5_000) + 10_000)
    command = ["load", "ctr", str(path / "item.npy"), "--keys", str(path / "ids.npy"), "--http", train.http, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "ekko.cli", *command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    with closing(ekko.Reader("ctr", run_dir=train.run_dir)) as reader:
        assert np.array_equal(reader.lookup("item", np.arange(10_000, 15_000, dtype=np.uint64)), ITEMS)
    with pytest.raises(EkkoError, match="has codec 'float32', not 'int8'"):
        ask("item.npy", codec="int8")
    spoiled = np.zeros((200_000, 4), np.float32)
    spoiled[150_000, 2] = np.nan
    np.save(path / "nan.npy", spoiled)
    with pytest.raises(EkkoError, match=r"no numbers.*131072 rows before that are loaded, and stay"):
        ask("nan.npy", "scratch")
    with pytest.raises(EkkoError, match=r"full: .*capacity_bytes"):
        ask("nan.npy", "small")
    assert ask("item.npy", "gone")["rows"] == 5_000
    operate(train, "drop", {"model": "gone", "force": True})
    stamp = ask("item.npy", "gone")["stamp"]
    with ekko.Publisher(train.local, model="gone", timeout=PATIENCE_S) as publisher:
        everywhere(publisher, stamp)  # a new model of the name, not the one that was dropped
    with closing(ekko.Reader("gone", run_dir=serve.run_dir)) as reader:
        assert np.array_equal(reader.lookup("item", np.arange(5_000, dtype=np.uint64)), ITEMS)
    operate(train, "alias", {"alias": "now", "model": "ctr", "force": True})
    with pytest.raises(EkkoError, match="'now' is an alias, now of model 'ctr'"):
        ask("item.npy", "now")


def operate(node: NodeProcess, what: str, body: dict[str, object]) -> None:
    request = urllib.request.Request(
        f"http://{node.http}/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        assert response.status == 200
