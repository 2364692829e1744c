"""Kernels of the optimisers: one step of some rows, in place. What each computes is told in `ekko.train.optimizers.specs`.

Every operation is a float32 one, in the order in which torch does it on a processor, and rounded where torch rounds: a product
and a sum are one operation (`fused`) where torch's `add` and BLAS's `axpy` fuse them, and two where torch writes the product
first. So the bits are torch's, on any processor on which torch fuses. Loops have no branch but on arguments, and become vector
instructions; no operation's result depends on how many fit into one.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from ekko.store.kernels.compile import inline_kernel, kernel

F32 = NDArray[np.float32]
Float: TypeAlias = Any  # a float32

_ROWS = "float32[:, ::1]"
_GRADIENTS = "Array(float32, 2, 'C', readonly=True)"
_NONE, _ONE = np.float32(0), np.float32(1)
# Squares of a row are added in so many sums, then these in pairs: a fixed order, which vector instructions can keep.
_LINES = 16


def _fused(typing_context: Any, left: Any, right: Any, added: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


_intrinsic: Callable[[Any], Any] = intrinsic
fused = _intrinsic(_fused)  # left * right + added, rounded once


@kernel(f"void({_ROWS}, {_GRADIENTS}, float32, float32)")
def sgd(weights: F32, gradients: F32, rate: Float, decay: Float) -> None:
    """`rate` and `decay` as in `specs.SGD`."""
    values, slopes = weights.reshape(-1), gradients.reshape(-1)
    for i in range(values.size):
        values[i] = fused(fused(values[i], decay, slopes[i]), -rate, values[i])


@kernel(f"void({_ROWS}, {_ROWS}, {_GRADIENTS}, float32, float32, float32, boolean)")
def momentum(weights: F32, state: F32, gradients: F32, rate: Float, decay: Float, kept: Float, ahead: bool) -> None:
    """`state`: the running sum of gradients. `ahead`: Nesterov's."""
    values, sums, slopes = weights.reshape(-1), state.reshape(-1), gradients.reshape(-1)
    for i in range(values.size):
        slope = fused(values[i], decay, slopes[i])
        total = sums[i] * kept + slope
        sums[i] = total
        values[i] = fused(fused(total, kept, slope) if ahead else total, -rate, values[i])


@kernel(f"void({_ROWS}, {_ROWS}, {_GRADIENTS}, float32, float32, float32)")
def adagrad(weights: F32, state: F32, gradients: F32, rate: Float, decay: Float, epsilon: Float) -> None:
    """`state`: the sum of squares of each value's gradients."""
    values, sums, slopes = weights.reshape(-1), state.reshape(-1), gradients.reshape(-1)
    for i in range(values.size):
        slope = fused(values[i], decay, slopes[i])
        total = sums[i] + slope * slope
        sums[i] = total
        values[i] = fused(slope / (np.sqrt(total) + epsilon), -rate, values[i])


@inline_kernel
def _sum_of_squares(values: F32, slopes: F32, decay: Float, lines: F32) -> Float:
    whole = values.size // _LINES * _LINES
    lines[:] = _NONE
    for i in range(0, whole, _LINES):
        for line in range(_LINES):
            slope = fused(values[i + line], decay, slopes[i + line])
            lines[line] += slope * slope
    for i in range(whole, values.size):
        slope = fused(values[i], decay, slopes[i])
        lines[i - whole] += slope * slope
    half = _LINES // 2
    while half:
        for line in range(half):
            lines[line] += lines[line + half]
        half //= 2
    return lines[0]


@kernel(f"void({_ROWS}, {_ROWS}, {_GRADIENTS}, float32, float32, float32)")
def rowwise_adagrad(weights: F32, state: F32, gradients: F32, rate: Float, decay: Float, epsilon: Float) -> None:
    """`state`: float32[n, 1], the sum over steps of the mean of squares of a row's gradient."""
    rows, dim = weights.shape
    lines = np.empty(_LINES, np.float32)
    for row in range(rows):
        total = state[row, 0] + _sum_of_squares(weights[row], gradients[row], decay, lines) / np.float32(dim)
        state[row, 0] = total
        row_rate = rate / (np.sqrt(total) + epsilon)
        for i in range(dim):
            slope = fused(weights[row, i], decay, gradients[row, i])
            weights[row, i] = fused(slope, -row_rate, weights[row, i])


@inline_kernel
def _adam_row(
    values: F32, means: F32, squares: F32, slopes: F32, rate: Float, decay: Float, new1: Float, new2: Float, epsilon: Float
) -> None:
    for i in range(values.size):
        slope = fused(values[i], decay, slopes[i])
        mean = means[i] + (slope - means[i]) * new1
        square = squares[i] + (slope * slope - squares[i]) * new2
        means[i], squares[i] = mean, square
        values[i] += -rate * (mean / (np.sqrt(square) + epsilon))


@kernel(f"void({_ROWS}, {_ROWS}, {_GRADIENTS}, float32, float32, float32, float32, float32)")
def adam(weights: F32, state: F32, gradients: F32, rate: Float, decay: Float, new1: Float, new2: Float, epsilon: Float) -> None:
    """`state`: float32[n, 2 dim], means of gradients, then means of their squares. `new1`, `new2`: 1 - beta of each."""
    rows, dim = weights.shape
    for row in range(rows):
        _adam_row(weights[row], state[row, :dim], state[row, dim : 2 * dim], gradients[row], rate, decay, new1, new2, epsilon)


@kernel(f"void({_ROWS}, {_ROWS}, {_GRADIENTS}, float64, float32, float64, float64, float32)")
def adam_of_row_steps(
    weights: F32, state: F32, gradients: F32, rate: Float, decay: Float, beta1: Float, beta2: Float, epsilon: Float
) -> None:
    """The same with a last column in `state`: how many steps the row had."""
    rows, dim = weights.shape
    new1, new2 = np.float32(1.0 - beta1), np.float32(1.0 - beta2)
    for row in range(rows):
        # Beyond 2**24 a float32 counts no further. By then the corrections have long been 1.
        steps = state[row, 2 * dim] + _ONE
        state[row, 2 * dim] = steps
        bias1, bias2 = 1.0 - beta1 ** np.float64(steps), 1.0 - beta2 ** np.float64(steps)
        row_rate = np.float32(rate * np.sqrt(bias2) / bias1)
        _adam_row(
            weights[row], state[row, :dim], state[row, dim : 2 * dim], gradients[row], row_rate, decay, new1, new2, epsilon
        )


@inline_kernel
def _ftrl_row(values: F32, squares: F32, held: F32, slopes: F32, rate: Float, beta: Float, lasso: Float, ridge: Float) -> None:
    for i in range(values.size):
        value, slope = values[i], slopes[i]
        total = squares[i] + slope * slope
        strength = (beta + np.sqrt(total)) / rate + ridge
        moved = value - slope / strength
        # From zero, or through it: what the weight would be without the bound, times the strength.
        pull = held[i] - slope if value == _NONE else (value * strength + np.copysign(lasso, value)) - slope
        beyond = abs(pull) - lasso
        beyond = beyond if beyond > _NONE else _NONE
        stays = value * moved > _NONE
        moved = moved if stays else np.copysign(beyond, pull) / strength + _NONE  # a zero has one sign
        squares[i], values[i] = total, moved
        held[i] = pull if moved == _NONE else _NONE


@kernel(f"void({_ROWS}, {_ROWS}, {_GRADIENTS}, float32, float32, float32, float32)")
def ftrl(weights: F32, state: F32, gradients: F32, rate: Float, beta: Float, lasso: Float, ridge: Float) -> None:
    """`state`: float32[n, 2 dim], sums of squares, then what is held back of weights that are zero."""
    rows, dim = weights.shape
    for row in range(rows):
        _ftrl_row(weights[row], state[row, :dim], state[row, dim : 2 * dim], gradients[row], rate, beta, lasso, ridge)
