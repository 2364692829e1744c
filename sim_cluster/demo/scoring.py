"""Scoring: the serving half of the model, run on rows that somebody else keeps.

Live scorers and the replays of delayed and frozen state are this very class; they differ in the source of the rows only.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from ekko.zoo import DLRM
from sim_cluster.demo.data import Events
from sim_cluster.demo.learning import shape_of


class Source(Protocol):
    """Where rows come from: an `ekko.Reader`, or a replay."""

    def lookup(self, table: str, keys: NDArray[np.uint64]) -> NDArray[np.float32]:
        """float32[n, dim]; zeros for absent keys."""

    def dense(self, name: str) -> NDArray[np.float32]:
        """The newest value of a dense parameter."""


class Scorer:
    """Predicts events with whatever rows `source` holds at the moment of the call."""

    def __init__(self, events: Events, source: Source) -> None:
        self._source = source
        self._dense = torch.from_numpy(events.dense)
        self._keys = {name: ids.astype(np.uint64) for name, ids in events.ids.items()}
        self._model = DLRM(shape_of(events), with_tables=False).eval()
        self._parameters = dict(self._model.named_parameters())

    def score(self, first: int, last: int) -> NDArray[np.float32]:
        """float32[last - first]: the probability of a positive label, for the events [first, last)."""
        return self.score_some(slice(first, last))

    @torch.no_grad()
    def score_some(self, chosen: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """float32[n]: the same for the events that are chosen, by their numbers or as a slice."""
        for name, parameter in self._parameters.items():
            parameter.copy_(torch.from_numpy(self._source.dense(name)))
        rows = [from_dlpack(self._source.lookup(table, keys[chosen])).cpu() for table, keys in self._keys.items()]
        logits = self._model(self._dense[chosen], embeddings=torch.stack(rows, dim=1))
        return np.asarray(torch.sigmoid(logits).numpy())
