"""What rows begin with: a pure function of (seed, table, key), the same bits on every machine.

So nobody has to store or send a row before its first step: a server, its spare, a server of another life and a worker that
looks at a key that nobody has yet all compute the same. Values come from a counter-based hash; the normal ones by whole
numbers, products, sums and roots alone, since the logarithm and the cosine of one C library are not those of another.

A value depends on its place in the row as well, and not on the row's width: a table that grows wider keeps what it had.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from ekko.errors import ConfigError, ModelError
from ekko.train.optimizers import counters
from ekko.train.optimizers.settings import Bounds, check, chosen, number

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

_VALUE = Bounds(least=-1e6, most=1e6)
_SEED = Bounds(least=0, most=(1 << 63) - 1)  # TOML's largest whole number


@dataclass(frozen=True, slots=True)
class Initializer(ABC):
    """Settings of one initialiser."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Raises ConfigError where a setting is not what it may be."""
        check(f"initializer {self.name!r}", self)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, defaults too, as `initializer_of` takes them."""
        return {"name": self.name} | asdict(self)

    def rows(self, table: str, keys: U64, dim: int) -> F32:
        """Rows of keys that nobody has.

        Args:
            table: name; the rows of two tables with the same settings and keys differ.
            keys: uint64[n], contiguous.
            dim: width of a row.

        Returns:
            float32[n, dim], new, C-contiguous.

        Raises:
            ModelError: keys that are not such an array.
        """
        if keys.ndim != 1 or keys.dtype != np.uint64 or not keys.flags.c_contiguous:
            raise ModelError(f"keys are {keys.dtype}{list(keys.shape)}: expected contiguous uint64[n]")
        rows = np.empty((len(keys), dim), np.float32)
        self._fill(table, keys, rows)
        return rows

    @abstractmethod
    def _fill(self, table: str, keys: U64, rows: F32) -> None:
        """All values of `rows`."""


@dataclass(frozen=True, slots=True)
class Zeros(Initializer):
    """Every value 0."""

    name = "zeros"

    def _fill(self, table: str, keys: U64, rows: F32) -> None:
        rows.fill(0)


@dataclass(frozen=True, slots=True)
class Constant(Initializer):
    """Every value `value`."""

    name = "constant"

    value: float = number(0.0, _VALUE)

    def _fill(self, table: str, keys: U64, rows: F32) -> None:
        rows.fill(self.value)


@dataclass(frozen=True, slots=True)
class Uniform(Initializer):
    """Every value from `low` on and below `high`, in steps of 2**-24 of the distance, all as likely."""

    name = "uniform"

    low: float = number(-0.01, _VALUE)
    high: float = number(0.01, _VALUE)
    seed: int = number(0, _SEED)

    def __post_init__(self) -> None:
        Initializer.__post_init__(self)
        if not self.low < self.high:
            raise ConfigError(f"initializer 'uniform' has low = {self.low:g} and high = {self.high:g}: expected low below high")

    def _fill(self, table: str, keys: U64, rows: F32) -> None:
        counters.fill_uniform(keys, _stream(self.seed, table), self.low, self.high, rows)


@dataclass(frozen=True, slots=True)
class Normal(Initializer):
    """Values of the normal distribution with this mean and standard deviation; none is beyond 8.6 deviations."""

    name = "normal"

    mean: float = number(0.0, _VALUE)
    std: float = number(0.01, Bounds(least=0, most=1e6))
    seed: int = number(0, _SEED)

    def _fill(self, table: str, keys: U64, rows: F32) -> None:
        counters.fill_normal(keys, _stream(self.seed, table), self.mean, self.std, rows)


INITIALIZERS: Mapping[str, type[Initializer]] = {one.name: one for one in (Zeros, Constant, Uniform, Normal)}


def initializer_of(settings: object) -> Initializer:
    """An initialiser of a mapping such as `{"name": "normal", "std": 0.01, "seed": 0}`.

    Raises:
        ConfigError: one line: what is wrong, and what was expected.
    """
    return chosen("initializer", INITIALIZERS, settings)


def _stream(seed: int, table: str) -> np.uint64:
    """Where the numbers of a table begin; the seed is hashed with the name, so that nearby seeds have nothing in common."""
    return np.uint64(xxhash.xxh64_intdigest(table.encode(), seed=0) ^ xxhash.xxh64_intdigest(seed.to_bytes(8, "little")))
