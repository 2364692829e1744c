"""`lookup`: how fast a reader copies rows out by key, or pools them, against those who are told where the rows lie; and Redis.

All sides read the same rows from equally large shared memory, each from a copy of its own. NumPy and torch are given the
positions; ekko finds them by key and makes sure that no row is torn. The gated cell is the first: dim 64, 4 million rows,
uniform keys, batches of 4,096. In it also:

    pooled    bags of 1 to 31 keys, summed: against `F.embedding_bag` of torch with the positions, and against a look-up
              and `np.add.reduceat`
    Redis     MGET over a Unix socket, batches of 1,000: what one would do instead; and the 99th percentile at 64 keys

`codecs`: the same with encoded rows, decoded on their way, against `np.take` of float32 rows; and what encoding a batch
costs its publisher, against NumPy's `astype(np.float16)` of the same rows.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.baselines.mget import names, redis_rows
from benchmarks.baselines.servers import absent
from benchmarks.common import (
    F32,
    MODEL,
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

TARGETS = {
    "vs_np_take": ">= 0.55",
    "vs_torch_embedding": ">= 0.7",
    "pooled_vs_embedding_bag": ">= 0.35",
    "pooled_vs_two_step": ">= 1.5",
    "vs_redis_mget": ">= 6",
    "redis_p99_ratio": "<= 0.2",
    "cells_vs_np_take_min": ">= 0.4",
    "counting_cost": "<= 0.03",
}
BATCH = 4_096
BAG_KEYS_MAX = 31
REDIS_BATCH = 1_000
SMALL_BATCH = 64
SIDES = ("ours", "numpy", "torch")

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load."""

    dim: int
    rows: int
    keys: str  # "uniform" or "zipf"
    batch: int


GATED = Cell(64, 4_000_000, "uniform", BATCH)
CELLS = (
    Cell(64, 4_000_000, "zipf", BATCH),
    Cell(64, 4_000_000, "uniform", SMALL_BATCH),
    Cell(64, 1_000_000, "uniform", BATCH),
    Cell(64, 16_000_000, "uniform", BATCH),  # 4 GB, and with dim 128
    Cell(64, 16_000_000, "zipf", BATCH),
    Cell(16, 1_000_000, "uniform", BATCH),
    Cell(16, 4_000_000, "uniform", BATCH),
    Cell(16, 4_000_000, "zipf", BATCH),
    Cell(128, 1_000_000, "uniform", BATCH),
    Cell(128, 8_000_000, "uniform", BATCH),
    Cell(128, 8_000_000, "zipf", BATCH),
)
GATED_QUICK = Cell(64, 10_000, "uniform", 512)
CELLS_QUICK = (Cell(8, 10_000, "zipf", 64),)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    rounds: int
    keys: int  # of a round
    calls: int  # of which the latency is taken

    @staticmethod
    def of(quick: bool) -> "Scale":
        return Scale(ROUNDS_QUICK, 20_000, 200) if quick else Scale(ROUNDS, 500_000, 5_000)


@dataclass(frozen=True, slots=True)
class Bed:
    """One table, in ekko's memory and as an array; row i is the number i."""

    cell: Cell
    run_dir: Path
    reader: Reader
    keys: U64
    array: F32


def run(quick: bool) -> dict[str, Figure]:
    """Measure every cell."""
    scale = Scale.of(quick)
    gated, more = _measure(GATED_QUICK if quick else GATED, scale, more=True)
    cells = [gated, *(_measure(cell, scale)[0] for cell in (CELLS_QUICK if quick else CELLS))]
    return {
        "keys_per_s": gated["keys_per_s"],
        "vs_np_take": gated["vs_np_take"],
        "vs_torch_embedding": gated["vs_torch_embedding"],
        **more,
        "cells_vs_np_take_min": min(float(cell["vs_np_take"]) for cell in cells),
        "cells": cells,
        "codecs": [_measure_codec(codec, quick) for codec in CODECS],
    }


def _measure_codec(codec: str, quick: bool) -> dict[str, float | int | str]:
    cell = Cell(64, 10_000 if quick else 1_000_000, "uniform", BATCH)
    found, _ = _measure(cell, Scale.of(quick), codec)
    rows = np.random.default_rng(3).standard_normal((1_000, cell.dim), dtype=np.float32) * np.float32(0.05)
    repeats = range(2 if quick else 200)

    def ours(_: int) -> None:
        for _ in repeats:
            encode(codec, rows)

    def numpy(_: int) -> None:
        for _ in repeats:
            rows.astype(np.float16)

    timed = alternate(Scale.of(quick).rounds, {"ours": ours, "numpy": numpy})
    return {
        "codec": codec,
        "row_bytes": CODECS[codec].row_bytes(cell.dim),
        "keys_per_s": found["keys_per_s"],
        "vs_np_take": found["vs_np_take"],
        "encoded_rows_per_s": len(repeats) * len(rows) / timed.median("ours"),
        "encode_vs_numpy_float16": timed.ratio("ours", "numpy"),
    }


def _positions(cell: Cell, count: int, seed: int) -> Places:
    """int64[batches, batch]: which rows are looked up, by the order in which they were inserted."""
    rng = np.random.default_rng(seed)
    count = max(cell.batch, count - count % cell.batch)
    if cell.keys == "uniform":
        return rng.integers(0, cell.rows, count).reshape(-1, cell.batch)
    # The exponent that click logs have, roughly; multiplying by a prime spreads the popular rows over the memory.
    ranks = np.minimum(rng.zipf(1.2, count) - 1, cell.rows - 1)
    return (ranks * 2_654_435_761 % cell.rows).reshape(-1, cell.batch)


def _places(cell: Cell, scale: Scale, sides: tuple[str, ...], seed: int) -> dict[str, list[Places]]:
    """Every side's own places in each round: else the second one finds in the cache what the first one fetched."""
    return {
        side: [_positions(cell, scale.keys, seed + number * len(sides) + first) for number in range(scale.rounds + 1)]
        for first, side in enumerate(sides)
    }


def _measure(
    cell: Cell, scale: Scale, codec: str = CODEC_DEFAULT, *, more: bool = False
) -> tuple[dict[str, float | int | str], dict[str, Figure]]:
    """The figures of one cell; with `more`, also those that only the gated one has."""
    gc.collect()  # a store that ended is freed with its reference cycles: up to 9 GB of the cell before
    keys = distinct_keys(cell.rows, seed=2)
    with shared_model({TABLE: cell.dim}, codec=codec) as (model, run_dir), shared_array(cell.rows, cell.dim) as array:
        fill(model, keys, cell.dim, stamp=1)
        array[...] = np.arange(cell.rows, dtype=np.float32)[:, None]
        out = np.empty((cell.batch, cell.dim), np.float32)
        with Reader(model.spec.name, run_dir) as reader:
            bed = Bed(cell, run_dir, reader, keys, array)
            places = _places(cell, scale, SIDES, seed=0)
            sides = _sides(bed, out, places)
            timed = alternate(scale.rounds, sides)
            reader.lookup(TABLE, keys[: cell.batch], out=out)
            assert np.array_equal(out, rounded(codec, array[: cell.batch])), "all sides must read the same rows"
            others = _pooled(bed, scale) | _redis(bed, scale) | _counting(bed, scale) if more else {}
    figures: dict[str, float | int | str] = {
        "dim": cell.dim,
        "rows": cell.rows,
        "keys": cell.keys,
        "batch": cell.batch,
        "keys_per_s": places["ours"][0].size / timed.median("ours"),
        "vs_np_take": timed.ratio("ours", "numpy"),
        "vs_torch_embedding": timed.ratio("ours", "torch") if "torch" in sides else 0.0,
    }
    return figures, others


def _sides(bed: Bed, out: F32, places: dict[str, list[Places]]) -> dict[str, Callable[[int], None]]:
    wanted = [bed.keys[batches] for batches in places["ours"]]

    def ours(number: int) -> None:
        for batch in wanted[number]:
            bed.reader.lookup(TABLE, batch, out=out)

    def numpy(number: int) -> None:
        for batch in places["numpy"][number]:
            np.take(bed.array, batch, axis=0, out=out, mode="clip")

    sides: dict[str, Callable[[int], None]] = {"ours": ours, "numpy": numpy}
    try:
        import torch
    except ImportError:
        return sides
    weight = torch.from_numpy(bed.array)

    def embedding(number: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the other sides
        with torch.inference_mode():
            for batch in places["torch"][number]:
                torch.nn.functional.embedding(torch.from_numpy(batch), weight)
        torch.set_num_threads(threads)

    return {**sides, "torch": embedding}


def _bags(rng: np.random.Generator, batch: int) -> Places:
    """int64[bags]: where bags of 1 to `BAG_KEYS_MAX` keys begin that a batch is cut into; none is empty, as `reduceat` asks."""
    ends = np.cumsum(rng.integers(1, BAG_KEYS_MAX + 1, batch))
    return np.concatenate([[0], ends[ends < batch]])


def _pooled(bed: Bed, scale: Scale) -> dict[str, Figure]:
    """Sums of bags."""
    sides = ("ours", "two-step", "torch")
    places = _places(bed.cell, scale, sides, seed=1_000)
    wanted = {side: [bed.keys[batches] for batches in places[side]] for side in sides[:2]}
    offsets = _bags(np.random.default_rng(5), bed.cell.batch)
    out = np.empty((offsets.size, bed.cell.dim), np.float32)
    rows = np.empty((bed.cell.batch, bed.cell.dim), np.float32)

    def ours(number: int) -> None:
        for batch in wanted["ours"][number]:
            bed.reader.lookup_pooled(TABLE, batch, offsets, mode="sum", out=out)

    def two_step(number: int) -> None:
        for batch in wanted["two-step"][number]:
            bed.reader.lookup(TABLE, batch, out=rows)
            np.add.reduceat(rows, offsets, axis=0, out=out)

    work: dict[str, Callable[[int], None]] = {"ours": ours, "two-step": two_step}
    try:
        import torch
    except ImportError:
        timed = alternate(scale.rounds, work)
        note = "torch is not installed"
        return {
            "pooled_vs_embedding_bag": None,
            "note_pooled_vs_embedding_bag": note,
            "pooled_vs_two_step": timed.ratio("ours", "two-step"),
        }
    weight, begins = torch.from_numpy(bed.array), torch.from_numpy(offsets)

    def embedding_bag(number: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.inference_mode():
            for batch in places["torch"][number]:
                torch.nn.functional.embedding_bag(torch.from_numpy(batch), weight, begins, mode="sum")
        torch.set_num_threads(threads)

    timed = alternate(scale.rounds, {**work, "torch": embedding_bag})
    return {
        "pooled_keys_per_s": places["ours"][0].size / timed.median("ours"),
        "pooled_vs_embedding_bag": timed.ratio("ours", "torch"),
        "pooled_vs_two_step": timed.ratio("ours", "two-step"),
    }


def _counting(bed: Bed, scale: Scale) -> dict[str, Figure]:
    """What it costs, as a share of a look-up, that keys are counted (`ekko hot`), by keys in a look-up."""
    costs = {}
    with Reader(MODEL, bed.run_dir, counted=False) as uncounted:
        readers = {"counted": bed.reader, "not": uncounted}
        for batch in (bed.cell.batch, 256, SMALL_BATCH):
            cell = Cell(bed.cell.dim, bed.cell.rows, bed.cell.keys, batch)
            wanted = {
                side: [bed.keys[batches] for batches in rounds]
                for side, rounds in _places(cell, scale, tuple(readers), seed=4_000).items()
            }
            out = np.empty((batch, cell.dim), np.float32)

            def look_up(side: str, out: F32 = out, wanted: dict[str, list[U64]] = wanted) -> Callable[[int], None]:
                def side_of(number: int) -> None:
                    for keys in wanted[side][number]:
                        readers[side].lookup(TABLE, keys, out=out)

                return side_of

            timed = alternate(scale.rounds, {side: look_up(side) for side in readers})
            costs[batch] = 1 - timed.ratio("counted", "not")
    return {
        "counting_cost": costs[bed.cell.batch],
        "counting_cost_256_keys": costs[256],
        "counting_cost_64_keys": costs[SMALL_BATCH],
    }


def _redis(bed: Bed, scale: Scale) -> dict[str, Figure]:
    """Batches of `REDIS_BATCH`, and single calls of `SMALL_BATCH`. The names of the keys are made for nothing."""
    missing = absent("redis")
    if missing is not None:
        return {"vs_redis_mget": None, "redis_p99_ratio": None, "note_redis_mget": missing, "note_redis_p99_ratio": missing}
    cell = Cell(bed.cell.dim, bed.cell.rows, bed.cell.keys, REDIS_BATCH)
    places = _places(cell, Scale(scale.rounds, scale.keys // 5, 0), ("ours", "redis"), seed=2_000)
    out = np.empty((REDIS_BATCH, cell.dim), np.float32)
    ours_keys = [bed.keys[batches] for batches in places["ours"]]
    redis_names = [[names(bed.keys[batch]) for batch in batches] for batches in places["redis"]]
    with redis_rows(bed.keys, bed.array) as store:

        def ours(number: int) -> None:
            for batch in ours_keys[number]:
                bed.reader.lookup(TABLE, batch, out=out)

        def redis(number: int) -> None:
            for batch in redis_names[number]:
                store.lookup(batch, out)

        timed = alternate(scale.rounds, {"ours": ours, "redis": redis})
        p99 = [_p99_us(bed, scale, store.lookup, turn) for turn in range(3)]
    return {
        "vs_redis_mget": timed.ratio("ours", "redis"),
        "redis_p99_ratio": float(np.median([mine / theirs for mine, theirs in p99])),
        "p99_us_64_keys": float(np.median([mine for mine, _ in p99])),
        "redis_p99_us_64_keys": float(np.median([theirs for _, theirs in p99])),
    }


def _p99_us(bed: Bed, scale: Scale, redis: Callable[[list[bytes], F32], None], turn: int) -> tuple[float, float]:
    """Ours and Redis's 99th percentile of `calls` calls of 64 keys each, call by call in turn."""
    small = Cell(bed.cell.dim, bed.cell.rows, bed.cell.keys, SMALL_BATCH)
    mine, theirs = (_positions(small, SMALL_BATCH * scale.calls, 3_000 + 2 * turn + side) for side in range(2))
    out = np.empty((SMALL_BATCH, small.dim), np.float32)
    spent = np.empty((2, scale.calls))
    for call in range(scale.calls):
        keys, wanted = bed.keys[mine[call]], names(bed.keys[theirs[call]])
        begin = time.perf_counter()
        bed.reader.lookup(TABLE, keys, out=out)
        between = time.perf_counter()
        redis(wanted, out)
        spent[:, call] = between - begin, time.perf_counter() - between
    first, second = np.percentile(spent * 1e6, 99, axis=1)
    return float(first), float(second)
