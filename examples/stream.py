"""What the examples share: the demo's events in the order of time, in batches, and the shape of the model that learns them.

The first four fifths of the events are learnt, each once and in order, as a trainer meets them that learns online. The rest is
held out: on it, `examples/compare.py` measures what a serving node answers after an example has ended.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ekko.zoo import DLRMOptions
from sim_cluster.demo.data import load

DIM = 16  # of an embedding row
BATCH = 64  # events of a step
LEARNT = 0.8
ROW_RATE, DENSE_RATE = 0.1, 0.02  # Adagrad's: rows are touched seldom, and have to move when they are


@dataclass(frozen=True)
class Batch:
    """Events: `dense` float32[n, features], `ids` int64[n] of each table, `labels` float32[n]."""

    dense: Tensor
    ids: dict[str, Tensor]
    labels: Tensor

    def __getitem__(self, part: slice) -> "Batch":
        return Batch(self.dense[part], {name: ids[part] for name, ids in self.ids.items()}, self.labels[part])


class Stream:
    """The first `count` events of MovieLens-100K, or of a synthetic stream where that cannot be had; None: all of them."""

    def __init__(self, count: int | None = None) -> None:
        torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud: torch warns when Adagrad meets sparse rows
        events = load()
        columns = {name: torch.from_numpy(ids) for name, ids in events.ids.items()}
        self._all = Batch(torch.from_numpy(events.dense), columns, torch.from_numpy(events.labels))[:count]
        self._learnt = int(len(self._all.labels) * LEARNT) // BATCH * BATCH
        self.name = events.name
        self.shape = DLRMOptions(rows=dict(events.rows), dense=events.dense.shape[1], dim=DIM)
        self.tables = dict.fromkeys(events.rows, DIM)

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """The part that is learnt; of each batch the part of one of several ranks."""
        part = BATCH // ranks
        for first in range(rank * part, self._learnt, BATCH):
            yield self._all[first : first + part]

    @property
    def held_out(self) -> Batch:
        """The part that is not."""
        return self._all[self._learnt :]


def arguments(description: str | None) -> argparse.Namespace:
    """What the examples are called with; and one thread for torch: of steps as small as these, two wait for each other most."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node", help="local endpoint of a training node, such as tcp://127.0.0.1:7700")
    parser.add_argument("servers", nargs="*", help="parameter_server.py: endpoints of parameter servers")
    parser.add_argument("--model", default="ctr", help="the model's name")
    parser.add_argument("--events", type=int, help="how many events of the stream; else all")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    return parser.parse_args()
