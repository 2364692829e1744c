"""One scenario in virtual time, with every invariant checked; and what to do about a seed that fails.

A run: the cluster forms, then load and faults run for the scenario's duration while a `Watch` looks again and again, then all
faults end, and within the settling time every node must hold the same.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Final

from ekko.model import ModelSpec, TableSpec
from p2p import outbox, wire
from p2p.sync import PRESETS
from sim_cluster.checkers import Watch
from sim_cluster.network import NetworkOptions
from sim_cluster.scenario import FaultEvent, Faults, Scenario
from sim_cluster.virtual import Meter, VirtualCluster

FORM_MS_MAX: Final = 60_000  # until all nodes have caught up with the cluster at its start
QUEUES_EVERY_MS: Final = 5_000
MINIMISE_RUNS_MAX: Final = 60
_PLAIN: Final = NetworkOptions()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run."""

    seed: int
    problem: str  # the first violation, or an empty string
    at_ms: int  # virtual, when the run ended
    trace: str  # hash of everything delivered
    writes: int
    delivered: int
    rejected: int
    delay_p99_ms: int
    wall_s: float


def run_virtual(scenario: Scenario, seed: int, faults: Faults | None = None) -> Outcome:
    """Run a scenario once; never raises for what the cluster does wrong."""
    begin = time.perf_counter()
    run = _Run(scenario, seed, faults if faults is not None else scenario.faults(seed))
    with small_messages(run.faults.message_bytes_max):
        problem = run.problem()
    cluster, meter = run.cluster, run.meter
    delays = sorted(meter.delays_ms)
    return Outcome(
        seed,
        problem,
        cluster.now_ms,
        cluster.trace,
        len(meter.published_ms),
        cluster.delivered,
        sum(len(node.rejected) for node in cluster.nodes.values()),
        delays[len(delays) * 99 // 100] if delays else 0,
        time.perf_counter() - begin,
    )


@contextmanager
def small_messages(bytes_max: int) -> Iterator[None]:
    """Batches and chunks are cut at so many bytes meanwhile, so that parts and chunks are many; 0: as in production."""
    places = ((wire, "BATCH_BYTES_MAX"), (outbox, "CHUNK_BYTES_MAX"))
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places if bytes_max else ():
            setattr(module, name, bytes_max)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def models_of(scenario: Scenario) -> list[ModelSpec]:
    """The models that the scenario's nodes carry."""
    tables = {"item": TableSpec("item", 4), "user": TableSpec("user", 2)}
    return [ModelSpec(f"model-{n + 1}", scenario.workload.shards, dict(tables)) for n in range(scenario.workload.models)]


class _Run:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario, seed: int, faults: Faults) -> None:
        self.faults = faults
        self._scenario = scenario
        self._rng = random.Random(f"load of {seed}")
        models = models_of(scenario)
        self.cluster = VirtualCluster(
            seed, NetworkOptions(links=scenario.network.links), models[0], models[1:], PRESETS[scenario.sync]
        )
        self.meter = self.cluster.meter = Meter()
        self._watch = Watch(self.cluster)
        self._published = 0
        self._ends: list[tuple[int, int, Callable[[], None]]] = []  # what undoes a fault, and when

    def problem(self) -> str:
        """Run to the end, or to the first violation."""
        try:
            return self._form() or self._disturb() or self._settle()
        except AssertionError as error:
            return f"an assertion failed: {error}"

    def _form(self) -> str:
        cluster, seeds = self.cluster, [self._scenario.trainer]
        for node in self._scenario.nodes:
            cluster.add(node.name, node.region, node.role, [] if node.name in seeds else seeds)

        def formed() -> bool:
            return all(node.machine and node.machine.status(cluster.now_of(node)).synced for node in cluster.nodes.values())

        return "" if cluster.run_until(formed, FORM_MS_MAX, 500) else "the cluster did not form on a network without faults"

    def _disturb(self) -> str:
        cluster, scenario = self.cluster, self._scenario
        cluster.options = self.faults.network
        start_ms = cluster.now_ms
        events = [replace(event, at_ms=event.at_ms + start_ms) for event in self.faults.events]
        step_ms = max(1, int(1000 / scenario.workload.batches_per_s))
        check_ms = queues_ms = start_ms
        while cluster.now_ms < start_ms + scenario.duration_ms:
            self._undo(cluster.now_ms)
            while events and events[0].at_ms <= cluster.now_ms:
                self._begin(events.pop(0))
            self._publish()
            cluster.run(step_ms)
            if cluster.now_ms >= check_ms:
                check_ms = cluster.now_ms + scenario.check_ms
                if problem := self._watch.check():
                    return problem
            if cluster.now_ms >= queues_ms:
                queues_ms = cluster.now_ms + QUEUES_EVERY_MS
                if problem := self._watch.check_queues():
                    return problem
        return ""

    def _settle(self) -> str:
        cluster = self.cluster
        self._undo(cluster.now_ms + 1_000_000_000)
        cluster.options = NetworkOptions(links=self._scenario.network.links)
        problem = ""

        def settled() -> bool:
            nonlocal problem
            problem = self._watch.check_converged()
            return not problem

        cluster.run_until(settled, self._scenario.settle_ms, 500)
        return problem or self._watch.check_queues()

    # --- load

    def _publish(self) -> None:
        load, rng = self._scenario.workload, self._rng
        trainer = self.cluster.nodes[self._scenario.trainer]
        count, table, model = rng.randint(1, load.rows), rng.choice(["item", "user"]), rng.choice(list(self.cluster.models))
        keys = [int(load.keys * rng.random() ** 3) for _ in range(count)]
        delete = rng.random() < load.deletes
        if trainer.machine is None or trainer.paused:
            return
        self._published += 1
        self.cluster.publish(trainer.name, table, keys, float(self._published), delete, model)

    # --- faults

    def _begin(self, event: FaultEvent) -> None:
        cluster, node = self.cluster, self.cluster.nodes[event.node]
        undo: Callable[[], None]
        match event.kind:
            case "crash" | "lose":
                if node.machine is None:
                    return  # it is down already
                cluster.crash(event.node)
                undo = lambda: cluster.restart(event.node, keep_state=event.kind == "crash")  # noqa: E731
            case "pause":
                if node.machine is None or node.paused:
                    return
                cluster.pause(event.node)
                undo = lambda: cluster.resume(event.node)  # noqa: E731
            case "clock":
                cluster.shift_clock(event.node, event.amount_ms)
                undo = lambda: cluster.shift_clock(event.node, -event.amount_ms)  # noqa: E731
            case _:
                cut = self._links_of(event) - cluster.cut
                cluster.cut |= cut
                undo = lambda: cluster.cut.difference_update(cut)  # noqa: E731
        self._ends.append((event.at_ms + event.for_ms, len(self._ends), undo))

    def _links_of(self, event: FaultEvent) -> set[tuple[str, str]]:
        others = [name for name in self.cluster.nodes if name != event.node]
        into = {(other, event.node) for other in others} if event.kind in ("isolate", "deaf") else set()
        out = {(event.node, other) for other in others} if event.kind in ("isolate", "mute") else set()
        return into | out

    def _undo(self, now_ms: int) -> None:
        due = sorted(end for end in self._ends if end[0] <= now_ms)
        self._ends = [end for end in self._ends if end[0] > now_ms]
        for _, _, undo in due:
            undo()


# --- a seed that fails --------------------------------------------------------------------------------------------------------


def minimise(scenario: Scenario, seed: int, faults: Faults, runs_max: int = MINIMISE_RUNS_MAX) -> tuple[Faults, int]:
    """Fewer faults under which the seed still fails: events are removed by halves, then quarters and so on (delta debugging),
    then each fault of the network is switched off.

    Returns:
        The faults that are left, and how many runs it took.
    """
    runs = 0

    def fails(candidate: Faults) -> bool:
        nonlocal runs
        runs += 1
        return bool(run_virtual(scenario, seed, candidate).problem)

    size = max(1, len(faults.events) // 2)
    while faults.events and runs < runs_max:
        removed = False
        begin = 0
        while begin < len(faults.events) and runs < runs_max:
            rest = faults.events[:begin] + faults.events[begin + size :]
            if fails(replace(faults, events=rest)):
                faults, removed = replace(faults, events=rest), True
            else:
                begin += size
        if size == 1 and not removed:
            break
        size = max(1, size // 2)
    for name in [one.name for one in fields(NetworkOptions) if one.name != "links"]:
        plain = getattr(_PLAIN, name)
        if runs < runs_max and getattr(faults.network, name) != plain:
            candidate = replace(faults, network=replace(faults.network, **{name: plain}))
            faults = candidate if fails(candidate) else faults
    return faults, runs
