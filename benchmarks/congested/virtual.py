"""The load on a virtual cluster of three regions, whose links to the training region become narrow.

The training node and a serving node are in one region, two serving nodes in each of two others, 40 and 90 ms away. Between two
regions lies a pipe that everybody shares, with a bounded buffer. While it is narrow the budget of the pair is just below it,
as an operator would set it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from benchmarks.congested.lag import Timeline
from benchmarks.congested.load import TABLE, Load, classes_of
from benchmarks.wan.delays import Delays
from p2p import messages as m
from p2p.machine import Machine
from p2p.replica import RowColumns
from sim_cluster.costs import COSTS, CostTable, VirtualCpus
from sim_cluster.network import LinkOptions, NetworkOptions, pair_of
from sim_cluster.virtual import MachineFactory, VirtualCluster

TRAINER: Final = "train"
HOME: Final = "home"
DELAYS_MS: Final = {"us": 40, "ap": 90}
NODES: Final = {TRAINER: HOME, "home-1": HOME} | {f"{region}-{number}": region for region in DELAYS_MS for number in range(2)}
# The budget of a pair, of its pipe: the rest is for TCP's own bytes, heartbeats and acknowledgements.
BUDGET_SHARE: Final = 0.95
# What waits in front of a narrow pipe before it refuses more, milliseconds of its rate: a router's buffer.
BUFFER_MS: Final = 1_000
SEED: Final = 5
FORM_MS_MAX: Final = 60_000
DRAIN_MS_MAX: Final = 600_000
# After a narrow stretch the pipe has so many times the demand.
WIDE: Final = 2.0
# The lag is normal again when the oldest update that is not everywhere is this young: twice the longest way.
NORMAL_MS: Final = 180
_FREE: Final = CostTable(**dict.fromkeys(COSTS, 0.0))


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    outbox: str  # "state", "fifo" or "none"
    rate_bytes_per_s: float | None  # of the narrow pipes; None: never narrow
    warm_s: float  # before the pipes become narrow
    narrow_s: float  # of which the last `measured_s` are measured
    measured_s: float
    wide_bytes_per_s: float | None = None  # afterwards
    recover_s: float = 0.0  # at most, for the lag to be normal again


@dataclass(slots=True, eq=False)
class Run:
    """What one run did."""

    timeline: Timeline
    begin_ms: float  # of what is measured
    end_ms: float
    narrow_ms: float  # when the pipes became narrow
    crossed_bytes: float  # into one region, on average, while they were and were measured
    equal: bool  # all replicas hold the same at the end
    backlog_bytes: float = 0.0  # of what the replica that is furthest behind lacked when the pipes became wide
    recovered_ms: float | None = None  # from then on until the lag was normal; None: it was not within the time
    saved_told: float = 0.0  # bytes that the trainer's links say that coalescing saved
    modes: dict[str, int] = field(default_factory=dict)  # how often a look at a link found which mode
    seconds: float = 0.0


class Crossed:
    """Bytes that went from the training region into the others."""

    def __init__(self, cluster: VirtualCluster) -> None:
        self.bytes = 0.0
        self._arrivals = cluster.post.network.arrivals
        cluster.post.network.arrivals = self._count  # type: ignore[method-assign]

    def _count(
        self, options: NetworkOptions, link: tuple[str, str], regions: tuple[str, str], size: float, now_ms: float
    ) -> list[int] | None:
        arrivals = self._arrivals(options, link, regions, size, now_ms)
        if regions[0] == HOME and regions[1] != HOME and arrivals is not None:
            self.bytes += size
        return arrivals


def pipes(rate_bytes_per_s: float | None) -> NetworkOptions:
    """The network, with narrow pipes between the training region and the others."""
    rate = 0.0 if rate_bytes_per_s is None else rate_bytes_per_s / 1_000
    buffer = rate * BUFFER_MS if rate else float("inf")
    links = {
        pair_of(HOME, region): LinkOptions(delay, shared_bytes_per_ms=rate, buffer_bytes=buffer)
        for region, delay in DELAYS_MS.items()
    }
    return NetworkOptions(1, 1, links=links | {pair_of(*DELAYS_MS): LinkOptions(60)})


def machine_with(outbox: str) -> MachineFactory:
    """A machine of the product, with this outbox."""
    return lambda options, host, ledger, rng: Machine(replace(options, outbox=outbox), host, ledger, rng)


def run(load: Load, plan: Plan, report: Callable[[str], None] = lambda _: None) -> Run:
    """One run.

    Raises:
        RuntimeError: the cluster did not form.
    """
    begin = time.perf_counter()
    delays = Delays(TRAINER, [name for name in NODES if name != TRAINER], load.rows)
    cpus = VirtualCpus(_FREE, observer=delays.observe)
    cluster = VirtualCluster(
        SEED, pipes(None), load.model, cpu=cpus, make_machine=machine_with(plan.outbox), capacity_rows=load.rows
    )
    for name, region in NODES.items():
        cluster.add(name, region, "serve" if name != TRAINER else "train", [] if name == TRAINER else [TRAINER])

    def formed() -> bool:
        machines = [node.machine for node in cluster.nodes.values() if node.machine is not None]
        return all(machine.peers_known == len(NODES) - 1 for machine in machines)

    if not cluster.run_until(formed, FORM_MS_MAX, 500):
        raise RuntimeError(f"the cluster did not form within {FORM_MS_MAX / 1000:g} virtual seconds")
    crossed, publishing = Crossed(cluster), _Publishing(cluster, load)
    publishing.run(int(plan.warm_s * 1_000), report)
    done = _narrow(cluster, publishing, crossed, plan, report)
    if plan.recover_s:
        _widen(cluster, publishing, delays, load, plan, done, report)
    _drain(cluster, delays, report)
    done.timeline = publishing.timeline(delays)
    done.equal = _are_equal(cluster)
    done.seconds = time.perf_counter() - begin
    return done


class _Publishing:
    """The load's steps, one after the other, at their times."""

    def __init__(self, cluster: VirtualCluster, load: Load) -> None:
        self._cluster = cluster
        self._load = load
        self._steps: Iterator[tuple[int, np.ndarray, np.ndarray]] = load.steps()
        self._start_ms = cluster.now_ms
        self._next = next(self._steps)
        self._classes: list[np.ndarray] = []
        self._table = load.model.tables[TABLE].id

    def run(self, duration_ms: int, report: Callable[[str], None]) -> None:
        """Let so much time pass."""
        end_ms = self._cluster.now_ms + duration_ms
        while self._start_ms + self._next[0] < end_ms:
            at_ms, keys, significance = self._next
            self._cluster.run(self._start_ms + at_ms - self._cluster.now_ms)
            report(f"second {at_ms / 1_000:.0f}")
            self._publish(len(self._classes), keys, significance)
            self._next = next(self._steps)
        self._cluster.run(end_ms - self._cluster.now_ms)

    def _publish(self, number: int, keys: np.ndarray, significance: np.ndarray) -> None:
        classes = classes_of(significance)
        self._classes.append(classes)
        rows = np.full((len(keys), self._load.dim), number + 1, np.float32).view(np.uint8)
        columns = RowColumns(self._table, keys, rows, priority=classes)
        family = self._load.model.id
        self._cluster.request(TRAINER, lambda request: m.PublishRequested(request, family, (columns,)))

    def timeline(self, delays: Delays) -> Timeline:
        """All that was published so far."""
        committed_ms, visible_ms = delays.times()
        return Timeline(committed_ms, visible_ms, np.concatenate(self._classes)[: len(committed_ms)])


def _narrow(
    cluster: VirtualCluster, publishing: _Publishing, crossed: Crossed, plan: Plan, report: Callable[[str], None]
) -> Run:
    narrow_ms = cluster.now_ms
    _set_rate(cluster, plan.rate_bytes_per_s)
    publishing.run(int((plan.narrow_s - plan.measured_s) * 1_000), report)
    begin_ms, before, modes = cluster.now_ms, crossed.bytes, dict[str, int]()
    for _ in range(int(plan.measured_s)):
        publishing.run(1_000, report)
        for link in _links(cluster):
            mode = str(getattr(link, "mode", "-"))
            modes[mode] = modes.get(mode, 0) + 1
    bytes_in = (crossed.bytes - before) / len(DELAYS_MS)
    saved = float(sum(getattr(link, "bytes_saved", 0) for link in _links(cluster)))
    return Run(_NOTHING, begin_ms, cluster.now_ms, narrow_ms, bytes_in, False, saved_told=saved, modes=modes)


def _widen(
    cluster: VirtualCluster,
    publishing: _Publishing,
    delays: Delays,
    load: Load,
    plan: Plan,
    done: Run,
    report: Callable[[str], None],
) -> None:
    """The pipes become wide; how long it takes until every replica shows what is newer than the normal lag."""
    wide_ms = cluster.now_ms
    if plan.outbox == "fifo":
        done.backlog_bytes = float(delays.waiting() * load.row_bytes)
    else:
        done.backlog_bytes = float(delays.rows_behind() * load.row_bytes)
    _set_rate(cluster, plan.wide_bytes_per_s)
    while done.recovered_ms is None and cluster.now_ms < wide_ms + plan.recover_s * 1_000:
        publishing.run(load.step_ms, report)
        if delays.oldest_ms(cluster.now_ms) <= NORMAL_MS:
            done.recovered_ms = float(cluster.now_ms - wide_ms)


def _set_rate(cluster: VirtualCluster, rate_bytes_per_s: float | None) -> None:
    cluster.options = pipes(rate_bytes_per_s)
    budget = None if rate_bytes_per_s is None else rate_bytes_per_s * BUDGET_SHARE
    for region in DELAYS_MS:
        cluster.set_rate(HOME, region, budget)


def _drain(cluster: VirtualCluster, delays: Delays, report: Callable[[str], None]) -> None:
    _set_rate(cluster, None)

    def drained() -> bool:
        report(f"{delays.waiting():,} updates on their way")
        return not delays.waiting()

    cluster.run_until(drained, DRAIN_MS_MAX, 200)
    cluster.run(2_000)


def _links(cluster: VirtualCluster) -> list[object]:
    """What the trainer says of its links to other regions."""
    machine = cluster.nodes[TRAINER].machine
    assert machine is not None
    return [peer for peer in machine.status(cluster.now()).peers if peer.region != HOME and peer.rows_out]


def _are_equal(cluster: VirtualCluster) -> bool:
    """Whether every node holds the trainer's rows, bit for bit, under the same stamps."""
    held = [_rows_of(cluster, name) for name in NODES]
    return all(all(np.array_equal(one, other) for one, other in zip(held[0], each, strict=True)) for each in held[1:])


def _rows_of(cluster: VirtualCluster, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys in order, their stamps, their values."""
    model = cluster.nodes[name].store.models[cluster.model.name]
    everything = model.scan_since(np.zeros((model.shards, 4_096), np.uint64))
    columns = [model.read(selection.table, selection.slots) for selection in everything if len(selection.slots)]
    assert len(columns) == 1, f"{name} holds rows of {len(columns)} tables"
    order = np.argsort(columns[0].keys)
    stamps = columns[0].stamps
    assert stamps is not None
    return columns[0].keys[order], stamps[order], columns[0].rows.reshape(len(order), -1)[order]


_NOTHING = Timeline(np.empty(0), np.empty(0), np.empty(0, np.uint8))
