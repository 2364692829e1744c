"""One scenario in virtual time, with every invariant checked.

A run: the cluster forms, then load and faults run for the scenario's duration while a `Watch` looks again and again, then all
faults end, and within the settling time every node must hold the same. At last the cluster must be as good as new: what is
published then reaches every node by push alone, once, and waits for it end.
"""

import random
import time
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ekko.model import ModelSpec, TableSpec, table_id
from ekko.store import Store
from ekko.store.capacity import Capacity
from p2p import messages as m
from p2p.identity.ledger import NodeRecord
from p2p.machine import NodeStatus
from p2p.paper.sync import PRESETS
from p2p.pushing.groups import LINGER_MS
from p2p.stamps import writer_of
from p2p.versions import FIRST_VERSION, PROTOCOL_VERSION
from sim_cluster import comings, fences
from sim_cluster.bounds import little_credit, quick_evictions, short_queues, small_messages, soon_expired
from sim_cluster.checkers import Watch
from sim_cluster.disturbing import Disturbances
from sim_cluster.meter import Meter
from sim_cluster.network import NetworkOptions
from sim_cluster.node import VirtualNode
from sim_cluster.scenario import BURST_MAX, Faults, Scenario, Workload
from sim_cluster.version_watch import VersionWatch
from sim_cluster.virtual import VirtualCluster

FORM_MS_MAX: Final = 60_000  # until all nodes have caught up with the cluster at its start
# From the moment at which all rows are equal until everybody sees everybody alive and may write again.
RECOVER_MS_MAX: Final = 120_000
# Who came and went too often is kept out of the trees for up to 80 s, and as long messages may queue on a slow link. One seed
# in so many waits for all that; the others go on, since idle clusters cost time too.
PATIENT_EVERY: Final = 10
STEADY_MS: Final = 2_000
STEADY_STEPS: Final = 6
STEADY_EVERY_MS: Final = 400
READ_KEYS: Final = 20
WAIT_PROBABILITY: Final = 0.1
WAIT_MS_MAX: Final = 5_000
QUEUES_EVERY_MS: Final = 1_000


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
    groups: int  # messages received that several steps shared
    delay_p99_ms: int | None  # of batches; None where no batch travels, as without push
    wall_s: float


def run_virtual(scenario: Scenario, seed: int, faults: Faults | None = None) -> Outcome:
    """Run a scenario once; never raises for what the cluster does wrong."""
    begin = time.perf_counter()
    run = _Run(scenario, seed, faults if faults is not None else scenario.faults(seed))
    quick = quick_evictions(scenario.workload.room < 1)
    mortal = soon_expired(scenario.workload.ttl_s > 0)
    narrow = little_credit(_is_congested(run.faults))
    with small_messages(run.faults.message_bytes_max), short_queues(run.faults.short_queues), quick, mortal, narrow:
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
        meter.groups,
        delays[len(delays) * 99 // 100] if delays else None,
        time.perf_counter() - begin,
    )


def _is_congested(faults: Faults) -> bool:
    return any(event.kind == "congested" for event in faults.events)


def models_of(scenario: Scenario) -> list[ModelSpec]:
    """The models that the scenario's nodes carry."""
    load = scenario.workload
    tables = {name: TableSpec(name, dim, load.codec, ttl_s) for name, dim, ttl_s in (("item", 4, 0), ("user", 2, load.ttl_s))}
    return [
        ModelSpec(name, load.shards, dict(tables), partitions=load.partitions, codec=load.codec) for name in load.model_names
    ]


def room_for(model: ModelSpec, load: Workload) -> Capacity:
    """For as many rows of a model as the workload says."""
    held = Store.anonymous().add_model(model)
    strides = sum(table.stride for table in held.tables)
    return Capacity(held.memory_bytes + int(load.room * load.keys) * strides, "least_recently_updated")


@dataclass(frozen=True, slots=True)
class _Wait:
    """A wait for a step, and whom its asker took for alive then."""

    model: str
    stamp: int
    partitions: tuple[int, ...]  # that the step touched
    nodes: tuple[tuple[str, int], ...]  # with the lives they were in


class _Run:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario, seed: int, faults: Faults) -> None:
        self.faults = faults
        self._scenario = scenario
        self._rng = random.Random(f"load of {seed}")
        models = models_of(scenario)
        self._holds = scenario.holds(seed)
        self._limited, self._allowed = scenario.limited(seed), room_for(models[0], scenario.workload)
        self._readers = random.Random(f"readers of {seed}")
        self.cluster = VirtualCluster(
            seed, NetworkOptions(links=scenario.network.links), models[0], models[1:], PRESETS[scenario.sync]
        )
        self._disturbances = Disturbances(self.cluster, faults.network.links, self._limited)
        self.cluster.collect_ms, self.cluster.expel_after_ms = scenario.collect_ms, scenario.expel_after_ms
        self.meter = self.cluster.meter = Meter()
        self._watch = Watch(self.cluster)
        self._versions = VersionWatch(self.cluster)
        self._trainers = scenario.trainers[: 1 + seed % len(scenario.trainers)]
        self._published = 0
        self._refused = -1  # messages that were refused until the last look
        self._drained_ms = 0  # when what was sent before the faults ended will have come
        self._expulsions: dict[str, int] = {}  # by node: how many it has decided
        self._waits: dict[tuple[str, int, int], _Wait] = {}  # by node, its life and the request

    def problem(self) -> str:
        """Run to the end, or to the first violation."""
        try:
            return self._form() or self._disturb() or self._settle() or self._recover() or self._work_on()
        except AssertionError as error:
            return f"an assertion failed: {error}"

    def _form(self) -> str:
        cluster, seeds, old = self.cluster, [self._scenario.trainer], self._old_nodes()
        for node in self._scenario.nodes:
            version = FIRST_VERSION if node.name in old else PROTOCOL_VERSION
            others = [] if node.name in seeds else seeds
            allowed = self._allowed if node.name in self._limited else None
            cluster.add(node.name, node.region, node.role, others, version, hold=self._holds[node.name], capacity=allowed)

        def formed() -> bool:
            return all(node.machine and node.machine.status(cluster.now_of(node)).synced for node in cluster.nodes.values())

        if not cluster.run_until(formed, FORM_MS_MAX, 500):
            return "the cluster did not form on a network without faults"
        if old:
            # In version 1 ids are granted by whoever writes. Two sides of a split would both do so; its users kept to one
            # training node, and it wrote before anything went wrong.
            self._trainers = [self._scenario.trainer]
            if not self._writer():
                return "nobody may write in a cluster with nodes of version 1"
            cluster.run(STEADY_MS)
        return ""

    def _old_nodes(self) -> set[str]:
        """Who begins in version 1: who is upgraded later, if that version knows models like these."""
        if any(spec.since > FIRST_VERSION for spec in self.cluster.models.values()):
            return set()
        return {event.node for event in self.faults.events if event.kind == "upgrade"}

    def _disturb(self) -> str:
        cluster, scenario = self.cluster, self._scenario
        cluster.options = self.faults.network
        start_ms = cluster.now_ms
        events = [replace(event, at_ms=event.at_ms + start_ms) for event in self.faults.events]
        step_ms = max(1, int(1000 / scenario.workload.batches_per_s))
        check_ms = queues_ms = start_ms
        while cluster.now_ms < start_ms + scenario.duration_ms:
            self._disturbances.end(cluster.now_ms)
            while events and events[0].at_ms <= cluster.now_ms:
                self._disturbances.begin(events.pop(0))
            self._publish()
            self._read()
            cluster.run(step_ms)
            self._note_expelled()
            if problem := self._broken_promise():
                return problem
            if cluster.now_ms >= check_ms:
                check_ms = cluster.now_ms + scenario.check_ms
                if problem := self._watch.check() or self._versions.check() or fences.check_fences(cluster):
                    return problem
            if cluster.now_ms >= queues_ms:
                queues_ms = cluster.now_ms + QUEUES_EVERY_MS
                if problem := self._watch.check_queues():
                    return problem
        return ""

    def _settle(self) -> str:
        cluster = self.cluster
        self._disturbances.end(cluster.now_ms + 1_000_000_000)
        cluster.options = NetworkOptions(links=self._scenario.network.links)
        self._drained_ms = cluster.drained_ms
        problem, fenced = "", "fence" in self._scenario.kinds

        def settled() -> bool:
            nonlocal problem
            if fenced:
                fences.end(cluster)  # who lifted them may have been killed before others heard
                problem = fences.lifted_everywhere(cluster)
            problem = (fenced and problem) or self._watch.check_converged() or comings.disagreement(cluster)
            return not problem

        cluster.run_until(settled, self._scenario.settle_ms, 500)
        down = [node.name for node in cluster.nodes.values() if node.machine is None]
        if down and not problem:
            return f"not running after all faults ended: {', '.join(down)}"
        return problem or self._watch.check_queues()

    def _recover(self) -> str:
        """Nothing of before is on its way, everybody sees everybody and is in step with the cluster, and somebody may write."""
        cluster, problem = self.cluster, ""

        def recovered() -> bool:
            nonlocal problem
            problem = self._not_recovered()
            return not problem

        cluster.run_until(recovered, RECOVER_MS_MAX, 1_000)
        return f"{RECOVER_MS_MAX / 1000:g} s after the storm {problem}" if problem else ""

    def _not_recovered(self) -> str:
        patient = self.cluster.seed % PATIENT_EVERY == 0
        if patient and self.cluster.now_ms < self._drained_ms:
            return "messages of before are on their way"
        refused, self._refused = self._refused, sum(len(node.rejected) for node in self.cluster.nodes.values())
        if self._refused != refused:
            # A clock was so far ahead that its node's stamps are refused for a while, also those of steps without rows; who
            # missed these pulls when the first one is taken.
            return "messages are refused"
        for node in self.cluster.nodes.values():
            status = _status(self.cluster, node)
            unseen = [peer.node for peer in status.peers if not peer.alive]
            if unseen or len(status.peers) != len(self.cluster.nodes) - 1:
                return f"{node.name} takes only {len(status.peers) - len(unseen)} others for alive"
            if not status.synced:
                return f"{node.name} has not caught up"
            if any(keyspace.open_steps or keyspace.pulling_from for keyspace in status.keyspaces):
                return f"{node.name} still repairs"
        if patient and (held_out := self._held_out()):
            return held_out
        if retiring := self._retiring():
            return retiring
        # Who writes for the first time after it lost its memory retires its former ids then, which is a repair like others.
        return self._retiring() if self._writer() else "nobody may write"

    def _retiring(self) -> str:
        """Who is not done with retired writers, or is about to retire a former one of its own; nodes pull meanwhile (R13)."""
        # Of a model in partitions each of them has an entry, and the model itself has one that never changes (R13).
        divided = {spec.id for spec in self.cluster.models.values() if spec.partitions > 1}
        for node in self.cluster.nodes.values():
            record = NodeRecord.load(node.ledger)
            if any(retired.stage != m.DONE and retired.keyspace not in divided for retired in record.retired.values()):
                return f"{node.name} is not done with a retired writer"
            for name, model in self.cluster.models.items():
                identity = node.store.models[name].writer
                own = [nonce for (family, _), nonce in record.own.items() if family == model.id]
                if identity is not None and any(nonce != identity.nonce for nonce in own):
                    return f"{node.name} has not retired the id under which it wrote before it lost its memory"
        return ""

    def _held_out(self) -> str:
        for node in self.cluster.nodes.values():
            for peer in _status(self.cluster, node).peers:
                if not peer.in_trees:
                    return f"{node.name} keeps {peer.node} out of the trees"
        return ""

    def _writer(self) -> str:
        """Who may write to every model, found by writing; or nobody."""
        for name in self._scenario.trainers:
            if all(self.cluster.publish(name, "item", [0], -1.0, False, model) for model in self.cluster.models):
                return name
        return ""

    def _work_on(self) -> str:
        """Some more steps, and waits for them. When all nodes are in the trees nothing is wrong any more: each row of a batch
        enters a region once and a node once (invariant 10), and nobody has to pull.
        """
        cluster, rng = self.cluster, self._rng
        cluster.run(STEADY_MS)  # what was written while they recovered has come by now
        before = {name: self._counters(name) for name in cluster.nodes}
        # With short queues push loses also on a quiet network: credit that was lost with its messages is missed for 10 s.
        # With little credit a few steps are enough for children to be handed over, and what changes hands may come twice.
        steady = cluster.sync.push and not self.faults.short_queues and not _is_congested(self.faults)
        steady = steady and not self._held_out() and cluster.now_ms >= self._drained_ms
        self.meter.into_region.clear()
        writer, begin_ms = self._writer(), cluster.now_ms
        steady = steady and not self._retiring()  # somebody else may write than a moment ago
        for step in range(STEADY_STEPS if writer else 0):
            model = rng.choice(list(cluster.models))
            keys = [int(self._scenario.workload.keys * rng.random()) for _ in range(self._scenario.workload.rows)]
            stamp = cluster.publish(writer, "item", keys, float(-step - 2), False, model)
            self._wait_for(writer, model, stamp)
            cluster.run(STEADY_EVERY_MS)
        cluster.run(WAIT_MS_MAX)
        if problem := self._broken_promise():
            return problem
        if self._waits or not writer:
            return f"from {begin_ms} ms on nothing was wrong, and nobody could write, or waits did not end"
        if steady and not self._held_out() and (problem := self._not_once(before)):
            return f"from {begin_ms} ms on nothing was wrong, and {problem}"
        return self._watch.check_converged()

    def _counters(self, name: str) -> tuple[int, int]:
        machine = self.cluster.nodes[name].machine
        assert machine is not None
        return machine.counters.batches_repeated, machine.counters.pulls_started

    def _not_once(self, before: dict[str, tuple[int, int]]) -> str:
        twice = [place for place, times in self.meter.into_region.items() if times > 1]
        if twice:
            return f"a batch entered a region twice: {twice[0]}"
        for name, (repeats, pulls) in before.items():
            repeats_now, pulls_now = self._counters(name)
            if repeats_now > repeats:
                return f"batches came twice to {name}"
            if pulls_now > pulls:
                return f"{name} pulled"
        return ""

    # --- load

    def _publish(self) -> None:
        """A batch, or a burst of some."""
        burst = self._rng.random() < self._scenario.workload.bursts
        for _ in range(self._rng.randint(2, BURST_MAX) if burst else 1):
            self._publish_one()
            if burst:
                self.cluster.run(self._rng.randint(0, LINGER_MS // 2))

    def _read(self) -> None:
        """Readers of nodes with little memory ask for some keys, which may have been dropped there."""
        for name in self._limited:
            keys = np.array(
                sorted({self._readers.randrange(self._scenario.workload.keys) for _ in range(READ_KEYS)}), np.uint64
            )
            for model in self.cluster.nodes[name].store.models.values():
                model.fetching.note_asked(table_id("item"), keys, self.cluster.now_ms / 1000)

    def _publish_one(self) -> None:
        load, rng = self._scenario.workload, self._rng
        count, table, model = rng.randint(1, load.rows), rng.choice(["item", "user"]), rng.choice(list(self.cluster.models))
        keys = [int(load.keys * rng.random() ** 3) for _ in range(count)]
        delete, trainer = rng.random() < load.deletes, rng.choice(self._trainers)
        waits = rng.random() < WAIT_PROBABILITY
        node = self.cluster.nodes[trainer]
        if node.machine is None or node.paused:
            return
        self._published += 1
        stamp = self.cluster.publish(trainer, table, keys, float(self._published), delete, model)
        if stamp and waits:
            self._wait_for(trainer, model, stamp)

    def _wait_for(self, name: str, model: str, stamp: int) -> None:
        node = self.cluster.nodes[name]
        if node.machine is None:
            return
        peers = [peer.node for peer in node.machine.status(self.cluster.now_of(node)).peers if peer.alive]
        seen = tuple((peer, self.cluster.nodes[peer].lives) for peer in peers)
        keyspace = self.cluster.models[model].id
        request = self.cluster.ask(name, lambda number: m.WaitRequested(number, keyspace, stamp, m.Scope.ALL, WAIT_MS_MAX))
        keys = np.array([write.key for write in self.cluster.history if write.stamp == stamp], np.uint64)
        touched = np.unique(node.store.models[model].partition_of(keys)).tolist()
        self._waits[name, node.lives, request] = _Wait(model, stamp, tuple(touched), seen)

    def _broken_promise(self) -> str:
        """R21: a wait that ended well says that the step is visible at all who were alive when it began."""
        for (name, life, request), wait in list(self._waits.items()):
            node = self.cluster.nodes[name]
            reply = node.replies.get(request)
            if reply is None and node.lives == life and node.machine is not None:
                continue
            del self._waits[name, life, request]
            for peer, its_life in wait.nodes if isinstance(reply, m.WaitEnded) and not reply.lagging else ():
                other = self.cluster.nodes[peer]
                if other.lives == its_life and not _reached(other, wait):
                    return f"a wait of {name} for {wait.stamp} ended, and {peer} has not got it"
        return ""

    def _note_expelled(self) -> None:
        """Who was away too long was expelled."""
        cluster = self.cluster
        for node in cluster.nodes.values():
            told = [note for note in node.notes if note.name == "node_expelled"]
            for note in told[self._expulsions.get(node.name, 0) :]:
                cluster.note_expelled(str(dict(note.fields)["node"]))
            self._expulsions[node.name] = len(told)


def _status(cluster: VirtualCluster, node: VirtualNode) -> NodeStatus:
    assert node.machine is not None
    return node.machine.status(cluster.now_of(node))


def _reached(node: VirtualNode, wait: _Wait) -> bool:
    """Whether all that the step's writer wrote up to it is visible on a node."""
    model = node.store.models[wait.model]
    held = [partition for partition in wait.partitions if partition in model.hold]
    return bool((model.frontiers[held, writer_of(wait.stamp)] >= wait.stamp).all())
