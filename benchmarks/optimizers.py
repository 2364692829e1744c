"""`optimizers`: steps of rows, sums of gradients and first rows, against torch on one core.

A step of ours takes rows and their state out of a table, as a server does, moves them and puts them back; torch's optimizer
gets the same rows as a sparse gradient that is coalesced already. Sums are against `coalesce`. Seconds are the processor's,
since nothing here waits: so the figures are the same on a machine that has other work.
"""

import time
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import optim

from benchmarks.common import ROUNDS, ROUNDS_QUICK, Figure, Sides, distinct_keys
from ekko.train.optimizers import OPTIMIZERS, Normal, Uniform, aggregate, optimizer_of

F32 = NDArray[np.float32]

TARGETS = {"aggregate_rows_per_s": ">= 5e6"}
DIM = 64
BATCH = 16_384
PUSHES = 4  # a batch comes in so many
TORCHS = {"sgd": optim.SGD, "adagrad": optim.Adagrad, "adam": optim.SparseAdam}


def run(quick: bool) -> dict[str, Figure]:
    """Measure; a table of 500,000 rows, or of 20,000 when quick."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse invariant checks")
            return _measured(20_000 if quick else 500_000, ROUNDS_QUICK if quick else ROUNDS, 1 if quick else 10)
    finally:
        torch.set_num_threads(threads)


def _measured(total: int, rounds: int, repeats: int) -> dict[str, Figure]:
    random = np.random.default_rng(1)
    start = random.standard_normal((total, DIM), np.float32)
    gradients = random.standard_normal((BATCH, DIM), np.float32)
    chosen = [np.sort(random.choice(total, BATCH, replace=False)) for _ in range(repeats)]
    figures: dict[str, Figure] = {}
    for name in OPTIMIZERS:
        figures |= _steps(name, start, gradients, chosen, rounds)
    return figures | _sums(gradients, total, rounds, repeats) | _first_rows(rounds, repeats)


def _alternate(rounds: int, sides: Mapping[str, Callable[[int], None]]) -> Sides:
    """As `common.alternate`, in seconds of the processor."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            begin = time.process_time()
            work(number)
            if number:
                seconds[name].append(time.process_time() - begin)
    return Sides(seconds)


def _steps(name: str, start: F32, gradients: F32, chosen: list[NDArray[np.int64]], rounds: int) -> dict[str, Figure]:
    """Rows a second of an optimiser; with those of torch, if it has one for sparse gradients."""
    spec = optimizer_of({"name": name})
    weights, state = start.copy(), spec.initial_state(start)
    moved, kept = weights[chosen[0]], state[chosen[0]]

    def kernel(_: int) -> None:
        for _rows in chosen:
            spec.apply(moved, kept, gradients)

    def ours(number: int) -> None:
        for rows in chosen:
            some, own = weights[rows], state[rows]
            spec.apply(some, own, gradients, step=number + 1)
            weights[rows], state[rows] = some, own

    sides = {"kernel": kernel, "ours": ours}
    if name in TORCHS:
        table = torch.nn.Parameter(torch.tensor(start))
        optimizer = TORCHS[name]([table])
        slopes = [
            torch.sparse_coo_tensor(torch.tensor(rows)[None], torch.tensor(gradients), table.shape, is_coalesced=True)
            for rows in chosen
        ]

        def torchs(_: int) -> None:
            for gradient in slopes:
                table.grad = gradient
                optimizer.step()

        sides["torch"] = torchs
    measured = _alternate(rounds, sides)
    count = BATCH * len(chosen)
    figures: dict[str, Figure] = {f"{name}_rows_per_s": count / measured.median("ours")}
    figures[f"{name}_kernel_rows_per_s"] = count / measured.median("kernel")
    if "torch" in sides:
        figures[f"{name}_vs_torch"] = measured.ratio("ours", "torch")
    return figures


def _sums(gradients: F32, total: int, rounds: int, repeats: int) -> dict[str, Figure]:
    """Of pushes whose keys are drawn from half as many as there are rows, so that about half of the rows are of a known key."""
    random = np.random.default_rng(2)
    ids = random.integers(0, BATCH // 2, BATCH)
    keys = np.split(distinct_keys(total, seed=3)[ids], PUSHES)
    parts = [np.ascontiguousarray(part) for part in np.split(gradients, PUSHES)]
    rows, values = torch.tensor(ids)[None], torch.tensor(gradients)

    def ours(_: int) -> None:
        for _again in range(repeats):
            aggregate(keys, parts)

    def torchs(_: int) -> None:
        for _again in range(repeats):
            torch.sparse_coo_tensor(rows, values, (BATCH, DIM)).coalesce()

    measured = _alternate(rounds, {"ours": ours, "torch": torchs})
    return {
        "aggregate_rows_per_s": BATCH * repeats / measured.median("ours"),
        "aggregate_vs_torch": measured.ratio("ours", "torch"),
    }


def _first_rows(rounds: int, repeats: int) -> dict[str, Figure]:
    keys = distinct_keys(BATCH, seed=4)

    def work(one: Normal | Uniform) -> None:
        for _again in range(repeats):
            one.rows("item", keys, DIM)

    normal, uniform = Normal(), Uniform()
    measured = _alternate(rounds, {"normal": lambda _: work(normal), "uniform": lambda _: work(uniform)})
    return {f"{name}_rows_per_s": BATCH * repeats / measured.median(name) for name in ("normal", "uniform")}
