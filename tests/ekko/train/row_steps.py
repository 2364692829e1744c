"""Random steps of a small table, for tests that compare what an optimiser makes of them with what another one does."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import optim

from ekko.train.optimizers import Optimizer
from tests.conftest import PROFILE

F32 = NDArray[np.float32]
Params = list[torch.nn.Parameter]

ROWS, DIM, TOUCHED = 8, 19, 3  # 19: a vector instruction's worth, and a rest
STEPS = 10_000 if PROFILE == "long" else 2_000


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


def ours_and_torchs(
    spec: Optimizer, make: Callable[[Params], optim.Optimizer], steps: int, *, apart: bool = False, sparse: bool = True
) -> tuple[F32, F32]:
    """Our weights and torch's. `apart`: each row is a parameter, else the table is one."""
    table = Table(spec)
    start = torch.tensor(table.weights)
    params = [torch.nn.Parameter(row.clone()) for row in (start.split(1) if apart else [start])]
    optimizer = make(params)
    for step, rows, gradients in random_steps(steps):
        optimizer.zero_grad()
        values = torch.tensor(gradients)
        if apart:
            for i, row in enumerate(rows):
                part = values[i : i + 1].clone()
                params[row].grad = _sparse(torch.zeros(1, dtype=torch.int64), part, 1) if sparse else part
        else:
            params[0].grad = _sparse(torch.tensor(rows), values, ROWS)
            if not sparse:
                params[0].grad = params[0].grad.to_dense()
        optimizer.step()
        table.apply(step, rows, gradients)
    return table.weights, torch.cat([param.detach() for param in params]).numpy()


def _sparse(rows: torch.Tensor, values: torch.Tensor, count: int) -> torch.Tensor:
    size = (count, DIM)
    tensor: torch.Tensor = torch.sparse_coo_tensor(rows[None], values, size, check_invariants=False, is_coalesced=True)
    return tensor
