"""Rows that a worker reads where they lie: in the shared memory of a training node on its own machine.

A pull of mode "async" is answered with what the server finds in its node's memory at that moment. A worker on the same machine,
or on that of a spare, finds it there by itself, with no message. Pushes that were answered are there: every holder of a
partition has them by then (with `ack = "local"` the server's own node has). What the memory does not have is pulled: rows that
nobody trained yet, and partitions held elsewhere.

A node that died leaves its memory behind, and training goes on without it: memory is used only while the node keeps saying that
it has all that there is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.errors import ConfigError, ModelError, StoreError
from ekko.model import training_name
from ekko.serve.reader import Reader
from ekko.train.server.wire import F32, U64

# A live node says it every 200 ms or so. One that is silent for this long may be gone, and its rows old.
STALE_MS_MAX: Final = 2_000.0


class Beside:
    """The training model in one node's memory.

    Args:
        model: the served model's name.
        run_dir: the node's.
        tables: table -> dim, as servers have them.

    Raises:
        ConfigError: there is no node's memory, or the model is not in it.
    """

    def __init__(self, model: str, run_dir: str | Path, tables: Mapping[str, int]) -> None:
        try:
            self._reader = Reader(training_name(model), run_dir, unheld="absent", counted=False)
        except (ModelError, StoreError) as error:
            raise ConfigError(
                f"run_dir: {run_dir} is not that of a node that trains model {model!r}: {error}: pass that of a training node "
                "on this machine, or none"
            ) from None
        if (there := {table: dim for table, dim in self._reader.tables.items() if table in tables}) != dict(tables):
            raise ConfigError(
                f"run_dir: the node there has tables {there} of model {model!r}, and the servers have {dict(tables)}"
            )

    def rows(self, keys: Mapping[str, U64]) -> tuple[dict[str, F32], dict[str, NDArray[np.int64]]] | None:
        """Rows of all tables; and of each table with keys that are not there, where these are among its keys.

        None: the memory may be old, or a row of it is locked since its writer died; ask the servers.
        """
        stale_ms = self._reader.staleness_ms()
        if stale_ms is None or stale_ms > STALE_MS_MAX:
            return None
        rows: dict[str, F32] = {}
        missing: dict[str, NDArray[np.int64]] = {}
        try:
            for table, wanted in keys.items():
                rows[table], stamps = self._reader.lookup(table, wanted, stamps=True)
                if not stamps.all():
                    missing[table] = np.flatnonzero(stamps == 0)
        except StoreError:
            return None
        return rows, missing

    def close(self) -> None:
        """Let go of the memory."""
        self._reader.close()
