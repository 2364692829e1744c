"""Snapshots: what is restored is what was held; what is damaged or foreign is refused; T5 in order and out of it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ekko.codec import encode
from ekko.errors import SnapshotError
from ekko.file_ledger import FileLedger
from ekko.model import CODECS, ModelSpec, TableSpec, TensorSpec, table_id
from ekko.snapshots.catalog import Catalog, Entry
from ekko.snapshots.export import export
from ekko.snapshots.files import plan_load, read_tensors, slices
from ekko.snapshots.folders import LocalFolder, open_folder
from ekko.snapshots.format import SnapshotManifest
from ekko.snapshots.load import Restored, Wanted, open_or_restore
from ekko.snapshots.write import SnapshotWriter
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p.identity.ledger import NodeRecord
from p2p.messages import DONE, Expulsion, Retired
from p2p.replica import RowColumns, WriterIdentity

MODEL, SHARDS, DIM, WRITER = "ctr", 8, 4, 3


class Home:
    """A node's files: its store, and a folder for snapshots."""

    def __init__(self, path: Path) -> None:
        self.run_dir = path / "run"
        self.folder = LocalFolder(path / "snapshots")
        self.store = Store.open(self.run_dir, table_bytes_max=64 << 20)
        self.spec = ModelSpec(MODEL, SHARDS, {"item": TableSpec("item", DIM), "user": TableSpec("user", 2)})
        self.model = self.store.add_model(self.spec)
        self.tick = 0

    def write(self, keys: list[int], value: float | None, table: str = "item") -> int:
        """One whole step of a writer; value None deletes."""
        self.tick += 1
        stamp = self.tick << 12 | WRITER
        dim = self.spec.tables[table].dim
        array = np.array(keys, np.uint64)
        data = np.full((0 if value is None else len(keys), dim), value or 0.0, np.float32)
        shards = np.unique(self.model.shards_of(array))
        self.model.apply([RowColumns(table_id(table), array, encode("float32", data))], stamp)
        self.model.vector[shards, WRITER] = stamp
        self.model.frontier[WRITER] = stamp
        return stamp

    def snapshot(self, parent: SnapshotManifest | None = None) -> SnapshotManifest:
        base = None if parent is None else Catalog(self.folder).entry(parent.name)
        return SnapshotWriter(self.run_dir, self.folder, "a", lambda done, total: None).write(base)

    def restore(self, **wanted: object) -> Restored:
        """As after the loss of the machine's memory."""
        self.store.destroy()
        restored = open_or_restore(self.run_dir, [self.folder], Wanted(**wanted), table_bytes_max=64 << 20)  # type: ignore[arg-type]
        self.store = restored.store
        self.model = self.store.models.get(MODEL)  # type: ignore[assignment]
        return restored


def contents(model: ModelStore) -> dict[tuple[str, int], tuple[int, bytes | None]]:
    """(table, key) -> (stamp, row; None: deleted)."""
    out: dict[tuple[str, int], tuple[int, bytes | None]] = {}
    names = {spec.id: spec.name for spec in model.table_specs}
    for selection in model.scan_since(np.zeros(model.vector.shape, np.uint64)):
        rows = model.read(selection.table, selection.slots)
        assert rows.stamps is not None
        for i, (key, stamp) in enumerate(zip(rows.keys.tolist(), rows.stamps.tolist(), strict=True)):
            assert (names[selection.table], key) not in out
            out[names[selection.table], key] = (stamp, rows.rows[i].tobytes() if i < len(rows.rows) else None)
    return out


def test_full_snapshot_is_exact(home: Home) -> None:
    home.write(list(range(1000)), 1.5)
    home.write(list(range(0, 1000, 7)), 2.5)
    home.write([3, 5], None)
    home.write([9, 11], 4.0, "user")
    home.model.add_tensor(TensorSpec("w", (3,), "float32"))
    home.store.add_model(home.spec)
    before, vector, frontier = contents(home.model), home.model.vector.copy(), home.model.frontier.copy()
    home.model.set_writer(WriterIdentity(WRITER, 77))
    home.snapshot()
    restored = home.restore()
    assert restored.snapshot is not None
    assert contents(home.model) == before
    assert np.array_equal(home.model.vector, vector)
    assert np.array_equal(home.model.frontier, frontier)
    assert home.model.writer is None, "who lost its memory takes a fresh writer id (R4)"
    assert home.model.stamp_max >= home.tick << 12
    out, stamps = home.model.lookup("item", np.array([0, 3, 4], np.uint64))
    assert out[:, 0].tolist() == [2.5, 0.0, 1.5]
    assert stamps[1] == 0
    stats = home.model.table_stats()["item"]
    assert (stats.rows, stats.tombstones) == (998, 2)
    # It goes on like any other: rows come, old ones are found, and it is attached to after a kill.
    home.write([0, 5000], 9.0)
    again = contents(home.model)
    home.store.close()
    home.store = Store.open(home.run_dir, table_bytes_max=64 << 20)
    home.model = home.store.models[MODEL]
    assert home.store.resumed
    assert contents(home.model) == again


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True)),
            st.tuples(st.just("delete"), st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True)),
            st.tuples(st.sampled_from(["full", "increment"]), st.just([])),
        ),
        max_size=14,
    )
)
def test_chains_are_exact(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, list[int]]]) -> None:
    home = Home(tmp_path_factory.mktemp("home"))
    try:
        newest = home.snapshot()
        expected = contents(home.model)
        for number, (action, keys) in enumerate(steps):
            if action in ("write", "delete"):
                home.write(keys, None if action == "delete" else float(number))
            else:
                newest = home.snapshot(newest if action == "increment" else None)
                expected = contents(home.model)
        assert home.restore().snapshot == newest.name
        assert contents(home.model) == expected
    finally:
        home.store.destroy()


def test_every_flipped_bit_is_refused(home: Home) -> None:
    home.write(list(range(20)), 1.0)
    first = home.snapshot()
    home.write([1], 2.0)
    second = home.snapshot(first)
    rng = np.random.default_rng(5)
    for snapshot in (first, second):
        for file in sorted((Path(home.folder.url) / snapshot.name).iterdir()):
            sound = file.read_bytes()
            for bit in rng.integers(0, 8 * len(sound), 40 if sound else 0).tolist():
                spoiled = bytearray(sound)
                spoiled[bit // 8] ^= 1 << bit % 8
                file.write_bytes(spoiled)
                restored = home.restore()
                assert restored.snapshot == (first.name if snapshot is second else None), (file, bit)
                assert restored.refused
            if sound:
                file.write_bytes(sound[:-1])
                assert home.restore().snapshot == (first.name if snapshot is second else None)
            file.write_bytes(sound)
    assert home.restore().snapshot == second.name


def test_foreign_ones_are_refused_with_their_reason(home: Home) -> None:
    home.write([1], 1.0)
    home.snapshot()

    def reason(**wanted: object) -> str:
        restored = home.restore(**wanted)
        assert restored.snapshot is None
        return restored.refused[0]

    assert "shards 8 in it, and 16" in reason(specs={MODEL: ModelSpec(MODEL, 16)})
    assert "codec float32 in it, and int8" in reason(specs={MODEL: ModelSpec(MODEL, 8, codec="int8")})
    assert "dim 4 in it, and 5" in reason(specs={MODEL: ModelSpec(MODEL, 8, {"item": TableSpec("item", 5)})})
    record = NodeRecord.load(FileLedger(home.run_dir))
    record.cluster = 12
    record.save()
    assert "it is of cluster 0000000000000000, this node of 000000000000000c" in reason()


def test_what_the_ledger_knows_wins(home: Home) -> None:
    home.write([1], 1.0)
    record = NodeRecord.load(FileLedger(home.run_dir))
    record.lives = [41]
    record.bindings[home.spec.id, WRITER] = 99
    record.save()
    home.snapshot()
    record.expelled[41] = Expulsion("a", 41, 1)
    record.save()
    assert "expelled since" in home.restore().refused[0]
    record.expelled.clear()
    floor = np.zeros(SHARDS, np.uint64)
    record.retired[home.spec.id, WRITER, 99] = Retired(home.spec.id, home.spec.id, WRITER, 99, DONE, floor)
    record.save()
    assert "more of writer 3 than was left" in home.restore().refused[0]
    record.retired[home.spec.id, WRITER, 99] = Retired(
        home.spec.id, home.spec.id, WRITER, 99, DONE, np.full(SHARDS, 5 << 12, np.uint64)
    )
    record.save()
    assert home.restore().snapshot is not None


def test_the_ledger_learns_whose_rows_they_are(home: Home) -> None:
    home.write([1], 1.0)
    ledger = FileLedger(home.run_dir)
    record = NodeRecord.load(ledger)
    record.cluster, record.lives = 6, [41]
    record.bindings[home.spec.id, WRITER] = 99
    record.save()
    home.snapshot()
    for node, lives in (("a", [41]), ("b", [])):  # who begins with another node's rows is no life of it
        (home.run_dir / "ledger").unlink()
        assert home.restore(node=node).snapshot is not None
        record = NodeRecord.load(ledger)
        assert (record.cluster, record.lives, record.bindings) == (6, lives, {(home.spec.id, WRITER): 99})


def test_leftovers_and_old_ones_are_removed(home: Home) -> None:
    names = []
    for _ in range(4):
        home.write([1], 1.0)
        full = home.snapshot()
        home.write([2], 1.0)
        names += [full.name, home.snapshot(full).name]
    catalog, path = Catalog(home.folder), Path(home.folder.url)
    unfinished = path / names[-1].replace(names[-1][-8:], "0000abcd")
    unfinished.mkdir()
    (unfinished / "0-1.rows").write_bytes(b"x")
    assert catalog.names() == names
    assert home.restore().snapshot == names[-1], "what was never finished is not looked at"
    assert catalog.remove_leftovers() == 1
    assert sorted(catalog.prune(2)) == names[:4]
    assert catalog.names() == names[4:]
    assert not catalog.prune(2)
    assert home.restore().snapshot == names[-1]


def test_names_ascend_whatever_the_clock_says(home: Home) -> None:
    first = home.snapshot()
    assert Catalog(home.folder).next_name(5, "00000000") > first.name


def test_any_url_that_fsspec_knows(home: Home) -> None:
    home.folder = open_folder("memory://ekko-test/a")  # type: ignore[assignment]
    home.write([1, 2], 1.0)
    first = home.snapshot()
    home.write([2], 3.0)
    second = home.snapshot(first)
    before = contents(home.model)
    assert home.restore().snapshot == second.name
    assert contents(home.model) == before
    Catalog(home.folder).prune(1)
    home.folder.remove(second.name)
    home.folder.remove(first.name)
    assert home.folder.names() == []


def test_only_the_partitions_that_are_wanted(tmp_path: Path) -> None:
    run_dir, folder = tmp_path / "run", LocalFolder(tmp_path / "snapshots")
    store = Store.open(run_dir, table_bytes_max=64 << 20)
    try:
        model = store.add_model(ModelSpec(MODEL, 8, {"item": TableSpec("item", DIM)}, partitions=4))
        keys = np.arange(100, dtype=np.uint64)
        model.apply([RowColumns(table_id("item"), keys, encode("float32", np.ones((100, DIM), np.float32)))], 5 << 12 | 1)
        model.vector[:, 1] = model.frontiers[:, 1] = 5 << 12 | 1
        before = contents(model)
        SnapshotWriter(run_dir, folder, "a").write()
        store.destroy()
        store = open_or_restore(run_dir, [folder], Wanted(hold={MODEL: [1, 3]}), table_bytes_max=64 << 20).store
        model = store.models[MODEL]
        assert model.hold == (1, 3)
        inside = np.isin(model.partition_of(keys), [1, 3])
        assert contents(model) == {("item", key): before["item", key] for key in keys[inside].tolist()}
        assert model.vector[:, 1].astype(bool).tolist() == [False, True] * 4
    finally:
        store.destroy()


def test_an_increment_over_another_memory_is_refused(home: Home) -> None:
    first = home.snapshot()
    home.restore()
    with pytest.raises(SnapshotError, match="another memory"):
        home.snapshot(first)


def test_a_chain_without_its_parent_is_refused(home: Home) -> None:
    home.write([1], 1.0)
    first = home.snapshot()
    second = home.snapshot(first)
    home.folder.remove(first.name)
    restored = home.restore()
    assert restored.snapshot is None
    assert second.name in restored.refused[0]
    assert isinstance(Catalog(home.folder).entry(second.name), Entry)


def test_export_and_back(home: Home, tmp_path: Path) -> None:
    home.write([9, 3, 1 << 60], 1.5)
    home.write([3], None)
    home.write([5], 2.5, "user")
    tensor = TensorSpec("w", (2, 3), "float32")
    home.store.add_tensor(MODEL, tensor)
    dense = np.arange(256, dtype=np.float32).reshape(1, 256)
    home.model.apply([RowColumns(table_id("_dense"), tensor.keys, encode("float32", dense))], 9 << 12 | WRITER)
    home.snapshot()
    path = tmp_path / "out.safetensors"
    assert export(home.folder.url, MODEL, path)["rows"] == 3
    found = load_file(path)
    assert found["item.keys"].tolist() == [9, 1 << 60]
    assert found["item.stamps"].tolist() == [1 << 12 | WRITER] * 2
    assert found["item"].tolist() == [[1.5] * DIM] * 2
    assert found["w"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    back: dict[str, dict[int, list[float]]] = {}
    for table, keys, rows in slices(plan_load(read_tensors(path), {}, {})):
        back.setdefault(table, {}).update(zip(keys.tolist(), rows.tolist(), strict=True))
    assert back["item"] == {9: [1.5] * DIM, 1 << 60: [1.5] * DIM}
    assert back["user"] == {5: [2.5] * 2}
    assert back["_dense"][int(tensor.keys[0])][:6] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    with pytest.raises(SnapshotError, match="has no model 'other'"):
        export(home.folder.url, "other", path)


@pytest.mark.parametrize("codec", list(CODECS))
def test_what_is_exported_and_loaded_has_the_same_bits(tmp_path: Path, codec: str) -> None:
    """Whatever the codec; deleted keys and tensors that nobody published stay away."""
    run_dir, folder = tmp_path / "run", LocalFolder(tmp_path / "snapshots")
    store = Store.open(run_dir, table_bytes_max=64 << 20)
    spec = ModelSpec(MODEL, SHARDS, {"item": TableSpec("item", 5, codec)}, codec=codec)
    try:
        model = store.add_model(spec)
        model.add_tensor(TensorSpec("never", (3,), "float32"))
        values = np.random.default_rng(3).standard_normal((50, 5)).astype(np.float32)
        keys = np.arange(50, dtype=np.uint64)
        model.apply([RowColumns(table_id("item"), keys, encode(codec, values))], 1 << 12 | WRITER)
        model.apply([RowColumns(table_id("item"), keys[:5], encode(codec, values[:0]))], 2 << 12 | WRITER)
        SnapshotWriter(run_dir, folder, "a").write()
        export(folder.url, MODEL, tmp_path / "out.safetensors")
        (found,) = list(slices(plan_load(read_tensors(tmp_path / "out.safetensors"), {}, {})))
        assert (found[0], found[1].tolist()) == ("item", list(range(5, 50)))
        held = {key: row for (_, key), (_, row) in contents(model).items() if row is not None}
        assert {key: row.tobytes() for key, row in zip(found[1].tolist(), encode(codec, found[2]), strict=True)} == held
        with pytest.raises(SnapshotError, match="cannot be written: No such file"):
            export(folder.url, MODEL, tmp_path / "nowhere" / "out.safetensors")
        model.add_table(TableSpec("item.keys", 5, codec))
        store.add_model(spec)
        store.add_table(MODEL, TableSpec("item.stamps", 5, codec))
        SnapshotWriter(run_dir, folder, "a").write()
        with pytest.raises(SnapshotError, match=r"need the name 'item\.keys' in the file"):
            export(folder.url, MODEL, tmp_path / "out.safetensors")
    finally:
        store.destroy()
