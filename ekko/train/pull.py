"""Rows that are on their way from servers to a worker."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ekko.train.requests import Pulling
from ekko.train.server.wire import F32


class Pull:
    """Rows that are on their way, made by `Client.pull_async`.

    Args:
        pulling: what servers were asked for; None: nothing.
        rows: those that were here already, with places for the `missing`.
        missing: of each table in `rows`, where the rows belong that were asked for.
        take: waits for them.
        cancel: has the client forget them.
    """

    def __init__(
        self,
        pulling: Pulling | None,
        rows: dict[str, F32],
        missing: Mapping[str, NDArray[np.int64]],
        take: Callable[[Pulling], dict[str, F32]],
        cancel: Callable[[Pulling], None],
    ) -> None:
        self._pulling = pulling
        self._rows = rows
        self._missing = missing
        self._take = take
        self._cancel = cancel

    def result(self) -> dict[str, F32]:
        """Table -> float32[n, dim], in the order of the keys; waits for them.

        Raises:
            EkkoError: as `Client.pull`.
        """
        if self._pulling is not None:
            pulled = self._take(self._pulling)
            self._pulling = None
            for table, at in self._missing.items():
                self._rows[table][at] = pulled.pop(table)
            self._rows |= pulled
        return self._rows

    @property
    def failed(self) -> bool:
        """Whether it is known that its rows do not come: `result` raises."""
        return self._pulling is not None and self._pulling.failure is not None

    def cancel(self) -> None:
        """Forget it: nobody wants the rows any more."""
        if self._pulling is not None:
            self._cancel(self._pulling)
