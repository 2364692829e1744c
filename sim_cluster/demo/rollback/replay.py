"""What would become of the model if nobody looked: the same trainer on the same feed, without network and without a clock.

It is scored as live, every event before it is learnt, with rows of no age at all; so what the manager is compared with is not
worse for any delay.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sim_cluster.demo.data import Events
from sim_cluster.demo.evaluation import Floats
from sim_cluster.demo.learning import STREAM_BATCH, Learner
from sim_cluster.demo.scoring import Scorer


class LearnerSource:
    """A learner's own parameters, as a reader would show them."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())

    def lookup(self, table: str, keys: NDArray[np.uint64]) -> Floats:
        """float32[n, dim]."""
        rows: Floats = self.dense(f"tables.{table}.weight")[keys.astype(np.int64)]
        return rows

    def dense(self, name: str) -> Floats:
        """A view."""
        return np.asarray(self._parameters[name].detach().numpy())


def unguarded_scores(
    requests: Events, feed: Events, start: int, seed: int, progress: Callable[[float], None] = lambda _: None
) -> Floats:
    """float32[n - start]: predictions of the stream by a model that learns whatever the feed says.

    Args:
        requests: what is predicted, clean.
        feed: what is learnt, event by event the same requests.
        start: all before it is learnt offline.
        seed: of the model.
        progress: told the fraction done, now and then.
    """
    learner = Learner(feed, seed)
    learner.train_offline(start)
    scorer = Scorer(requests, LearnerSource(learner.model))
    scores = np.empty(len(requests) - start, np.float32)
    for first in range(start, len(requests), STREAM_BATCH):
        last = min(first + STREAM_BATCH, len(requests))
        scores[first - start : last - start] = scorer.score(first, last)
        learner.learn(first, last)
        progress((last - start) / len(scores))
    return scores
