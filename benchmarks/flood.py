"""Random bytes thrown at a node's port: what it costs the others.

A training and a serving node with keys. Steps are published at a steady pace, first undisturbed, then while a process throws
random bytes at the serving node's port over one connection after the other. Figures: growth of the node's resident
memory, and p99 of publish-to-visible before and during the flood.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import ekko
from benchmarks.common import Figure
from ekko.security import generate
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec

TARGETS = {"rss_growth_mb": "<= 64", "p99_ratio": "<= 3"}

STEPS_PER_S = 100
ROWS = 100
DIM = 64
WARM_S = 3.0
BLOCK_BYTES = 1 << 20

# Runs in a process of its own. Every other connection begins like ZeroMQ, so that junk meets the later parsers, too.
_THROWER = """
import os, socket, sys
port, left, block = (int(number) for number in sys.argv[1:])
greeting = b"\\xff" + bytes(8) + b"\\x7f\\x03\\x00" + b"CURVE".ljust(20, b"\\0") + bytes(32)
count = 0
while left > 0:
    count += 1
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            if count % 2:
                connection.sendall(greeting)
            while left > 0:
                left -= connection.send(os.urandom(min(block, left)))
    except OSError:
        left -= 4_096  # cut off: at least the first buffer had gone
print(count)
"""


def resident_bytes(node: NodeProcess) -> int:
    """What the node's process has in memory now, shared memory left out."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{node.pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def secure(cluster: LocalCluster) -> None:
    """Give each node a key, and all of them to all."""
    allow = next(iter(cluster.nodes.values())).folder.parent / "allow"
    allow.mkdir()
    for node in cluster.nodes.values():
        shutil.move(generate(node.folder / "node.key"), allow / f"{node.id}.pub")
        with node.config_path.open("a") as file:
            file.write(f'[security]\nkey_file = "node.key"\nallow = {json.dumps(str(allow))}\n')


def publish_while(publisher: ekko.Publisher, going_on: Callable[[], bool], watch: Callable[[], None]) -> None:
    """Publish at a steady pace as long as `going_on()`."""
    random = np.random.default_rng(0)
    due = time.monotonic()
    while going_on():
        keys = random.choice(100_000, ROWS, replace=False).astype(np.uint64)
        publisher.publish("item", keys, random.standard_normal((ROWS, DIM), dtype=np.float32))
        watch()
        due = max(due + 1 / STEPS_PER_S, time.monotonic() - 1)
        time.sleep(max(0.0, due - time.monotonic()))


def measure(megabytes: int, calm_s: float) -> dict[str, float]:
    """Throw `megabytes` at a node; returns the figures."""
    specs = [NodeSpec("t", "us", "train"), NodeSpec("s", "us")]
    models = {"ctr": ModelTables({"item": DIM}, capacity_rows=100_000)}
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder), specs, models=models) as cluster:
        secure(cluster)
        cluster.start()
        node = cluster["s"]
        with ekko.Publisher(cluster["t"].local, model="ctr") as publisher:

            def until(seconds: float) -> Callable[[], bool]:
                end = time.monotonic() + seconds
                return lambda: time.monotonic() < end

            publish_while(publisher, until(WARM_S), lambda: None)
            begin = node.delays(0).next
            publish_while(publisher, until(calm_s), lambda: None)
            calm = node.delays(begin)
            memory = peak = resident_bytes(node)
            started = time.monotonic()
            thrower = subprocess.Popen(
                [sys.executable, "-c", _THROWER, node.peers.rpartition(":")[2], str(megabytes << 20), str(BLOCK_BYTES)],
                stdout=subprocess.PIPE,
            )

            def watch() -> None:
                nonlocal peak
                peak = max(peak, resident_bytes(node))

            try:
                publish_while(publisher, lambda: thrower.poll() is None, watch)
                flood_s = time.monotonic() - started
                publisher.wait(publisher.last_stamp, "all", timeout=30)
            finally:
                thrower.kill()
                connections = int(thrower.communicate()[0] or 0)
            flooded = node.delays(calm.next)
        return {
            "megabytes": megabytes,
            "flood_s": round(flood_s, 2),
            "connections": connections,
            "rss_growth_mb": round((peak - memory) / (1 << 20), 2),
            "p99_before_ms": round(float(np.percentile(calm.delays_ms, 99)), 3),
            "p99_during_ms": round(float(np.percentile(flooded.delays_ms, 99)), 3),
            "p99_ratio": round(float(np.percentile(flooded.delays_ms, 99) / np.percentile(calm.delays_ms, 99)), 3),
            "batches_before": len(calm.delays_ms),
            "batches_during": len(flooded.delays_ms),
        }


def run(quick: bool) -> dict[str, Figure]:
    """One gigabyte; the tiny size throws 8 MB."""
    return dict(measure(8 if quick else 1_024, 1.0 if quick else 10.0))
