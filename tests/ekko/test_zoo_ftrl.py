"""FTRL as an optimizer of torch. That its steps are those of the papers is tested with the server's: tests/ekko/train."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch

from ekko.torch.reloading import forget_rows
from ekko.zoo import FTRL


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def linear(l1: float = 0.0, **options: float) -> tuple[torch.nn.Parameter, FTRL]:
    weight = torch.nn.Parameter(torch.zeros(6, 2))
    return weight, FTRL([weight], lr=0.5, l1=l1, **options)


def step(weight: torch.nn.Parameter, optimizer: FTRL, gradient: torch.Tensor) -> None:
    weight.grad = gradient
    optimizer.step()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_do_what_dense_ones_with_zeros_do() -> None:
    """Also where a row occurs twice."""
    (dense, for_dense), (sparse, for_sparse) = linear(4.0), linear(4.0)
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = torch.randint(6, (1, 4), generator=random)
        values = torch.randn(4, 2, generator=random)
        gradient = torch.sparse_coo_tensor(rows, values, (6, 2))
        step(sparse, for_sparse, gradient)
        step(dense, for_dense, gradient.to_dense())
    torch.testing.assert_close(sparse, dense)
    assert (dense == 0).any()
    assert (dense != 0).any()
    held = for_dense.state[dense]["held"]
    assert (held[dense != 0] == 0).all(), "nothing is remembered that the weight says"
    assert (held[dense == 0] != 0).all()


def test_it_finds_a_sparse_solution() -> None:
    """Of twenty features two matter."""
    random = torch.Generator().manual_seed(2)
    weight = torch.nn.Parameter(torch.zeros(20))
    optimizer = FTRL([weight], lr=0.5, l1=80.0)
    for _ in range(300):
        features = torch.randn(32, 20, generator=random)
        labels = (3 * features[:, 0] - 2 * features[:, 7] > 0).float()
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(features @ weight, labels, reduction="sum").backward()
        optimizer.step()
    assert weight.nonzero().reshape(-1).tolist() == [0, 7]
    assert weight[0] > 1
    assert weight[7] < -1


def test_a_checkpoint_goes_on_where_it_was() -> None:
    weight, optimizer = linear(0.1)
    random = torch.Generator().manual_seed(1)
    for _ in range(5):
        step(weight, optimizer, torch.randn(6, 2, generator=random))
    other, for_other = linear(0.1)
    other.data.copy_(weight.data)
    for_other.load_state_dict(deepcopy(optimizer.state_dict()))
    for _ in range(5):
        gradient = torch.randn(6, 2, generator=random)
        step(weight, optimizer, gradient.clone())
        step(other, for_other, gradient.clone())
    assert torch.equal(weight, other)


def test_a_row_that_was_taken_back_goes_on_from_what_it_is() -> None:
    weight, optimizer = linear(initial_accumulator_value=0.25)
    step(weight, optimizer, torch.ones(6, 2))
    with torch.no_grad():
        weight[3] = 0.75
    forget_rows(optimizer, weight, torch.tensor([3]))
    assert optimizer.state[weight]["sum"][3].tolist() == [0.25, 0.25]
    step(weight, optimizer, torch.zeros(6, 2))
    assert weight[3].tolist() == [0.75, 0.75]


def test_the_loss_of_a_closure_is_returned() -> None:
    weight, optimizer = linear()

    def closure() -> float:
        optimizer.zero_grad()
        loss = (weight - 1).square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 12.0
    assert optimizer.step(closure) < 12.0


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"l1": -1.0}, "l1 is -1.0: expected a number from 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": 0.0}, "expected one of them above 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        FTRL([torch.nn.Parameter(torch.zeros(1))], **settings)
