"""What a rollback took back, loaded into a model in training; what the optimizer remembers of it is forgotten.

A model that goes on from rows that readers have no more would bring them back with its next steps, and so would momentum that
was gathered on bad samples. Of dense tensors nothing is known but that they changed: they are read whole.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ekko.errors import ModelError
from ekko.restored import Restored
from ekko.torch.capture import I64, TrackedTable
from ekko.torch.dense import DenseParameters
from ekko.torch.outbox import Outbox
from ekko.torch.remembered import forget_rows


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


class Reloader:
    """Loads what rollbacks restored into the tables and dense parameters of one model.

    Args:
        publisher: tells what was restored; one of yours may know no rollbacks.
        reader: of what the node has; None: only restored rows are loaded.
        optimizers: forget what they remember of what is loaded.
        tables: by name.
        dense: parameters of the same model.
        outbox: what is due of both.
    """

    def __init__(
        self,
        publisher: object,
        reader: StateReader | None,
        optimizers: Sequence[Optimizer],
        tables: Mapping[str, TrackedTable],
        dense: DenseParameters,
        outbox: Outbox,
    ) -> None:
        self._publisher = publisher
        self.reader = reader
        self._optimizers = optimizers
        self._tables = tables
        self._dense = dense
        self._outbox = outbox
        self._restored: tuple[Restored, ...] = ()  # what was told, until all of it is loaded
        self.unfinished = False  # whether something was told that is not loaded, since that failed; each step asks
        self._dropped: dict[str, I64] = {}

    def reload(self) -> Reloaded:
        """See `Tracker.reload`; between two steps."""
        self._restored += getattr(self._publisher, "restored", tuple)()
        restored = self._restored
        self.unfinished = bool(restored)
        if not restored:
            return Reloaded({})
        for table, ids in self._outbox.forget().items():
            self._dropped[table] = np.union1d(ids, self._dropped.get(table, ids))
        due = dict(self._dropped)
        tensors = dict.fromkeys(name for one in restored for name in one.tensors if name in self._dense.names)
        loaded: dict[str, int] = {}
        for one in restored:
            if one.table in self._tables:
                ids = self._load(self._tables[one.table], one.keys, one.rows)
                loaded[one.table] = loaded.get(one.table, 0) + len(ids)
                due[one.table] = np.setdiff1d(due[one.table], ids, assume_unique=True)
        read = tuple(name for name in tensors if self._reload_dense(name))
        if self._dense.periodic:
            with suppress(ModelError):  # none was published yet
                read += tuple(name for name in self._dense.names if name not in tensors and self._reload_dense(name))
        dropped = {table: len(ids) for table, ids in due.items() if len(ids)}
        for table in dropped:
            self._reload_rows(self._tables[table], due[table])
        self._restored, self._dropped, self.unfinished = (), {}, False
        return Reloaded(loaded, read, tuple(name for name in tensors if name not in read), dropped)

    def _load(self, table: TrackedTable, keys: NDArray[np.uint64], values: NDArray[np.float32]) -> I64:
        """Put the node's rows into a table; int64[n], which these are."""
        first, *others = table.trainers
        found = table.rows_of(keys)
        ids = load_rows(first, table.weight, Rows(found.view(np.uint64), values))  # -1, where there is none, is above all
        for other in others:
            forget_rows(other, table.weight, ids)
        loaded: I64 = ids.cpu().numpy()
        table.accept(loaded)
        return loaded

    def _reload_rows(self, table: TrackedTable, ids: I64) -> None:
        """Put what the node has in place of rows that no rollback wrote; those that it does not have stay as they are."""
        table.accept(ids)
        if self.reader is None:
            return
        keys = table.keys_of(ids)
        rows, stamps = self.reader.lookup(table.name, keys, stamps=True)
        self._load(table, keys[stamps > 0], rows[stamps > 0])

    def _reload_dense(self, name: str) -> bool:
        if self.reader is None:
            return False
        for optimizer in self._optimizers:
            load_dense(optimizer, self._dense.tensor(name), self.reader.dense(name))
        return True
