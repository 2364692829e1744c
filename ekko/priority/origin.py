"""The classes of what is published at this node, once and for all: those who forward a row carry its class unchanged."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.priority.threshold import Percentile
from ekko.store.model_store import ModelStore
from p2p import classes
from p2p.replica import RowColumns

F32 = NDArray[np.float32]

K_DEFAULT: Final = 99.0
WINDOW_S: Final = 60.0
# What a mean remembers: rows of about so many steps.
MEAN_STEPS: Final = 256


class Priorities:
    """Of all models that are published here.

    Args:
        models: live, those there are.
    """

    def __init__(self, models: Mapping[str, ModelStore]) -> None:
        self._models = models
        self._of: dict[int, ModelPriority] = {}

    def classify(
        self, model: ModelStore, columns: Sequence[RowColumns], significance: Sequence[F32 | None], now_ms: int
    ) -> tuple[RowColumns, ...]:
        """As `ModelPriority.classify`, of a step of this model."""
        priority = self._of.get(model.spec.id)
        if priority is None:
            there = {other.spec.id for other in self._models.values()}
            self._of = {number: one for number, one in self._of.items() if number in there}
            priority = self._of[model.spec.id] = ModelPriority()
        return priority.classify(columns, significance, now_ms)


class ModelPriority:
    """Of one model at its origin."""

    def __init__(self, k: float = K_DEFAULT, window_s: float = WINDOW_S) -> None:
        self._percentile = Percentile(k, window_s)
        self._mean = 0.0

    def classify(
        self, columns: Sequence[RowColumns], significance: Sequence[F32 | None], now_ms: int
    ) -> tuple[RowColumns, ...]:
        """The same rows with their classes; of which nothing is known, without.

        Args:
            columns: a step.
            significance: float32[n] for each of them, not negative; NaN or None: not said.
            now_ms: monotonic.
        """
        return tuple(
            section if weights is None else replace(section, priority=self._classes(weights, now_ms))
            for section, weights in zip(columns, significance, strict=True)
        )

    def _classes(self, significance: F32, now_ms: int) -> NDArray[np.uint8]:
        said = np.isfinite(significance)
        known = significance[said]
        out = np.full(significance.size, classes.NOT_KNOWN, np.uint8)
        if known.size:
            mean = float(known.mean())
            self._mean += (mean - self._mean) / MEAN_STEPS if self._mean else mean
            priorities = (known / np.float32(self._mean or 1.0)).astype(np.float32)
            self._percentile.add(priorities, now_ms)
            out[said] = class_of(priorities, self._percentile.threshold)
        return out


def class_of(priorities: F32, threshold: float | None) -> NDArray[np.uint8]:
    """uint8[n]: how far float32[n] is above the threshold; where there is none yet, not known."""
    if threshold is None:
        return np.full(priorities.size, classes.NOT_KNOWN, np.uint8)
    with np.errstate(divide="ignore"):  # the logarithm of 0 is below the least class
        relative = np.log2(priorities / np.float32(threshold)) * classes.PER_DOUBLING
    clipped: F32 = np.clip(np.rint(relative) + classes.SIGNIFICANT, classes.LEAST, classes.MOST)
    return clipped.astype(np.uint8)
