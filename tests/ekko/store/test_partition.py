"""Partitions of a model: each shows its own rows and knowledge, and only those that are held are there."""

import json
from pathlib import Path

import numpy as np
import pytest

from ekko.errors import ModelError
from ekko.model import ModelSpec, TableSpec, TensorSpec, table_id
from ekko.store import Store
from ekko.store.control import Control
from ekko.store.manifest import read_manifest
from ekko.store.model_store import ModelStore
from p2p.errors import RemoteProtocolError, SchemaClashError
from p2p.replica import Place, Replica, RowColumns, SchemaEntry, WriterIdentity
from p2p.stamps import WRITERS_MAX

ITEM = table_id("item")
STAMP = 5 * WRITERS_MAX + 3  # the fifth of writer 3


def spec(partitions: int = 3, shards: int = 8) -> ModelSpec:
    return ModelSpec("ctr", shards, {"item": TableSpec("item", 2)}, partitions=partitions)


def rows_of(keys: np.ndarray) -> RowColumns:
    return RowColumns(ITEM, keys, np.full((keys.size, 2), 1.0, np.float32).view(np.uint8))


def keys_of(model: ModelStore, partition: int, count: int = 20) -> np.ndarray:
    keys = np.arange(1_000, dtype=np.uint64)
    return keys[model.partition_of(keys) == partition][:count]


def selected(replica: Replica, base: np.ndarray) -> list[int]:
    columns = [replica.read(selection.table, selection.slots) for selection in replica.changed_since(base)]
    return sorted(key for one in columns for key in one.keys.tolist())


def nothing(replica: Replica) -> np.ndarray:
    return np.zeros((replica.shards, WRITERS_MAX), np.uint64)


def test_partition_is_shard_mod_partitions() -> None:
    model = Store.anonymous().add_model(spec())
    keys = np.arange(500, dtype=np.uint64)
    assert (model.partition_of(keys) == model.shards_of(keys) % 3).all()


def test_each_partition_shows_its_own_rows_and_counts_its_own_shards() -> None:
    store = Store.anonymous()
    model = store.add_model(spec())
    replicas = list(store.replicas.values())
    assert [replica.place for replica in replicas] == [Place(model.spec.id, partition, 3) for partition in range(3)]
    assert [replica.shards for replica in replicas] == [3, 3, 2]  # of 8: 0 3 6, 1 4 7, 2 5
    assert len({replica.keyspace for replica in replicas}) == 3
    for partition, replica in enumerate(replicas):
        keys = keys_of(model, partition)
        replica.check([rows_of(keys)])
        replica.apply([rows_of(keys)], STAMP)
        assert set(replica.shards_of(keys).tolist()) == set(range(replica.shards))
    for partition, replica in enumerate(replicas):
        keys = keys_of(model, partition)
        assert selected(replica, nothing(replica)) == sorted(keys.tolist())
        one_shard = nothing(replica)
        one_shard[0, 3] = STAMP
        assert selected(replica, one_shard) == sorted(keys[replica.shards_of(keys) > 0].tolist())


def test_knowledge_of_a_partition_is_its_part_of_the_models() -> None:
    store = Store.anonymous()
    model = store.add_model(spec())
    replica = list(store.replicas.values())[1]
    replica.vector[1, 3] = STAMP  # shard 4 of the model
    replica.frontier[3] = STAMP
    assert np.flatnonzero(model.vector[:, 3]).tolist() == [4]
    assert model.frontiers[:, 3].tolist() == [0, STAMP, 0]
    assert model.stamp_max == STAMP


def test_strays_are_told_apart_by_partition() -> None:
    store = Store.anonymous()
    model = store.add_model(spec())
    replicas = list(store.replicas.values())
    replicas[2].apply([rows_of(keys_of(model, 2))], STAMP)
    assert [bool(replica.stray_digest()) for replica in replicas] == [False, False, True]
    assert replicas[2].stray_digest() == model.stray_digest()
    replicas[2].vector[:, 3] = STAMP
    assert replicas[2].stray_digest() == 0


def test_rows_of_another_partition_are_refused() -> None:
    store = Store.anonymous()
    model = store.add_model(spec(), hold=[0, 2])
    replica = next(iter(store.replicas.values()))
    with pytest.raises(RemoteProtocolError, match="lies outside the shards"):
        replica.check([rows_of(np.concatenate([keys_of(model, 0, 3), keys_of(model, 1, 1)]))])


def test_one_writer_and_the_worst_staleness_are_shared() -> None:
    store = Store.anonymous()
    model = store.add_model(spec(), hold=[0, 2])
    first, second = store.replicas.values()
    first.set_writer(WriterIdentity(3, 7))
    assert second.writer == first.writer == WriterIdentity(3, 7)
    told = model._word("synced_until_ms")
    first.set_synced_until(9)
    assert int(told) == 0, "nothing is known of the other partition yet"
    second.set_synced_until(5)
    assert int(told) == 5


def test_a_joining_asker_does_not_make_the_cache_larger() -> None:
    """It is said to know everything of the other partitions, which must not look like being behind."""
    store = Store.anonymous()
    model = store.add_model(spec())
    replica = next(iter(store.replicas.values()))
    recent = model._tables[ITEM].recent
    replica.apply([rows_of(keys_of(model, 0))], STAMP)
    recent.prune(0)
    window = recent.stats().window
    assert replica.changed_since(nothing(replica))
    assert recent.stats().window == window


def test_a_killed_step_is_merged_where_it_was_written(tmp_path: Path) -> None:
    """R4 in partitions: the step had reached the second of two when its process was killed."""
    memory = tmp_path / "shm"
    memory.mkdir()
    store = Store.open(tmp_path / "run", memory_dir=memory)
    model = store.add_model(spec())
    replicas = list(store.replicas.values())
    replicas[0].set_writer(WriterIdentity(3, 7))
    for partition, merged in ((0, True), (2, False)):
        keys = keys_of(model, partition)
        shards = np.unique(replicas[partition].shards_of(keys))
        replicas[partition].begin_step(STAMP, {partition: shards})
        replicas[partition].apply([rows_of(keys)], STAMP)
        if merged:
            replicas[partition].vector[shards, 3] = STAMP
            replicas[partition].frontier[3] = STAMP
    store.close()
    again = Store.open(tmp_path / "run", memory_dir=memory)
    assert again.resumed
    model = again.models["ctr"]
    assert model.frontiers[:, 3].tolist() == [STAMP, 0, STAMP]
    assert [int((model.vector[p::3, 3] == STAMP).sum()) for p in range(3)] == [3, 0, 2]
    assert model.last_stamp == STAMP
    again.destroy()


def test_a_step_that_was_killed_as_it_was_written_is_merged_in_all_its_partitions(tmp_path: Path) -> None:
    """R4: it is written at once, and whatever of it is there nobody will see more of."""
    memory = tmp_path / "shm"
    memory.mkdir()
    store = Store.open(tmp_path / "run", memory_dir=memory)
    model = store.add_model(spec())
    replicas = list(store.replicas.values())
    replicas[0].set_writer(WriterIdentity(3, 7))
    keys = {partition: keys_of(model, partition) for partition in (0, 2)}
    replicas[0].begin_step(STAMP, {p: np.unique(replicas[p].shards_of(own)) for p, own in keys.items()})
    replicas[0].apply([rows_of(keys[0])], STAMP)
    store.close()
    again = Store.open(tmp_path / "run", memory_dir=memory)
    model = again.models["ctr"]
    assert model.frontiers[:, 3].tolist() == [STAMP, 0, STAMP]
    assert [int((model.vector[p::3, 3] == STAMP).sum()) for p in range(3)] == [3, 0, 2]
    again.destroy()


def test_what_is_held_survives_a_restart_and_may_grow(tmp_path: Path) -> None:
    memory = tmp_path / "shm"
    memory.mkdir()
    store = Store.open(tmp_path / "run", memory_dir=memory)
    store.add_model(spec(), hold=[2])
    store.close()
    store = Store.open(tmp_path / "run", memory_dir=memory)
    assert store.resumed
    assert (store.models["ctr"].hold, store.models["ctr"].spec.partitions) == ((2,), 3)
    store.add_model(spec())
    assert store.models["ctr"].hold == (2,), "who does not care changes nothing"
    store.add_model(spec(), hold=[0])
    assert [replica.place.partition for replica in store.replicas.values()] == [2, 0]
    assert read_manifest(tmp_path / "run").models[0].hold == [0, 2]  # type: ignore[union-attr]
    store.add_model(spec(), hold=range(3))
    assert read_manifest(tmp_path / "run").models[0].hold is None  # type: ignore[union-attr]
    store.destroy()


def test_a_manifest_from_before_partitions_holds_all_of_one(tmp_path: Path) -> None:
    memory = tmp_path / "shm"
    memory.mkdir()
    store = Store.open(tmp_path / "run", memory_dir=memory)
    store.add_model(spec(1))
    store.close()
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    for model in manifest["models"]:
        del model["partitions"], model["hold"]
    path.write_text(json.dumps(manifest))
    store = Store.open(tmp_path / "run", memory_dir=memory)
    assert store.resumed
    assert store.models["ctr"].holds_all
    store.destroy()


# --- schema -----------------------------------------------------------------------------------------------------------------


def test_one_partition_is_spelled_as_before_there_were_several() -> None:
    assert spec(1).entries()[0].body == ModelSpec("ctr", 8).entries()[0].body == b"\x92\xa3ctr\x08"
    assert spec(3).entries()[0].body == b"\x93\xa3ctr\x08\x03"


def test_partitions_travel_with_the_schema_and_a_clash_is_refused() -> None:
    origin, other = Store.anonymous(), Store.anonymous()
    origin.add_model(spec(3))
    assert other.adopt(origin.schema())
    assert other.models["ctr"].spec.partitions == 3
    assert len(other.replicas) == 3
    with pytest.raises(SchemaClashError, match="model 'ctr' has 3 partitions, not 2: all nodes"):
        other.adopt(spec(2).entries())


@pytest.mark.parametrize(
    "body", [b"\x93\xa3ctr\x08\x01", b"\x93\xa3ctr\x08\x09", b"\x94\xa3ctr\x08\x03\x03", b"\x93\xa3ctr\x08\xa1x"]
)
def test_a_model_in_impossible_partitions_is_not_understood(body: bytes) -> None:
    store = Store.anonymous()
    with pytest.raises(RemoteProtocolError):
        store.adopt([SchemaEntry(spec().id, "model", body)])
    assert store.schema() == []


@pytest.mark.parametrize("partitions", [0, 9, 65, -1])
def test_partitions_have_bounds(partitions: int) -> None:
    with pytest.raises(ModelError, match=r"partitions = .*: expected a whole number from 1 to"):
        spec(partitions)


def test_a_partition_that_does_not_exist_cannot_be_held() -> None:
    with pytest.raises(ModelError, match="has partitions 0 to 2: cannot hold"):
        Store.anonymous().add_model(spec(), hold=[3])


# --- holding less -----------------------------------------------------------------------------------------------------------


def filled(tmp_path: Path) -> Store:
    memory = tmp_path / "shm"
    memory.mkdir()
    store = Store.open(tmp_path / "run", memory_dir=memory)
    model = store.add_model(spec())
    store.add_tensor("ctr", TensorSpec("w", (3,), "float32"))
    for replica in store.replicas.values():
        keys = keys_of(model, replica.place.partition)
        replica.apply([rows_of(keys)], STAMP)
        replica.apply([RowColumns(ITEM, keys[:3], np.empty((0, 8), np.uint8))], STAMP + WRITERS_MAX)
        replica.vector[:, 3] = STAMP + WRITERS_MAX
        replica.frontier[3] = STAMP
    model.set_writer(WriterIdentity(3, 7))
    return store


def test_less_is_held_after_a_copy_and_the_old_files_are_gone(tmp_path: Path) -> None:
    store = filled(tmp_path)
    before = [selected(replica, nothing(replica)) for replica in store.replicas.values()]
    keys = [keys_of(store.models["ctr"], partition) for partition in range(3)]
    held = store.models["ctr"].lookup("item", keys[0])
    control = store._control
    narrow = store.narrowed({"ctr": [0, 2]})
    model = narrow.models["ctr"]
    assert model.hold == (0, 2)
    assert [selected(replica, nothing(replica)) for replica in narrow.replicas.values()] == [before[0], before[2]]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(held, model.lookup("item", keys[0]), strict=True))
    assert model.lookup("item", keys[1])[1].tolist() == [0] * len(keys[1])
    assert [int(model.vector[p::3, 3].max()) for p in range(3)] == [STAMP + WRITERS_MAX, 0, STAMP + WRITERS_MAX]
    assert model.frontiers[:, 3].tolist() == [STAMP, 0, STAMP]
    assert model.spec.tensors == {"w": TensorSpec("w", (3,), "float32")}
    assert model.table_stats()["item"].tombstones == 6
    assert model.writer is None, "it cannot know any more what it wrote in partition 1"
    assert int(control._mapping.words(72)) == 1, "readers were not told"  # type: ignore[union-attr]
    names = {path.name for path in (tmp_path / "shm").iterdir()}
    assert names == narrow._file_names()
    narrow.close()
    again = Store.open(tmp_path / "run", memory_dir=tmp_path / "shm")
    assert again.resumed
    assert again.models["ctr"].hold == (0, 2)
    assert again.models["ctr"].table_stats()["item"].rows == sum(len(keys[p]) for p in (0, 2)) - 6
    again.destroy()


def test_a_writer_that_holds_as_much_as_before_stays_itself(tmp_path: Path) -> None:
    store = filled(tmp_path)
    assert store.narrowed({"ctr": [0, 1, 2]}) is store
    assert store.narrowed({}) is store
    store.add_model(ModelSpec("other", 8, {"item": TableSpec("item", 2)}, partitions=2))
    narrow = store.narrowed({"other": [1]})
    assert narrow.models["ctr"].writer == WriterIdentity(3, 7)
    assert narrow.models["other"].hold == (1,)
    narrow.destroy()


def test_a_kill_in_mid_copy_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path)
    before = [selected(replica, nothing(replica)) for replica in store.replicas.values()]

    class KilledError(Exception):
        pass

    def killed(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Control, "publish", killed)
        with pytest.raises(KilledError):
            store.narrowed({"ctr": [0]})
    again = Store.open(tmp_path / "run", memory_dir=tmp_path / "shm")
    assert again.resumed
    assert [selected(replica, nothing(replica)) for replica in again.replicas.values()] == before
    assert {path.name for path in (tmp_path / "shm").iterdir()} == again._file_names(), "the half copy was left behind"
    again.destroy()
