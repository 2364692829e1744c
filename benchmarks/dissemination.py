"""`dissemination`: rows a second from one publisher into four replicas, against other ways to do it. All with real processes.

ekko runs one training node, to which one publisher process hands step after step, and four serving nodes of one region. The
serving nodes are the replicas; the training node, which stores every row too, is counted as the publisher's side, although it
takes its share of the cores. A row costs ekko what it costs in production: it is stamped, checksummed, found by key, written
under its lock, and covered by claims, so that what is lost would be noticed. The opponents are in `benchmarks.baselines`.

A round ends when the slowest replica has applied everything that was published, and the time until then counts. Nobody may
drop: the opponents' publishers are held back by counters in shared memory, ekko's by `Publisher.wait` for an earlier step.

Rates of a machine whose cores are all busy are decided by what a batch costs: `cpu` says who spends what, and who limits. It is
left out where a server takes part, which is not counted.
"""

import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import ekko
from benchmarks.baselines.fleet import BaselineError, Fleet, differences
from benchmarks.baselines.load import Batches, Load
from benchmarks.baselines.servers import absent, server
from benchmarks.baselines.sides import SIDES, WINDOW
from benchmarks.baselines.spent import Round, figures_of, limit_of, stopwatch
from benchmarks.common import MODEL, TABLE, Figure
from ekko.codec import rounded
from sim_cluster.processes import LocalCluster, ModelTables, NodeSpec, free_ports

TARGETS = {
    "vs_raw_zmq": ">= 0.7",
    "vs_raw_zmq_float16": ">= 1.1",
    "vs_redis_streams": ">= 2",
    "vs_redis_mset_mget": ">= 6",
    "vs_nats": ">= 2",
}
REPLICAS = 4
ROUNDS, ROUND_S = 5, 12.0
ROUNDS_QUICK, ROUND_S_QUICK = 1, 0.5
WARM_S, WARM_S_QUICK = 2.0, 0.1
WAIT_S_MAX = 60.0
# How often, in batches, ekko's publisher asks whether the replicas have what it published a window ago.
ASK_EVERY = WINDOW // 4
CODECS = ("float32", "float16")

TRAIN = NodeSpec("train", "home", "train")
SERVE = [NodeSpec(f"serve-{number}", "home") for number in range(REPLICAS)]


def run(quick: bool) -> dict[str, Figure]:
    """Measure all sides in turn."""
    load = Load(20_000, 200, 64) if quick else Load(1_000_000, 1_000, 64)
    rounds, seconds, warm_s = (ROUNDS_QUICK, ROUND_S_QUICK, WARM_S_QUICK) if quick else (ROUNDS, ROUND_S, WARM_S)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="ekko-bench-")))
        ours = stack.enter_context(_Ours(folder, load))
        fleet = stack.enter_context(Fleet(load, REPLICAS))
        sides: dict[str, Callable[[float], Round]] = {"ekko": partial(ours.round, "float32")}
        sides["ekko_float16"] = partial(ours.round, "float16")
        notes: dict[str, Figure] = {}
        ports: dict[str, int] = {}
        for name, side in SIDES.items():
            missing = side.server and absent(side.server)
            if missing:
                notes[f"note_{name}"] = missing
                continue
            kind = side.server or "none"
            if kind not in ports:
                ports[kind] = stack.enter_context(server(kind, folder / kind)) if side.server else free_ports(1)[0]
            sides[name] = partial(fleet.round, name, ports[kind])
        found = _alternate(sides, rounds, seconds, warm_s)
        notes |= ours.notes()
    rates = {name: [one.rows_per_s for one in own] for name, own in found.items()}
    return _figures(rates, notes) | _spent(found)


def _alternate(
    sides: dict[str, Callable[[float], Round]], rounds: int, seconds: float, warm_s: float
) -> dict[str, list[Round]]:
    for side in sides.values():
        side(warm_s)
    found: dict[str, list[Round]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side(seconds))
    return found


def _figures(rates: dict[str, list[float]], notes: dict[str, Figure]) -> dict[str, Figure]:
    ours = rates["ekko"]
    figures: dict[str, Figure] = {"rows_per_s": statistics.median(ours)}
    for name in SIDES:
        figures[f"vs_{name}"] = _ratio(ours, rates[name]) if name in rates else None
    # float16 rows on our wire and in our memory; raw ZeroMQ sends and stores float32, as it always does.
    figures["vs_raw_zmq_float16"] = _ratio(rates["ekko_float16"], rates["raw_zmq"])
    figures["rounds"] = [
        {"side": name, "rows_per_s": statistics.median(found), "slowest": min(found), "fastest": max(found)}
        for name, found in rates.items()
    ]
    return figures | notes


def _spent(found: dict[str, list[Round]]) -> dict[str, Figure]:
    """What a batch costs, and what limits, of sides without a server."""
    counted = {name: rounds for name, rounds in found.items() if name not in SIDES or SIDES[name].server is None}
    limits: dict[str, Figure] = {f"{name}_limited_by": limit_of(rounds) for name, rounds in counted.items()}
    for name, role in limits.items():
        limits[name] = f"all {len(os.sched_getaffinity(0))} cores" if role == "all" else f"{role}: the busiest process"
    return limits | {"cpu": [cell for name, rounds in counted.items() for cell in figures_of(name, rounds)]}


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Rounds next to each other see the same machine, so that a slow minute does not count for one side only."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


class _Ours:
    """ekko's side: one cluster with a model for each codec. Use as a context manager."""

    def __init__(self, folder: Path, load: Load) -> None:
        self._load = load
        self._batches: Batches = load.batches()
        self._publishers: dict[str, ekko.Publisher] = {}  # codec -> of its model
        models = {
            _model_of(codec): ModelTables({TABLE: load.dim}, capacity_rows=load.table_rows, codec=codec) for codec in CODECS
        }
        self._cluster = LocalCluster(folder / "nodes", [TRAIN, *SERVE], models=models)
        self._stack = ExitStack()

    def __enter__(self) -> "_Ours":
        self._stack.enter_context(self._cluster)
        self._cluster.start()
        for codec in CODECS:
            publisher = ekko.Publisher(self._cluster["train"].local, _model_of(codec))
            self._publishers[codec] = self._stack.enter_context(publisher)
            # Insert every key, as the opponents' tables have every row.
            for number in range(self._load.cycle):
                stamp = self._publish(publisher, number)
                if number % ASK_EVERY == 0:
                    self._wait(publisher, stamp)
            self._wait(publisher, stamp)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _publish(self, publisher: ekko.Publisher, number: int) -> int:
        return publisher.publish(TABLE, self._batches.keys_of(number), self._batches.rows_of(number))

    def _wait(self, publisher: ekko.Publisher, stamp: int) -> None:
        publisher.wait(stamp, "all", WAIT_S_MAX)

    def round(self, codec: str, seconds: float) -> Round:
        """Rows a second that the slowest replica applied.

        Raises:
            BaselineError: a replica does not hold what was published last.
        """
        self._batches = replace(self._batches, round=self._batches.round + 1)
        publisher = self._publishers[codec]
        asked: deque[int] = deque()
        number = 0
        before = self._forwarded()
        spent = stopwatch({"publisher": [os.getpid()]} | {spec.id: [self._cluster[spec.id].pid] for spec in (TRAIN, *SERVE)})
        begin = time.monotonic()
        while time.monotonic() < begin + seconds:
            stamp = self._publish(publisher, number)
            number += 1
            if number % ASK_EVERY == 0:
                asked.append(stamp)
                if len(asked) * ASK_EVERY >= WINDOW:
                    self._wait(publisher, asked.popleft())
        self._wait(publisher, stamp)
        seconds = time.monotonic() - begin
        spent_s = spent()
        # Which replica leads follows from the nodes' names and lives: the leader is who sent on most.
        sent = self._forwarded()
        leader = max(SERVE, key=lambda spec: sent[spec.id] - before[spec.id]).id
        for spec in SERVE:
            with ekko.Reader(_model_of(codec), run_dir=self._cluster[spec.id].run_dir) as reader:
                stored = replace(self._batches, blocks=np.stack([rounded(codec, rows) for rows in self._batches.blocks]))
                wrong = differences(partial(reader.lookup, TABLE), stored, number)
            if wrong:
                raise BaselineError(f"{spec.id} does not hold {wrong} of the newest batches in {codec}")
        roles = {
            "publisher": spent_s["publisher"],
            "train": spent_s[TRAIN.id],
            "leader": spent_s[leader],
            "leaf": [spent_s[spec.id][0] for spec in SERVE if spec.id != leader],
        }
        return Round(number * self._load.batch_rows / seconds, number, seconds, roles)

    def _forwarded(self) -> dict[str, int]:
        """Batches that each node has sent on so far."""
        return {spec.id: self._cluster[spec.id].status()["counters"]["batches_forwarded"] for spec in (TRAIN, *SERVE)}

    def notes(self) -> dict[str, Figure]:
        """How much of it did not go down the trees."""
        counters = [self._cluster[spec.id].status()["counters"] for spec in (TRAIN, *SERVE)]
        return {f"ekko_{key}": sum(c[key] for c in counters) for key in ("batches_skipped", "gaps", "pull_rows_sent")}


def _model_of(codec: str) -> str:
    return f"{MODEL}-{codec}"
