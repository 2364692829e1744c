"""After a rollback restored rows are loaded into the model in training, and the optimizer forgets what it knows of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import ekko.torch
from ekko.errors import ModelError, PublishError
from ekko.torch import Reloaded
from ekko.torch.reloading import load_rows
from tests.ekko.test_torch import TABLES, Recorder, Toy, train

GONE, STAYS = [3, 5], [4, 6]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud: torch warns when optimizers meet sparse rows


@dataclass
class Restored:
    table: str
    keys: np.ndarray
    rows: np.ndarray
    deleted: np.ndarray
    tensors: tuple[str, ...] = ()


class RolledBack(Recorder):
    """A publisher whose model was rolled back: refuses steps until what was restored was asked for."""

    def __init__(self) -> None:
        super().__init__({"users": 4, "items": 4})
        self.pending: tuple[Restored, ...] = ()
        self.has_restored = False

    def step(self) -> Any:
        if self.pending and not self.has_restored:
            raise ModelError("model 'ctr' was rolled back: ask what was restored")
        return super().step()

    def restored(self) -> tuple[Restored, ...]:
        found, self.pending, self.has_restored = self.pending, (), False
        return found


def users(value: float = 0.25) -> Restored:
    """Rows 3 and 5 as they were, and one of which this model knows nothing."""
    keys = np.array([*GONE, 1_000], np.uint64)
    return Restored("users", keys, np.full((3, 4), value, np.float32), np.zeros(3, np.bool_))


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "sparse-adam": lambda p: torch.optim.SparseAdam(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_rows_of_the_optimizer_are_as_before_their_first_step(name: str, sparse: bool) -> None:
    """A row that is forgotten moves as it does in a fresh optimizer; the others move as if nothing had happened."""
    if (sparse and name in ("adam", "rmsprop")) or (not sparse and name == "sparse-adam"):
        pytest.skip("does not take such gradients")

    def table() -> torch.nn.Embedding:
        torch.manual_seed(1)
        return torch.nn.Embedding(9, 4, sparse=sparse)

    def step(embedding: torch.nn.Embedding, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (embedding(torch.arange(9)) * torch.linspace(-1, 1, 36).reshape(9, 4)).sum().backward()
        optimizer.step()

    forgets, remembers = table(), table()
    one, other = (OPTIMIZERS[name]([embedding.weight]) for embedding in (forgets, remembers))
    for _ in range(5):
        step(forgets, one)
        step(remembers, other)
    ids = load_rows(one, forgets.weight, users())
    assert ids.tolist() == GONE
    assert (forgets.weight[GONE] == 0.25).all()
    for key, kept in one.state[forgets.weight].items():
        if isinstance(kept, torch.Tensor) and kept.ndim:
            rows = kept.to_dense()[GONE]
            assert (rows == (0.5 if key == "sum" else 0)).all(), key
            assert (kept.to_dense()[STAYS] == other.state[remembers.weight][key].to_dense()[STAYS]).all(), key
            assert (kept.to_dense()[STAYS] != 0).any(), key
    step(forgets, one)
    step(remembers, other)
    assert (forgets.weight[STAYS] == remembers.weight[STAYS]).all()


def test_a_step_after_a_rollback_begins_from_the_restored_rows() -> None:
    model, publisher = Toy(), RolledBack()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    tracker = ekko.torch.track(model, optimizer, publisher, TABLES, background=False)
    train(model, optimizer, [3, 4], [7, 8])
    publisher.pending = (users(),)
    train(model, optimizer, [3, 4], [7, 8])
    assert (model.user.weight[GONE] == 0.25).all()
    assert len(publisher.steps) == 1, "what was worked out from a model that is not there any more is not published"
    assert tracker.reload() == Reloaded({})
    train(model, optimizer, [3], [8])
    assert set(publisher.steps[-1].rows["users"]) == {3}
    assert set(publisher.steps[-1].rows["items"]) == {8}, "nor is it with a later step"


def test_a_row_of_a_refused_step_is_as_the_node_has_it_again() -> None:
    """Row 4 was not restored, for nothing bad was published of it; row 6 the node never had."""
    model, publisher = Toy(), RolledBack()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    tracker = ekko.torch.track(model, optimizer, publisher, TABLES, reader=Reader(), background=False)
    train(model, optimizer, [3, 4], [7, 8])
    publisher.pending = (users(),)
    publisher.has_restored = True  # nothing is asked before `reload`
    publisher.refuses = True
    with pytest.raises(PublishError):
        train(model, optimizer, [3, 4, 6], [7, 8, 9])
    moved = model.user.weight[6].clone()
    assert tracker.reload() == Reloaded({"users": 2}, dropped={"users": 2, "items": 3})
    assert (model.user.weight[4] == 0.5).all()
    assert (optimizer.state[model.user.weight]["sum"][4] == 0).all()
    assert (model.user.weight[6] == moved).all(), "there is nothing to put in its place"
    assert (model.item.weight[[7, 8]] == 0.5).all()


def test_a_publisher_that_waited_says_so() -> None:
    model, publisher = Toy(), RolledBack()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    ekko.torch.track(model, optimizer, publisher, TABLES, background=False)
    publisher.pending, publisher.has_restored = (users(),), True
    train(model, optimizer, [4], [8])
    assert (model.user.weight[GONE] == 0.25).all()
    assert len(publisher.steps) == 1


def test_what_is_refused_for_another_reason_stays_refused() -> None:
    model, publisher = Toy(), RolledBack()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    ekko.torch.track(model, optimizer, publisher, TABLES, background=False)
    publisher.restored = lambda: ()  # type: ignore[method-assign]
    publisher.pending = (users(),)
    with pytest.raises(ModelError, match="was rolled back"):
        train(model, optimizer, [3], [8])
    publisher.pending = ()
    train(model, optimizer, [4], [8])
    assert set(publisher.steps[0].rows["users"]) == {3, 4}, "its rows go with the next one"


class Reader:
    """Of a node that has rows below 9 of users, but 6, and all of items."""

    def lookup(self, table: str, keys: np.ndarray, *, stamps: bool) -> tuple[np.ndarray, np.ndarray]:
        assert stamps
        here = (table == "items") | (keys != 6)
        return np.repeat(np.where(here, 0.5, 0)[:, None], 4, axis=1).astype(np.float32), here.astype(np.uint64)

    def dense(self, name: str) -> np.ndarray:
        return np.full((1, 4) if name == "top.weight" else (1,), 0.125, np.float32)


def test_dense_parameters_are_read_where_there_is_a_reader() -> None:
    names = ("top.weight", "top.bias", "of.another.model")
    for reader in (None, Reader()):
        model, publisher = Toy(), RolledBack()
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        tracker = ekko.torch.track(model, optimizer, publisher, TABLES, dense_every=1, reader=reader, background=False)
        train(model, optimizer, [3], [7])
        empty = np.empty(0, np.uint64)
        publisher.pending = (users(), Restored("_dense", empty, np.empty((0, 256), np.float32), np.empty(0, np.bool_), names))
        reloaded = tracker.reload()
        assert reloaded.rows == {"users": 2}
        assert (reloaded.dense, reloaded.not_read)[reader is None] == names[:2]
        assert bool((model.top.weight == 0.125).all()) == (reader is not None)
        assert (model.top.weight in optimizer.state) == (reader is None)
        train(model, optimizer, [3], [7])
