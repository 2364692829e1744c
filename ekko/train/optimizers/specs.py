"""What an optimiser is to the rows of a table: its settings, the state that it keeps of each row, and one step.

A step changes the rows that have a gradient, and no others: what torch does for sparse gradients with SGD, Adagrad and
SparseAdam. Where torch would move the other rows too (momentum, weight decay), momentum and decay act on a row in the steps
that touch it, as if each row were a parameter of its own whose `grad` is None in all others.

Sources: Duchi et al., "Adaptive Subgradient Methods" (2011); Kingma and Ba, "Adam" (2015); McMahan et al., "Ad Click
Prediction: a View from the Trenches" (2013) for FTRL-proximal; the row-wise Adagrad of FBGEMM. Decision 0058 tells how near
each is to torch's.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ConfigError, ModelError
from ekko.train.optimizers import updates
from ekko.train.optimizers.settings import Bounds, check, chosen, number, numbers

F32 = NDArray[np.float32]
Steps = Literal["table", "row"]

_RATE = Bounds(above=0, most=1e6)
_FROM_0 = Bounds(least=0, most=1e6)
_SHARE = Bounds(least=0, below=1)
# A float32 that is added to a root and divided by: so small a one would be lost, or make the quotient infinite.
_EPSILON = Bounds(least=0, most=1.0)


@dataclass(frozen=True, slots=True)
class Optimizer(ABC):
    """Settings of one optimiser. Equal settings compare equal, and compute the same bits."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Raises ConfigError where a setting is not what it may be."""
        check(f"optimizer {self.name!r}", self)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, defaults too, as `optimizer_of` takes them."""
        return {"name": self.name} | {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @property
    def needs_step(self) -> bool:
        """Whether `apply` has to be told which step of the table it is."""
        return False

    @abstractmethod
    def state_dim(self, dim: int) -> int:
        """How many float32 of state a row of `dim` values has; 0: none."""

    def initial_state(self, weights: F32) -> F32:
        """State of rows that had no step yet.

        Args:
            weights: float32[n, dim]: what the rows begin with.

        Returns:
            float32[n, state_dim(dim)], new.
        """
        return np.zeros((len(weights), self.state_dim(weights.shape[1])), np.float32)

    def apply(self, weights: F32, state: F32, gradients: F32, *, step: int = 1, rate: float = 1.0) -> None:
        """One step of some rows, in place. Does not hold the interpreter's lock; n rows, no key twice among them.

        Args:
            weights: float32[n, dim], C-contiguous; changed.
            state: float32[n, state_dim(dim)], C-contiguous; changed.
            gradients: float32[n, dim], C-contiguous, finite: what is not, makes rows that are not.
            step: the table's step, from 1: of all steps of the table, whichever rows they had. Only `needs_step` looks at it.
            rate: what the learning rate is multiplied by, for schedules.

        Raises:
            ModelError: arrays that do not fit; nothing is changed.
        """
        if step < 1 or not 0 <= rate < math.inf:
            raise ModelError(f"step is {step!r} and rate {rate!r}: expected a step from 1, and a finite factor from 0")
        wanted = {"weights": weights.shape, "gradients": weights.shape}
        if weights.ndim == 2:
            wanted["state"] = (len(weights), self.state_dim(weights.shape[1]))
        for what, array in {"weights": weights, "gradients": gradients, "state": state}.items():
            fits = array.ndim == 2 and array.shape == wanted[what] and array.dtype == np.float32
            if not fits or not array.flags.c_contiguous or not array.flags.aligned:
                expected = list(wanted.get(what, ["n", "dim"]))
                raise ModelError(f"{what} are {array.dtype}{list(array.shape)}: expected contiguous float32{expected}")
        if not weights.flags.writeable or not state.flags.writeable:
            raise ModelError("weights or state are a read-only array: expected ones to change; use .copy()")
        if weights.size:
            self._update(weights, state, gradients, step, rate)

    @abstractmethod
    def _update(self, weights: F32, state: F32, gradients: F32, step: int, rate: float) -> None:
        """`apply` with arguments that fit."""


@dataclass(frozen=True, slots=True)
class SGD(Optimizer):
    """`torch.optim.SGD`: w -= lr (g + weight_decay w). No state."""

    name = "sgd"

    lr: float = number(0.01, _RATE)
    weight_decay: float = number(0.0, _FROM_0)

    def state_dim(self, dim: int) -> int:
        return 0

    def _update(self, weights: F32, state: F32, gradients: F32, step: int, rate: float) -> None:
        updates.sgd(weights, gradients, self.lr * rate, self.weight_decay)


@dataclass(frozen=True, slots=True)
class Momentum(Optimizer):
    """`torch.optim.SGD` with momentum, of each row alone: m = momentum m + g, w -= lr m. State: m."""

    name = "momentum"

    lr: float = number(0.01, _RATE)
    momentum: float = number(0.9, _SHARE)
    nesterov: bool = False
    weight_decay: float = number(0.0, _FROM_0)

    def state_dim(self, dim: int) -> int:
        return dim

    def _update(self, weights: F32, state: F32, gradients: F32, step: int, rate: float) -> None:
        updates.momentum(weights, state, gradients, self.lr * rate, self.weight_decay, self.momentum, self.nesterov)


@dataclass(frozen=True, slots=True)
class Adagrad(Optimizer):
    """`torch.optim.Adagrad`: s += g^2, w -= lr g / (sqrt(s) + eps). State: s. For `lr_decay` use the `rate` of `apply`."""

    name = "adagrad"

    lr: float = number(0.01, _RATE)
    eps: float = number(1e-10, _EPSILON)
    initial_accumulator: float = number(0.0, _FROM_0)
    weight_decay: float = number(0.0, _FROM_0)

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        _check_divisor(self.name, self.eps, self.initial_accumulator)

    def state_dim(self, dim: int) -> int:
        return dim

    def initial_state(self, weights: F32) -> F32:
        return np.full(weights.shape, self.initial_accumulator, np.float32)

    def _update(self, weights: F32, state: F32, gradients: F32, step: int, rate: float) -> None:
        updates.adagrad(weights, state, gradients, self.lr * rate, self.weight_decay, self.eps)


@dataclass(frozen=True, slots=True)
class RowwiseAdagrad(Optimizer):
    """FBGEMM's exact row-wise Adagrad: s += mean(g^2), w -= lr g / (sqrt(s) + eps). State: s, one number a row."""

    name = "rowwise_adagrad"

    lr: float = number(0.01, _RATE)
    eps: float = number(1e-8, _EPSILON)
    initial_accumulator: float = number(0.0, _FROM_0)
    weight_decay: float = number(0.0, _FROM_0)

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        _check_divisor(self.name, self.eps, self.initial_accumulator)

    def state_dim(self, dim: int) -> int:
        return 1

    def initial_state(self, weights: F32) -> F32:
        return np.full((len(weights), 1), self.initial_accumulator, np.float32)

    def _update(self, weights: F32, state: F32, gradients: F32, step: int, rate: float) -> None:
        updates.rowwise_adagrad(weights, state, gradients, self.lr * rate, self.weight_decay, self.eps)


@dataclass(frozen=True, slots=True)
class Adam(Optimizer):
    """`torch.optim.SparseAdam`. State: means of gradients, then means of their squares; with `steps = "row"` then a count.

    `steps` says what corrects the bias of means that began with zero: "table", the number of steps of the whole table as with
    torch, which the caller keeps and says; or "row", that of the steps that the row had, kept with its state, so that a key
    that comes late begins with steps as small as the first ones did. "row" is what torch computes where each row is a
    parameter.
    """

    name = "adam"

    lr: float = number(0.001, _RATE)
    betas: tuple[float, float] = numbers((0.9, 0.999), _SHARE)
    eps: float = number(1e-8, Bounds(above=0, most=1.0))
    weight_decay: float = number(0.0, _FROM_0)
    steps: Steps = "table"

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        if self.steps not in get_args(Steps):
            raise ConfigError(f"optimizer 'adam''s steps is {self.steps!r}: expected 'table' or 'row'")

    @property
    def needs_step(self) -> bool:
        return self.steps == "table"

    def state_dim(self, dim: int) -> int:
        return 2 * dim + (self.steps == "row")

    def _update(self, weights: F32, state: F32, gradients: F32, step: int, rate: float) -> None:
        beta1, beta2 = self.betas
        if self.steps == "row":
            args = (self.lr * rate, self.weight_decay, beta1, beta2, self.eps)
            updates.adam_of_row_steps(weights, state, gradients, *args)
        else:
            step_rate = self.lr * rate * math.sqrt(1 - beta2**step) / (1 - beta1**step)
            updates.adam(weights, state, gradients, step_rate, self.weight_decay, 1 - beta1, 1 - beta2, self.eps)


@dataclass(frozen=True, slots=True)
class FTRL(Optimizer):
    """FTRL-proximal, of each value alone: a weight is zero until the pull of its gradients is stronger than `l1`.

    The papers keep z and n, and work the weight out of both: n += g^2; z += g - (sqrt(n) - sqrt(n before)) w / lr; w = 0 where
    |z| <= l1, else -(z - sign(z) l1) / s, with s = (beta + sqrt(n)) / lr + l2. The same weights, put otherwise: one that keeps
    its sign moves by -g / s, and z says no more than the weight does but where that is zero. So the state is n, then -z where
    the weight is zero and 0 elsewhere. It belongs to whatever the weight is: a row that begins other than zero, is loaded from
    elsewhere or was taken back by a rollback goes on from what it is, and a small step is not lost beside a large z.
    """

    name = "ftrl"

    lr: float = number(0.1, _RATE)
    beta: float = number(1.0, _FROM_0)
    l1: float = number(0.0, _FROM_0)
    l2: float = number(0.0, _FROM_0)
    initial_accumulator: float = number(0.0, _FROM_0)

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        if not self.beta + self.initial_accumulator > 0:
            raise ConfigError(
                "optimizer 'ftrl' has beta = 0 and initial_accumulator = 0: a value without gradient would be 0 / 0; "
                "expected one of them above 0"
            )

    def state_dim(self, dim: int) -> int:
        return 2 * dim

    def initial_state(self, weights: F32) -> F32:
        dim = weights.shape[1]
        state = np.zeros((len(weights), 2 * dim), np.float32)
        state[:, :dim] = self.initial_accumulator
        return state

    def _update(self, weights: F32, state: F32, gradients: F32, step: int, rate: float) -> None:
        updates.ftrl(weights, state, gradients, self.lr * rate, self.beta, self.l1, self.l2)


OPTIMIZERS: Mapping[str, type[Optimizer]] = {one.name: one for one in (SGD, Momentum, Adagrad, RowwiseAdagrad, Adam, FTRL)}


def optimizer_of(settings: object) -> Optimizer:
    """An optimiser of a mapping such as `{"name": "adagrad", "lr": 0.1}`.

    Raises:
        ConfigError: one line: what is wrong, and what was expected.
    """
    return chosen("optimizer", OPTIMIZERS, settings)


def _check_divisor(name: str, epsilon: float, accumulator: float) -> None:
    if not np.float32(epsilon) + np.float32(accumulator) > 0:
        raise ConfigError(
            f"optimizer {name!r} has eps = {epsilon:g} and initial_accumulator = {accumulator:g}: a value without gradient "
            "would be 0 / 0; expected one of them above 0"
        )
