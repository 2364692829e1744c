"""What all benchmarks share: fair timing of two sides, the environment, and the report.

A benchmark is a module of this package, named as the benchmark with `_` for `-`. It has

    TARGETS: dict[str, str]                     figure -> ">= 0.8", what `scripts/bench` checks it against
    def run(quick: bool) -> dict[str, Figure]   measures; `quick` is the tiny size that runs under test

so that adding one is adding a file.
"""

import importlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from ekko.codec import encode
from ekko.model import CODEC_DEFAULT, ModelSpec, TableSpec
from ekko.store import Store, layout
from ekko.store.access import DEFAULT_ACCESS
from ekko.store.memory import Mapping as SharedMemory
from ekko.store.model_store import ModelStore
from ekko.store.store import MEMORY_DIR
from p2p.replica import RowColumns

Figure = float | int | str | list[dict[str, float | int | str]] | None  # None: not measured here, and a note says why
U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

ROUNDS = 7  # of each side; an odd number, so that the median is a round that was measured
ROUNDS_QUICK = 3
MODEL = "bench"
TABLE = "rows"


@dataclass(frozen=True, slots=True)
class Sides:
    """Seconds of each round, by side, measured in alternation."""

    seconds: dict[str, list[float]]

    def median(self, side: str) -> float:
        """Median seconds of a round."""
        return statistics.median(self.seconds[side])

    def ratio(self, ours: str, theirs: str) -> float:
        """How many times as fast `ours` is as `theirs`: the median over rounds of the ratio within a round.

        Rounds next to each other see the same machine, so that a slow minute does not count for one side only.
        """
        pairs = zip(self.seconds[ours], self.seconds[theirs], strict=True)
        return statistics.median(b / a for a, b in pairs)


def alternate(rounds: int, sides: Mapping[str, Callable[[int], None]]) -> Sides:
    """Time the sides in turn, `rounds` times, after one round of each to warm up.

    Args:
        rounds: how many.
        sides: name -> what to time; it gets the number of the round, 0 for warming up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            begin = time.perf_counter()
            work(number)
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return Sides(seconds)


@contextmanager
def shared_model(
    tables: Mapping[str, int], capacity_rows: int = 0, codec: str = CODEC_DEFAULT
) -> Iterator[tuple[ModelStore, Path]]:
    """A model in real shared memory, and the run_dir under which readers find it; removed afterwards."""
    with TemporaryDirectory(prefix="ekko-bench-") as directory:
        run_dir = Path(directory)
        store = Store.open(run_dir)
        try:
            spec = ModelSpec(MODEL, tables={name: TableSpec(name, dim, codec) for name, dim in tables.items()}, codec=codec)
            yield store.add_model(spec, capacity_rows), run_dir
        finally:
            store.destroy()


@contextmanager
def shared_array(rows: int, dim: int) -> Iterator[F32]:
    """float32[rows, dim] of zeros in tmpfs, as another process would share it; every page is there."""
    path = MEMORY_DIR / f"ekko-bench-{os.getpid()}-{rows}-{dim}"
    size = -(-rows * dim * 4 // layout.PAGE_BYTES) * layout.PAGE_BYTES
    mapping = SharedMemory.create(path, size, DEFAULT_ACCESS)
    path.unlink()
    mapping.ensure(size)
    yield mapping.words(0, size // 8).view(np.float32)[: rows * dim].reshape(rows, dim)


def claim_memory(size: int) -> None:
    """Touch and free so many bytes of tmpfs.

    The host of a virtual machine may have taken its free pages back, and then the first touch of each costs microseconds that
    are not ours.
    """
    with shared_array(size // 4, 1) as array:
        array[:: layout.PAGE_BYTES // 4] = 1


def distinct_keys(count: int, seed: int) -> U64:
    """uint64[count]: keys without repeats, in no order, over the whole range."""
    keys = np.arange(count, dtype=np.uint64) + np.uint64(seed << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the mixer of SplitMix64, a bijection
        keys ^= keys >> np.uint64(shift)
        keys *= np.uint64(factor)
    return keys ^ (keys >> np.uint64(31))


def fill(model: ModelStore, keys: U64, dim: int, stamp: int, table: str = TABLE, batch: int = 65_536) -> None:
    """Give every key a row, in the order of `keys`; row i is the number i, dim times."""
    table_id = model.spec.tables[table].id
    for begin in range(0, keys.size, batch):
        part = keys[begin : begin + batch]
        rows = np.repeat(np.arange(begin, begin + part.size, dtype=np.float32)[:, None], dim, axis=1)
        model.apply([RowColumns(table_id, part, encode(model.spec.codec, rows))], stamp)


def environment(seconds: float, quick: bool) -> dict[str, str | int | float | bool]:
    """Where and on what a benchmark ran."""
    root = Path(__file__).parent.parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False)
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": model,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": git.stdout.strip() or "unknown",
        "seconds": round(seconds, 2),
        "quick": quick,
    }


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def names() -> list[str]:
    """Every benchmark there is."""
    others = {"__init__", "__main__", "common"}
    return sorted(path.stem.replace("_", "-") for path in Path(__file__).parent.glob("*.py") if path.stem not in others)


def measure(name: str, quick: bool) -> dict[str, object]:
    """Run one benchmark: the JSON object that `scripts/bench` writes."""
    module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
    begin = time.perf_counter()
    figures = module.run(quick)
    return {"name": name, "figures": figures, "environment": environment(time.perf_counter() - begin, quick)}


def targets(name: str) -> dict[str, str]:
    """What each figure is to be."""
    found: dict[str, str] = importlib.import_module(f"benchmarks.{name.replace('-', '_')}").TARGETS
    return found


def meets(value: float, target: str) -> bool:
    """Is the value what a target such as ">= 0.8" asks for?"""
    relation, bound = target.split()
    return value >= float(bound) if relation == ">=" else value <= float(bound)
