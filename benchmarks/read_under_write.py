"""`read-under-write`: two processes look rows up without pause while a third writes them as fast as it can.

Every row is written so that tearing would show: all its values are the low 24 bits of its stamp. Readers check each row they
get, and that no row goes back to an older stamp.

Three phases, each with the same three busy processes, so that what differs is the store and not the load on the machine:

    quiet     the writer overwrites rows of another table, which nobody reads
    busy      it overwrites the rows that are read
    growing   it inserts new rows into the table that is read, so that rows and index grow

Latencies are of one look-up of `BATCH` keys in the reader: by the wall clock where every process has a core of its own, else by
its thread's CPU time, for then the wall clock measures how the kernel deals out the cores. Spinning on a locked row counts in
both.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import MODEL, TABLE, Figure, claim_memory, distinct_keys, shared_model
from ekko.serve.reader import Reader
from ekko.store.kernels.compile import kernel
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns

TARGETS = {
    "p99_ratio": "<= 1.5",
    "torn_rows": "<= 0",
    "stamps_back": "<= 0",
    "rows_read": ">= 1e8",
    "growth_p999_ratio": "<= 1.5",
    "growth_stall_cpu_ms_max": "<= 5",
}
DIM = 16
BATCH = 1_024
READERS = 2
ELSEWHERE = "elsewhere"
LATENCIES_MAX = 1 << 20  # a ring: the newest ones of a phase count
MASK = (1 << 24) - 1  # whole numbers below 2**24 are exact in float32
WRITE_BATCH = 4_096

U64 = NDArray[np.uint64]


@kernel("void(float32[:, ::1], uint64[::1], int64[::1], uint64[::1], int64[::1])")
def _check(rows: NDArray[np.float32], stamps: U64, places: NDArray[np.int64], newest: U64, counts: NDArray[np.int64]) -> None:
    """Add (torn rows, rows that went back, absent rows) to `counts`; newest: uint64[total], the stamps seen so far."""
    for i in range(stamps.size):
        expected = np.float32(stamps[i] & np.uint64(MASK))
        torn = 0
        for j in range(rows.shape[1]):
            torn |= rows[i, j] != expected
        counts[0] += torn
        counts[1] += stamps[i] < newest[places[i]]
        counts[2] += stamps[i] == 0
        newest[places[i]] = stamps[i]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one reader saw in one phase."""

    rows: int
    torn: int
    back: int
    absent: int
    p99_us: float
    p999_us: float


def _own_cores() -> bool:
    """Is there a core for each reader and the writer?"""
    return len(os.sched_getaffinity(0)) > READERS


def read(run_dir: Path, total: int, seed: int) -> None:
    """The reading process: for each number of seconds on standard input, look up for so long and print what was seen."""
    keys = distinct_keys(total, seed=3)
    rng = np.random.default_rng(seed)
    newest = np.zeros(total, np.uint64)
    rows = np.empty((BATCH, DIM), np.float32)
    latencies = np.empty(LATENCIES_MAX, np.int64)
    clock = time.perf_counter_ns if _own_cores() else time.thread_time_ns
    with Reader(MODEL, run_dir) as reader:
        print("ready", flush=True)
        for line in sys.stdin:
            counts = np.zeros(3, np.int64)
            batches = 0
            end = time.monotonic() + float(line)
            while time.monotonic() < end:
                places = rng.integers(0, total, BATCH)
                wanted = keys[places]
                begin = clock()
                _, stamps = reader.lookup(TABLE, wanted, out=rows, stamps=True)
                latencies[batches % LATENCIES_MAX] = clock() - begin
                _check(rows, stamps, places, newest, counts)
                batches += 1
            us = latencies[: min(batches, LATENCIES_MAX)] / 1000
            p99, p999 = (float(np.percentile(us, p)) for p in (99, 99.9))
            torn, back, absent = (int(count) for count in counts)
            seen = Seen(batches * BATCH, torn, back, absent, p99, p999)
            print(json.dumps(asdict(seen)), flush=True)


@contextmanager
def _readers(run_dir: Path, total: int) -> Iterator[list["subprocess.Popen[str]"]]:
    with ExitStack() as stack:
        processes = []
        for seed in range(READERS):
            command = [sys.executable, "-m", "benchmarks.read_under_write", str(run_dir), str(total), str(seed)]
            root = Path(__file__).parent.parent
            process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)  # on the way out closes its input, which ends it, and waits
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield processes


def _phase(processes: list["subprocess.Popen[str]"], seconds: float, write: Callable[[], None]) -> list[Seen]:
    """Let the readers read for so long, and write until they are done."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        write()
    seen = []
    for process in processes:
        assert process.stdout is not None
        seen.append(Seen(**json.loads(process.stdout.readline())))
    return seen


class Writer:
    """Writes batches whose rows tell their stamp."""

    def __init__(self, model: ModelStore, keys: U64) -> None:
        self.rows_written = 0
        self.stall_cpu_ms_max = 0.0
        self._model = model
        self._keys = keys
        self._stamp = 1 << 30
        self._rng = np.random.default_rng(99)
        self._rows = np.empty((WRITE_BATCH, DIM), np.float32)

    def _apply(self, table: str, keys: U64) -> None:
        self._stamp += 1
        rows = self._rows[: keys.size]
        rows[...] = self._stamp & MASK
        begin = time.thread_time_ns()
        self._model.apply([RowColumns(self._model.spec.tables[table].id, keys, rows.view(np.uint8))], self._stamp)
        self.stall_cpu_ms_max = max(self.stall_cpu_ms_max, (time.thread_time_ns() - begin) / 1e6)
        self.rows_written += keys.size

    def fill(self, table: str) -> None:
        """Give every key a row."""
        for begin in range(0, self._keys.size, WRITE_BATCH):
            self._apply(table, self._keys[begin : begin + WRITE_BATCH])

    def overwrite(self, table: str) -> None:
        """Overwrite one batch of rows that are there."""
        first = int(self._rng.integers(0, self._keys.size - WRITE_BATCH + 1))
        self._apply(table, self._keys[first : first + WRITE_BATCH])

    def insert(self, table: str) -> None:
        """Insert one batch of rows with new keys."""
        self._apply(table, self._rng.integers(0, 1 << 63, WRITE_BATCH).astype(np.uint64))


def run(quick: bool) -> dict[str, Figure]:
    """Measure; 10 seconds of reading under write, or 2 when quick."""
    total = 20_000 if quick else 1_000_000
    keys = distinct_keys(total, seed=3)
    side_s, busy_s = (0.5, 2.0) if quick else (8.0, 10.0)
    with shared_model({TABLE: DIM, ELSEWHERE: DIM}) as (model, run_dir):
        writer = Writer(model, keys)
        writer.fill(TABLE)
        writer.fill(ELSEWHERE)
        with _readers(run_dir, total) as processes:
            quiet = _phase(processes, side_s, lambda: writer.overwrite(ELSEWHERE))
            before = writer.rows_written
            busy = _phase(processes, busy_s, lambda: writer.overwrite(TABLE))
            written = writer.rows_written - before
            claim_memory(1 << 20 if quick else 4 << 30)
            writer.stall_cpu_ms_max = 0.0
            growing = _phase(processes, side_s, lambda: writer.insert(TABLE))
    every = quiet + busy + growing
    assert sum(seen.absent for seen in every) == 0, "every key that is looked up has a row"
    return {
        "p99_ratio": max(seen.p99_us for seen in busy) / max(seen.p99_us for seen in quiet),
        "torn_rows": sum(seen.torn for seen in every),
        "stamps_back": sum(seen.back for seen in every),
        "rows_read": sum(seen.rows for seen in every),
        "rows_written_per_s": written / busy_s,
        "rows_read_per_s": sum(seen.rows for seen in busy) / busy_s,
        "clock": "wall" if _own_cores() else "thread CPU",
        "p99_us": max(seen.p99_us for seen in busy),
        "growth_p999_ratio": max(seen.p999_us for seen in growing) / max(seen.p999_us for seen in quiet),
        "growth_stall_cpu_ms_max": writer.stall_cpu_ms_max,
    }


if __name__ == "__main__":
    read(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
