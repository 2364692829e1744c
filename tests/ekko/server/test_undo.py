"""What a server has on record belongs to one model and its tables: those of a name that come after a drop get nothing of it."""

from pathlib import Path

import numpy as np

from ekko.config.sections import ServerModelSection
from ekko.store import Store
from ekko.train.server.schema import training_spec
from ekko.train.server.undo import Before, Undo

TABLES = {name: {"dim": 4, "optimizer": {"name": "adagrad", "lr": 0.1}} for name in ("item", "user")}
SPEC = training_spec("ctr", ServerModelSection(partitions=2, tables=TABLES), 64)
KEYS = np.arange(3, dtype=np.uint64)


def before(table: str) -> Before:
    return Before(table, KEYS, np.ones((3, 4), np.float32), np.array([True, False, True]))


def on_record(run_dir: Path) -> list[str]:
    undo = Undo(run_dir, SPEC.name)
    found = [part.table for part in undo.read()]
    undo.close()
    return found


def begun(store: Store, run_dir: Path) -> Undo:
    """A server process that has begun a step."""
    store.add_model(store.current(SPEC))
    undo = Undo(run_dir, SPEC.name)
    undo.write([before("item"), before("user.state"), before("user")])
    return undo


def test_a_table_that_was_dropped_is_left_out_also_where_there_is_another_one_of_its_name(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    try:
        begun(store, tmp_path).close()
        assert on_record(tmp_path) == ["item", "user.state", "user"]
        store.drop_table(SPEC.name, "user", 5)
        assert on_record(tmp_path) == ["item", "user.state"]
        store.add_model(store.current(SPEC))
        assert store.models[SPEC.name].spec.tables["user"].incarnation == 1
        assert on_record(tmp_path) == ["item", "user.state"]
    finally:
        store.destroy()


def test_the_record_goes_with_its_model_and_stays_with_the_next_one_of_its_name(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    try:
        undo = begun(store, tmp_path)
        store.drop_model(SPEC.name, 5)
        assert not undo.path.exists()
        assert undo.read(), "the process still has the file"
        undo.close()
        store.add_model(store.current(SPEC))
        assert on_record(tmp_path) == []
        begun(store, tmp_path).close()
        store.close()
        store = Store.open(tmp_path)  # the node starts again
        assert store.models[SPEC.name].spec.incarnation == 1
        assert on_record(tmp_path) == ["item", "user.state", "user"]
    finally:
        store.destroy()
