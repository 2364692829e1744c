"""What broke the hooks once: settings that change in mid-training, rollbacks while much is due, errors at odd places."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ekko.torch
from ekko.errors import ModelError, StoreError
from ekko.torch.capture import TrackedTable
from ekko.torch.due import DueRows
from tests.ekko.test_torch import TABLES, RecordedStep, Recorder, Toy, adagrad, train
from tests.ekko.test_torch_reload import GONE, RolledBack, users
from tests.ekko.test_track_background import WAIT_S, Slow, until
from tests.ekko.test_track_optimizers import DIM, ROWS, Model, Tied, changes, step


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud: torch warns when Adagrad meets sparse rows


@pytest.mark.parametrize("setting", ["momentum", "weight_decay"])
def test_settings_that_a_checkpoint_brings_are_seen(setting: str) -> None:
    """`load_state_dict` puts other groups in place of an optimizer's."""
    model, publisher = Model(), Recorder({"items": DIM})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = torch.optim.SGD(Model().parameters(), lr=0.1, **{setting: 0.9}).state_dict()
    tracker = ekko.torch.track(model, optimizer, publisher, {"item": "items"}, background=False)
    assert not tracker._tables["items"].compared
    step(model, optimizer, [3, 5])
    optimizer.load_state_dict(saved)
    for ids in ([6, 7], [8, 9]):
        before = model.item.weight.detach().clone()
        step(model, optimizer, ids)
        assert set(publisher.steps[-1].rows["items"]) >= changes(model.item.weight, before)


def test_gradients_of_a_row_that_add_up_to_nothing_may_have_moved_it() -> None:
    """SGD adds the entries of a sparse gradient to the row one after the other, and each addition rounds."""
    table, publisher = nn.Embedding(ROWS, DIM, sparse=True), Recorder({"items": DIM})
    nn.init.constant_(table.weight, 1e-8)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    ekko.torch.track(nn.ModuleDict({"item": table}), optimizer, publisher, {"item": "items"}, background=False)
    before = table.weight.detach().clone()
    (table(torch.tensor([3, 3])) * torch.tensor([[1.0], [-1.0]])).sum().backward()
    optimizer.step()
    assert changes(table.weight, before) == {3} == set(publisher.steps[0].rows["items"])


@pytest.mark.parametrize("named", [False, True])
def test_max_norm_of_a_module_that_shares_the_weight_counts(named: bool) -> None:
    model, publisher = Tied(sparse=True), Recorder({"items": DIM})
    model.again.max_norm = 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tables = {"item": "items", "again": "items"} if named else {"item": "items"}
    tracker = ekko.torch.track(model, optimizer, publisher, tables, background=False)
    before = model.item.weight.detach().clone()
    model.again(torch.tensor([[7], [8]]))
    tracker.flush()
    assert changes(model.item.weight, before) == {7, 8} == set(publisher.steps[0].rows["items"])


class WaitsForRollback(Slow):
    """A publisher with `while_fenced="wait"`: the step that a rollback finds on its way is dropped, later ones go."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: tuple[Any, ...] = ()
        self.has_restored = False

    @contextmanager
    def step(self) -> Iterator[RecordedStep]:
        with super().step() as step:
            yield step
        if self.pending and not self.has_restored:
            self.steps.pop()
            self.has_restored = True

    def restored(self) -> tuple[Any, ...]:
        found, self.pending, self.has_restored = self.pending, (), False
        return found


@pytest.mark.parametrize("background", [False, True])
def test_what_is_due_when_a_rollback_is_over_does_not_undo_it(background: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is too much for one batch: the first is dropped, and the others are of the same model."""
    monkeypatch.setattr(ekko.torch.tracker, "COPY_BYTES_MAX", 4 * 4)
    model, publisher = Toy(), WaitsForRollback()
    optimizer = adagrad(model)
    with ekko.torch.track(model, optimizer, publisher, TABLES, dense_every=1, background=background) as tracker:
        train(model, optimizer, [0], [0])
        tracker.flush()
        if background:
            publisher.entered.clear()
            publisher.goes_on.clear()
        before = len(publisher.steps)
        publisher.pending = (users(),)
        train(model, optimizer, [3, 4], [7, 8])
        if background:
            assert publisher.entered.wait(WAIT_S)
            publisher.goes_on.set()
            until(lambda: publisher.has_restored)
            looked, send = [], tracker._sender._send
            monkeypatch.setattr(tracker._sender, "_send", lambda: bool(looked.append(0)) or send())
            until(lambda: len(looked) >= 5)  # the thread, again and again
            assert len(publisher.steps) == before
            tracker.flush()
        assert len(publisher.steps) == before, "all that was due was worked out from a model that is gone"
        assert (model.user.weight[GONE] == 0.25).all()


def test_rows_that_cannot_be_copied_stay_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may be out of memory for a moment."""
    model, publisher = Toy(), Recorder({"users": 4, "items": 4})
    optimizer = adagrad(model)
    ekko.torch.track(model, optimizer, publisher, TABLES, dense_every=1, background=False)
    copy = TrackedTable.rows

    def fails(table: TrackedTable, ids: np.ndarray) -> np.ndarray:
        if table.name == "items":
            raise MemoryError
        return copy(table, ids)

    monkeypatch.setattr(TrackedTable, "rows", fails)
    with pytest.raises(MemoryError):
        train(model, optimizer, [3], [7])
    monkeypatch.undo()
    train(model, optimizer, [4], [8])
    assert {table: set(rows) for table, rows in publisher.steps[0].rows.items()} == {"users": {3, 4}, "items": {7, 8}}


def test_what_was_restored_is_loaded_though_the_first_attempt_fails() -> None:
    class Unable:
        """A reader whose node is away for a moment."""

        fails = True

        def dense(self, name: str) -> np.ndarray:
            raise AssertionError

        def lookup(self, table: str, keys: np.ndarray, *, stamps: bool) -> tuple[np.ndarray, np.ndarray]:
            if self.fails:
                raise StoreError("the node has gone away")
            return np.full((len(keys), 4), 7, np.float32), np.ones(len(keys), np.uint64)

    model, publisher, reader = Toy(), RolledBack(), Unable()
    optimizer = adagrad(model)
    tracker = ekko.torch.track(model, optimizer, publisher, TABLES, reader=reader, background=False)
    train(model, optimizer, [3, 4], [7, 8])
    before = len(publisher.steps)
    publisher.pending = (users(),)
    for _ in range(2):
        with pytest.raises(StoreError):
            train(model, optimizer, [3, 4], [7, 8])
    assert len(publisher.steps) == before, "half of it is loaded"
    reader.fails = False
    tracker.flush()
    assert (model.user.weight[GONE] == 0.25).all()
    assert (model.user.weight[4] == 7).all()
    assert (model.item.weight[[7, 8]] == 7).all()
    assert len(publisher.steps) == before


@pytest.mark.parametrize("background", [False, True])
def test_an_optimizer_that_does_not_step_any_more_holds_nothing_up(background: bool) -> None:
    model, publisher = Toy(), Recorder({"users": 4, "items": 4})
    first = torch.optim.Adagrad([model.user.weight, model.item.weight], lr=0.1)
    frozen = torch.optim.Adagrad(model.top.parameters(), lr=0.1)
    with ekko.torch.track(model, [first, frozen], publisher, TABLES, background=background) as tracker:
        train(model, first, [0], [0])
        frozen.step()
        tracker.flush()
        assert tracker.counts.steps == 1
        for number in range(40):
            train(model, first, [number % 9], [number % 12])
        assert 20 <= tracker.counts.steps < 40
        until(lambda: bool(publisher.steps) and 8 in set().union(*(batch.rows["users"] for batch in publisher.steps)))
        frozen.step()
        counted = tracker.counts.steps
        train(model, first, [1], [1])
        assert tracker.counts.steps == counted, "it steps again, and ends what is one step"


def test_publishing_all_does_not_undo_a_rollback_that_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ekko.torch.tracker, "PUBLISH_ALL_BYTES_MAX", 2 * 4 * 4)
    model, publisher = Toy(), WaitsForRollback()
    tracker = ekko.torch.track(model, adagrad(model), publisher, TABLES, background=False)
    tracker.publish_all()
    before = len(publisher.steps)
    publisher.pending = (users(),)
    with pytest.raises(ModelError, match="was rolled back while all of its rows were published"):
        tracker.publish_all()
    assert len(publisher.steps) == before
    tracker.reload()
    assert (model.user.weight[GONE] == 0.25).all()
    tracker.publish_all()
    assert len(publisher.steps) == 2 * before


@pytest.mark.parametrize("how", ["set to zero", "added to", "scaled", "written to"])
def test_what_becomes_of_gradients_after_a_step_does_not_matter(how: str) -> None:
    """They are set aside until a batch is made; here that is when the user has used them for something else."""
    model, publisher = Model(sparse=True), Slow()
    publisher.tables = {"items": DIM}
    optimizer = torch.optim.SGD([model.item.weight], lr=0.1)
    weight = model.item.weight
    with ekko.torch.track(model, optimizer, publisher, {"item": "items"}) as tracker:
        publisher.goes_on.clear()
        step(model, optimizer, [0, 1])
        assert publisher.entered.wait(WAIT_S)  # what follows is not looked at before it is over
        before, norms = weight.detach().clone(), torch.zeros(ROWS)
        optimizer.zero_grad()
        for ids in ([3, 5], [3, 3], [7, 9]):
            if how != "added to":
                optimizer.zero_grad(set_to_none=how != "set to zero")
            loss = model(torch.tensor([*ids, 140, 141]))
            (loss * torch.tensor(1.0)).backward()
            weight.grad = torch.sparse_coo_tensor(  # of 140 and 141 it is zero
                weight.grad._indices(), weight.grad._values() * (weight.grad._indices()[0] < 140).unsqueeze(1), weight.shape
            )
            optimizer.step()
            norms += weight.grad.to_dense().abs().sum(1)
            if how == "scaled":
                weight.grad.mul_(0.0)
            elif how == "written to":
                weight.grad._values().zero_()
        changed = changes(weight, before)
        publisher.goes_on.set()
        tracker.flush()
        sent = publisher.steps[-1]
        if how == "written to":  # which rows they moved is not known any more: all that they name
            assert set(sent.rows["items"]) == {3, 5, 7, 9, 140, 141} >= changed
        else:
            assert set(sent.rows["items"]) == changed == {3, 5, 7, 9}
            for row in changed:
                assert sent.significance["items"][row] == pytest.approx(norms[row].item(), rel=1e-4)


def test_a_gradient_may_be_written_to_while_it_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread adds up while the next step may be under way: before it comes to the values the user sets them to zero."""
    model, publisher = Model(sparse=True), Recorder({"items": DIM})
    optimizer = torch.optim.SGD([model.item.weight], lr=0.1)
    add = DueRows.add_gradients
    written: list[bool] = []

    def late(*arguments: Any, **options: Any) -> None:
        if not written:
            written.append(True)
            model.item.weight.grad._values().zero_()
        add(*arguments, **options)

    monkeypatch.setattr(DueRows, "add_gradients", late)
    with ekko.torch.track(model, optimizer, publisher, {"item": "items"}, background=False):
        step(model, optimizer, [3, 5])
    assert written
    assert set(publisher.steps[-1].rows["items"]) == {3, 5}


def test_ids_may_be_in_the_same_memory_at_each_step() -> None:
    """As where batches are loaded into one buffer: indices of gradients are a view of it."""
    model, publisher = Model(sparse=True), Slow()
    publisher.tables = {"items": DIM}
    optimizer = torch.optim.SGD([model.item.weight], lr=0.1)
    ids = torch.empty(2, dtype=torch.int64)
    with ekko.torch.track(model, optimizer, publisher, {"item": "items"}) as tracker:
        publisher.goes_on.clear()
        step(model, optimizer, [0, 1])
        assert publisher.entered.wait(WAIT_S)  # what follows is not looked at before it is over
        for batch in ([3, 5], [7, 9], [11, 13]):
            ids.copy_(torch.tensor(batch))
            optimizer.zero_grad()
            model(ids).backward()
            optimizer.step()
        publisher.goes_on.set()
        tracker.flush()
    assert set(publisher.steps[-1].rows["items"]) == {3, 5, 7, 9, 11, 13}
