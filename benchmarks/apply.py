"""`apply`: how fast batches land in shared memory, against NumPy's scatter.

Both sides write the same rows to the same places of equally large shared memory, in the same batches. NumPy is given the places
(`array[slots] = rows`); ekko finds them by key, compares stamps, keeps an undo record and takes each row's lock.
"""

import numpy as np

from benchmarks.common import (
    ROUNDS,
    ROUNDS_QUICK,
    TABLE,
    Figure,
    alternate,
    claim_memory,
    distinct_keys,
    fill,
    shared_array,
    shared_model,
)
from p2p.replica import RowColumns

TARGETS = {"vs_numpy_scatter": ">= 0.8"}
DIM = 64
BATCH = 4_096


def run(quick: bool) -> dict[str, Figure]:
    """Measure; 4 million rows, or 4 thousand when quick."""
    total = 4_096 if quick else 4_000_000
    batches = 1 if quick else 64
    rounds = ROUNDS_QUICK if quick else ROUNDS
    keys = distinct_keys(total, seed=1)
    rng = np.random.default_rng(1)
    # Fresh keys for each round; the rows are the same for both sides.
    slots = [rng.choice(total, BATCH * batches, replace=False).reshape(batches, BATCH) for _ in range(rounds + 1)]
    rows = rng.random((batches, BATCH, DIM), np.float32)

    with shared_model({TABLE: DIM}) as (model, _), shared_array(total, DIM) as array:
        table = model.spec.tables[TABLE].id
        fill(model, keys, DIM, stamp=1)
        chosen = [keys[places] for places in slots]

        def ours(number: int) -> None:
            for batch in range(batches):
                applied = model.apply([RowColumns(table, chosen[number][batch], rows[batch].view(np.uint8))], number + 2)
                assert applied.written == BATCH

        def numpy(number: int) -> None:
            for batch in range(batches):
                array[slots[number][batch]] = rows[batch]

        sides = alternate(rounds, {"ours": ours, "numpy": numpy})
    inserts = _inserts(total, rounds, quick)
    return {
        "rows_per_s": BATCH * batches / sides.median("ours"),
        "vs_numpy_scatter": sides.ratio("ours", "numpy"),
        "inserts_per_s": inserts,
        "numpy_rows_per_s": BATCH * batches / sides.median("numpy"),
    }


def _inserts(total: int, rounds: int, quick: bool) -> float:
    """Rows a second into a table that begins empty, its growth included."""
    total = total if quick else 1_000_000
    sources = [distinct_keys(total, seed=10 + number) for number in range(rounds + 1)]
    tables = {f"table{number}": DIM for number in range(rounds + 1)}
    rows = np.ones((BATCH, DIM), np.float32).view(np.uint8)
    claim_memory((rounds + 1) * total * 400)
    with shared_model(tables) as (model, _):

        def insert(number: int) -> None:
            table = model.spec.tables[f"table{number}"].id
            for begin in range(0, total, BATCH):
                keys = sources[number][begin : begin + BATCH]
                model.apply([RowColumns(table, keys, rows[: keys.size])], 1)

        return total / alternate(rounds, {"insert": insert}).median("insert")
