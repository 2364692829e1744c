"""From the call of `publish` until a reader has the row from the device: real nodes, a store and a device each.

One region without delay, as in `scripts/bench latency`, whose figure is of the same way up to the serving node's shared memory.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import ekko
from benchmarks.common import MODEL, TABLE
from sim_cluster.processes import LocalCluster, ModelTables, NodeSpec, wait_until

DIM = 64
TABLE_ROWS = 4_096
BATCH_ROWS = 100
BATCHES, BATCHES_QUICK = 300, 10
WAIT_S_MAX = 60.0


def publish_to_visible(device: str, quick: bool) -> dict[str, float]:
    """Milliseconds, by batches of 100 rows that the device has, one after the other.

    Args:
        device: "cuda:0" or "host-twin", of the serving node and of the reader in this process.
        quick: few batches.
    """
    nodes = (
        NodeSpec("train", "home", "train"),
        NodeSpec("serve", "home", device={"name": device, "rows": 2 * TABLE_ROWS}),
    )
    models = {MODEL: ModelTables({TABLE: DIM}, capacity_rows=TABLE_ROWS)}
    with (
        TemporaryDirectory(prefix="ekko-bench-") as folder,
        LocalCluster(Path(folder), nodes, models=models) as cluster,
    ):
        cluster.start()
        keys = np.arange(BATCH_ROWS, dtype=np.uint64)
        with ekko.Publisher(cluster["train"].local, MODEL) as publisher:

            def publish(number: int) -> None:
                publisher.publish(TABLE, keys, np.full((BATCH_ROWS, DIM), number, np.float32))

            publish(0)
            publisher.wait(publisher.last_stamp, "all", WAIT_S_MAX)
            with ekko.Reader(MODEL, cluster["serve"].run_dir, device=device) as reader:
                return _measure(reader, publish, keys, BATCHES_QUICK if quick else BATCHES)


def _measure(reader: ekko.Reader, publish: Callable[[int], None], keys: np.ndarray, batches: int) -> dict[str, float]:
    tier = reader.device
    assert tier is not None
    asked = keys[-1:]

    def shown() -> float:
        return float(tier.device.download(reader.lookup(TABLE, asked))[0, 0])

    def all_on_the_device() -> bool:
        before = tier.counts.misses + tier.counts.host_only
        reader.lookup(TABLE, keys)
        return tier.counts.misses + tier.counts.host_only == before

    wait_until(all_on_the_device, "rows on the device", WAIT_S_MAX)
    times, before = [], tier.counts.hits
    looked = 0
    for number in range(1, batches + 1):
        begin = time.monotonic()
        publish(number)
        while shown() != number:
            looked += 1
        looked += 1
        times.append(time.monotonic() - begin)
    return {
        "publish_to_visible_p50_ms": float(np.median(times)) * 1e3,
        "publish_to_visible_p99_ms": float(np.percentile(times, 99)) * 1e3,
        # Else it was shared memory that was measured.
        "publish_to_visible_hits": (tier.counts.hits - before) / looked,
    }
