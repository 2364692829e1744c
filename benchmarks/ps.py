"""`ps`: what pulling and pushing rows costs on parameter servers: ekko's, one made of Redis, one made of torch RPC.

All three on one machine, rows of dim 64, one worker with several batches under way. What is compared is rows for each second of
processor time that worker, servers and nodes spend together, in rounds that alternate. A push is plain SGD on ekko and on torch
RPC, and on Redis a write of rows that somebody else has computed. Only ekko's becomes a version of the row with a stamp, and is
stored in a training model beside the one that is served; it would be sent to those who serve, of whom there are none here.

    ekko              the worker is on the machine of the server, as all workers here are, and pulls in its node's memory;
                      Redis has a Unix socket, and TensorPipe shared memory, for such workers
    ekko_wire         the worker pulls over TCP, as it would from another machine
    workers_4_vs_1    steps a second of 4 workers against 1, each of which pulls, computes for 5 ms (sleeps), pushes, and waits
                      for the answer before its next step
"""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.baselines.row_servers import RATE, Ekko, RowLoad, Stepper, Worker, absent_rpc, redis_worker, torch_worker
from benchmarks.baselines.servers import absent
from benchmarks.common import MODEL, ROUNDS, ROUNDS_QUICK, TABLE, Figure
from ekko.train import Client
from sim_cluster.processes import LocalCluster, NodeProcess, NodeSpec, free_ports

TARGETS = {"vs_redis_pipeline": ">= 3", "vs_torch_rpc": ">= 3", "workers_4_vs_1": ">= 3"}

DIM = 64
DEPTH = 4  # batches under way
GATED_BATCH = 1_000  # as the look-ups of Redis in `lookup`
BATCHES = (256, GATED_BATCH, 4_096)
ROWS_OF_ROUND = 200_000
FILL_ROWS = 4_096
COMPUTE_S = 0.005
WORKERS = 4
STEP_BATCH = 256
KINDS = ("pull", "push")


def run(quick: bool) -> dict[str, Figure]:
    """Measure all of it."""
    rounds = ROUNDS_QUICK if quick else ROUNDS
    figures: dict[str, Figure] = {}
    cells: list[dict[str, float | int | str]] = []
    for batch in BATCHES[:1] if quick else BATCHES:
        load = RowLoad(
            5_000 if quick else 200_000,
            DIM,
            batch,
            DEPTH * max(1, (4_000 if quick else ROWS_OF_ROUND) // batch // DEPTH),
            DEPTH,
        )
        measured = _rounds(load, rounds)
        cells += [
            {"batch": batch, "side": side, **{f"{kind}_rows_per_cpu_s": statistics.median(values[kind]) for kind in KINDS}}
            for side, values in measured.items()
        ]
        if batch == (BATCHES[0] if quick else GATED_BATCH):
            figures = _compared(measured)
    return {**figures, **_workers(quick), "cells": cells}


def _compared(measured: dict[str, dict[str, list[float]]]) -> dict[str, Figure]:
    """The gated figures; a ratio is the median over rounds, and of pulls and pushes the one that is worse."""
    ours = measured["ekko"]
    figures: dict[str, Figure] = {f"{kind}_rows_per_s": statistics.median(ours[kind]) for kind in KINDS}
    figures["pull_wire_rows_per_s"] = statistics.median(measured["ekko_wire"]["pull"])
    for figure, side, missing in (
        ("vs_redis_pipeline", "redis", absent("redis")),
        ("vs_torch_rpc", "torch_rpc", absent_rpc()),
    ):
        if side not in measured:
            figures[figure] = None
            figures[f"note_{figure.removeprefix('vs_')}"] = missing
            continue
        ratios = {
            kind: statistics.median(a / b for a, b in zip(ours[kind], measured[side][kind], strict=True)) for kind in KINDS
        }
        figures[figure] = min(ratios.values())
        figures |= {f"{kind}_{figure}": ratio for kind, ratio in ratios.items()}
        wire = zip(measured["ekko_wire"]["pull"], measured[side]["pull"], strict=True)
        figures[f"pull_wire_{figure}"] = statistics.median(a / b for a, b in wire)
    return figures


def _rounds(load: RowLoad, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Rows for each second of processor time, by side and kind, in rounds that alternate; the first one is for warming up."""
    makers = {"ekko": ekko_worker_beside, "ekko_wire": ekko_worker}
    makers |= {} if absent("redis") else {"redis": redis_worker}
    makers |= {} if absent_rpc() else {"torch_rpc": torch_worker}
    measured: dict[str, dict[str, list[float]]] = {side: {kind: [] for kind in KINDS} for side in makers}
    with ExitStack() as stack:
        workers = {side: stack.enter_context(make(load)) for side, make in makers.items()}
        for number in range(rounds + 1):
            for kind in KINDS:
                for side, worker in workers.items():
                    value = worker.rows_per_cpu_s(kind, number)
                    if number:
                        measured[side][kind].append(value)
    return measured


@contextmanager
def training_node(rows: int) -> Iterator[tuple[NodeProcess, str]]:
    """A training node with a server that has all rows, and the server's endpoint."""
    (port,) = free_ports(1)
    endpoint = f"tcp://127.0.0.1:{port}"
    with (
        TemporaryDirectory(prefix="ekko-bench-") as directory,
        LocalCluster(Path(directory), [NodeSpec("train-1", "home", "train")]) as cluster,
    ):
        node = cluster["train-1"]
        with node.config_path.open("a") as config:
            config.write(
                f"[server]\nlisten = {json.dumps(endpoint)}\n[server.models.{MODEL}]\n[server.models.{MODEL}.tables.{TABLE}]\n"
                f'dim = {DIM}\noptimizer = {{ name = "sgd", lr = {RATE} }}\n'
            )
        cluster.start()
        with Client([endpoint], MODEL, WORKERS) as client:
            for begin in range(0, rows, FILL_ROWS):
                keys = np.arange(begin, min(begin + FILL_ROWS, rows), dtype=np.uint64)
                client.push({TABLE: (keys, np.zeros((len(keys), DIM), np.float32))})
        yield node, endpoint


@contextmanager
def ekko_worker(load: RowLoad) -> Iterator[Worker]:
    """A training node with its server, and a worker, which pulls over the wire."""
    with training_node(load.table_rows) as (node, endpoint), _worker(load, node, endpoint, None) as worker:
        yield worker


@contextmanager
def ekko_worker_beside(load: RowLoad) -> Iterator[Worker]:
    """The same; the worker pulls in the node's memory, since it is on the same machine."""
    with training_node(load.table_rows) as (node, endpoint), _worker(load, node, endpoint, str(node.run_dir)) as worker:
        yield worker


def _worker(load: RowLoad, node: NodeProcess, endpoint: str, run_dir: str | None) -> Worker:
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    return Worker(load, Ekko, (endpoint, MODEL, 0, load.depth, run_dir), [node.pid, *map(int, children)])


def _workers(quick: bool) -> dict[str, Figure]:
    """Steps a second of one worker and of four, in rounds that alternate."""
    rounds, steps = (1, 20) if quick else (5, 200)
    load = RowLoad(5_000, DIM, STEP_BATCH, steps, 1)
    one, four = [], []
    with training_node(load.table_rows) as (_, endpoint), ExitStack() as stack:
        arguments = [(endpoint, MODEL, number, COMPUTE_S) for number in range(WORKERS)]
        steppers = [stack.enter_context(Worker(load, Stepper, own)) for own in arguments]
        for number in range(rounds + 1):
            alone = _steps_per_s(steppers[:1], steps, number)
            together = _steps_per_s(steppers, steps, number)
            if number:
                one.append(alone)
                four.append(together)
    return {
        "workers_4_vs_1": statistics.median(b / a for a, b in zip(one, four, strict=True)),
        "steps_per_s_1": statistics.median(one),
        "steps_per_s_4": statistics.median(four),
    }


def _steps_per_s(workers: list[Worker], steps: int, seed: int) -> float:
    """Of all workers together, which begin at the same time."""
    for number, worker in enumerate(workers):
        worker.ask("prepare", WORKERS * seed + number)
    begin = time.perf_counter()
    for worker in workers:
        worker.order("push", seed)
    for worker in workers:
        worker.done()
    return len(workers) * steps / (time.perf_counter() - begin)
