"""Where a worker's gradients come from: modules that have some for the next step, and what they have as one push."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from ekko.model import CODEC_DEFAULT
from ekko.train.arguments import rows_of
from ekko.train.server.wire import F32, U64


class GradientSource(Protocol):
    """What has gradients for the next step; `ekko.torch.PSEmbeddingBag` has."""

    def take(self) -> Iterable[tuple[str, U64, F32]]:
        """Table, uint64[n], float32[n, dim] of all that came since the last call; keys may come twice."""
        ...

    def finite(self, scale: float) -> bool:
        """Whether all that came since then is finite, times `scale`."""
        ...


class Sources:
    """Those of one worker, as long as they live."""

    def __init__(self) -> None:
        self._all: list[weakref.ref[GradientSource]] = []

    def attach(self, source: GradientSource) -> None:
        """Take its gradients, too."""
        self._all.append(weakref.ref(source))

    def finite(self, scale: float) -> bool:
        """Whether all that they have is finite, times `scale`; they have it still."""
        return all(source.finite(scale) for reference in self._all if (source := reference()) is not None)

    def discard(self) -> None:
        """Forget what they have."""
        for _ in self._taken():
            pass

    def take(self, scale: np.float32, dims: Mapping[str, int]) -> dict[str, tuple[U64, F32]]:
        """Table -> uint64[n], float32[n, dim]: what they have, times `scale`. They have it no more, also after an error.

        Raises:
            PublishError: gradients with NaN or infinity.
        """
        parts: dict[str, list[tuple[U64, F32]]] = {}
        for table, keys, values in self._taken():
            parts.setdefault(table, []).append((keys, values if scale == 1 else values * scale))
        columns: dict[str, tuple[U64, F32]] = {}
        for table, own in parts.items():
            keys = own[0][0] if len(own) == 1 else np.concatenate([some for some, _ in own])
            values = own[0][1] if len(own) == 1 else np.concatenate([some for _, some in own])
            columns[table] = keys, rows_of(table, keys, values, dims[table], CODEC_DEFAULT, what="gradients")
        return columns

    def _taken(self) -> Iterable[tuple[str, U64, F32]]:
        self._all = [source for source in self._all if source() is not None]
        for reference in self._all:
            if (source := reference()) is not None:
                yield from source.take()
