"""A model stays within its bytes: what counts, and which steps find room."""

import numpy as np
import pytest

from ekko.errors import PublishError
from ekko.model import DENSE_SPEC, ModelSpec, TableSpec, TensorSpec, table_id
from ekko.store import Store, layout
from ekko.store.capacity import Capacity, header_bytes
from ekko.store.model_store import ModelStore
from ekko.store.table import index_log2_for
from p2p.replica import RowColumns

DIM = 16
SHARDS = 8
STRIDE = layout.row_stride(4 * DIM)


def make(*tables: str) -> ModelStore:
    return Store.anonymous().add_model(ModelSpec("ctr", SHARDS, {name: TableSpec(name, DIM) for name in tables}))


def rows(keys: np.ndarray, live: int | None = None, table: str = "item") -> RowColumns:
    live = len(keys) if live is None else live
    return RowColumns(table_id(table), keys.astype(np.uint64), np.zeros((live, 4 * DIM), np.uint8))


def expected_bytes(keys: int) -> int:
    """Of a model of one table that got so many keys, as the reference describes it."""
    return header_bytes_of() + layout.PAGE_BYTES + keys * STRIDE + layout.index_bytes(max(8, index_log2_for(keys)))


def header_bytes_of() -> int:
    return layout.model_bytes(SHARDS)


def fill(model: ModelStore, step: int, table: str = "item") -> int:
    """Publish steps of new keys until one is refused; returns how many keys came."""
    keys = 0
    while True:
        column = rows(np.arange(keys, keys + step), table=table)
        try:
            model.check_step([column])
        except PublishError:
            return keys
        model.apply([column], keys + 1 << 12)
        keys += step


@pytest.mark.parametrize("step", [1, 7, 300])
def test_a_model_is_filled_to_its_capacity_and_never_beyond(step: int) -> None:
    model = make("item")
    model.capacity = Capacity(expected_bytes(2_000) + STRIDE // 2)
    keys = fill(model, step)
    assert model.memory_bytes <= model.capacity.bytes
    assert expected_bytes(keys + step) > model.capacity.bytes  # not one step too few
    assert 2_000 - step < keys <= 2_000


def test_the_larger_index_that_new_rows_need_counts() -> None:
    model = make("item")
    at_growth = int(0.6 * 1024)
    model.capacity = Capacity(expected_bytes(at_growth) + 50 * STRIDE)  # room for rows, not for the index of 2,048 places
    assert fill(model, 1) == at_growth
    assert model.memory_bytes <= model.capacity.bytes


def test_updates_and_deletes_of_what_is_held_find_room_in_a_full_model() -> None:
    model = make("item")
    model.capacity = Capacity(expected_bytes(1_000))
    keys = fill(model, 10)
    held = np.arange(keys)
    model.check_step([rows(held)])
    model.check_step([rows(held, live=0)])
    with pytest.raises(
        PublishError, match=r"model 'ctr' is full: it takes \d+ bytes and 10 new rows need .* raise models.ctr.cap"
    ):
        model.check_step([rows(np.arange(keys - 5, keys + 10))])  # whole: the five that are held, too


def test_a_step_is_looked_at_as_a_whole() -> None:
    model = make("item", "user")
    model.capacity = Capacity(model.memory_bytes + 10 * STRIDE)
    model.check_step([rows(np.arange(6)), rows(np.arange(4), table="user")])
    with pytest.raises(PublishError, match="11 new rows"):
        model.check_step([rows(np.arange(6)), rows(np.arange(5), table="user")])


def test_dense_tensors_count() -> None:
    model = make("item")
    tensor = TensorSpec("top", (256, 64), "float32")
    dense = RowColumns(DENSE_SPEC.id, np.arange(tensor.rows, dtype=np.uint64), np.zeros((tensor.rows, 1024), np.uint8))
    size = layout.PAGE_BYTES + layout.index_bytes(8) + tensor.rows * layout.row_stride(1024)
    model.capacity = Capacity(model.memory_bytes + size)
    model.check_step([dense])
    model.capacity = Capacity(model.memory_bytes + size - 1)
    with pytest.raises(PublishError, match="64 new rows"):
        model.check_step([dense])
    before = model.memory_bytes
    model.add_tensor(tensor)
    model.apply([dense], 1 << 12)
    assert model.memory_bytes == before + size


def test_a_limit_below_what_is_held_takes_no_more() -> None:
    model = make("item")
    model.apply([rows(np.arange(100))], 1 << 12)
    model.capacity = Capacity(header_bytes(model))
    model.check_step([rows(np.arange(100))])
    with pytest.raises(PublishError):
        model.check_step([rows(np.array([100]))])


def test_status_adds_up() -> None:
    model = make("item", "user")
    model.apply([rows(np.arange(100)), rows(np.arange(30), live=20, table="user")], 1 << 12)
    stats = model.table_stats()
    assert (stats["user"].rows, stats["user"].tombstones) == (20, 10)
    assert model.memory_bytes == header_bytes(model) + sum(stat.bytes for stat in stats.values())
    assert stats["item"].bytes - stats["user"].bytes == 70 * STRIDE
