"""Two stores and a log between them: what moves on, what is told, what follows the schema, what a loss costs."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ekko.delayed import columns
from ekko.delayed import store as delayed_store
from ekko.delayed.history import BLURS_MAX, History, cut_of, unix_ms_of_cut
from ekko.delayed.store import DelayedStore
from ekko.errors import ModelError, StoreError
from ekko.generations import Generation
from ekko.model import DENSE_DIM, DENSE_SPEC, ModelSpec, TableSpec, TensorSpec, table_id
from ekko.rollback.diff import differences
from ekko.rollback.past import DelayedPast, Past
from ekko.rollback.plan import PlanBatch
from ekko.rollback.scope import Scope
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns
from p2p.stamps import EPOCH_MS, make_stamp

WRITER = 3
START = EPOCH_MS + 1_000_000
ITEM = table_id("item")


def spec(**more: int) -> ModelSpec:
    return ModelSpec("ctr", 8, {"item": TableSpec("item", 2)}, **more)


class Pair:
    """A node's two stores; `write` is a step of one writer that arrives whole."""

    def __init__(self, folder: Path, model: ModelSpec | None = None) -> None:
        self.folder = folder
        self.current, self.older = Store.anonymous(), Store.anonymous()
        self.current.add_model(model or spec())
        self.delayed = self.open()

    def open(self) -> DelayedStore:
        self.delayed = DelayedStore.open(self.current, self.older, self.folder, 1 << 20)
        return self.delayed

    def killed(self) -> DelayedStore:
        self.delayed.log.close()
        self.current, self.older = self.current.reopened(), self.older.reopened()
        return self.open()

    @property
    def model(self) -> ModelStore:
        return self.current.models["ctr"]

    def write(self, at_ms: int, keys: list[int], value: float, *, delete: bool = False, told: bool = True) -> int:
        stamp = make_stamp(START + at_ms, 0, WRITER)
        data = np.full((0 if delete else len(keys), 2), value, np.float32)
        self.model.apply([RowColumns(ITEM, np.array(keys, np.uint64), data.view(np.uint8))], stamp)
        if told:
            self.tell(at_ms)
        return stamp

    def tell(self, at_ms: int) -> None:
        """Everything up to then is here."""
        stamp = make_stamp(START + at_ms, 1, WRITER)
        self.model.frontiers[list(self.model.hold), WRITER] = stamp
        self.model.vector[:, WRITER] = stamp
        self.model.set_synced_until(START + at_ms)

    def old(self, keys: list[int], table: str = "item") -> list[float]:
        return self.older.models["ctr"].lookup(table, np.array(keys, np.uint64))[0][:, 0].tolist()

    def at(self, at_ms: int, keys: list[int]) -> list[float | None]:
        versions = self.delayed.at("ctr", START + at_ms, ITEM, np.array(keys, np.uint64))
        values = versions.rows.view(np.float32)[:, 0].tolist()
        return [value if live else None for value, live in zip(values, versions.live.tolist(), strict=True)]

    def changed(self, at_ms: int) -> dict[int, int]:
        found = self.delayed.changed_since("ctr", START + at_ms)
        return {key: stamp for one in found for key, stamp in zip(one.keys.tolist(), one.stamps.tolist(), strict=True)}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_the_older_state_is_what_was(pair: Pair) -> None:
    pair.write(100, [1, 2], 1.0)
    pair.write(200, [2, 3], 2.0)
    pair.write(300, [1], 3.0, delete=True)
    assert pair.delayed.advance("ctr", START + 200)
    assert pair.old([1, 2, 3]) == [1.0, 2.0, 2.0]
    assert pair.delayed.oldest_cut("ctr") == START + 200
    assert pair.delayed.advance("ctr", START + 300)
    assert pair.old([1, 2, 3]) == [0.0, 2.0, 2.0]


def test_a_step_at_a_time_comes_to_the_same(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "BATCH_ROWS", 2)
    for at_ms in range(100, 1_000, 100):
        pair.write(at_ms, [at_ms, at_ms + 1, 7], float(at_ms))
    calls = 1
    while not pair.delayed.advance("ctr", START + 850, 2):
        calls += 1
        assert pair.at(900, [7, 100]) == [900.0, 100.0], "what lies between is told all the same"
        pair.older.models["ctr"].check([])
    assert calls >= 8
    assert pair.old([7, 800, 900]) == [800.0, 800.0, 0.0]


def test_the_difference_is_told_over_all_keys(pair: Pair) -> None:
    pair.write(100, [1, 2, 3], 1.0)
    changed = pair.write(200, [2], 2.0)
    deleted = pair.write(250, [3], 0.0, delete=True)
    born = pair.write(300, [4], 3.0)
    assert pair.changed(150) == {2: changed, 3: deleted, 4: born}
    assert pair.at(150, [4, 3, 2, 1]) == [None, 1.0, 1.0, 1.0]
    assert pair.at(299, [1, 2, 3, 4]) == [1.0, 2.0, None, None]
    risky = {
        key: stamp
        for one in pair.delayed.at_risk("ctr", START + 150, START + 260)
        for key, stamp in zip(one.keys.tolist(), one.stamps.tolist(), strict=True)
    }
    assert risky == {2: changed, 3: deleted}


def test_a_key_that_was_deleted_and_forgotten_since_is_in_the_difference(pair: Pair) -> None:
    pair.write(100, [1, 2], 1.0)
    pair.delayed.advance("ctr", START + 120)
    pair.write(130, [5], 5.0)
    pair.write(200, [2, 5], 0.0, delete=True)
    until = np.full(4096, make_stamp(START + 500, 0, 0), np.uint64)
    assert pair.model.collect(until, START + 500, 100).rows == 2
    assert pair.changed(150) == {2: 0, 5: 0}
    assert pair.at(150, [2, 5]) == [1.0, 5.0]
    # And the older state lets go of them when it comes there.
    pair.delayed.advance("ctr", START + 400)
    assert pair.older.models["ctr"].table_stats()["item"].tombstones == 2
    assert pair.delayed.collect("ctr", START + 500) == 2
    assert pair.older.models["ctr"].table_stats()["item"].tombstones == 0


def test_what_has_been_passed_is_not_told(pair: Pair) -> None:
    pair.write(100, [1], 1.0)
    pair.write(400, [1], 2.0)
    pair.delayed.advance("ctr", START + 300)
    with pytest.raises(StoreError, match=f"not kept any more.*{START + 300}"):
        pair.at(200, [1])
    assert pair.delayed.valid_cut("ctr", START + 200) is None
    assert pair.delayed.valid_cut("ctr", START + 350) == START + 350
    with pytest.raises(ModelError, match="no model 'other'"):
        pair.delayed.advance("other", START)


def test_a_kill_between_any_two_steps_costs_nothing(pair: Pair) -> None:
    for at_ms in range(100, 600, 100):
        pair.write(at_ms, [1, at_ms], float(at_ms))
        pair.killed()
    pair.delayed.advance("ctr", START + 250)
    pair.killed()
    assert pair.delayed.losses == 0
    assert pair.old([1, 100, 200, 300]) == [200.0, 100.0, 200.0, 0.0]
    assert pair.at(420, [1, 300, 400, 500]) == [400.0, 300.0, 400.0, None]


def test_a_kill_in_the_middle_of_an_advance_is_finished(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "BATCH_ROWS", 1)
    for at_ms in range(100, 600, 100):
        pair.write(at_ms, [at_ms], float(at_ms))
    assert not pair.delayed.advance("ctr", START + 400, 2)
    pair.killed()
    with pytest.raises(StoreError, match="not kept any more"):
        pair.at(200, [100])
    assert pair.delayed.advance("ctr", START + 100), "which is no way back"
    assert pair.delayed.oldest_cut("ctr") == START + 400
    assert pair.old([100, 200, 300, 400, 500]) == [100.0, 200.0, 300.0, 400.0, 0.0]


def test_after_a_loss_both_stores_are_compared(pair: Pair) -> None:
    pair.write(100, [1, 2], 1.0)
    pair.delayed.advance("ctr", START + 150)
    pair.write(200, [2, 3], 2.0)
    for path in pair.folder.iterdir():
        path.unlink()
    pair.killed()
    assert pair.delayed.losses == 1
    assert pair.old([1, 2, 3]) == [1.0, 1.0, 0.0], "what was flushed stays"
    pair.write(300, [4], 3.0)
    pair.write(400, [1], 4.0)
    assert pair.delayed.valid_cut("ctr", START + 350) is None
    pair.delayed.advance("ctr", START + 350)
    assert pair.old([1, 2, 3, 4]) == [1.0, 2.0, 2.0, 3.0]
    assert pair.delayed.valid_cut("ctr", START + 350) is None, "key 1 may have had versions that are lost"
    pair.write(500, [5], 5.0)
    assert pair.delayed.valid_cut("ctr", START + 450) == START + 450
    pair.delayed.advance("ctr", START + 450)
    assert pair.old([1, 2, 3, 4]) == [4.0, 2.0, 2.0, 3.0]


def test_a_store_that_was_there_before_the_log_is_compared(tmp_path: Path) -> None:
    pair = Pair(tmp_path / "first")
    pair.write(100, [1, 2], 1.0)
    pair.delayed.log.close()
    pair.older, pair.folder = Store.anonymous(), tmp_path / "second"
    pair.open()
    assert pair.delayed.losses == 1
    pair.delayed.advance("ctr", START + 200)
    assert pair.old([1, 2]) == [1.0, 1.0]
    pair.write(300, [1], 3.0)
    assert pair.delayed.valid_cut("ctr", START + 250) == START + 250


def test_a_bound_that_is_reached_costs_the_oldest_part(pair: Pair) -> None:
    pair.delayed.log._segment_bytes, pair.delayed.log._bytes_max = 4_000, 16_000
    for at_ms in range(100, 20_000, 100):
        pair.write(at_ms, [at_ms % 700, at_ms], float(at_ms))
    assert pair.delayed.losses == 1
    assert pair.delayed.log.bytes <= 16_000
    assert "reached" in pair.delayed.reason
    assert pair.delayed.valid_cut("ctr", START + 19_800) is None
    assert pair.delayed.advance("ctr", START + 19_900)
    pair.write(20_000, [1], 1.0)
    for key in range(0, 700, 100):
        assert pair.old([key]) == [pair.current.models["ctr"].lookup("item", np.array([key], np.uint64))[0][0, 0]]
    assert pair.delayed.valid_cut("ctr", START + 19_950) == START + 19_950


def test_tables_tensors_and_dropped_models_follow(pair: Pair) -> None:
    pair.write(100, [1], 1.0)
    pair.current.add_table("ctr", TableSpec("user", 4))
    tensor = TensorSpec("top.0", (3, 200), "float32")
    pair.current.add_tensor("ctr", tensor)
    stamp = make_stamp(START + 200, 0, WRITER)
    user = RowColumns(table_id("user"), np.array([9], np.uint64), np.full((1, 4), 9.0, np.float32).view(np.uint8))
    dense = np.full((tensor.rows, DENSE_DIM), 2.0, np.float32)
    pair.model.apply([user, RowColumns(DENSE_SPEC.id, tensor.keys, dense.view(np.uint8))], stamp)
    pair.tell(200)
    pair.delayed.advance("ctr", START + 250)
    assert pair.old([9], "user") == [9.0]
    assert pair.old(tensor.keys.tolist(), DENSE_SPEC.name) == [2.0] * tensor.rows
    assert pair.older.models["ctr"].spec.tensors == {"top.0": tensor}
    pair.write(300, [2], 2.0)
    pair.current.drop_table("ctr", "user", START + 300)
    pair.delayed.advance("ctr", START + 350)
    assert list(pair.older.models["ctr"].spec.tables) == ["item"]
    pair.current.drop_model("ctr", START + 400)
    pair.current.add_model(pair.current.current(spec()))
    pair.write(500, [3], 5.0)
    pair.delayed.advance("ctr", START + 550)
    assert pair.old([1, 2, 3]) == [0.0, 0.0, 5.0]
    assert pair.older.models["ctr"].spec.incarnation == 1


def test_a_model_of_several_partitions(tmp_path: Path) -> None:
    pair = Pair(tmp_path, ModelSpec("ctr", 8, {"item": TableSpec("item", 2)}, partitions=2))
    pair.write(100, list(range(20)), 1.0)
    pair.write(200, list(range(10)), 2.0)
    pair.delayed.advance("ctr", START + 150)
    assert pair.old(list(range(20))) == [1.0] * 20
    assert set(pair.changed(150)) == set(range(10))


def test_readers_of_the_older_state_know_how_old_it_is(pair: Pair) -> None:
    older = pair.older.models["ctr"]
    pair.write(100, [1], 1.0)
    pair.write(300, [1], 2.0)
    pair.delayed.advance("ctr", START + 200)
    assert int(older._synced_until_ms) == START + 200
    assert older.marks.settled
    # What is blurred is not claimed.
    pair.model.note_coalesced({WRITER: make_stamp(START + 250, 0, WRITER)})
    pair.write(400, [1], 4.0)
    pair.model.note_coalesced({WRITER: make_stamp(START + 250, 0, WRITER)})
    pair.delayed.advance("ctr", START + 350)
    assert int(older._synced_until_ms) == START + 249
    assert not older.marks.settled, "a reader who wants whole steps only has to wait"
    pair.write(500, [1], 4.0)
    pair.delayed.advance("ctr", START + 450)
    assert int(older._synced_until_ms) == START + 450
    assert older.marks.settled


def test_a_disk_that_refuses_is_tried_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = [0.0]
    monkeypatch.setattr(delayed_store, "time", SimpleNamespace(monotonic=lambda: moment[0]))
    pair.write(100, [1], 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(delayed_store.Log, "_put", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        pair.write(200, [1], 2.0)
        assert "No space" in pair.delayed.reason
    pair.write(300, [1], 3.0)
    assert pair.delayed.losses == 1
    assert pair.delayed.valid_cut("ctr", START + 300) is None
    moment[0] += 2
    pair.write(400, [2], 4.0)
    assert pair.delayed.advance("ctr", START + 390)
    assert pair.old([1, 2]) == [3.0, 0.0]
    pair.write(500, [3], 4.0)
    assert pair.at(400, [1, 2]) == [3.0, 4.0]
    assert pair.delayed.valid_cut("ctr", START + 410) == START + 410


def test_cuts_are_moments() -> None:
    for unix_ms in (START, START + 1, EPOCH_MS + 5):
        assert unix_ms_of_cut(cut_of(unix_ms)) == unix_ms
        assert make_stamp(unix_ms, 1023, 4095) <= cut_of(unix_ms) < make_stamp(unix_ms + 1, 0, 0)


def test_blurs_are_bounded_and_only_grow_together() -> None:
    history = History(complete=10_000)
    for begin in range(0, 1_000, 4):
        history.blur(begin + 1, begin + 3)
    assert len(history.blurs) == BLURS_MAX
    assert history.blurs == sorted(history.blurs)
    for begin in range(0, 1_000, 4):
        assert history.valid_cut(begin + 1) != begin + 1
        assert history.valid_cut(begin + 2) != begin + 2
    assert history.valid_cut(1_001) == 1_001
    assert History.from_json(history.to_json()).blurs == history.blurs


def test_a_rollback_asks_the_same(pair: Pair) -> None:
    model = Generation("ctr")
    past: Past = DelayedPast(pair.delayed)
    assert past.range(Generation("other")) is None
    pair.write(100, [1, 2, 3], 1.0)
    pair.delayed.advance("ctr", START + 110)
    pair.write(200, [2], 2.0)
    pair.write(300, [3, 4], 3.0)
    assert past.range(model) == (START + 110, START + 299)
    assert past.mark(model, START + 250) == START + 250
    pieces = [piece for piece in past.changed_since(model, START + 250) if piece is not None]
    assert [piece.keys.tolist() for piece in pieces] == [[3, 4]]
    then = past.at(model, START + 250, ITEM, pieces[0].keys)
    assert then.live.tolist() == [True, False]
    assert then.rows.view(np.float32)[0].tolist() == [1.0, 1.0]
    found = list(differences(pair.model, past, START + 250, START + 250, Scope(), START + 400))
    batches = [one for one in found if isinstance(one, PlanBatch)]
    assert [batch.keys.tolist() for batch in batches] == [[3, 4]]


def test_rows_that_go_without_a_version_are_a_loss(pair: Pair) -> None:
    """An answer that brings a shard whole drops what it does not bring (R5): the tombstone came to others only."""
    pair.write(100, [1, 2], 1.0)
    pair.delayed.advance("ctr", START + 110)
    arrivals = pair.model.arrivals()
    arrivals.begin(np.arange(8, dtype=np.uint32))
    data = np.full((1, 2), 1.0, np.float32)
    stamp = make_stamp(START + 100, 0, WRITER)
    arrivals.note([RowColumns(ITEM, np.array([1], np.uint64), data.view(np.uint8), np.array([stamp], np.uint64))])
    covered = np.full((8, 1), make_stamp(START + 200, 0, WRITER), np.uint64)
    assert arrivals.drop_absent(np.array([WRITER], np.uint16), covered) == 1
    pair.tell(200)
    assert pair.delayed.losses == 1
    assert pair.delayed.valid_cut("ctr", START + 180) == START + 110
    pair.write(300, [5], 5.0)
    pair.delayed.advance("ctr", START + 250)
    assert pair.old([1, 2]) == [1.0, 0.0]
    assert pair.older.models["ctr"].table_stats()["item"].rows == 1
    pair.write(400, [6], 5.0)
    assert pair.delayed.valid_cut("ctr", START + 350) == START + 350


def test_under_one_writers_rows_lie_those_of_others(pair: Pair) -> None:
    bad = np.array([WRITER], np.uint64)

    def other(at_ms: int, keys: list[int], value: float) -> int:
        stamp = make_stamp(START + at_ms, 0, WRITER + 1)
        rows = np.full((len(keys), 2), value, np.float32).view(np.uint8)
        pair.model.apply([RowColumns(ITEM, np.array(keys, np.uint64), rows)], stamp)
        return stamp

    pair.write(100, [1, 2, 3], 1.0)
    good = other(200, [2, 3, 4], 2.0)
    pair.write(300, [1, 2], -9.0)
    deleted = pair.write(310, [3], 0.0, delete=True)
    pair.model.collect(np.full(4096, make_stamp(START + 500, 0, 0), np.uint64), START + 500, 100)
    keys = np.array([3, 1, 2, 4], np.uint64)
    found = pair.delayed.by_others("ctr", START + 150, ITEM, keys, bad)
    assert found.under.live.tolist() == [True] * 4
    assert found.under.rows.view(np.float32)[:, 0].tolist() == [2.0, 1.0, 2.0, 2.0]
    assert found.newer.tolist() == [True, False, True, True]
    assert found.held.tolist()[0] == deleted, "who made a deletion that is forgotten is in the log"
    pair.model.listener.history.strays.clear()  # type: ignore[union-attr]
    assert not pair.delayed.by_others("ctr", START + 150, ITEM, keys, bad).unsure.any()
    # What came with a claim alone may have hidden a version of the other one, above the one that is known.
    pair.model.listener.history.blur(make_stamp(START + 250, 0, 0), make_stamp(START + 305, 0, 0))  # type: ignore[union-attr]
    assert pair.delayed.by_others("ctr", START + 150, ITEM, keys, bad).unsure.tolist() == [True, True, True, False]
    assert good == found.under.stamps[0]
