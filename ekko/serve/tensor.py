"""Dense tensors, out of the rows of `_dense` that hold them."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ModelError
from ekko.model import DENSE_DIM, TensorSpec
from ekko.store.view import TableView


class Tensor:
    """A dense tensor on its way: rows of `DENSE_DIM` values and their stamps."""

    def __init__(self, spec: TensorSpec) -> None:
        self._spec = spec
        self._rows = np.empty((spec.rows, DENSE_DIM), np.float32)
        self._stamps = np.empty(spec.rows, np.uint64)

    def read(self, view: TableView) -> None:
        """Copy it out; its rows may be of several versions, if it is written meanwhile."""
        view.lookup(self._spec.keys, self._rows, self._stamps)

    @property
    def stamp(self) -> int:
        """Of which step it is: the newest stamp of its rows. Those that a step did not change keep theirs."""
        return int(self._stamps.max()) if self._stamps.size else 0

    def whole(self, model: str) -> NDArray[Any]:
        """Its values.

        Raises:
            ModelError: not all of its rows are here.
        """
        spec = self._spec
        if (values := self.values()) is None:
            here = f"{np.count_nonzero(self._stamps)} of its {spec.rows} rows are here"
            raise ModelError(f"dense tensor {spec.name!r} of model {model!r} was not published yet, or was deleted: {here}")
        return values

    def values(self) -> NDArray[Any] | None:
        """Its values; None: not all of its rows are here."""
        spec = self._spec
        if not self._stamps.all():
            return None
        return self._rows.reshape(-1)[: math.prod(spec.shape)].reshape(spec.shape).astype(spec.dtype, copy=False)
