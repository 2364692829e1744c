"""What is on its way is not pulled again and again: the grace of a gap is learned."""

import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import pull
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
