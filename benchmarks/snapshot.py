"""`snapshot`: what a snapshot costs, and how soon a node serves again.

A store of 2 GB is snapshotted while another process applies to it at full speed, each process on a core of its own, against
a plain write of as many bytes to a file beside it, synced too, while the same process applies. Then it is restarted: attached
to in shared memory, from a fresh process to the first look-up; and loaded from disk, against a plain read of the same files
into fresh memory. Files are dropped from the page cache before each side reads them.
"""

import mmap
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.common import MODEL, TABLE, Figure, distinct_keys, fill
from ekko.model import ModelSpec, TableSpec
from ekko.snapshots.folders import LocalFolder
from ekko.snapshots.format import CHUNK_BYTES, SnapshotManifest
from ekko.snapshots.load import Wanted, open_or_restore
from ekko.snapshots.write import SnapshotWriter
from ekko.store import Store, layout
from p2p.replica import RowColumns

TARGETS = {"vs_file_write": ">= 0.5", "apply_slowdown": "<= 0.2", "restart_shm_s": "<= 1", "restart_disk_vs_read": ">= 0.5"}
DIM = 64
BATCH = 4_096
ROUNDS = 5
WARM_S = 0.5  # of applying before each measurement

_ATTACH = """
import time, sys
from pathlib import Path
import numpy as np
from ekko.store import Store
from ekko.serve.reader import Reader
store = Store.open(Path(sys.argv[1]))
assert store.resumed
reader = Reader("bench", run_dir=sys.argv[1])
reader.lookup("rows", np.arange(64, dtype=np.uint64))
print(time.clock_gettime(time.CLOCK_MONOTONIC))
"""


def run(quick: bool) -> dict[str, Figure]:
    """Measure; 2 GB, or 2 MB when quick."""
    rows = (2 << 20 if quick else 2_000_000_000) // layout.row_stride(4 * DIM)
    keys = distinct_keys(rows, seed=1)
    rounds = 1 if quick else ROUNDS
    with TemporaryDirectory(prefix="ekko-bench-") as directory:
        run_dir, disk = Path(directory) / "run", Path(directory) / "disk"
        disk.mkdir()
        store = Store.open(run_dir)
        try:
            model = store.add_model(ModelSpec(MODEL, tables={TABLE: TableSpec(TABLE, DIM)}), rows)
            fill(model, keys, DIM, stamp=1)
            figures = _write(store, run_dir, disk, keys, rounds)
            store.close()
            _attach(run_dir)  # the interpreter writes down what it compiled, as an installer does
            figures["restart_shm_s"] = statistics.median(_attach(run_dir) for _ in range(rounds))
            figures |= _read(run_dir, disk, rounds)
        finally:
            left = Store.attach(run_dir)
            if left is not None:
                left.destroy()
    return figures


@contextmanager
def _applying(store: Store, keys: np.ndarray) -> Iterator[mmap.mmap]:
    """Another process applies fresh random keys at full speed, and counts its rows in the memory that this gives."""
    counter = mmap.mmap(-1, 8)
    pid = os.fork()
    if pid == 0:
        model, count = store.models[MODEL], np.frombuffer(counter, np.int64)
        rng, table, stamp = np.random.default_rng(os.getpid()), model.spec.tables[TABLE].id, model.stamp_max + 1
        rows = np.ones((BATCH, DIM), np.float32).view(np.uint8)
        while True:
            stamp += 4_096
            model.apply([RowColumns(table, keys[rng.integers(0, keys.size, BATCH)], rows[: min(BATCH, keys.size)])], stamp)
            count[0] += BATCH
    try:
        yield counter
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _applied(counter: mmap.mmap) -> int:
    return int.from_bytes(counter[:8], "little")


def _plain_write(path: Path, size: int) -> None:
    """As many bytes as a snapshot has, from memory that is there, in pieces of the same size; durable."""
    data = np.random.default_rng(1).integers(0, 255, CHUNK_BYTES, np.uint8)
    with path.open("wb", buffering=0) as file:
        for begin in range(0, size, CHUNK_BYTES):
            file.write(data[: size - begin].data)
        os.fsync(file.fileno())


def _write(store: Store, run_dir: Path, disk: Path, keys: np.ndarray, rounds: int) -> dict[str, Figure]:
    """Snapshot and plain write in turn; rows applied a second during each, and during neither."""
    writer, folder = SnapshotWriter(run_dir, LocalFolder(disk), "bench"), LocalFolder(disk)
    manifest: SnapshotManifest | None = None
    ratios, slowdowns, plain_slowdowns, rates = [], [], [], []
    with _applying(store, keys) as counter:
        for number in range(rounds + 1):
            if manifest is not None:
                folder.remove(manifest.name)
            time.sleep(WARM_S)
            begin, applied = time.perf_counter(), _applied(counter)
            manifest = writer.write()
            snapshot_s, during = time.perf_counter() - begin, _applied(counter) - applied
            begin, applied = time.perf_counter(), _applied(counter)
            time.sleep(max(WARM_S, snapshot_s))
            alone_s, alone = time.perf_counter() - begin, _applied(counter) - applied
            begin, applied = time.perf_counter(), _applied(counter)
            _plain_write(disk / "plain", manifest.bytes)
            plain_s, beside = time.perf_counter() - begin, _applied(counter) - applied
            (disk / "plain").unlink()
            if number:
                ratios.append(plain_s / snapshot_s)
                rates.append(manifest.bytes / snapshot_s)
                slowdowns.append(1 - during / snapshot_s * alone_s / max(1, alone))
                plain_slowdowns.append(1 - beside / plain_s * alone_s / max(1, alone))
    assert manifest is not None
    return {
        "vs_file_write": statistics.median(ratios),
        "apply_slowdown": statistics.median(slowdowns),
        "bytes_per_s": statistics.median(rates),
        "plain_write_slowdown": statistics.median(plain_slowdowns),
        "bytes": manifest.bytes,
    }


def _attach(run_dir: Path) -> float:
    """Seconds from the start of a fresh process to its first look-up, which attaches for writing and for reading."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", _ATTACH, str(run_dir)]
    begin = time.clock_gettime(time.CLOCK_MONOTONIC)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1]) - begin


def _drop_cache(files: list[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read(run_dir: Path, disk: Path, rounds: int) -> dict[str, Figure]:
    """Restart from disk and plain read in turn."""
    files, ratios, cached, seconds = sorted(disk.glob("*/*")), [], [], []
    for number in range(2 * rounds + 2):
        cold = number % 2 == 0
        store = Store.attach(run_dir)
        if store is not None:
            store.destroy()
        if cold:
            _drop_cache(files)
        begin = time.perf_counter()
        restored = open_or_restore(run_dir, [LocalFolder(disk)], Wanted())
        load_s = time.perf_counter() - begin
        assert restored.snapshot is not None, restored.refused
        restored.store.close()
        if cold:
            _drop_cache(files)
        begin = time.perf_counter()
        for file in files:
            with file.open("rb", buffering=0) as source:
                target = memoryview(bytearray(file.stat().st_size))
                while target and (count := source.readinto(target)):
                    target = target[count:]
        read_s = time.perf_counter() - begin
        if number > 1:
            (ratios if cold else cached).append(read_s / load_s)
            if cold:
                seconds.append(load_s)
    return {
        "restart_disk_vs_read": statistics.median(ratios),
        "restart_disk_s": statistics.median(seconds),
        "restart_cached_vs_read": statistics.median(cached),
    }
