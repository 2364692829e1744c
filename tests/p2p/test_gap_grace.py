"""What is on its way is not pulled again and again: the grace of a gap is learned."""

import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import knowledge, pull
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster

CALM = NetworkOptions(1, 1, region_delay_ms=20)
# More than eight nodes have four trees; the trainer's card sends a step's messages over some 200 ms.
BUSY = NetworkOptions(1, 1, region_delay_ms=20, card_bytes_per_ms=300.0)
STEPS = 20


def pulls_behind_a_busy_card(steps: int) -> list[int]:
    """Pulls begun in the first steps, and in as many later ones."""
    cluster = VirtualCluster(1, CALM, ModelSpec("ctr", 16, {"item": TableSpec("item", 32)}))
    for number in range(12):
        cluster.add(f"n{number}", f"r{number % 3}", "serve" if number else "train", ["n0"] if number else [])
    machines = [node.machine for node in cluster.nodes.values()]
    assert cluster.run_until(lambda: all(len(m.status(cluster.now()).peers) == 11 for m in machines if m is not None))
    cluster.run(2_000)
    cluster.options = BUSY
    counts = []
    for begin in (0, steps):
        before = sum(m.counters.pulls_started for m in machines if m is not None)
        for step in range(begin, begin + steps):
            assert cluster.publish("n0", "item", range(100), float(step))
            cluster.run(400)
        counts.append(sum(m.counters.pulls_started for m in machines if m is not None) - before)
    return counts


def test_a_busy_card_is_not_asked_for_what_it_is_sending() -> None:
    first, later = pulls_behind_a_busy_card(STEPS)
    assert first > 11  # every node had to learn it
    assert later < 11  # of twenty steps at eleven nodes


def test_without_learning_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "GAP_GRACE_MS_MAX", pull.GAP_GRACE_MS)
    _, later = pulls_behind_a_busy_card(STEPS)
    assert later > 100


def test_a_gap_is_asked_about_though_the_steps_behind_it_are_dropped_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of too many waiting steps the oldest is dropped. If the grace began anew with each, it would not end where the writer is
    # quicker. Here the writer is idle; its beats change no vector, so that no digest shows what is missing.
    monkeypatch.setattr(knowledge, "OPEN_STEPS_MAX", 2)
    cluster = VirtualCluster(1, CALM)
    cluster.add("n0", "r0", "train")
    cluster.add("n1", "r1", "serve", ["n0"])
    machine = cluster.nodes["n1"].machine
    assert machine is not None
    assert cluster.run_until(lambda: machine.status(cluster.now()).synced)
    assert cluster.publish("n0", "item", range(10))
    cluster.run(1_000)
    (keyspace,) = machine._core.keyspaces.values()
    keyspace.gap_grace_ms = pull.GAP_GRACE_MS_MAX  # it has learned to be patient
    cluster.cut.add(("n0", "n1"))
    cluster.run(300)  # a beat is lost
    cluster.cut.clear()

    assert cluster.run_until(lambda: keyspace.knowledge.open_steps == 2, 2_000)
    assert cluster.run_until(lambda: not keyspace.knowledge.open_steps, 5 * pull.GAP_GRACE_MS_MAX)
