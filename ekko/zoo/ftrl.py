"""FTRL-proximal for torch: gradient descent with a rate of its own for each weight, and weights that stay zero.

The intuition: a linear model of millions of crossed features has few examples for most of them. Each weight's rate shrinks with
the gradients that it has had, so that a rare feature still learns fast, and a weight leaves zero only when its gradients
agree enough to beat `l1`: most weights are exactly zero, and cost nothing to keep or to serve.

Source: McMahan et al., "Ad Click Prediction: a View from the Trenches" (2013). The state is kept as in
`ekko.train.optimizers.FTRL`, which tells why, and on a processor the numbers are its numbers.
"""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class FTRL(Optimizer):
    """FTRL-proximal. Gradients may be dense or sparse; where one is zero, or a row has none, nothing changes.

    Args:
        params: as of any optimizer.
        lr: the papers' alpha.
        beta: keeps first steps small.
        l1: how strong the pull of a weight's gradients has to be, summed, before it leaves zero.
        l2: makes steps smaller, as a part of their divisor that does not grow.
        initial_accumulator_value: what sums of squares begin with.
    """

    leaves_zero_gradients = True  # `ekko.torch.track` need not compare tables to know which rows a step has changed

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        beta: float = 1.0,
        l1: float = 0.0,
        l2: float = 0.0,
        initial_accumulator_value: float = 0.0,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr is {lr!r}: expected a number above 0")
        for name, value in (("beta", beta), ("l1", l1), ("l2", l2), ("initial_accumulator_value", initial_accumulator_value)):
            if not value >= 0:
                raise ValueError(f"{name} is {value!r}: expected a number from 0")
        if not beta + initial_accumulator_value > 0:
            raise ValueError("beta and initial_accumulator_value are 0: expected one of them above 0, or steps divide 0 by 0")
        defaults = {"lr": lr, "beta": beta, "l1": l1, "l2": l2, "initial_accumulator_value": initial_accumulator_value}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for weight in group["params"]:
                self._begin(group, weight)

    def _begin(self, group: dict[str, Any], weight: Tensor) -> dict[str, Tensor]:
        """State of a parameter that had no step: as zeros and the accumulator's value it fits whatever the weights are."""
        state: dict[str, Tensor] = self.state[weight]
        state["sum"] = torch.full_like(weight, group["initial_accumulator_value"], memory_format=torch.preserve_format)
        state["held"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; the value of `closure` if there is one, which is called with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(group, weight, weight.grad)
        return loss

    def _step(self, group: dict[str, Any], weight: Tensor, gradient: Tensor) -> None:
        state = self.state[weight] or self._begin(group, weight)  # a group that was added, or a parameter that was reset
        squares, held = state["sum"], state["held"]
        if not gradient.is_sparse:
            _advance(weight, squares, held, gradient, group)
            return
        gradient = gradient.coalesce()
        rows = gradient.indices().unbind()
        some_weights, some_squares, some_held = weight[rows], squares[rows], held[rows]
        _advance(some_weights, some_squares, some_held, gradient.values(), group)
        weight[rows], squares[rows], held[rows] = some_weights, some_squares, some_held


def _advance(weight: Tensor, squares: Tensor, held: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
    """One step of some weights and their state, in place; each operation as in `ekko.train.optimizers.updates.ftrl`."""
    lasso = group["l1"]
    squares.add_(gradient * gradient)
    strength = squares.clone().sqrt_().add_(group["beta"]).div_(group["lr"]).add_(group["l2"])
    moved = weight - gradient / strength
    bound = torch.full_like(weight, lasso).copysign_(weight)
    pull = torch.where(weight == 0, held, weight * strength + bound) - gradient
    beyond = (pull.abs() - lasso).clamp_(min=0).copysign_(pull).div_(strength).add_(0.0)
    stays = weight * moved > 0
    weight.copy_(torch.where(stays, moved, beyond))
    held.copy_(torch.where(weight == 0, pull, 0.0))
