"""One system, one trace, one network: a cluster that holds the model already gets a part of the trace."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.wan.delays import Delays, Summary
from benchmarks.wan.testbed import CORES, TABLE, TRAINER, Bed, filled_store, nodes
from p2p import messages as m
from p2p.machine import Machine
from p2p.paper.sync import PUSH, SyncOptions
from p2p.replica import RowColumns
from sim_cluster.costs import CostTable, VirtualCpus
from sim_cluster.network import NetworkOptions
from sim_cluster.node import VirtualNode
from sim_cluster.traces import Trace
from sim_cluster.virtual import MachineFactory, VirtualCluster

FORM_MS_MAX = 60_000
CALM = NetworkOptions(1, 1)
MODEL_SEED = 1


@dataclass(frozen=True, slots=True)
class Window:
    """How much of a trace is replayed, in seconds: a part with the rate of updates of the whole."""

    after_s: float  # not before this second of the trace
    warm_s: float  # at first, not measured
    measured_s: float
    drain_s: float  # at most, afterwards, until every replica shows everything


@dataclass(frozen=True, slots=True)
class System:
    """What is compared."""

    name: str
    sync: SyncOptions = PUSH
    make_machine: MachineFactory | None = None  # of a baseline; None: the product's, by `sync`
    drain_s: float = 0.0  # at most, for what is still on its way when the trace ends; 0: as the window says


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one replay measured."""

    delays: Summary
    bytes_local: float  # per update, over links inside a region; as on the small links
    bytes_cross: float  # between regions
    trainer_card: float  # how busy the trainer's card was while the trace ran
    trainer_cpu: float
    busiest_cpu: float  # of the others
    spent_ms: dict[str, float]  # CPU time by kind of work, all nodes
    seconds: float  # of this machine


class _Bytes:
    """Bytes that the links carried, by class."""

    def __init__(self, cluster: VirtualCluster) -> None:
        self.local = self.cross = self.trainer = 0.0
        self._cluster = cluster
        self._arrivals = cluster.post.network.arrivals
        cluster.post.network.arrivals = self._count  # type: ignore[method-assign]

    def _count(
        self, options: NetworkOptions, link: tuple[str, str], regions: tuple[str, str], size: float, now_ms: float
    ) -> list[int] | None:
        if regions[0] == regions[1]:
            self.local += size
        else:
            self.cross += size
        if link[0] == TRAINER:
            self.trainer += size
        return self._arrivals(options, link, regions, size, now_ms)


def _silent(_what: str) -> None:
    """Nobody watches."""


def replay(
    system: System,
    trace: Trace,
    window: Window,
    bed: Bed,
    costs: CostTable,
    network: NetworkOptions,
    *,
    scaled: bool = True,
    report: Callable[[str], None] = _silent,
) -> Outcome:
    """Form a cluster, replay the window, wait until every replica shows everything.

    Args:
        system: what carries the updates.
        trace: recorded.
        window: which part of it.
        bed: the model's size.
        costs: of the work.
        network: once the cluster has formed.
        scaled: whether a row stands for as many as the test-bed says, and cores for as many; or for itself.
        report: told now and then how far it is.

    Raises:
        RuntimeError: the cluster did not form.
    """
    begin = time.perf_counter()
    names = [name for name, _ in nodes()]
    delays = Delays(TRAINER, names[1:], bed.rows)
    cpus = VirtualCpus(costs, *((bed.rows_per_row, CORES) if scaled else (1.0, 1)), delays.observe)
    cluster = _form(system, bed, cpus)
    cluster.options = network
    meter = _Bytes(cluster)
    start_ms = cluster.now_ms
    duration_s = window.warm_s + window.measured_s
    begin_s = trace.typical_s(duration_s, window.after_s)
    _publish_all(cluster, trace.window(begin_s, begin_s + duration_s), report)
    end_ms = start_ms + int(duration_s * 1_000)
    cluster.run(end_ms - cluster.now_ms)
    card = network.card_bytes_per_ms
    loads = {name: cpus.busy_ms.get(name, 0.0) / (end_ms - start_ms) for name in names}
    trainer_card = meter.trainer / card / (end_ms - start_ms) if card else 0.0

    def drained() -> bool:
        report(f"{delays.waiting():,} updates on their way, {(cluster.now_ms - end_ms) / 1_000:.0f} s after the trace")
        return not delays.waiting()

    cluster.run_until(drained, int((system.drain_s or window.drain_s) * 1_000), 200)
    summary = delays.summary(start_ms + window.warm_s * 1_000, end_ms, cluster.now_ms)
    published = max(1, delays.updates)
    return Outcome(
        summary,
        meter.local / published,
        meter.cross / published,
        trainer_card,
        loads[TRAINER],
        max(load for name, load in loads.items() if name != TRAINER),
        {kind: round(spent) for kind, spent in sorted(cpus.spent_ms.items(), key=lambda item: -item[1])},
        time.perf_counter() - begin,
    )


def _form(system: System, bed: Bed, cpus: VirtualCpus) -> VirtualCluster:
    """All nodes, with what they hold before the trace begins; nothing of that takes them any time."""
    cpus.charging = False
    cluster = VirtualCluster(
        MODEL_SEED, CALM, bed.model, sync=system.sync, cpu=cpus, make_machine=system.make_machine or Machine
    )
    for name, region in nodes():
        trainer = name == TRAINER
        cluster.add(
            name, region, "train" if trainer else "serve", [] if trainer else [TRAINER], store=filled_store(bed, trainer)
        )
    # Baselines know their peers from the start.
    if system.make_machine is None and not cluster.run_until(lambda: _formed(cluster), FORM_MS_MAX, 500):
        raise RuntimeError(f"{system.name}: the cluster did not form within {FORM_MS_MAX / 1000:g} virtual seconds")
    cpus.charging = True
    return cluster


def _publish_all(cluster: VirtualCluster, steps: Iterator[tuple[int, np.ndarray]], report: Callable[[str], None]) -> None:
    start_ms = cluster.now_ms
    keyspace = cluster.model.id
    for number, (at_ms, keys) in enumerate(steps):
        report(f"second {at_ms / 1_000:.0f} of the trace")
        cluster.run(start_ms + at_ms - cluster.now_ms)
        rows = np.full((len(keys), TABLE.dim), number + 1, np.float32).view(np.uint8)
        columns = (RowColumns(TABLE.id, keys, rows),)
        cluster.request(TRAINER, lambda request, columns=columns: m.PublishRequested(request, keyspace, columns))  # type: ignore[misc]


def _formed(cluster: VirtualCluster) -> bool:
    """Everybody knows everybody."""

    def knows_all(node: VirtualNode) -> bool:
        assert node.machine is not None, f"{node.name}: {node.fatal}"
        return len(node.machine.status(cluster.now()).peers) == len(cluster.nodes) - 1

    return all(knows_all(node) for node in cluster.nodes.values())
