"""Rows on a device, on the host twin, in one process: what comes there, what leaves, and what readers see of both tiers."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ekko import Reader
from ekko.device import binding, caches, writer
from ekko.device.control import DeviceControl
from ekko.device.needed import Needed
from ekko.device.source import StoreRows
from ekko.errors import ModelError, StoreError
from ekko.model import TableSpec, table_id
from ekko.serve.together import State
from ekko.store import Store
from gpu.errors import DeviceError, DeviceMemoryError
from tests.ekko.device.standing import DIM, TWIN, Standing

KEYS = np.arange(40, dtype=np.uint64)
MODES: list[dict[str, Any]] = [{"mode": "sum"}, {"mode": "mean"}, {"mode": "max"}, {"mode": "sum", "weighted": True}]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds are the test's here, and may be far between."""
    monkeypatch.setattr(binding, "BEHIND_MS_MAX", 600_000)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Standing]:
    with Standing(tmp_path) as standing:
        yield standing


def same(node: Standing, reader: Reader, keys: Any = KEYS, table: str = "item") -> None:
    """The reader sees what one without a device sees."""
    with Reader("ctr", node.run_dir) as plain:
        rows, stamps = reader.lookup(table, keys, stamps=True)
        expected, expected_stamps = plain.lookup(table, keys, stamps=True)
    np.testing.assert_array_equal(stamps, expected_stamps)
    assert rows.tobytes() == expected.tobytes()


def warmed(node: Standing, reader: Reader, keys: Any = KEYS) -> None:
    """These keys were asked for, and came."""
    reader.lookup("item", keys)
    node.round()


# --- what comes to the device, and what leaves -------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16", "int8"])
def test_rows_come_when_they_are_missed_and_then_follow_the_store(tmp_path: Path, codec: str) -> None:
    rng = random.Random(codec)
    with Standing(tmp_path, codec=codec) as node, node.reader() as reader:
        node.put(range(40), 1)
        node.round()
        assert node.cached() == {}, "nobody asked for any row yet"
        for stamp in range(2, 40):
            keys = rng.sample(range(48), 12)
            match rng.randrange(4):
                case 0:
                    node.delete(keys, stamp)
                case 1:
                    node.remove(keys)
                case _:
                    node.put(keys, stamp)
            node.round()
            same(node, reader, np.array(rng.sample(range(50), 20), np.uint64))
            node.round()
            assert [check.difference for check in node.check()] == [""]
        assert reader.device is not None
        assert reader.device.counts.hits > 100
        assert node.check()[0].rows > 10


def test_updates_bring_no_row_that_nobody_asked_for(node: Standing) -> None:
    node.put(range(40), 1)
    with node.reader() as reader:
        warmed(node, reader, KEYS[:5])
    node.put(range(40), 2)
    node.round()
    assert node.cached() == dict.fromkeys(range(5), 2)


def test_a_row_that_went_and_came_back_in_an_older_version_is_not_kept_in_the_newer_one(node: Standing) -> None:
    with node.reader() as reader:
        node.put([1, 2], 9)
        warmed(node, reader, KEYS[:4])
        node.remove([1])
        node.put([1], 5)  # as rows come back that were evicted
        node.round()
        assert node.cached() == {2: 9}
        same(node, reader)
        warmed(node, reader, KEYS[:4])
        assert node.cached() == {1: 5, 2: 9}


def test_what_changed_more_than_may_wait_is_found_by_comparing(node: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = node.devices.feed_of(node.model)
    feed.keys_max = 10
    with node.reader() as reader:
        node.put(range(40), 9)
        node.round()
        warmed(node, reader)
        assert len(node.cached()) == 40
        node.put(range(20), 10)
        node.delete([21], 11)
        node.remove([22])
        node.remove([23])
        node.put([23], 3)
        assert feed.waiting == 0
        assert feed.overflows >= 1
        node.round()
        assert node.writer.picture().counts["compared"] == 2  # at the beginning, too
        expected = {**dict.fromkeys(range(20), 10), **dict.fromkeys([20, *range(24, 40)], 9)}
        assert node.cached() == expected
        same(node, reader)
        assert [check.difference for check in node.check()] == [""]
        # Broken on purpose: what is not compared is not found.
        monkeypatch.setattr(caches.TableWriter, "compare", lambda table: None)
        node.put(range(20), 12)
        node.round()
        assert "another stamp" in node.check()[0].difference


def test_the_checker_finds_another_stamp_other_bytes_and_a_row_too_many(node: Standing) -> None:
    node.put(range(4), 5)
    cache = node.writer.cache_of(node.model.spec.id, table_id("item")) if node.round() is None else None
    assert cache is not None

    def found(keys: list[int], stamp: int, value: float) -> str:
        rows = np.full((len(keys), DIM), value, np.float32).view(np.uint8)
        cache.clear()
        cache.insert(np.array(keys, np.uint64), np.full(len(keys), stamp, np.uint64), rows)
        return node.check()[0].difference

    assert found([1, 2], 5, 7.0) == "2 rows have other bytes, first key 1"
    assert found([3], 4, 7.0) == "1 rows have another stamp, first key 3: 4, not 5"
    assert found([4], 5, 7.0) == "1 rows are not in the store any more, first key 4"


def test_who_reads_what_no_request_asked_for_brings_no_rows(node: Standing) -> None:
    node.put(range(40), 1)
    with node.reader(counted=False) as reader:
        warmed(node, reader)
        same(node, reader)
    assert node.cached() == {}


@pytest.mark.parametrize("policy", ["lru", "lfu", "priority"])
def test_a_cache_smaller_than_the_table_serves_all_of_it(tmp_path: Path, policy: Any) -> None:
    with Standing(tmp_path, rows=32, policy=policy) as node, node.reader() as reader:
        node.put(range(200), 1)
        for stamp in range(2, 12):
            same(node, reader, np.arange(200, dtype=np.uint64))
            node.round()
            node.put(range(stamp, 200, 3), stamp)
            node.round()
            assert node.check()[0].difference == ""
        assert 16 < node.check()[0].rows <= 32


# --- readers of both tiers ---------------------------------------------------------------------------------------------------


def _between_read_and_insert(node: Standing, monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """Do something after the writer has read rows of the store, and before they are on the device."""
    read = StoreRows.read

    def slow(rows: StoreRows, keys: Any) -> Any:
        found = read(rows, keys)
        monkeypatch.setattr(StoreRows, "read", read)
        then()
        return found

    monkeypatch.setattr(StoreRows, "read", slow)


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("gone", [False, True])
def test_a_row_that_was_seen_in_the_store_is_not_seen_older_on_the_device(
    node: Standing, monkeypatch: pytest.MonkeyPatch, planted: bool, gone: bool
) -> None:
    if planted:
        monkeypatch.setattr(Needed, "behind", lambda *_: None)
    seen: list[int] = []
    with node.reader() as reader:

        def look() -> None:
            seen.append(int(reader.lookup("item", KEYS[:1], stamps=True)[1][0]))

        def newer() -> None:
            (node.delete if gone else node.put)([0], 2)
            look()

        node.put([0], 1)
        node.round()
        look()
        _between_read_and_insert(node, monkeypatch, newer)
        node.round()  # inserts what it read before
        assert node.cached() == {0: 1}, "the device has the older version"
        look()
        node.round()
        look()
        after = 0 if gone else 2
        assert seen == [1, after, 1 if planted else after, after]


def test_needed_remembers_no_key_too_few() -> None:
    needed, rng, seen = Needed(), np.random.default_rng(0), dict[int, int]()
    for epoch in range(1, 300):
        keys = rng.integers(0, 1 << 63, 50).astype(np.uint64)
        needed.note(keys, epoch)
        seen |= dict.fromkeys(keys.tolist(), epoch + epoch % 2)
        applied = int(rng.integers(0, epoch + 2)) & ~1
        known = np.array(list(seen), np.uint64)
        behind = needed.behind(known, applied)
        wanted = np.array([seen[key] > applied for key in known.tolist()])
        if behind is None:
            assert not wanted.any()
        else:
            assert behind[wanted].all()
            assert wanted.all() or behind[~wanted].mean() < 0.9  # others of the same place


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("padding", [None, 3])
def test_bags_are_those_of_a_reader_without_a_device(node: Standing, options: dict[str, Any], padding: int | None) -> None:
    rng = np.random.default_rng(5)
    weighted = options.pop("weighted", False) if (options := dict(options)) else False
    node.put(range(0, 60, 2), 1)
    node.round()
    row = np.arange(DIM, dtype=np.float32)
    with node.reader(defaults={"item": row}) as reader, Reader("ctr", node.run_dir, defaults={"item": row}) as plain:
        for _ in range(4):
            keys = rng.integers(0, 64, 50).astype(np.uint64)
            offsets = np.sort(np.concatenate(([0], rng.integers(0, 51, 9))))
            weights = rng.standard_normal(50).astype(np.float32) if weighted else None
            arguments = {**options, "weights": weights, "padding_key": padding}
            expected = plain.lookup_pooled("item", keys, offsets, **arguments)
            np.testing.assert_allclose(reader.lookup_pooled("item", keys, offsets, **arguments), expected, rtol=1e-5, atol=1e-6)
            out = np.empty_like(expected)
            node.round()
        assert reader.device is not None
        assert (reader.device.counts.hits > 20) == (options["mode"] != "max")
        assert reader.lookup_pooled("item", keys[:0], np.zeros(2, np.int64)).tolist() == [[0.0] * DIM] * 2
        with pytest.raises(ModelError, match="out"):
            reader.lookup_pooled("item", keys, offsets, out=out.astype(np.float64))  # type: ignore[arg-type]


def test_shapes_several_tables_dense_and_consistent_look_ups(tmp_path: Path) -> None:
    with Standing(tmp_path, tables=("item", "user")) as node, node.reader() as reader:
        node.put(range(40), 1)
        node.put(range(30), 2, "user")
        for _ in range(2):
            for keys in (KEYS.reshape(5, 8), KEYS[:1].reshape(()), [3, 3, 99], np.empty((2, 0), np.uint64)):
                same(node, reader, keys)
                same(node, reader, keys, "user")
            node.round()
        node.model.frontier[...] = 1 << 60  # all of it has come
        node.model.set_synced_until(1)
        both = {"user": KEYS, "item": KEYS[::-1]}
        with Reader("ctr", node.run_dir) as plain:
            for consistent in (False, True):
                for name, rows in reader.lookup_many(both, consistent=consistent).items():
                    assert rows.tobytes() == plain.lookup(name, both[name]).tobytes()
            assert reader.lookup("item", KEYS, consistent=True).tobytes() == plain.lookup("item", KEYS).tobytes()
            expected = plain.lookup_pooled("item", KEYS.reshape(5, 8))

            def read(state: State) -> list[bytes]:  # what it gives is on the device, too
                rows = [state.lookup("item", KEYS), state.lookup_pooled("item", KEYS.reshape(5, 8))]
                assert {type(one) for one in rows} == {type(reader.lookup("item", KEYS))}
                return [one.tobytes() for one in rows]

            assert reader.together(read) == [plain.lookup("item", KEYS).tobytes(), expected.tobytes()]
            assert reader.lookup_pooled("item", KEYS.reshape(5, 8), consistent=True).tobytes() == expected.tobytes()
        with pytest.raises(ModelError, match="has no table 'shop'"):
            reader.lookup("shop", KEYS)
        assert reader.device is not None
        assert reader.device.counts.hits > 0


def test_torch_gets_the_memory_that_the_look_up_wrote(node: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from ekko.torch import EmbeddingBag

    node.put(range(40), 1)
    written: list[Any] = []
    pooled = Reader.lookup_pooled
    monkeypatch.setattr(
        Reader, "lookup_pooled", lambda *args, **options: written.append(pooled(*args, **options)) or written[-1]
    )
    with node.reader() as reader, Reader("ctr", node.run_dir) as plain:
        bag = EmbeddingBag(reader, "item", mode="sum", device="cpu")
        ids = torch.arange(40).reshape(8, 5)
        for _ in range(2):
            rows = bag(ids)
            assert rows.data_ptr() == written[-1].ctypes.data
            torch.testing.assert_close(rows, EmbeddingBag(plain, "item", mode="sum")(ids))
            node.round()
        assert reader.device is not None
        assert reader.device.counts.hits == 40
        with pytest.raises(ModelError, match="this reader's rows are on cpu"):
            EmbeddingBag(reader, "item", device="cuda:0")


def test_hits_count_as_much_as_misses_for_what_is_hot(node: Standing) -> None:
    node.put(range(40), 1)
    with node.reader() as reader:
        for _ in range(200):
            warmed(node, reader)
        assert reader.device is not None
        assert reader.device.counts.hits > 7_000
    node.model.heat["item"].fold(1_000, 600_000)
    assert node.model.heat["item"].stats().keys == 8_000


# --- when things end ---------------------------------------------------------------------------------------------------------


def test_a_cache_that_nobody_writes_any_more_is_not_read(node: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    node.put(range(40), 1)
    with node.reader() as reader:
        warmed(node, reader)
        same(node, reader)
        assert reader.device is not None
        assert reader.device.counts.hits == 40
        node.put(range(40), 2)
        monkeypatch.setattr(binding, "BEHIND_MS_MAX", 1_000)
        node.writer._control.set_fresh(writer.monotonic_ms() - 1_050)
        same(node, reader)
        assert "nobody has written the caches" in reader.device.reason
        monkeypatch.setattr(binding, "BEHIND_MS_MAX", 600_000)  # however long the next two lines take
        node.round()
        same(node, reader)
        assert reader.device.counts.hits == 80


def test_a_writer_that_begins_again_takes_the_caches_of_the_one_before_from_its_readers(node: Standing) -> None:
    node.put(range(40), 1)
    with node.reader() as reader:
        warmed(node, reader)
        node.devices.close()
        node.put(range(40), 2)
        same(node, reader)
        assert reader.device is not None
        assert reader.device.reason
        node.begin()
        node.round()
        warmed(node, reader)
        hits = reader.device.counts.hits
        same(node, reader)
        assert reader.device.counts.hits == hits + 40
        assert [check.difference for check in node.check()] == [""]


def test_how_far_a_new_daemon_is_does_not_count_for_the_caches_of_the_one_before(
    node: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied = DeviceControl.applied
    node.put(range(40), 1)
    with node.reader() as reader:
        warmed(node, reader)

        def restarted(control: DeviceControl, place: int) -> int:
            """The reader is held up here while the node stops, comes back, and is written."""
            monkeypatch.setattr(DeviceControl, "applied", applied)
            node.devices.close()
            node.put(range(40), 2)
            node.begin()
            return applied(control, place)

        monkeypatch.setattr(DeviceControl, "applied", restarted)
        same(node, reader)


def test_a_process_that_was_forked_is_told_to_make_a_reader_of_its_own(node: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    with node.reader() as reader:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(ModelError, match="make a new one in this process"):
            reader.lookup("item", KEYS)


def test_a_table_for_which_there_is_no_room_is_served_from_the_host_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, made = [True], caches.EmbeddingCache

    def make(*arguments: Any, **options: Any) -> Any:
        if full[0] and options["capacity"] == 32:
            raise DeviceMemoryError(1_000_000, 10, "a cache")
        return made(*arguments, **options)

    monkeypatch.setattr(caches, "EmbeddingCache", make)
    monkeypatch.setattr(writer, "RETRY_S", 0.0)
    with Standing(tmp_path, rows=32) as node, node.reader() as reader:
        node.put(range(40), 1)
        node.round()
        same(node, reader)
        picture = node.writer.picture()
        assert not picture.serving
        expected = "table 'item' of model 'ctr' is served from the host: a cache needs 1,000,000 bytes of device memory"
        assert picture.reason.startswith(expected)
        assert [event for event, _ in node.told] == ["device_has_no_room"]
        assert reader.device is not None
        assert reader.device.reason == picture.reason
        assert reader.device.counts.host_only == 40
        full[0] = False
        node.round()
        assert node.writer.picture().serving
        assert node.writer.picture().reason == ""
        warmed(node, reader)
        same(node, reader)
        assert reader.device.counts.hits == 32


def test_a_device_that_fails_leaves_its_readers_to_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Standing(tmp_path) as node, node.reader() as reader:
        node.put(range(40), 1)
        node.writer.start()
        reader.lookup("item", KEYS)
        wait(lambda: len(node.cached()) == 40)

        def broken(*_: Any, **__: Any) -> Any:
            raise DeviceError("an uncorrectable error in its memory")

        monkeypatch.setattr(caches.EmbeddingCache, "apply", broken)
        node.put(range(40), 2)
        wait(lambda: bool(node.told))  # what the writer does last when its device fails
        assert not node.writer.picture().serving
        node.put(range(40), 3)
        same(node, reader)
        assert node.told == [
            (
                "device_failed",
                {"device": TWIN, "reason": "an uncorrectable error in its memory", "remedy": "start the node again"},
            )
        ]
        assert reader.device is not None
        assert reader.device.reason == "an uncorrectable error in its memory"


def test_a_writer_that_is_held_up_holds_up_neither_the_store_nor_its_readers(
    node: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    held, going = threading.Event(), threading.Event()
    update = caches.TableWriter.update

    def slow(table: caches.TableWriter, keys: Any) -> None:
        held.set()
        going.wait(120)
        update(table, keys)

    node.put(range(40), 1)
    with node.reader() as reader:
        warmed(node, reader)
        monkeypatch.setattr(caches.TableWriter, "update", slow)
        node.writer.start()
        node.put(range(40), 2)
        assert held.wait(60)
        for stamp in range(3, 500):
            node.put(range(40), stamp)  # would wait for ever, if it waited
        assert node.writer.picture().waiting == 497 * 40
        monkeypatch.setattr(binding, "BEHIND_MS_MAX", -1)  # time passes
        same(node, reader)
        monkeypatch.setattr(binding, "BEHIND_MS_MAX", 600_000)
        going.set()
        wait(lambda: set(node.cached().values()) == {499})
        same(node, reader)
    assert [check.difference for check in node.check()] == [""]


def test_tables_and_models_that_come_and_go(node: Standing) -> None:
    node.put(range(40), 1)
    with node.reader() as reader:
        warmed(node, reader)
        node.store.add_table("ctr", TableSpec("user", DIM))
        node.put(range(10), 2, "user")
        same(node, reader, table="user")  # before it has a cache
        node.devices.follow()
        node.round()
        warmed(node, reader)
        reader.lookup("user", KEYS)
        node.round()
        assert sorted(check.table for check in node.check()) == ["item", "user"]
        assert node.cached("user") == dict.fromkeys(range(10), 2)
        node.store.drop_table("ctr", "user", 1)
        node.devices.follow()
        node.round()
        assert [check.table for check in node.check()] == ["item"]
        with pytest.raises(ModelError, match="has table 'user' no more"):
            reader.lookup("user", KEYS)
        same(node, reader)
        node.store.drop_model("ctr", 2)
        node.devices.follow()
        node.round()
        assert node.check() == []
        with pytest.raises(ModelError, match="was dropped"):
            reader.lookup("item", KEYS)


def test_rows_that_expire_are_not_on_the_device(tmp_path: Path) -> None:
    with Standing(tmp_path) as node, node.reader() as reader:
        node.store.add_table("ctr", TableSpec("mortal", DIM, ttl_s=60))
        node.devices.follow()
        node.put(range(10), 2, "mortal")
        reader.lookup("mortal", KEYS)
        node.round()
        assert list(node.writer.picture().models["ctr"]) == ["item"]


# --- what a user may do wrong ------------------------------------------------------------------------------------------------


def test_a_wrong_device_is_one_line(node: Standing, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="device 'tpu' cannot be used here: no device is called 'tpu'"):
        Reader("ctr", node.run_dir, device="tpu")
    other = Store.open(tmp_path / "other")
    other.add_model(node.model.spec)
    with pytest.raises(StoreError, match=r"keeps no rows on a device: add \[device\]"):
        Reader("ctr", tmp_path / "other", device=TWIN)
    other.destroy()
    with node.reader() as reader, pytest.raises(ModelError, match="out"):
        reader.lookup("item", KEYS, out=np.empty((3, DIM), np.float32))


def wait(condition: Callable[[], object]) -> None:
    from sim_cluster.processes import wait_until

    wait_until(condition, "the device's writer", 60)
