"""What is published while links are narrow: a skewed trace, with a significance for each update, drawn once from a seed.

A model of 50,000 rows of 128 floats gets 2,000 updates a second, in steps of 50 ms. By the skew of `sim_cluster.traces` they go
to a working set that drifts slowly; each of its rows changes every few seconds, so at 8 % of the bandwidth there is something
to coalesce within a minute, as in a model that trains for hours. How much an update matters is lognormal, as norms of
gradients are, and independent of its row: nothing that is learnt of rows helps to guess it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ekko.model import ModelSpec, TableSpec
from sim_cluster.traces import Trace, record, skewed

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

# The k of the k-th percentile that tells what is significant.
K = 99
# Standard deviation of the logarithm of an update's significance.
SPREAD = 1.0
# Its 99th percentile: exp of SPREAD times the 99th percentile of a standard normal variable.
THRESHOLD = math.exp(2.3263478740408408 * SPREAD)
CLASSES_PER_OCTAVE = 8
FIRST_SIGNIFICANT = 128
TABLE = "rows"


@dataclass(frozen=True)
class Load:
    """How large it is."""

    rows: int = 50_000
    dim: int = 128
    updates_per_s: float = 2_000.0
    step_ms: int = 50
    trace_s: float = 900.0
    seed: int = 1

    @cached_property
    def trace(self) -> Trace:
        """Which rows, in which step."""
        options = skewed(self.rows, self.updates_per_s, self.seed, duration_s=1.0).options
        return record(replace(options, step_ms=self.step_ms, duration_s=self.trace_s))

    @cached_property
    def significance(self) -> F32:
        """float32[updates], in the order of the trace's keys."""
        rng = np.random.default_rng(self.seed + 1_000)
        return np.exp(rng.normal(0.0, SPREAD, len(self.trace.keys))).astype(np.float32)

    @property
    def model(self) -> ModelSpec:
        """One table."""
        return ModelSpec("congestion", 64, {TABLE: TableSpec(TABLE, self.dim)})

    @property
    def row_bytes(self) -> int:
        """Key, stamp and values."""
        return 16 + 4 * self.dim

    def steps(self) -> Iterator[tuple[int, U64, F32]]:
        """(milliseconds since the beginning, keys ascending, significance) of each step that updates anything."""
        trace = self.trace
        for step in range(trace.steps):
            begin, end = int(trace.starts[step]), int(trace.starts[step + 1])
            if end > begin:
                yield step * self.step_ms, trace.keys[begin:end].astype(np.uint64), self.significance[begin:end]


def classes_of(significance: F32) -> NDArray[np.uint8]:
    """uint8[n]: the class of each on the wire, relative to the threshold as it is in the long run."""
    classes = FIRST_SIGNIFICANT + np.round(CLASSES_PER_OCTAVE * np.log2(significance / THRESHOLD))
    return np.clip(classes, 1, 254).astype(np.uint8)
