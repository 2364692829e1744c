"""What is written back makes the model what it was, over the union of keys; what that costs is reported."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from ekko.model import ModelSpec, TableSpec
from ekko.rollback import diff
from ekko.rollback.diff import differences, stamp_until, versions_now
from ekko.rollback.plan import PlanBatch, RowsAtRisk
from ekko.rollback.scope import WHOLE, Scope
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns
from p2p.stamps import EPOCH_MS, WRITER_MASK, make_stamp
from tests.ekko.rollback.remembered import Remembered

BEGIN_MS = EPOCH_MS + 1_000_000_000
CUT_MS = BEGIN_MS + 500
NOW_MS = BEGIN_MS + 1_000
KEYS = 60


def model(ttl_s: int = 0) -> ModelStore:
    tables = {"item": TableSpec("item", 4, ttl_s=ttl_s), "user": TableSpec("user", 2)}
    return Store.anonymous().add_model(ModelSpec("ctr", 8, tables), 256)


def history(seed: int) -> Remembered:
    """Steps of two writers over a second, the cut in the middle; every key is written or deleted now and then."""
    rng, past = random.Random(seed), Remembered(model())
    for at_ms in range(BEGIN_MS, NOW_MS, 20):
        keys = sorted(rng.sample(range(KEYS), rng.randint(1, 12)))
        value = None if rng.random() < 0.3 else float(rng.randint(0, 5))
        past.write(rng.choice(["item", "user"]), keys, value, make_stamp(at_ms, 0, rng.choice([1, 2])))
    past.marks = [CUT_MS]
    return past


def take_back(past: Remembered, scope: Scope = WHOLE, wanted_ms: int = CUT_MS, cut_ms: int = CUT_MS) -> list[RowsAtRisk]:
    at_risk, batches = [], []
    for piece in differences(past.model, past, cut_ms, wanted_ms, scope, NOW_MS):
        if isinstance(piece, PlanBatch):
            batches.append(piece)
        elif piece is not None:
            at_risk.append(piece)
    for index, batch in enumerate(batches):
        past.model.apply([RowColumns(batch.table, batch.keys, batch.rows)], make_stamp(NOW_MS, index, 9))
    return at_risk


def differing(past: Remembered, cut_ms: int = CUT_MS, writers: tuple[int, ...] = ()) -> list[tuple[str, int]]:
    """Keys of which the model does not hold what it held at the cut; or, of some writers, what others wrote since."""
    wrong, until = [], stamp_until(cut_ms)
    for table in past.model.tables:
        keys = np.arange(KEYS, dtype=np.uint64)
        now = versions_now(table, keys)
        for key in range(KEYS):
            versions = past.versions.get((table.spec.id, key), [])
            due = [one for one in versions if one[0] <= until or (writers and one[0] & WRITER_MASK not in writers)]
            row = max(due, default=(0, b""))[1]
            if bool(row) != bool(now.live[key]) or (row and row != now.rows[key].tobytes()):
                wrong.append((table.spec.name, key))
    return wrong


@pytest.mark.parametrize("seed", range(30))
def test_the_model_is_what_it_was(seed: int) -> None:
    past = history(seed)
    assert differing(past)
    assert take_back(past) == []
    assert differing(past) == []


def test_a_plan_that_is_made_again_has_what_is_left_and_no_more() -> None:
    past = history(1)
    batches = [one for one in differences(past.model, past, CUT_MS, CUT_MS, WHOLE, NOW_MS) if isinstance(one, PlanBatch)]
    for index, batch in enumerate(batches[::2]):
        past.model.apply([RowColumns(batch.table, batch.keys, batch.rows)], make_stamp(NOW_MS, index, 9))
    again = [one for one in differences(past.model, past, CUT_MS, CUT_MS, WHOLE, NOW_MS) if isinstance(one, PlanBatch)]
    assert sum(len(one.keys) for one in again) == sum(len(one.keys) for one in batches[1::2])


Planted = Callable[[pytest.MonkeyPatch], None]


def _keep_new_keys(patch: pytest.MonkeyPatch) -> None:
    """Only what was there at the cut is looked at, not the union."""
    whole = diff._batches

    def without_births(*given: object) -> Iterator[tuple[PlanBatch, object]]:
        for batch, which in whole(*given):  # type: ignore[arg-type]
            live = len(batch.rows)
            yield replace(batch, keys=batch.keys[:live], expected=batch.expected[:live]), which

    patch.setattr(diff, "_batches", without_births)


def _forget_deleted(patch: pytest.MonkeyPatch) -> None:
    """Only what is there now is looked at."""
    at = Remembered.at

    def only_living(self: Remembered, generation: object, cut_ms: int, table: int, keys: np.ndarray) -> object:
        then, now = at(self, generation, cut_ms, table, keys), versions_now(self.model.tables_by_id[table], keys)  # type: ignore[arg-type]
        return replace(then, live=then.live & now.live)

    patch.setattr(Remembered, "at", only_living)


@pytest.mark.parametrize("plant", [_keep_new_keys, _forget_deleted])
def test_a_planted_bug_is_noticed(plant: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    wrong = []
    for seed in range(5):
        past = history(seed)
        take_back(past)
        wrong += differing(past)
    assert wrong


@pytest.mark.parametrize(
    ("scope", "meant"),
    [
        (Scope(tables=("user",)), lambda table, key, writer: table == "user"),
        (Scope(key_first=10, key_end=30), lambda table, key, writer: 10 <= key < 30),
        (Scope(writer="train", writers=(2,)), lambda table, key, writer: writer == 2),
        (Scope(("item",), "train", (1,), 20), lambda table, key, writer: table == "item" and writer == 1 and key >= 20),
    ],
    ids=["table", "keys", "writer", "all of them"],
)
def test_a_narrower_scope_takes_back_that_and_leaves_the_rest(scope: Scope, meant: Callable[[str, int, int], bool]) -> None:
    for seed in range(10):
        past = history(seed)
        before = {}
        for table in past.model.tables:
            for key, stamp in enumerate(versions_now(table, np.arange(KEYS, dtype=np.uint64)).stamps.tolist()):
                before[table.spec.name, key] = stamp
        wrong = differing(past)
        take_back(past, scope)
        due = [(table, key) for table, key in wrong if not meant(table, key, before[table, key] & 0xFFF)]
        left = differing(past, writers=scope.writers)
        assert [one for one in left if meant(*one, before[one] & 0xFFF)] == []
        assert set(due) <= set(differing(past)), "the rest is as it was"
        assert len(due) < len(wrong)


def test_what_another_writer_left_comes_back_and_is_counted() -> None:
    past = Remembered(model())
    past.write("item", [1, 2, 3, 4], 1.0, make_stamp(BEGIN_MS, 0, 1))
    past.write("item", [2, 3], 2.0, make_stamp(CUT_MS + 100, 0, 1))  # good
    past.write("item", [3, 4], None, make_stamp(CUT_MS + 150, 0, 1))  # good, too
    past.write("item", [1, 2, 3], -9.0, make_stamp(CUT_MS + 200, 0, 2))
    past.write("item", [4], -9.0, make_stamp(CUT_MS + 120, 0, 2))  # overwritten already
    past.marks = [CUT_MS]
    pieces = list(differences(past.model, past, CUT_MS, CUT_MS, Scope(writer="bad", writers=(2,)), NOW_MS))
    assert sum(one.others for one in pieces if isinstance(one, PlanBatch)) == 2
    take_back(past, Scope(writer="bad", writers=(2,)))
    now = versions_now(past.model.tables[0], np.arange(1, 5, dtype=np.uint64))
    assert now.live.tolist() == [True, True, False, False]
    assert now.rows[:2].view(np.float32)[:, 0].tolist() == [1.0, 2.0]


def test_good_rows_after_the_mark_are_reported() -> None:
    past = Remembered(model())
    past.write("item", [1, 2, 3], 1.0, make_stamp(BEGIN_MS, 0, 1))
    past.marks = [BEGIN_MS + 100]
    past.write("item", [2, 4], 2.0, make_stamp(BEGIN_MS + 200, 0, 1))  # good, and not in the mark
    past.write("item", [3], 9.0, make_stamp(CUT_MS + 1, 0, 1))  # bad
    at_risk = take_back(past, wanted_ms=CUT_MS, cut_ms=BEGIN_MS + 100)
    assert [one.keys.tolist() for one in at_risk] == [[2], [4]]
    assert differing(past, BEGIN_MS + 100) == []


def test_what_has_expired_is_not_brought_back() -> None:
    past = Remembered(model(ttl_s=1))
    past.write("item", [1], 1.0, make_stamp(NOW_MS - 1_500, 0, 1))
    past.write("item", [2], 1.0, make_stamp(NOW_MS - 600, 0, 1))
    past.write("item", [1, 2], None, make_stamp(NOW_MS - 100, 0, 1))
    past.marks = [CUT_MS]
    take_back(past)
    table = past.model.tables[0]
    assert versions_now(table, np.arange(3, dtype=np.uint64)).live.tolist() == [False, False, True]


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "BATCH_ROWS_MAX", 3)
    past = history(2)
    pieces = list(differences(past.model, past, CUT_MS, CUT_MS, WHOLE, NOW_MS))
    assert max(len(one.keys) for one in pieces if isinstance(one, PlanBatch)) == 3
