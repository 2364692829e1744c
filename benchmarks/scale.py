"""`scale`: 10, 100 and 1,000 nodes in six regions, in virtual time: what the trees cost, what they miss, and who carries it.

One publisher, 10 batches a second of 100 rows, 60 virtual seconds; once without loss, once with 1 % of all messages lost.
"""

import gc
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ekko.model import ModelSpec, TableSpec
from sim_cluster.checkers import Watch
from sim_cluster.meter import Meter
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster

TARGETS = {
    "redundancy_max": "<= 0.05",
    "redundancy_loss_1pct_max": "<= 0.2",
    "missed": "<= 0",
    "region_bytes_ratio_max": "<= 1.05",
    "busiest_to_mean_max": "<= 2",
}
SIZES = (10, 100, 1_000)
SIZES_QUICK = (10, 20)
REGIONS = 6
BATCH_EVERY_MS = 100
ROWS = 100
KEYS = 20_000
SECONDS, SECONDS_QUICK = 60, 3
FORM_MS_MAX = 120_000
SETTLE_MS_MAX = 30_000
PROCESSES = 2
CALM = NetworkOptions(delay_ms_min=1, delay_ms_max=3, region_delay_ms=40)
LOSSY = NetworkOptions(delay_ms_min=1, delay_ms_max=3, region_delay_ms=40, loss_probability=0.01)
TRAINER = "trainer"
BEHAVIOURS = {"calm": CALM, "1 % lost": LOSSY}
SHOW_EVERY_S = 0.5

# Told how many virtual milliseconds of publishing are over.
Report = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run measured."""

    redundancy: float
    missed: int
    region_bytes_ratio: float
    p99_ms: float
    busiest_to_mean: float
    depth: int
    seconds: float


def run(quick: bool) -> dict[str, object]:
    """Every size, without loss and with 1 %, on two cores: a run is one process."""
    nodes: dict[str, dict[str, float | int]] = {}
    sizes, seconds = (SIZES_QUICK, SECONDS_QUICK) if quick else (SIZES, SECONDS)
    # The largest first, since the others fit in beside it.
    work = [(size, behaviour) for size in sorted(sizes)[::-1] for behaviour in BEHAVIOURS]
    context = multiprocessing.get_context("spawn")
    done_ms = context.Array("l", len(work))
    with ProcessPoolExecutor(PROCESSES, context, _show_in, (done_ms,)) as pool:
        pending = {each: pool.submit(one_run, *each, seconds, number) for number, each in enumerate(work)}
        _watch(pending, done_ms, seconds)
        runs = {each: future.result() for each, future in pending.items()}
    for size in sizes:
        calm, lossy = (runs[size, behaviour] for behaviour in BEHAVIOURS)
        nodes[str(size)] = {
            "redundancy": calm.redundancy,
            "redundancy_loss_1pct": lossy.redundancy,
            "missed": calm.missed + lossy.missed,
            "region_bytes_ratio": calm.region_bytes_ratio,
            "p99_ms": calm.p99_ms,
            "p99_loss_1pct_ms": lossy.p99_ms,
            "busiest_to_mean": calm.busiest_to_mean,
            "depth": calm.depth,
            "seconds": round(calm.seconds, 1),
            "seconds_loss_1pct": round(lossy.seconds, 1),
        }
        print(f"{size} nodes: {nodes[str(size)]}", file=sys.stderr)
    figures: dict[str, object] = {
        "redundancy_max": max(one["redundancy"] for one in nodes.values()),
        "redundancy_loss_1pct_max": max(one["redundancy_loss_1pct"] for one in nodes.values()),
        "missed": sum(one["missed"] for one in nodes.values()),
        "region_bytes_ratio_max": max(one["region_bytes_ratio"] for one in nodes.values()),
        "busiest_to_mean_max": max(one["busiest_to_mean"] for one in nodes.values()),
    }
    return figures | {"nodes": nodes}


def _show_in(done_ms: Any) -> None:
    """A process of the pool begins, and will say here how far its runs have come."""
    global _done_ms
    _done_ms = done_ms


_done_ms: Any = None  # shared with the process that watches


def _watch(pending: Mapping[tuple[int, str], "Future[Run]"], done_ms: Any, seconds: int) -> None:
    """Show how far each run has come, until all have ended."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description:22}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks = [
            bar.add_task(f"{size:,} nodes, {behaviour}", total=seconds, state="", start=False) for size, behaviour in pending
        ]
        left = set(pending.values())
        while left:
            _, left = wait(left, SHOW_EVERY_S)
            for task, future, over_ms in zip(tasks, pending.values(), list(done_ms), strict=True):
                if future.done():
                    bar.update(task, completed=seconds, state="done")
                    bar.stop_task(task)
                elif future.running() and not bar.tasks[task].started:
                    bar.start_task(task)
                elif over_ms:
                    bar.update(task, completed=over_ms / 1_000, state=f"{over_ms / 1_000:.1f} of {seconds} virtual s")
                elif future.running():
                    bar.update(task, state="nodes meet")


def one_run(size: int, behaviour: str, seconds: int, number: int) -> Run:
    """A cluster of `size` nodes for so many virtual seconds of publishing; `number` is its place among those shown.

    Raises:
        RuntimeError: it did not form.
    """

    def report(over_ms: int) -> None:
        _done_ms[number] = over_ms

    gc.disable()  # what nodes let go of has no cycles, and the collector would look at a thousand nodes over and over
    try:
        return measure(size, seconds, BEHAVIOURS[behaviour], report)
    finally:
        gc.enable()


def measure(size: int, seconds: int, options: NetworkOptions, report: Report) -> Run:
    """The same, without a word of the collector.

    Raises:
        RuntimeError: it did not form.
    """
    begin = time.perf_counter()
    cluster = form(size)
    meter = cluster.meter = Meter()
    cluster.options = options
    rng, rows, payload = random.Random(size), 0, 0
    for step in range(seconds * 1_000 // BATCH_EVERY_MS):
        keys = rng.sample(range(KEYS), ROWS)
        cluster.publish(TRAINER, "item", keys, float(step))
        rows, payload = rows + ROWS, payload + ROWS * (8 + 16 * 4)
        cluster.run(BATCH_EVERY_MS)
        report((step + 1) * BATCH_EVERY_MS)
    cluster.options = CALM
    watch = Watch(cluster)
    cluster.run_until(lambda: not watch.missed(), SETTLE_MS_MAX, 1_000)
    delays = sorted(meter.delays_ms)
    # The origin's own region has its copy from the start; whatever enters the others is counted once each.
    regions = len({node.region for node in cluster.nodes.values()}) - 1
    others = [meter.bytes_sent.get(name, 0) for name in cluster.nodes if name != TRAINER]
    return Run(
        meter.rows / (rows * (size - 1)) - 1,
        watch.missed(),
        sum(meter.bytes_into.values()) / (payload * regions),
        float(delays[len(delays) * 99 // 100]),
        max(others) * len(others) / max(1, sum(others)),
        meter.hops_max,
        time.perf_counter() - begin,
    )


def form(size: int) -> VirtualCluster:
    """A cluster that has met.

    Raises:
        RuntimeError: it did not form.
    """
    model = ModelSpec("bench", 16, {"item": TableSpec("item", 16)})
    cluster = VirtualCluster(size, CALM, model, capacity_rows=KEYS)
    cluster.add(TRAINER, "region-0", "train")
    for number in range(1, size):
        cluster.add(f"node-{number}", f"region-{number % REGIONS}", seeds=[TRAINER])

    def formed() -> bool:
        machines = [node.machine for node in cluster.nodes.values() if node.machine is not None]
        return all(machine.peers_known == size - 1 for machine in machines)

    if not cluster.run_until(formed, FORM_MS_MAX, 1_000):
        raise RuntimeError(f"{size} nodes did not meet within {FORM_MS_MAX / 1000:g} virtual seconds")
    return cluster
