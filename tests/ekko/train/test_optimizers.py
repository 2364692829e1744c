"""Optimisers of rows are torch's: to the bit where torch rounds each operation once, and to rounding where it does not."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import optim

from ekko.errors import ConfigError, ModelError
from ekko.train.optimizers import FTRL, OPTIMIZERS, SGD, Adagrad, Adam, Momentum, Optimizer, RowwiseAdagrad, optimizer_of

F32 = NDArray[np.float32]
Params = list[torch.nn.Parameter]

ROWS, DIM, TOUCHED = 8, 19, 3  # 19: a vector instruction's worth, and a rest
STEPS = 10_000


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For tables this small a second thread takes ten times as long, where others wait for the processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exact_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roots as IEEE 754 wants them. MKL, of which torch takes its own, is off by a unit of the last place in 7 of 1000."""

    def sqrt_(tensor: torch.Tensor) -> torch.Tensor:
        values = tensor.numpy()
        np.sqrt(values, out=values)
        return tensor

    monkeypatch.setattr(torch.Tensor, "sqrt_", sqrt_)


def random_steps(steps: int) -> Iterator[tuple[int, NDArray[np.int64], F32]]:
    """Number of each, the rows that it touches, and their gradients, of very different sizes."""
    random = np.random.default_rng(7)
    for step in range(1, steps + 1):
        rows = np.sort(random.choice(ROWS, TOUCHED, replace=False))
        scale = np.exp(random.normal(0, 2, (TOUCHED, 1)))
        yield step, rows, (random.standard_normal((TOUCHED, DIM)) * scale).astype(np.float32)


class Table:
    """Rows and their state, as a server keeps them."""

    def __init__(self, spec: Optimizer) -> None:
        self.spec = spec
        self.weights = np.random.default_rng(3).standard_normal((ROWS, DIM)).astype(np.float32)
        self.state = spec.initial_state(self.weights)

    def apply(self, step: int, rows: NDArray[np.int64], gradients: F32) -> None:
        weights, state = self.weights[rows], self.state[rows]
        self.spec.apply(weights, state, gradients, step=step)
        self.weights[rows], self.state[rows] = weights, state


def after(spec: Optimizer, make: Callable[[Params], optim.Optimizer], steps: int, *, apart: bool) -> tuple[F32, F32]:
    """Our weights and torch's. `apart`: each row is a parameter, else the table is one and gradients are sparse."""
    table = Table(spec)
    start = torch.tensor(table.weights)
    params = [torch.nn.Parameter(row.clone()) for row in start.split(1)] if apart else [torch.nn.Parameter(start.clone())]
    optimizer = make(params)
    for step, rows, gradients in random_steps(steps):
        optimizer.zero_grad()
        values = torch.tensor(gradients)
        if apart:
            for i, row in enumerate(rows):
                params[row].grad = values[i : i + 1].clone()
        else:
            params[0].grad = _sparse(torch.tensor(rows), values)
        optimizer.step()
        table.apply(step, rows, gradients)
    return table.weights, torch.cat([param.detach() for param in params]).numpy()


def _sparse(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    tensor: torch.Tensor = torch.sparse_coo_tensor(rows[None], values, (ROWS, DIM), check_invariants=False, is_coalesced=True)
    return tensor


SPARSE: dict[str, tuple[Optimizer, Callable[[Params], optim.Optimizer]]] = {
    "sgd": (SGD(lr=0.1), lambda params: optim.SGD(params, lr=0.1)),
    "adagrad": (Adagrad(lr=0.1), lambda params: optim.Adagrad(params, lr=0.1)),
    "adagrad_begun": (
        Adagrad(lr=0.1, initial_accumulator=0.1, eps=1e-8),
        lambda params: optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.1, eps=1e-8),
    ),
    "adam": (Adam(lr=0.01), lambda params: optim.SparseAdam(params, lr=0.01)),
    "adam_betas": (Adam(betas=(0.5, 0.9), eps=1e-3), lambda params: optim.SparseAdam(params, betas=(0.5, 0.9), eps=1e-3)),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.usefixtures("exact_roots")
@pytest.mark.parametrize("case", SPARSE)
def test_sparse_steps_give_the_bits_of_torch(case: str) -> None:
    spec, make = SPARSE[case]
    ours, theirs = after(spec, make, STEPS if case in ("sgd", "adagrad", "adam") else STEPS // 10, apart=False)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("case", ["adagrad", "adam"])
def test_with_the_roots_of_mkl_the_difference_is_rounding(case: str) -> None:
    spec, make = SPARSE[case]
    ours, theirs = after(spec, make, STEPS // 10, apart=False)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_momentum_is_that_of_a_parameter_a_row(nesterov: bool, decay: float) -> None:
    spec = Momentum(lr=0.01, nesterov=nesterov, weight_decay=decay)
    ours, theirs = after(
        spec, lambda params: optim.SGD(params, lr=0.01, momentum=0.9, nesterov=nesterov, weight_decay=decay), STEPS, apart=True
    )
    np.testing.assert_array_equal(ours, theirs)


def test_sgd_decays_the_rows_that_it_touches() -> None:
    ours, theirs = after(
        SGD(lr=0.1, weight_decay=0.01), lambda params: optim.SGD(params, lr=0.1, weight_decay=0.01), STEPS, apart=True
    )
    np.testing.assert_array_equal(ours, theirs)


BAD: list[tuple[Any, str]] = [
    ("sgd", "a table such as"),
    ({}, "has no name: expected one of sgd, momentum"),
    ({"name": "lamb"}, "has the name 'lamb': expected one of sgd, momentum"),
    ({"name": "sgd", "momentum": 0.9}, "has no setting 'momentum': it has lr, weight_decay"),
    ({"name": "sgd", "lr": 0}, "lr is 0: expected a number above 0"),
    ({"name": "sgd", "lr": "0.1"}, "lr is '0.1': expected a number"),
    ({"name": "sgd", "lr": True}, "lr is True: expected a number"),
    ({"name": "sgd", "lr": float("nan")}, "lr is nan: expected a number"),
    ({"name": "momentum", "momentum": 1.0}, "momentum is 1.0: expected a number from 0 and below 1"),
    ({"name": "momentum", "nesterov": 1}, "nesterov is 1: expected true or false"),
    ({"name": "adam", "betas": [0.9]}, "betas is .0.9.: expected 2 numbers"),
    ({"name": "adam", "betas": [0.9, 1.0]}, "betas.1. is 1.0: expected a number from 0 and below 1"),
    ({"name": "adam", "steps": "all"}, "steps is 'all': expected 'table' or 'row'"),
    ({"name": "adagrad", "eps": 0}, "eps = 0 and initial_accumulator = 0"),
    ({"name": "ftrl", "beta": 0}, "beta = 0 and initial_accumulator = 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings_get_one_line(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        optimizer_of(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_say_all_and_can_be_read_again(name: str) -> None:
    spec = optimizer_of({"name": name, "lr": 0.5})
    assert spec.settings["lr"] == 0.5
    assert optimizer_of(spec.settings) == spec
    assert spec.state_dim(16) == {"sgd": 0, "momentum": 16, "adagrad": 16, "rowwise_adagrad": 1, "adam": 32, "ftrl": 32}[name]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_that_cannot_be_told_apart_from_none_are_left(name: str) -> None:
    spec = optimizer_of({"name": name})
    nothing = np.empty((0, 4), np.float32)
    spec.apply(nothing, spec.initial_state(nothing), nothing)


def test_arrays_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    spec, rows = Adagrad(), np.ones((2, 4), np.float32)
    state = spec.initial_state(rows)
    bad: list[tuple[Any, Any, Any]] = [
        (rows, state[:, :3], rows),
        (rows, state, rows[:1]),
        (rows, state, rows.astype(np.float64)),
        (np.ones((4, 2), np.float32).T, state, rows),
        (rows[0], state, rows[0]),
    ]
    for weights, own, gradients in bad:
        with pytest.raises(ModelError, match="expected contiguous float32"):
            spec.apply(weights, own, gradients)
    with pytest.raises(ModelError, match="expected a step from 1"):
        spec.apply(rows, state, rows, step=0)
    assert (rows == 1).all()


def test_row_steps_correct_the_bias_of_a_late_row_as_of_an_early_one() -> None:
    spec, rows = Adam(lr=0.1, steps="row"), np.zeros((1, 4), np.float32)
    assert spec.state_dim(4) == 9
    assert not spec.needs_step
    spec.apply(rows, spec.initial_state(rows), np.ones((1, 4), np.float32), step=1_000_000)
    np.testing.assert_allclose(rows, -0.1, rtol=1e-6)


def test_rowwise_adagrad_and_ftrl_move_against_the_gradient() -> None:
    for spec in (RowwiseAdagrad(), FTRL()):
        rows, gradients = np.zeros((2, 17), np.float32), np.ones((2, 17), np.float32)
        spec.apply(rows, spec.initial_state(rows), gradients)
        assert (rows < 0).all()
