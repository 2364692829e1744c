"""`latency`: from the entry of `publish` to the last row of the batch being readable at a replica, at an even pace.

Eight real nodes in three regions, one of them the training node; 100 batches a second of 100 rows; one sample for each batch
and serving node, taken by the node itself (GET /delays; the machine's one monotonic clock). First without any delay between the
regions, then with emulated one-way delays, which are subtracted: the excess is what ekko adds to the way.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

import ekko
from benchmarks.common import MODEL, TABLE, Figure
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec

TARGETS = {"p50_ms": "<= 3", "p99_ms": "<= 15", "wan_excess_p99_ms": "<= 15", "samples_missing": "<= 0"}
HOME = "home"
ONE_WAY_MS = {"us": 40.0, "ap": 90.0}
DELAYS_MS = {f"{HOME}/{region}": delay for region, delay in ONE_WAY_MS.items()} | {"us/ap": 60.0}
NODES = (
    NodeSpec("train", HOME, "train"),
    NodeSpec("home-1", HOME),
    *(NodeSpec(f"{region}-{number}", region) for region in ONE_WAY_MS for number in range(3)),
)
DIM = 64
BATCH_ROWS = 100
BATCHES_PER_S = 100.0
TABLE_ROWS = 100_000
BATCHES, BATCHES_QUICK = 2_000, 50
WARM_BATCHES, WARM_BATCHES_QUICK = 300, 20
WAIT_S_MAX = 60.0

F64 = NDArray[np.float64]


def run(quick: bool) -> dict[str, Figure]:
    """Measure without and with delays."""
    near, near_late = _measure({}, quick)
    far, far_late = _measure(DELAYS_MS, quick)
    near_all, far_all = np.concatenate(list(near.values())), np.concatenate(list(far.values()))
    return {
        "p50_ms": _percentile(near_all, 50),
        "p99_ms": _percentile(near_all, 99),
        "max_ms": _percentile(near_all, 100),
        "wan_excess_p50_ms": _percentile(far_all, 50),
        "wan_excess_p99_ms": _percentile(far_all, 99),
        # How late this machine woke the publisher, which asked for nothing but to be woken: its noise, not ours.
        "late_wakeup_p99_ms": _percentile(near_late, 99),
        "wan_late_wakeup_p99_ms": _percentile(far_late, 99),
        "samples": near_all.size + far_all.size,
        # A batch that reached a node by repair has no sample there, and must not flatter the others.
        "samples_missing": 2 * near_late.size * (len(NODES) - 1) - near_all.size - far_all.size,
        "nodes": [
            {
                "node": node,
                "p50_ms": _percentile(near[node], 50),
                "p99_ms": _percentile(near[node], 99),
                "one_way_ms": ONE_WAY_MS.get(region, 0.0),
                "wan_excess_p50_ms": _percentile(far[node], 50),
                "wan_excess_p99_ms": _percentile(far[node], 99),
            }
            for node, region in ((spec.id, spec.region) for spec in NODES[1:])
        ],
    }


def _measure(delays_ms: dict[str, float], quick: bool) -> tuple[dict[str, F64], F64]:
    """Milliseconds above the one-way delay, by serving node; and how late the publisher was woken for each batch."""
    batches, warm = (BATCHES_QUICK, WARM_BATCHES_QUICK) if quick else (BATCHES, WARM_BATCHES)
    models = {MODEL: ModelTables({TABLE: DIM}, capacity_rows=TABLE_ROWS)}
    with (
        TemporaryDirectory(prefix="ekko-bench-") as folder,
        LocalCluster(Path(folder), NODES, models=models, delays_ms=delays_ms) as cluster,
    ):
        cluster.start()
        with ekko.Publisher(cluster["train"].local, MODEL) as publisher:
            _publish(publisher, warm)
            serving = [cluster[spec.id] for spec in NODES[1:]]
            before = {node.id: _delays(node, 0)[0] for node in serving}
            late_ms = _publish(publisher, batches)
        excess = {}
        for node in serving:
            _, delays = _delays(node, before[node.id])
            one_way_ms = ONE_WAY_MS.get(node.spec.region, 0.0) if delays_ms else 0.0
            excess[node.id] = delays - one_way_ms
    return excess, late_ms


def _publish(publisher: ekko.Publisher, batches: int) -> F64:
    """Publish at an even pace and wait until every node has it; how late each batch began, in milliseconds."""
    rng = np.random.default_rng(3)
    keys = [rng.choice(TABLE_ROWS, BATCH_ROWS, replace=False).astype(np.uint64) for _ in range(batches)]
    rows = rng.standard_normal((BATCH_ROWS, DIM), dtype=np.float32)
    late_ms = np.empty(batches)
    due = time.monotonic()
    for number in range(batches):
        due += 1 / BATCHES_PER_S
        time.sleep(max(0.0, due - time.monotonic()))
        late_ms[number] = (time.monotonic() - due) * 1000
        publisher.publish(TABLE, keys[number], rows)
    publisher.wait(publisher.last_stamp, "all", WAIT_S_MAX)
    return late_ms


def _delays(node: NodeProcess, since: int) -> tuple[int, F64]:
    """Where the node's list ends now, and its delays from `since` on."""
    found: list[float] = []
    while (part := node.delays(since)).delays_ms:
        found += part.delays_ms
        since = part.next
    return since, np.array(found)


def _percentile(values: F64, percent: float) -> float:
    return float(np.percentile(values, percent))
