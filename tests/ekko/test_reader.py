"""The reader: what it accepts and returns, before there is a model, and across everything its node can go through."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ekko.codec import encode, rounded
from ekko.errors import ModelError, StoreError
from ekko.model import CODECS, DENSE_DIM, DENSE_TABLE, ModelSpec, TableSpec, TensorSpec, table_id
from ekko.serve.attachment import Attacher, Attachment
from ekko.serve.reader import Reader
from ekko.store import Store, layout
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns

SPEC = ModelSpec("ctr", 8, {"item": TableSpec("item", 3), "user": TableSpec("user", 16)})
DEADLINE_S = 60


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


@pytest.fixture
def store(run_dir: Path) -> Store:
    return Store.open(run_dir)


@pytest.fixture
def model(store: Store) -> ModelStore:
    model = store.add_model(SPEC)
    put(model, "item", [1, 2, 2**64 - 1], 10)
    return model


def put(model: ModelStore, table: str, keys: list[int], stamp: int) -> None:
    """Rows whose values are their stamp."""
    rows = np.full((len(keys), model.spec.tables[table].dim), stamp, np.float32)
    model.apply([RowColumns(table_id(table), np.array(keys, np.uint64), rows.view(np.uint8))], stamp)


def delete(model: ModelStore, table: str, keys: list[int], stamp: int) -> None:
    empty = np.empty((0, 4 * model.spec.tables[table].dim), np.uint8)
    model.apply([RowColumns(table_id(table), np.array(keys, np.uint64), empty)], stamp)


def put_dense(model: ModelStore, spec: TensorSpec, values: NDArray[np.float32], stamp: int) -> None:
    rows = np.zeros((spec.rows, DENSE_DIM), np.float32)
    rows.reshape(-1)[: values.size] = values.reshape(-1)
    model.apply([RowColumns(table_id(DENSE_TABLE), spec.keys, rows.view(np.uint8))], stamp)


# --- look-ups ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        [1, 5, 2],
        (1, 5, 2),
        np.array([1, 5, 2], np.uint64),
        np.array([1, 5, 2], np.int64),
        np.array([1, 5, 2], np.uint8),
        np.array([1, 0, 5, 0, 2, 0], np.int64)[::2],
        np.array([1, 0, 5, 0, 2, 0], np.uint64)[::2],
        np.frombuffer(b"\0" + np.array([1, 5, 2], np.uint64).tobytes(), np.uint64, 3, 1),
    ],
    ids=["list", "tuple", "uint64", "int64", "uint8", "strided-int64", "strided-uint64", "unaligned"],
)
def test_keys_of_any_integer_kind(model: ModelStore, run_dir: Path, keys: object) -> None:
    with Reader("ctr", run_dir) as reader:
        rows, stamps = reader.lookup("item", keys, stamps=True)  # type: ignore[call-overload]
    assert rows.dtype == np.float32
    assert rows.tolist() == [[10.0] * 3, [0.0] * 3, [10.0] * 3]
    assert stamps.dtype == np.uint64
    assert stamps.tolist() == [10, 0, 10]


def test_keys_of_a_torch_tensor(model: ModelStore, run_dir: Path) -> None:
    torch = pytest.importorskip("torch")
    with Reader("ctr", run_dir) as reader:
        assert reader.lookup("item", torch.tensor([1, 5]))[:, 0].tolist() == [10.0, 0.0]


def test_keys_of_any_shape_and_no_keys(model: ModelStore, run_dir: Path) -> None:
    with Reader("ctr", run_dir) as reader:
        rows, stamps = reader.lookup("item", [[1, 5], [2, 1]], stamps=True)
        assert rows.shape == (2, 2, 3)
        assert stamps.tolist() == [[10, 0], [10, 10]]
        assert reader.lookup("item", []).shape == (0, 3)
        assert reader.lookup("item", 2**64 - 1).tolist() == [10.0] * 3


def test_deleted_keys_are_absent_and_may_come_back(model: ModelStore, run_dir: Path) -> None:
    with Reader("ctr", run_dir) as reader:
        delete(model, "item", [1, 7], 11)
        rows, stamps = reader.lookup("item", [1, 7, 2], stamps=True)
        assert (rows[:, 0].tolist(), stamps.tolist()) == ([0.0, 0.0, 10.0], [0, 0, 10])
        put(model, "item", [1], 12)
        assert reader.lookup("item", [1], stamps=True)[1].tolist() == [12]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", [1, 5, 64, 67])
def test_rows_of_every_codec_are_decoded(store: Store, run_dir: Path, codec: str, dim: int) -> None:
    count = 5_000  # more than the kernel takes in one part
    rows = np.random.default_rng(dim).standard_normal((count, dim), dtype=np.float32) * 0.1
    keys = np.arange(count, dtype=np.uint64) * np.uint64(7)
    table = TableSpec("item", dim, codec)
    model = store.add_model(ModelSpec("ctr", 8, {"item": table}, codec=codec))
    model.apply([RowColumns(table.id, keys, encode(codec, rows))], 10)
    gone = np.array([14, 3_500], np.uint64)
    model.apply([RowColumns(table.id, gone, np.empty((0, table.row_bytes), np.uint8))], 11)
    expected, stamps = rounded(codec, rows), np.full(count, 10, np.uint64)
    expected[[2, 500]], stamps[[2, 500]] = 0, 0
    asked = np.append(keys, np.array([1, 2**64 - 1], np.uint64))  # two that are absent
    order = np.random.default_rng(1).permutation(len(asked))
    expected = np.concatenate([expected, np.zeros((2, dim), np.float32)])[order]
    out = np.full((len(asked), dim), np.nan, np.float32)
    with Reader("ctr", run_dir) as reader:
        assert reader.lookup("item", asked[order]).tobytes() == expected.tobytes()
        seen, found = reader.lookup("item", asked[order], stamps=True, out=out)
    assert seen.tobytes() == expected.tobytes()
    assert found.tolist() == np.append(stamps, np.zeros(2, np.uint64))[order].tolist()


def test_out_is_written_and_returned(model: ModelStore, run_dir: Path) -> None:
    out = np.full((2, 3), 99, np.float32)
    with Reader("ctr", run_dir) as reader:
        assert reader.lookup("item", [1, 5], out=out) is out
    assert out.tolist() == [[10.0] * 3, [0.0] * 3]


def test_user_mistakes_are_named(model: ModelStore, run_dir: Path) -> None:
    frozen = np.zeros((1, 3), np.float32)
    frozen.flags.writeable = False
    strided = np.zeros((1, 6), np.float32)[:, ::2]
    bad_outs = [np.zeros((1, 4), np.float32), np.zeros((1, 3)), np.zeros(3, np.float32), strided, frozen]
    with Reader("ctr", run_dir) as reader:
        with pytest.raises(ModelError, match=r"no table 'shop': it has 'item', 'user'"):
            reader.lookup("shop", [1])
        with pytest.raises(ModelError, match="key -1 is negative"):
            reader.lookup("item", [3, -1])
        with pytest.raises(ModelError, match="expected integers"):
            reader.lookup("item", [0.5])
        with pytest.raises(ModelError, match=r"no dense tensor 'w': it has none"):
            reader.dense("w")
        for out in bad_outs:
            with pytest.raises(ModelError, match="expected a writable"):
                reader.lookup("item", [1], out=out)


def test_readers_in_many_threads(model: ModelStore, run_dir: Path) -> None:
    """Threads share a reader while rows are overwritten and a table is added."""
    keys = list(range(2_000))
    put(model, "user", keys, 20)
    problems: list[str] = []
    stop = threading.Event()
    with Reader("ctr", run_dir) as reader:

        def look() -> None:
            newest = np.zeros(len(keys), np.uint64)
            while not stop.is_set():
                rows, stamps = reader.lookup("user", keys, stamps=True)
                if not np.array_equal(rows, np.repeat(stamps.astype(np.float32)[:, None], 16, axis=1)):
                    problems.append("torn")
                if (stamps < newest).any():
                    problems.append("went back")
                newest = stamps

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for stamp in range(21, 400):
            put(model, "user", keys, stamp)
            put(model, "item", [1000 + stamp * 10 + i for i in range(10)], stamp)
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert problems == []


# --- before, beside and after the node ----------------------------------------------------------------------------------------


def test_before_there_is_anything(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no node has a store in"):
        Reader("ctr", tmp_path / "nowhere")


def test_before_there_is_the_model(store: Store, run_dir: Path) -> None:
    with pytest.raises(ModelError, match="does not have model 'ctr' yet: it has none"):
        Reader("ctr", run_dir)
    store.add_model(ModelSpec("other"))
    with pytest.raises(ModelError, match="does not have model 'ctr' yet: it has 'other'"):
        Reader("ctr", run_dir, wait=0.05)


@pytest.mark.parametrize("opened", [False, True], ids=["before-the-node", "before-the-model"])
def test_a_reader_waits_for_its_model(run_dir: Path, opened: bool) -> None:
    if opened:
        Store.open(run_dir).close()
    found: list[list[float]] = []
    thread = threading.Thread(
        target=lambda: found.append(Reader("ctr", run_dir, wait=DEADLINE_S).lookup("item", [1])[0].tolist())
    )
    thread.start()
    store = Store.open(run_dir)
    store.add_model(SPEC)
    thread.join(DEADLINE_S)
    assert found in ([[0.0] * 3], [[10.0] * 3])
    store.close()


def test_tables_added_later_are_seen(store: Store, model: ModelStore, run_dir: Path) -> None:
    with Reader("ctr", run_dir) as reader:
        assert dict(reader.tables) == {"item": 3, "user": 16}
        view = reader._table("item")
        store.add_table("ctr", TableSpec("shop", 2))
        store.add_model(ModelSpec("other"))
        assert dict(reader.tables) == {"item": 3, "user": 16, "shop": 2}
        assert reader.lookup("shop", [4]).tolist() == [[0.0, 0.0]]
        assert reader._table("item") is view, "what was mapped stays mapped"


def test_a_restart_of_the_node_is_not_noticed(store: Store, model: ModelStore, run_dir: Path) -> None:
    with Reader("ctr", run_dir) as reader:
        attachment = reader._attachment
        store.close()
        assert reader.lookup("item", [1])[0, 0] == 10, "a reader needs no running node"
        again = Store.open(run_dir)
        assert again.resumed
        put(again.add_model(SPEC), "item", [1], 30)
        assert reader.lookup("item", [1])[0, 0] == 30
        assert reader._attachment is attachment
        again.close()


def test_a_replaced_store_is_followed(store: Store, model: ModelStore, run_dir: Path) -> None:
    with Reader("ctr", run_dir) as reader:
        store.close()
        manifest = run_dir / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"shards": 8', '"shards": 9'))  # the header does not say so: damaged
        fresh = Store.open(run_dir)
        assert not fresh.resumed
        with pytest.raises(ModelError, match="does not have model 'ctr' yet"):
            reader.lookup("item", [1])
        put(fresh.add_model(SPEC), "item", [1], 40)
        assert reader.lookup("item", [1, 2], stamps=True)[1].tolist() == [40, 0]
        fresh.close()


def test_a_destroyed_store_and_a_closed_reader_say_so(store: Store, model: ModelStore, run_dir: Path) -> None:
    with Reader("ctr", run_dir) as reader:
        store.destroy()
        with pytest.raises(ModelError, match="no node has a store"):
            reader.lookup("item", [1])
    with pytest.raises(ModelError, match="is closed"):
        reader.lookup("item", [1])


def test_a_reader_that_is_closed_while_it_waits_stays_closed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.open(run_dir).add_model(SPEC)
    reader = Reader("ctr", run_dir)
    attach, begun = Attacher.attach, threading.Event()

    def slowly(self: Attacher, old: Attachment | None) -> Attachment | None:
        begun.set()
        time.sleep(0.05)  # long enough for the other thread to get to its lock
        return attach(self, old)

    monkeypatch.setattr(Attacher, "attach", slowly)
    reader._attachment = None
    thread = threading.Thread(target=lambda: reader.lookup("item", [1]))
    thread.start()
    assert begun.wait(DEADLINE_S)
    reader.close()
    thread.join()
    assert reader._attachment is None
    with pytest.raises(ModelError, match="is closed"):
        reader.lookup("item", [1])


def test_another_layout_is_refused(store: Store, model: ModelStore, run_dir: Path) -> None:
    manifest = run_dir / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"layout_version": {layout.LAYOUT_VERSION}', '"layout_version": 99'))
    with pytest.raises(StoreError, match=f"layout 99, this reader {layout.LAYOUT_VERSION}"):
        Reader("ctr", run_dir)


def test_a_reader_cannot_write(model: ModelStore, run_dir: Path) -> None:
    with Reader("ctr", run_dir) as reader:
        assert not reader._table("item")._mapping.words(0, 8).flags.writeable


# --- dense and staleness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 100), (2, 256), (), (0, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "float16"])
def test_dense_tensors_have_their_shape_and_dtype(
    store: Store, model: ModelStore, run_dir: Path, shape: tuple[int, ...], dtype: str
) -> None:
    spec = TensorSpec("top.0.weight", shape, dtype)
    store.add_tensor("ctr", spec)
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    with Reader("ctr", run_dir) as reader:
        if values.size:
            with pytest.raises(ModelError, match="not published yet"):
                reader.dense("top.0.weight")
        put_dense(model, spec, values, 50)
        found = reader.dense("top.0.weight")
    assert found.shape == shape
    assert found.dtype == dtype
    assert np.array_equal(found, values)


def test_a_dense_tensor_is_readable_where_all_of_it_is_held(store: Store, run_dir: Path) -> None:
    model = store.add_model(ModelSpec("ctr", 8, partitions=2), hold=[0])
    specs = [TensorSpec(f"bias.{number}", (4,), "float32") for number in range(8)]
    there = [spec for spec in specs if model.partition_of(spec.keys).tolist() == [0]]
    assert 0 < len(there) < len(specs)
    for spec in specs:
        store.add_tensor("ctr", spec)
    for spec in there:
        put_dense(model, spec, np.arange(4, dtype=np.float32), 50)
    with Reader("ctr", run_dir, unheld="absent") as reader:
        for spec in there:
            assert reader.dense(spec.name).tolist() == [0.0, 1.0, 2.0, 3.0]
        for name in sorted({spec.name for spec in specs} - {spec.name for spec in there}):
            with pytest.raises(
                ModelError, match=rf"tensor '{name}' are in partitions \[1\] .* holds \[0\] of 2: read it on a node"
            ):
                reader.dense(name)


def test_a_dense_tensor_that_is_not_wholly_here_is_not_read(store: Store, model: ModelStore, run_dir: Path) -> None:
    """A node that catches up has some of its rows before others: zeros in the place of those would spoil the model."""
    spec = TensorSpec("top.0.weight", (3, DENSE_DIM), "float32")
    store.add_tensor("ctr", spec)
    rows = np.ones((2, DENSE_DIM), np.float32)
    model.apply([RowColumns(table_id(DENSE_TABLE), spec.keys[:2], rows.view(np.uint8))], 50)
    with Reader("ctr", run_dir) as reader, pytest.raises(ModelError, match=r"not published yet, .* 2 of its 3 rows are here"):
        reader.dense("top.0.weight")


def test_staleness_is_now_minus_what_the_node_says(model: ModelStore, run_dir: Path) -> None:
    with Reader("ctr", run_dir) as reader:
        assert reader.staleness_ms() is None
        model.set_synced_until(int(time.time() * 1000) - 5_000)
        staleness = reader.staleness_ms()
        assert staleness is not None
        assert 4_900 < staleness < 5_000 + DEADLINE_S * 1000
        model.set_synced_until(0)
        assert reader.staleness_ms() is None


def test_reading_needs_no_network_library() -> None:
    network = ("zmq", "asyncio", "uvloop", "starlette")
    code = f"import sys, ekko.serve.reader; print([name for name in {network} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
