"""`hooks`: what `ekko.torch.track` costs a trainer, what waits while the node is stopped, and whether it misses a row.

The demo's model, optimizer, batch size and dense parameters, with real nodes: one that the trainer publishes to, one that
serves. Stretches of steps with and without tracking take turns; a stretch of one is compared with the other beside it. What a
stretch took in processor time, of all threads of the trainer, is told apart: of wall time some belongs to whoever else uses the
machine.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

import ekko
import ekko.torch
from benchmarks.common import MODEL, Figure
from ekko.torch import PublishStep, Tracker
from sim_cluster.demo import data
from sim_cluster.demo.learning import DIM, STREAM_BATCH, Learner
from sim_cluster.demo.trainer import DENSE_EVERY
from sim_cluster.processes import LocalCluster, ModelTables, NodeSpec

TARGETS = {
    "step_overhead": "<= 0.05",
    "queue_per_row_bytes": "<= 5",
    "captured_equals_changed": ">= 1",
    "rows_missed": "<= 0",
    "stores_equal": ">= 1",
}
SEED = 1
OFFLINE = 20_000  # events, so that tables and optimizer are as in a stream
STEPS, STEPS_QUICK = 150, 20  # of a stretch
PAIRS, PAIRS_QUICK = 101, 3
IN_STEP_PAIRS = 15
STALLED_STEPS, STALLED_STEPS_QUICK = 1_500, 40
EXACT_STEPS, EXACT_STEPS_QUICK = 500, 40
WAIT_S_MAX = 60.0
NODES = (NodeSpec("train", "eu", "train"), NodeSpec("serve", "eu"))

F32 = NDArray[np.float32]


def run(quick: bool) -> dict[str, Figure]:
    """All of it, with one model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the demo's trainer
    try:
        events = data.generate(SEED, "the same for everybody", 40_000)
        learner = _Endless(events, 500 if quick else OFFLINE)
        with _cluster(events) as cluster, ekko.Publisher(cluster["train"].local, MODEL) as publisher:
            with _tracked(learner, publisher) as tracker:
                tracker.publish_all()
            figures = _exact(learner, publisher, quick)
            figures |= _overhead(learner, publisher, quick)
            with _tracked(learner, publisher) as tracker:
                tracker.publish_all()  # what stretches without tracking changed
            figures |= _stalled(learner, publisher, cluster, quick)
            publisher.wait(publisher.last_stamp, "all", WAIT_S_MAX)
            figures["stores_equal"] = int(all(_equal(learner, node.run_dir) for node in cluster.nodes.values()))
        return figures
    finally:
        torch.set_num_threads(threads)


class _Endless:
    """A learner that begins its stream again when it has come to the end."""

    def __init__(self, events: data.Events, offline: int) -> None:
        self._learner = Learner(events, SEED)
        self._learner.train_offline(offline)
        self._count = len(events)
        self._next = offline
        self.model, self.optimizer = self._learner.model, self._learner.optimizer

    def steps(self, count: int) -> None:
        for _ in range(count):
            first = self._next
            self._next = first + STREAM_BATCH if first + 2 * STREAM_BATCH <= self._count else 0
            self._learner.learn(first, first + STREAM_BATCH)

    def tables(self) -> dict[str, F32]:
        """Copies."""
        return {name: table.get_parameter("weight").detach().numpy().copy() for name, table in self.model.tables.items()}


@contextmanager
def _cluster(events: data.Events) -> Iterator[LocalCluster]:
    models = {MODEL: ModelTables(dict.fromkeys(events.rows, DIM))}
    with (
        TemporaryDirectory(prefix="ekko-bench-") as folder,
        LocalCluster(Path(folder), NODES, models=models) as cluster,
    ):
        cluster.start()
        yield cluster


def _tracked(learner: _Endless, publisher: object, **options: bool) -> Tracker:
    model = learner.model
    return ekko.torch.track(model, learner.optimizer, publisher, model.tracked, dense_every=DENSE_EVERY, **options)  # type: ignore[arg-type]


def _overhead(learner: _Endless, publisher: ekko.Publisher, quick: bool) -> dict[str, Figure]:
    """How much longer steps take; in the background, and not in it."""
    count, pairs = (STEPS_QUICK, PAIRS_QUICK) if quick else (STEPS, PAIRS)
    taken: dict[str, list[tuple[float, float]]] = {"none": [], "background": [], "in_step": []}
    batches = waited_s = 0.0
    learner.steps(count)
    for number in range(pairs):
        sides = ["none", "background"] if number % 2 else ["background", "none"]  # neither gains by what drifts
        for side in [*sides, "in_step"][: None if number < IN_STEP_PAIRS else 2]:
            tracker = None if side == "none" else _tracked(learner, publisher, background=side == "background")
            wall, processor = time.perf_counter(), time.process_time()
            learner.steps(count)
            taken[side].append((time.perf_counter() - wall, time.process_time() - processor))
            if tracker is not None:
                if side == "background":
                    batches += tracker.counts.batches
                    waited_s += tracker.counts.waited_s
                tracker.remove()
    figures: dict[str, Figure] = {"step_ms": statistics.median(wall for wall, _ in taken["none"]) / count * 1000}
    for side, name in (("background", ""), ("in_step", "_in_step")):
        for place, kind in ((0, "step_overhead"), (1, "processor_overhead")):
            ratios = [with_[place] / without[place] for with_, without in zip(taken[side], taken["none"], strict=False)]
            figures[kind + name] = statistics.median(ratios) - 1
    ratios = [after[0] / before[0] for before, after in zip(taken["none"], taken["none"][1:], strict=False)]
    figures["step_noise"] = statistics.median(abs(ratio - 1) for ratio in ratios)  # of stretches without tracking
    figures["batches_per_step"] = batches / (pairs * count)
    figures["waited_fraction"] = waited_s / sum(wall for wall, _ in taken["background"])
    return figures


def _stalled(learner: _Endless, publisher: ekko.Publisher, cluster: LocalCluster, quick: bool) -> dict[str, Figure]:
    """What adds up while the node is stopped."""
    with _tracked(learner, publisher) as tracker:
        before = tracker.counts.bytes_due
        cluster["train"].pause()
        try:
            learner.steps(STALLED_STEPS_QUICK if quick else STALLED_STEPS)
            counts = tracker.counts
        finally:
            cluster["train"].resume()
        tracker.flush()
        rows = sum(len(table) for table in learner.tables().values())
        assert counts.bytes_due == before
        assert counts.rows_due_max <= rows
    return {
        "queue_rows_max": counts.rows_due_max,
        "table_rows": rows,
        "queue_bytes": counts.bytes_due,
        "queue_per_row_bytes": counts.bytes_due / rows,
        "stalled_steps": counts.steps,
        "stalled_batches": counts.batches,
    }


def _exact(learner: _Endless, publisher: ekko.Publisher, quick: bool) -> dict[str, Figure]:
    """Rows that were published against rows that changed, to the bit: of each step, and of all steps in the background."""
    count = EXACT_STEPS_QUICK if quick else EXACT_STEPS
    rows = missed = more = 0
    recorder = _Recorder(publisher)
    before = learner.tables()
    for background, steps in ((False, 1), (True, count)):
        with _tracked(learner, recorder, background=background) as tracker:
            for _ in range(count // steps):
                recorder.keys.clear()
                learner.steps(steps)
                tracker.flush()
                after = learner.tables()
                changed = _changed(before, after)
                rows += len(changed)
                missed += len(changed - recorder.keys)
                more += len(recorder.keys - changed)
                before = after
    # More than changed: a gradient so small that the row is the same after rounding. None in a model that learns.
    return {
        "captured_equals_changed": int(missed == more == 0),
        "changed_rows": rows,
        "rows_missed": missed,
        "rows_more": more,
    }


def _changed(before: dict[str, F32], after: dict[str, F32]) -> set[tuple[str, int]]:
    """Table and row, of each that changed."""
    return {
        (name, int(row))
        for name, rows in after.items()
        for row in np.flatnonzero((rows.view(np.uint32) != before[name].view(np.uint32)).any(axis=1))
    }


def _equal(learner: _Endless, run_dir: Path) -> bool:
    """Whether a node has the tables to the bit."""
    with ekko.Reader(MODEL, run_dir=run_dir) as reader:
        return all(
            np.array_equal(reader.lookup(name, np.arange(len(rows), dtype=np.uint64)).view(np.uint32), rows.view(np.uint32))
            for name, rows in learner.tables().items()
        )


class _Recorder:
    """A publisher that notes the keys that pass through it."""

    def __init__(self, publisher: ekko.Publisher) -> None:
        self._publisher = publisher
        self.tables = publisher.tables
        self.keys: set[tuple[str, int]] = set()

    @contextmanager
    def step(self) -> Iterator[PublishStep]:
        with self._publisher.step() as step:
            yield _Noting(step, self.keys)


class _Noting:
    def __init__(self, step: PublishStep, keys: set[tuple[str, int]]) -> None:
        self._step = step
        self._keys = keys

    @property
    def stamp(self) -> int:
        return self._step.stamp

    def publish(self, table: str, keys: NDArray[np.uint64], rows: F32, significance: F32 | None = None) -> None:
        self._keys.update((table, int(key)) for key in keys)
        self._step.publish(table, keys, rows, significance)

    def publish_dense(self, name: str, array: F32) -> None:
        self._step.publish_dense(name, array)
