"""Keys of a table that grows: a model of them in plain Python, and optimizers that go on as in a table that was large."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ekko.torch
from ekko.errors import ModelError
from ekko.torch import KeyMap
from ekko.torch.remembered import forget_rows
from tests.ekko.test_torch import RecordedStep, Recorder

DIM = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud: torch warns when Adagrad meets sparse rows


class DeletingStep(RecordedStep):
    def __init__(self) -> None:
        super().__init__()
        self.deleted: dict[str, set[int]] = {}

    def delete(self, table: str, keys: np.ndarray) -> None:
        assert table not in self.rows, "of a delete and a row of one key the later call counts"
        self.deleted.setdefault(table, set()).update(keys.tolist())


class Replica(Recorder):
    """A publisher that keeps what a replica has."""

    def __init__(self) -> None:
        super().__init__({"items": DIM})
        self.held: dict[int, np.ndarray] = {}

    @contextmanager
    def step(self) -> Iterator[DeletingStep]:
        step = DeletingStep()
        yield step
        if self.refuses:
            raise ConnectionError
        for key in step.deleted.get("items", ()):
            self.held.pop(key, None)
        self.held |= step.rows.get("items", {})
        self.steps.append(step)
        step.stamp = len(self.steps)


class Model(nn.Module):
    def __init__(self, rows: int = 2, **options: Any) -> None:
        super().__init__()
        self.item = nn.Embedding(rows, DIM, **options)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.item(rows).square().sum()


KEYS = st.integers(0, 30).map(lambda key: (key * 0x9E3779B97F4A7C15) % (1 << 64) - (1 << 63))  # torch knows no uint64
CALLS = st.lists(st.tuples(st.sampled_from(["rows", "free"]), st.lists(KEYS, max_size=8)), max_size=25)


@given(CALLS, st.booleans())
def test_each_key_has_a_row_of_its_own(calls: list[tuple[str, list[int]]], saved: bool) -> None:
    module = nn.Embedding(2, DIM)
    keys = KeyMap(module, [])
    expected: dict[int, int] = {}
    for what, wanted in calls:
        if what == "free":
            assert keys.free(torch.tensor(wanted, dtype=torch.int64)) == len(set(wanted) & set(expected))
            for key in wanted:
                expected.pop(key, None)
        else:
            rows = keys.rows(torch.tensor(wanted, dtype=torch.int64)).tolist()
            for key, row in zip(wanted, rows, strict=True):
                assert expected.setdefault(key, row) == row
        assert len(set(expected.values())) == len(expected) == len(keys)
        assert all(row < module.num_embeddings == len(module.weight) for row in expected.values())
        if saved:
            state = keys.state_dict()
            keys = KeyMap(module, [])
            keys.load_state_dict(state)
        bits = np.array(list(expected), np.int64).view(np.uint64)
        assert sorted(keys.keys.tolist()) == sorted(bits.tolist())
        assert keys.find(bits).tolist() == list(expected.values())
        assert (keys.find(np.array([7], np.uint64)) == -1).all()
    assert module.num_embeddings <= 64, "rows that were freed are used again"


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "sgd-momentum-sparse": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad-sparse": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "sparseadam-sparse": lambda p: torch.optim.SparseAdam(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_table_that_grows_is_trained_like_one_that_was_large(name: str) -> None:
    sparse = name.endswith("-sparse")
    small, large = Model(2, sparse=sparse), Model(64, sparse=sparse)
    nn.init.ones_(small.item.weight)
    nn.init.ones_(large.item.weight)
    one, other = (OPTIMIZERS[name](model.parameters()) for model in (small, large))
    keys = KeyMap(small.item, one, initialise=nn.init.ones_)
    for number in range(12):
        wanted = torch.tensor([[1000 + number, 1001], [1000 + number // 2, 1000 + number]])
        rows = keys.rows(wanted)
        assert rows.tolist() == keys.rows(wanted).tolist()
        for model, optimizer in ((small, one), (large, other)):
            (model(rows) if number % 3 else model(rows) + model(rows[:1])).backward()
            if number % 2:  # in between the gradient grows, too
                optimizer.step()
                optimizer.zero_grad()
    assert small.item.num_embeddings == 12, "it grew several times"
    # A sparse momentum has several entries of one row, which are added up in another order.
    exact = 1e-6 if name == "sgd-momentum-sparse" else 0
    torch.testing.assert_close(small.item.weight[:12], large.item.weight[:12], rtol=exact, atol=0)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", ["adagrad-sparse", "adam"])
def test_replicas_have_the_keys_that_there_are(name: str, background: bool) -> None:
    model, publisher = Model(sparse=name.endswith("-sparse")), Replica()
    optimizer = OPTIMIZERS[name](model.parameters())
    keys = KeyMap(model.item, optimizer)
    with ekko.torch.track(
        model, optimizer, publisher, {"item": "items"}, keys={"item": keys}, background=background
    ) as tracker:
        rng = np.random.default_rng(0)
        for number in range(60):
            wanted = torch.from_numpy(rng.integers(-20 + number, 20 + number, 6))
            optimizer.zero_grad()
            model(keys.rows(wanted)).backward()
            publisher.refuses = background and number % 7 == 3
            if number % 5 == 4:
                keys.free(torch.from_numpy(rng.integers(-20 + number, 20 + number, 6)))
            try:
                optimizer.step()
            except ConnectionError:
                assert background
        publisher.refuses = False
        for _ in range(2):
            try:
                tracker.flush()
            except ConnectionError:
                assert background
        rows = keys.find(keys.keys)
        expected = dict(zip(keys.keys.tolist(), model.item.weight.detach().numpy()[rows], strict=True))
        assert publisher.held.keys() == expected.keys()
        assert all((publisher.held[key] == expected[key]).all() for key in expected)
        assert any(step.deleted for step in publisher.steps)  # type: ignore[attr-defined]
        held, publisher.held = publisher.held, {}
        tracker.publish_all()
        assert publisher.held.keys() == held.keys()


def test_a_row_that_has_another_key_begins_anew() -> None:
    model, publisher = Model(4, sparse=True), Replica()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    keys = KeyMap(model.item, optimizer, initialise=nn.init.ones_)
    tracker = ekko.torch.track(model, optimizer, publisher, {"item": "items"}, keys={"item": keys}, background=False)
    [row] = keys.rows(torch.tensor([77])).tolist()
    model(torch.tensor([row])).backward()
    optimizer.step()
    keys.free(torch.tensor([77]))
    assert keys.rows(torch.tensor([78])).tolist() == [row]
    assert (model.item.weight[row] == 1).all()
    assert (optimizer.state[model.item.weight]["sum"][row] == 0).all()
    tracker.flush()
    assert publisher.held == {}, "77 is deleted, and nothing was learnt of 78"
    publisher.refuses = True
    optimizer.zero_grad()
    model(torch.tensor([row])).backward()
    with pytest.raises(ConnectionError):
        optimizer.step()
    publisher.refuses = False
    keys.free(torch.tensor([78]))
    assert keys.rows(torch.tensor([79])).tolist() == [row]
    tracker.flush()
    assert publisher.held == {}, "what was due of the row was of another key"
    optimizer.zero_grad()
    model(keys.rows(torch.tensor([77]))).backward()
    optimizer.step()
    assert publisher.held.keys() == {77}
    keys.free(torch.tensor([77]))
    keys.rows(torch.tensor([77]))
    tracker.flush()
    assert publisher.held == {}, "it is back, but nothing has been learnt of it since"


def test_what_cannot_grow_is_refused() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    with pytest.raises(ModelError, match="not of a Linear"):
        KeyMap(nn.Linear(2, 2), optimizer)  # type: ignore[arg-type]
    for options in ({"padding_idx": 0}, {"max_norm": 1.0}):
        with pytest.raises(ModelError, match="no padding_idx and no max_norm"):
            KeyMap(nn.Embedding(2, DIM, **options), optimizer)
    keys = KeyMap(nn.Embedding(2, DIM), [], rows_max=5)
    assert keys.rows(torch.tensor([1, 2, 3, 4, 5])).max() == 4
    with pytest.raises(ModelError, match="of 5 rows is full: free keys, or raise rows_max, which is 5"):
        keys.rows(torch.tensor([6]))
    with pytest.raises(ModelError, match=r"keys have dtype torch\.float32"):
        keys.rows(torch.ones(1))
    with pytest.raises(ModelError, match="the key map has row 4, and the table 2 rows"):
        KeyMap(nn.Embedding(2, DIM), []).load_state_dict(keys.state_dict())
    model = Model()
    optimizer = torch.optim.SGD(model.parameters())
    for named, complaint in (({"itme": KeyMap(model.item, optimizer)}, "names module 'itme'"), ({"item": keys}, "another")):
        with pytest.raises(ModelError, match=complaint):
            ekko.torch.track(model, optimizer, Replica(), {"item": "items"}, keys=named)


def test_rows_that_an_optimizer_does_not_know_are_not_forgotten_by_it() -> None:
    forget_rows(torch.optim.SGD(nn.Linear(1, 1).parameters()), nn.Parameter(torch.zeros(2, 2)), torch.tensor([1]))
