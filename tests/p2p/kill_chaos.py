"""Scenarios about the lives of nodes: what reaches the next one, what a kill in mid-step leaves, what an attach makes of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

from ekko.store import recent
from p2p import messages as m
from p2p import wire
from p2p.pushing import push
from p2p.stamps import writer_of
from sim_cluster.checkers import Watch
from sim_cluster.network import NetworkOptions
from sim_cluster.scenario import FaultEvent, load_scenario
from sim_cluster.swarm import run_virtual
from sim_cluster.virtual import VirtualCluster
from tests.p2p.chaos import REGIONS, at_rest, chaos, check_claims, form

SWARM = Path(__file__).parent.parent.parent / "scenarios/swarm.toml"


def an_answer_comes_to_the_next_life(seed: int) -> None:
    """A node asks with the vector of its memory, loses the memory, and the answer reaches its next process (R3).

    That one has asked too, its first question as the other's, and with an empty vector.
    """
    quick = NetworkOptions(delay_ms_min=5, delay_ms_max=5, reorder_probability=1.0, afterlife_probability=1.0)
    cluster = VirtualCluster(seed, quick)
    trainer = cluster.add("t1", "home", "train")
    joiner = cluster.add("eu1", "eu", seeds=["t1"])
    cluster.run(3_000)
    cluster.publish("t1", "item", range(40), 1.0)
    at_rest(cluster)
    cluster.crash("eu1")
    cluster.publish("t1", "user", [1], 2.0)
    assert trainer.machine is not None
    served = trainer.machine.counters.pulls_served
    with mock.patch.object(push.Push, "_forward"):  # only answers tell anybody anything
        cluster.restart("eu1")
        # The answer is slow, and what the next process says and hears is quick.
        assert cluster.run_until(lambda: _started(cluster, "eu1"), 5_000, 1)
        cluster.options = replace(quick, delay_ms_min=60, delay_ms_max=60)
        assert cluster.run_until(lambda: _served(cluster) > served, 5_000, 1)
        cluster.options = quick
        cluster.crash("eu1")
        cluster.restart("eu1", keep_state=False)
        for _ in range(200):
            cluster.run(1)
            check_claims(cluster)
    assert joiner.machine is not None
    assert joiner.machine.counters.strangers, "nothing of the former life came"
    at_rest(cluster)


def _started(cluster: VirtualCluster, name: str) -> bool:
    machine = cluster.nodes[name].machine
    return machine is not None and machine.counters.pulls_started > 0


def _served(cluster: VirtualCluster) -> int:
    machine = cluster.nodes["t1"].machine
    assert machine is not None
    return machine.counters.pulls_served


def a_writer_is_killed_in_mid_step(seed: int) -> None:
    """At every step of a step, one after the other by seed; it comes back with its memory and writes on (R4)."""
    cluster = form(seed)
    cluster.run(5_000)
    for kill in range(4):
        assert cluster.publish("t1", "item", range(20), float(kill))
        cluster.run(200)
        cluster.kill_within("t1", seed % 12 + kill)
        cluster.publish("t1", "item", range(10, 70), 10.0 + kill)
        cluster.crash("t1")
        cluster.restart("t1")
        cluster.run(100)  # the others know it again, and have not pulled from it
        assert cluster.run_until(lambda: cluster.publish("t1", "item", range(100, 160), 3.0) != 0), "it cannot write any more"
        check_claims(cluster)
        cluster.run(2_000)
    at_rest(cluster)


def a_writer_is_killed_in_mid_row(seed: int) -> None:
    """Every kill comes while rows are overwritten; at once, and whatever it writes then, each row is of one version (R23)."""
    cluster = form(seed)
    cluster.run(5_000)
    watch = Watch(cluster)
    for kill in range(4):
        assert cluster.run_until(lambda: cluster.publish("t1", "item", range(20), float(kill)) != 0)  # noqa: B023
        cluster.run(200)
        assert watch.check() == ""
        cluster.kill_within("t1", 2 + (seed + kill) % 2)
        cluster.publish("t1", "item", range(20), 10.0 + kill)
        assert cluster.nodes["t1"].machine is None, "the kill came elsewhere"
        assert watch.check() == "", f"seed {seed}: {watch.check()}"
        cluster.restart("t1")
        cluster.run(1_000)
    at_rest(cluster)
    assert watch.check_converged() == ""


@contextmanager
def small_caches() -> Iterator[None]:
    """Update caches of a few dozen entries: they are pruned all the time, and half of the answers take a scan."""
    with mock.patch.multiple(recent, WINDOW_MIN=16, WINDOW_START=24, RING_START=8):
        yield


def chaos_with_small_caches(seed: int) -> None:
    """`chaos`, in which nodes attach to their memory again, and caches forget."""
    with small_caches():
        chaos(seed)


def a_wait_for_what_was_not_pushed(seed: int) -> None:
    """R21: a wait does not end well before all who are alive have the step, which here only the repair brings."""
    cluster = form(seed)
    cluster.run(5_000)
    trainer, keyspace = cluster.nodes["t1"], cluster.model.id
    with mock.patch.object(push.Push, "_forward"):
        stamp = cluster.publish("t1", "item", [1, 2, 3], 1.0)
    request = cluster.ask("t1", lambda number: m.WaitRequested(number, keyspace, stamp, m.Scope.ALL, 20_000))
    assert cluster.run_until(lambda: request in trainer.replies, 30_000, 1), "the wait never ended"
    assert trainer.replies[request] == m.WaitEnded(request, ())
    for name in (*REGIONS["eu"], *REGIONS["us"]):
        frontier = int(cluster.nodes[name].store.models["ctr"].frontier[writer_of(stamp)])
        assert frontier >= stamp, f"seed {seed}: the wait ended, and {name} has not got the step"


def nothing_goes_wrong_in_many_messages(seed: int) -> None:
    """R7: steps of many messages, shards of many parts; on a network without faults nobody has to pull."""
    with mock.patch.object(wire, "BATCH_BYTES_MAX", 100):
        cluster = form(seed)
        cluster.run(5_000)
        before = {node.name: _pulls(cluster, node.name) for node in cluster.nodes.values()}
        for step in range(10):
            cluster.publish("t1", "item", range(step, step + 60), float(step), delete=step % 4 == 3)
            cluster.run(300)
        at_rest(cluster)
        pulled = [name for name, pulls in before.items() if _pulls(cluster, name) > pulls]
        assert not pulled, f"seed {seed}: {pulled} had to pull"


def a_storm_with_short_queues(seed: int) -> None:
    """Invariant 5: a few seconds of swarm in which every bound is met, and nothing of former lives may be kept."""
    scenario = replace(load_scenario(SWARM), duration_ms=6_000)
    crashes = tuple(FaultEvent(at, "crash", "us-s1", 300) for at in (500, 1_500, 2_500))
    faults = scenario.faults(seed)
    outcome = run_virtual(scenario, seed, replace(faults, events=(*crashes, *faults.events[:4]), short_queues=True))
    assert outcome.problem == "", f"seed {seed}: {outcome.problem}"


def _pulls(cluster: VirtualCluster, name: str) -> int:
    machine = cluster.nodes[name].machine
    assert machine is not None
    return machine.counters.pulls_started
