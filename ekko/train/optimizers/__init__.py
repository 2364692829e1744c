"""What a training step does to rows: gradients become one sum a key, and an optimiser moves the rows by it.

Importing this compiles the kernels, or loads them from the cache, so that no step waits for a compiler.
"""

from ekko.train.optimizers.aggregation import aggregate
from ekko.train.optimizers.initial import INITIALIZERS, Constant, Initializer, Normal, Uniform, Zeros, initializer_of
from ekko.train.optimizers.specs import (
    FTRL,
    OPTIMIZERS,
    SGD,
    Adagrad,
    Adam,
    Momentum,
    Optimizer,
    RowwiseAdagrad,
    optimizer_of,
)

__all__ = [
    "FTRL",
    "INITIALIZERS",
    "OPTIMIZERS",
    "SGD",
    "Adagrad",
    "Adam",
    "Constant",
    "Initializer",
    "Momentum",
    "Normal",
    "Optimizer",
    "RowwiseAdagrad",
    "Uniform",
    "Zeros",
    "aggregate",
    "initializer_of",
    "optimizer_of",
]
