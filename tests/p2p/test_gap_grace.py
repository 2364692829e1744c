"""What is late is not pulled, what is missing is, and soon."""

from unittest import mock

import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import knowledge
from p2p.link.links import Link
from p2p.messages import Batch, Envelope, Now
from p2p.pulling import pull
from p2p.pushing import push
from sim_cluster.network import NetworkOptions
from sim_cluster.virtual import VirtualCluster

CALM = NetworkOptions(1, 1, region_delay_ms=20)
# More than eight nodes have four trees; the trainer's card sends a step's messages over some 200 ms.
BUSY = NetworkOptions(1, 1, region_delay_ms=20, card_bytes_per_ms=300.0)
STEPS = 20


def twelve() -> VirtualCluster:
    """Eleven nodes behind a trainer, in three regions."""
    cluster = VirtualCluster(1, CALM, ModelSpec("ctr", 16, {"item": TableSpec("item", 32)}))
    for number in range(12):
        cluster.add(f"n{number}", f"r{number % 3}", "serve" if number else "train", ["n0"] if number else [])
    machines = [node.machine for node in cluster.nodes.values()]
    assert cluster.run_until(lambda: all(len(one.status(cluster.now()).peers) == 11 for one in machines if one is not None))
    cluster.run(2_000)
    return cluster


def counted(cluster: VirtualCluster) -> int:
    """Pulls begun so far."""
    return sum(node.machine.counters.pulls_started for node in cluster.nodes.values() if node.machine is not None)


def pulls_behind_a_busy_card(steps: int) -> int:
    """Pulls begun in so many steps."""
    cluster = twelve()
    cluster.options = BUSY
    before = counted(cluster)
    for step in range(steps):
        assert cluster.publish("n0", "item", range(100), float(step))
        cluster.run(400)
    return counted(cluster) - before


def test_a_busy_card_is_not_asked_for_what_it_is_sending() -> None:
    assert pulls_behind_a_busy_card(STEPS) < 11  # of twenty steps at eleven nodes


def test_were_late_taken_for_lost_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "LATE_GRACE_MS", pull.GAP_GRACE_MS)
    assert pulls_behind_a_busy_card(STEPS) > 100


def test_what_was_overtaken_on_its_own_tree_is_pulled_soon() -> None:
    cluster = twelve()
    assert cluster.publish("n0", "item", range(100), 1.0)
    cluster.run(400)
    pulls = counted(cluster)
    for node in cluster.nodes:
        cluster.cut.add(("n0", node))
    assert cluster.publish("n0", "item", range(100), 2.0)
    cluster.run(5)
    cluster.cut.clear()
    stamp = cluster.publish("n0", "item", range(100), 3.0)  # on all four trees
    cluster.run(400)
    assert counted(cluster) >= pulls + 11
    assert min(int(node.store.models["ctr"].frontier.max()) for node in cluster.nodes.values()) >= stamp > 0


def test_a_gap_is_asked_about_though_the_steps_behind_it_are_dropped_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of too many waiting steps the oldest is dropped. If the grace began anew with each, it would not end where the writer is
    # quicker than it.
    monkeypatch.setattr(knowledge, "OPEN_STEPS_MAX", 2)
    monkeypatch.setattr(pull, "GAP_GRACE_MS", 400)
    cluster = VirtualCluster(1, CALM)
    cluster.add("n0", "r0", "train")
    cluster.add("n1", "r1", "serve", ["n0"])
    machine = cluster.nodes["n1"].machine
    assert machine is not None
    assert cluster.run_until(lambda: machine.status(cluster.now()).synced)
    for step in range(30):
        if step == 5:
            cluster.cut.add(("n0", "n1"))
        assert cluster.publish("n0", "item", range(10), float(step))
        cluster.run(100)
        cluster.cut.clear()
    assert machine.counters.gaps == 1
    assert not machine._core.keyspaces[cluster.model.id].knowledge.open_steps


def repaired_ms(tree: int) -> int:
    """How long a node lacks the last step of which the message of one tree was lost on its way to it."""
    cluster = twelve()
    assert cluster.publish("n0", "item", range(100), 1.0)
    cluster.run(1_000)
    original = push.Push.receive

    def receive(self: push.Push, link: Link, envelope: Envelope, batch: Batch, now: Now) -> bool:
        lost = self._core.options.node == "n5" and batch.stamp == stamp and batch.tree == tree
        return not lost and original(self, link, envelope, batch, now)

    with mock.patch.object(push.Push, "receive", receive):
        stamp = cluster.publish("n0", "item", range(100), 2.0)
        begin_ms = cluster.now_ms
        frontier = cluster.nodes["n5"].store.models["ctr"].frontier
        assert cluster.run_until(lambda: int(frontier.max()) >= stamp > 0, 10_000, 1)
    return cluster.now_ms - begin_ms


@pytest.mark.parametrize("tree", range(4))
def test_a_message_of_the_last_step_is_missed_when_the_writer_says_that_nothing_came_since(tree: int) -> None:
    assert repaired_ms(tree) < push.IDLE_BEAT_MS + 200


def test_did_it_say_nothing_the_last_step_would_be_missed_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push.Push, "beat", lambda *_: None)
    assert max(repaired_ms(tree) for tree in range(4)) >= pull.LATE_GRACE_MS


def test_an_open_gap_wants_the_timer_only_when_there_is_something_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where messages get lost some step is open most of the time: looking every few milliseconds would be most of the work.
    monkeypatch.setattr(pull, "GAP_GRACE_MS", 3_000)
    cluster = VirtualCluster(1, CALM)
    cluster.add("n0", "r0", "train")
    cluster.add("n1", "r1", "serve", ["n0"])
    machine = cluster.nodes["n1"].machine
    assert machine is not None
    assert cluster.run_until(lambda: machine.status(cluster.now()).synced)
    assert cluster.publish("n0", "item", range(10), 0.0)
    cluster.run(1_000)
    cluster.cut.add(("n0", "n1"))
    assert cluster.publish("n0", "item", range(10), 1.0)
    cluster.run(50)
    cluster.cut.clear()
    looks: list[int] = []
    check = pull.Pull.check_gaps

    def counted_check(pulling: pull.Pull, now: Now) -> None:
        if pulling is machine._pull:
            looks.append(now.monotonic_ms)
        check(pulling, now)

    monkeypatch.setattr(pull.Pull, "check_gaps", counted_check)
    begin_ms = cluster.now_ms
    assert cluster.publish("n0", "item", range(10), 2.0)
    assert cluster.run_until(lambda: machine.counters.gaps == 1, step_ms=1)
    asked_ms = cluster.now_ms - begin_ms
    # Seen 20 ms after it came, asked about when its grace is over, to the millisecond.
    assert asked_ms == 21 + pull.GAP_LOOK_MS + pull.GAP_GRACE_MS
    assert len(looks) <= 2 + 6 * asked_ms // 1_000 + 1  # besides: heartbeats and acknowledgements
