"""The batches that every side publishes, made from their number alone, so that any process can make them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

# Blocks of values that batches take in turn. As many as fit neither side's caches better than the other's.
BLOCKS = 32


@dataclass(frozen=True, slots=True)
class Load:
    """`table_rows` keys 0, 1, 2 ..., published in one fixed random order, `batch_rows` at a time, again and again."""

    table_rows: int
    batch_rows: int
    dim: int

    @property
    def cycle(self) -> int:
        """Batches until every key was published once."""
        return self.table_rows // self.batch_rows

    def batches(self) -> "Batches":
        """The batches themselves; takes a moment."""
        rng = np.random.default_rng(7)
        keys = rng.permutation(self.table_rows).astype(np.uint64)[: self.cycle * self.batch_rows]
        blocks = rng.standard_normal((BLOCKS, self.batch_rows, self.dim), dtype=np.float32)
        return Batches(keys.reshape(self.cycle, self.batch_rows), blocks)


@dataclass(frozen=True, slots=True)
class Batches:
    """keys: uint64[cycle, batch_rows], each key once; blocks: float32[BLOCKS, batch_rows, dim].

    The values differ from round to round: else what one round left behind could pass for what the next one lost.
    """

    keys: U64
    blocks: F32
    round: int = 0

    def keys_of(self, number: int) -> U64:
        """uint64[batch_rows] of the batch `number`, counted from 0; no key comes twice."""
        keys: U64 = self.keys[number % len(self.keys)]
        return keys

    def rows_of(self, number: int) -> F32:
        """float32[batch_rows, dim] of the batch."""
        rows: F32 = self.blocks[(number + self.round) % BLOCKS]
        return rows

    def newest(self, number: int) -> Iterator[int]:
        """The last batches up to `number` that touch different keys: what a replica must hold after `number`."""
        yield from range(number, max(-1, number - len(self.keys)), -1)
