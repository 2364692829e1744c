"""A model stays within its bytes: what counts, and which steps find room."""

import numpy as np
import pytest

from ekko.errors import PublishError
from ekko.model import DENSE_SPEC, ModelSpec, TableSpec, TensorSpec, table_id
from ekko.store import Store, layout
from ekko.store.capacity import Capacity, Evict, header_bytes
from ekko.store.model_store import ModelStore
from ekko.store.table import index_log2_for
from p2p.pulling.incomplete import ABOVE_ALL
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
    counts = layout.hot_bytes(12) + layout.heat_bytes(12)
    return header_bytes_of() + counts + layout.PAGE_BYTES + keys * STRIDE + layout.index_bytes(max(8, index_log2_for(keys)))


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


# --- rows of other nodes ------------------------------------------------------------------------------------------------

WRITER = 3
OLD = 1_000 << 10  # ticks: a second after the epoch of stamps, and so on
NOW = 100_000 << 10


def stamps_of(ticks: np.ndarray) -> np.ndarray:
    return (ticks.astype(np.uint64) << np.uint64(12)) | np.uint64(WRITER)


def bring(model: ModelStore, keys: np.ndarray, ticks: np.ndarray, live: int | None = None) -> np.ndarray:
    """Rows come from another node, and then what claims them; returns their stamps."""
    column = rows(keys, live)
    stamps = stamps_of(ticks)
    model.apply([RowColumns(column.table, column.keys, column.rows, stamps)], 0)
    shards = model.shards_of(column.keys)
    np.maximum.at(model.vector, (shards, WRITER), stamps)
    return stamps


def full(evict: Evict | None, keys: int = 2_000, room: int = 0) -> ModelStore:
    """A model with keys of rising stamps that has no room for more."""
    model = make("item")
    bring(model, np.arange(keys), OLD + np.arange(keys))
    model.limit(Capacity(model.memory_bytes + room * STRIDE, evict))
    assert model.eviction is not None
    model.eviction.until[...] = ABOVE_ALL
    return model


def held(model: ModelStore, keys: np.ndarray) -> np.ndarray:
    return model.lookup("item", keys.astype(np.uint64))[1] != 0


def check_floor(model: ModelStore, keys: np.ndarray, stamps: np.ndarray) -> None:
    """What is claimed and not here lies below the floor of an incomplete shard."""
    gone = ~held(model, keys)
    shards = model.shards_of(keys.astype(np.uint64))[gone]
    assert (model.loss_floor[shards, WRITER] >= stamps[gone]).all()
    assert model.incomplete[shards].all()


def test_what_finds_no_room_is_dropped_and_the_floor_says_so() -> None:
    model = full(None, room=10)
    keys = np.concatenate([np.arange(50), np.arange(5_000, 5_030)])
    stamps = bring(model, keys, NOW + np.arange(80))
    assert model.eviction is not None
    assert (model.eviction.refused, model.eviction.evicted) == (20, 0)
    assert held(model, np.arange(2_000)).all()
    assert model.lookup("item", np.arange(50, dtype=np.uint64))[1].tolist() == stamps[:50].tolist()  # updates landed
    assert held(model, keys[50:]).tolist() == [False] * 20 + [True] * 10  # the newest
    check_floor(model, keys, stamps)
    assert not model.incomplete.all() or len(np.unique(model.shards_of(keys[50:70].astype(np.uint64)))) == SHARDS
    assert model.memory_bytes <= model.capacity.bytes  # type: ignore[union-attr]


@pytest.mark.parametrize("step", [1, 100, 900])
def test_those_updated_longest_ago_make_room(step: int) -> None:
    model = full("least_recently_updated")
    limit = model.memory_bytes
    stamps = [stamps_of(OLD + np.arange(2_000))]
    for begin in range(10_000, 11_500, step):
        keys = np.arange(begin, min(begin + step, 11_500))
        stamps.append(bring(model, keys, NOW + keys))
    assert model.eviction is not None
    new = np.arange(10_000, 11_500)
    everything = np.concatenate([np.arange(2_000), new])
    assert held(model, new).all()  # none of them is old enough to go
    assert model.eviction.refused == 0
    left = np.flatnonzero(held(model, np.arange(2_000)))
    # Of 2,000 rows 157 went for good: an index of 4,096 entries where keys come and go is larger when it holds more than 1,843.
    assert 343 - 64 <= len(left) <= 343
    assert left.mean() > 1_300  # of all 999
    check_floor(model, everything, np.concatenate(stamps))
    assert model.memory_bytes == limit


def test_what_may_not_go_stays() -> None:
    keys = np.arange(2_000)
    for reason in ("alone", "not sent on", "young", "strays", "tombstones", "coming"):
        model = full("least_recently_updated")
        assert model.eviction is not None
        coming, tick = np.arange(5_000, 5_100), NOW
        if reason == "alone":
            model.eviction.until[...] = 0
        elif reason == "not sent on":  # whoever keeps rows does not have these yet
            model.eviction.until[WRITER] = OLD << 12
        elif reason == "young":
            tick = OLD + 5_000
        elif reason == "strays":
            model.vector[...] = 0
        elif reason == "tombstones":
            bring(model, keys, OLD + 3_000 + keys, live=0)
        elif reason == "coming":
            coming = np.concatenate([keys, coming])
        bring(model, coming, tick + np.arange(len(coming)))
        assert (model.eviction.evicted, model.eviction.refused) == (0, 100), reason
        slots = model.tables_by_id[table_id("item")].resolve(keys.astype(np.uint64))
        assert (slots >= 0).all(), reason
        assert not held(model, np.arange(5_000, 5_100)).any()


def test_rows_of_the_very_batch_stay_in_slots_that_had_another_key() -> None:
    model = full("least_recently_updated")
    first = np.arange(10_000, 11_500)
    bring(model, first, NOW + np.arange(1_500))  # most slots have changed hands now
    everything = np.concatenate([np.arange(2_000), first])
    kept = everything[held(model, everything)]
    assert model.eviction is not None
    before = model.eviction.evicted, model.eviction.refused
    coming = np.concatenate([kept, np.arange(20_000, 20_100)])
    bring(model, coming, 2 * NOW + np.arange(len(coming)))
    assert (model.eviction.evicted, model.eviction.refused) == (before[0], before[1] + 100)
    assert held(model, kept).all()


@pytest.mark.parametrize("late_first", [True, False])
def test_rows_of_one_section_make_no_room_for_another(late_first: bool) -> None:
    """Messages in order of priority have several sections of a table: an older version would come in where the row has gone."""
    model, keys = full("least_recently_updated"), np.arange(0, 2_000, 2)
    before = model.lookup("item", keys.astype(np.uint64))[1]
    late, fresh = rows(keys), rows(np.arange(5_000, 5_600))
    late = RowColumns(late.table, late.keys, late.rows, before - np.uint64(WRITER))  # of another writer, whom no vector covers
    fresh = RowColumns(fresh.table, fresh.keys, fresh.rows, stamps_of(NOW + np.arange(600)))
    model.apply([late, fresh] if late_first else [fresh, late], 0)
    assert model.lookup("item", keys.astype(np.uint64))[1].tolist() == before.tolist()
    assert held(model, np.arange(5_000, 5_600)).all()


def test_those_that_are_read_least_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = full("least_frequently_read")
    monkeypatch.setattr(model, "hotness", lambda _table, keys: (keys < 300).astype(np.float64))  # the oldest are the hot ones
    bring(model, np.arange(10_000, 11_500), NOW + np.arange(1_500))
    assert np.count_nonzero(held(model, np.arange(300))) > 290


def test_an_older_version_does_not_come_in_where_its_deletion_was_dropped() -> None:
    model = full(None)
    deleted = bring(model, np.array([9_000]), np.array([NOW]), live=0)  # of a key that is not here: it finds no room
    assert not held(model, np.array([9_000])).any()
    model.limit(Capacity(model.memory_bytes + 1_000 * STRIDE))  # room comes
    late = RowColumns(
        table_id("item"), np.array([9_000], np.uint64), np.zeros((1, 64), np.uint8), deleted - np.uint64(WRITER - 1)
    )
    assert model.vector[model.shards_of(late.keys)[0], 1] == 0  # of another writer, whom no vector covers
    model.apply([late], 0)
    assert not held(model, np.array([9_000])).any()
    bring(model, np.array([9_000]), np.array([NOW + 1]))
    assert held(model, np.array([9_000])).all()  # a newer version is news


def test_dense_tensors_of_others_always_find_room() -> None:
    model = full("least_recently_updated")
    tensor = TensorSpec("top", (256, 64), "float32")
    model.add_tensor(tensor)
    model.apply([RowColumns(DENSE_SPEC.id, np.arange(64, dtype=np.uint64), np.zeros((64, 1024), np.uint8))], NOW << 12 | WRITER)
    assert model.table_stats()["_dense"].rows == 64
    bring(model, np.arange(10_000, 12_500), NOW + np.arange(2_500))
    assert model.table_stats()["_dense"].rows == 64


def test_what_was_checked_for_a_publisher_is_never_dropped() -> None:
    model = full(None)
    model.begin_write(NOW << 12 | WRITER, np.arange(SHARDS))
    model.apply([rows(np.arange(7_000, 7_010))], NOW << 12 | WRITER)
    assert held(model, np.arange(7_000, 7_010)).all()


@pytest.mark.parametrize("evict", [None, "least_recently_updated"])
def test_sections_of_one_batch_share_the_room(evict: Evict | None) -> None:
    model = make("item", "user")
    bring(model, np.arange(2_000), OLD + np.arange(2_000))
    model.limit(Capacity(model.memory_bytes + 100 * STRIDE, evict))
    for begin in range(5_000, 6_000, 100):
        keys = np.arange(begin, begin + 100)
        columns = [rows(keys), rows(keys + 10_000), rows(keys, table="user")]
        model.apply([RowColumns(c.table, c.keys, c.rows, stamps_of(NOW + keys)) for c in columns], 0)
        assert model.capacity is not None
        assert model.memory_bytes <= model.capacity.bytes


def test_what_readers_count_takes_memory_too() -> None:
    model = make("item", "user")
    counted = sum(heat.stats().bytes for heat in model.heat.values())
    assert counted >= 2 * (layout.hot_bytes(12) + layout.heat_bytes(12))
    assert model.memory_bytes == header_bytes(model) + counted + 2 * (layout.PAGE_BYTES + layout.index_bytes(8))


def test_a_model_that_comes_again_under_its_name_is_limited_like_the_one_before() -> None:
    store = Store.anonymous()
    spec = ModelSpec("ctr", SHARDS, {"item": TableSpec("item", DIM)})
    store.add_model(spec)
    store.limit("ctr", Capacity(1 << 23))
    assert store.models["ctr"].capacity == Capacity(1 << 23)
    store.drop_model("ctr", 1)
    again = store.add_model(store.current(spec), asked=False)
    assert again.spec.incarnation > spec.incarnation
    assert again.capacity == Capacity(1 << 23)
    assert store.add_model(ModelSpec("other", SHARDS)).capacity is None
