"""The model of the demo and how it learns: once offline, then from the stream.

The settings were chosen once, on the first 60 % of MovieLens alone (trained on its first 36,000 events, scored one by one on
the next 24,000); the stream on which the demo reports has had no say in them.
"""

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ekko.zoo import DLRM, DLRMOptions
from sim_cluster.demo.data import Events

DIM: Final = 16
EMBEDDING_RATE: Final = 0.1  # Adagrad's; rows are touched seldom and have to move when they are
DENSE_RATE: Final = 0.02
EPOCHS: Final = 2  # a third one made events it had not seen worse
OFFLINE_BATCH: Final = 256
STREAM_BATCH: Final = 16  # events of one step while streaming: 32 ms of the default rate
STREAM_BATCH_MAX: Final = 64  # the same for a trainer that has fallen behind


def shape_of(events: Events) -> DLRMOptions:
    """The model's shape for this data."""
    return DLRMOptions(rows=dict(events.rows), dense=events.dense.shape[1], dim=DIM)


class Inputs:
    """Events as tensors that share the arrays' memory."""

    def __init__(self, events: Events) -> None:
        self.dense = torch.from_numpy(events.dense)
        self.ids = {name: torch.from_numpy(ids) for name, ids in events.ids.items()}
        self.labels = torch.from_numpy(events.labels)


class Learner:
    """A DLRM, its optimizer and the events it learns from.

    Args:
        events: all events; which of them are learnt, and when, is the caller's choice.
        seed: of the initial weights and of the offline order.
    """

    def __init__(self, events: Events, seed: int) -> None:
        torch.manual_seed(seed)
        # Torch wants it said aloud: our sparse gradients come from nn.Embedding alone.
        torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
        self._inputs = Inputs(events)
        self._rng = np.random.default_rng(seed)
        self.model = DLRM(shape_of(events))
        tables = list(self.model.tables.parameters())
        dense = [*self.model.bottom.parameters(), *self.model.top.parameters()]
        groups = [{"params": tables, "lr": EMBEDDING_RATE}, {"params": dense, "lr": DENSE_RATE}]
        self.optimizer = torch.optim.Adagrad(groups)

    def train_offline(self, count: int, progress: Callable[[float], None] = lambda _: None) -> None:
        """Learn the first `count` events in several passes, the last one in their own order.

        Args:
            count: how many.
            progress: told the fraction done, now and then.
        """
        batches = list(self._offline_batches(count))
        for done, batch in enumerate(batches, start=1):
            self._step(batch)
            progress(done / len(batches))

    def learn(self, first: int, last: int) -> None:
        """One step on the events [first, last)."""
        self._step(slice(first, last))

    def _offline_batches(self, count: int) -> Iterator[Tensor]:
        for epoch in range(EPOCHS):
            # The stream will come in time order, and so does the last pass: the model meets it as it will be used.
            order = np.arange(count) if epoch == EPOCHS - 1 else self._rng.permutation(count)
            for first in range(0, count, OFFLINE_BATCH):
                yield torch.from_numpy(order[first : first + OFFLINE_BATCH])

    def _step(self, chosen: Tensor | slice) -> None:
        inputs = self._inputs
        self.optimizer.zero_grad()
        logits = self.model(inputs.dense[chosen], {name: ids[chosen] for name, ids in inputs.ids.items()})
        loss = functional.binary_cross_entropy_with_logits(logits, inputs.labels[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
