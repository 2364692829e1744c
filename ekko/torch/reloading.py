"""What a rollback took back, loaded into a model in training; what the optimizer remembers of it is forgotten.

A model that goes on from rows that readers have no more would bring them back with its next steps, and so would momentum that
was gathered on bad samples. Of dense tensors nothing is known but that they changed: they are read whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer


class RestoredRows(Protocol):
    """As `ekko.restored.Restored`, of which only this is asked."""

    @property
    def keys(self) -> NDArray[np.uint64]: ...
    @property
    def rows(self) -> NDArray[np.float32]: ...


class StateReader(Protocol):
    """What the node's state is read with; `ekko.Reader` offers it."""

    def dense(self, name: str) -> NDArray[np.float32]: ...

    def lookup(
        self, table: str, keys: NDArray[np.uint64], *, stamps: Literal[True]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint64]]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a table as a node has them."""

    keys: NDArray[np.uint64]  # [n]
    rows: NDArray[np.float32]  # [n, dim]


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What `Tracker.reload` put into the model."""

    rows: Mapping[str, int]  # by table; those of keys that the model has no row for are not among them
    dense: tuple[str, ...] = ()  # parameters that were read
    not_read: tuple[str, ...] = ()  # parameters that were restored, too, and stayed as they are: there was no reader
    dropped: Mapping[str, int] = field(default_factory=dict)  # by table: other rows of steps that will not be published


def load_rows(optimizer: Optimizer, weight: nn.Parameter, restored: RestoredRows) -> Tensor:
    """Put restored rows into a table; rows that did not exist then become zeros, as readers see them.

    Returns:
        int64[n]: which rows those are.
    """
    here = restored.keys < np.uint64(weight.shape[0])
    ids = torch.from_numpy(restored.keys[here].astype(np.int64)).to(weight.device)
    with torch.no_grad():
        values = torch.from_numpy(np.ascontiguousarray(restored.rows[here])).to(weight.device, weight.dtype)
        weight.index_copy_(0, ids, values)
        forget_rows(optimizer, weight, ids)
    return ids


def load_dense(optimizer: Optimizer, value: Tensor, array: NDArray[np.float32]) -> None:
    """Put a restored tensor in place of a parameter or buffer."""
    with torch.no_grad():
        value.copy_(torch.from_numpy(np.array(array, np.float32)))
        optimizer.state.pop(value, None)  # begins anew with the next step


def forget_rows(optimizer: Optimizer, weight: nn.Parameter, ids: Tensor) -> None:
    """Have the optimizer's memory of some rows as it was before their first step; that of all others stays.

    Whatever it keeps with an entry for each row: the moments of Adam and SparseAdam, the sums of Adagrad, momentum, averages.
    """
    group = next(group for group in optimizer.param_groups if any(value is weight for value in group["params"]))
    for name, kept in optimizer.state.get(weight, {}).items():
        if not isinstance(kept, Tensor) or not kept.ndim or kept.shape[0] != weight.shape[0]:
            continue  # how many steps there were, as a rule
        begins_with = group.get("initial_accumulator_value", 0) if name == "sum" else 0
        if kept.is_sparse:  # the momentum of SGD
            optimizer.state[weight][name] = _without(kept, ids)
        else:
            kept.index_fill_(0, ids, float(begins_with))


def _without(sparse: Tensor, ids: Tensor) -> Tensor:
    sparse = sparse.coalesce()
    kept = ~torch.isin(sparse.indices()[0], ids)
    return torch.sparse_coo_tensor(sparse.indices()[:, kept], sparse.values()[kept], sparse.shape, check_invariants=False)
