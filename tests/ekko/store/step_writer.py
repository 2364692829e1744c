"""A process that applies steps to a store, for tests that read consistently beside it.

`step_writer.py RUN_DIR KEYS`: every step writes its number into all values of KEYS keys of two tables, of two writers in turn,
each with keys of its own, and into a dense tensor of its own; one in eight comes in parts.
Prints "ready" after the first steps.
"""

import sys
from pathlib import Path

import numpy as np

from ekko.model import DENSE_DIM, DENSE_SPEC, ModelSpec, TableSpec, TensorSpec, table_id
from ekko.store import Store
from p2p.replica import RowColumns

WRITERS = (3, 4)
TENSORS = {f"top.{writer}": TensorSpec(f"top.{writer}", (4, 500), "float32") for writer in WRITERS}
SPEC = ModelSpec("ctr", 8, {"item": TableSpec("item", 64), "user": TableSpec("user", 16)}, TENSORS)


def main(run_dir: Path, count: int) -> None:
    model = Store.open(run_dir).add_model(SPEC)
    for number in range(1, 1 << 20):
        for place, writer in enumerate(WRITERS):
            stamp = number << 12 | writer
            keys = np.arange(place * count, (place + 1) * count, dtype=np.uint64)
            batch = []
            for table in SPEC.tables.values():
                rows = np.full((count, table.dim), number, np.float32)
                batch.append(RowColumns(table_id(table.name), keys, rows.view(np.uint8)))
            tensor = TENSORS[f"top.{writer}"]
            dense = np.full((tensor.rows, DENSE_DIM), number, np.float32)
            batch.append(RowColumns(DENSE_SPEC.id, tensor.keys, dense.view(np.uint8)))
            for part in [[one] for one in batch] if number % 8 == 0 else [batch]:
                model.apply(part, stamp)
            model.frontier[writer] = stamp
            model.set_synced_until(0)
        if number == 1:
            sys.stdout.write("ready\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
