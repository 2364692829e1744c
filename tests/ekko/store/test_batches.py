"""Epoch and `unsettled`: what the writer tells readers who want nothing of half a batch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ekko.errors import StoreError
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.serve import consistency
from ekko.serve.consistency import between_batches
from ekko.store import Store, layout
from ekko.store.batches import UNSETTLED_AHEAD
from ekko.store.model_store import ModelStore
from ekko.store.table import Table
from p2p.replica import RowColumns, WriterIdentity

SPEC = ModelSpec("ctr", 8, {"item": TableSpec("item", 1), "user": TableSpec("user", 1)})
WRITER, OTHER = 3, 4


def stamp(tick: int, writer: int = WRITER) -> int:
    return tick << 12 | writer


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


@pytest.fixture
def model(run_dir: Path) -> ModelStore:
    return Store.open(run_dir).add_model(SPEC)


def epoch(model: ModelStore) -> int:
    return int(model._word("batch_epoch"))


def unsettled(model: ModelStore) -> int:
    return int(model._word("unsettled"))


def columns(*keys: int, table: str = "item", stamps: list[int] | None = None) -> RowColumns:
    rows = np.zeros((len(keys), 1), np.float32).view(np.uint8)
    return RowColumns(table_id(table), np.array(keys, np.uint64), rows, None if stamps is None else np.array(stamps, np.uint64))


def reach(model: ModelStore, tick: int, writer: int = WRITER) -> None:
    """The machine knows that everything of the writer is here, and says that a frontier moved."""
    model.frontier[writer] = stamp(tick, writer)
    model.set_synced_until(1)


def test_the_epoch_is_odd_while_rows_can_be_seen_to_change(model: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    apply = Table.apply

    def watched(self: Table, *arguments: object) -> None:
        seen.append((epoch(model), unsettled(model)))
        apply(self, *arguments)  # type: ignore[arg-type]
        seen.append((epoch(model), unsettled(model)))

    monkeypatch.setattr(Table, "apply", watched)
    before = epoch(model)
    model.apply([columns(1, 2), columns(1, table="user")], stamp(1))
    assert seen == [(before + 1, UNSETTLED_AHEAD)] * 4  # of both tables one batch
    assert (epoch(model), unsettled(model)) == (before + 2, UNSETTLED_AHEAD)
    reach(model, 1)
    assert (epoch(model), unsettled(model)) == (before + 2, 0)


def test_nothing_applied_changes_nothing(model: ModelStore) -> None:
    before = epoch(model)
    model.apply([], stamp(1))
    model.apply([columns()], stamp(1))
    assert (epoch(model), unsettled(model)) == (before, 0)


def test_it_is_unsettled_until_every_writer_is_covered(model: ModelStore) -> None:
    model.apply([columns(1)], stamp(5))
    model.apply([columns(2, 3, stamps=[stamp(6, OTHER), stamp(4)])], 0)  # of a pull's answer
    reach(model, 5)
    assert unsettled(model)  # the other writer's row is there without the rest of its step
    reach(model, 5, OTHER)
    assert unsettled(model)
    reach(model, 6, OTHER)
    assert not unsettled(model)
    model.apply([columns(1)], stamp(5))  # a repeat
    assert not unsettled(model)


def test_a_batch_for_which_there_is_no_room_ends_too(model: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StoreError("full")

    monkeypatch.setattr(Table, "apply", full)
    with pytest.raises(StoreError, match="full"):
        model.apply([columns(1)], stamp(1))
    assert epoch(model) % 2 == 0
    assert unsettled(model)


def test_who_attaches_after_a_kill_in_mid_batch_repairs_both_words(run_dir: Path, model: ModelStore) -> None:
    model.set_writer(WriterIdentity(WRITER, 1))
    model.begin_write(stamp(1), np.array([0]))
    model.apply([columns(1)], stamp(1))  # our own step: what is there of it counts as all of it (R4)
    model.apply([columns(2)], stamp(7, OTHER))  # of another writer's the rest may come
    model._word("batch_epoch")[...] += 1  # killed before the end of it
    model._word("unsettled")[...] = 0
    again = Store.open(run_dir).models["ctr"]
    assert epoch(again) % 2 == 0
    assert unsettled(again) == UNSETTLED_AHEAD
    reach(again, 7, OTHER)
    assert unsettled(again) == 0


def test_a_divided_model_is_settled_when_all_held_partitions_are(tmp_path: Path) -> None:
    spec = ModelSpec("ctr", 8, {"item": TableSpec("item", 1)}, partitions=4)
    model = Store.anonymous().add_model(spec, hold=[1, 3])
    model.apply([columns(1)], stamp(5))
    model.frontiers[1, WRITER] = stamp(5)
    model.set_partition_synced_until(1, 1)
    assert unsettled(model)  # rows of the same step may be missing in partition 3
    model.frontiers[3, WRITER] = stamp(5)
    model.set_partition_synced_until(3, 1)
    assert not unsettled(model)


# --- the reader's side


def words(model: ModelStore) -> int:
    return model._header.address


def test_a_batch_that_was_applied_meanwhile_makes_it_look_again(model: ModelStore) -> None:
    seen = []

    def gather() -> int:
        seen.append(epoch(model))
        if len(seen) < 3:
            model.apply([columns(1)], stamp(len(seen)))
            reach(model, len(seen))
        return len(seen)

    assert between_batches("ctr", words(model), gather) == 3
    assert len(set(seen)) == 3


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [("batch_epoch", 7, "killed in the middle"), ("unsettled", UNSETTLED_AHEAD, "catching up: it has rows of steps")],
)
def test_it_gives_up_in_a_bounded_time_and_says_why(
    model: ModelStore, monkeypatch: pytest.MonkeyPatch, word: str, value: int, message: str
) -> None:
    monkeypatch.setattr(consistency, "DEADLINE_S", 0.01)
    model._header.words(layout.MODEL.offset(word))[...] = value
    with pytest.raises(StoreError, match=message):
        between_batches("ctr", words(model), lambda: pytest.fail("nothing may be read"))


def test_batches_without_a_pause_end_it_too(model: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "DEADLINE_S", 0.01)
    with pytest.raises(StoreError, match="faster than these keys"):
        between_batches("ctr", words(model), lambda: model._marks.end())


def test_rows_that_go_are_marked_as_rows_that_come_are(model: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model.apply([columns(1, 2, 3), columns(1, 2, table="user")], stamp(10))
    reach(model, 10)
    seen = []
    remove = Table.remove

    def watched(table: Table, *arguments: object) -> int:
        seen.append(epoch(model) & 1)
        return remove(table, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Table, "remove", watched)
    before = epoch(model)
    model.remove(table_id("item"), np.array([0], np.int64), complete=False)
    assert (seen, epoch(model)) == ([1], before + 2)


def test_what_an_answer_did_not_bring_goes_from_all_tables_at_once(model: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that deleted a row of each of two tables, whose tombstones are collected by now, and that a pull stands for."""
    model.apply([columns(1), columns(1, table="user")], stamp(10))
    reach(model, 10)
    epochs = []
    remove = Table.remove

    def watched(table: Table, *arguments: object) -> int:
        epochs.append(epoch(model))
        return remove(table, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Table, "remove", watched)
    arrivals = model.arrivals()
    arrivals.begin(np.arange(8, dtype=np.uint32))
    before = epoch(model)
    vector = np.full((8, 1), stamp(20), np.uint64)
    assert arrivals.drop_absent(np.array([WRITER], np.uint16), vector) == 2
    assert epochs == [before + 1] * 2
    assert epoch(model) == before + 2
    assert unsettled(model)  # until the frontier says that all of that step is here
    reach(model, 20)
    assert not unsettled(model)
