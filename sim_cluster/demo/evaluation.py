"""Figures of the demo: AUC, log-loss, and how sure a difference is.

The bootstrap is paired: each resample of the events scores all models, so that what makes events hard or easy cancels out of
the difference. An AUC of a resample needs no new sort, since a resample only weighs the events anew.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

RESAMPLES: Final = 1_000
CONFIDENCE: Final = 0.95
PROBABILITY_MIN: Final = 1e-6  # a certain and wrong prediction would cost infinity

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Gain:
    """How much higher one model's AUC is than another's, with the bounds of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def auc(labels: Floats, scores: Floats) -> float:
    """The probability that a random positive event scores above a random negative one, ties counting half.

    Args:
        labels: float32[n], 0 or 1.
        scores: float32[n].

    Returns:
        From 0 to 1; NaN where one of the two kinds is missing.
    """
    order = np.argsort(scores)
    return float(_weighted_auc(labels, scores, order, np.ones(len(labels))))


def log_loss(labels: Floats, scores: Floats) -> float:
    """Mean of -log(probability given to what happened)."""
    likely = np.where(labels > 0, scores, 1 - scores).astype(np.float64)
    return float(-np.log(np.clip(likely, PROBABILITY_MIN, 1)).mean())


def resampled_aucs(labels: Floats, scores: NDArray[np.float32], groups: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """AUCs of several models over the same 1,000 resamples of the events.

    Args:
        labels: float32[n].
        scores: float32[models, n].
        groups: int64[n]: events with one number are drawn together; `arange(n)` draws events one by one.
        seed: of the resampling.

    Returns:
        float64[RESAMPLES, models].
    """
    orders = np.argsort(scores, axis=1)
    members = np.unique(groups, return_inverse=True)[1]
    count = int(members.max()) + 1
    rng = np.random.default_rng(seed)
    values = np.empty((RESAMPLES, len(scores)))
    for resample in range(RESAMPLES):
        drawn = np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64)
        values[resample] = _weighted_aucs(labels, scores, orders, drawn[members])
    return values


def gain(better: NDArray[np.float64], other: NDArray[np.float64]) -> Gain:
    """The difference of two models' resampled AUCs, float64[RESAMPLES] each."""
    differences = better - other
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(differences, [tail, 100 - tail])
    return Gain(float(np.nanmean(differences)), float(low), float(high))


def auc_over_time(labels: Floats, scores: Floats, window: int, points: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """AUC within a sliding window.

    Returns:
        int64[points]: the number of events up to the window's end; float64[points]: its AUC.
    """
    ends = np.unique(np.linspace(min(window, len(labels)), len(labels), points).astype(np.int64))
    return ends, np.array([auc(labels[max(0, end - window) : end], scores[max(0, end - window) : end]) for end in ends])


@njit(nogil=True, cache=True)
def _weighted_auc(labels, scores, order, weights):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """AUC where event i counts `weights[i]` times; `order` sorts `scores` upwards."""
    below = 0.0  # weight of negatives with a lower score
    won = 0.0
    positives = 0.0
    place = 0
    while place < len(order):
        value = scores[order[place]]
        tied_negatives = 0.0
        tied_positives = 0.0
        while place < len(order) and scores[order[place]] == value:
            event = order[place]
            if labels[event] > 0:
                tied_positives += weights[event]
            else:
                tied_negatives += weights[event]
            place += 1
        won += tied_positives * (below + 0.5 * tied_negatives)
        positives += tied_positives
        below += tied_negatives
    pairs = positives * below
    return won / pairs if pairs > 0 else np.nan


@njit(nogil=True, cache=True)
def _weighted_aucs(labels, scores, orders, weights):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """`_weighted_auc` of each row of `scores`."""
    values = np.empty(len(scores))
    for row in range(len(scores)):
        values[row] = _weighted_auc(labels, scores[row], orders[row], weights)
    return values
