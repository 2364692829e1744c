"""`lookup`: how fast a reader copies rows out by key, against `np.take` by position.

Both sides copy the same rows from equally large shared memory into memory that they are given. NumPy is given the positions;
ekko finds them by key and makes sure that no row is torn. The gated cell is the first: dim 64, 4 million rows, uniform keys.

`codecs`: the same with encoded rows, decoded on their way, against `np.take` of float32 rows; and what encoding a batch
costs its publisher, against NumPy's `astype(np.float16)` of the same rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import (
    F32,
    ROUNDS,
    ROUNDS_QUICK,
    TABLE,
    U64,
    Figure,
    alternate,
    distinct_keys,
    fill,
    shared_array,
    shared_model,
)
from ekko.codec import encode, rounded
from ekko.model import CODEC_DEFAULT, CODECS
from ekko.serve.reader import Reader

TARGETS = {"vs_np_take": ">= 0.55", "vs_torch_embedding": ">= 0.7", "cells_vs_np_take_min": ">= 0.4"}
BATCH = 4_096
SIDES = ("ours", "numpy", "torch")


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
        _measure(cell, ROUNDS_QUICK if quick else ROUNDS, 20_000 if quick else 500_000)
        for cell in (CELLS_QUICK if quick else CELLS)
    ]
    gated = cells[0]
    return {
        "keys_per_s": gated["keys_per_s"],
        "vs_np_take": gated["vs_np_take"],
        "vs_torch_embedding": gated["vs_torch_embedding"],
        "cells_vs_np_take_min": min(float(cell["vs_np_take"]) for cell in cells),
        "cells": cells,
        "codecs": [_measure_codec(codec, quick) for codec in CODECS],
    }


def _measure_codec(codec: str, quick: bool) -> dict[str, float | int | str]:
    cell = Cell(64, 10_000 if quick else 1_000_000, "uniform", BATCH)
    found = _measure(cell, ROUNDS_QUICK if quick else ROUNDS, 20_000 if quick else 500_000, codec)
    rows = np.random.default_rng(3).standard_normal((1_000, cell.dim), dtype=np.float32) * np.float32(0.05)
    repeats = range(2 if quick else 200)

    def ours(_: int) -> None:
        for _ in repeats:
            encode(codec, rows)

    def numpy(_: int) -> None:
        for _ in repeats:
            rows.astype(np.float16)

    timed = alternate(ROUNDS_QUICK if quick else ROUNDS, {"ours": ours, "numpy": numpy})
    return {
        "codec": codec,
        "row_bytes": CODECS[codec].row_bytes(cell.dim),
        "keys_per_s": found["keys_per_s"],
        "vs_np_take": found["vs_np_take"],
        "encoded_rows_per_s": len(repeats) * len(rows) / timed.median("ours"),
        "encode_vs_numpy_float16": timed.ratio("ours", "numpy"),
    }


def _positions(cell: Cell, count: int, seed: int) -> NDArray[np.int64]:
    """int64[batches, batch]: which rows are looked up, by the order in which they were inserted."""
    rng = np.random.default_rng(seed)
    count -= count % cell.batch
    if cell.keys == "uniform":
        return rng.integers(0, cell.rows, count).reshape(-1, cell.batch)
    # The exponent that click logs have, roughly; multiplying by a prime spreads the popular rows over the memory.
    ranks = np.minimum(rng.zipf(1.2, count) - 1, cell.rows - 1)
    return (ranks * 2_654_435_761 % cell.rows).reshape(-1, cell.batch)


def _measure(cell: Cell, rounds: int, count: int, codec: str = CODEC_DEFAULT) -> dict[str, float | int | str]:
    keys = distinct_keys(cell.rows, seed=2)
    with shared_model({TABLE: cell.dim}, codec=codec) as (model, run_dir), shared_array(cell.rows, cell.dim) as array:
        fill(model, keys, cell.dim, stamp=1)
        array[...] = np.arange(cell.rows, dtype=np.float32)[:, None]
        out = np.empty((cell.batch, cell.dim), np.float32)
        # Every side looks at its own places in each round: else the second one finds in the cache what the first one fetched.
        places = {
            side: [_positions(cell, count, seed=number * len(SIDES) + first) for number in range(rounds + 1)]
            for first, side in enumerate(SIDES)
        }
        with Reader(model.spec.name, run_dir) as reader:
            sides = _sides(reader, keys, array, out, places)
            timed = alternate(rounds, sides)
            reader.lookup(TABLE, keys[: cell.batch], out=out)
            assert np.array_equal(out, rounded(codec, array[: cell.batch])), "both sides must read the same rows"
    return {
        "dim": cell.dim,
        "rows": cell.rows,
        "keys": cell.keys,
        "batch": cell.batch,
        "keys_per_s": places["ours"][0].size / timed.median("ours"),
        "vs_np_take": timed.ratio("ours", "numpy"),
        "vs_torch_embedding": timed.ratio("ours", "torch") if "torch" in sides else 0.0,
    }


def _sides(
    reader: Reader, keys: U64, array: F32, out: F32, places: dict[str, list[NDArray[np.int64]]]
) -> dict[str, Callable[[int], None]]:
    wanted = [keys[batches] for batches in places["ours"]]

    def ours(number: int) -> None:
        for batch in wanted[number]:
            reader.lookup(TABLE, batch, out=out)

    def numpy(number: int) -> None:
        for batch in places["numpy"][number]:
            np.take(array, batch, axis=0, out=out, mode="clip")

    sides: dict[str, Callable[[int], None]] = {"ours": ours, "numpy": numpy}
    try:
        import torch
    except ImportError:
        return sides
    weight = torch.from_numpy(array)

    def embedding(number: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the other sides
        with torch.inference_mode():
            for batch in places["torch"][number]:
                torch.nn.functional.embedding(torch.from_numpy(batch), weight)
        torch.set_num_threads(threads)

    return {**sides, "torch": embedding}
