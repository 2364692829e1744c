"""A kill between deleting for good and using the slots again: who attaches afterwards lacks nothing that is claimed."""

import numpy as np
import pytest

from ekko.codec import encode
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns
from p2p.stamps import WRITERS_MAX
from sim_cluster.kills import Fuse, KilledError, lay

TABLE, DIM, WRITER = table_id("item"), 4, 3
OLD, GONE, NEW = np.arange(40, dtype=np.uint64), np.arange(20, dtype=np.uint64), np.arange(100, 130, dtype=np.uint64)
STEPS = 8  # a removal and an apply have so many


def write(model: ModelStore, keys: np.ndarray, tick: int, value: float | None) -> None:
    rows = np.full((0 if value is None else keys.size, DIM), value or 0.0, np.float32)
    model.apply([RowColumns(TABLE, keys, encode("float32", rows))], tick << 12 | WRITER)


def check(model: ModelStore) -> set[int]:
    """The index finds what a scan finds, once; the counts agree. Returns the keys of live rows."""
    table = model.table(TABLE)
    selections = model.scan_since(np.zeros((model.shards, WRITERS_MAX), np.uint64))
    rows = model.read(TABLE, selections[0].slots)
    assert np.unique(rows.keys).size == rows.keys.size
    live = rows.keys[: len(rows.rows)]
    out, stamps = model.lookup("item", rows.keys)
    assert rows.stamps is not None
    assert np.array_equal(stamps[: live.size], rows.stamps[: live.size])
    assert not stamps[live.size :].any()
    assert np.array_equal(encode("float32", out[: live.size]), rows.rows)
    assert (table.rows_used - table.free, table.tombstones) == (rows.keys.size, rows.keys.size - live.size)
    every = np.concatenate((OLD, NEW))
    absent = every[~np.isin(every, rows.keys)]
    assert (table.resolve(absent) == -1).all()
    return set(live.tolist())


@pytest.mark.parametrize("steps", range(STEPS + 1))
def test_a_kill_while_rows_go_for_good_and_their_slots_are_used_again(steps: int) -> None:
    store = Store.anonymous()
    model = store.add_model(ModelSpec("ctr", 2, {"item": TableSpec("item", DIM)}))
    write(model, OLD, 1, 1.0)
    write(model, GONE, 2, None)
    lay(Fuse(steps), store)
    killed = False
    try:
        model.remove(TABLE, model.table(TABLE).resolve(GONE), complete=True)
        write(model, NEW, 3, 3.0)
    except KilledError:
        killed = True
    assert killed == (steps < STEPS)
    model = store.reopened().models["ctr"]
    live = check(model)
    assert set(range(20, 40)) <= live
    shards = model.shards_of(GONE)
    gone = model.table(TABLE).resolve(GONE) < 0
    assert (model.loss_floor[shards[gone], WRITER] >= 2 << 12 | WRITER).all(), "the floor is raised before rows go"
    # It goes on: what was left of the removal, and of the step.
    left = model.table(TABLE).resolve(GONE)
    model.remove(TABLE, left[left >= 0], complete=True)
    write(model, NEW, 3, 3.0)
    assert check(model) == {*range(20, 40), *NEW.tolist()}
    assert model.table(TABLE).rows_used == 50
