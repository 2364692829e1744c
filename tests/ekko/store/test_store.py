"""The store against a dict: what is held, what is newer, what is seen, and what survives a restart."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.codec import encode, rounded
from ekko.errors import ModelError, StoreError
from ekko.model import CODECS, DENSE_TABLE, ModelSpec, TableSpec, TensorSpec, table_id
from ekko.store import Store, layout
from ekko.store.manifest import read_manifest
from ekko.store.model_store import ModelStore
from p2p.errors import RemoteProtocolError, SchemaClashError
from p2p.replica import Applied, KnownSteps, RowColumns, SchemaEntry, WriterIdentity
from p2p.stamps import WRITERS_MAX

SHARDS = 8
DIMS = {"item": 5, "user": 16}
SPEC = ModelSpec("ctr", SHARDS, {name: TableSpec(name, dim) for name, dim in DIMS.items()})

# Few keys, so that versions meet; the ends of the range among them.
KEYS = st.sampled_from([0, 1, 2, 3, 77, 2**63, 2**64 - 1])
STAMPS = st.integers(1, 40)


class Oracle:
    """What the store should hold: (table, key) -> (stamp, row or None)."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], tuple[int, bytes | None]] = {}

    def apply(self, table: str, versions: Sequence[tuple[int, int, bytes | None]]) -> Applied:
        written = inserted = stale = 0
        for key, stamp, row in versions:
            held = self.rows.get((table, key))
            if held is not None and stamp <= held[0]:
                stale += 1
                continue
            inserted += held is None
            written += 1
            self.rows[table, key] = (stamp, row)
        return Applied(written, inserted, stale)

    def above(self, vector: np.ndarray) -> set[tuple[str, int]]:
        return {
            (table, key)
            for (table, key), (stamp, _) in self.rows.items()
            if stamp > int(vector[mix64(key) % SHARDS, stamp % WRITERS_MAX])
        }


def mix64(key: int) -> int:
    mask = 2**64 - 1
    key ^= key >> 33
    key = key * 0xFF51AFD7ED558CCD & mask
    key ^= key >> 33
    key = key * 0xC4CEB9FE1A85EC53 & mask
    return key ^ key >> 33


def row_of(table: str, key: int, stamp: int) -> bytes:
    return np.full(DIMS[table], (key % 1000) * 100 + stamp, np.float32).tobytes()


@st.composite
def batches(draw: st.DrawFn) -> tuple[str, list[int], int, list[int] | None, int]:
    """Table, keys without repeats, how many are live, stamps of their own or None, the batch's stamp."""
    keys = draw(st.lists(KEYS, unique=True, min_size=1, max_size=6))
    stamps = draw(st.none() | st.lists(STAMPS, min_size=len(keys), max_size=len(keys)))
    return draw(st.sampled_from(sorted(DIMS))), keys, draw(st.integers(0, len(keys))), stamps, draw(STAMPS)


def apply(model: ModelStore, batch: tuple[str, list[int], int, list[int] | None, int], oracle: Oracle | None = None) -> None:
    table, keys, live, stamps, stamp = batch
    own = stamps or [stamp] * len(keys)
    versions = [(key, s, row_of(table, key, s) if i < live else None) for i, (key, s) in enumerate(zip(keys, own, strict=True))]
    rows = np.frombuffer(b"".join(row for _, _, row in versions if row), np.uint8).reshape(
        live, -1 if live else 4 * DIMS[table]
    )
    columns = RowColumns(
        table_id(table), np.array(keys, np.uint64), rows, None if stamps is None else np.array(stamps, np.uint64)
    )
    model.check([columns])
    applied = model.apply([columns], stamp)
    if oracle is not None:
        assert applied == oracle.apply(table, versions)


def held(model: ModelStore) -> dict[tuple[str, int], tuple[int, bytes | None]]:
    """Everything in the store, by way of `changed_since` and `read`."""
    names = {table_id(name): name for name in DIMS}
    found: dict[tuple[str, int], tuple[int, bytes | None]] = {}
    for selection in model.changed_since(np.zeros((SHARDS, WRITERS_MAX), np.uint64)):
        columns = model.read(selection.table, selection.slots)
        assert columns.stamps is not None
        assert selection.row_bytes == 4 * DIMS[names[selection.table]]
        for i, (key, stamp) in enumerate(zip(columns.keys.tolist(), columns.stamps.tolist(), strict=True)):
            row = columns.rows[i].tobytes() if i < len(columns.rows) else None
            assert (names[selection.table], key) not in found
            found[names[selection.table], key] = (stamp, row)
    return found


@given(st.lists(batches(), max_size=12), st.randoms())
def test_any_order_and_repeats_give_the_newest_versions(sequence: list, shuffler: random.Random) -> None:
    model, oracle = Store.anonymous().add_model(SPEC), Oracle()
    for batch in sequence:
        apply(model, batch, oracle)
    assert held(model) == oracle.rows

    # Last writer wins commutes only between versions that differ in stamp: rows are a function of key and stamp here, but a
    # tombstone and a row may share a stamp, which no writer ever lets happen.
    again = sequence + sequence
    shuffler.shuffle(again)
    other = Store.anonymous().add_model(SPEC)
    for batch in again:
        apply(other, batch)
    assert {at: stamp for at, (stamp, _) in held(other).items()} == {at: stamp for at, (stamp, _) in oracle.rows.items()}
    assert other.stray_digest() == model.stray_digest()
    assert other.stamp_max == model.stamp_max == max((stamp for stamp, _ in oracle.rows.values()), default=0)


@given(st.lists(batches(), max_size=12))
def test_look_ups_see_live_rows_and_zeros_elsewhere(sequence: list) -> None:
    model, oracle = Store.anonymous().add_model(SPEC), Oracle()
    for batch in sequence:
        apply(model, batch, oracle)
    for table, dim in DIMS.items():
        keys = np.array([*{key for name, key in oracle.rows if name == table}, 5, 6], np.uint64)
        rows, stamps = model.lookup(table, keys)
        for key, row, stamp in zip(keys.tolist(), rows, stamps.tolist(), strict=True):
            expected_stamp, expected = oracle.rows.get((table, key), (0, None))
            assert stamp == (expected_stamp if expected else 0)
            assert row.tobytes() == (expected or bytes(4 * dim))
    for table, stats in model.table_stats().items():
        versions = [row for (name, _), (_, row) in oracle.rows.items() if name == table]
        assert (stats.rows, stats.tombstones) == (len(versions) - versions.count(None), versions.count(None))


@given(st.lists(batches(), max_size=12), st.dictionaries(st.tuples(st.integers(0, SHARDS - 1), STAMPS), STAMPS))
def test_changed_since_is_what_lies_above_the_vector(sequence: list, known: dict[tuple[int, int], int]) -> None:
    model, oracle = Store.anonymous().add_model(SPEC), Oracle()
    for batch in sequence:
        apply(model, batch, oracle)
    vector = np.zeros((SHARDS, WRITERS_MAX), np.uint64)
    for at, stamp in known.items():
        vector[at] = stamp
    names = {table_id(name): name for name in DIMS}
    found = {
        (names[selection.table], key)
        for selection in model.changed_since(vector)
        for key in model.read(selection.table, selection.slots).keys.tolist()
    }
    assert found == oracle.above(vector)
    model.vector[...] = vector
    assert (model.stray_digest() == 0) == (not found)


@given(st.lists(batches(), max_size=12), st.dictionaries(STAMPS, st.sets(st.integers(0, SHARDS - 1))))
def test_without_leaves_out_just_the_rows_of_known_steps(sequence: list, known: dict[int, set[int]]) -> None:
    """By stamp and shard, tombstones too; of the rest nothing is missing."""
    model, oracle = Store.anonymous().add_model(SPEC), Oracle()
    for batch in sequence:
        apply(model, batch, oracle)
    bits = np.zeros((len(known), SHARDS), np.bool_)
    for row, stamp in zip(bits, sorted(known), strict=True):
        row[list(known[stamp])] = True
    steps = KnownSteps(np.array(sorted(known), np.uint64), np.packbits(bits, axis=1, bitorder="little"))
    names = {table_id(name): name for name in DIMS}
    everything = model.changed_since(np.zeros((SHARDS, WRITERS_MAX), np.uint64))
    left = model.without(everything, steps)
    assert all(selection.slots.size for selection in left)
    found = {
        (names[selection.table], key)
        for selection in left
        for key in model.read(selection.table, selection.slots).keys.tolist()
    }
    assert found == {at for at, (stamp, _) in oracle.rows.items() if mix64(at[1]) % SHARDS not in known.get(stamp, set())}


def test_the_digest_tells_tables_keys_and_stamps_apart() -> None:
    digests = set()
    for table, key, stamp in [("item", 1, 9), ("user", 1, 9), ("item", 2, 9), ("item", 1, 8), ("item", 9, 1)]:
        model = Store.anonymous().add_model(SPEC)
        apply(model, (table, [key], 1, None, stamp))
        digests.add(model.stray_digest())
    assert len(digests) == 5
    assert all(0 < digest < 2**128 for digest in digests)


def test_shards_are_the_hash_modulo_the_shards() -> None:
    model = Store.anonymous().add_model(SPEC)
    keys = [0, 1, 2**64 - 1, 123_456_789_012]
    assert model.shards_of(np.array(keys, np.uint64)).tolist() == [mix64(key) % SHARDS for key in keys]
    assert model.shards_of(np.array(keys * 2, np.uint64)[::2]).tolist() == [mix64(key) % SHARDS for key in (keys * 2)[::2]]


def test_many_rows_in_one_call_and_one_by_one() -> None:
    model = Store.anonymous().add_model(SPEC)
    keys = np.random.default_rng(5).permutation(30_000).astype(np.uint64)
    rows = np.repeat(keys.astype(np.float32)[:, None], 16, axis=1)
    assert model.apply([RowColumns(table_id("user"), keys, rows.view(np.uint8))], 7) == Applied(30_000, 30_000, 0)
    for key in range(30_000, 30_300):
        row = np.full((1, 16), key, np.float32)
        model.apply([RowColumns(table_id("user"), np.array([key], np.uint64), row.view(np.uint8))], 8)
    found, stamps = model.lookup("user", np.arange(30_400, dtype=np.uint64))
    assert np.array_equal(found[:30_300], np.repeat(np.arange(30_300, dtype=np.float32)[:, None], 16, axis=1))
    assert stamps[:30_000].tolist() == [7] * 30_000
    assert not found[30_300:].any()
    assert not stamps[30_300:].any()


def test_a_key_that_comes_twice_in_a_batch_gets_one_row() -> None:
    """No publisher sends such a batch, but a peer's bytes might."""
    model = Store.anonymous().add_model(SPEC)
    keys = np.array([4, 9, 4, 9, 4], np.uint64)
    rows = np.repeat(np.arange(5, dtype=np.float32)[:, None], 16, axis=1).view(np.uint8)
    stamps = np.array([5, 5, 6, 5, 4], np.uint64)
    assert model.apply([RowColumns(table_id("user"), keys, rows, stamps)], 0) == Applied(3, 2, 2)
    assert model.table_stats()["user"].rows == 2
    found, at = model.lookup("user", keys[:2])
    assert (found[:, 0].tolist(), at.tolist()) == ([2.0, 1.0], [6, 5])


def test_unaligned_and_strided_columns_are_taken() -> None:
    model = Store.anonymous().add_model(SPEC)
    raw = b"\0" + np.array([3, 4], np.uint64).tobytes()
    keys = np.frombuffer(raw, np.uint64, 2, 1)
    assert not keys.flags.aligned
    rows = np.repeat(np.arange(4, dtype=np.float32)[:, None], 16, axis=1)[::2].view(np.uint8)
    stamps = np.array([5, 0, 6, 0], np.uint64)[::2]
    assert model.apply([RowColumns(table_id("user"), keys, rows, stamps)], 99).written == 2
    found, at = model.lookup("user", np.array([3, 4], np.uint64))
    assert found[:, 0].tolist() == [0.0, 2.0]
    assert at.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        pytest.param(RowColumns(1, np.zeros(1, np.uint64), np.zeros((1, 20), np.uint8)), "no table", id="unknown-table"),
        pytest.param(
            RowColumns(table_id("item"), np.zeros(1, np.uint64), np.zeros((1, 16), np.uint8)), "not 20 bytes", id="width"
        ),
        pytest.param(
            RowColumns(table_id("item"), np.zeros(1, np.uint64), np.zeros(20, np.uint8)), "not 20 bytes", id="one-dim"
        ),
        pytest.param(
            RowColumns(table_id("item"), np.zeros(1, np.uint64), np.zeros((2, 20), np.uint8)), "2 rows", id="few-keys"
        ),
        pytest.param(
            RowColumns(table_id("item"), np.zeros(1, np.int64), np.zeros((1, 20), np.uint8)), "keys int64", id="key-type"
        ),
        pytest.param(
            RowColumns(table_id("item"), np.zeros(2, np.uint64), np.zeros((1, 20), np.uint8), np.zeros(1, np.uint64)),
            "stamps",
            id="stamps",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: RowColumns, complaint: str) -> None:
    model = Store.anonymous().add_model(SPEC)
    with pytest.raises(RemoteProtocolError, match=complaint):
        model.check([columns])


# --- schema -----------------------------------------------------------------------------------------------------------------


def test_schemas_travel_and_adopting_twice_changes_nothing() -> None:
    origin, other = Store.anonymous(), Store.anonymous()
    origin.add_model(SPEC)
    origin.add_tensor("ctr", TensorSpec("w", (3, 5), "float32"))
    assert other.adopt(origin.schema())
    assert other.schema() == origin.schema()
    assert not other.adopt(origin.schema())
    assert list(other.replicas) == [SPEC.id]
    assert set(other.models["ctr"].table_stats()) == {*DIMS, DENSE_TABLE}


def test_what_servers_train_is_held_only_where_that_is_asked_for() -> None:
    spec = ModelSpec("ctr.training", 16, {"item": TableSpec("item", 4)}, partitions=4)
    origin, serving, spare = Store.anonymous(), Store.anonymous(), Store.anonymous()
    origin.add_model(spec, hold=range(4))
    spare.add_model(spec, hold=[1, 3])
    assert serving.adopt(origin.schema())
    spare.adopt(origin.schema())
    assert serving.schema() == origin.schema()  # so that others hear of it from this node, too
    assert (serving.models["ctr.training"].hold, list(serving.replicas)) == ((), [])
    assert (spare.models["ctr.training"].hold, len(spare.replicas)) == ((1, 3), 2)
    other = Store.anonymous()
    other.add_model(ModelSpec("ctr", 16, {"item": TableSpec("item", 4)}, partitions=4), hold=[0])
    serving.adopt(other.schema())
    assert serving.models["ctr"].hold == (0, 1, 2, 3)


def test_a_table_of_a_known_model_can_be_adopted_alone() -> None:
    store = Store.anonymous()
    store.add_model(SPEC)
    wider = ModelSpec("ctr", SHARDS, {**SPEC.tables, "shop": TableSpec("shop", 3)})
    entries = [entry for entry in wider.entries() if entry.name == "table:shop"]
    assert store.adopt(entries)
    assert set(store.models["ctr"].spec.tables) == {*DIMS, "shop"}


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(ModelSpec("ctr", SHARDS + 1, dict(SPEC.tables)), id="shards"),
        pytest.param(ModelSpec("ctr", SHARDS, {"item": TableSpec("item", 6), "new": TableSpec("new", 2)}), id="dim"),
        pytest.param(ModelSpec("ctr", SHARDS, {}, {"w": TensorSpec("w", (4,), "float32")}), id="tensor"),
        pytest.param(ModelSpec("ctr", SHARDS, codec="int8"), id="codec"),
        pytest.param(ModelSpec("ctr", SHARDS, {"new": TableSpec("new", 2, "float16")}), id="codec-of-a-table"),
        pytest.param(ModelSpec("ctr", SHARDS, {"item": TableSpec("item", DIMS["item"], ttl_s=60)}), id="ttl"),
    ],
)
def test_a_clash_is_refused_and_changes_nothing(other: ModelSpec) -> None:
    store = Store.anonymous()
    store.add_model(ModelSpec("ctr", SHARDS, dict(SPEC.tables), {"w": TensorSpec("w", (3,), "float32")}))
    before = store.schema()
    with pytest.raises(SchemaClashError):
        store.adopt(other.entries())
    with pytest.raises(ModelError):
        store.add_model(other)
    assert store.schema() == before


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_is_resumed_in_its_codec(tmp_path: Path, codec: str) -> None:
    spec = ModelSpec("ctr", SHARDS, {"item": TableSpec("item", 5, codec)}, codec=codec)
    rows = np.linspace(-3, 3, 10, dtype=np.float32).reshape(2, 5)
    keys = np.array([1, 2], np.uint64)
    store = Store.open(tmp_path)
    store.add_model(spec).apply([RowColumns(table_id("item"), keys, encode(codec, rows))], 7)
    store.close()
    store = Store.open(tmp_path)
    assert store.resumed
    model = store.models["ctr"]
    assert model.spec == spec
    assert model.lookup("item", keys)[0].tobytes() == rounded(codec, rows).tobytes()
    (selection,) = model.changed_since(np.zeros((SHARDS, WRITERS_MAX), np.uint64))
    assert model.read(selection.table, selection.slots).rows.tobytes() == encode(codec, rows).tobytes()
    store.add_model(ModelSpec("ctr", SHARDS, {}, {"w": TensorSpec("w", (3,), "float32")}, codec=codec))
    assert model.lookup("_dense", keys)[0].shape == (2, 256), "dense tensors are float32 in every model"
    store.destroy()


def test_entries_that_make_no_sense_are_refused_and_change_nothing() -> None:
    store = Store.anonymous()
    orphan = [entry for entry in SPEC.entries() if entry.name.startswith("table:")]
    for entries in (orphan, [SchemaEntry(1, "model", b"junk")], [*SPEC.entries(), SchemaEntry(SPEC.id, "table:x", b"\x00")]):
        with pytest.raises(RemoteProtocolError):
            store.adopt(entries)
    assert store.schema() == []
    assert dict(store.replicas) == {}


def test_the_name_of_the_dense_table_is_reserved() -> None:
    with pytest.raises(ModelError, match="reserved"):
        Store.anonymous().add_model(ModelSpec("ctr", SHARDS, {DENSE_TABLE: TableSpec(DENSE_TABLE, 4)}))


def test_what_does_not_exist_is_named() -> None:
    store = Store.anonymous()
    with pytest.raises(ModelError, match=r"no model 'ctr': there are none"):
        store.add_table("ctr", TableSpec("item", 5))
    with pytest.raises(ModelError, match=r"no table 'shop': it has 'item', 'user'"):
        store.add_model(SPEC).lookup("shop", np.zeros(1, np.uint64))


# --- restart ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


def test_a_restart_resumes_rows_vector_and_writer(run_dir: Path) -> None:
    store, oracle = Store.open(run_dir), Oracle()
    assert not store.resumed
    model = store.add_model(SPEC)
    store.add_tensor("ctr", TensorSpec("w", (300,), "float64"))
    for stamp in range(1, 60):
        apply(model, ("item", list(range(stamp, stamp + 9)), 6, None, stamp), oracle)
    model.vector[3, 7] = 55
    model.frontier[7] = 56
    model.set_writer(WriterIdentity(7, 2**63 + 5, 54))
    schema, digest = store.schema(), model.stray_digest()
    store.close()

    store = Store.open(run_dir)
    assert store.resumed
    assert store.schema() == schema
    model = store.models["ctr"]
    assert held(model) == oracle.rows
    assert model.stray_digest() == digest
    assert (int(model.vector[3, 7]), int(model.frontier[7]), model.stamp_max) == (55, 56, 59)
    assert model.writer == WriterIdentity(7, 2**63 + 5, 54)
    apply(model, ("item", [1, 500], 2, None, 60), oracle)
    assert held(model) == oracle.rows
    store.close()


def test_a_pending_step_is_merged_into_the_vector_of_its_shards(run_dir: Path) -> None:
    store = Store.open(run_dir)
    model = store.add_model(SPEC)
    model.set_writer(WriterIdentity(9, 77, 0))
    stamp = 5 << 12 | 9
    model.vector[:, 9] = 3 << 12 | 9
    model.begin_write(stamp, np.array([1, 6]))
    store.close()

    store = Store.open(run_dir)
    model = store.models["ctr"]
    expected = np.full(SHARDS, 3 << 12 | 9, np.uint64)
    expected[[1, 6]] = stamp
    assert np.array_equal(model.vector[:, 9], expected)
    assert int(model.vector[:, :9].max()) == int(model.vector[:, 10:].max()) == 0
    assert int(model.frontier[9]) == stamp == model.stamp_max
    assert model.writer == WriterIdentity(9, 77, stamp)
    store.close()


def test_a_writers_last_stamp_outlives_a_pending_step_of_another_writer(run_dir: Path) -> None:
    store = Store.open(run_dir)
    model = store.add_model(SPEC)
    model.set_writer(WriterIdentity(9, 77, 4 << 12 | 9))
    model.begin_write(6 << 12 | 9, np.array([0]))
    model.begin_write(8 << 12 | 9, np.array([2]))
    assert model.writer == WriterIdentity(9, 77, 8 << 12 | 9)
    model.set_writer(WriterIdentity(10, 78, 0))
    assert model.writer == WriterIdentity(10, 78, 0)
    store.close()


def damage_boot(run_dir: Path) -> None:
    text = (run_dir / "manifest.json").read_text()
    boot = read_manifest(run_dir).boot_id  # type: ignore[union-attr]
    (run_dir / "manifest.json").write_text(text.replace(boot, "0" * 36))


def damage_manifest(run_dir: Path) -> None:
    (run_dir / "manifest.json").write_text("{")


def damage_version(run_dir: Path) -> None:
    text = (run_dir / "manifest.json").read_text()
    (run_dir / "manifest.json").write_text(text.replace(f'"layout_version": {layout.LAYOUT_VERSION}', '"layout_version": 99'))


def remove_rows(run_dir: Path) -> None:
    next(Path("/dev/shm").glob(f"{read_manifest(run_dir).prefix}-*-rows")).unlink()  # type: ignore[union-attr]


def damage_index(run_dir: Path) -> None:
    path = next(Path("/dev/shm").glob(f"{read_manifest(run_dir).prefix}-*-index-*"))  # type: ignore[union-attr]
    with path.open("r+b") as file:
        file.write(bytes(8))


@pytest.mark.parametrize("damage", [damage_boot, damage_manifest, damage_version, remove_rows, damage_index])
def test_memory_that_is_not_intact_is_not_resumed(run_dir: Path, damage: object) -> None:
    store = Store.open(run_dir)
    apply(store.add_model(SPEC), ("item", [1], 1, None, 5))
    store.close()
    names = {path.name for path in Path("/dev/shm").glob("ekko-*")}
    damage(run_dir)  # type: ignore[operator]

    store = Store.open(run_dir)
    assert not store.resumed
    assert dict(store.models) == {}
    assert held(store.add_model(SPEC)) == {}
    fresh = read_manifest(run_dir)
    assert fresh is not None
    files = {path.name for path in Path("/dev/shm").glob("ekko-*") if path.name.startswith(fresh.prefix.rsplit("-", 1)[0])}
    assert files
    assert not files & names, "a fresh store must not reuse files, and old ones must be gone"
    store.close()


def test_destroy_leaves_nothing(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    store.add_model(SPEC)
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert list(Path("/dev/shm").glob(f"{manifest.prefix}*"))
    store.destroy()
    assert not list(Path("/dev/shm").glob(f"{manifest.prefix}*"))
    assert not list(tmp_path.iterdir())


def test_a_table_that_may_not_grow_further_says_so() -> None:
    store = Store.anonymous(table_bytes_max=layout.PAGE_BYTES + 100 * layout.row_stride(20))
    model = store.add_model(SPEC)
    with pytest.raises(StoreError, match="reserved"):
        apply(model, ("item", list(range(101)), 101, None, 5))
    _, stamps = model.lookup("item", np.arange(101, dtype=np.uint64))
    assert stamps.tolist() == [5] * 100 + [0], "the rows before the limit are there, whole"


def test_a_memory_directory_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a directory"):
        Store.open(tmp_path, memory_dir=tmp_path / "missing")
