"""`sinks`: rows a second into each foreign store, as a first state and as updates, and how soon what is published is there.

The first state is a walk over a model of 200,000 rows of 64 values; updates are random batches of 4,096 rows, each written to
the node's shared memory and then fed. "nothing" is a sink that drops what it gets: what a feed costs by itself. Latency is
from the call of `publish` at a real node to the return of the `apply` that had the rows.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

import ekko
from benchmarks.baselines import servers
from benchmarks.common import MODEL, TABLE, Figure, fill, shared_model
from ekko.model import table_id
from ekko.serve.feeding import Feed
from ekko.serve.sink import Batch, Sink
from ekko.sinks import EmbeddingSink, RedisSink
from p2p.replica import RowColumns
from sim_cluster.processes import LocalCluster, ModelTables, NodeSpec

TARGETS: dict[str, str] = {}
DIM = 64
BATCH = 4_096
PUBLISHED = 100  # rows of a step whose latency is measured
U64 = NDArray[np.uint64]


class Nothing(Sink):
    """Takes all, keeps nothing but when it had each stamp."""

    def __init__(self) -> None:
        self.applied_s: dict[int, float] = {}

    def open(self, model: str) -> bytes | None:
        return None

    def add_table(self, table: str, dim: int) -> None:
        pass

    def drop_table(self, table: str) -> None:
        pass

    def apply(self, batch: Batch) -> None:
        pass

    def held(self, table: str) -> Iterator[tuple[U64, U64]]:
        return iter(())

    def commit(self, cursor: bytes) -> None:
        pass


def run(quick: bool) -> dict[str, Figure]:
    """Measure; 2,000 rows when quick."""
    rows = 2_000 if quick else 200_000
    rounds = 3 if quick else 60
    figures: dict[str, Figure] = {}
    with ExitStack() as stack, TemporaryDirectory(prefix="ekko-bench-") as directory:
        sinks = _sinks(rows, stack, Path(directory))
        cells: list[dict[str, float | int | str]] = []
        for name, sink in sinks.items():
            cells.append({"sink": name, **_rates(sink, rows, rounds)})
        figures["rates"] = cells
        figures["latency"] = _latencies(rows, 20 if quick else 1_000, stack, Path(directory))
        for cell in cells:
            figures[f"{cell['sink']}_rows_per_s"] = cell["first_rows_per_s"]
        if "redis" not in sinks:
            figures["redis_rows_per_s"], figures["note_redis_rows_per_s"] = None, servers.absent("redis")
    return figures


def _sinks(rows: int, stack: ExitStack, folder: Path) -> dict[str, Sink]:
    sinks: dict[str, Sink] = {"nothing": Nothing(), "embedding": EmbeddingSink({TABLE: torch.nn.Embedding(rows, DIM)})}
    with suppress(ImportError):  # it is not installed here
        sinks["fbgemm"] = _fbgemm(rows)
    if servers.absent("redis") is None:
        port = stack.enter_context(servers.server("redis", folder / f"redis-{rows}"))
        sinks["redis"] = RedisSink(f"redis://127.0.0.1:{port}/0")
    return sinks


def _fbgemm(rows: int) -> Sink:
    import fbgemm_gpu  # noqa: F401 - registers the operators
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    from ekko.sinks import FbgemmSink

    specs = [("", rows, DIM, SparseType.INT8, EmbeddingLocation.HOST)]
    bags = IntNBitTableBatchedEmbeddingBagsCodegen(specs, device="cpu")
    bags.initialize_weights()
    return FbgemmSink(bags, {TABLE: 0})


def _rates(sink: Sink, rows: int, rounds: int) -> dict[str, float]:
    """Rows a second of a first state, and of updates; a share of the latter is the node's own work, which is not counted."""
    with shared_model({TABLE: DIM}, rows) as (model, run_dir):
        fill(model, np.arange(rows, dtype=np.uint64), DIM, stamp=1 << 30)
        feed = Feed(run_dir, MODEL, sink)
        begin = time.perf_counter()
        while feed.turn():
            pass
        first_s = time.perf_counter() - begin
        rng, spent_s, sent = np.random.default_rng(0), 0.0, feed.counts.rows
        assert sent == rows
        for number in range(rounds):
            keys = rng.choice(rows, min(BATCH, rows), replace=False).astype(np.uint64)
            values = np.full((keys.size, DIM), number, np.float32)
            model.apply([RowColumns(table_id(TABLE), keys, values.view(np.uint8))], (1 << 30) + 1 + number)
            begin = time.perf_counter()
            while feed.turn():
                pass
            spent_s += time.perf_counter() - begin
        return {"first_rows_per_s": rows / first_s, "update_rows_per_s": (feed.counts.rows - sent) / spent_s}


def _latencies(rows: int, steps: int, stack: ExitStack, folder: Path) -> list[dict[str, float | int | str]]:
    """Of each sink, milliseconds from `publish` to the end of `apply`."""
    cells: list[dict[str, float | int | str]] = []
    nodes = [NodeSpec("train-1", "us", "train")]
    with LocalCluster(folder / "cluster", nodes, models={MODEL: ModelTables({TABLE: DIM}, capacity_rows=rows)}) as cluster:
        cluster.start()
        node = cluster["train-1"]
        with ekko.Publisher(node.local, model=MODEL) as publisher:
            for name, sink in _sinks(rows, stack, folder / "latency").items():
                applied: dict[int, float] = {}
                _timed(sink, applied)
                with Feed(node.run_dir, MODEL, sink) as feed:
                    feed.flush(60)
                    cells.append({"sink": name, **_of_steps(publisher, feed, applied, rows, steps)})
    return cells


def _timed(sink: Sink, applied: dict[int, float]) -> None:
    """Note when the rows of each stamp had been applied."""
    apply = sink.apply

    def timed(batch: Batch) -> None:
        apply(batch)
        now = time.perf_counter()
        for stamp in np.unique(batch.stamps).tolist():
            applied.setdefault(stamp, now)

    sink.apply = timed  # type: ignore[method-assign]


def _of_steps(
    publisher: ekko.Publisher, feed: Feed, applied: dict[int, float], rows: int, steps: int
) -> dict[str, float | int | str]:
    rng, begun = np.random.default_rng(1), {}
    for _ in range(steps):
        keys = rng.choice(rows, PUBLISHED, replace=False).astype(np.uint64)
        begin = time.perf_counter()
        stamp = publisher.publish(TABLE, keys, rng.standard_normal((PUBLISHED, DIM), np.float32))
        begun[stamp] = begin
        time.sleep(max(0.0, 0.005 - (time.perf_counter() - begin)))  # 200 steps a second
    feed.flush(60)
    delays = sorted(1000 * (applied[stamp] - begin) for stamp, begin in begun.items() if stamp in applied)
    return {
        "p50_ms": statistics.median(delays),
        "p99_ms": delays[int(0.99 * (len(delays) - 1))],
        "superseded": len(begun) - len(delays),
    }
