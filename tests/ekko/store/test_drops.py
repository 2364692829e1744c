"""Models that come and go in a store: dropped for good, by name and incarnation, on whoever hears of it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ekko.errors import ModelError
from ekko.generations import Alias, Dropped, DroppedTable, Generation, Registers, entry_of
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.serve.reader import Reader
from ekko.store import Store
from ekko.store.store import MEMORY_DIR
from p2p.errors import RemoteProtocolError
from p2p.replica import RowColumns, SchemaEntry

OLD = ModelSpec("old", 8, {"item": TableSpec("item", 3)})
NEW = ModelSpec("new", 4, {"item": TableSpec("item", 5), "user": TableSpec("user", 2)})
AGAIN = ModelSpec("old", 16, {"item": TableSpec("item", 7)}, incarnation=1)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


def put(store: Store, model: str, value: float, stamp: int = 10) -> None:
    held = store.models[model]
    rows = np.full((2, held.spec.tables["item"].dim), value, np.float32)
    held.apply([RowColumns(table_id("item"), np.array([1, 2], np.uint64), rows.view(np.uint8))], stamp)


def both(run_dir: Path) -> Store:
    store = Store.open(run_dir)
    store.add_model(OLD)
    store.add_model(NEW)
    put(store, "old", 1.0)
    put(store, "new", 2.0)
    return store


def files_of(store: Store, run_dir: Path) -> set[str]:
    prefix = store._memory.prefix  # type: ignore[union-attr]
    return {path.name for path in MEMORY_DIR.glob(f"{prefix}-*")}


def test_a_dropped_model_gives_its_memory_back_and_readers_are_told(run_dir: Path) -> None:
    store = both(run_dir)
    before = files_of(store, run_dir)
    with Reader("old", run_dir) as reader:
        assert reader.lookup("item", [1])[0, 0] == 1.0
        taken = store.drop_model("old", 5_000)
        assert taken > 0
        with pytest.raises(ModelError, match="'old' was dropped"):
            reader.lookup("item", [1])
    left = files_of(store, run_dir)
    assert left < before
    assert before - left == {name for name in before if f"-{OLD.id:08x}-" in name}
    assert list(store.models) == ["new"]
    assert list(store.replicas) == [NEW.id]
    with pytest.raises(ModelError, match="no model 'old'"):
        store.drop_model("old", 6_000)
    with Reader("new", run_dir) as reader:
        assert reader.lookup("item", [1])[0, 0] == 2.0


def test_it_stays_dropped_after_a_restart_and_after_a_loss_of_the_memory(run_dir: Path) -> None:
    store = both(run_dir)
    store.drop_model("old", 5_000)
    store.close()
    for lost in (False, True):
        if lost:
            for path in MEMORY_DIR.glob(f"{store._memory.prefix}-*"):  # type: ignore[union-attr]
                path.unlink()
        after = Store.open(run_dir)
        assert after.resumed is not lost
        assert after.registers.is_dropped(Generation("old"))
        assert after.current(OLD).incarnation == 1
        after.close()


def test_what_peers_say_of_a_dropped_model_changes_nothing_and_is_no_fault() -> None:
    store = Store.anonymous()
    store.add_model(OLD)
    store.drop_model("old", 5_000)
    before = store.schema()
    assert store.adopt(OLD.entries()) is False
    late = [entry for entry in OLD.entries() if entry.name != "model"]
    assert store.adopt(late) is False
    assert (store.schema(), dict(store.replicas)) == (before, {})
    with pytest.raises(RemoteProtocolError, match="unknown model"):  # of a model that never was, it is
        store.adopt([SchemaEntry(77, late[0].name, late[0].body)])


def test_a_drop_and_a_later_model_of_the_name_arrive_in_any_order() -> None:
    drop = entry_of(Dropped("old", 0, 5_000))
    schemas = []
    for messages in (
        [[*OLD.entries()], [drop], AGAIN.entries()],
        [[*OLD.entries()], [drop, *AGAIN.entries()], OLD.entries()],
        [AGAIN.entries(), OLD.entries(), [drop]],
        [[*OLD.entries(), *AGAIN.entries()], [drop], OLD.entries()],
    ):
        store = Store.anonymous()
        for entries in messages:
            store.adopt(entries)
        assert store.models["old"].spec == AGAIN
        assert list(store.replicas) == [AGAIN.id]
        schemas.append(store.schema())
        assert store.reopened().schema() == store.schema()
    assert all(schema == schemas[0] for schema in schemas)


def test_a_clash_in_the_same_message_drops_nothing() -> None:
    store = Store.anonymous()
    store.add_model(OLD)
    store.add_model(NEW)
    clash = ModelSpec("new", 8)
    with pytest.raises(RemoteProtocolError, match="4 shards, not 8"):
        store.adopt([entry_of(Dropped("old", 0, 5_000)), *clash.entries()])
    assert list(store.models) == ["old", "new"]
    assert store.registers == Registers()


def test_a_reader_follows_an_alias_between_two_look_ups(run_dir: Path) -> None:
    store = both(run_dir)
    old, new = Generation.of(OLD), Generation.of(NEW)
    store.set_alias(Alias("ctr", old, None, 0, 1, 1))
    store.settle_aliases(1_000)
    with Reader("ctr", run_dir) as reader:
        assert (reader.model, reader.generation, dict(reader.tables)) == ("ctr", "old", {"item": 3})
        store.set_alias(Alias("ctr", new, old, 2_000, 2, 1))
        assert reader.lookup("item", [1]).tolist() == [[1.0] * 3]
        assert not store.settle_aliases(1_999)
        assert reader.generation == "old"
        assert store.settle_aliases(2_000)
        assert reader.lookup("item", [1]).tolist() == [[2.0] * 5]
        assert reader.generation == "new"
        # And back, where the new tables are not.
        store.set_alias(Alias("ctr", old, new, 3_000, 3, 1))
        store.settle_aliases(3_000)
        with pytest.raises(ModelError, match="'old', for which alias 'ctr' stands, has no table 'user': it has 'item'"):
            reader.lookup("user", [1])
        store.close()
        again = Store.open(run_dir)
        assert again.resumed
        assert reader.generation == "old"
        again.drop_model("old", 9_000)
        assert reader.generation == "new"  # what is left of it
        again.drop_model("new", 9_001)
        with pytest.raises(ModelError, match="alias 'ctr' stands for model 'old', which was dropped"):
            reader.lookup("item", [1])
        again.close()


def test_an_alias_hides_a_model_of_its_name(run_dir: Path) -> None:
    store = both(run_dir)
    with Reader("old", run_dir) as reader:
        store.set_alias(Alias("old", Generation("new"), Generation("old"), 0, 1, 1))
        assert reader.generation == "new"
        store.set_alias(Alias("old", None, Generation("new"), 0, 2, 1))
        assert reader.generation == "old"
    store.close()


def test_a_new_incarnation_takes_what_the_configuration_holds() -> None:
    store = Store.anonymous()
    old = ModelSpec("old", 8, {"item": TableSpec("item", 3)}, partitions=4)
    again = ModelSpec("old", 8, {"item": TableSpec("item", 3)}, partitions=4, incarnation=1)
    store.add_model(old, hold=[1, 2])
    store.adopt([entry_of(Dropped("old", 0, 5)), *again.entries()])
    assert store.models["old"].hold == (1, 2)
    assert list(store.replicas) == [again.keyspaces[1], again.keyspaces[2]]


# --- tables


def put_in(store: Store, model: str, table: str, value: float, stamp: int, keys: tuple[int, ...] = (1, 2)) -> None:
    held = store.models[model]
    spec = held.spec.tables[table]
    rows = np.full((len(keys), spec.dim), value, np.float32)
    column = RowColumns(spec.id, np.array(keys, np.uint64), rows.view(np.uint8))
    held.check([column])
    held.reserve([column])
    held.apply([column], stamp)


def again(store: Store, dim: int = 9) -> TableSpec:
    """What a publisher begins that gives the table `user` once more."""
    spec = store.current(ModelSpec("new", 4, {"user": TableSpec("user", dim)}))
    store.add_model(spec, asked=False)
    return spec.tables["user"]


def test_a_dropped_table_gives_its_memory_back_and_readers_are_told(run_dir: Path) -> None:
    store = both(run_dir)
    put_in(store, "new", "user", 3.0, 11)
    before = files_of(store, run_dir)
    with Reader("new", run_dir) as reader:
        assert reader.lookup("user", [1])[0, 0] == 3.0
        assert store.drop_table("new", "user", 5_000) > 0
        with pytest.raises(ModelError, match="has table 'user' no more, which was dropped: it has 'item'"):
            reader.lookup("user", [1])
        with pytest.raises(ModelError, match="dropped"):
            reader.lookup_many({"item": [1], "user": [1]})
        assert reader.lookup("item", [1])[0, 0] == 2.0
        gone = before - files_of(store, run_dir)
        assert gone == {name for name in before if f"-{NEW.id:08x}-{table_id('user'):08x}-" in name}
        table = again(store)
        assert table.id != table_id("user")
        put_in(store, "new", "user", 4.0, 12, (2,))
        assert reader.lookup("user", [1, 2])[:, 0].tolist() == [0.0, 4.0]
    for wrong, complaint in (("shop", "no table 'shop'"), ("_dense", "holds its dense tensors")):
        with pytest.raises(ModelError, match=complaint):
            store.drop_table("new", wrong, 6_000)


def test_a_table_stays_dropped_after_a_restart_a_loss_of_the_memory_and_a_snapshot(run_dir: Path) -> None:
    store = both(run_dir)
    store.drop_table("new", "user", 5_000)
    store.close()

    def fill(fresh: Store) -> None:
        fresh.add_model(NEW)  # as an old snapshot has it

    for lost in (False, True):
        if lost:
            for path in MEMORY_DIR.glob(f"{store._memory.prefix}-*"):  # type: ignore[union-attr]
                path.unlink()
        after = Store.open(run_dir, fill=fill)
        assert after.resumed is not lost
        assert list(after.models["new"].spec.tables) == ["item"]
        assert after.current(NEW).tables["user"].incarnation == 1
        assert table_id("user") in after.models["new"].tables_dropped
        after.close()


def test_rows_of_a_dropped_table_that_come_late_are_no_fault_and_nothing_comes_back() -> None:
    store = Store.anonymous()
    model = store.add_model(NEW)
    put_in(store, "new", "user", 3.0, 11)
    late = RowColumns(table_id("user"), np.array([7], np.uint64), np.zeros((1, 8), np.uint8))
    item = RowColumns(table_id("item"), np.array([7], np.uint64), np.ones((1, 5), np.float32).view(np.uint8))
    (selection,) = model.changed_since(np.zeros((4, 4096), np.uint64))
    store.drop_table("new", "user", 5_000)
    model.check([late, item])
    model.reserve([late, item])
    assert model.apply([late, item], 20 << 12).written == 1
    arrivals = model.arrivals()
    arrivals.note([late, item])
    assert len(model.read(selection.table, selection.slots).keys) == 0  # an answer on its way notices that it lost them
    table = again(store, dim=2)
    model.apply([late], 30 << 12)
    assert model.lookup("user", np.array([1, 7], np.uint64))[1].tolist() == [0, 0]
    assert store.adopt(NEW.entries()) is False  # of a peer that has not heard
    assert model.spec.tables["user"] == table
    with pytest.raises(RemoteProtocolError, match="has no table with id 5"):
        model.check([RowColumns(5, late.keys, late.rows)])


def test_a_drop_and_a_later_table_of_the_name_arrive_in_any_order() -> None:
    drop = entry_of(DroppedTable(Generation("new"), "user", 0, 5_000))
    later = ModelSpec("new", 4, {"item": TableSpec("item", 5), "user": TableSpec("user", 9, incarnation=1)})
    schemas = []
    for messages in (
        [NEW.entries(), [drop], later.entries()],
        [NEW.entries(), [drop, *later.entries()], NEW.entries()],
        [later.entries(), NEW.entries(), [drop]],
        [NEW.entries(), later.entries(), NEW.entries(), [drop]],
    ):
        store = Store.anonymous()
        for entries in messages:
            store.adopt(entries)
        assert store.models["new"].spec == later
        schemas.append(store.schema())
        assert store.adopt([*NEW.entries(), *later.entries(), drop]) is False  # or two nodes would go on for ever
        assert store.reopened().schema() == store.schema()
    assert all(schema == schemas[0] for schema in schemas)


def test_rows_of_a_table_that_ended_without_a_word_are_no_fault_either() -> None:
    store = Store.anonymous()
    model = store.add_model(NEW)
    late = RowColumns(table_id("user"), np.array([7], np.uint64), np.zeros((1, 8), np.uint8))
    model.check([late])
    later = ModelSpec("new", 4, {"user": TableSpec("user", 9, incarnation=1)})
    assert store.adopt(later.entries())  # of a peer that tells of the drop in its next message
    model.reserve([late])
    assert model.apply([late], 20 << 12).written == 0


def test_nothing_is_fetched_for_a_dropped_table() -> None:
    store = Store.anonymous()
    model = store.add_model(NEW)
    model.floor.add(np.array([0, 1, 2, 3]), np.full(4, 1 << 12, np.uint64), complete=False)
    model.fetching.note_asked(table_id("user"), np.arange(9, dtype=np.uint64), 1.0)
    assert model.take_wanted(4)
    store.drop_table("new", "user", 5_000)
    assert model.take_wanted(9) == ()


def test_tables_of_one_incarnation_that_differ_are_refused() -> None:
    store = Store.anonymous()
    store.add_model(NEW)
    store.drop_table("new", "user", 5_000)
    again(store)
    other = ModelSpec("new", 4, {"user": TableSpec("user", 3, incarnation=1)})
    with pytest.raises(RemoteProtocolError, match="has dim 9, not dim 3"):
        store.adopt(other.entries())
