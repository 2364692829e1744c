"""Whatever the optimizer and the module: a batch has the rows that its step changed, and no others. Compared to the bit."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ekko.torch
from ekko.errors import ModelError
from tests.ekko.test_torch import Recorder

ROWS, DIM = 300, 4  # three blocks of due rows


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud: torch warns when Adagrad meets sparse rows


class Model(nn.Module):
    """A table, as an embedding or a bag of it, and a layer on top."""

    def __init__(self, kind: Any = nn.Embedding, **options: Any) -> None:
        super().__init__()
        self.item = kind(ROWS, DIM, **options)
        self.top = nn.Linear(DIM, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.top(self.item(ids.reshape(-1, 2))).square().sum()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adagrad-decay": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p),
    "rmsprop-momentum": lambda p: torch.optim.RMSprop(p, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "sgd-sparse": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum-sparse": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad-sparse": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "sparseadam-sparse": lambda p: torch.optim.SparseAdam(p, lr=0.1),
}
COPIES = {"adagrad", "rmsprop", "sgd", "sgd-sparse", "adagrad-sparse", "sparseadam-sparse"}  # which need none
STEPS = ([3, 3, 5, 299], [3, 140, 3, 141], [299, 298, 128, 127])


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: list[int]) -> None:
    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = model(torch.tensor(ids))
        value.backward()
        return value

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(loss)
    else:
        loss()
        optimizer.step()


def changes(weight: torch.Tensor, before: torch.Tensor) -> set[int]:
    return set((weight.detach().view(torch.int32) != before.view(torch.int32)).any(dim=1).nonzero().reshape(-1).tolist())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_batch_has_the_rows_that_its_step_changed(name: str, kind: Any) -> None:
    model, publisher = Model(kind, sparse=name.endswith("-sparse")), Recorder({"items": DIM})
    tables = [model.item.weight]
    optimizer = OPTIMIZERS[name](tables if "sparse" in name else list(model.parameters()))
    tracker = ekko.torch.track(model, optimizer, publisher, {"item": "items"}, background=False)
    assert tracker._tables["items"].compared == (name not in COPIES)
    for number, ids in enumerate(STEPS):
        before = model.item.weight.detach().clone()
        step(model, optimizer, ids)
        changed = changes(model.item.weight, before)
        assert changed >= set(ids)
        assert set(publisher.steps[number].rows["items"]) == changed
        for row, values in publisher.steps[number].rows["items"].items():
            np.testing.assert_array_equal(values, model.item.weight[row].detach().numpy())
    assert len(publisher.steps) == len(STEPS)
    assert bool(publisher.steps[0].significance) == (name in COPIES), "the node looks how far compared rows move"


def test_an_optimizer_of_yours_is_compared_with() -> None:
    """A subclass may move what it likes."""

    class Drifting(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if self.fails:
                raise ZeroDivisionError
            with torch.no_grad():
                self.param_groups[0]["params"][0][77] += 1

    model, publisher = Model(sparse=True), Recorder({"items": DIM})
    optimizer = Drifting(model.parameters(), lr=0.1)
    ekko.torch.track(model, optimizer, publisher, {"item": "items"}, background=False)
    step(model, optimizer, [3, 5])
    optimizer.fails = True
    with pytest.raises(ZeroDivisionError):
        step(model, optimizer, [4, 4])
    optimizer.fails = False
    step(model, optimizer, [6, 7])
    assert [set(batch.rows["items"]) for batch in publisher.steps] == [{3, 5, 77}, {4, 6, 7, 77}]


def test_rows_whose_gradient_is_zero_stay() -> None:
    model, publisher = Model(sparse=True, padding_idx=7), Recorder({"items": DIM})
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    ekko.torch.track(model, optimizer, publisher, {"item": "items"}, background=False)
    optimizer.zero_grad()
    (model(torch.tensor([3, 7])) + 0 * model.item(torch.tensor([9])).sum()).backward()
    optimizer.step()
    assert set(publisher.steps[0].rows["items"]) == {3}


def test_gradients_of_several_backward_passes_are_one_steps() -> None:
    model, publisher = Model(sparse=True), Recorder({"items": DIM})
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    ekko.torch.track(model, optimizer, publisher, {"item": "items"}, background=False)
    for ids in ([1, 2], [2, 3], [200, 1]):
        model(torch.tensor(ids)).backward()
    assert publisher.steps == []
    norms = model.item.weight.grad.to_dense().abs().sum(dim=1)
    optimizer.step()
    [batch] = publisher.steps
    assert batch.significance["items"] == pytest.approx({row: norms[row].item() for row in (1, 2, 3, 200)})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_gradient_scaler_that_skips_a_step_has_nothing_published(fused: bool, sparse: bool) -> None:
    """Fused optimizers are called all the same, and skip it themselves."""
    if fused and sparse:
        pytest.skip("fused optimizers take dense gradients only")
    model, publisher = Model(sparse=sparse), Recorder({"items": DIM})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ekko.torch.track(model, optimizer, publisher, {"item": "items"}, background=False)
    for number, factor in enumerate((1.0, float("inf"), 1.0)):
        before = model.item.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.tensor([3 + number, 5]))
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert bool(changes(model.item.weight, before)) == (factor == 1.0)
    assert [set(batch.rows["items"]) for batch in publisher.steps] == [{3, 5}, {5}]
    plain = model.item.weight.grad.to_dense()[5].abs().sum().item()
    assert publisher.steps[-1].significance["items"][5] == pytest.approx(plain), "of the gradient that was not scaled"


class Tied(nn.Module):
    """A table that is also the output layer."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.item = nn.Embedding(ROWS, DIM, sparse=sparse)
        self.again = nn.EmbeddingBag(ROWS, DIM, sparse=sparse, mode="sum")
        self.again.weight = self.item.weight
        self.out = nn.Linear(DIM, ROWS, bias=False)
        self.out.weight = self.item.weight

    def forward(self, ids: torch.Tensor, *, dense: bool = True) -> torch.Tensor:
        rows = self.item(ids) + self.again(ids.reshape(-1, 1) + 1)
        return (self.out(rows) if dense else rows).square().sum()


@pytest.mark.parametrize("dense", [False, True])
def test_modules_that_share_a_weight_share_a_table(dense: bool) -> None:
    model, publisher = Tied(sparse=not dense), Recorder({"items": DIM})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tracker = ekko.torch.track(model, optimizer, publisher, {"item": "items", "again": "items"}, 1, background=False)
    assert tracker.dense_names == ()
    before = model.item.weight.detach().clone()
    model(torch.tensor([3, 200]), dense=dense).backward()
    optimizer.step()
    assert set(publisher.steps[0].rows["items"]) == changes(model.item.weight, before)
    assert len(publisher.steps[0].rows["items"]) == (ROWS if dense else 4)
    with pytest.raises(ModelError, match="'item' and 'again' share one weight, and are named with tables 'items' and 'users'"):
        ekko.torch.track(model, optimizer, Recorder({"items": DIM, "users": DIM}), {"item": "items", "again": "users"})


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(ROWS, DIM, sparse=True)
        self.item = nn.EmbeddingBag(ROWS, DIM, sparse=True)
        self.top = nn.Linear(DIM, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.top(self.user(ids) * self.item(ids.reshape(-1, 1))).sum()


def two_optimizers(model: Two) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.SparseAdam([model.user.weight]),
        torch.optim.Adagrad([model.item.weight]),
        torch.optim.AdamW(model.top.parameters()),
    ]


def test_steps_of_several_optimizers_are_one_batch() -> None:
    model, publisher = Two(), Recorder({"users": DIM, "items": DIM})
    optimizers = two_optimizers(model)
    with pytest.raises(ModelError, match="does not have the weight of table 'items'"):
        ekko.torch.track(model, optimizers[0], publisher, {"user": "users", "item": "items"}, background=False)
    tracker = ekko.torch.track(model, optimizers, publisher, {"user": "users", "item": "items"}, 1, background=False)
    for number in range(3):
        model(torch.tensor([number, 200])).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert [{table: set(rows) for table, rows in batch.rows.items()} for batch in publisher.steps] == [
        {"users": {number, 200}, "items": {number, 200}} for number in range(3)
    ]
    assert set(publisher.steps[0].dense) == {"top.weight", "top.bias"}
    assert tracker.counts.steps == 3
    with pytest.raises(ModelError, match="optimizer is an empty list"):
        ekko.torch.track(model, [], publisher, {"user": "users"})


@pytest.mark.parametrize("training", [False, True])
def test_rows_that_a_forward_pass_changes_go_with_the_next_batch(training: bool) -> None:
    model, publisher = Model(sparse=True, max_norm=0.5), Recorder({"items": DIM})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = ekko.torch.track(model, optimizer, publisher, {"item": "items"}, background=False)
    before = model.item.weight.detach().clone()
    if training:
        step(model, optimizer, [3, 5])
    else:
        model(torch.tensor([3, 5]))
        tracker.flush()
    assert changes(model.item.weight, before) == {3, 5} == set(publisher.steps[0].rows["items"])


@pytest.fixture
def compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiled")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_compiled_models_have_the_names_that_they_were_written_with(inner: bool, sparse: bool) -> None:
    model, publisher = Model(sparse=sparse), Recorder({"items": DIM})
    weight = model.item.weight
    if inner:
        model.item = torch.compile(model.item, backend="aot_eager")
    else:
        model = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    tracker = ekko.torch.track(model, optimizer, publisher, {"item": "items"}, 1, background=False)
    assert tracker.dense_names == ("top.weight", "top.bias")
    for ids in STEPS:
        before = weight.detach().clone()
        step(model, optimizer, ids)
        assert set(publisher.steps[-1].rows["items"]) == changes(weight, before) == set(ids)
    ekko.torch.track(model, optimizer, publisher, {"item._orig_mod" if inner else "_orig_mod.item": "items"}, background=False)
