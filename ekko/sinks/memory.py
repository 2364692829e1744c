"""What sinks have in common whose rows are a model's in this process: they begin with nothing, and end with it."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ekko.errors import ModelError
from ekko.serve.sink import Batch, Sink
from ekko.sinks.held import F32, I64, U64, HeldRows, Places


class ModuleSink(Sink):
    """Writes rows into a module of this process.

    Args:
        sizes: table -> its rows and width here.
        places: table -> where its keys are (`ekko.sinks.held.HeldRows`); a key is a row number in tables that it does not name.
        dense: parameters by the names of dense tensors, or a module that has them; tensors that it does not have are left out.
        lock: held while rows are written: who infers with it held sees no row half written.
    """

    def __init__(
        self,
        sizes: Mapping[str, tuple[int, int]],
        places: Mapping[str, Places],
        dense: Mapping[str, Tensor] | nn.Module,
        lock: AbstractContextManager[Any] | None,
    ) -> None:
        for table in places:
            if table not in sizes:
                raise ModelError(f"places has table {table!r}, which the sink does not have: it has {_listed(sizes)}")
        self._sizes = dict(sizes)
        self._held = {table: HeldRows(table, rows, places.get(table)) for table, (rows, _) in sizes.items()}
        self._dense = dict(dense.named_parameters()) if isinstance(dense, nn.Module) else dict(dense)
        self._dense_stamps: dict[str, int] = {}
        self._lock = nullcontext() if lock is None else lock
        self._model: str | None = None
        self._cursor: bytes | None = None

    @abstractmethod
    def _write(self, table: str, places: I64, rows: F32) -> None:
        """Put float32[n, dim] at row numbers int64[n]."""

    def open(self, model: str) -> bytes | None:
        if self._model not in (None, model):
            raise ModelError(f"the sink has rows of model {self._model!r}: make another one for model {model!r}")
        self._model = model
        return self._cursor

    def add_table(self, table: str, dim: int) -> None:
        if table not in self._sizes:
            raise ModelError(f"the sink has no table {table!r}: it has {_listed(self._sizes)}; name it, or feed(tables=...)")
        if self._sizes[table][1] != dim:
            raise ModelError(f"table {table!r} has dim {dim}, and rows of {self._sizes[table][1]} in the sink")

    def drop_table(self, table: str) -> None:
        if table in self._held:
            self._clear(table, self._held[table].clear())

    def apply(self, batch: Batch) -> None:
        with self._lock, torch.no_grad():
            cleared, written, rows = self._held[batch.table].take(batch)
            self._clear(batch.table, cleared)
            if written.size:
                self._write(batch.table, written, rows)

    def _clear(self, table: str, places: I64) -> None:
        if places.size:
            with torch.no_grad():
                self._write(table, places, np.zeros((places.size, self._sizes[table][1]), np.float32))

    def apply_dense(self, name: str, values: NDArray[Any], stamp: int) -> None:
        parameter = self._dense.get(name)
        if parameter is None or stamp <= self._dense_stamps.get(name, 0):
            return
        if tuple(parameter.shape) != values.shape:
            raise ModelError(f"tensor {name!r} has shape {values.shape}, and {tuple(parameter.shape)} in the sink")
        with self._lock, torch.no_grad():
            parameter.copy_(torch.from_numpy(np.array(values)))
        self._dense_stamps[name] = stamp

    def held(self, table: str) -> Iterator[tuple[U64, U64]]:
        return self._held[table].held()

    def commit(self, cursor: bytes) -> None:
        self._cursor = cursor


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(map(repr, names)) or "none"
