"""`lookup`: how fast a reader copies rows out by key, against `np.take` by position.

Both sides copy the same rows from equally large shared memory into memory that they are given. NumPy is given the positions;
ekko finds them by key and makes sure that no row is torn. The gated cell is the first: dim 64, 4 million rows, uniform keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import (
    ROUNDS,
    ROUNDS_QUICK,
    TABLE,
    Figure,
    alternate,
    distinct_keys,
    fill,
    shared_array,
    shared_model,
)
from ekko.serve.reader import Reader

TARGETS = {"vs_np_take": ">= 0.55", "vs_torch_embedding": ">= 0.7", "cells_vs_np_take_min": ">= 0.4"}
BATCH = 4_096


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load."""

    dim: int
    rows: int
    keys: str  # "uniform" or "zipf"
    batch: int


CELLS = (
    Cell(64, 4_000_000, "uniform", BATCH),
    Cell(64, 4_000_000, "zipf", BATCH),
    Cell(64, 4_000_000, "uniform", 64),
    Cell(64, 100_000, "uniform", BATCH),
    Cell(16, 4_000_000, "uniform", BATCH),
    Cell(128, 2_000_000, "uniform", BATCH),
)
CELLS_QUICK = (Cell(64, 10_000, "uniform", 512), Cell(8, 10_000, "zipf", 64))


def run(quick: bool) -> dict[str, Figure]:
    """Measure every cell."""
    cells = [
        _measure(cell, ROUNDS_QUICK if quick else ROUNDS, 20_000 if quick else 1_000_000)
        for cell in (CELLS_QUICK if quick else CELLS)
    ]
    gated = cells[0]
    return {
        "keys_per_s": gated["keys_per_s"],
        "vs_np_take": gated["vs_np_take"],
        "vs_torch_embedding": gated["vs_torch_embedding"],
        "cells_vs_np_take_min": min(float(cell["vs_np_take"]) for cell in cells),
        "cells": cells,
    }


def _positions(cell: Cell, count: int) -> NDArray[np.int64]:
    """int64[batches, batch]: which rows are looked up, by the order in which they were inserted."""
    rng = np.random.default_rng(7)
    count -= count % cell.batch
    if cell.keys == "uniform":
        return rng.integers(0, cell.rows, count).reshape(-1, cell.batch)
    # The exponent that click logs have, roughly; a permutation spreads the popular rows over the memory.
    ranks = np.minimum(rng.zipf(1.2, count) - 1, cell.rows - 1)
    return rng.permutation(cell.rows)[ranks].reshape(-1, cell.batch)


def _measure(cell: Cell, rounds: int, count: int) -> dict[str, float | int | str]:
    keys = distinct_keys(cell.rows, seed=2)
    places = _positions(cell, count)
    wanted = keys[places]
    with shared_model({TABLE: cell.dim}) as (model, run_dir), shared_array(cell.rows, cell.dim) as array:
        fill(model, keys, cell.dim, stamp=1)
        array[...] = np.arange(cell.rows, dtype=np.float32)[:, None]
        out = np.empty((cell.batch, cell.dim), np.float32)
        with Reader(model.spec.name, run_dir) as reader:

            def ours(number: int) -> None:
                for batch in wanted:
                    reader.lookup(TABLE, batch, out=out)

            def numpy(number: int) -> None:
                for batch in places:
                    np.take(array, batch, axis=0, out=out, mode="clip")

            sides: dict[str, Callable[[int], None]] = {"ours": ours, "numpy": numpy}
            if (torch_side := _torch_side(array, places)) is not None:
                sides["torch"] = torch_side
            timed = alternate(rounds, sides)
            reader.lookup(TABLE, wanted[-1], out=out)
            assert np.array_equal(out, array[places[-1]]), "both sides must read the same rows"
    return {
        "dim": cell.dim,
        "rows": cell.rows,
        "keys": cell.keys,
        "batch": cell.batch,
        "keys_per_s": places.size / timed.median("ours"),
        "vs_np_take": timed.ratio("ours", "numpy"),
        "vs_torch_embedding": timed.ratio("ours", "torch") if "torch" in sides else 0.0,
    }


def _torch_side(array: NDArray[np.float32], places: NDArray[np.int64]) -> Callable[[int], None] | None:
    """torch.nn.functional.embedding over the same memory; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    weight = torch.from_numpy(array)
    batches = [torch.from_numpy(batch) for batch in places]

    def embedding(number: int) -> None:
        with torch.inference_mode():
            for batch in batches:
                torch.nn.functional.embedding(batch, weight)

    return embedding
