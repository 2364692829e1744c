"""In the background: training does not wait for the network, each batch is the model of one moment, and nothing is lost."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import ekko.torch
from ekko.errors import ModelError, NodeUnreachable, PublishError
from ekko.torch.capture import PENDING_MAX
from ekko.torch.tracker import Tracker
from tests.ekko.test_torch import TABLES, RecordedStep, Recorder, Toy, adagrad, train
from tests.ekko.test_torch_reload import GONE, RolledBack, users

WAIT_S = 60.0


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps are small, and nothing here is about how fast they are
    torch.manual_seed(0)
    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud: torch warns when Adagrad meets sparse rows
    yield
    torch.set_num_threads(threads)


class Slow(Recorder):
    """A publisher whose node is stopped, or does not answer, while it is told so."""

    def __init__(self) -> None:
        super().__init__({"users": 4, "items": 4})
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.entered = threading.Event()  # a step is on its way
        self.away = False

    @contextmanager
    def step(self) -> Iterator[RecordedStep]:
        self.entered.set()
        assert self.goes_on.wait(WAIT_S)
        with super().step() as step:
            yield step
            if self.away:
                raise NodeUnreachable("no node answers")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, user: list[int], item: list[int]) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        train(model, optimizer, user, item)


def test_a_step_is_published_while_training_goes_on() -> None:
    model, publisher = Toy(), Slow()
    optimizer = adagrad(model)
    with ekko.torch.track(model, optimizer, publisher, TABLES, dense_every=1) as tracker:
        train(model, optimizer, [3, 5], [7, 8])
        until(lambda: tracker.stamp == 1)
        [step] = publisher.steps
        assert {table: set(rows) for table, rows in step.rows.items()} == {"users": {3, 5}, "items": {7, 8}}
        assert set(step.dense) == {"top.weight", "top.bias"}
        np.testing.assert_array_equal(step.rows["users"][3], model.user.weight[3].detach().numpy())


def test_rows_that_wait_are_sent_once_and_as_they_are_then() -> None:
    model, publisher = Toy(), Slow()
    optimizer = adagrad(model)
    with ekko.torch.track(model, optimizer, publisher, TABLES) as tracker:
        publisher.goes_on.clear()
        train(model, optimizer, [0], [0])
        assert publisher.entered.wait(WAIT_S)
        norms = 0.0
        for number in range(PENDING_MAX + 50):  # more than may be set aside
            train(model, optimizer, [3, 1 + number % 2], [7, 8])
            norms += model.user.weight.grad.to_dense()[3].abs().sum().item()
        assert tracker.counts.bytes_due < 8 * (9 + 12)
        assert 0 < tracker.counts.rows_due <= 9 + 12
        publisher.goes_on.set()
        tracker.flush()
        _, second = publisher.steps
        assert {table: set(rows) for table, rows in second.rows.items()} == {"users": {1, 2, 3}, "items": {7, 8}}
        assert second.significance["users"][3] == pytest.approx(norms, rel=1e-4)
        np.testing.assert_array_equal(second.rows["users"][3], model.user.weight[3].detach().numpy())
        counts = tracker.counts
        assert (counts.steps, counts.batches, counts.rows, counts.rows_due) == (PENDING_MAX + 51, 2, 2 + 5, 0)


class Counter(nn.Module):
    """Two tables and a parameter whose values count the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = (nn.Embedding(2_000, 4, sparse=sparse) for sparse in (True, False))
        self.top = nn.Parameter(torch.zeros(3))
        for value in self.parameters():
            nn.init.zeros_(value)

    def forward(self) -> torch.Tensor:
        every = torch.arange(2_000)
        return self.user(every).sum() + self.item(every).sum() + self.top.sum()


@pytest.mark.parametrize("several", [False, True])
def test_a_batch_is_the_model_between_two_steps(several: bool) -> None:
    """Each step adds one to every value; a copy while one is under way would have two different numbers."""
    model, publisher = Counter(), Recorder({"users": 4, "items": 4})
    parts = [[value] for value in model.parameters()] if several else [list(model.parameters())]
    optimizers = [torch.optim.SGD(part, lr=1.0, maximize=True) for part in parts]
    tables = {"user": "users", "item": "items"}
    with ekko.torch.track(model, optimizers, publisher, tables, dense_every=1, share=1.0) as tracker:
        deadline = time.monotonic() + WAIT_S
        steps = 0
        while len(publisher.steps) < 20 and time.monotonic() < deadline:
            for optimizer in optimizers:
                optimizer.zero_grad()
            model().backward()
            for optimizer in optimizers:
                optimizer.step()
            steps += 1
        stamp = tracker.flush()
    assert stamp == len(publisher.steps) >= 20
    seen = []
    for step in publisher.steps:
        rows = [np.stack(list(table.values())) for table in step.rows.values()]
        values = np.unique(np.concatenate([part.reshape(-1) for part in [*rows, *step.dense.values()]]))
        assert len(values) == 1, values
        assert set(step.rows) == {"users", "items"}
        seen.append(int(values[0]))
    assert seen == sorted(set(seen))
    assert seen[-1] == steps == tracker.counts.steps


def test_a_node_that_does_not_answer_is_tried_again() -> None:
    model, publisher = Toy(), Slow()
    optimizer = adagrad(model)
    publisher.away = True
    tracker = ekko.torch.track(model, optimizer, publisher, TABLES)
    for number in range(3):
        train(model, optimizer, [number], [7])
    until(lambda: tracker.counts.failures >= 2)
    # By the one or the other, as it comes while the thread tries again or between two attempts.
    with pytest.raises(TimeoutError, match=r"(not published after 0\.1 s|still on its way): no node answers"):
        tracker.flush(timeout=0.1)
    publisher.away = False
    tracker.flush()
    assert publisher.state("users", (9, 4))[:3].tolist() == model.user.weight[:3].tolist()
    publisher.away = True
    train(model, optimizer, [5], [5])
    with pytest.raises(TimeoutError):
        tracker.remove(timeout=0.1)
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "ekko-track"])


def test_what_is_refused_raises_out_of_the_next_step() -> None:
    model, publisher = Toy(), Slow()
    optimizer = adagrad(model)
    with ekko.torch.track(model, optimizer, publisher, TABLES) as tracker:
        publisher.refuses = True
        train(model, optimizer, [3], [7])
        until(lambda: tracker.counts.failures == 1)
        publisher.refuses = False  # nothing is sent before it is told
        with pytest.raises(PublishError, match="refused"):
            train_on(model, optimizer, [4], [7])
        train(model, optimizer, [5], [7])
        tracker.flush()
        assert set(publisher.state("users", (9, 4))[:, 0].nonzero()[0]) >= {3, 4, 5}


def test_a_rollback_is_loaded_by_the_thread_that_trains() -> None:
    model, publisher = Toy(), RolledBack()
    optimizer = adagrad(model)
    with ekko.torch.track(model, optimizer, publisher, TABLES) as tracker:
        train(model, optimizer, [3, 4], [7, 8])
        tracker.flush()
        publisher.pending = (users(),)
        while publisher.pending:  # the thread is refused, and then a step loads what was restored
            train(model, optimizer, [3, 4], [7, 8])
        assert (model.user.weight[GONE] == 0.25).all()
        published = len(publisher.steps)
        train(model, optimizer, [5], [8])
        tracker.flush()
        assert len(publisher.steps) == published + 1
        assert set(publisher.steps[-1].rows["users"]) == {5}, "nor is what was refused published later"


def test_a_rollback_that_was_loaded_between_two_steps_is_not_told_any_more() -> None:
    """Though the thread was refused before."""
    for load in (Tracker.reload, Tracker.flush):
        model, publisher = Toy(), RolledBack()
        optimizer = adagrad(model)
        with ekko.torch.track(model, optimizer, publisher, TABLES) as tracker:
            publisher.pending = (users(),)
            train(model, optimizer, [3, 4], [7, 8])
            until(lambda tracker=tracker: tracker.counts.failures == 1)  # type: ignore[misc]
            load(tracker)
            assert (model.user.weight[GONE] == 0.25).all()
            train(model, optimizer, [5], [8])
        assert [set(step.rows["users"]) for step in publisher.steps] == [{5}]


def test_a_rollback_that_is_not_over_raises() -> None:
    model, publisher = Toy(), RolledBack()
    optimizer = adagrad(model)
    with ekko.torch.track(model, optimizer, publisher, TABLES):
        publisher.restored = lambda: ()  # type: ignore[method-assign]
        publisher.pending = (users(),)
        with pytest.raises(ModelError, match="was rolled back"):
            train_on(model, optimizer, [3], [8])
        publisher.pending = ()
    assert set(publisher.steps[-1].rows["users"]) == {3}


def test_large_tables_go_in_bounded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ekko.torch.tracker, "COPY_BYTES_MAX", 700 * 4 * 4)
    monkeypatch.setattr(ekko.torch.capture, "COMPARE_BYTES_MAX", 300 * 4 * 4)
    model, publisher = Counter(), Recorder({"users": 4, "items": 4})
    optimizer = torch.optim.Adam([model.item.weight, model.top])
    with ekko.torch.track(model, optimizer, publisher, {"item": "items"}) as tracker:
        model().backward()
        optimizer.step()
        tracker.flush()
    counts = [len(step.rows["items"]) for step in publisher.steps]
    assert max(counts) <= 700
    assert len(counts) >= 7
    np.testing.assert_array_equal(publisher.state("items", (2_000, 4)), model.item.weight.detach().numpy())


def test_a_script_that_closes_nothing_has_its_last_rows_published(monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Callable[[], object]] = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    model, publisher = Toy(), Slow()
    optimizer = adagrad(model)
    publisher.away = True
    ekko.torch.track(model, optimizer, publisher, TABLES)
    train(model, optimizer, [3], [7])
    publisher.away = False
    [end] = at_exit
    end()
    np.testing.assert_array_equal(publisher.state("users", (9, 4))[3], model.user.weight[3].detach().numpy())


def test_to_end_takes_no_longer_than_it_may() -> None:
    """A call that hangs is left behind."""
    model, publisher = Toy(), Slow()
    optimizer = adagrad(model)
    tracker = ekko.torch.track(model, optimizer, publisher, TABLES)
    publisher.goes_on.clear()
    train(model, optimizer, [3], [7])
    assert publisher.entered.wait(WAIT_S)
    with pytest.raises(TimeoutError, match="the batch before this one is still on its way"):
        tracker.remove(timeout=0.1)
    publisher.goes_on.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "ekko-track"])
    tracker.flush()
    assert [set(step.rows["users"]) for step in publisher.steps] == [{3}]
