"""`read-under-write`: a process looks 256 keys up at a time, without pause, while another one writes as fast as it can.

Each has a core of its own, where there are two. What a row must be follows from its key and stamp, so that a torn row shows,
and a row of another key, too. Four parts:

    overwrite   rows are overwritten at full speed, in turn with nothing being written (idle)
    churn       rows are removed, and their slots given to other keys at once
    growth      the table grows to ten times its rows, after as many batches that overwrite rows (steady)
    control     the reader looks at no lock: now torn rows must be found, or the others prove nothing

Latencies are wall-clock where there are two cores, else thread CPU time, since then the clock measures how the kernel deals out
the core. The longest look-up during growth is always in thread CPU time.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import MODEL, Figure, claim_memory, distinct_keys, shared_model
from ekko.serve.reader import Reader
from ekko.store import layout
from ekko.store.kernels import gather
from ekko.store.kernels.atomics import load_u64, store_u64
from ekko.store.kernels.compile import Int, kernel
from ekko.store.kernels.index import resolve
from ekko.store.kernels.quantise import decode_row
from ekko.store.kernels.whole_row import DATA, STAMP, put_default
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns

TARGETS = {
    "p99_ratio": "<= 1.5",
    "torn_rows": "<= 0",
    "stamps_back": "<= 0",
    "rows_read": ">= 1e8",
    "growth_p999_ratio": "<= 1.5",
    "growth_stall_cpu_ms_max": "<= 5",
    "unlocked_torn_rows": ">= 1",
}
ROWS, CHURN, GROWING = "rows", "churn", "growing"
DIMS = {ROWS: 64, CHURN: 64, GROWING: 16}
BATCH = 256
WRITE_BATCH = 4_096
LATENCIES_MAX = 1 << 21  # of a phase; the newest count
FIRST_STAMP = 1 << 30
# Values are (key & KEY_MASK) + (stamp - FIRST_STAMP): whole numbers below 2**24 are exact in float32.
KEY_MASK = (1 << 22) - 1
PATIENCE_S = 300

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
_ROWS_OFFSET = layout.TABLE.offset("rows")


@kernel("void(float32[:, ::1], uint64[::1], uint64[::1], int64[::1], uint64[::1], int64[::1])")
def _check(rows: F32, stamps: U64, keys: U64, places: I64, newest: U64, counts: I64) -> None:
    """Add (torn rows, rows that went back, absent rows) to `counts`; newest: uint64[total], the stamps seen so far."""
    for i in range(stamps.size):
        if stamps[i] == 0:
            counts[2] += 1
            continue
        expected = np.float32((keys[i] & np.uint64(KEY_MASK)) + (stamps[i] - np.uint64(FIRST_STAMP)))
        torn = 0
        for j in range(rows.shape[1]):
            torn |= rows[i, j] != expected
        counts[0] += torn
        counts[1] += stamps[i] < newest[places[i]]
        newest[places[i]] = stamps[i]


@kernel(
    "int64(int64, int64, int64, int64, int64, uint64, int64, Array(uint64, 1, 'C', readonly=True), float32[:, ::1], "
    "uint64[::1], int64)",
)
def _gather_unlocked(
    table: Int,
    stride: Int,
    codec: Int,
    index: Int,
    capacity_log2: Int,
    stamp_min: Int,
    default: Int,
    keys: U64,
    out: F32,
    stamps: U64,
    begin: Int,
) -> Int:
    """`ekko.store.kernels.gather.gather` by somebody who has not heard of locks, nor that slots change hands."""
    slots = np.empty(keys.size, np.int64)
    resolve(index, capacity_log2, keys, slots)
    dim = out.shape[1]
    for i in range(begin, keys.size):
        target = np.int64(out.ctypes.data) + i * dim * 4
        stamp_target = np.int64(stamps.ctypes.data) + i * 8
        if slots[i] < 0:
            put_default(default, dim, target)
            store_u64(stamp_target, np.uint64(0))
        else:
            row = table + _ROWS_OFFSET + slots[i] * stride
            store_u64(stamp_target, load_u64(row + STAMP))
            decode_row(codec, row + DATA, dim, target)
    return keys.size


@dataclass(frozen=True, slots=True)
class Task:
    """What a reader is to do: look up until so many seconds are over, or the table has so many rows."""

    table: str
    keys: int  # the first so many of the table's
    seconds: float
    rows_until: int = 1 << 62


@dataclass(frozen=True, slots=True)
class Seen:
    """What it saw."""

    rows: int
    torn: int
    back: int
    absent: int
    p50_us: float
    p99_us: float
    p999_us: float
    longest_cpu_ms: float


def _keys_of(table: str, count: int) -> U64:
    return distinct_keys(count, seed=list(DIMS).index(table) + 3)


def read(run_dir: Path, clock: Callable[[], int]) -> None:
    """The reading process: a task on each line of standard input, what was seen on one of standard output."""
    rng = np.random.default_rng(1)
    latencies, cpu = np.empty(LATENCIES_MAX, np.int64), np.empty(LATENCIES_MAX, np.int64)
    newest: dict[str, U64] = {}
    with Reader(MODEL, run_dir) as reader:
        print("ready", flush=True)
        for line in sys.stdin:
            task = Task(**json.loads(line))
            keys = _keys_of(task.table, task.keys)
            rows, counts, batches = np.empty((BATCH, DIMS[task.table]), np.float32), np.zeros(3, np.int64), 0
            known = newest.setdefault(task.table, np.zeros(keys.size, np.uint64))
            view = reader._table(task.table)  # noqa: SLF001 - how far the writer is
            end = time.monotonic() + task.seconds
            while time.monotonic() < end and view.rows_used < task.rows_until:
                places = rng.integers(0, keys.size, BATCH)
                wanted = keys[places]
                cpu_begin = time.thread_time_ns()
                begin = clock()
                _, stamps = reader.lookup(task.table, wanted, out=rows, stamps=True)
                latencies[batches % LATENCIES_MAX] = clock() - begin
                cpu[batches % LATENCIES_MAX] = time.thread_time_ns() - cpu_begin
                _check(rows, stamps, wanted, places, known, counts)
                batches += 1
            us = latencies[: max(1, min(batches, LATENCIES_MAX))] / 1000
            percentiles = (float(np.percentile(us, p)) for p in (50, 99, 99.9))
            longest = float(cpu[: us.size].max()) / 1e6
            print(json.dumps(asdict(Seen(batches * BATCH, *map(int, counts), *percentiles, longest))), flush=True)


class ReaderProcess:
    """The other side of `read`."""

    def __init__(self, run_dir: Path, core: int | None, *, locked: bool = True) -> None:
        clock = "cpu" if core is None else "wall"
        command = [sys.executable, "-m", "benchmarks.read_under_write", str(run_dir), clock, "locked" if locked else "unlocked"]
        root = Path(__file__).parent.parent
        self.process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})
        assert self._line() == "ready\n"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def run(self, task: Task, write: Callable[[], object] | None = None) -> Seen:
        """Have the reader do this, and write until it is done, or do nothing."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(task)) + "\n")
        self.process.stdin.flush()
        if write is not None:
            end = time.monotonic() + task.seconds
            while time.monotonic() < end and write() is not True:
                pass
        return Seen(**json.loads(self._line()))


@contextmanager
def _reader(run_dir: Path, core: int | None, *, locked: bool = True) -> Iterator[ReaderProcess]:
    reader = ReaderProcess(run_dir, core, locked=locked)
    with reader.process:  # on the way out closes its input, which ends it, and waits
        yield reader


class Writer:
    """Writes one table's batches, whose values tell key and stamp."""

    def __init__(self, model: ModelStore, table: str, total: int) -> None:
        self.keys = _keys_of(table, total)
        self.rows_written = 0
        self.stall_cpu_ms_max = 0.0
        self._model, self._spec = model, model.spec.tables[table]
        self.table = model._tables[self._spec.id]  # noqa: SLF001 - rows come and go with no protocol around them
        self._stamp = FIRST_STAMP
        self._rng = np.random.default_rng(99)
        self._next = (
            0  # the place of the first key that was not inserted, in `insert`; the oldest one that is here, in `replace`
        )

    def _write(self, keys: U64) -> None:
        self._stamp += 1
        values = ((keys & np.uint64(KEY_MASK)) + np.uint64(self._stamp - FIRST_STAMP)).astype(np.float32)
        rows = np.repeat(values[:, None], self._spec.dim, axis=1)
        begin = time.thread_time_ns()
        self._model.apply([RowColumns(self._spec.id, keys, rows.view(np.uint8))], self._stamp)
        self.stall_cpu_ms_max = max(self.stall_cpu_ms_max, (time.thread_time_ns() - begin) / 1e6)
        self.rows_written += keys.size

    def insert(self, until: int) -> bool:
        """Give the next batch of keys rows; True: `until` keys have rows."""
        keys = self.keys[self._next : min(self._next + WRITE_BATCH, until)]
        self._next += keys.size
        self._write(keys)
        return self._next == until

    def fill(self, count: int) -> None:
        """Give the first keys rows."""
        while not self.insert(count):
            pass

    def overwrite(self, count: int) -> None:
        """Overwrite rows of the first `count` keys."""
        batch = min(WRITE_BATCH, count)
        first = int(self._rng.integers(0, count - batch + 1))
        self._write(self.keys[first : first + batch])

    def replace(self) -> None:
        """Remove rows of some keys, and give their slots to others: half of the keys have rows at any time."""
        half = self.keys.size // 2
        places = (self._next - half + np.arange(min(WRITE_BATCH, half))) % self.keys.size
        removed = self.table.remove(self.table.resolve(self.keys[places]))
        assert removed == places.size
        self._write(self.keys[(places + half) % self.keys.size])
        self._next = (self._next + places.size) % self.keys.size


def _overwriting(core: int | None, seen: list[Seen], *, quick: bool) -> dict[str, Figure]:
    total, rounds, seconds, enough = (20_000, 1, 0.5, 0) if quick else (1_000_000, 7, 2.0, 10**8)
    ratios, idles, busies = [], [], []
    with shared_model({ROWS: DIMS[ROWS]}) as (model, run_dir):
        writer = Writer(model, ROWS, total)
        writer.fill(total)
        with _reader(run_dir, core) as reader:
            reader.run(Task(ROWS, total, seconds))  # warm
            begin = writer.rows_written
            for _ in range(rounds):
                idles.append(reader.run(Task(ROWS, total, seconds)))
                busies.append(reader.run(Task(ROWS, total, seconds), lambda: writer.overwrite(total)))
                ratios.append(busies[-1].p99_us / idles[-1].p99_us)
            written = writer.rows_written - begin
            seen += busies
            while sum(one.rows for one in seen) < enough:
                seen.append(reader.run(Task(ROWS, total, seconds), lambda: writer.overwrite(total)))
    assert sum(one.absent for one in idles + busies) == 0, "every key that is looked up has a row"
    figures: dict[str, Figure] = {"p99_ratio": statistics.median(ratios), "rows_written_per_s": written / (rounds * seconds)}
    for name, side in (("idle", idles), ("busy", busies)):
        for percentile in ("p50_us", "p99_us", "p999_us"):
            figures[f"{name}_{percentile}"] = statistics.median(getattr(one, percentile) for one in side)
    return figures


def _churning(core: int | None, seen: list[Seen], *, quick: bool) -> dict[str, Figure]:
    """Small enough that a slot is given to another key every few milliseconds."""
    total, seconds = (16_384, 0.5) if quick else (65_536, 8.0)
    with shared_model({CHURN: DIMS[CHURN]}) as (model, run_dir):
        writer = Writer(model, CHURN, total)
        writer.fill(total // 2)
        with _reader(run_dir, core) as reader:
            one = reader.run(Task(CHURN, total, seconds), writer.replace)
        reused = writer.table.slots_reused
    assert 0 < one.absent < one.rows
    seen.append(one)
    return {"churn_rows_read": one.rows, "churn_rows_torn_or_foreign": one.torn, "slots_reused": reused}


def _growing(core: int | None, seen: list[Seen], *, quick: bool) -> dict[str, Figure]:
    begin, end, rounds, seconds = (20_000, 400_000, 1, 0.5) if quick else (1_000_000, 10_000_000, 5, 3.0)
    ratios, stall, writer_stall = [], 0.0, 0.0
    for _ in range(rounds):
        with shared_model({GROWING: DIMS[GROWING]}) as (model, run_dir):
            claim_memory(1 << 20 if quick else 2 << 30)
            writer = Writer(model, GROWING, end)
            writer.fill(begin)
            with _reader(run_dir, core) as reader:
                reader.run(Task(GROWING, begin, seconds))  # warm
                steady = reader.run(Task(GROWING, begin, seconds), lambda writer=writer: writer.overwrite(begin))  # type: ignore[misc]
                writer.stall_cpu_ms_max = 0.0
                task = Task(GROWING, begin, PATIENCE_S, rows_until=end)
                grown = reader.run(task, lambda writer=writer: writer.insert(end))  # type: ignore[misc]
        assert steady.absent == grown.absent == 0
        seen += [steady, grown]
        ratios.append(grown.p999_us / steady.p999_us)
        stall, writer_stall = max(stall, grown.longest_cpu_ms), max(writer_stall, writer.stall_cpu_ms_max)
    return {
        "growth_p999_ratio": statistics.median(ratios),
        "growth_stall_cpu_ms_max": stall,
        "growth_apply_cpu_ms_max": writer_stall,
    }


def _control(core: int | None, *, quick: bool) -> dict[str, Figure]:
    """A few rows that are always being written, and a reader without locks; until it has found torn ones."""
    hot, attempts = 512, 20
    torn = 0
    with shared_model({ROWS: DIMS[ROWS]}) as (model, run_dir):
        writer = Writer(model, ROWS, hot)
        writer.fill(hot)
        with _reader(run_dir, core, locked=False) as reader:
            for _ in range(attempts):
                torn += reader.run(Task(ROWS, hot, 0.5 if quick else 2.0), lambda: writer.overwrite(hot)).torn
                if torn:
                    break
    return {"unlocked_torn_rows": torn}


def run(quick: bool) -> dict[str, Figure]:
    """Measure; a few minutes, or seconds when quick."""
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    separate = len(cores) > 1
    seen: list[Seen] = []
    try:
        if separate:
            os.sched_setaffinity(0, {cores[0]})
        core = cores[1] if separate else None
        figures = _growing(core, seen, quick=quick) | _churning(core, seen, quick=quick)
        figures |= _overwriting(core, seen, quick=quick) | _control(core, quick=quick)
    finally:
        os.sched_setaffinity(0, before)
    return figures | {
        "torn_rows": sum(one.torn for one in seen),
        "stamps_back": sum(one.back for one in seen),
        "rows_read": sum(one.rows for one in seen),
        "clock": "wall" if separate else "thread CPU",
    }


if __name__ == "__main__":
    if sys.argv[3] == "unlocked":
        gather.gather = _gather_unlocked
    read(Path(sys.argv[1]), time.perf_counter_ns if sys.argv[2] == "wall" else time.thread_time_ns)
